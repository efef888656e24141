"""YOLOv6 3.0 (Li et al. 2023, arXiv 2301.05586), n, s, m and l, with the `state_dict` keys of its own files."""
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from tinygrad import Tensor
from tinydet.models.yolo_blocks import Activation, Conv, branch_outputs, joined, norm, pyramid, through
from tinydet.nn.layers import Conv2d, ConvTranspose2x2, silu

BINS = 17   # 0..16: places of a side's distribution


class Block:
  """A `Conv` one name deeper."""
  def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, act: Activation = Tensor.relu):
    self.block = Conv(in_channels, out_channels, kernel, stride, act=act)

  def __call__(self, x: Tensor) -> Tensor: return self.block(x)


class _Branch:
  def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int):
    self.conv, self.bn = Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False), norm(out_channels)

  def __call__(self, x: Tensor) -> Tensor: return self.bn(self.conv(x))


class RepVGG:
  """A 3x3, a 1x1 and, where the shape stays, no convolution, each with its norm, added up; then ReLU (Ding et al. 2021)."""
  def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
    self.rbr_dense, self.rbr_1x1 = _Branch(in_channels, out_channels, 3, stride), _Branch(in_channels, out_channels, 1, stride)
    if in_channels == out_channels and stride == 1: self.rbr_identity = norm(in_channels)
    self.act: Activation = Tensor.relu

  def branches(self) -> tuple:
    identity = ((None, self.rbr_identity),) if hasattr(self, "rbr_identity") else ()
    return (self.rbr_dense.conv, self.rbr_dense.bn), (self.rbr_1x1.conv, self.rbr_1x1.bn), *identity

  def __call__(self, x: Tensor) -> Tensor:
    out = self.rbr_dense(x) + self.rbr_1x1(x)
    return self.act(out + self.rbr_identity(x) if hasattr(self, "rbr_identity") else out).contiguous()


def _conv_silu(in_channels: int, out_channels: int, stride: int = 1) -> Block: return Block(in_channels, out_channels, 3, stride, silu)


class BottleRep:
  """Two blocks, and alpha [1] times the input where the shape stays."""
  def __init__(self, channels: int, block: Callable):
    self.conv1, self.conv2, self.alpha = block(channels, channels), block(channels, channels), Tensor.empty(1)

  def __call__(self, x: Tensor) -> Tensor: return (self.conv2(self.conv1(x)) + self.alpha * x).cast(x.dtype).contiguous()


class RepBlock:
  """`repeats` blocks, the first of which may change the channels."""
  def __init__(self, in_channels: int, out_channels: int, repeats: int, block: Callable):
    self.conv1 = block(in_channels, out_channels)
    if repeats > 1: self.block = [block(out_channels, out_channels) for _ in range(repeats - 1)]

  def __call__(self, x: Tensor) -> Tensor: return through(getattr(self, "block", ()), self.conv1(x))


class BepC3:
  """CSP: two halves, one through `repeats` // 2 `BottleRep`s (m and l)."""
  def __init__(self, in_channels: int, out_channels: int, repeats: int, block: Callable, expansion: float):
    hidden, act = int(out_channels * expansion), silu if block is _conv_silu else Tensor.relu
    self.cv1, self.cv2, self.cv3 = (Block(i, o, act=act) for i, o in ((in_channels, hidden), (in_channels, hidden), (2 * hidden, out_channels)))
    self.m = RepBlock(hidden, hidden, repeats // 2, lambda channels, _: BottleRep(channels, block))

  def __call__(self, x: Tensor) -> Tensor: return self.cv3(joined(self.m(self.cv1(x)), self.cv2(x)))


class _SPPF:
  def __init__(self, channels: int, act: Activation):
    self.cv1, self.cv2 = Block(channels, channels // 2, act=act), Block(channels * 2, channels, act=act)

  def __call__(self, x: Tensor) -> Tensor: return self.cv2(joined(*pyramid(self.cv1(x))))


class _CSPSPPF:
  def __init__(self, channels: int):
    c = channels // 2
    self.cv1, self.cv2, self.cv3, self.cv4 = Block(channels, c), Block(channels, c), Block(c, c, 3), Block(c, c)
    self.cv5, self.cv6, self.cv7 = Block(4 * c, c), Block(c, c, 3), Block(2 * c, channels)

  def __call__(self, x: Tensor) -> Tensor:
    deep = self.cv6(self.cv5(joined(*pyramid(through([self.cv1, self.cv3, self.cv4], x)))))
    return self.cv7(joined(self.cv2(x), deep))


class _Named:
  """A layer under one name more, as the files have it."""
  def __init__(self, name: str, layer: Callable): setattr(self, name, layer); self.name = name
  def __call__(self, x: Tensor) -> Tensor: return getattr(self, self.name)(x)


class BiFusion:
  """Three levels at the size of the middle one, joined: [deeper, this, finer] -> [B,`out_channels`,h,w] (the paper's BiC)."""
  def __init__(self, this: int, finer: int, out_channels: int):
    c = out_channels
    self.cv1, self.cv2, self.cv3 = Block(this, c), Block(finer, c), Block(3 * c, c)
    self.upsample, self.downsample = _Named("upsample_transpose", ConvTranspose2x2(c, c)), Block(c, c, 3, 2)

  def __call__(self, deeper: Tensor, this: Tensor, finer: Tensor) -> Tensor:
    return self.cv3(joined(self.upsample(deeper), self.cv1(this), self.downsample(self.cv2(finer))))


class Size(NamedTuple):
  """Repeats, channels, and the expansion of `BepC3` (0: plain `RepBlock`s, and the plain box branch that n and s evaluate)."""
  depth: float
  width: float
  expansion: float = 0.0
  plain_convolutions: bool = False   # with SiLU, in place of `RepVGG`


SIZES = {"yolov6n": Size(.33, .25), "yolov6s": Size(.33, .5), "yolov6m": Size(.6, .75, 2 / 3), "yolov6l": Size(1, 1, 1 / 2, True)}


def _stage(size: Size, in_channels: int, out_channels: int, repeats: int) -> RepBlock | BepC3:
  """A block of the backbone or neck, `repeats` before scaling."""
  block, repeats = _conv_silu if size.plain_convolutions else RepVGG, max(round(repeats * size.depth), 1)
  if not size.expansion: return RepBlock(in_channels, out_channels, repeats, block)
  return BepC3(in_channels, out_channels, repeats, block, size.expansion)


class _Backbone:
  def __init__(self, size: Size, channels: Sequence[int]):
    block = _conv_silu if size.plain_convolutions else RepVGG
    self.stem = block(3, channels[0], stride=2)
    for i, repeats in enumerate((6, 12, 18, 6)):
      layers = [block(channels[i], channels[i + 1], stride=2), _stage(size, channels[i + 1], channels[i + 1], repeats)]
      setattr(self, f"ERBlock_{i + 2}", layers)
    pool = _Named("sppf", _SPPF(channels[4], silu if size.plain_convolutions else Tensor.relu)) if size.expansion else \
           _Named("cspsppf", _CSPSPPF(channels[4]))
    layers.append(pool)

  def __call__(self, x: Tensor) -> list[Tensor]:
    x = self.stem(x)
    return [x := through(getattr(self, f"ERBlock_{i}"), x) for i in range(2, 6)]


class _Neck:
  def __init__(self, size: Size, body: Sequence[int], neck: Sequence[int]):
    _, c2, c3, c4, c5 = body
    p4, p3, down3, n4, down4, n5 = neck
    self.reduce_layer0, self.Bifusion0, self.Rep_p4 = Block(c5, p4), BiFusion(c4, c3, p4), _stage(size, p4, p4, 12)
    self.reduce_layer1, self.Bifusion1, self.Rep_p3 = Block(p4, p3), BiFusion(c3, c2, p3), _stage(size, p3, p3, 12)
    self.downsample2, self.Rep_n3 = Block(p3, down3, 3, 2), _stage(size, p3 + down3, n4, 12)
    self.downsample1, self.Rep_n4 = Block(n4, down4, 3, 2), _stage(size, p4 + down4, n5, 12)

  def __call__(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> list[Tensor]:
    p5 = self.reduce_layer0(c5)
    p4 = self.reduce_layer1(self.Rep_p4(self.Bifusion0(p5, c4, c3)))
    p3 = self.Rep_p3(self.Bifusion1(p4, c3, c2))
    n4 = self.Rep_n3(joined(self.downsample2(p3), p4))
    return [p3, n4, self.Rep_n4(joined(self.downsample1(n4), p5))]


class _Head:
  def __init__(self, channels: Sequence[int], num_classes: int, plain: bool):
    self.stems = [Block(c, c, act=silu) for c in channels]
    self.cls_convs, self.reg_convs = ([Block(c, c, 3, act=silu) for c in channels] for _ in range(2))
    self.cls_preds = [Conv2d(c, num_classes, 1) for c in channels]
    self.reg_preds = [Conv2d(c, 4 if plain else 4 * BINS, 1) for c in channels]
    if plain: self.reg_preds_dist = [Conv2d(c, 4 * BINS, 1) for c in channels]
    self.proj, self.proj_conv = Tensor.empty(BINS).is_param_(False), Conv2d(BINS, 1, 1, bias=False)
    self.proj_conv.weight.is_param_(False)

  def __call__(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    levels = [stem(x) for stem, x in zip(self.stems, levels)]
    classes = [conv(x) for conv, x in zip(self.cls_convs, levels)]
    boxes = [conv(x) for conv, x in zip(self.reg_convs, levels)]
    parts = [(self.reg_preds, boxes), (self.cls_preds, classes), *([(self.reg_preds_dist, boxes)] if hasattr(self, "reg_preds_dist") else [])]
    return tuple(branch_outputs([[conv] for conv in convs], xs) for convs, xs in parts)


class YOLOv6:
  """f32 [B,3,H,W], sides multiples of 32 -> (box, class logits [B,K,N]) float32, levels 8, 16, 32 one after the other. Box is [B,4,N], plain sides
  in strides, of n and s, which return their distribution branch [B,68,N] as a third, and [B,68,N] of m and l: 4 sides of 17 bins."""
  def __init__(self, size: Size, num_classes: int):
    body, neck = ([math.ceil(c * size.width / 8) * 8 for c in channels] for channels in ((64, 128, 256, 512, 1024), (256, 128, 128, 256, 256, 512)))
    self.backbone, self.neck = _Backbone(size, body), _Neck(size, body, neck)
    self.detect = _Head((neck[1], neck[3], neck[5]), num_classes, not size.expansion)

  class_branches = ()   # widths do not follow the number of classes

  @property
  def class_rows(self) -> dict[str, tuple[int, int]]:
    """The tensors with a row for each class: how many times they have all, and how many other rows come before the classes each time."""
    return {f"detect.cls_preds.{i}.{part}": (1, 0) for i in range(len(self.detect.cls_preds)) for part in ("weight", "bias")}

  def __call__(self, x: Tensor) -> tuple[Tensor, ...]: return self.rest(self.features(x))

  def features(self, x: Tensor, layer: str = "backbone") -> list[Tensor]:
    """What the "backbone", or the "pyramid" behind it, hands on."""
    levels = self.backbone(x)
    return self.neck(*levels) if layer == "pyramid" else levels

  def rest(self, features: Sequence[Tensor], layer: str = "backbone") -> tuple[Tensor, ...]:
    """The head's outputs from the `features` of `layer`."""
    return self.detect(features if layer == "pyramid" else self.neck(*features))

  @property
  def stages(self) -> list[Any]:
    """The backbone's five, from the picture on."""
    return [self.backbone.stem, *(getattr(self.backbone, f"ERBlock_{i}") for i in range(2, 6))]

  @property
  def parts(self) -> dict[str, tuple[str, ...]]:
    """How the names of tensors begin, from the last part to the first."""
    return {"head": ("detect.",), "neck": ("neck.",), "backbone": ("backbone.",)}
