"""GoogLeNet (Szegedy et al. 2014) with batch norm, with torchvision's `state_dict` keys."""
import math
from tinygrad import Tensor
from tinydet.models.classifier import Block, Classifier, MakeNorm, NormedConv, norm_of
from tinydet.nn import init
from tinydet.nn.layers import Linear
from tinydet.nn.pool import max_pool, max_pool_2x2, max_pool_covering, max_pool_same, mean_pool_to

AUXILIARY = 0.3   # the auxiliary classifiers' weight in the loss (section 5)
EPS = 1e-3
# channels in, of the 1x1, before and of the first 3x3, before and of the second (which the paper has as 5x5), behind the pool
MODULES = {"3a": (192, 64, 96, 128, 16, 32, 32), "3b": (256, 128, 128, 192, 32, 96, 64), "4a": (480, 192, 96, 208, 16, 48, 64),
           "4b": (512, 160, 112, 224, 24, 64, 64), "4c": (512, 128, 128, 256, 24, 64, 64), "4d": (512, 112, 144, 288, 32, 64, 64),
           "4e": (528, 256, 160, 320, 32, 128, 128), "5a": (832, 256, 160, 320, 32, 128, 128), "5b": (832, 384, 192, 384, 48, 128, 128)}


def pool3(x: Tensor) -> Tensor:
  """The largest of the 3x3 window around each pixel."""
  return max_pool_same(x, 3)


class InceptionModule:
  """1x1, two 3x3 behind 1x1, and a pool before 1x1, side by side."""
  def __init__(self, channels: int, c1: int, c3: tuple[int, int], c5: tuple[int, int], pooled: int, norm: MakeNorm):
    self.branch1 = NormedConv(channels, c1, 1, norm)
    self.branch2, self.branch3 = (Block([NormedConv(channels, inner, 1, norm), NormedConv(inner, outer, 3, norm, padding=1)])
                                  for inner, outer in (c3, c5))
    self.branch4 = Block([pool3, NormedConv(channels, pooled, 1, norm)])

  def __call__(self, x: Tensor) -> Tensor: return self.branch1(x).cat(self.branch2(x), self.branch3(x), self.branch4(x), dim=1).contiguous()


class Auxiliary:
  """A classifier on features at stride 16."""
  def __init__(self, channels: int, num_classes: int, norm: MakeNorm):
    self.conv, self.fc1, self.fc2 = NormedConv(channels, 128, 1, norm), Linear(2048, 1024), Linear(1024, num_classes)

  def __call__(self, x: Tensor) -> Tensor: return self.fc2(self.fc1(self.conv(mean_pool_to(x, 4)).flatten(1)).relu().dropout(0.7))


class GoogLeNet(Classifier):
  """Nine inception modules. `auxiliary` are the two classifiers which learn beside the last one and are not asked otherwise."""
  top, last = ("fc.", "aux1.", "aux2."), ("fc", "aux1.fc2", "aux2.fc2")
  out_channels = (480, 832, 1024)
  stages = (("conv1.",), ("conv2.", "conv3."), ("inception3",), ("inception4",), ("inception5",))

  def __init__(self, num_classes: int | None, norm: str, auxiliary: bool = True):
    make = norm_of(norm, EPS)
    self.conv1, self.conv2 = NormedConv(3, 64, 7, make, 2, 3), NormedConv(64, 64, 1, make)
    self.conv3 = NormedConv(64, 192, 3, make, padding=1)
    for name, (channels, c1, *c35, pooled) in MODULES.items():
      setattr(self, f"inception{name}", InceptionModule(channels, c1, tuple(c35[:2]), tuple(c35[2:]), pooled, make))
    if num_classes is not None and auxiliary: self.aux1, self.aux2 = (Auxiliary(channels, num_classes, make) for channels in (512, 528))
    if num_classes is not None: self.fc = Linear(1024, num_classes)

  def _maps(self, x: Tensor, cover: bool) -> dict[str, Tensor]:
    """What each module gives."""
    def half(x: Tensor) -> Tensor: return max_pool_covering(x) if cover else max_pool(x, padding=0)
    x, maps = half(self.conv3(self.conv2(half(self.conv1(x))))), {}
    for name in MODULES:
      if name == "4a": x = half(x)
      if name == "5a": x = max_pool_2x2(x, ceil=True)
      maps[name] = x = getattr(self, f"inception{name}")(x)
    return maps

  def feature_maps(self, x: Tensor) -> list[Tensor]:
    maps = self._maps(x, cover=True)
    return [maps[name] for name in ("3b", "4e", "5b")]

  def _logits(self, c5: Tensor) -> Tensor: return self.fc(c5.mean((2, 3)).dropout(0.2))

  def __call__(self, x: Tensor) -> Tensor: return self._logits(self._maps(x, cover=False)["5b"])

  def all_logits(self, x: Tensor) -> list[tuple[float, Tensor]]:
    maps = self._maps(x, cover=False)
    own = [(1.0, self._logits(maps["5b"]))]
    return [*own, (AUXILIARY, self.aux1(maps["4a"])), (AUXILIARY, self.aux2(maps["4d"]))] if hasattr(self, "aux1") else own

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if len(shape) > 1: return init.truncated_normal(0.01)
    fan_in = {"fc.bias": 1024, "aux1.fc1.bias": 2048, "aux2.fc1.bias": 2048, "aux1.fc2.bias": 1024, "aux2.fc2.bias": 1024}.get(key)
    return init.uniform(1 / math.sqrt(fan_in)) if fan_in else init.normalization(key)


NETWORKS = {"googlenet": GoogLeNet}
MARK = {"inception3a.branch1.conv.weight": None}
