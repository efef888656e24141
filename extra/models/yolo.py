"""The YOLO family's networks by name: what decodes their outputs, how they are built, and which one a set of tensors belongs to."""
import functools, math, re
from collections.abc import Mapping
from typing import Any, NamedTuple
import numpy as np
from tinygrad.nn.state import get_state_dict
from tinydet.models import darknet, yolo_lists, yolov6
from tinydet.models.layer_list import LayerList
from tinydet.nn import init

_V5 = ((10, 13, 16, 30, 33, 23), (30, 61, 62, 45, 59, 119), (116, 90, 156, 198, 373, 326))
_V4 = ((12, 16, 19, 36, 40, 28), (36, 75, 76, 55, 72, 146), (142, 110, 192, 243, 459, 401))
# Those that the published weights of v3-tiny and v4-tiny were trained with: masks 1,2,3 and 3,4,5. Both darknets' v3-tiny.cfg says 0,1,2, which
# gives a fraction of the published accuracy (AlexeyAB/darknet issues 1341, 4067; ultralytics/yolov3 issue 421).
_TINY = ((23, 27, 37, 58, 81, 82), (81, 82, 135, 169, 344, 319))
ALIKE = 0.8   # of a network's tensors that a file must have for it to be taken for that network


class Facts(NamedTuple):
  """What a network's outputs mean. `decode`: "sides" (distances from the cell's centre), "v5" or "darknet" (anchors)."""
  decode: str = "sides"
  strides: tuple[int, ...] = (8, 16, 32)
  bins: int = 16                     # places of a side's distribution; 1: plain numbers
  anchors: tuple[tuple[int, ...], ...] = ()   # w, h of each stride's three, in pixels
  scale_xy: tuple[float, ...] = ()   # of each stride, how many cells wide the places are that a centre can take
  end2end: bool = False              # its last two outputs are a head that needs no NMS
  nms: float = 0.7                   # IoU above which the family's own programs drop a box
  letterbox: bool = True             # trained on pictures that keep their proportions, else on stretched ones
  backbone: int = 10                 # layers of its list that come before the neck
  side: int = 640                    # of the pictures that its published weights are scored on


_DARKNET = Facts("darknet", anchors=_V5, scale_xy=(1, 1, 1), nms=0.45, letterbox=False, backbone=75, side=608)
_OWN: dict[str, Facts] = {
  "yolov3": _DARKNET, "yolov3-spp": _DARKNET,
  "yolov3-tiny": _DARKNET._replace(strides=(16, 32), anchors=_TINY, scale_xy=(1, 1), backbone=13, side=416),
  "yolov4": _DARKNET._replace(anchors=_V4, scale_xy=(1.2, 1.1, 1.05), backbone=105),
  "yolov4-tiny": _DARKNET._replace(strides=(16, 32), anchors=_TINY, scale_xy=(1.05, 1.05), backbone=27, side=416),
  "yolov6n": Facts(bins=1, nms=0.65), "yolov6s": Facts(bins=1, nms=0.65), "yolov6m": Facts(bins=17, nms=0.65), "yolov6l": Facts(bins=17, nms=0.65),
  "yolov7": Facts("v5", anchors=_V4, nms=0.65, backbone=51)}
NAMES, AUXILIARY = (*darknet.NETWORKS, *yolov6.SIZES, *yolo_lists.NETWORKS), tuple(yolo_lists.AUXILIARY)   # the latter have auxiliary layers


def facts(name: str) -> Facts:
  """What is known of the network `name`, one of `NAMES`."""
  if name in _OWN: return _OWN[name]
  if name.endswith("-classic"): return Facts("v5", anchors=_V5, nms=0.6)
  if name.startswith("yolov10"): return Facts(end2end=True, backbone=11)
  if name.startswith("yolo26"): return Facts(bins=1, end2end=True, backbone=11)
  return Facts(backbone={"yolo11": 11, "yolo12": 9}.get(name[:6], 10))


def made(name: str, num_classes: int, auxiliary: bool = False) -> Any:
  """The network `name` without values: only names and shapes are sure. `auxiliary`: with its layers for training alone."""
  if name in yolov6.SIZES: return yolov6.YOLOv6(yolov6.SIZES[name], num_classes)
  return LayerList({**yolo_lists.NETWORKS, **darknet.NETWORKS}[name](num_classes), facts(name).backbone,
                   facts(name).decode != "darknet", yolo_lists.AUXILIARY[name](num_classes) if auxiliary else ())


def build(name: str, num_classes: int = 80, seed: int = 0, auxiliary: bool = False) -> Any:
  """The network `name`, one of `NAMES`, initialised from `seed`: f32 [B,3,H,W] in 0..1, sides multiples of 32, -> a tuple of float32 tensors, for
  which see its head (`yolo_blocks.Detect`, `yolo_blocks.AnchorDetect`, `yolov6.YOLOv6`, `darknet`). `auxiliary`: YOLOv9's, with the layers that are
  for training alone.

  Raises ValueError for another name, and KeyError for `auxiliary` of a network that has none."""
  if name not in NAMES: raise ValueError(f"{name!r} is no YOLO network: {', '.join(NAMES)}")
  network = made(name, num_classes, auxiliary)
  init.initialize(network, lambda key, shape: init_rule(name, key, shape), seed)
  return network


@functools.lru_cache(maxsize=len(NAMES))
def shapes_of(name: str, num_classes: int) -> dict[str, tuple[int, ...]]:
  """The names and shapes of the network's tensors, but for those that only count batches."""
  return {key: t.shape for key, t in get_state_dict(made(name, num_classes)).items() if not key.endswith("num_batches_tracked")}


def init_rule(name: str, key: str, shape: tuple[int, ...]) -> init.Draw:
  """What the tensor `key` of the network `name` starts from: torch's convolutions (darknet's for its own); class logits as rare objects."""
  known, level = facts(name), int(match[1]) if (match := re.search(r"\.(\d)(\.2)?\.(weight|bias)$", key)) else 0
  if key.endswith(("dfl.conv.weight", "detect.proj", "proj_conv.weight")): return lambda rng, shape: np.arange(math.prod(shape)).reshape(shape)
  if key.endswith(("anchors", "anchor_grid")):
    pixels = np.reshape(known.anchors, (-1, 3, 2)) / (np.reshape(known.strides, (-1, 1, 1)) if key.endswith("anchors") else 1)
    return lambda rng, shape: pixels.reshape(shape)
  if re.search(r"cv3\.\d\.2\.bias$", key): return init.constant(math.log(5 / shape[0] / (640 / known.strides[level]) ** 2))   # 5 objects a picture
  if re.search(r"cv2\.\d\.2\.bias$", key): return init.constant(1.0 if known.bins > 1 else 2.0)
  if re.search(r"detect\.(cls|reg)_preds", key):
    return init.constant(0.0 if key.endswith("weight") else -math.log(99) if "cls_preds" in key else 1.0)
  if re.fullmatch(r"model\.\d+\.m\.\d\.bias", key): return lambda rng, shape: _anchored_bias(shape[0] // 3, known.strides[level])
  if re.fullmatch(r"model\.\d+\.conv\.bias", key): return lambda rng, shape: _anchored_bias(shape[0] // 3, 16)   # darknet's, of any level
  if key.endswith("gamma"): return init.constant(0.01)
  if key.endswith("alpha"): return init.constant(1.0)
  if len(shape) == 4: return init.uniform(math.sqrt((2 if known.decode == "darknet" else 1) / math.prod(shape[1:])))
  return init.normalization(key)


def _anchored_bias(per_anchor: int, stride: int) -> np.ndarray:
  """[3*(5+K)]: an objectness of 8 objects a picture of 640 pixels, each of any class (Lin et al. 2017 as in YOLOv5)."""
  bias = np.zeros((3, per_anchor))
  bias[:, 4], bias[:, 5:] = math.log(8 / (640 / stride) ** 2), math.log(0.6 / max(per_anchor - 5.99999, 1e-5))
  return bias.reshape(-1)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int] | None:
  """(name, number of classes) of the network whose tensors have these names and shapes, most of them at least; None if it is none of `NAMES`."""
  if (num_classes := count_classes(shapes)) is None: return None
  first = next((shapes[key] for key in ("model.0.conv.weight", "backbone.stem.rbr_dense.conv.weight", "backbone.stem.block.conv.weight")
                if key in shapes), None)
  if not first: return None
  last = max((int(key.split(".")[1]) for key in shapes if re.match(r"model\.\d+\.", key)), default=None)
  best, found = ALIKE, None
  for name in NAMES:
    if name not in yolov6.SIZES:   # a list's length and first width are known before its layers are made
      layers = {**yolo_lists.NETWORKS, **darknet.NETWORKS}[name](num_classes)
      if last != len(layers) - (2 if name in darknet.NETWORKS else 1) or layers[0].channels != first[0]: continue
    elif last is not None: continue
    wanted = shapes_of(name, num_classes)
    alike = sum(shapes.get(key) == shape for key, shape in wanted.items()) / len(wanted)
    if alike > best: best, found = alike, (name, num_classes)
  return found


def count_classes(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
  """The number of classes of the YOLO head among tensors of these names and shapes; None where there is none."""
  for pattern, anchored in ((r"model\.\d+\.cv3\.0\.2\.bias", False), (r"detect\.cls_preds\.0\.bias", False), (r"model\.\d+\.m\.0\.bias", True),
                            (r"model\.\d+\.conv\.bias", True)):
    if key := next((key for key in shapes if re.fullmatch(pattern, key) and len(shapes[key]) == 1), None):
      size = shapes[key][0]
      return size if not anchored else size // 3 - 5 if size % 3 == 0 and size > 15 else None
  return None
