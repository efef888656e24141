"""ShuffleNet v2 (Ma et al. 2018), with torchvision's `state_dict` keys."""
import math
from functools import partial
from tinygrad import Tensor
from tinydet.models.classifier import Block, Classifier, MakeNorm, norm_of
from tinydet.nn import init
from tinydet.nn.layers import Conv2d, Linear, relu
from tinydet.nn.pool import max_pool

DEPTHS = (4, 8, 4)
WIDTHS = {"x0_5": (24, 48, 96, 192, 1024), "x1_0": (24, 116, 232, 464, 1024), "x1_5": (24, 176, 352, 704, 1024), "x2_0": (24, 244, 488, 976, 2048)}


class ShuffleUnit:
  """Half the channels as they are (`stride` 2: all of them through a branch of their own), half through 1x1, 3x3 in each channel, 1x1; then the two
  are woven into each other."""
  def __init__(self, in_channels: int, out_channels: int, stride: int, norm: MakeNorm):
    half = out_channels // 2
    def depthwise(channels: int) -> list: return [Conv2d(channels, channels, 3, stride, 1, channels, bias=False), norm(channels)]
    def pointwise(channels: int) -> list: return [Conv2d(channels, half, 1, bias=False), norm(half), relu]
    self.branch1 = Block([*depthwise(in_channels), *pointwise(in_channels)] if stride == 2 else [])
    self.branch2 = Block([*pointwise(in_channels if stride == 2 else half), *depthwise(half), *pointwise(half)])

  def __call__(self, x: Tensor) -> Tensor:
    kept, changed = (x, x) if self.branch1 else x.chunk(2, dim=1)
    return Tensor.stack(self.branch1(kept), self.branch2(changed), dim=2).flatten(1, 2).contiguous()


class ShuffleNet(Classifier):
  """Three stages at strides 8, 16, 32; the last convolution belongs to C5."""
  top, last = ("fc.",), ("fc",)
  stages = (("conv1.",), (), ("stage2.",), ("stage3.",), ("stage4.", "conv5."))

  def __init__(self, num_classes: int | None, norm: str, widths: tuple[int, ...]):
    make, (first, *middle, last) = norm_of(norm), widths
    self.conv1 = Block([Conv2d(3, first, 3, 2, 1, bias=False), make(first), relu])
    for i, (in_channels, out_channels, depth) in enumerate(zip(widths, middle, DEPTHS)):
      units = [ShuffleUnit(out_channels if j else in_channels, out_channels, 1 if j else 2, make) for j in range(depth)]
      setattr(self, f"stage{i + 2}", Block(units))
    self.conv5 = Block([Conv2d(middle[-1], last, 1, bias=False), make(last), relu])
    self.out_channels = (middle[0], middle[1], last)
    if num_classes is not None: self.fc = Linear(last, num_classes)

  def feature_maps(self, x: Tensor) -> list[Tensor]:
    c3 = self.stage2(max_pool(self.conv1(x).contiguous()))
    c4 = self.stage3(c3)
    return [c3, c4, self.conv5(self.stage4(c4)).contiguous()]

  def __call__(self, x: Tensor) -> Tensor: return self.fc(self.feature_maps(x)[-1].mean((2, 3)))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if key.startswith("fc."): return init.uniform(1 / math.sqrt(self.out_channels[-1]))
    return init.uniform(1 / math.sqrt(math.prod(shape[1:]))) if len(shape) == 4 else init.normalization(key)


NETWORKS = {f"shufflenet_v2_{name}": partial(ShuffleNet, widths=widths) for name, widths in WIDTHS.items()}
MARK = {"stage2.0.branch1.0.weight": None}
