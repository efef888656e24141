"""From what a function computes to compiled kernels that share one memory."""
import functools
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from tinygrad import Context, UOp
from tinydet.runtime import beam
from tinydet.runtime.graph_file import Workspace
from tinydet.parts import take
from tinydet.runtime.together import batches, compile_all
from tinydet.runtime.workers import workers

_ahead = take("tinygrad.engine.realize:to_program_cache", "tinygrad.engine.realize:to_program_key", "tinygrad.engine.realize:to_program_context",
              "tinygrad.engine.realize:_get_call_to_compile", "tinygrad.engine.realize:_compile_kernel", "tinygrad.helpers:BEAM",
              instead="kernels are compiled when all of a graph is scheduled")
if _ahead: _cache, _cache_key, _context, _call_to_compile, _compile, BEAM = _ahead
_planner = take("tinygrad.schedule.memory", "tinygrad.schedule.memory:UOp.new_buffer", instead="captured graphs do not share their memory")


def make(jit: Any, workspace: Workspace, fused: list[int], calls: list[UOp], held: set[UOp], inputs: list[UOp]) -> UOp:
  """The compiled kernels that `calls` come to, each scheduled with its PCONTIG of `fused`. `jit` has the parts of tinygrad that `graphs` uses; `held`
  are buffers that outlive the graph, `workspace(device, size, dtype)` gives those that its kernels work in."""
  parts: list[UOp] = []
  compiling: dict[Future, list[tuple]] = {}   # several kernels each, by their keys
  jit.capturing.append(SimpleNamespace(add_linear=lambda linear, var_vals: parts.extend(linear.src)))
  try:
    _start([u for call in calls for u in call.toposort() if u.op is jit.Ops.CALL and u.src[0].op is jit.Ops.PROGRAM], compiling)   # those in C
    for call, value in zip(calls, fused):
      done = len(parts)
      with Context(PCONTIG=value): jit.schedule(call)
      _start(parts[done:], compiling)
    for future, keys in compiling.items(): _cache.update(zip(keys, (program for _, program in workers().result(future))))
  finally:
    jit.capturing.clear()
    for future in compiling: future.cancel()
  # tinygrad's planner of the memory asks for it here, and nowhere else
  planned = patch.object(_planner[0], "UOp", SimpleNamespace(new_buffer=workspace)) if _planner else Context()
  searched = patch.object(jit.module, "compile_linear", beam.compile_linear) if beam.WORKS else Context()
  with Context(JIT=2), planned, searched: return jit.lower(UOp(jit.Ops.LINEAR, src=tuple(parts)), held, inputs)


def _start(kernels: list[UOp], compiling: dict[Future, list[tuple]]) -> None:
  """Give `kernels` to the compiling processes, which are idle while the next part of a graph is scheduled. Those that BEAM is to search first are
  left to it."""
  if not _ahead or BEAM or (pool := workers()) is None: return
  settings = {var.key: var.value for var in _context}
  begun = {key for keys in compiling.values() for key in keys}
  tasks = {_cache_key(*task): (0, task, settings) for kernel in kernels if (task := _call_to_compile(kernel)) is not None}
  for keys in batches([key for key in tasks if key not in begun and key not in _cache], len(pool.processes)):
    compiling[pool.start(functools.partial(compile_all, _compile), [tasks[key] for key in keys])] = keys
