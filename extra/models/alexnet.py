"""AlexNet in the form of Krizhevsky 2014, with torchvision's `state_dict` keys."""
import math
from tinygrad import Tensor
from tinydet.models.classifier import Block, Classifier, dropout
from tinydet.nn import init
from tinydet.nn.layers import Conv2d, Linear, relu
from tinydet.nn.pool import max_pool, max_pool_covering, mean_pool_to

POOLED = (2, 5, 12)   # the layers that halve the picture


class AlexNet(Classifier):
  """Five convolutions at strides 4, 8, 16, 16, 16. As a backbone C3 are the features of the second, C4 those of the last, and C5 their maxima over
  3x3, which is what the classifier sees of the picture."""
  last, out_channels, smallest = ("classifier.6",), (192, 256, 256), 63
  stages = tuple((f"features.{i}.",) for i in (0, 3, 6, 8, 10))

  def __init__(self, num_classes: int | None, norm: str):
    self.features = [Conv2d(3, 64, 11, 4, 2), relu, max_pool, Conv2d(64, 192, 5, padding=2), relu, max_pool, Conv2d(192, 384, 3, padding=1), relu,
                     Conv2d(384, 256, 3, padding=1), relu, Conv2d(256, 256, 3, padding=1), relu, max_pool]
    if num_classes is not None:
      self.classifier = Block([dropout(0.5), Linear(256 * 6 * 6, 4096), relu, dropout(0.5), Linear(4096, 4096), relu, Linear(4096, num_classes)])

  def _halves(self, x: Tensor, cover: bool) -> list[Tensor]:
    """The features before each pool, and what the last one gives."""
    maps = []
    for i, layer in enumerate(self.features):
      if i in POOLED:
        maps.append(x)
        x = max_pool_covering(x) if cover else max_pool(x, padding=0, ceil=False)
      else: x = layer.covering(x) if i == 0 and cover else layer(x).contiguous()
    return [*maps, x]

  def feature_maps(self, x: Tensor) -> list[Tensor]: return self._halves(x, cover=True)[1:]

  def __call__(self, x: Tensor) -> Tensor: return self.classifier(mean_pool_to(self._halves(x, cover=False)[-1], 6).flatten(1))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else self._fan_in(key)
    return init.uniform(1 / math.sqrt(fan_in))

  def _fan_in(self, bias: str) -> int:
    name, number, _ = bias.split(".")
    return math.prod(getattr(self, name)[int(number)].weight.shape[1:])


NETWORKS = {"alexnet": AlexNet}
MARK = {"features.0.weight": (64, 3, 11, 11)}
