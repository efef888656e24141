"""VGG (Simonyan & Zisserman 2014), with and without batch norm, with torchvision's `state_dict` keys."""
from functools import partial
from tinygrad import Tensor
from tinydet.models.classifier import Block, Classifier, dropout, norm_of
from tinydet.nn import init
from tinydet.nn.layers import Conv2d, Linear, relu
from tinydet.nn.pool import max_pool_2x2, mean_pool_to

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


class VGG(Classifier):
  """Five blocks of 3x3 convolutions at strides 1 to 16, the largest of 2x2 pixels after each. As a backbone C3 and C4 are the last two blocks, C5
  what is left of the last one after its maxima."""
  last, out_channels = ("classifier.6",), (512, 512, 512)

  def __init__(self, num_classes: int | None, norm: str, depths: tuple[int, ...], normed: bool):
    self.features, self.stages, make, channels = [], [], norm_of(norm), 3
    for width, depth in zip(WIDTHS, depths):
      first = len(self.features)
      for _ in range(depth):
        self.features += [Conv2d(channels, width, 3, padding=1), *[make(width)] * normed, relu]
        channels = width
      self.stages.append(tuple(f"features.{i}." for i in range(first, len(self.features))))
      self.features.append(max_pool_2x2)
    if num_classes is not None:
      self.classifier = Block([Linear(512 * 7 * 7, 4096), relu, dropout(0.5), Linear(4096, 4096), relu, dropout(0.5), Linear(4096, num_classes)])

  def _blocks(self, x: Tensor, cover: bool) -> list[Tensor]:
    """What each block gives, and the last pool."""
    maps = []
    for layer in self.features:
      if layer is max_pool_2x2:
        maps.append(x)
        x = max_pool_2x2(x, ceil=cover)
      else: x = layer(x).contiguous() if layer is relu else layer(x)
    return [*maps, x]

  def feature_maps(self, x: Tensor) -> list[Tensor]: return self._blocks(x, cover=True)[3:]

  def __call__(self, x: Tensor) -> Tensor: return self.classifier(mean_pool_to(self._blocks(x, cover=False)[-1], 7).flatten(1))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if len(shape) == 4: return init.kaiming_normal_fan_out
    return init.normal(0.01) if len(shape) == 2 else init.normalization(key)


NETWORKS = {name + "_bn" * normed: partial(VGG, depths=depths, normed=normed) for name, depths in DEPTHS.items() for normed in (False, True)}
MARK = {"features.0.weight": (64, 3, 3, 3), "features.0.bias": (64,)}
