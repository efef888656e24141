"""DenseNet (Huang et al. 2016), with torchvision's `state_dict` keys."""
import math, re
from functools import partial
from tinygrad import Tensor
from tinydet.models.classifier import Classifier, MakeNorm, norm_of
from tinydet.nn import init
from tinydet.nn.layers import Conv2d, Linear
from tinydet.nn.pool import max_pool, mean_pool_half

NECK = 4   # times the growth are the channels between a layer's two convolutions


class DenseLayer:
  """1x1 and 3x3, each behind norm and ReLU; what comes out are `growth` new channels."""
  def __init__(self, in_channels: int, growth: int, norm: MakeNorm):
    self.norm1, self.conv1 = norm(in_channels), Conv2d(in_channels, NECK * growth, 1, bias=False)
    self.norm2, self.conv2 = norm(NECK * growth), Conv2d(NECK * growth, growth, 3, padding=1, bias=False)

  def __call__(self, x: Tensor) -> Tensor:
    x = self.conv1(self.norm1(x).relu().contiguous())
    return self.conv2(self.norm2(x).relu().contiguous())


class Transition:
  """Half the channels, before a pool halves the picture."""
  def __init__(self, channels: int, norm: MakeNorm):
    self.norm, self.conv = norm(channels), Conv2d(channels, channels // 2, 1, bias=False)

  def __call__(self, x: Tensor) -> Tensor: return self.conv(self.norm(x).relu().contiguous()).contiguous()


class DenseNet(Classifier):
  """Four blocks, each layer of which sees what all before it in its block gave. As a backbone C3 and C4 are what the transitions make of the blocks
  at strides 8 and 16, before their pools."""
  last = ("classifier",)

  def __init__(self, num_classes: int | None, norm: str, growth: int, depths: tuple[int, ...], width: int):
    make = norm_of(norm)
    self.features, channels, out_channels = {"conv0": Conv2d(3, width, 7, 2, 3, bias=False), "norm0": make(width)}, width, []
    for i, depth in enumerate(depths, 1):
      self.features[f"denseblock{i}"] = {f"denselayer{j + 1}": DenseLayer(channels + j * growth, growth, make) for j in range(depth)}
      channels += depth * growth
      if i < len(depths):
        self.features[f"transition{i}"] = Transition(channels, make)
        channels //= 2
      out_channels.append(channels)
    self.features["norm5"], self.out_channels = make(channels), out_channels[1:]
    if num_classes is not None: self.classifier = Linear(channels, num_classes)

  stages = (("features.conv0.", "features.norm0."), ("features.denseblock1.", "features.transition1."),
            ("features.denseblock2.", "features.transition2."), ("features.denseblock3.", "features.transition3."),
            ("features.denseblock4.", "features.norm5."))

  def _blocks(self, x: Tensor, cover: bool) -> list[Tensor]:
    """What each block gives, before the pool that comes next."""
    layers, maps = self.features, []
    x = max_pool(layers["norm0"](layers["conv0"](x)).contiguous().relu())
    for i in range(1, 5):
      for layer in layers[f"denseblock{i}"].values(): x = x.cat(layer(x), dim=1).contiguous()
      x = layers[f"transition{i}"](x) if i < 4 else layers["norm5"](x).relu().contiguous()
      maps.append(x)
      if i < 4: x = mean_pool_half(x, ceil=cover)
    return maps

  def feature_maps(self, x: Tensor) -> list[Tensor]: return self._blocks(x, cover=True)[1:]

  def __call__(self, x: Tensor) -> Tensor: return self.classifier(self._blocks(x, cover=False)[-1].mean((2, 3)))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if len(shape) == 4: return init.normal(math.sqrt(2 / math.prod(shape[1:])))
    if len(shape) == 2: return init.uniform(1 / math.sqrt(shape[1]))
    return init.normalization(key)


def current_key(key: str) -> str:
  """The name that torchvision gives a tensor of its published files, where the two norms and convolutions of a layer have a dot in their names."""
  match = re.fullmatch(r"(features\.denseblock\d\.denselayer\d+\.(?:norm|conv))\.([12]\..*)", key)
  return f"{match[1]}{match[2]}" if match else key


NETWORKS = {"densenet121": partial(DenseNet, growth=32, depths=(6, 12, 24, 16), width=64),
            "densenet161": partial(DenseNet, growth=48, depths=(6, 12, 36, 24), width=96),
            "densenet169": partial(DenseNet, growth=32, depths=(6, 12, 32, 32), width=64),
            "densenet201": partial(DenseNet, growth=32, depths=(6, 12, 48, 32), width=64)}
MARK = {"features.denseblock1.denselayer1.norm1.weight": None}
