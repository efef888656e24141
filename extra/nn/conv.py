"""A convolution that carries its own gradient.

tinygrad derives the gradient of `Tensor.conv2d` through its pooling view. The input gradient so derived is a reduce over a window of a padded
picture, several times slower than a convolution. Both gradients of a convolution are convolutions again; here they are written as such."""
import functools
from tinygrad import Device, Tensor, UOp, function
from tinygrad.dtype import DType
from tinydet.nn import conv_cpu, kernel_cpu


def _input_gradient(grad: Tensor, weight: Tensor, size: tuple[int, int], stride: int, padding: int, groups: int) -> Tensor:
  """Gradient [B,Cin,H,W] of the input, given that of the output [B,Cout,OH,OW].

  Input pixel i = stride*q + phase takes part in output pixel o = q + d through kernel tap k = phase + padding - stride*d, for each tap exactly one
  (phase, d). So the kernel, padded to whole strides, splits into stride*stride small kernels, one per phase. They run as the output channels of one
  stride-1 convolution, and the phases are then woven into the picture. For stride 1 this is the flipped, transposed kernel."""
  batch, (out_channels, per_group, *kernel) = grad.shape[0], weight.shape
  high = [(stride - 1 + padding) // stride] * 2                                       # largest d
  low = [-((k - 1 - padding) // stride) for k in kernel]                              # smallest d
  taps = [h - l + 1 for h, l in zip(high, low)]
  # A kernel smaller than the stride (1x1, stride 2) leaves whole phases without a tap: compute the others only.
  phases = [k if padding == 0 and k < stride else stride for k in kernel]
  before = [stride * h - padding for h in high]
  after = [0 if p < stride else stride * t - b - k for p, t, b, k in zip(phases, taps, before, kernel)]
  w = weight.pad(((0, 0), (0, 0), (before[0], after[0]), (before[1], after[1])))
  w = w.reshape(groups, out_channels // groups, per_group, taps[0], phases[0], taps[1], phases[1]).flip((3, 5)).permute(0, 2, 4, 6, 1, 3, 5)
  w = w.reshape(groups * per_group * phases[0] * phases[1], out_channels // groups, *taps)
  rows, columns = ((side + stride - 1) // stride for side in size)
  pad = (-low[1], columns + high[1] - grad.shape[3], -low[0], rows + high[0] - grad.shape[2])
  out = _exact(grad).conv2d(_exact(w.contiguous()), groups=groups, padding=pad).cast(grad.dtype)
  if stride == 1: return out.contiguous()   # or what is behind the input would spoil the tile of the convolution
  # Contiguous, or tinygrad's heuristics find a phase where they look for a matrix unit's axis.
  out = out.contiguous().reshape(batch, groups * per_group, *phases, rows, columns).permute(0, 1, 4, 2, 5, 3)
  out = out.pad(((0, 0),) * 3 + ((0, stride - phases[0]), (0, 0), (0, stride - phases[1]))).reshape(batch, -1, rows * stride, columns * stride)
  return out.shrink((None, None, (0, size[0]), (0, size[1]))).contiguous()


def _weight_gradient(grad: Tensor, x: Tensor, kernel: tuple[int, int], stride: int, padding: int, groups: int) -> Tensor:
  """Gradient [Cout,Cin/groups,KH,KW] of the weight, given that of the output [B,Cout,OH,OW]: at each tap a product of matrices, summed over pictures
  and pixels. The taps come first and the channels last: tinygrad's heuristics look for a matrix unit's axes from the end, and give up at a tap."""
  (batch, out_channels, *size), in_channels = grad.shape, x.shape[1]
  windows = x.pad((padding,) * 4).unfold(2, kernel[0], stride).unfold(3, kernel[1], stride)[:, :, :size[0], :size[1]]
  windows = windows.reshape(batch, groups, 1, in_channels // groups, *size, *kernel).permute(6, 7, 1, 2, 3, 0, 4, 5)
  g = grad.reshape(batch, groups, out_channels // groups, 1, *size).permute(1, 2, 3, 0, 4, 5)
  out = (_exact(windows) * _exact(g)).sum((5, 6, 7)).cast(grad.dtype).contiguous()    # [KH,KW,groups,Cout/groups,Cin/groups]
  return out.permute(2, 3, 4, 0, 1).reshape(out_channels, in_channels // groups, *kernel).contiguous()   # as it is read more than once


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, groups: int = 1,
           dtype: DType | None = None, silu: bool = False) -> Tensor:
  """2-D convolution, the same numbers as `Tensor.conv2d` and the same gradients up to the order of summation.

  Args: `x` [B,Cin,H,W]; `weight` [Cout,Cin/groups,KH,KW], of one dtype; `bias` [Cout] or None, of that dtype or float32. Returns [B,Cout,OH,OW] of
  `dtype`, by default that of `x`; the bias is added before rounding to it, and with `silu` x / (1 + exp(-x)) taken of each number. Sides are cropped
  as torch crops them: what a stride does not reach gets gradient 0. Needs padding < kernel size."""
  if kernel_cpu.fits(x, weight):
    return conv_cpu.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), stride, padding, groups, silu).cast(dtype or x.dtype)
  out = _padded(x, weight, stride, padding) if _odd_tiles(x, weight, groups) else _convolved(x, weight, stride, padding, groups)
  if bias is not None: out = out + bias.reshape(1, -1, 1, 1)
  return (out * out.sigmoid() if silu else out).cast(dtype or x.dtype)


def _odd_tiles(x: Tensor, weight: Tensor, groups: int) -> bool:
  """Whether the output channels are so many tiles of a matrix unit, 8 each, that tinygrad's heuristics find no number of them to do at a time: 103
  of the 819 channels of nine anchors and 91 classes."""
  tiles = -(-weight.shape[0] // 8)
  return groups == 1 and x.dtype.itemsize == 2 and tiles > 8 and all(tiles % n for n in (2, 3, 5))


def _padded(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
  """The same with one tile more, of zeros, which are computed and left out."""
  channels = weight.shape[0]
  more = -channels % 8 + 8
  return _convolved(x, weight.pad(((0, more), None, None, None)), stride, padding, 1).contiguous()[:, :channels]


def _convolved(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
  """The convolution with its gradients."""
  size = x.shape[2:]

  def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
    # Contiguous, or everything behind the output gradient (the whole loss, in a head) is computed again at each tap.
    g, (x, weight) = Tensor(grad).contiguous(), (Tensor(u) for u in call.src[1:3])
    return (_input_gradient(g, weight, size, stride, padding, groups).uop,
            _weight_gradient(g, x, weight.shape[2:], stride, padding, groups).uop)

  def forward(x: Tensor, weight: Tensor) -> Tensor:
    return _exact(x).conv2d(_exact(weight.contiguous()), groups=groups, stride=stride, padding=padding).cast(x.dtype)

  _matrix_units(x.device)   # asked here, as inside a function a device cannot be
  return function(forward, grad_fxn=gradient)(x, weight)


def _exact(x: Tensor) -> Tensor:
  """`x` as its products are to be made: matrix units round no product of half precision, other units each, so there they are made in float32."""
  return x.float() if x.dtype.itemsize == 2 and x.dtype not in _matrix_units(x.device) else x


@functools.cache
def _matrix_units(device: str | tuple[str, ...]) -> set[DType]:
  """What the matrix units of a device multiply."""
  return {unit.dtype_in for unit in Device[device if isinstance(device, str) else device[0]].renderer.tensor_cores}
