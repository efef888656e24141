"""What the classifiers that can be a detector's backbone have in common, and the blocks that several of them are made of."""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar
from tinygrad import Tensor
from tinydet.errors import UserError
from tinydet.nn import init
from tinydet.nn.layers import NORMS, Conv2d, Linear, normed, relu

Layer = Callable[[Tensor], Tensor]
MakeNorm = Callable[[int], Layer]


class Classifier:
  """A normalised batch [B,3,H,W] -> logits [B,num_classes]; `feature_maps` gives what a detector needs. With `num_classes` None there is no `top`."""
  out_channels: Sequence[int]                       # of C3, C4, C5
  stages: Sequence[tuple[str, ...]]                 # five, from the picture up: how the names of their tensors begin
  top: ClassVar[tuple[str, ...]] = ("classifier.",) # how the names of tensors begin that only tell classes apart
  last: ClassVar[tuple[str, ...]] = ()              # the layers with a row for each class
  smallest: ClassVar[int] = 32                      # pixels a side, of which something is left for the classes

  def __call__(self, x: Tensor) -> Tensor: raise NotImplementedError

  def feature_maps(self, x: Tensor) -> list[Tensor]:
    """C3, C4, C5: the last features at strides 8, 16 and 32, [B,out_channels[i],ceil(H/stride),ceil(W/stride)]. Networks whose windows leave out what
    does not fill one, or that go over the picture without padding, are given zeros, or for a maximum nothing, around it."""
    raise NotImplementedError

  def all_logits(self, x: Tensor) -> list[tuple[float, Tensor]]:
    """Logits to learn from, and the weight of each in the loss: the network's own, and those of auxiliary classifiers."""
    return [(1.0, self(x))]

  def sized(self, size: int) -> list[str]:
    """Leave out, for good, what cannot learn from pictures of `size` x `size`; notes for the user. UserError where nothing can."""
    if size < self.smallest: raise UserError(f"--size {size}: of so small a picture this network leaves nothing; give {self.smallest} or more")
    return []

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    """torchvision's initialisation of the tensor `key`."""
    raise NotImplementedError

  @property
  def class_rows(self) -> dict[str, tuple[int, int]]:
    """The tensors with a row for each class: how many times they have all, and how many other rows come before the classes each time."""
    return {f"{layer}.{part}": (1, 0) for layer in self.last if self._has(layer) for part in ("weight", "bias")}

  def _has(self, layer: str) -> bool:
    found: Any = self
    for name in layer.split("."):
      found = (found[int(name)] if int(name) < len(found) else None) if isinstance(found, list) else getattr(found, name, None)
    return found is not None


class Layered(Classifier):
  """One list `features` of layers, each of which keeps the picture's size or halves it, and a classifier of the last one's means."""
  features: list[Layer]
  classifier: Layer
  ends: tuple[int, ...]   # the numbers of the last layers at strides 2, 4, 8, 16, 32

  def cut(self, strides: list[int], channels: list[int]) -> None:
    """Find the last layer of each resolution, given stride and channels of all layers."""
    self.ends = (*(i - 1 for i, stride in enumerate(strides) if stride == 2 and i), len(strides) - 1)
    self.stages = [tuple(f"features.{i}." for i in range(first + 1, last + 1)) for first, last in zip((-1, *self.ends), self.ends)]
    self.out_channels = tuple(channels[i] for i in self.ends[2:])

  def feature_maps(self, x: Tensor) -> list[Tensor]:
    maps = [x := layer(x) for layer in self.features]
    return [maps[i] for i in self.ends[2:]]

  def __call__(self, x: Tensor) -> Tensor: return self.classifier(self.feature_maps(x)[-1].mean((2, 3)))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if len(shape) == 4: return init.kaiming_normal_fan_out
    return self.class_weights(shape) if len(shape) == 2 else init.normalization(key)

  def class_weights(self, shape: tuple[int, ...]) -> init.Draw:
    """Of the linear layers."""
    return init.normal(0.01)


def through(layers: Sequence[Layer], x: Tensor) -> Tensor:
  """`x` through `layers`, one after the other."""
  for layer in layers: x = layer(x)
  return x


class Block(list):
  """Layers one after the other under their numbers, as torch's `Sequential`."""
  __slots__ = ()   # `get_state_dict` takes what has a __dict__ for no list

  def __call__(self, x: Tensor) -> Tensor: return through(self, x)


class ConvNorm(list):
  """A convolution that keeps the picture's size or divides it by `stride`, a norm, and an activation (torchvision `Conv2dNormActivation`)."""
  __slots__ = ("act",)

  def __init__(self, in_channels: int, out_channels: int, kernel: int, norm: MakeNorm, act: Layer | None = relu, stride: int = 1, groups: int = 1):
    super().__init__([Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups, bias=False), norm(out_channels)])
    self.act = act

  def __call__(self, x: Tensor) -> Tensor:
    return normed(self[1], self[0](x), self.act).contiguous()


class NormedConv:
  """A convolution and a norm under the names `conv` and `bn`, and ReLU (torchvision `BasicConv2d`)."""
  def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], norm: MakeNorm, stride: int = 1,
               padding: int | tuple[int, int] = 0):
    self.conv, self.bn = Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False), norm(out_channels)

  def __call__(self, x: Tensor, cover: bool = False) -> Tensor:
    return normed(self.bn, self.conv.covering(x) if cover else self.conv(x), relu).contiguous()


class SqueezeExcitation:
  """Each channel times a weight, which all channels' means decide (Hu et al. 2017)."""
  def __init__(self, channels: int, squeezed: int, act: Layer, scale: Layer):
    self.fc1, self.fc2, self.act, self.scale = Conv2d(channels, squeezed, 1), Conv2d(squeezed, channels, 1), act, scale

  def __call__(self, x: Tensor) -> Tensor:
    means = x.mean((2, 3), keepdim=True).contiguous()
    return (x * self.scale(self.fc2(self.act(self.fc1(means)).contiguous())).contiguous()).contiguous()


def dropout(share: float) -> Layer:
  """In training leaves out this share of all numbers."""
  return partial(Tensor.dropout, p=share)


def classifier_of(in_features: int, num_classes: int | None, share: float) -> dict[str, Block]:
  """Dropout and a linear layer, under the name that most have for them; nothing without classes."""
  return {} if num_classes is None else {"classifier": Block([dropout(share), Linear(in_features, num_classes)])}


def norm_of(kind: str, eps: float = 1e-5, momentum: float = 0.1) -> MakeNorm:
  """What makes norm layers of this `kind`, a key of `NORMS`."""
  return partial(NORMS[kind], eps=eps, momentum=momentum)


def divisible(value: float) -> int:
  """The multiple of 8 next to `value`, at least 8 and 0.9 of it (Sandler et al. 2018, as in their program)."""
  near = max(8, int(value + 4) // 8 * 8)
  return near + 8 * (near < 0.9 * value)
