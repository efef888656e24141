"""MNASNet (Tan et al. 2018), with torchvision's `state_dict` keys."""
import math
from functools import partial
from tinygrad import Tensor
from tinydet.models.classifier import Block, Classifier, MakeNorm, classifier_of, divisible, norm_of
from tinydet.nn import init
from tinydet.nn.layers import Conv2d, relu

MOMENTUM = 1 - 0.9997   # of running statistics
WIDTHS = (32, 16, 24, 40, 80, 96, 192, 320)
STACKS = ((3, 2, 3, 3), (5, 2, 3, 3), (5, 2, 6, 3), (3, 1, 6, 2), (5, 2, 6, 4), (3, 1, 6, 1))   # kernel, stride, expansion, blocks
LAST = 1280


class InvertedResidual:
  """1x1 to `expansion` times the channels, a convolution in each channel, 1x1; the input is added where it fits."""
  def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int, norm: MakeNorm):
    hidden, self.add = in_channels * expansion, stride == 1 and in_channels == out_channels
    self.layers = Block([Conv2d(in_channels, hidden, 1, bias=False), norm(hidden), relu,
                         Conv2d(hidden, hidden, kernel, stride, kernel // 2, hidden, bias=False), norm(hidden), relu,
                         Conv2d(hidden, out_channels, 1, bias=False), norm(out_channels)])

  def __call__(self, x: Tensor) -> Tensor: return (self.layers(x) + x if self.add else self.layers(x)).contiguous()


class MNASNet(Classifier):
  """`alpha` is its width, as a share of MNASNet-B1's."""
  last = ("classifier.1",)
  stages = (tuple(f"layers.{i}." for i in range(8)), ("layers.8.",), ("layers.9.",), ("layers.10.", "layers.11."),
            tuple(f"layers.{i}." for i in range(12, 17)))

  def __init__(self, num_classes: int | None, norm: str, alpha: float):
    make, widths = norm_of(norm, momentum=MOMENTUM), [divisible(width * alpha) for width in WIDTHS]
    self.layers = Block([Conv2d(3, widths[0], 3, 2, 1, bias=False), make(widths[0]), relu,
                         Conv2d(widths[0], widths[0], 3, 1, 1, widths[0], bias=False), make(widths[0]), relu,
                         Conv2d(widths[0], widths[1], 1, bias=False), make(widths[1])])
    for in_channels, out_channels, (kernel, stride, expansion, depth) in zip(widths[1:], widths[2:], STACKS):
      self.layers.append(Block([InvertedResidual(out_channels if i else in_channels, out_channels, kernel, 1 if i else stride, expansion, make)
                                for i in range(depth)]))
    self.layers += [Conv2d(widths[-1], LAST, 1, bias=False), make(LAST), relu]
    self.out_channels = (widths[3], widths[5], LAST)
    vars(self).update(classifier_of(LAST, num_classes, 0.2))

  def feature_maps(self, x: Tensor) -> list[Tensor]:
    c3 = Block(self.layers[:10])(x).contiguous()
    c4 = Block(self.layers[10:12])(c3)
    return [c3, c4, Block(self.layers[12:])(c4).contiguous()]

  def __call__(self, x: Tensor) -> Tensor: return self.classifier(self.feature_maps(x)[-1].mean((2, 3)))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if len(shape) == 4: return init.kaiming_normal_fan_out
    return init.uniform(math.sqrt(3 / shape[0])) if len(shape) == 2 else init.normalization(key)


NETWORKS = {f"mnasnet{name}": partial(MNASNet, alpha=alpha) for name, alpha in (("0_5", 0.5), ("0_75", 0.75), ("1_0", 1.0), ("1_3", 1.3))}
MARK = {"layers.8.0.layers.0.weight": None}
