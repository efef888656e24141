"""How far the loops of tinygrad's own kernels are unrolled on the processor.

tinygrad spells up to 32 of an elementwise kernel's numbers side by side, and each goes through two dozen passes in Python, which was most of the time
to a first step. clang makes vectors of a plain loop by itself. The order of a sum it may not change, so that each addition waits for the one before:
there several sums are taken side by side."""
import math
from types import ModuleType
from typing import Any
from tinydet.parts import take

LEAST_WORK = 1 << 17     # numbers that are worth a core
MANY, MOST = 6, 1 << 16  # conditions that make clang's loop slower, and numbers beyond which a kernel's run then counts for more than its spelling
LEAST_SUM, SUMS = 64, 4  # numbers of a long sum, and how many such sums are taken side by side

_parts = take("tinygrad.codegen.opt:Opt", "tinygrad.codegen.opt:OptOps", "tinygrad.codegen.opt:KernelOptError", "tinygrad.uop.ops:Ops",
              "tinygrad.uop.ops:AxisType", "tinygrad.renderer.cstyle:ClangRenderer", "tinygrad.codegen.opt.postrange:Scheduler.upcastable_dims",
              instead="kernels are unrolled as tinygrad does it, which takes longer")
if _parts: Opt, OptOps, KernelOptError, Ops, AxisType, ClangRenderer, _ = _parts


def use_in(heuristic: ModuleType) -> None:
  """Let tinygrad's module `heuristic` unroll this way what clang compiles."""
  plain = getattr(heuristic, "hand_coded_optimizations", None)
  if plain is None or not _parts: return
  def hand_coded_optimizations(kernel: Any) -> Any:
    mine = _unrolled(kernel) if type(kernel.ren) is ClangRenderer else None   # not what is made from it, for other devices
    return plain(kernel) if mine is None else mine
  heuristic.hand_coded_optimizations = hand_coded_optimizations


def _unrolled(kernel: Any) -> Any:
  """The kernel (a Scheduler) with what is to be done to its loops; None where that is left to tinygrad."""
  operations = [u.op for u in kernel.ast.toposort()]
  if not all(isinstance(size, int) for size in kernel.full_shape): return None
  chosen, numbers = kernel.copy(), math.prod(kernel.full_shape)
  if Ops.REDUCE in operations:
    if (axis := _beside(kernel, operations)) is None: return None
    chosen.apply_opt(Opt(OptOps.UPCAST, axis, SUMS))
  elif operations.count(Ops.WHERE) >= MANY and numbers > MOST: return None
  for cores in range(min((kernel.ren.global_max or (1,))[0], numbers // LEAST_WORK), 1, -1):
    for axis in chosen.axes_of(AxisType.WEAK):
      if chosen.full_shape[axis] % cores: continue
      try: chosen.apply_opt(Opt(OptOps.THREAD, axis, cores))
      except KernelOptError: continue   # not an axis of the result
      return chosen
  return chosen


def _beside(kernel: Any, operations: list) -> int | None:
  """The axis along which long sums of what is read once are taken side by side; None where there is no such. Those of products that share what they
  read (matrices), and those with much to compute in between, are left to tinygrad."""
  if operations.count(Ops.REDUCE) > 1 or Ops.EXP2 in operations or Ops.LOG2 in operations: return None
  if math.prod(kernel.full_shape[axis] for axis in kernel.axes_of(AxisType.REDUCE)) < LEAST_SUM: return None
  results, summed = {kernel.rngs[axis] for axis in kernel.upcastable_dims}, set(kernel.ranges_of(AxisType.REDUCE))
  reads = [read.backward_slice for read in kernel.bufs if summed & read.backward_slice.keys()]
  if any(results - read.keys() for read in reads): return None
  return next((axis for axis in reversed(kernel.upcastable_dims) if kernel.full_shape[axis] % SUMS == 0), None)
