"""Feature pyramid (Lin et al. 2017b), with torchvision's `state_dict` keys."""
from tinygrad import Tensor
from tinydet.nn import init
from tinydet.nn.layers import Conv2d
from tinydet.nn.pool import upsample


class _ExtraBlocks:
  def __init__(self, in_channels: int, out_channels: int):
    self.p6, self.p7 = Conv2d(in_channels, out_channels, 3, 2, 1), Conv2d(out_channels, out_channels, 3, 2, 1)


class FeaturePyramid:
  """C3, C4, C5 -> P3..P7, all of `out_channels`: strides 8 to 128. `p6_from` is "p5" (torchvision's RetinaNet) or "c5" (its v2; the paper)."""
  def __init__(self, in_channels: list[int], out_channels: int, p6_from: str = "p5"):
    self.p6_from = p6_from
    self.inner_blocks = [[Conv2d(channels, out_channels, 1)] for channels in in_channels]
    self.layer_blocks = [[Conv2d(out_channels, out_channels, 3, padding=1)] for _ in in_channels]
    self.extra_blocks = _ExtraBlocks(in_channels[-1] if p6_from == "c5" else out_channels, out_channels)

  def __call__(self, features: list[Tensor]) -> list[Tensor]:
    inner = [None] * len(features)
    for i in reversed(range(len(features))):
      inner[i] = self.inner_blocks[i][0](features[i])
      if i + 1 < len(features): inner[i] = inner[i] + upsample(inner[i + 1], inner[i].shape[2:])
      inner[i] = inner[i].contiguous()
    levels = [block[0](x).contiguous() for block, x in zip(self.layer_blocks, inner)]
    p6 = self.extra_blocks.p6(features[-1] if self.p6_from == "c5" else levels[-1]).contiguous()
    return [*levels, p6, self.extra_blocks.p7(p6.relu()).contiguous()]


def init_rule(key: str, shape: tuple[int, ...]) -> init.Draw:
  """torchvision's initialisation of the pyramid's tensor `key`."""
  return init.kaiming_uniform if key.endswith("weight") else init.constant(0.0)
