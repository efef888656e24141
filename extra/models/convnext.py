"""ConvNeXt (Liu et al. 2022), with torchvision's `state_dict` keys."""
from functools import partial
from tinygrad import Tensor
from tinydet.models.classifier import Block, Classifier
from tinydet.nn import init
from tinydet.nn.conv import conv2d
from tinydet.nn.layers import Conv2d, LayerNorm, Linear, gelu, stochastic_depth


class Pointwise(Linear):
  """A linear layer on the channels of each pixel, x [B,in,H,W] -> [B,out,H,W]."""
  def __call__(self, x: Tensor) -> Tensor: return conv2d(x, self.weight.cast(x.dtype).reshape(*self.weight.shape, 1, 1), self.bias)


class CNBlock:
  """7x7 in each channel, layer norm, four times the channels and back, scaled and added to the input. torch turns pictures round for the norm and the
  linear layers, at 1 and 6, which here see channels where they are."""
  def __init__(self, channels: int, dropped: float):
    self.block = Block([Conv2d(channels, channels, 7, padding=3, groups=channels), Tensor.contiguous, LayerNorm(channels),
                        Pointwise(channels, 4 * channels), gelu, Pointwise(4 * channels, channels)])
    self.layer_scale, self.dropped = Tensor.empty(channels, 1, 1), dropped

  def __call__(self, x: Tensor) -> Tensor: return (x + stochastic_depth(self.block(x) * self.layer_scale.cast(x.dtype), self.dropped)).contiguous()


class ConvNeXt(Classifier):
  """Four stages at strides 4 to 32, each behind a convolution that does not overlap. Its norms are layer norms, whatever `norm` is."""
  last = ("classifier.2",)
  stages = (("features.0.",), ("features.1.",), ("features.2.", "features.3."), ("features.4.", "features.5."), ("features.6.", "features.7."))

  def __init__(self, num_classes: int | None, norm: str, width: int, depths: tuple[int, ...], dropped: float):
    self.features, done = [Block([Conv2d(3, width, 4, 4), LayerNorm(width)])], 0
    for i, depth in enumerate(depths):
      if i: self.features.append(Block([LayerNorm(width << i - 1), Conv2d(width << i - 1, width << i, 2, 2)]))
      self.features.append(Block([CNBlock(width << i, dropped * (done + j) / (sum(depths) - 1)) for j in range(depth)]))
      done += depth
    self.out_channels = tuple(width << i for i in (1, 2, 3))
    if num_classes is None: return
    self.classifier = Block([LayerNorm(width << 3), partial(Tensor.flatten, start_dim=1), Linear(width << 3, num_classes)])

  def _stages(self, x: Tensor, cover: bool) -> list[Tensor]:
    maps = []
    for i, layer in enumerate(self.features):
      if i % 2: maps.append(x := layer(x))
      else:
        for part in layer: x = (part.covering(x) if cover and isinstance(part, Conv2d) else part(x)).contiguous()
    return maps

  def feature_maps(self, x: Tensor) -> list[Tensor]: return self._stages(x, cover=True)[1:]

  def __call__(self, x: Tensor) -> Tensor: return self.classifier(self._stages(x, cover=False)[-1].mean((2, 3), keepdim=True))

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if key.endswith("layer_scale"): return init.constant(1e-6)
    return init.truncated_normal(0.02) if len(shape) > 1 else init.normalization(key)


NETWORKS = {f"convnext_{size}": partial(ConvNeXt, width=width, depths=depths, dropped=dropped)
            for size, width, depths, dropped in (("tiny", 96, (3, 3, 9, 3), 0.1), ("small", 96, (3, 3, 27, 3), 0.4),
                                                 ("base", 128, (3, 3, 27, 3), 0.5), ("large", 192, (3, 3, 27, 3), 0.5))}
MARK = {"features.1.0.layer_scale": None}
