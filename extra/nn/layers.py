"""Layers as lists of tensors whose attribute names are torch's `state_dict` keys. Values come from `tinydet.nn.init.initialize` or a checkpoint."""
import math
from collections.abc import Callable
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.helpers import TRAINING
from tinydet.nn import norm_cpu
from tinydet.nn.conv import conv2d
from tinydet.nn.kernel_cpu import fits, shards


class Conv2d:
  """`conv2d` with its weight [Cout,Cin/groups,KH,KW] and, if asked for, bias [Cout]. The result has the input's dtype, or `dtype`. `kernel_size` and
  `padding` are one number for both axes, or (rows, columns)."""
  def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0,
               groups: int = 1, bias: bool = True, dtype: DType | None = None):
    self.stride, self.padding, self.groups, self.dtype = stride, padding, groups, dtype
    self.weight = Tensor.empty(out_channels, in_channels // groups, *((kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size))
    self.bias = Tensor.empty(out_channels) if bias else None

  def __call__(self, x: Tensor, silu: bool = False) -> Tensor:
    padding = self.padding
    if not isinstance(padding, int):
      x, padding = x.pad(((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2)), 0
    # The bias stays float32, and so its gradient, a sum over all pixels that half precision may not hold.
    return conv2d(x, self.weight.cast(x.dtype), self.bias, self.stride, padding, self.groups, self.dtype, silu)

  def covering(self, x: Tensor) -> Tensor:
    """As the call, but [B,Cout,ceil(H/stride),ceil(W/stride)]: zeros around make up for padding that the layer lacks, and for a stride that divides
    no side."""
    around = []
    for side, kernel, padding in zip(x.shape[2:], self.weight.shape[2:], (self.padding,) * 2 if isinstance(self.padding, int) else self.padding):
      before = padding or (kernel - 1) // 2 if kernel > self.stride else 0
      around.append((before, max(0, (-(-side // self.stride) - 1) * self.stride + kernel - side - before)))
    x = x.pad(((0, 0), (0, 0), *around))
    return conv2d(x, self.weight.cast(x.dtype), self.bias, self.stride, 0, self.groups, self.dtype)


class Linear:
  """x [B,in] -> [B,out] with weight [out,in] and bias [out]."""
  def __init__(self, in_features: int, out_features: int):
    self.weight, self.bias = Tensor.empty(out_features, in_features), Tensor.empty(out_features)

  def __call__(self, x: Tensor) -> Tensor: return x.linear(self.weight.cast(x.dtype).transpose(), self.bias.cast(x.dtype))


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
  # One multiply-add an element, in float32: x * scale and shift nearly cancel where a mean is large. Contiguous, so that the square root behind
  # `scale` is taken once a channel and not once a pixel.
  scale, shift = scale.contiguous(), shift.contiguous()
  return (x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)).cast(x.dtype)


class ConvTranspose2x2:
  """A transposed convolution of kernel and stride 2: x [B,Cin,h,w] -> [B,Cout,2h,2w] with weight [Cin,Cout,2,2] and bias [Cout] (torch
  `ConvTranspose2d`). As windows do not overlap it is a 1x1 convolution to four times the channels, which are then woven into the picture."""
  def __init__(self, in_channels: int, out_channels: int):
    self.weight, self.bias = Tensor.empty(in_channels, out_channels, 2, 2), Tensor.empty(out_channels)

  def __call__(self, x: Tensor) -> Tensor:
    (batch, _, height, width), (channels, out_channels, *_) = x.shape, self.weight.shape
    weight = self.weight.cast(x.dtype).permute(1, 2, 3, 0).reshape(out_channels * 4, channels, 1, 1)
    out = conv2d(x, weight).reshape(batch, out_channels, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return (out.reshape(batch, out_channels, 2 * height, 2 * width) + self.bias.reshape(1, -1, 1, 1)).cast(x.dtype)


def relu(x: Tensor) -> Tensor:
  """The larger of x and 0."""
  return x.relu()


def relu6(x: Tensor) -> Tensor:
  """x between 0 and 6 (Sandler et al. 2018)."""
  return x.maximum(0).minimum(6)


def hard_sigmoid(x: Tensor) -> Tensor:
  """x / 6 + 1/2 between 0 and 1 (Howard et al. 2019)."""
  return (x + 3).maximum(0).minimum(6) * (1 / 6)


def hard_swish(x: Tensor) -> Tensor:
  """x times `hard_sigmoid` of it (Howard et al. 2019)."""
  return x * hard_sigmoid(x)


def gelu(x: Tensor) -> Tensor:
  """x times the standard normal distribution's share below it (Hendrycks & Gimpel 2016), by the error function (torch `GELU`)."""
  return x * 0.5 * (1 + (x * math.sqrt(0.5)).erf())


def silu(x: Tensor) -> Tensor:
  """x / (1 + exp(-x)) (Elfwing et al. 2017)."""
  return x * x.sigmoid()


def mish(x: Tensor) -> Tensor:
  """x tanh(ln(1 + exp(x))) (Misra 2019). With e = exp(x) the tangent is n / (n + 2), n = e (e + 2), and 1 in float32 from 20 on."""
  e = x.minimum(20).exp()
  n = e * (e + 2)
  return x * (n / (n + 2))


def leaky_relu(x: Tensor) -> Tensor:
  """x, or 0.1 x where that is negative (darknet "leaky")."""
  return (x > 0).where(x, 0.1 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"": lambda x: x, "relu": relu, "silu": silu}   # that a batch norm may bring along
_NAMES = {None: "", relu: "relu", Tensor.relu: "relu", silu: "silu"}


class FrozenBatchNorm:
  """Batch norm on stored statistics, in training too; nothing in it is learnt (torchvision `FrozenBatchNorm2d`)."""
  def __init__(self, channels: int, eps: float = 1e-5):
    self.eps = eps
    self.weight, self.bias, self.running_mean, self.running_var = (Tensor.empty(channels).is_param_(False) for _ in range(4))

  def __call__(self, x: Tensor) -> Tensor:
    scale = self.weight * (self.running_var + self.eps).rsqrt()
    return _scale_and_shift(x, scale.detach(), (self.bias - self.running_mean * scale).detach())


class BatchNorm:
  """Batch norm (Ioffe & Szegedy 2015; torch `BatchNorm2d`): the batch's statistics under `Context(TRAINING=1)`, the running ones otherwise.

  On a batch that is sharded over devices the statistics are those of the whole batch."""
  def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
    self.eps, self.momentum = eps, momentum
    self.weight, self.bias = Tensor.empty(channels), Tensor.empty(channels)
    self.running_mean, self.running_var = Tensor.empty(channels).is_param_(False), Tensor.empty(channels).is_param_(False)
    self.num_batches_tracked = Tensor.empty(dtype=dtypes.int64).is_param_(False)

  def __call__(self, x: Tensor, activation: str = "") -> Tensor:
    """x [B,C,H,W] normalised, and through an activation of `ACTIVATIONS` where one is named: on processors in the same kernel."""
    act = ACTIVATIONS[activation]
    if not TRAINING:
      scale = self.weight * (self.running_var + self.eps).rsqrt()
      return act(_scale_and_shift(x, scale, self.bias - self.running_mean * scale))
    if fits(x, self.weight) and shards(x) == 1:   # its statistics are those of all pictures
      out, mean, variance = norm_cpu.batch_norm(x.cast(dtypes.float32), self.weight, self.bias, self.eps, activation)
      self._follow(mean, variance, x.numel() // x.shape[1])
      return out.cast(x.dtype)
    x = x.contiguous()   # read four times: mean, variance, output, gradient
    values = x.cast(dtypes.float32)
    mean = values.mean((0, 2, 3))
    variance = (values - mean.detach().reshape(1, -1, 1, 1)).square().mean((0, 2, 3))  # d variance / d mean is 0
    self._follow(mean.detach(), variance.detach(), x.numel() // x.shape[1])
    scale = self.weight * (variance + self.eps).rsqrt()
    return act(_scale_and_shift(x, scale, self.bias - mean * scale))

  def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
    """Let the running statistics follow those of a batch, of `count` numbers a channel."""
    # A batch that overflowed leaves them as they were, as the optimiser leaves the weights.
    unbiased = count / max(count - 1, 1)
    running = self.running_mean, self.running_var, self.num_batches_tracked
    if fits(*running, mean): return norm_cpu.follow(running, mean, variance, self.momentum, unbiased)
    for running, now in ((self.running_mean, mean), (self.running_var, unbiased * variance)):
      running.assign(now.isfinite().where((1 - self.momentum) * running + self.momentum * now, running))
    self.num_batches_tracked.assign(self.num_batches_tracked + 1)


def normed(norm: Callable[[Tensor], Tensor], x: Tensor, act: Callable[[Tensor], Tensor] | None) -> Tensor:
  """x through a norm layer and an activation, None for none: in one kernel where the norm brings it along."""
  if isinstance(norm, BatchNorm) and act in _NAMES: return norm(x, _NAMES[act])
  x = norm(x)
  return x if act is None else act(x)


class GroupNorm:
  """Group norm over `groups` groups of channels (Wu & He 2018; torch `GroupNorm`)."""
  def __init__(self, groups: int, channels: int, eps: float = 1e-5):
    self.groups, self.eps = groups, eps
    self.weight, self.bias = Tensor.empty(channels), Tensor.empty(channels)

  def __call__(self, x: Tensor) -> Tensor:
    values = x.contiguous().cast(dtypes.float32).reshape(x.shape[0], self.groups, -1)
    centred = values - values.mean(-1, keepdim=True)
    normal = (centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()).reshape(x.shape)
    return (normal * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)).cast(x.dtype)


class LayerNorm:
  """Layer norm over the channels of each pixel, x [B,C,H,W] (Ba et al. 2016; torch `LayerNorm`, whose channels come last)."""
  def __init__(self, channels: int, eps: float = 1e-6):
    self.eps = eps
    self.weight, self.bias = Tensor.empty(channels), Tensor.empty(channels)

  def __call__(self, x: Tensor) -> Tensor:
    values = x.contiguous().cast(dtypes.float32)
    centred = (values - values.mean(1, keepdim=True)).contiguous()
    scale = (centred.square().mean(1, keepdim=True) + self.eps).rsqrt().contiguous()
    return (centred * scale * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)).cast(x.dtype)


def stochastic_depth(x: Tensor, chance: float) -> Tensor:
  """In training each picture of x [B,...] is 0 with this chance and else as much larger (Huang et al. 2016; torchvision `StochasticDepth`, "row")."""
  if not TRAINING or chance == 0: return x
  draws = x[(slice(None), *(slice(0, 1),) * (x.ndim - 1))].rand_like(dtype=dtypes.float32)
  return x * ((draws >= chance).contiguous().cast(x.dtype) * (1 / (1 - chance)))


def _groups(channels: int) -> int:
  """32, or fewer where there would be less than four channels in each, and as many as divide the channels."""
  return max(groups for groups in range(1, max(1, min(32, channels // 4)) + 1) if channels % groups == 0)


Norm = FrozenBatchNorm | BatchNorm | GroupNorm
# All are asked for a number of channels, the constant that they add to the variance, and the share of a batch in running statistics.
NORMS: dict[str, Callable[..., Norm]] = {
  "frozen": lambda channels, eps=1e-5, momentum=0.1: FrozenBatchNorm(channels, eps), "batch": BatchNorm,
  "group": lambda channels, eps=1e-5, momentum=0.1: GroupNorm(_groups(channels), channels, eps)}
