"""Captured graphs, and a cache of them on disk: a graph that was captured once starts at once in the next run.

tinygrad keeps compiled kernels, but finds out anew in every process which kernels a graph needs and how each is spelled: most of the time to a first
step. Here the whole captured graph is kept, under a key of everything that it was made from."""
import functools, hashlib, os, threading, weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from tinygrad import Context, Tensor, TinyJit, UOp, getenv
from tinydet.cache import cache_folder
from tinydet.nn.kernel_cpu import on_host
from tinydet.runtime import compiling, graph_file, random
from tinydet.runtime.cpu import use_all_cores
from tinydet.runtime.fork import refuse_in_fork
from tinydet.runtime.graph_key import graph_key
from tinydet.runtime.workers import workers
from tinydet.runtime.workspace import Workspace
from tinydet.parts import take

# tinygrad's settings, what it is capturing and the memory of captured graphs are the process's, not a thread's: who holds this runs alone
lock = threading.RLock()

_PLAIN = "graphs are captured as TinyJit does it, at their second call, and not kept for the next run"
_parts = take("tinygrad.tensor", "tinygrad.tensor:create_linear_with_vars", "tinygrad.engine.jit", "tinygrad.engine.jit:jit_lower",
              "tinygrad.engine.jit:graph_split_rewrite", "tinygrad.engine.realize:capturing", "tinygrad.uop.ops:Ops", "tinygrad.helpers:JIT",
              "tinygrad.helpers:JIT_BATCH_SIZE", "tinygrad.helpers:CACHELEVEL", "tinygrad.helpers:PCONTIG", instead=_PLAIN)
if _parts:
  _tensor, _schedule, _jit, _lower, _split, _capturing, _Ops, JIT, JIT_BATCH_SIZE, CACHELEVEL, PCONTIG = _parts
  _tinygrad = SimpleNamespace(schedule=_schedule, lower=_lower, capturing=_capturing, Ops=_Ops, module=_jit)
_watching = take("tinygrad.tensor:all_tensors", "tinygrad.uop.ops:Ops.BUFFER", "tinygrad:UOp.has_buffer_identity",
                 instead="a captured graph goes on with weights that were replaced")
_units = take("tinygrad.helpers:TC_OPT", instead="convolutions do not use a GPU's matrix units unless TC_OPT or BEAM says so")
# what changes what a function of tensors computes
_settings = take(*(f"tinygrad.helpers:{name}" for name in ("TRAINING", "DEFAULT_FLOAT", "DEFAULT_INT")),
                 instead="a captured graph is run whatever Context says of TRAINING") or ()


def jit(function: Callable) -> Callable:
  """`function` of tensors as a captured graph (`TinyJit`) for each set of their shapes, dtypes and devices, and for training or not. All its inputs
  and state must be realised.

  A graph is captured at the first call of its kind rather than the second, so that it is scheduled once, and kept in the user's cache folder (unless
  CACHELEVEL=0, as tinygrad's own cache). What the graphs compute on the way lies in one memory, the first one's if it is the largest: they never run
  at the same time. Threads take turns; one that needs a call's results before another call replaces them holds `lock` for so long. Where a tensor
  that the function uses has been replaced since, not assigned, the graph is captured anew. UserError in a fork of the process that captured it."""
  graphs: dict[tuple, tuple[TinyJit, list]] = {}
  workspaces: dict[tuple, UOp] = {}
  owners: list[int] = []   # the process that captured them

  def call(*tensors: Tensor) -> Any:
    if owners: refuse_in_fork(owners[0])
    with lock:
      key = (*((t.shape, t.dtype, t.device, t.uop.axis if isinstance(t.device, tuple) else None) for t in tensors), *(s.value for s in _settings))
      graph, used = graphs.get(key, (None, []))
      if graph is not None and not _replaced(used): return graph(*tensors)
      graphs.pop(key, None)
      devices = [device for t in tensors for device in (t.device if isinstance(t.device, tuple) else (t.device,))]
      if any(map(on_host, devices)): use_all_cores(*devices)   # whoever calls: a program that has asked for the device has them, a library's user too
      random.prepare(*devices)
      alive = _alive()
      kind = hashlib.sha256(repr((function.__module__, getattr(function, "__qualname__", ""), key, len(alive))).encode()).hexdigest()
      workspace = Workspace(workspaces, kind, devices[0] if len(set(devices)) == 1 and on_host(devices[0]) else None)
      if workspace.size is None: workers()   # most likely there is much to compile: they are ready when it is traced
      with _matrix_units(devices): result, graph, buffers = _captured(function, tensors, workspace)
      graphs[key], owners[:] = (graph, _used(alive, buffers)), [os.getpid()]
      return result
  return call


def in_place() -> Context:
  """Inside, a tensor that is assigned what is made of itself and others, element by element, is written where it lies. By default tinygrad makes a
  copy first where more than three tensors take part, as they do in an optimiser's update: a kernel more, and its memory."""
  return Context(PCONTIG=3) if _parts else Context()


def _matrix_units(devices: list[str]) -> Context:
  """tinygrad's heuristics keep convolutions, as sums over several axes, from a GPU's matrix units where TC_OPT does not say otherwise."""
  return Context(TC_OPT=2) if _units and "TC_OPT" not in os.environ and not all(map(on_host, devices)) else Context()


def _captured(function: Callable, tensors: tuple[Tensor, ...], workspace: graph_file.Workspace) -> tuple[Any, TinyJit, set[UOp]]:
  """The result of the first call, its graph, and the buffers that it uses and does not make."""
  graph, buffers = TinyJit(function), set()
  if not _parts: return graph(*tensors), graph, buffers
  graph.cnt = 1
  fused: list[int] = []
  # tinygrad's capture schedules as the function goes; here it notes what is to be scheduled, and how, and asks for the whole at the end
  with patch.object(_tensor, "create_linear_with_vars", functools.partial(_note, threading.get_ident(), fused)), \
       patch.object(_jit, "jit_lower", functools.partial(_kernels, workspace, fused, buffers)): result = graph(*tensors)
  return result, graph, buffers


def _note(thread: int, fused: list[int], call: UOp) -> tuple[UOp, dict[str, int]]:
  if threading.get_ident() != thread:   # another thread computes something: not before the capture is done
    with lock: return _schedule(call)
  if not _capturing: return _schedule(call)
  fused.append(PCONTIG.value)
  _capturing[0].add_linear(UOp(_Ops.LINEAR, src=(call,)), {})
  return UOp(_Ops.LINEAR, src=()), {}


def _kernels(workspace: graph_file.Workspace, fused: list[int], used: set[UOp], calls: UOp, held: set[UOp], inputs: list[UOp]) -> UOp:
  """`jit_lower`: the kernels that `calls` (of one graph to schedule each, with its PCONTIG) come to, compiled, from the cache or else by tinygrad."""
  buffers = graph_file.buffers_of(calls)
  used.update(buffer for buffer in buffers if buffer not in inputs)
  key = graph_key(calls, fused, held, inputs, buffers) if CACHELEVEL >= 1 and not getenv("HCQ2") else None
  file = key and cache_folder("graphs")/f"{key}.graph"
  linear = graph_file.load(file, workspace, buffers) if file else None
  if linear is None:
    linear = compiling.make(_tinygrad, workspace, fused, calls.src, held, inputs)
    if file: graph_file.save(file, linear, buffers)
  return _split(linear, max_batch_size=JIT_BATCH_SIZE.value) if JIT < 2 else linear


# --------------------------------------------------------------------------------------------------------------- tensors that a graph uses


def _buffers(uop: UOp) -> list[UOp]: return [u for u in uop.toposort() if u.op is _watching[1]]


def _alive() -> list[tuple[weakref.ref, UOp]]:
  """All tensors of the program, and what they are."""
  return [(ref, t.uop) for ref in list(_watching[0]) if (t := ref()) is not None] if _watching else []


def _used(alive: list[tuple[weakref.ref, UOp]], buffers: set[UOp]) -> list:
  """Of each of the `buffers` the tensors that lie there: those of `alive` as they are now."""
  tensors: dict[UOp, list[list]] = {}
  for ref, uop in alive:
    if (t := ref()) is None or not t.uop.has_buffer_identity(): continue
    for buffer in buffers.intersection(_buffers(uop)): tensors.setdefault(buffer, []).append([ref, t.uop])
  return list(tensors.items())


def _replaced(used: list) -> bool:
  """Whether a tensor of `_used` lies elsewhere now, or none is left of those that lay in one buffer."""
  for buffer, tensors in used:
    left = False
    for entry in tensors:
      if (t := entry[0]()) is None: continue
      left = True
      if t.uop is entry[1]: continue
      if buffer not in _buffers(t.realize().uop): return True
      entry[1] = t.uop
    if not left: return True
  return False
