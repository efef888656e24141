"""tinygrad's CPU device on all cores, and without Python's toll at each kernel of a captured graph.

tinygrad 0.14 divides large kernels into parts for several cores, and then runs the parts one after another. Here they run side by side: all threads
walk through the same list of kernels in machine code (`WALK`), and whoever comes first takes the next part. So a core that is busy elsewhere holds
nobody up, and from one kernel to the next it takes a microsecond instead of the waking of a thread."""
import ctypes, functools, os, sys, threading, time
from queue import SimpleQueue
from typing import Any
import numpy as np
from tinygrad import Device, GlobalCounters, UOp
from tinydet.nn.kernel_cpu import on_host
from tinydet.runtime.fork import refuse_in_fork
from tinydet.parts import take

_lists: SimpleQueue = SimpleQueue()
_threads: list[threading.Thread] = []
_owner: list[int] = []   # the process whose device it is

_settings = take(*(f"tinygrad.helpers:{name}" for name in ("DEBUG", "NUM_CPU_THREADS", "PARALLEL")), instead="kernels run on one core")
_program = take("tinygrad.runtime.ops_cpu:CPUProgram", "tinygrad.device:TinyELF", "tinygrad.renderer.cstyle:ClangRenderer",
                instead="the parts of a kernel run one after another") if _settings else None
_graph = take("tinygrad.engine.jit:GraphRunner", "tinygrad.engine.jit:GraphRunner._all_devs", "tinygrad.device:MultiBuffer",
              "tinygrad.uop.ops:Ops.PROGRAM", instead="kernels on the CPU are started one by one") if _program else None
if _settings: DEBUG, NUM_CPU_THREADS, PARALLEL = _settings
CPUProgram, TinyELF, ClangRenderer = _program or (object,) * 3
GraphRunner, _, MultiBuffer, _Program = _graph or (object,) * 4

# `kernels` has a row for each kernel: its address, its parts, its number of words, where they begin in `words`, and the one that is a part's number,
# or -1. Any number of threads walk through the list with the same counters, which begin at 0: parts taken, and parts done, of each kernel. A kernel
# begins when all parts of the one before are done. More words than a kernel takes do no harm.
WALK = """
typedef long long word;
#define A(i) a[i], a[i + 1], a[i + 2], a[i + 3], a[i + 4], a[i + 5], a[i + 6], a[i + 7]
#define W8 word, word, word, word, word, word, word, word
void walk(const word *kernels, word count, const word *words, word *taken, word *done, void (*yield)(void)) {
  for (word k = 0; k < count; k++, kernels += 5) {
    const word parts = kernels[1], length = kernels[2], *from = words + kernels[3], number = kernels[4];
    word a[64];
    for (word part; __atomic_load_n(taken + k, __ATOMIC_RELAXED) < parts && (part = __atomic_fetch_add(taken + k, 1, __ATOMIC_ACQ_REL)) < parts;) {
      for (word i = 0; i < length; i++) a[i] = from[i];
      if (number >= 0) a[number] = part;
      if (length <= 8) ((void (*)(W8))kernels[0])(A(0));
      else if (length <= 16) ((void (*)(W8, W8))kernels[0])(A(0), A(8));
      else ((void (*)(W8, W8, W8, W8, W8, W8, W8, W8))kernels[0])(A(0), A(8), A(16), A(24), A(32), A(40), A(48), A(56));
      __atomic_fetch_add(done + k, 1, __ATOMIC_ACQ_REL);
    }
    for (word waits = 0; __atomic_load_n(done + k, __ATOMIC_ACQUIRE) < parts; waits++) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ volatile("yield");
#endif
      if (waits > 1000 && yield) yield();   // tens of microseconds: somebody else may need the core
    }
  }
}
"""


def use_all_cores(*names: str) -> None:
  """Let kernels that this process runs on the CPU device, and on others of its kind that `names` has among others, use as many cores as tinygrad's
  NUM_CPU_THREADS says, by default all of them. UserError in a fork of a process that did so."""
  if _owner: refuse_in_fork(_owner[0])
  else: _owner.append(os.getpid())
  for device in (Device[name] for name in dict.fromkeys(("CPU", *names)) if on_host(name)):
    if not _program or not isinstance(device.renderer, ClangRenderer): return   # other renderers' kernels take their arguments another way
    device.runtime_t = ThreadedProgram
    if _graph and DEBUG < 2: device.graph = CPUGraph   # whose kernels DEBUG=2 would not show one by one


def share_cores(processes: int) -> None:
  """Leave this process, one of so many on its machine, its part of the cores, to compile with and to run kernels on, unless the environment says how
  many. Results are the same to the last bit."""
  for setting in _settings[1:] if _settings else ():
    if setting.key not in os.environ: setting.value = max(1, setting.value // processes)


@functools.cache
def _walk() -> tuple[Any, int, Any]:
  """`WALK` as a function, the address of the system's call that offers the core to others, and what keeps the machine code in memory."""
  device = Device["CPU"]
  renderer = device.renderer
  program = CPUProgram(device, TinyELF(renderer.compiler.compile_cached(WALK), "walk", renderer.target, ()))
  library = ctypes.windll.kernel32 if sys.platform == "win32" else ctypes.CDLL(None)
  offer = getattr(library, "SwitchToThread" if sys.platform == "win32" else "sched_yield", None)
  return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6)(program.addr), ctypes.cast(offer, ctypes.c_void_p).value or 0, program


def _serve() -> None:
  while True:
    walk, arguments, _ = _lists.get()
    walk(*arguments)


def _run(kernels: np.ndarray, words: np.ndarray) -> None:
  """The kernels in the rows of `kernels`, i64 [n,5], one after the other, their parts side by side. Python's lock is not held meanwhile."""
  walk, offer, _ = _walk()
  counters = np.zeros((2, len(kernels)), np.int64)   # new ones: a thread that comes too late finds nothing left to take
  arguments = (kernels.ctypes.data, len(kernels), words.ctypes.data, counters[0].ctypes.data, counters[1].ctypes.data, offer)
  helpers = min(int(kernels[:, 1].max()), NUM_CPU_THREADS.value) - 1
  while len(_threads) < helpers:
    _threads.append(thread := threading.Thread(target=_serve, daemon=True))
    thread.start()
  for _ in range(helpers): _lists.put((walk, arguments, (kernels, words, counters)))   # with what must stay in memory
  walk(*arguments)


def _row(program: CPUProgram, parts: int, length: int, start: int) -> tuple[int, int, int, int, int]:
  """The kernel's row in the list that `WALK` takes."""
  return program.addr, parts, length, start, program.runtimevars.get("core_id", -1)


class ThreadedProgram(CPUProgram):
  """A kernel whose parts run side by side."""

  def __call__(self, *bufs: Any, global_size: tuple[int, int, int] = (1, 1, 1), vals: tuple[int | None, ...] = (), **options: Any) -> float | None:
    refuse_in_fork(_owner[0])
    if self.lvp or global_size[0] == 1: return super().__call__(*bufs, global_size=global_size, vals=vals, **options)
    begun = time.perf_counter()
    words = np.array([*(buf.va_addr for buf in bufs), *(value or 0 for value in vals)], np.int64)
    _run(np.array([_row(self, global_size[0], len(words), 0)]), words)
    return time.perf_counter() - begun if options.get("wait") else None


class CPUGraph(GraphRunner):
  """Kernels of a captured graph with their arguments made up in advance: tinygrad's own way there takes as long as many of the kernels."""

  def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
    super().__init__(linear, input_uops)
    rows, words = [], []
    inputs: dict[tuple[int, int], list[int]] = {}   # number of an input, and of its part -> the places of its address
    for (part, program, bufs, device_vars), runtime, replaced in zip(self.calls, self.runtimes, self.uop_replace):
      buffers, values = [bufs[i].get_buf(runtime.dev.device) for i in program.arg.globals], program.arg.vals(device_vars)
      for position, number in replaced:
        if position in program.arg.globals: inputs.setdefault((number, part), []).append(len(words) + program.arg.globals.index(position))
      rows.append(_row(runtime, program.arg.launch_dims(device_vars)[0][0], len(buffers) + len(values), len(words)))
      words += [*(buf.va_addr for buf in buffers), *(value or 0 for value in values)]
    self.kernels, self.words = np.array(rows, np.int64), np.array(words, np.int64)
    self.inputs = {which: np.array(places) for which, places in inputs.items()}

  @staticmethod
  def supports_uop(batch_devs: list[Any], new_call: UOp) -> bool:
    # CPU devices share one memory, so that a list may have kernels of several
    return new_call.src[0].op is _Program and {type(device) for device in GraphRunner._all_devs(batch_devs, new_call)} == {type(Device["CPU"])} \
      and set(new_call.src[0].arg.runtimevars) == {v.expr for v in new_call.src[0].arg.vars}

  def __call__(self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False) -> float | None:
    refuse_in_fork(_owner[0])
    for (number, part), places in self.inputs.items():
      buffer = input_uops[number].buffer
      self.words[places] = (buffer.bufs[part] if isinstance(buffer, MultiBuffer) else buffer).ensure_allocated()._buf.va_addr
    _run(self.kernels, self.words)
    GlobalCounters.kernel_count += len(self.kernels) - 1   # tinygrad counts the graph as one
    return None
