"""EfficientNet b0 to b7 (Tan & Le 2019) and v2 (Tan & Le 2021), with torchvision's `state_dict` keys."""
import math
from functools import partial
from tinygrad import Tensor
from tinydet.models.classifier import Block, ConvNorm, Layered, MakeNorm, SqueezeExcitation, classifier_of, divisible, norm_of
from tinydet.nn import init
from tinydet.nn.layers import silu, stochastic_depth

DROPPED = 0.2   # chance of the last block to be left out in training, from 0 for the first one
# kind of block, expansion, kernel, stride, channels in, channels out, blocks
V1 = (("MB", 1, 3, 1, 32, 16, 1), ("MB", 6, 3, 2, 16, 24, 2), ("MB", 6, 5, 2, 24, 40, 2), ("MB", 6, 3, 2, 40, 80, 3), ("MB", 6, 5, 1, 80, 112, 3),
      ("MB", 6, 5, 2, 112, 192, 4), ("MB", 6, 3, 1, 192, 320, 1))
V2_S = (("fused", 1, 3, 1, 24, 24, 2), ("fused", 4, 3, 2, 24, 48, 4), ("fused", 4, 3, 2, 48, 64, 4), ("MB", 4, 3, 2, 64, 128, 6),
        ("MB", 6, 3, 1, 128, 160, 9), ("MB", 6, 3, 2, 160, 256, 15))
V2_M = (("fused", 1, 3, 1, 24, 24, 3), ("fused", 4, 3, 2, 24, 48, 5), ("fused", 4, 3, 2, 48, 80, 5), ("MB", 4, 3, 2, 80, 160, 7),
        ("MB", 6, 3, 1, 160, 176, 14), ("MB", 6, 3, 2, 176, 304, 18), ("MB", 6, 3, 1, 304, 512, 5))
V2_L = (("fused", 1, 3, 1, 32, 32, 4), ("fused", 4, 3, 2, 32, 64, 7), ("fused", 4, 3, 2, 64, 96, 7), ("MB", 4, 3, 2, 96, 192, 10),
        ("MB", 6, 3, 1, 192, 224, 19), ("MB", 6, 3, 2, 224, 384, 25), ("MB", 6, 3, 1, 384, 640, 7))


class MBConv:
  """1x1 to `expansion` times the channels, a convolution in each channel, squeeze and excitation, 1x1; `fused`: one convolution in place of the first
  three. The input is added where it fits, and then the rest is left out with a chance of `dropped` in training."""
  def __init__(self, kind: str, expansion: int, kernel: int, stride: int, in_channels: int, out_channels: int, dropped: float, norm: MakeNorm):
    hidden, self.add, self.dropped = divisible(in_channels * expansion), stride == 1 and in_channels == out_channels, dropped
    self.block = Block()
    if kind == "fused": self.block.append(ConvNorm(in_channels, hidden if expansion > 1 else out_channels, kernel, norm, silu, stride))
    else:
      if hidden != in_channels: self.block.append(ConvNorm(in_channels, hidden, 1, norm, silu))
      self.block.append(ConvNorm(hidden, hidden, kernel, norm, silu, stride, hidden))
      self.block.append(SqueezeExcitation(hidden, max(1, in_channels // 4), silu, Tensor.sigmoid))
    if kind != "fused" or expansion > 1: self.block.append(ConvNorm(hidden, out_channels, 1, norm, None))

  def __call__(self, x: Tensor) -> Tensor: return (stochastic_depth(self.block(x), self.dropped) + x).contiguous() if self.add else self.block(x)


class EfficientNet(Layered):
  """Stages of blocks as `settings` has them. The last convolution, to `last_channels`, belongs to C5."""
  last = ("classifier.1",)

  def __init__(self, num_classes: int | None, norm: str, settings: tuple, share: float, last_channels: int | None = None, eps: float = 1e-5,
               momentum: float = 0.1):
    make, widths, strides = norm_of(norm, eps, momentum), [settings[0][4]], [2]
    self.features, done, total = [ConvNorm(3, widths[0], 3, make, silu, 2)], 0, sum(setting[-1] for setting in settings)
    for kind, expansion, kernel, stride, in_channels, out_channels, depth in settings:
      self.features.append(Block([MBConv(kind, expansion, kernel, 1 if i else stride, out_channels if i else in_channels, out_channels,
                                         DROPPED * (done + i) / total, make) for i in range(depth)]))
      done += depth
      widths.append(out_channels)
      strides.append(stride)
    last_channels = last_channels or 4 * widths[-1]
    self.features.append(ConvNorm(widths[-1], last_channels, 1, make, silu))
    self.cut([*strides, 1], [*widths, last_channels])
    vars(self).update(classifier_of(last_channels, num_classes, share))

  def class_weights(self, shape: tuple[int, ...]) -> init.Draw: return init.uniform(1 / math.sqrt(shape[0]))


def _scaled(width: float, depth: float) -> tuple:
  """b0's settings at another width and depth."""
  return tuple((*first, divisible(inner * width), divisible(outer * width), math.ceil(blocks * depth)) for *first, inner, outer, blocks in V1)


NETWORKS = {
  **{f"efficientnet_b{i}": partial(EfficientNet, settings=_scaled(width, depth), share=share, **({"eps": 1e-3, "momentum": 0.01} if i > 4 else {}))
     for i, (width, depth, share) in enumerate(((1.0, 1.0, 0.2), (1.0, 1.1, 0.2), (1.1, 1.2, 0.3), (1.2, 1.4, 0.3), (1.4, 1.8, 0.4), (1.6, 2.2, 0.4),
                                                (1.8, 2.6, 0.5), (2.0, 3.1, 0.5)))},
  **{f"efficientnet_v2_{size}": partial(EfficientNet, settings=settings, share=share, last_channels=1280, eps=1e-3)
     for size, settings, share in (("s", V2_S, 0.2), ("m", V2_M, 0.3), ("l", V2_L, 0.4))}}
MARK = {"features.1.0.block.0.0.weight": None}
