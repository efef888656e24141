"""Pictures at half and at twice the size: max pooling that carries its own gradient, and the nearest neighbour."""
import math
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


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
  """Nearest neighbour from [B,C,h,w] to [B,C,H,W], h = ceil(H / 2) and w = ceil(W / 2): each pixel twice, the last cut where a side is odd."""
  b, c, h, w = x.shape
  return x.reshape(b, c, h, 1, w, 1).expand(b, c, h, 2, w, 2).reshape(b, c, h * 2, w * 2).shrink((None, None, (0, size[0]), (0, size[1])))
