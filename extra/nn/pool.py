"""Pictures at half and at twice the size: max pooling that carries its own gradient, means with torch's rounding, and the nearest neighbour."""
import functools, math
from tinygrad import Tensor, UOp, function


def max_pool(x: Tensor, padding: int = 1, ceil: bool = True) -> Tensor:
  """The largest of each 3x3 window, stride 2: [B,C,H,W] -> [B,C,ceil(H/2),ceil(W/2)] with `padding` 1. Equal ones share its gradient.

  With `padding` 0 the first window begins at the first pixel: [B,C,(H-1)/2,(W-1)/2], rounded up where `ceil`, so that the last one may reach over the
  edge, where it sees nothing (torch `MaxPool2d` with `ceil_mode`), and down elsewhere.

  A row is in two windows where its number is odd (or, without padding, even) and in one otherwise, so a pixel's gradient is a sum of four. tinygrad
  derives a reduction over taps of counts of taps, which takes three times as long to compile and to run."""
  return _max_pool(x, padding, *((side - 1 + ceil) // 2 if padding == 0 else (side + 1) // 2 for side in x.shape[2:]))


def max_pool_covering(x: Tensor) -> Tensor:
  """As `max_pool` without padding, but [B,C,ceil(H/2),ceil(W/2)]: of odd sides the last window has but the last row or column."""
  return _max_pool(x, 0, *((side + 1) // 2 for side in x.shape[2:]))


def _max_pool(x: Tensor, padding: int, rows: int, columns: int) -> Tensor:
  height, width = x.shape[2:]

  def windows(x: Tensor) -> Tensor:
    """`x` with as much of nothing around as its `rows` x `columns` windows see."""
    return x.pad(((0, 0), (0, 0), (padding, 1 + 2 * rows - padding - height), (padding, 1 + 2 * columns - padding - width)), value=-math.inf)

  def forward(x: Tensor) -> Tensor: return windows(x).max_pool2d(3, 2)

  def gradient(grad: UOp, call: UOp) -> tuple[UOp]:
    x, out = Tensor(call.src[1]), Tensor(call.gettuple(0).contiguous())
    padded = windows(x)
    taps = [padded[:, :, p:p + 2 * rows:2, q:q + 2 * columns:2] for p in range(3) for q in range(3)]
    share = (Tensor(grad) / sum((tap == out).cast(grad.dtype) for tap in taps)).contiguous()

    def each_pixel(windows: Tensor, down: int, right: int) -> Tensor:
      """[B,C,H,W]: of the window at half a pixel's coordinates, or of the other one that it can be in; 0 where there is none."""
      for axis, there, side, other in ((2, rows, height, down), (3, columns, width, right)):
        first = (1 if padding else -1) if other else 0
        begin, end = max(first, 0), min(there, (side + 1) // 2 + first)
        windows = windows.shrink(tuple((begin, end) if a == axis else None for a in range(4)))
        windows = windows.pad(tuple((begin - first, (side + 1) // 2 + first - end) if a == axis else None for a in range(4)))
      return upsample(windows, (height, width))

    in_two = [Tensor.arange(side).reshape(shape) % 2 == padding for side, shape in ((height, (-1, 1)), (width, (1, -1)))]
    parts = []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
      there = x == each_pixel(out, down, right)
      if down: there = there & in_two[0]
      if right: there = there & in_two[1]
      parts.append(there.where(each_pixel(share, down, right), 0))
    return (sum(parts[1:], parts[0]).cast(x.dtype).uop,)

  return function(forward, grad_fxn=gradient)(x).contiguous()


def max_pool_same(x: Tensor, size: int) -> Tensor:
  """[B,C,H,W] -> the same shape: the largest of the `size` x `size` window (odd) around each pixel; outside the picture there is nothing.

  First along rows, then along columns: 2 `size` comparisons in place of their product. Of equal ones in a row or column each has its share of the
  gradient."""
  return _windows(_windows(x, 2, size // 2, size - 1 - size // 2), 3, size // 2, size - 1 - size // 2)


def max_pool_2x2(x: Tensor, stride: int = 2, ceil: bool = False) -> Tensor:
  """The largest of 2x2 pixels: [B,C,H,W] -> [B,C,H/2,W/2], rounded down, or up where `ceil`, or with `stride` 1 the same shape; a window that reaches
  over the right or lower edge sees nothing there (darknet pads with -FLT_MAX)."""
  b, c, h, w = x.shape
  if stride == 2:
    x = _even(x, ceil, -math.inf)
    h, w = x.shape[2:]
    return x.reshape(b, c, h // 2, 2, w // 2, 2).max((3, 5)).contiguous()
  return _windows(_windows(x, 2, 0, 1), 3, 0, 1)


def _windows(x: Tensor, axis: int, before: int, after: int) -> Tensor:
  """The largest of each element, the `before` in front of it and the `after` behind it along `axis`.

  With a gradient of its own: that of a chain of comparisons, as tinygrad derives it, takes a minute to schedule for three pools in a row."""
  length = x.shape[axis]
  def views(x: Tensor, before: int, after: int, value: float) -> list[Tensor]:
    """What lies `before` places in front of each element, and so on until `after` places behind it."""
    padded = x.pad(tuple((before, after) if d == axis else None for d in range(x.ndim)), value=value)
    return [padded.shrink(tuple((i, i + length) if d == axis else None for d in range(x.ndim))) for i in range(before + after + 1)]

  def forward(x: Tensor) -> Tensor: return functools.reduce(Tensor.maximum, views(x, before, after, -math.inf))

  def gradient(grad: UOp, call: UOp) -> tuple[UOp]:
    x, out = Tensor(call.src[1]), Tensor(call.gettuple(0).contiguous())
    equal = sum((view == out).cast(grad.dtype) for view in views(x, before, after, -math.inf))
    share = (Tensor(grad) / equal).contiguous()
    # an element is in the windows of those that it is `before` ahead of, and so on
    parts = [(x == largest).where(part, 0) for largest, part in zip(views(out, after, before, math.inf), views(share, after, before, 0))]
    return (functools.reduce(Tensor.add, parts).cast(x.dtype).contiguous().uop,)

  return function(forward, grad_fxn=gradient)(x).contiguous()


def _even(x: Tensor, ceil: bool, value: float) -> Tensor:
  """`x` with even sides: the last row or column left out, or one of `value` added."""
  sides = [side + side % 2 * (1 if ceil else -1) for side in x.shape[2:]]
  return x.pad(tuple((0, side - s) if side != s else None for s, side in zip(x.shape, (*x.shape[:2], *sides))), value=value) if ceil else \
    x.shrink((None, None, *((0, side) for side in sides)))


def mean_pool_half(x: Tensor, ceil: bool = False) -> Tensor:
  """The mean of 2x2 pixels, stride 2: [B,C,H,W] -> [B,C,H/2,W/2], rounded down (torch `AvgPool2d`), or up where `ceil`: of what there is."""
  b, c, h, w = x.shape
  def sums(x: Tensor) -> Tensor:
    x = _even(x, ceil, 0.0)
    return x.reshape(b, c, x.shape[2] // 2, 2, x.shape[3] // 2, 2).sum((3, 5))
  count = sums(Tensor.ones(1, 1, h, w).expand(b, c, h, w)) if ceil and (h % 2 or w % 2) else 4
  return (sums(x.float()) / count).cast(x.dtype).contiguous()


def mean_pool_same(x: Tensor) -> Tensor:
  """[B,C,H,W] -> the same shape: the sum of the 3x3 window around each pixel over 9, the zeros around the picture included (torch `AvgPool2d`)."""
  h, w = x.shape[2:]
  padded = x.pad(((0, 0), (0, 0), (1, 1), (1, 1)))
  rows = padded[:, :, :h] + padded[:, :, 1:h + 1] + padded[:, :, 2:]
  return ((rows[..., :w] + rows[..., 1:w + 1] + rows[..., 2:]) * (1 / 9)).contiguous()


def mean_pool_to(x: Tensor, size: int) -> Tensor:
  """[B,C,H,W] -> [B,C,size,size]: means of windows that begin at floor(i H / size) and end before ceil((i + 1) H / size) (torch
  `AdaptiveAvgPool2d`)."""
  for axis in (2, 3):
    side = x.shape[axis]
    if side == size: continue
    ends = [(i * side // size, -(-(i + 1) * side // size)) for i in range(size)]
    means = [x.shrink(tuple(end if a == axis else None for a in range(4))).mean(axis, keepdim=True) for end in ends]
    x = means[0].cat(*means[1:], dim=axis).contiguous()
  return x


def mean_pool_2x2(x: Tensor) -> Tensor:
  """[B,C,H,W] -> [B,C,H-1,W-1]: the mean of each 2x2 window, stride 1."""
  rows = x[:, :, 1:] + x[:, :, :-1]
  return ((rows[..., 1:] + rows[..., :-1]) * 0.25).contiguous()


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
  """Nearest neighbour from [B,C,h,w] to [B,C,H,W], h = ceil(H / 2) and w = ceil(W / 2): each pixel twice, the last cut where a side is odd."""
  b, c, h, w = x.shape
  return x.reshape(b, c, h, 1, w, 1).expand(b, c, h, 2, w, 2).reshape(b, c, h * 2, w * 2).shrink((None, None, (0, size[0]), (0, size[1])))
