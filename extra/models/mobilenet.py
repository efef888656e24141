"""MobileNet v2 (Sandler et al. 2018) and v3 (Howard et al. 2019), with torchvision's `state_dict` keys."""
from functools import partial
from tinygrad import Tensor
from tinydet.models.classifier import Block, ConvNorm, Layered, MakeNorm, SqueezeExcitation, classifier_of, divisible, dropout, norm_of
from tinydet.nn.layers import Conv2d, Linear, hard_sigmoid, hard_swish, relu, relu6


class InvertedResidualV2:
  """1x1 to `expansion` times the channels, 3x3 in each channel, 1x1 without activation; the input is added where it fits."""
  def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, norm: MakeNorm):
    hidden, self.add = in_channels * expansion, stride == 1 and in_channels == out_channels
    first = [] if expansion == 1 else [ConvNorm(in_channels, hidden, 1, norm, relu6)]
    self.conv = Block([*first, ConvNorm(hidden, hidden, 3, norm, relu6, stride, hidden), Conv2d(hidden, out_channels, 1, bias=False),
                       norm(out_channels)])

  def __call__(self, x: Tensor) -> Tensor: return (x + self.conv(x) if self.add else self.conv(x)).contiguous()


class InvertedResidualV3:
  """As in v2, with a kernel size, squeeze and excitation (`se`) and an activation of its own."""
  def __init__(self, in_channels: int, kernel: int, hidden: int, out_channels: int, se: bool, act: str, stride: int, norm: MakeNorm):
    self.add, activation = stride == 1 and in_channels == out_channels, {"RE": relu, "HS": hard_swish}[act]
    self.block = Block([ConvNorm(in_channels, hidden, 1, norm, activation)] if hidden != in_channels else [])
    self.block.append(ConvNorm(hidden, hidden, kernel, norm, activation, stride, hidden))
    if se: self.block.append(SqueezeExcitation(hidden, divisible(hidden // 4), relu, hard_sigmoid))
    self.block.append(ConvNorm(hidden, out_channels, 1, norm, None))

  def __call__(self, x: Tensor) -> Tensor: return (x + self.block(x)).contiguous() if self.add else self.block(x)


class MobileNetV2(Layered):
  """Seventeen inverted residuals."""
  last = ("classifier.1",)
  # expansion, channels, blocks, stride
  SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

  def __init__(self, num_classes: int | None, norm: str):
    make, strides, channels = norm_of(norm), [2], [32]
    self.features = [ConvNorm(3, 32, 3, make, relu6, 2)]
    for expansion, width, depth, stride in self.SETTINGS:
      for i in range(depth):
        self.features.append(InvertedResidualV2(channels[-1], width, stride if i == 0 else 1, expansion, make))
        strides.append(stride if i == 0 else 1)
        channels.append(width)
    self.features.append(ConvNorm(320, 1280, 1, make, relu6))
    self.cut([*strides, 1], [*channels, 1280])
    vars(self).update(classifier_of(1280, num_classes, 0.2))


# kernel, channels in between, channels out, squeeze and excitation, activation, stride
LARGE = ((3, 16, 16, False, "RE", 1), (3, 64, 24, False, "RE", 2), (3, 72, 24, False, "RE", 1), (5, 72, 40, True, "RE", 2),
         (5, 120, 40, True, "RE", 1), (5, 120, 40, True, "RE", 1), (3, 240, 80, False, "HS", 2), (3, 200, 80, False, "HS", 1),
         (3, 184, 80, False, "HS", 1), (3, 184, 80, False, "HS", 1), (3, 480, 112, True, "HS", 1), (3, 672, 112, True, "HS", 1),
         (5, 672, 160, True, "HS", 2), (5, 960, 160, True, "HS", 1), (5, 960, 160, True, "HS", 1))
SMALL = ((3, 16, 16, True, "RE", 2), (3, 72, 24, False, "RE", 2), (3, 88, 24, False, "RE", 1), (5, 96, 40, True, "HS", 2),
         (5, 240, 40, True, "HS", 1), (5, 240, 40, True, "HS", 1), (5, 120, 48, True, "HS", 1), (5, 144, 48, True, "HS", 1),
         (5, 288, 96, True, "HS", 2), (5, 576, 96, True, "HS", 1), (5, 576, 96, True, "HS", 1))


class MobileNetV3(Layered):
  """Inverted residuals as `settings` has them; `last_channels` are the features before the classes."""
  last = ("classifier.3",)

  def __init__(self, num_classes: int | None, norm: str, settings: tuple, last_channels: int):
    make, channels = norm_of(norm, 1e-3, 0.01), [16]
    self.features = [ConvNorm(3, 16, 3, make, hard_swish, 2)]
    for setting in settings:
      self.features.append(InvertedResidualV3(channels[-1], *setting, make))
      channels.append(setting[2])
    width = 6 * channels[-1]
    self.features.append(ConvNorm(channels[-1], width, 1, make, hard_swish))
    self.cut([2, *(setting[-1] for setting in settings), 1], [*channels, width])
    if num_classes is not None: self.classifier = Block([Linear(width, last_channels), hard_swish, dropout(0.2), Linear(last_channels, num_classes)])


NETWORKS = {"mobilenet_v2": MobileNetV2, "mobilenet_v3_large": partial(MobileNetV3, settings=LARGE, last_channels=1280),
            "mobilenet_v3_small": partial(MobileNetV3, settings=SMALL, last_channels=1024)}
MARK = {"features.1.conv.0.0.weight": None, "features.1.block.0.0.weight": None}
