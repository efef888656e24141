"""A convolution that carries its own gradient.

tinygrad derives the gradient of `Tensor.conv2d` through its pooling view. The input gradient so derived is a reduce over a window of a padded
picture, several times slower than a convolution. Both gradients of a convolution are convolutions again; here they are written as such."""
import math
from collections.abc import Callable
from tinygrad import Tensor, dtypes
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.dtype import DType
from tinygrad.function import function
from tinygrad.helpers import NUM_CPU_THREADS
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

LEAST_WORK = 128 << 10   # products that are worth another core: tinygrad's own measure
LANES, TILE = 16, 4  # floats in the widest vector of current processors, and columns that share a vector of weights


def _on_cpu(*tensors: Tensor) -> bool: return all(t.device == "CPU" for t in tensors)


def _product(a: UOp, b: UOp) -> UOp:
  # Products are added up in float32 whatever they are of, as `Tensor.sum` does: a sum kept in eight bits loses what it gains.
  return a.cast(dtypes.float32) * b.cast(dtypes.float32)


def _correlate(x: Tensor, weight: Tensor, stride: int, groups: int, pad: tuple[int, int, int, int]) -> Tensor:
  """`Tensor.conv2d`: x [B,Cin,H,W] padded by (left, right, top, bottom), weight [Cout,Cin/groups,KH,KW] -> [B,Cout,OH,OW].

  On one CPU the kernel is spelled out, with its tile: tinygrad's own choice there is vectors of four floats, 25 GFLOPS where this does 40."""
  if groups > 1 or not _on_cpu(x, weight): return x.conv2d(weight.contiguous(), groups=groups, stride=stride, padding=pad)
  return _cpu_correlate(x.pad(((0, 0), (0, 0), pad[2:], pad[:2])), weight, stride)


def _cpu_correlate(x: Tensor, weight: Tensor, stride: int, gradient: Callable | None = None) -> Tensor:
  """`_correlate` of a picture that is padded already, as a kernel; `gradient` is its `grad_fxn`."""
  (out_channels, in_channels, *taps) = weight.shape
  shape = x.shape[0], out_channels, *((side - tap) // stride + 1 for side, tap in zip(x.shape[2:], taps))
  # tinygrad would join rows and columns there, and number the axes anew
  flat = (*shape[:2], 1, shape[2] * shape[3]) if taps == [1, 1] and stride == 1 else shape

  def kernel(out: UOp, x: UOp, weight: UOp) -> UOp:
    x, out = x.reshape(*x.shape[:2], *flat[2:]) if flat != shape else x, out.reshape(flat)
    b, o, h, w = (UOp.range(n, axis) for axis, n in enumerate(flat))
    i, p, q = (UOp.range(n, 4 + axis, AxisType.REDUCE) for axis, n in enumerate((in_channels, *taps)))
    total = _product(x[b, i, h * stride + p, w * stride + q], weight[o, i, p, q]).reduce(i, p, q, arg=Ops.ADD).cast(out.dtype)
    tile = {1: LANES, 3: TILE} if out_channels % LANES == 0 else {1: TILE, 3: LANES}
    info = KernelInfo(name="conv", opts_to_apply=_tile(flat, tile, math.prod(weight.shape[1:])))
    return out[b, o, h, w].store(total).end(b, o, h, w).sink(arg=info)

  return _run(kernel, math.prod(shape), x, weight, gradient=gradient).reshape(shape)


def _run(kernel: Callable[..., UOp], size: int, *tensors: Tensor, gradient: Callable | None = None) -> Tensor:
  """The `size` numbers that `kernel` makes of `tensors`, which it finds in memory.

  As a function of its own that makes its own memory, of one axis: in each other way tinygrad copies them once more."""
  def run(*tensors: Tensor) -> Tensor:
    return Tensor.invalids(size, dtype=tensors[0].dtype, device=tensors[0].device).custom_kernel(*tensors, fxn=kernel)[0]
  return function(run, precompile=True, grad_fxn=gradient)(*(t.contiguous() for t in tensors)).contiguous()   # without which it is run at each use


def _tile(shape: tuple[int, ...], tile: dict[int, int], products: int) -> tuple[Opt, ...]:
  """Compute the largest part of `tile` (axis -> elements) that divides `shape` at once, and a part of what is left, of `products` for each element,
  on each core. Later axes first, and counted without those of length 1: both an axis of one element and one that is computed whole are gone from the
  numbering."""
  lengths = {axis: next(n for n in range(min(shape[axis], most), 0, -1) if shape[axis] % n == 0) for axis, most in sorted(tile.items(), reverse=True)}
  tiles = [Opt(OptOps.UPCAST, sum(n > 1 for n in shape[:axis]), length) for axis, length in lengths.items() if length > 1]
  left = [n // lengths.get(axis, 1) for axis, n in enumerate(shape)]
  cores = min(NUM_CPU_THREADS.value, math.prod(shape) * products // LEAST_WORK)
  for count in range(cores, 1, -1):
    for axis, n in enumerate(left):
      if n % count == 0: return (*tiles, Opt(OptOps.THREAD, sum(n > 1 for n in left[:axis]), count))
  return tuple(tiles)


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
  out = _correlate(grad, w, 1, groups, pad)
  # Contiguous, or what is behind the input would spoil the tile of the convolution; a kernel that is spelled out is so by itself.
  if stride == 1: return out if groups == 1 and _on_cpu(grad) else out.contiguous()
  out = out.reshape(batch, groups * per_group, *phases, rows, columns).permute(0, 1, 4, 2, 5, 3)
  out = out.pad(((0, 0),) * 3 + ((0, stride - phases[0]), (0, 0), (0, stride - phases[1]))).reshape(batch, -1, rows * stride, columns * stride)
  return out.shrink((None, None, (0, size[0]), (0, size[1]))).contiguous()


def _weight_gradient(grad: Tensor, x: Tensor, kernel: tuple[int, int], stride: int, padding: int, groups: int) -> Tensor:
  """Gradient [Cout,Cin/groups,KH,KW] of the weight: input and output gradient, each with batch and channels swapped, convolved with each other."""
  if groups == 1 and _on_cpu(grad, x): return _cpu_weight_gradient(grad, x, kernel, stride, padding)
  batch, in_channels = x.shape[0], x.shape[1]
  x = x.reshape(batch, groups, in_channels // groups, *x.shape[2:]).permute(2, 1, 0, 3, 4).reshape(-1, groups * batch, *x.shape[2:])
  g = grad.transpose(0, 1)                                                            # [Cout,B,OH,OW]: B is what a group's "input channels" are here
  out = x.conv2d(g, groups=groups, dilation=stride, padding=padding)                  # [Cin/groups,Cout,>=KH,>=KW]
  return out.shrink((None, None, (0, kernel[0]), (0, kernel[1]))).transpose(0, 1)


def _cpu_weight_gradient(grad: Tensor, x: Tensor, kernel: tuple[int, int], stride: int, padding: int) -> Tensor:
  """`_weight_gradient` without groups, its kernel spelled out as in `_correlate`: of input and output gradient, the one with friendlier channels is
  laid out channels last, and a vector of them is multiplied with `kernel` columns of the other at once."""
  x = x.pad(((0, 0), (0, 0), (padding, padding), (padding, padding)))
  (batch, out_channels, rows, columns), in_channels, (taps_y, taps_x) = grad.shape, x.shape[1], kernel
  input_last = in_channels % LANES == 0
  if input_last:   # a row of the kernel and its channels are one axis
    x = x.permute(0, 2, 3, 1).reshape(batch, x.shape[2], -1)
    shape, tile = (out_channels, taps_y, taps_x * in_channels), {0: TILE, 2: LANES}
  else:
    grad = grad.permute(0, 2, 3, 1)
    shape, tile = (in_channels, taps_y, taps_x, out_channels), {2: TILE, 3: LANES} if taps_x > 1 else {0: TILE, 3: LANES}
  # Where the kernel has one place to be, tinygrad joins axes and numbers them anew; there is too little work for a tile to matter.
  info = KernelInfo(name="conv_weight_gradient", opts_to_apply=_tile(shape, tile, batch * rows * columns) if min(rows, columns) > 1 else None)

  def accumulate(out: UOp, x: UOp, grad: UOp) -> UOp:
    out, axes = out.reshape(shape), [UOp.range(n, axis) for axis, n in enumerate(shape)]
    b, h, w = (UOp.range(n, len(shape) + axis, AxisType.REDUCE) for axis, n in enumerate((batch, rows, columns)))
    if input_last: product = _product(x[b, h * stride + axes[1], w * stride * in_channels + axes[2]], grad[b, axes[0], h, w])
    else: product = _product(x[b, axes[0], h * stride + axes[1], w * stride + axes[2]], grad[b, h, w, axes[3]])
    return out[*axes].store(product.reduce(b, h, w, arg=Ops.ADD).cast(out.dtype)).end(*axes).sink(arg=info)

  out = _run(accumulate, math.prod(shape), x, grad).reshape(shape)
  # Contiguous, for gradients of a weight that is used often are added up, and reading them all across the grain is slow.
  return (out.reshape(out_channels, taps_y, taps_x, in_channels).permute(0, 3, 1, 2) if input_last else out.permute(3, 0, 1, 2)).contiguous()


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, groups: int = 1,
           dtype: DType | None = None) -> Tensor:
  """2-D convolution, the same numbers as `Tensor.conv2d` and the same gradients up to the order of summation.

  Args: `x` [B,Cin,H,W]; `weight` [Cout,Cin/groups,KH,KW], of one dtype; `bias` [Cout] or None, of that dtype or float32. Returns [B,Cout,OH,OW] of
  `dtype`, by default that of `x`; the bias is added before rounding to it. Sides are cropped as torch crops them: what a stride does not reach gets
  gradient 0. Needs padding < kernel size."""
  size, on_cpu = x.shape[2:], groups == 1 and _on_cpu(x, weight)
  padded = padding if on_cpu else 0   # once, for the output and for the weight's gradient

  def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
    # Contiguous, or everything behind the output gradient (the whole loss, in a head) is computed again at each tap.
    g, (x, weight) = Tensor(grad).reshape(out.shape).contiguous(), (Tensor(u) for u in call.src[1:3])
    of_input = _input_gradient(g, weight, size, stride, padding, groups).pad(((0, 0), (0, 0), (padded,) * 2, (padded,) * 2))
    return of_input.uop, _weight_gradient(g, x, weight.shape[2:], stride, padding - padded, groups).uop

  if on_cpu: out = _cpu_correlate(x.pad(((0, 0), (0, 0), (padding,) * 2, (padding,) * 2)), weight, stride, gradient)
  else: out = function(lambda x, weight: _correlate(x, weight, stride, groups, (padding,) * 4), grad_fxn=gradient)(x, weight)
  return (out if bias is None else out + bias.reshape(1, -1, 1, 1)).cast(dtype or x.dtype)
