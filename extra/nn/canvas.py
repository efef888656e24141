"""Levels of a pyramid on one picture, with gaps of zeros between them, so that a layer all levels share runs once and not once a level.

A fifth of the kernels to schedule, compile and search schedules for, and one weight gradient in place of five and their sum; for 13% (800 pixels) to
17% (128 pixels) more multiplications, in the gaps."""
from collections.abc import Sequence
from tinygrad import Tensor

Size = tuple[int, int]   # height and width


def layout(sizes: Sequence[Size]) -> tuple[Size, list[Size]]:
  """The canvas for levels of these sizes, and the top left corner (row, column) of each: the first one above, the others in a row below it or, where
  they are as small as not to fit, under one another. Each level must be at most as large as the one before."""
  corners, (top, width) = [(0, 0)], sizes[0]
  for (_, w), (before_h, before_w) in zip(sizes[1:], sizes):
    row, column = corners[-1]
    if len(corners) == 1: corners.append((top + 1, 0))
    elif column + before_w + 1 + w <= width: corners.append((row, column + before_w + 1))
    else: corners.append((row + before_h + 1, column))
  return (max(row + h for (row, _), (h, _) in zip(corners, sizes)), width), corners


def pack(levels: Sequence[Tensor]) -> Tensor:
  """[B,C,h,w] of each level -> [B,C,H,W]."""
  (height, width), corners = layout(sizes := [level.shape[2:] for level in levels])
  padded = [level.pad(((0, 0), (0, 0), (row, height - row - h), (column, width - column - w)))
            for level, (row, column), (h, w) in zip(levels, corners, sizes)]
  return sum(padded[1:], padded[0])


def unpack(canvas: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
  """[B,C,H,W] -> [B,C,h,w] of each level: the reverse of `pack`."""
  return [canvas.shrink((None, None, (row, row + h), (column, column + w))) for (row, column), (h, w) in zip(layout(sizes)[1], sizes)]


def mask(sizes: Sequence[Size], device: str | tuple[str, ...]) -> Tensor:
  """[1,1,H,W]: 1 where there is a level and 0 in the gaps, f32."""
  return pack([Tensor.ones(1, 1, *size, device=device) for size in sizes])
