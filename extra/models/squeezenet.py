"""SqueezeNet 1.0 and 1.1 (Iandola et al. 2016), with torchvision's `state_dict` keys."""
import math
from functools import partial
from tinygrad import Tensor
from tinydet.models.classifier import Block, Classifier, dropout
from tinydet.nn import init
from tinydet.nn.layers import Conv2d, relu
from tinydet.nn.pool import max_pool, max_pool_covering


class Fire:
  """1x1 to few channels, from these 1x1 and 3x3 side by side."""
  def __init__(self, in_channels: int, squeezed: int, expanded: int):
    self.squeeze, self.expand1x1 = Conv2d(in_channels, squeezed, 1), Conv2d(squeezed, expanded, 1)
    self.expand3x3 = Conv2d(squeezed, expanded, 3, padding=1)

  def __call__(self, x: Tensor) -> Tensor:
    x = self.squeeze(x).contiguous().relu().contiguous()
    return self.expand1x1(x).cat(self.expand3x3(x), dim=1).relu().contiguous()


class SqueezeNet(Classifier):
  """`layers`: of the first convolution (channels, kernel), of a fire module its three widths, None for a pool. The stride ends at 16: as a backbone
  C3 and C4 are the last fire modules at 8 and 16, C5 the maxima of C4 over 3x3, every second."""
  last = ("classifier.1",)

  def __init__(self, num_classes: int | None, norm: str, layers: tuple, stages: tuple[tuple[int, ...], ...]):
    (channels, kernel), *rest = layers
    self.features = [Conv2d(3, channels, kernel, 2), relu]
    for layer in rest: self.features.append(max_pool if layer is None else Fire(*layer))
    self.stages = [tuple(f"features.{i}." for i in stage) for stage in stages]
    widths = [2 * rest[i - 1][2] for i in range(len(rest)) if rest[i] is None and i] + [2 * rest[-1][2]]
    self.out_channels = (widths[-2], widths[-1], widths[-1])
    if num_classes is not None: self.classifier = Block([dropout(0.5), Conv2d(widths[-1], num_classes, 1), relu])

  def _halves(self, x: Tensor, cover: bool) -> list[Tensor]:
    """The features before each pool, and the last ones."""
    maps = []
    for i, layer in enumerate(self.features):
      if layer is max_pool:
        maps.append(x)
        x = max_pool_covering(x) if cover else max_pool(x, padding=0)
      elif i == 0: x = layer.covering(x) if cover else layer(x)
      else: x = layer(x).contiguous()
    return [*maps, x]

  def feature_maps(self, x: Tensor) -> list[Tensor]:
    maps = self._halves(x, cover=True)[-2:]
    return [*maps, max_pool_covering(maps[-1])]

  def __call__(self, x: Tensor) -> Tensor: return self.classifier(self._halves(x, cover=False)[-1]).mean((2, 3))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if key.endswith("bias"): return init.constant(0.0)
    return init.normal(0.01) if key.startswith("classifier.") else init.uniform(math.sqrt(6 / math.prod(shape[1:])))


NETWORKS = {name: partial(SqueezeNet, layers=layers, stages=stages) for name, layers, stages in (
  ("squeezenet1_0", ((96, 7), None, (96, 16, 64), (128, 16, 64), (128, 32, 128), None, (256, 32, 128), (256, 48, 192), (384, 48, 192), (384, 64, 256),
                        None, (512, 64, 256)), ((0,), (3, 4, 5), (7, 8), (9, 10), (12,))),
  ("squeezenet1_1", ((64, 3), None, (64, 16, 64), (128, 16, 64), None, (128, 32, 128), (256, 32, 128), None, (256, 48, 192), (384, 48, 192),
                        (384, 64, 256), (512, 64, 256)), ((0,), (3, 4), (6, 7), (9, 10), (11, 12))))}
MARK = {"features.3.squeeze.weight": None}
