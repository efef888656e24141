"""The YOLO family as a detector: what only it knows of pictures, outputs and detections."""
import functools
from collections.abc import Iterable, Mapping
from typing import Any
import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.helpers import TRAINING
from tinygrad.nn.state import get_parameters
from tinydet.class_names import COCO80
from tinydet.detection import anchor_fit, yolo as decoding
from tinydet.detection.anchor_losses import Gains, darknet_losses, ratio_losses
from tinydet.detection.postprocess import Detections
from tinydet.detection.yolo_losses import Recipe, side_losses
from tinydet.detectors.detector import Canvas, Detector, Outputs, Preprocessing
from tinydet.errors import UserError
from tinydet.models import yolo
from tinydet.models.fold import fold
from tinydet.nn.init import set_values
from tinydet.runtime.graphs import lock

NAMES = yolo.NAMES
GREY = (114, 114, 114)   # of what a letterboxed picture does not cover
TOPK = 30_000            # of a picture's pairs of candidate and class that NMS looks at, as in the official programs

# How heads learn, one-to-many and one-to-one, by how names begin; all others of sides learn as v8 does.
RECIPES = {"yolov6n": (Recipe(2.5, 1.0, 0.5, "siou", "iou", 13, 1.0, varifocal=True, times_batch=False),),
           "yolov6": (Recipe(2.5, 1.0, 0.5, "giou", "iou", 13, 1.0, varifocal=True, times_batch=False),),
           "yolov10": (Recipe(), Recipe(topk=1)),
           "yolo26": (Recipe(plain_sides=True), Recipe(plain_sides=True, topk=7, last_topk=1, smallest=16.0)),
           "": (Recipe(),)}
V5, V7 = Gains(), Gains(objectness=0.7, classes=0.3, simota=True)
AUXILIARY_SHARE = 0.25   # of YOLOv9's auxiliary head in the loss
FIRST_SHARE, LAST_SHARE = 0.8, 0.1   # of YOLO26's one-to-many loss, at a run's beginning and end; the rest is the one-to-one head's


class Yolo(Detector):
  """Outputs are those of the network's head (see `models.yolo.build`); `facts` say how they decode. `network` has the official files' tensors until
  `fold` is called."""
  multiple, sigmoid = 32, False

  def __init__(self, name: str, num_classes: int = 80, seed: int = 0, auxiliary: bool = False):
    self.name, self.num_classes, self.facts = name, num_classes, yolo.facts(name)
    if auxiliary and name not in yolo.AUXILIARY:
      raise UserError(f"--auxiliary: {name} has no auxiliary layers; {', '.join(yolo.AUXILIARY)} have")
    self.network = yolo.build(name, num_classes, seed, auxiliary)
    place = {"letterbox": True, "centred": True} if self.facts.letterbox else {}
    self.preprocessing = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, fill=GREY, **place)
    self.fitted: np.ndarray | None = None   # w, h in pixels [levels,3,2], where they are others than the published ones and no tensor has them
    self.usual_size, self.class_names = (self.facts.side,) * 2, list(COCO80) if num_classes == 80 else None
    self.selection = {"topk": TOPK, "clip": False, "nms_threshold": None if self.facts.end2end else self.facts.nms}

  def __call__(self, images: Tensor, dtype: DType = dtypes.float32) -> Outputs:
    """As in `Detector`; in training, where the network has auxiliary layers, the outputs of their head too."""
    if TRAINING and getattr(self.network, "auxiliary", None): return self.network.with_auxiliary(self.prepare(images, dtype))
    return super().__call__(images, dtype)

  def features(self, x: Tensor, layer: str = "backbone") -> list[Tensor]: return self.network.features(x, layer)

  def head(self, features: list[Tensor], layer: str = "backbone") -> Outputs: return self.network.rest(features, layer)

  def prepare(self, images: Tensor, dtype: DType = dtypes.float32) -> Tensor:
    """u8 [B,H,W,3] RGB -> `dtype` [B,3,H,W] in 0..1. Not laid out in memory: the first convolution alone reads it."""
    return (images.permute(0, 3, 1, 2).cast(dtypes.float32) * (1 / 255)).cast(dtype)

  @functools.cache   # noqa: B019 as many as there are layers to ask for
  def levels(self, layer: str = "backbone") -> dict[str, int]:
    strides = [128 // f.shape[2] for f in self.features(Tensor.empty(1, 3, 128, 128), layer)]   # only shapes: nothing is computed
    return {f"{'P' if layer == 'pyramid' else 'C'}{stride.bit_length() - 1}": stride for stride in strides}

  def losses(self, outputs: Outputs, boxes: Tensor, labels: Tensor, canvas: Canvas) -> dict[str, Tensor]:
    """As in `Detector`; the parts are those of all heads, with their gains and shares, over what scores are wanted. "loss" is their sum times the
    pictures of the batch (YOLOv6, darknet: their sum), as in the families' own programs."""
    if self.facts.decode != "sides": return self._anchor_losses(outputs, boxes, labels, canvas)
    recipes = next(recipe for begins, recipe in RECIPES.items() if self.name.startswith(begins))
    auxiliary = self.name.startswith("yolov9") and len(outputs) > 2
    if auxiliary: recipes *= 2
    heads = [side_losses(*outputs[2 * i:2 * i + 2], boxes, labels, canvas, self.facts.strides, recipe) for i, recipe in enumerate(recipes)]
    shares = [1.0, AUXILIARY_SHARE] if auxiliary else [1.0] * len(heads)
    if self.name.startswith("yolo26"):
      share = FIRST_SHARE + (LAST_SHARE - FIRST_SHARE) * self.progress()
      shares = [share, 1 - share]
    parts = {name: sum((head[name] * share for head, share in zip(heads[1:], shares[1:])), heads[0][name] * shares[0]) for name in heads[0]}
    return {"loss": sum(parts.values()) * (boxes.shape[0] if recipes[0].times_batch else 1)} | parts

  def _anchor_losses(self, outputs: Outputs, boxes: Tensor, labels: Tensor, canvas: Canvas) -> dict[str, Tensor]:
    """`losses` of a head with anchors."""
    known, given = self.facts, (outputs, self.anchors(), boxes, labels, canvas, self.facts.strides)
    if known.decode == "darknet":
      parts = darknet_losses(*given, known.scale_xy, ciou=self.name.startswith("yolov4"))
      return {"loss": sum(parts.values())} | parts
    parts = ratio_losses(*given, V7 if self.name == "yolov7" else V5)
    return {"loss": sum(parts.values()) * boxes.shape[0]} | parts

  def candidates(self, outputs: Outputs, canvas: Canvas) -> tuple[Tensor, Tensor]:
    known = self.facts
    if known.decode != "sides":
      boxes, _, scores = decoding.decode_anchors(outputs, self.anchors(), known.strides, known.scale_xy or None)
      return self.of_classes(scores), boxes
    box, classes = outputs[-2:] if known.end2end else outputs[:2]
    sides = box if known.bins == 1 else decoding.expected_sides(box, known.bins)
    return self.of_classes(classes.sigmoid().transpose(1, 2)), decoding.decode_sides(sides, canvas, known.strides)

  def anchors(self) -> Tensor:
    """w, h in pixels f32 [levels,3,2]: those that were fitted, or the file's own. Of constants, as a captured graph has no host to ask."""
    def numbers(values: Iterable[float]) -> Tensor: return Tensor.stack(*(Tensor(float(v)) for v in values))
    head = self.network.model[-1]
    shapes = np.reshape(self.facts.anchors, (-1, 3, 2)) if self.fitted is None else self.fitted
    if not hasattr(head, "anchors"): return numbers(shapes.reshape(-1)).reshape(-1, 3, 2)
    return head.anchors.float() * numbers(self.facts.strides).reshape(-1, 1, 1)

  def anchor_shapes(self) -> np.ndarray | None:
    return self.anchors().numpy().reshape(-1, 2).astype(np.float64) if self.facts.anchors else None

  def fit_anchors(self, shapes: np.ndarray) -> None:
    """Three for each level, the smallest for the finest."""
    self._readers = {}
    found = anchor_fit.fit_shapes(shapes, 3 * len(self.facts.strides)).round(2).reshape(-1, 3, 2)
    head = self.network.model[-1]
    if not hasattr(head, "anchors"):
      self.fitted = found
      return
    set_values(head.anchors, found / np.reshape(self.facts.strides, (-1, 1, 1)))
    if hasattr(head, "anchor_grid"): set_values(head.anchor_grid, found.reshape(head.anchor_grid.shape))

  def about(self) -> dict[str, Any]: return super().about() | ({} if self.fitted is None else {"anchors": self.fitted.tolist()})

  def assume(self, about: Mapping[str, Any]) -> None:
    super().assume(about)
    self._readers = {}
    if (found := about.get("anchors")) is None: return
    try: values = np.array(found, np.float64)
    except (TypeError, ValueError): values = np.zeros(0)
    if values.shape != (len(self.facts.strides), 3, 2) or not ((values > 0) & (values < 1e5)).all():
      raise UserError(f"anchors: the weights' metadata has to say width and height of three for each of {len(self.facts.strides)} levels; train them "
                      "again")
    self.fitted = values

  def detect(self, outputs: Outputs, canvas: Canvas, sizes: np.ndarray, origins: np.ndarray | None = None, hidden: Tensor | None = None,
             **options: Any) -> Detections:
    options = self.options(options)
    if options["nms_threshold"] is not None: return super().detect(outputs, canvas, sizes, origins, hidden, **options)
    with lock:
      scores, boxes = self.read(outputs, canvas)   # a one-to-one head
      if hidden is not None: scores = (hidden < 0).where(0, scores)
      return decoding.best(boxes, scores, options.get("max_detections", 300), options.get("score_threshold", 0.05))

  def level_of(self, row: int, canvas: Canvas) -> str:
    each = 1 if self.facts.decode == "sides" else 3
    ends = np.cumsum([each * (canvas[0] // stride) * (canvas[1] // stride) for stride in self.facts.strides])
    return f"P{self.facts.strides[int(np.searchsorted(ends, row, side='right'))].bit_length() - 1}"

  def freeze(self, trainable_layers: int) -> None:
    for stage in self.network.stages[:5 - trainable_layers]:
      for tensor in get_parameters(stage): tensor.is_param_(False)

  @property
  def stages(self) -> Mapping[str, tuple[str, ...]]: return self.network.parts

  def init_rule(self, key: str, shape: tuple[int, ...]) -> Any: return yolo.init_rule(self.name, key, shape)

  def fold(self) -> None: fold(self.network)


def build(name: str, num_classes: int = 80, **options: Any) -> Yolo:
  """The detector `name`, one of `NAMES`; options are those of `Yolo`."""
  return Yolo(name, num_classes, **options)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int, dict[str, Any]] | None:
  """Name, number of classes and options for `build` of the network whose tensors have these names and shapes; None if it is no YOLO."""
  found = yolo.recognise(shapes)
  return None if found is None else (*found, {})
