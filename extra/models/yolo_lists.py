"""YOLOv5 and v7 to 26 as lists of layers, with the `state_dict` keys of their own files.

A family is a function from a size to the list; a comment gives a line's first number. Figures: `docs/networks.md`."""
import functools, math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from tinydet.models import yolo_blocks as blocks
from tinydet.models.layer_list import HALVED, PICTURE, UP, Layer, cat, layer
from tinydet.models.yolo_blocks import A2C2f, AConv, ADown, C2PSA, C2f, C3, Conv, ELAN, PSA, SCDown, SPPELAN, SPPF, c2f_cib, c3k2


class Size(NamedTuple):
  """What a family's list is scaled by: repeats, channels, and the most channels before that."""
  depth: float
  width: float
  most: int = 1024

  def channels(self, n: int) -> int: return math.ceil(min(n, self.most) * self.width / 8) * 8
  def repeats(self, n: int) -> int: return max(round(n * self.depth), 1)


def _head(*sources: int, **options: Any) -> Callable[[int], Layer]:
  return lambda num_classes: Layer(lambda in_channels: blocks.Detect(in_channels, num_classes, **options), None, sources)


def _anchor_head(*sources: int, grid: bool) -> Callable[[int], Layer]:
  return lambda num_classes: Layer(lambda in_channels: blocks.AnchorDetect(in_channels, num_classes, grid), None, sources)


def _v5(size: Size, head: Callable[[int], Layer], num_classes: int) -> list[Layer]:
  c, n = size.channels, size.repeats
  return [Layer(lambda _: Conv(3, c(64), 6, 2, padding=2), c(64)), layer(Conv, c(128), 3, 2), layer(C3, c(128), n(3)),
          layer(Conv, c(256), 3, 2), layer(C3, c(256), n(6)), layer(Conv, c(512), 3, 2), layer(C3, c(512), n(9)),                   # 3
          layer(Conv, c(1024), 3, 2), layer(C3, c(1024), n(3)), layer(SPPF, c(1024)),                                               # 7
          layer(Conv, c(512)), UP, cat(6), layer(C3, c(512), n(3), False), layer(Conv, c(256)), UP, cat(4),                         # 10
          layer(C3, c(256), n(3), False), layer(Conv, c(256), 3, 2), cat(14), layer(C3, c(512), n(3), False),                       # 17
          layer(Conv, c(512), 3, 2), cat(10), layer(C3, c(1024), n(3), False), head(num_classes)]                                   # 21


def _v8(size: Size, num_classes: int) -> list[Layer]:
  c, n = size.channels, size.repeats
  return [layer(Conv, c(64), 3, 2), layer(Conv, c(128), 3, 2), layer(C2f, c(128), n(3), True), layer(Conv, c(256), 3, 2),
          layer(C2f, c(256), n(6), True), layer(Conv, c(512), 3, 2), layer(C2f, c(512), n(6), True), layer(Conv, c(1024), 3, 2),    # 4
          layer(C2f, c(1024), n(3), True), layer(SPPF, c(1024)), UP, cat(6), layer(C2f, c(512), n(3)),                              # 8
          UP, cat(4), layer(C2f, c(256), n(3)), layer(Conv, c(256), 3, 2), cat(12), layer(C2f, c(512), n(3)),                       # 13
          layer(Conv, c(512), 3, 2), cat(9), layer(C2f, c(1024), n(3)), _head(15, 18, 21)(num_classes)]                             # 19


class _V9(NamedTuple):
  """A size of YOLOv9: channels of the stem, of the blocks at strides 4, 8, 16 and 32, of the backbone's at stride 8, and of the neck's steps down."""
  stem: int
  widths: tuple[int, int, int, int]
  wide: int
  steps: tuple[int, int]
  repeats: int
  plain_first: bool = False   # the first block is of plain convolutions
  down: Callable = AConv


def _v9(size: _V9, num_classes: int) -> list[Layer]:
  (w2, w3, w4, w5), down = size.widths, size.down
  def elan(width: int, channels: int | None = None) -> Layer: return layer(ELAN, channels or width, width, width // 2, size.repeats)
  first = layer(ELAN, w2, w2, w2 // 2) if size.plain_first else elan(128, w2)
  return [layer(Conv, size.stem, 3, 2), layer(Conv, 2 * size.stem, 3, 2), first, layer(down, w3 if down is AConv else w2),
          elan(w3, size.wide), layer(down, w4 if down is AConv else size.wide), elan(w4), layer(down, w5), elan(w5),                # 4
          layer(SPPELAN, w5, w5 // 2), UP, cat(6), elan(w4), UP, cat(4), elan(w3), layer(down, size.steps[0]), cat(12), elan(w4),   # 9
          layer(down, size.steps[1]), cat(9), elan(w5), _head(15, 18, 21)(num_classes)]                                             # 19


def _v9_auxiliary(size: _V9, num_classes: int) -> list[Layer]:
  """What helps YOLOv9 to learn, behind the 23 layers of its list (Wang et al. 2024, section 3.1; layers as in the authors' MIT program). t and s have
  a second neck; m and c a second backbone, into which groups of the first one's channels are added at each resolution."""
  main, (w3, w4, w5) = _v9(size, num_classes), size.widths[1:]
  if size.plain_first:
    def elan(width: int) -> Layer: return layer(ELAN, width, width, width // 2, size.repeats)
    return [layer(SPPELAN, w5, w5 // 2, source=8), UP, cat(6), elan(w4), UP, cat(4), elan(w3), _head(29, 26, 23)(num_classes)]      # 23
  groups = tuple(main[number].channels for number in (3, 5, 7))   # the widths of the steps down
  def split(source: int, count: int) -> Layer: return Layer(lambda channels: blocks.Split(channels, groups[:count]), sum(groups[:count]), (source,))
  def fuse(group: int, *sources: int) -> Layer: return Layer(lambda channels: blocks.Fuse(group), groups[group], (*sources, -1))
  return [split(4, 1), split(6, 2), split(8, 3), main[0]._replace(sources=(PICTURE,)), main[1], main[2], main[3], fuse(0, 23, 24, 25),   # 23
          main[4], main[5], fuse(1, 24, 25), main[6], main[7], fuse(2, 25), main[8], _head(31, 34, 37)(num_classes)]                     # 31


def _v10(size: Size, inverted: Mapping[int, bool], num_classes: int) -> list[Layer]:
  """`inverted`: the numbers of the C2f that are made of `CIB`s, and whether with a large kernel."""
  c, n = size.channels, size.repeats
  def c2f(number: int, channels: int, repeats: int, shortcut: bool = False) -> Layer:
    if number in inverted: return layer(c2f_cib, c(channels), n(repeats), True, inverted[number])
    return layer(C2f, c(channels), n(repeats), shortcut)
  return [layer(Conv, c(64), 3, 2), layer(Conv, c(128), 3, 2), c2f(2, 128, 3, True), layer(Conv, c(256), 3, 2), c2f(4, 256, 6, True),
          layer(SCDown, c(512)), c2f(6, 512, 6, True), layer(SCDown, c(1024)), c2f(8, 1024, 3, True), layer(SPPF, c(1024)),         # 5
          layer(PSA, c(1024)), UP, cat(6), c2f(13, 512, 3), UP, cat(4), c2f(16, 256, 3), layer(Conv, c(256), 3, 2),                 # 10
          cat(13), c2f(19, 512, 3), layer(SCDown, c(512)), cat(10), c2f(22, 1024, 3),                                               # 18
          _head(16, 19, 22, light=True, end2end=True)(num_classes)]


def _v11(size: Size, deep: bool, num_classes: int, v26: bool = False) -> list[Layer]:
  """`deep`: C3k in all blocks, as m, l and x have it. `v26`: what YOLO26 changed."""
  c, n = size.channels, size.repeats
  def block(channels: int, is_deep: bool, expansion: float = 0.5) -> Layer: return layer(c3k2, c(channels), n(2), is_deep or deep, expansion)
  last = layer(c3k2, c(1024), 1, True, 0.5, True) if v26 else block(1024, True)
  return [layer(Conv, c(64), 3, 2), layer(Conv, c(128), 3, 2), block(256, False, 0.25), layer(Conv, c(256), 3, 2), block(512, False, 0.25),
          layer(Conv, c(512), 3, 2), block(512, True), layer(Conv, c(1024), 3, 2), block(1024, True), layer(SPPF, c(1024), v26),    # 5
          layer(C2PSA, c(1024), n(2)), UP, cat(6), block(512, v26), UP, cat(4), block(256, v26), layer(Conv, c(256), 3, 2),         # 10
          cat(13), block(512, v26), layer(Conv, c(512), 3, 2), cat(10), last,                                                       # 18
          _head(16, 19, 22, light=True, **({"bins": 1, "end2end": True} if v26 else {}))(num_classes)]


def _v12(size: Size, deep: bool, large: bool, num_classes: int) -> list[Layer]:
  """`deep` as in `_v11`; `large`: l and x scale the blocks' outputs and have narrower MLPs."""
  c, n = size.channels, size.repeats
  def areas(channels: int, repeats: int, areas: int) -> Layer: return layer(A2C2f, c(channels), n(repeats), areas, large, 1.2 if large else 2.0)
  return [layer(Conv, c(64), 3, 2), layer(Conv, c(128), 3, 2), layer(c3k2, c(256), n(2), deep, 0.25), layer(Conv, c(256), 3, 2),
          layer(c3k2, c(512), n(2), deep, 0.25), layer(Conv, c(512), 3, 2), areas(512, 4, 4), layer(Conv, c(1024), 3, 2),           # 4
          areas(1024, 4, 1), UP, cat(6), areas(512, 2, 0), UP, cat(4), areas(256, 2, 0), layer(Conv, c(256), 3, 2), cat(11),        # 8
          areas(512, 2, 0), layer(Conv, c(512), 3, 2), cat(8), layer(c3k2, c(1024), n(2), True),                                    # 17
          _head(14, 17, 20, light=True)(num_classes)]


def _v7(num_classes: int) -> list[Layer]:
  def elan(width: int, out_channels: int) -> list[Layer]:
    return [layer(Conv, width), layer(Conv, width, source=-2), *[layer(Conv, width, 3)] * 4, cat(-3, -5, -6), layer(Conv, out_channels)]
  def wide(width: int) -> list[Layer]:
    return [layer(Conv, width), layer(Conv, width, source=-2), *[layer(Conv, width // 2, 3)] * 4, cat(-2, -3, -4, -5, -6), layer(Conv, width)]
  def down(width: int, *also: int) -> list[Layer]:
    return [HALVED, layer(Conv, width), layer(Conv, width, source=-3), layer(Conv, width, 3, 2), cat(-3, *also)]
  return [layer(Conv, 32, 3), layer(Conv, 64, 3, 2), layer(Conv, 64, 3), layer(Conv, 128, 3, 2), *elan(64, 256),
          *down(128), *elan(128, 512), *down(256), *elan(256, 1024), *down(512), *elan(256, 1024),                                  # 12
          layer(blocks.SPPCSPC, 512), layer(Conv, 256), UP, layer(Conv, 256, source=37), cat(-2), *wide(256),                       # 51
          layer(Conv, 128), UP, layer(Conv, 128, source=24), cat(-2), *wide(128), *down(128, 63), *wide(256),                       # 64
          *down(256, 51), *wide(512), layer(blocks.RepConvN, 256, source=75), layer(blocks.RepConvN, 512, source=88),               # 89
          layer(blocks.RepConvN, 1024, source=101), _anchor_head(102, 103, 104, grid=True)(num_classes)]


_V5_HEAD, _V5_CLASSIC = _head(17, 20, 23), _anchor_head(17, 20, 23, grid=False)
_V5 = {"n": Size(.33, .25), "s": Size(.33, .5), "m": Size(.67, .75), "l": Size(1, 1), "x": Size(1.33, 1.25)}
# t is this project's own, for small pictures on a processor: it ships with the code, trained on shapes.
_V8 = {"t": Size(.33, .125, 384), "n": Size(.33, .25), "s": Size(.33, .5), "m": Size(.67, .75, 768), "l": Size(1, 1, 512), "x": Size(1, 1.25, 512)}
_V9S = {"t": _V9(16, (32, 64, 96, 128), 64, (48, 64), 3, True), "s": _V9(32, (64, 128, 192, 256), 128, (96, 128), 3, True),
        "m": _V9(32, (128, 240, 360, 480), 240, (184, 240), 1), "c": _V9(64, (256, 256, 512, 512), 512, (256, 512), 1, down=ADown)}
_V10 = {"n": (Size(.33, .25), {22: True}), "s": (Size(.33, .5), {8: True, 22: True}),
        "m": (Size(.67, .75, 768), {8: False, 19: False, 22: False}), "b": (Size(.67, 1, 512), {8: False, 13: False, 19: False, 22: False}),
        "l": (Size(1, 1, 512), {8: False, 13: False, 19: False, 22: False}),
        "x": (Size(1, 1.25, 512), {6: False, 8: False, 13: False, 19: False, 22: False})}
_V11 = {"n": Size(.5, .25), "s": Size(.5, .5), "m": Size(.5, 1, 512), "l": Size(1, 1, 512), "x": Size(1, 1.5, 512)}   # and 12's, 26's

# The layers for training alone, of those that have some.
AUXILIARY: dict[str, Callable[[int], list[Layer]]] = {f"yolov9{k}": functools.partial(_v9_auxiliary, size) for k, size in _V9S.items()}
# Of each name the list of layers for a number of classes.
NETWORKS: dict[str, Callable[[int], list[Layer]]] = {
  **{f"yolov5{k}": functools.partial(_v5, size, _V5_HEAD) for k, size in _V5.items()},
  **{f"yolov5{k}-classic": functools.partial(_v5, size, _V5_CLASSIC) for k, size in _V5.items()},
  "yolov7": _v7,
  **{f"yolov8{k}": functools.partial(_v8, size) for k, size in _V8.items()},
  **{f"yolov9{k}": functools.partial(_v9, size) for k, size in _V9S.items()},
  **{f"yolov10{k}": functools.partial(_v10, *size) for k, size in _V10.items()},
  **{f"yolo11{k}": functools.partial(_v11, size, k in "mlx") for k, size in _V11.items()},
  **{f"yolo12{k}": functools.partial(_v12, size, k in "mlx", k in "lx") for k, size in _V11.items()},
  **{f"yolo26{k}": functools.partial(_v11, size, k in "mlx", v26=True) for k, size in _V11.items()}}
