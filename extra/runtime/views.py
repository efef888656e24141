"""A quick answer to what tinygrad asks of every argument of a captured graph's kernels, twice: where in memory it lies.

tinygrad rewrites the argument each time until it sees that, a quarter of the time from a kept graph to its first step. What its planner of the memory
gives are bytes from one place to another of one buffer, which can be read off."""
from typing import Any
from tinydet.parts import take


def use() -> None:
  """Let tinygrad, imported by now, ask here first."""
  names = "UOp", "UOp.contiguous_view", "UOp.marg", "Ops.BUFFER", "Ops.SHRINK", "Ops.BITCAST"
  parts = take(*(f"tinygrad.uop.ops:{name}" for name in names), instead="captured graphs start later")
  if not parts: return
  node, worked_out, _, buffer, shrink, bitcast = parts

  def contiguous_view(self: Any) -> tuple[Any, int] | None:
    found = bytes_of(self, buffer, shrink, bitcast)
    return worked_out(self) if found is None else found
  node.contiguous_view = contiguous_view


def bytes_of(argument: Any, buffer: Any, shrink: Any, bitcast: Any) -> tuple[Any, int] | None:
  """The buffer of bytes in which `argument` lies, and where it begins there, if it is some of the bytes taken for another type; None if it is not."""
  if argument.op is not bitcast or argument.src[0].op is not shrink: return None
  part = argument.src[0]
  whole = part.src[0]
  if whole.op is not buffer or whole.dtype.itemsize != 1 or len(part.marg) != 1 or not isinstance(whole.device, str): return None
  start = part.marg[0][0]
  return (whole, start) if isinstance(start, int) and not whole.device.startswith(("CL", "WEBGPU")) else None   # whose buffers have no parts
