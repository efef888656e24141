"""RegNet X and Y (Radosavovic et al. 2020), with torchvision's `state_dict` keys."""
import math
from functools import partial
import numpy as np
from tinygrad import Tensor
from tinydet.models.classifier import Block, Classifier, ConvNorm, MakeNorm, SqueezeExcitation, norm_of
from tinydet.nn import init
from tinydet.nn.layers import Linear, relu

STEM = 32
# blocks, first width, its slope, ratio of the stages' widths, channels of a group
X = {"400mf": (22, 24, 24.48, 2.54, 16), "800mf": (16, 56, 35.73, 2.28, 16), "1_6gf": (18, 80, 34.01, 2.25, 24), "3_2gf": (25, 88, 26.31, 2.25, 48),
     "8gf": (23, 80, 49.56, 2.88, 120), "16gf": (22, 216, 55.59, 2.1, 128), "32gf": (23, 320, 69.86, 2.0, 168)}
Y = {"400mf": (16, 48, 27.89, 2.09, 8), "800mf": (14, 56, 38.84, 2.4, 16), "1_6gf": (27, 48, 20.71, 2.65, 24), "3_2gf": (21, 80, 42.63, 2.66, 24),
     "8gf": (17, 192, 76.82, 2.19, 56), "16gf": (18, 200, 106.23, 2.48, 112), "32gf": (20, 232, 115.89, 2.53, 232),
     "128gf": (27, 456, 160.83, 2.52, 264)}


def stages_of(depth: int, first: int, slope: float, ratio: float, group: int) -> list[tuple[int, int, int]]:
  """(width, blocks, channels of a group) of each stage (section 3.3: widths on a line, moved to powers of the ratio, and to multiples of 8 and of the
  group)."""
  line = np.arange(depth) * slope + first
  widths = np.round(first * ratio ** np.round(np.log(line / first) / math.log(ratio)) / 8) * 8
  found = []
  for width in sorted({int(width) for width in widths}):
    of_group = min(group, width)
    near = max(of_group, int(width + of_group / 2) // of_group * of_group)
    found.append((near + of_group * (near < 0.9 * width), int((widths == width).sum()), of_group))
  return found


class ResBottleneck:
  """1x1, 3x3 in groups, 1x1 of one width, for Y with squeeze and excitation before the last, and a shortcut."""
  def __init__(self, in_channels: int, out_channels: int, stride: int, group: int, se: bool, norm: MakeNorm):
    self.proj = ConvNorm(in_channels, out_channels, 1, norm, None, stride) if in_channels != out_channels or stride > 1 else None
    self.f = {"a": ConvNorm(in_channels, out_channels, 1, norm),
              "b": ConvNorm(out_channels, out_channels, 3, norm, relu, stride, out_channels // group)}
    if se: self.f["se"] = SqueezeExcitation(out_channels, round(0.25 * in_channels), relu, Tensor.sigmoid)
    self.f["c"] = ConvNorm(out_channels, out_channels, 1, norm, None)

  def __call__(self, x: Tensor) -> Tensor:
    return ((x if self.proj is None else self.proj(x)) + Block(self.f.values())(x)).relu().contiguous()


class RegNet(Classifier):
  """Four stages at strides 4 to 32."""
  top, last = ("fc.",), ("fc",)
  stages = (("stem.",), *((f"trunk_output.block{i}.",) for i in range(1, 5)))

  def __init__(self, num_classes: int | None, norm: str, parameters: tuple, se: bool):
    make, channels = norm_of(norm), STEM
    self.stem, self.trunk_output, widths = ConvNorm(3, STEM, 3, make, relu, 2), {}, []
    for i, (width, depth, group) in enumerate(stages_of(*parameters), 1):
      self.trunk_output[f"block{i}"] = {f"block{i}-{j}": ResBottleneck(width if j else channels, width, 1 if j else 2, group, se, make)
                                        for j in range(depth)}
      channels = width
      widths.append(width)
    self.out_channels = tuple(widths[1:])
    if num_classes is not None: self.fc = Linear(channels, num_classes)

  def feature_maps(self, x: Tensor) -> list[Tensor]:
    x = self.stem(x)
    return [x := Block(stage.values())(x) for stage in self.trunk_output.values()][1:]

  def __call__(self, x: Tensor) -> Tensor: return self.fc(self.feature_maps(x)[-1].mean((2, 3)))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if len(shape) == 4: return init.kaiming_normal_fan_out if "se.fc" not in key else init.uniform(1 / math.sqrt(shape[1]))
    return init.normal(0.01) if len(shape) == 2 else init.normalization(key)


NETWORKS = {**{f"regnet_x_{name}": partial(RegNet, parameters=parameters, se=False) for name, parameters in X.items()},
            **{f"regnet_y_{name}": partial(RegNet, parameters=parameters, se=True) for name, parameters in Y.items()}}
MARK = {"trunk_output.block1.block1-0.f.a.0.weight": None}
