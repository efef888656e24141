"""Inception v3 (Szegedy et al. 2015), with torchvision's `state_dict` keys."""
import math
from tinygrad import Tensor
from tinydet.models.classifier import Classifier, MakeNorm, NormedConv, norm_of
from tinydet.nn import init
from tinydet.nn.layers import Linear
from tinydet.nn.pool import max_pool, max_pool_covering, mean_pool_same

AUXILIARY = 0.4   # the auxiliary classifier's weight in the loss
EPS = 1e-3
WHOLE = 299       # pixels a side, of fewer the auxiliary classifier has nothing to learn from


def joined(*parts: Tensor) -> Tensor:
  """Tensors of the same pictures, channel after channel."""
  return parts[0].cat(*parts[1:], dim=1).contiguous()


def half(x: Tensor, cover: bool) -> Tensor:
  """The largest of each 3x3 window, stride 2."""
  return max_pool_covering(x) if cover else max_pool(x, padding=0, ceil=False)


class InceptionA:
  """1x1, 5x5, two 3x3 and a pool side by side, at stride 8."""
  def __init__(self, channels: int, pooled: int, norm: MakeNorm):
    self.branch1x1 = NormedConv(channels, 64, 1, norm)
    self.branch5x5_1, self.branch5x5_2 = NormedConv(channels, 48, 1, norm), NormedConv(48, 64, 5, norm, padding=2)
    self.branch3x3dbl_1, self.branch3x3dbl_2 = NormedConv(channels, 64, 1, norm), NormedConv(64, 96, 3, norm, padding=1)
    self.branch3x3dbl_3 = NormedConv(96, 96, 3, norm, padding=1)
    self.branch_pool = NormedConv(channels, pooled, 1, norm)

  def __call__(self, x: Tensor) -> Tensor:
    return joined(self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                  self.branch_pool(mean_pool_same(x)))


class InceptionB:
  """From stride 8 to 16."""
  def __init__(self, channels: int, norm: MakeNorm):
    self.branch3x3 = NormedConv(channels, 384, 3, norm, 2)
    self.branch3x3dbl_1, self.branch3x3dbl_2 = NormedConv(channels, 64, 1, norm), NormedConv(64, 96, 3, norm, padding=1)
    self.branch3x3dbl_3 = NormedConv(96, 96, 3, norm, 2)

  def __call__(self, x: Tensor, cover: bool = False) -> Tensor:
    return joined(self.branch3x3(x, cover), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)), cover), half(x, cover))


class InceptionC:
  """1x1, 7x7 as rows and columns of seven, the same twice, and a pool side by side, at stride 16."""
  def __init__(self, channels: int, width: int, norm: MakeNorm):
    row, column = {"kernel": (1, 7), "padding": (0, 3), "norm": norm}, {"kernel": (7, 1), "padding": (3, 0), "norm": norm}
    self.branch1x1 = NormedConv(channels, 192, 1, norm)
    self.branch7x7_1, self.branch7x7_2 = NormedConv(channels, width, 1, norm), NormedConv(width, width, **row)
    self.branch7x7_3 = NormedConv(width, 192, **column)
    self.branch7x7dbl_1, self.branch7x7dbl_2 = NormedConv(channels, width, 1, norm), NormedConv(width, width, **column)
    self.branch7x7dbl_3, self.branch7x7dbl_4 = NormedConv(width, width, **row), NormedConv(width, width, **column)
    self.branch7x7dbl_5 = NormedConv(width, 192, **row)
    self.branch_pool = NormedConv(channels, 192, 1, norm)

  def __call__(self, x: Tensor) -> Tensor:
    twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
    return joined(self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))), self.branch7x7dbl_5(self.branch7x7dbl_4(twice)),
                  self.branch_pool(mean_pool_same(x)))


class InceptionD:
  """From stride 16 to 32."""
  def __init__(self, channels: int, norm: MakeNorm):
    self.branch3x3_1, self.branch3x3_2 = NormedConv(channels, 192, 1, norm), NormedConv(192, 320, 3, norm, 2)
    self.branch7x7x3_1, self.branch7x7x3_2 = NormedConv(channels, 192, 1, norm), NormedConv(192, 192, (1, 7), norm, padding=(0, 3))
    self.branch7x7x3_3, self.branch7x7x3_4 = NormedConv(192, 192, (7, 1), norm, padding=(3, 0)), NormedConv(192, 192, 3, norm, 2)

  def __call__(self, x: Tensor, cover: bool = False) -> Tensor:
    rows = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
    return joined(self.branch3x3_2(self.branch3x3_1(x), cover), self.branch7x7x3_4(rows, cover), half(x, cover))


class InceptionE:
  """1x1, a 3x3 as a row and a column of three side by side, the same behind another 3x3, and a pool, at stride 32."""
  def __init__(self, channels: int, norm: MakeNorm):
    row, column = {"kernel": (1, 3), "padding": (0, 1), "norm": norm}, {"kernel": (3, 1), "padding": (1, 0), "norm": norm}
    self.branch1x1, self.branch3x3_1 = NormedConv(channels, 320, 1, norm), NormedConv(channels, 384, 1, norm)
    self.branch3x3_2a, self.branch3x3_2b = NormedConv(384, 384, **row), NormedConv(384, 384, **column)
    self.branch3x3dbl_1, self.branch3x3dbl_2 = NormedConv(channels, 448, 1, norm), NormedConv(448, 384, 3, norm, padding=1)
    self.branch3x3dbl_3a, self.branch3x3dbl_3b = NormedConv(384, 384, **row), NormedConv(384, 384, **column)
    self.branch_pool = NormedConv(channels, 192, 1, norm)

  def __call__(self, x: Tensor) -> Tensor:
    one, two = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    return joined(self.branch1x1(x), self.branch3x3_2a(one), self.branch3x3_2b(one), self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two),
                  self.branch_pool(mean_pool_same(x)))


class Auxiliary:
  """A classifier on the features at stride 16, whose sides must be 17 pixels or more: what its pool leaves of fewer does not fill a 5x5."""
  def __init__(self, channels: int, num_classes: int, norm: MakeNorm):
    self.conv0, self.conv1, self.fc = NormedConv(channels, 128, 1, norm), NormedConv(128, 768, 5, norm), Linear(768, num_classes)

  def __call__(self, x: Tensor) -> Tensor:
    return self.fc(self.conv1(self.conv0(x.avg_pool2d(5, 3).contiguous())).mean((2, 3)))


class Inception(Classifier):
  """Its windows go over the picture without padding: at 299x299 the last features are 8x8. As a backbone they are padded. `auxiliary` is the second
  classifier, which learns beside the first and is not asked otherwise."""
  top, last = ("fc.", "AuxLogits."), ("fc", "AuxLogits.fc")
  out_channels, smallest = (288, 768, 2048), 75
  stages = (("Conv2d_1a_3x3.", "Conv2d_2a_3x3.", "Conv2d_2b_3x3."), ("Conv2d_3b_1x1.", "Conv2d_4a_3x3."), ("Mixed_5",), ("Mixed_6",), ("Mixed_7",))

  def __init__(self, num_classes: int | None, norm: str, auxiliary: bool = True):
    make = norm_of(norm, EPS)
    self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = NormedConv(3, 32, 3, make, 2), NormedConv(32, 32, 3, make)
    self.Conv2d_2b_3x3 = NormedConv(32, 64, 3, make, padding=1)
    self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = NormedConv(64, 80, 1, make), NormedConv(80, 192, 3, make)
    self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (InceptionA(channels, pooled, make) for channels, pooled in ((192, 32), (256, 64), (288, 64)))
    self.Mixed_6a = InceptionB(288, make)
    self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (InceptionC(768, width, make) for width in (128, 160, 160, 192))
    if num_classes is not None and auxiliary: self.AuxLogits = Auxiliary(768, num_classes, make)
    self.Mixed_7a = InceptionD(768, make)
    self.Mixed_7b, self.Mixed_7c = (InceptionE(channels, make) for channels in (1280, 2048))
    if num_classes is not None: self.fc = Linear(2048, num_classes)

  def _maps(self, x: Tensor, cover: bool) -> list[Tensor]:
    x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x, cover), cover))
    x = half(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(half(x, cover)), cover), cover)
    c3 = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
    c4 = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(c3, cover)))))
    return [c3, c4, self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(c4, cover)))]

  def feature_maps(self, x: Tensor) -> list[Tensor]: return self._maps(x, cover=True)

  def _logits(self, c5: Tensor) -> Tensor: return self.fc(c5.mean((2, 3)).dropout(0.5))

  def __call__(self, x: Tensor) -> Tensor: return self._logits(self._maps(x, cover=False)[-1])

  def all_logits(self, x: Tensor) -> list[tuple[float, Tensor]]:
    _, c4, c5 = self._maps(x, cover=False)
    return [(1.0, self._logits(c5)), *([(AUXILIARY, self.AuxLogits(c4))] if hasattr(self, "AuxLogits") else [])]

  def sized(self, size: int) -> list[str]:
    notes = super().sized(size)
    if size >= WHOLE or not hasattr(self, "AuxLogits"): return notes
    del self.AuxLogits
    return [*notes, f"--size {size}: the auxiliary classifier needs {WHOLE} pixels and is left out"]

  def init_rule(self, key: str, shape: tuple[int, ...]) -> init.Draw:
    if len(shape) < 2: return init.normalization(key) if "fc." not in key else init.uniform(1 / math.sqrt(768 if "Aux" in key else 2048))
    return init.truncated_normal({"AuxLogits.conv1.conv.weight": 0.01, "AuxLogits.fc.weight": 0.001}.get(key, 0.1))


NETWORKS = {"inception_v3": Inception}
MARK = {"Conv2d_1a_3x3.conv.weight": None}
