"""Captured graphs, and a cache of them on disk: a graph that was captured once starts at once in the next run.

tinygrad keeps compiled kernels, but finds out anew in every process which kernels a graph needs and how each is spelled: most of the time to a first
step. Here the whole captured graph is kept, under a key of everything that it was made from."""
import contextlib, functools, hashlib, itertools, os, pickle, platform, re, secrets, zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
import tinygrad
from tinygrad import Context, Device, Tensor, TinyJit, tensor
from tinygrad.dtype import DType
from tinygrad.engine import jit as tinygrad_jit, realize
from tinygrad.engine.realize import capturing
from tinygrad.helpers import BEAM, CACHELEVEL, JIT_BATCH_SIZE, PCONTIG, ContextVar, dedup, getenv, to_tuple
from tinygrad.schedule import memory
from tinygrad.uop.ops import CallInfo, Ops, UOp
from tinydet.cache import cache_folder
from tinydet.runtime import clang
from tinydet.runtime.workers import workers

FORMAT = 1                   # of the files
MOST_BYTES = 2_000_000_000   # of all of them; the ones that were not used for longest go
FIRST = 1_000_000            # number of the first buffer in a file; a graph's inputs have lower ones


def jit(function: Callable) -> Callable:
  """`function` of tensors as a captured graph (`TinyJit`) for each set of their shapes. All its inputs and state must be realised.

  A graph is captured at the first call with its shapes rather than the second, so that it is scheduled once, and kept in the user's cache folder
  (unless CACHELEVEL=0, as tinygrad's own cache). What the graphs compute on the way lies in one memory, the first one's if it is the largest: they
  never run at the same time."""
  graphs: dict[tuple, TinyJit] = {}
  workspaces: dict[tuple, UOp] = {}

  def call(*tensors: Tensor) -> Any:
    if (shapes := tuple(tensor.shape for tensor in tensors)) in graphs: return graphs[shapes](*tensors)
    count: Counter = Counter()   # a device has a workspace for kernels and one for copies
    def workspace(device: str | tuple[str, ...], size: int, dtype: DType) -> UOp:
      count[device] += 1
      if (at := (device, count[device])) not in workspaces or workspaces[at].max_numel() < size:
        workspaces[at] = UOp.new_buffer(device, size, dtype)
      return workspaces[at]
    graph = TinyJit(function)
    graph.cnt = 1
    fused: list[int] = []
    # tinygrad's capture schedules as the function goes; here it notes what is to be scheduled, and how, and asks for the whole at the end
    with patch.object(tensor, "create_linear_with_vars", functools.partial(_note, fused)), \
         patch.object(tinygrad_jit, "jit_lower", functools.partial(_lower, workspace, fused)): result = graph(*tensors)
    graphs[shapes] = graph
    return result
  return call


def in_place() -> Context:
  """Inside, a tensor that is assigned what is made of itself and others, element by element, is written where it lies. By default tinygrad makes a
  copy first where more than three tensors take part, as they do in an optimiser's update: a kernel more, and its memory."""
  return Context(PCONTIG=3)


def _note(fused: list[int], call: UOp) -> tuple[UOp, dict[str, int]]:
  if not capturing: return _schedule(call)
  fused.append(PCONTIG.value)
  capturing[0].add_linear(UOp(Ops.LINEAR, src=(call,)), {})
  return UOp(Ops.LINEAR, src=()), {}


_schedule, _tinygrads_lower = tensor.create_linear_with_vars, tinygrad_jit.jit_lower
Workspace = Callable[[Any, int, DType], UOp]


def _lower(workspace: Workspace, fused: list[int], calls: UOp, held: set[UOp], inputs: list[UOp]) -> UOp:
  """`jit_lower`: the kernels that `calls` (of one graph to schedule each, with its PCONTIG) come to, compiled, from the cache or else by tinygrad."""
  buffers = _leaves(calls, Ops.BUFFER)
  file = cache_folder("graphs")/f"{_key(calls, fused, held, inputs, buffers).hex()}.graph" if CACHELEVEL >= 1 and not getenv("HCQ2") else None
  linear = _load(file, workspace, buffers) if file else None
  if linear is None:
    linear = _make(workspace, fused, calls, held, inputs)
    if file: _save(file, linear, buffers)
  return tinygrad_jit.graph_split_rewrite(linear, max_batch_size=JIT_BATCH_SIZE.value) if tinygrad_jit.JIT < 2 else linear


def _leaves(calls: UOp, op: Ops) -> list[UOp]:
  """What is `op` in the arguments of `calls`, in the order in which it comes."""
  arguments = dedup(argument for call in calls.src for argument in call.src[1:])
  return dedup(u for argument in arguments for u in argument.toposort() if u.op is op)


def _make(workspace: Workspace, fused: list[int], calls: UOp, held: set[UOp], inputs: list[UOp]) -> UOp:
  parts: list[UOp] = []
  compiling: dict[tuple, Future] = {}
  capturing.append(SimpleNamespace(add_linear=lambda linear, var_vals: parts.extend(linear.src)))
  try:
    for call, value in zip(calls.src, fused):
      done = len(parts)
      with Context(PCONTIG=value): _schedule(call)
      _start_compiling(parts[done:], compiling)
  finally: capturing.clear()
  realize.to_program_cache.update({key: workers().result(task)[1] for key, task in compiling.items()})
  # tinygrad's planner of the memory asks for it here, and nowhere else
  with Context(JIT=2), patch.object(memory, "UOp", SimpleNamespace(new_buffer=workspace)):
    return _tinygrads_lower(UOp(Ops.LINEAR, src=tuple(parts)), held, inputs)


def _start_compiling(kernels: list[UOp], compiling: dict[tuple, Future]) -> None:
  """Give `kernels` to tinygrad's compiling processes, which are idle while the next part of a graph is scheduled. Those that BEAM is to search first
  are left to it."""
  if BEAM or (pool := workers()) is None: return
  settings = {var.key: var.value for var in realize.to_program_context}
  for kernel in kernels:
    if (task := realize._get_call_to_compile(kernel)) is None or (key := realize.to_program_key(*task)) in compiling: continue
    if key not in realize.to_program_cache: compiling[key] = pool.start(realize._compile_kernel, (0, task, settings))


# ---------------------------------------------------------------------------------------------------------------------------- the key


def _key(calls: UOp, fused: list[int], held: set[UOp], inputs: list[UOp], buffers: list[UOp]) -> bytes:
  """A digest of all that the result of `_make` follows from, the same in every process."""
  places = {buffer: f"{'held' if buffer in held else 'free'} {i}" for i, buffer in enumerate(buffers)}
  places |= {buffer: f"{places.get(buffer)} input {i}" for i, buffer in enumerate(inputs)}
  digests: dict[UOp, bytes] = {}
  for u in calls.toposort():
    if u in places: what = (places[u], u.dtype, u.shape, u.device)
    elif isinstance(u.arg, CallInfo): what = (u.op, u.dtype, u.arg.name, u.arg.precompile, u.arg.precompile_backward)   # not its address
    else: what = (u.op, u.dtype, u.arg)
    digests[u] = hashlib.sha256(str(what).encode() + b"".join(digests[s] for s in u.src)).digest()
  devices = sorted({device for buffer in buffers for device in to_tuple(buffer.device)})
  return hashlib.sha256(repr((FORMAT, digests[calls], fused, _compiler(), [_device(device) for device in devices], _settings())).encode()).digest()


def _device(name: str) -> tuple[str, str, str]:
  renderer = Device[name].renderer
  return name, str(renderer.target), type(renderer).__name__


@functools.cache
def _compiler() -> tuple[str, ...]:
  """This Python, processor and tinygrad: that of this version may have been changed by its owner."""
  sources = hashlib.sha256("".join(_tinygrads_sources().values()).encode())
  with contextlib.suppress(OSError):   # kernels for the CPU are compiled for this very one
    about = re.findall(r"^(?:flags|Features|model name)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    sources.update("".join(sorted(set(about))).encode())
  return sources.hexdigest(), platform.python_version(), platform.machine(), platform.processor(), " ".join(clang.command())


@functools.cache
def _tinygrads_sources() -> dict[Path, str]:
  root = Path(tinygrad.__file__).parent
  files = sorted(file for part in ("", "codegen", "engine", "mixin", "renderer", "runtime", "schedule", "uop")
                 for file in (root.glob("*.py") if not part else (root/part).rglob("*.py")) if "autogen" not in file.parts)
  return {file: file.read_text(encoding="utf-8") for file in files}


@functools.cache
def _names() -> tuple[set[str], set[str]]:
  """The environment variables that tinygrad reads, and its settings (`ContextVar`) that are always there: a device's are made when it is tried."""
  sources = _tinygrads_sources()
  return ({name for text in sources.values() for name in re.findall(r'getenv\("(\w+)"', text)},
          {name for file, text in sources.items() if "runtime" not in file.parts for name in re.findall(r'ContextVar\("(\w+)"', text)})


def _settings() -> list[tuple[str, str]]:
  silent = {"DEBUG", "DEV", "CACHEDB"}   # the device is in the key by what it comes to
  variables, settings = _names()
  values = {name: os.environ[name] for name in variables & os.environ.keys()}
  values |= {name: str(var.value) for name, var in ContextVar._cache.items() if name in settings}
  return sorted((name, value) for name, value in values.items() if name not in silent)


# ---------------------------------------------------------------------------------------------------------------------------- the file


def _replace(linear: UOp, replacements: dict[UOp, UOp]) -> UOp:
  """`linear` with the arguments of its calls replaced; what is inside kernels is not."""
  done = dict(replacements)
  def rebuilt(u: UOp) -> UOp:
    if u not in done: done[u] = u.replace(src=tuple(rebuilt(s) for s in u.src)) if u.src else u
    return done[u]
  return linear.replace(src=tuple(call.replace(src=(call.src[0], *(rebuilt(argument) for argument in call.src[1:]))) for call in linear.src))


def _bare(program: UOp) -> UOp:
  """A compiled kernel without what only its making needs."""
  if program.op is not Ops.PROGRAM: return program
  sink, instructions, source, binary = program.src
  parameters = tuple(u for u in instructions.src if u.op is Ops.PARAM)   # their shapes are the kernel's signature
  return program.replace(src=(sink.replace(src=()), instructions.replace(src=parameters), source, binary))


def _save(file: Path, linear: UOp, buffers: list[UOp]) -> None:
  """Keep `linear` with numbers in place of its buffers: those that were given, then those that it works in. A full disk is not worth a word here."""
  own = [u for u in _leaves(linear, Ops.BUFFER) if u not in buffers]
  places = {u: UOp.param(FIRST + i, u.dtype, u.shape, u.device) for i, u in enumerate([*buffers, *own])}
  bare = linear.replace(src=tuple(call.replace(src=(_bare(call.src[0]), *call.src[1:])) for call in linear.src))
  body = zlib.compress(pickle.dumps((_replace(bare, places), [(u.device, u.max_numel(), u.dtype) for u in own])), 1)
  partial = file.with_suffix(f".{secrets.token_hex(4)}")
  try:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial.write_bytes(hashlib.sha256(body).digest() + body)
    partial.replace(file)
    _make_room(file.parent)
  except OSError:
    with contextlib.suppress(OSError): partial.unlink()


def _make_room(folder: Path) -> None:
  files = sorted(((stat.st_mtime, stat.st_size, file) for file in folder.glob("*.graph") if (stat := file.stat())), reverse=True)
  sizes = itertools.accumulate(size for _, size, _ in files)
  for (_, _, file), total in zip(files, sizes):
    if total > MOST_BYTES: file.unlink(missing_ok=True)


def _load(file: Path, workspace: Workspace, buffers: list[UOp]) -> UOp | None:
  """What `_save` kept, with `buffers`; None where there is nothing, or not all of it."""
  try:
    content = file.read_bytes()
    os.utime(file)
  except OSError: return None
  if hashlib.sha256(content[32:]).digest() != content[:32]: return None
  linear, own = pickle.loads(zlib.decompress(content[32:]))
  all_buffers = [*buffers, *(workspace(*what) for what in own)]
  places = {u: all_buffers[u.arg.slot - FIRST] for u in _leaves(linear, Ops.PARAM) if u.arg.slot >= FIRST}
  return _replace(linear, places)
