"""ResNet and its kin (He et al. 2015; v1.5: the 3x3 of a bottleneck has the stride), with torchvision's `state_dict` keys."""
import math
from functools import partial
from tinygrad import Tensor
from tinydet.models.classifier import Classifier
from tinydet.nn import init
from tinydet.nn.layers import NORMS, Conv2d, Linear, normed, relu
from tinydet.nn.pool import max_pool


class BasicBlock:
  """Two 3x3 convolutions and a shortcut."""
  expansion = 1

  def __init__(self, in_channels: int, channels: int, stride: int, norm: str, groups: int, base_width: int):
    self.conv1, self.bn1 = Conv2d(in_channels, channels, 3, stride, 1, bias=False), NORMS[norm](channels)
    self.conv2, self.bn2 = Conv2d(channels, channels, 3, 1, 1, bias=False), NORMS[norm](channels)
    self.downsample = _downsample(in_channels, channels, stride, norm)

  def __call__(self, x: Tensor) -> Tensor:
    out = normed(self.bn1, self.conv1(x), relu).contiguous()
    return (self.bn2(self.conv2(out)) + x.sequential(self.downsample)).contiguous().relu()


class Bottleneck:
  """1x1, 3x3 (strided, in groups for ResNeXt), 1x1 to four times the channels, and a shortcut."""
  expansion = 4

  def __init__(self, in_channels: int, channels: int, stride: int, norm: str, groups: int, base_width: int):
    width, out_channels = channels * base_width // 64 * groups, channels * self.expansion
    self.conv1, self.bn1 = Conv2d(in_channels, width, 1, bias=False), NORMS[norm](width)
    self.conv2, self.bn2 = Conv2d(width, width, 3, stride, 1, groups, bias=False), NORMS[norm](width)
    self.conv3, self.bn3 = Conv2d(width, out_channels, 1, bias=False), NORMS[norm](out_channels)
    self.downsample = _downsample(in_channels, out_channels, stride, norm)

  def __call__(self, x: Tensor) -> Tensor:
    out = normed(self.bn1, self.conv1(x), relu).contiguous()
    out = normed(self.bn2, self.conv2(out), relu).contiguous()
    return (self.bn3(self.conv3(out)) + x.sequential(self.downsample)).contiguous().relu()


def _downsample(in_channels: int, out_channels: int, stride: int, norm: str) -> list:
  if stride == 1 and in_channels == out_channels: return []
  return [Conv2d(in_channels, out_channels, 1, stride, bias=False), NORMS[norm](out_channels)]


class ResNet(Classifier):
  """Four stages at strides 4 to 32."""
  top, last = ("fc.",), ("fc",)
  stages = (("conv1.", "bn1."), *((f"layer{i}.",) for i in range(1, 5)))

  def __init__(self, block: type, layers: tuple[int, int, int, int], num_classes: int | None = 1000, norm: str = "batch", *, width: int = 64,
               groups: int = 1, base_width: int = 64):
    self.channels = [width * 2 ** i * block.expansion for i in range(4)]
    self.conv1, self.bn1 = Conv2d(3, width, 7, 2, 3, bias=False), NORMS[norm](width)
    for i, (depth, in_channels) in enumerate(zip(layers, [width] + self.channels[:3])):
      stage = [block(in_channels if j == 0 else self.channels[i], width * 2 ** i, 2 if i > 0 and j == 0 else 1, norm, groups, base_width)
               for j in range(depth)]
      setattr(self, f"layer{i + 1}", stage)
    self.out_channels = tuple(self.channels[1:])
    if num_classes is not None: self.fc = Linear(self.channels[3], num_classes)

  def features(self, x: Tensor) -> list[Tensor]:
    """C2..C5: [B,channels[i],H/4,W/4] down to [B,channels[3],H/32,W/32], sides rounded up."""
    x = max_pool(normed(self.bn1, self.conv1(x), relu).contiguous())
    return [x := x.sequential(getattr(self, f"layer{i}")) for i in range(1, 5)]

  def feature_maps(self, x: Tensor) -> list[Tensor]: return self.features(x)[1:]

  def __call__(self, x: Tensor) -> Tensor: return self.fc(self.features(x)[-1].mean((2, 3)))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if key.startswith("fc."): return init.uniform(1 / math.sqrt(self.channels[3]))
    return init.kaiming_normal_fan_out if len(shape) == 4 else init.normalization(key)


BACKBONES: dict[str, tuple[type, tuple[int, int, int, int], dict[str, int]]] = {
  "resnet18": (BasicBlock, (2, 2, 2, 2), {}), "resnet34": (BasicBlock, (3, 4, 6, 3), {}),
  "resnet50": (Bottleneck, (3, 4, 6, 3), {}), "resnet101": (Bottleneck, (3, 4, 23, 3), {}), "resnet152": (Bottleneck, (3, 8, 36, 3), {}),
  "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), {"base_width": 128}), "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), {"base_width": 128}),
  "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "base_width": 4}),
  "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), {"groups": 32, "base_width": 8}),
  # A quarter of ResNet-18's width and half its depth, small enough to ship with the code and to train on a laptop's processor.
  "resnet10_quarter": (BasicBlock, (1, 1, 1, 1), {"width": 16})}


def _made(num_classes: int | None, norm: str, name: str) -> ResNet:
  block, layers, options = BACKBONES[name]
  return ResNet(block, layers, num_classes, norm, **options)


NETWORKS = {name: partial(_made, name=name) for name in BACKBONES}
MARK = {"layer1.0.conv1.weight": None}


def build(name: str, num_classes: int | None = 1000, norm: str = "batch", seed: int = 0) -> ResNet:
  """The network that torchvision calls `name` (a key of `BACKBONES`), initialised from `seed`; `norm` is a key of `NORMS`.

  Raises KeyError for another name."""
  model = _made(num_classes, norm, name)
  init.initialize(model, model.init_rule, seed)
  return model
