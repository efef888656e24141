"""tinygrad's CPU device on all cores, and without Python's toll at each kernel of a captured graph.

tinygrad 0.14 divides large kernels into parts for several cores, and then runs the parts one after another. Here they run side by side."""
import ctypes, os, threading, time
from queue import SimpleQueue
from typing import Any
from tinygrad import Device, GlobalCounters, UOp
from tinydet.runtime.fork import refuse_in_fork
from tinydet.parts import take

Arguments = list[ctypes.c_uint64]

_parts: SimpleQueue = SimpleQueue()
_threads: list[threading.Thread] = []
_owner: list[int] = []   # the process whose device it is

_settings = take(*(f"tinygrad.helpers:{name}" for name in ("DEBUG", "NUM_CPU_THREADS", "PARALLEL")), instead="kernels run on one core")
_program = take("tinygrad.runtime.ops_cpu:CPUProgram", instead="the parts of a kernel run one after another") if _settings else None
_graph = take("tinygrad.engine.jit:GraphRunner", instead="kernels on the CPU are started one by one") if _program else None
if _settings: DEBUG, NUM_CPU_THREADS, PARALLEL = _settings
CPUProgram, GraphRunner = (_program or (object,))[0], (_graph or (object,))[0]


def use_all_cores() -> None:
  """Let kernels that this process runs on the CPU use as many cores as tinygrad's NUM_CPU_THREADS says, by default all of them. UserError in a fork
  of a process that did so."""
  if _owner: refuse_in_fork(_owner[0])
  else: _owner.append(os.getpid())
  device = Device["CPU"]
  if _program: device.runtime_t = ThreadedProgram
  if _graph and DEBUG < 2: device.graph = CPUGraph   # whose kernels DEBUG=2 would not show one by one


def share_cores(processes: int) -> None:
  """Leave this process, one of so many on its machine, its part of the cores, to compile with and to run kernels on, unless the environment says how
  many. Results are the same to the last bit."""
  for setting in _settings[1:] if _settings else ():
    if setting.key not in os.environ: setting.value = max(1, setting.value // processes)


def _serve() -> None:
  while True:
    function, arguments, done = _parts.get()
    function(*arguments)
    done.put(None)


def _run(function: Any, parts: list[Arguments]) -> None:
  """Call `function`, machine code that Python's lock is not held for, with each of `parts`, side by side."""
  while len(_threads) < min(len(parts), max(2, NUM_CPU_THREADS.value)) - 1:
    _threads.append(thread := threading.Thread(target=_serve, daemon=True))
    thread.start()
  done: SimpleQueue = SimpleQueue()
  for arguments in parts[1:]: _parts.put((function, arguments, done))
  function(*parts[0])
  for _ in parts[1:]: done.get()


def _arguments(program: CPUProgram, bufs: list[Any], vals: tuple[int | None, ...], count: int) -> list[Arguments]:
  """Those of each of the `count` parts of a kernel, numbered by its argument `core_id`: addresses, then numbers."""
  slot = program.runtimevars.get("core_id")
  values = [*(buf.va_addr for buf in bufs), *vals]
  return [[ctypes.c_uint64(part if i == slot else value) for i, value in enumerate(values)] for part in range(count)]


class ThreadedProgram(CPUProgram):
  """A kernel whose parts run side by side."""

  def __call__(self, *bufs: Any, global_size: tuple[int, int, int] = (1, 1, 1), vals: tuple[int | None, ...] = (), **options: Any) -> float | None:
    refuse_in_fork(_owner[0])
    if self.lvp or global_size[0] == 1: return super().__call__(*bufs, global_size=global_size, vals=vals, **options)
    begun = time.perf_counter()
    _run(self.fxn, _arguments(self, bufs, vals, global_size[0]))
    return time.perf_counter() - begun if options.get("wait") else None


class CPUGraph(GraphRunner):
  """Kernels of a captured graph with their arguments made up in advance: tinygrad's own way there takes as long as many of the kernels."""

  def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
    super().__init__(linear, input_uops)
    self.kernels: list[tuple[Any, list[Arguments]]] = []
    self.inputs: dict[int, list[ctypes.c_uint64]] = {}   # number of an input -> the arguments that are its address
    for (_, program, bufs, device_vars), runtime, replaced in zip(self.calls, self.runtimes, self.uop_replace):
      count = program.arg.launch_dims(device_vars)[0][0]
      parts = _arguments(runtime, [bufs[i].get_buf(runtime.dev.device) for i in program.arg.globals], program.arg.vals(device_vars), count)
      self.kernels.append((runtime.fxn, parts))
      for position, number in replaced:
        if position in program.arg.globals:
          self.inputs.setdefault(number, []).extend(arguments[program.arg.globals.index(position)] for arguments in parts)

  @staticmethod
  def supports_uop(batch_devs: list[Any], new_call: UOp) -> bool:
    return GraphRunner.supports_uop(batch_devs, new_call) and set(new_call.src[0].arg.runtimevars) == {v.expr for v in new_call.src[0].arg.vars}

  def __call__(self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False) -> float | None:
    refuse_in_fork(_owner[0])
    for number, arguments in self.inputs.items():
      address = input_uops[number].buffer.ensure_allocated()._buf.va_addr
      for argument in arguments: argument.value = address
    for function, parts in self.kernels:
      if len(parts) == 1: function(*parts[0])
      else: _run(function, parts)
    GlobalCounters.kernel_count += len(self.kernels) - 1   # tinygrad counts the graph as one
    return None
