"""Pictures at half and at twice the size: max pooling that carries its own gradient, and the nearest neighbour."""
import functools, math
from tinygrad import Tensor, UOp, function


def max_pool(x: Tensor) -> Tensor:
  """[B,C,H,W] -> [B,C,ceil(H/2),ceil(W/2)]: the largest of each 3x3 window, stride 2, padding 1. Equal ones share its gradient.

  A row is in two windows where its number is odd and in one where it is even, so a pixel's gradient is a sum of four. tinygrad derives a reduction
  over taps of counts of taps, which takes three times as long to compile and to run."""
  height, width = x.shape[2:]

  def forward(x: Tensor) -> Tensor: return x.max_pool2d(3, 2, padding=1)

  def gradient(grad: UOp, call: UOp) -> tuple[UOp]:
    x, rows, columns = Tensor(call.src[1]), *out.shape[2:]
    padded = x.pad(((0, 0), (0, 0), (1, 1 + 2 * rows - height), (1, 1 + 2 * columns - width)), value=-math.inf)
    taps = [padded[:, :, p:p + 2 * rows:2, q:q + 2 * columns:2] for p in range(3) for q in range(3)]
    share = (Tensor(grad) / sum((tap == out).cast(grad.dtype) for tap in taps)).contiguous()

    def each_pixel(windows: Tensor, down: int, right: int) -> Tensor:
      """[B,C,H,W]: of the window at half a pixel's coordinates, or of the next one; 0 where there is none."""
      windows = windows.shrink((None, None, (down, rows), (right, columns))).pad(((0, 0), (0, 0), (0, down), (0, right)))
      return upsample(windows, (height, width))

    odd_row, odd_column = (Tensor.arange(side).reshape(shape) % 2 == 1 for side, shape in ((height, (-1, 1)), (width, (1, -1))))
    parts = []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
      there = x == each_pixel(out, down, right)
      if down: there = there & odd_row
      if right: there = there & odd_column
      parts.append(there.where(each_pixel(share, down, right), 0))
    return (sum(parts[1:], parts[0]).cast(x.dtype).uop,)

  out = function(forward, grad_fxn=gradient)(x).contiguous()
  return out


def max_pool_same(x: Tensor, size: int) -> Tensor:
  """[B,C,H,W] -> the same shape: the largest of the `size` x `size` window (odd) around each pixel; outside the picture there is nothing.

  First along rows, then along columns: 2 `size` comparisons in place of their product. Of equal ones in a row or column each has its share of the
  gradient."""
  return _windows(_windows(x, 2, size // 2, size - 1 - size // 2), 3, size // 2, size - 1 - size // 2)


def max_pool_2x2(x: Tensor, stride: int = 2) -> Tensor:
  """The largest of 2x2 pixels: [B,C,H,W] of even sides -> [B,C,H/2,W/2], or with `stride` 1 the same shape, where a window that reaches over the
  right or lower edge sees nothing there (darknet pads with -FLT_MAX)."""
  b, c, h, w = x.shape
  if stride == 2: return x.reshape(b, c, h // 2, 2, w // 2, 2).max((3, 5)).contiguous()
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
    x = Tensor(call.src[1])
    equal = sum((view == out).cast(grad.dtype) for view in views(x, before, after, -math.inf))
    share = (Tensor(grad) / equal).contiguous()
    # an element is in the windows of those that it is `before` ahead of, and so on
    parts = [(x == largest).where(part, 0) for largest, part in zip(views(out, after, before, math.inf), views(share, after, before, 0))]
    return (functools.reduce(Tensor.add, parts).cast(x.dtype).contiguous().uop,)

  out = function(forward, grad_fxn=gradient)(x).contiguous()
  return out


def mean_pool_2x2(x: Tensor) -> Tensor:
  """[B,C,H,W] -> [B,C,H-1,W-1]: the mean of each 2x2 window, stride 1."""
  rows = x[:, :, 1:] + x[:, :, :-1]
  return ((rows[..., 1:] + rows[..., :-1]) * 0.25).contiguous()


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
  """Nearest neighbour from [B,C,h,w] to [B,C,H,W], h = ceil(H / 2) and w = ceil(W / 2): each pixel twice, the last cut where a side is odd."""
  b, c, h, w = x.shape
  return x.reshape(b, c, h, 1, w, 1).expand(b, c, h, 2, w, 2).reshape(b, c, h * 2, w * 2).shrink((None, None, (0, size[0]), (0, size[1])))
