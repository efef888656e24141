"""FCOS (Tian et al. 2019) as a detector: no anchors, a place of the pyramid learns the box that it is in the middle of."""
from collections.abc import Mapping
from typing import Any
import numpy as np
from tinygrad import Tensor, dtypes
from tinydet.detection import anchors, assigners, postprocess
from tinydet.detection.boxes import generalized_iou
from tinydet.detection.losses import sigmoid_focal_loss
from tinydet.detection.yolo_losses import binary_cross_entropy
from tinydet.detectors.detector import Canvas, Detector, Outputs
from tinydet.models import classifiers, fcos, retinanet
from tinydet.runtime.graphs import lock

NAMES = tuple(f"fcos_{backbone}_fpn" for backbone in classifiers.NAMES)
RADIUS = 1.5   # strides around a box's centre within which places learn it
NEAR, FAR = 4, 8   # strides that a box's farthest side is away from places of a level: more than the first and less than the second
# What is detected, as torchvision has it.
SELECTION = {"score_threshold": 0.2, "nms_threshold": 0.6, "max_detections": 100, "topk": 1000}


class FCOS(Detector):
  """Outputs are (class logits [B,N,K], sides [B,N,4], centreness logits [B,N,1]). torchvision has places at the upper left corners of their cells,
  and takes for a stride the picture's side over the level's, rounded down; with `exact_strides` it is 2 to the power of the level."""
  sigmoid = False

  def __init__(self, name: str, num_classes: int, norm: str | None = None, seed: int = 0, exact_strides: bool = False,
               channels: int | None = None):
    self.name, self.num_classes, self.norm, self.exact_strides = name, num_classes, norm, exact_strides
    self.network = fcos.build(name, num_classes, norm, seed, channels)
    self.selection = SELECTION
    self._places: dict[Canvas, tuple[Tensor, Tensor]] = {}

  def places(self, canvas: Canvas) -> tuple[Tensor, Tensor]:
    """Places f32 [N,2], x and y in pixels of the canvas, and the stride of their level f32 [N]: 8 to 128, in whose steps sides are counted."""
    if canvas not in self._places:
      found, strides = [], []
      for level, (rows, columns) in zip(anchors.LEVELS, anchors.feature_sizes(*canvas)):
        down, right = (2 ** level,) * 2 if self.exact_strides else (canvas[0] // rows, canvas[1] // columns)
        y, x = np.meshgrid(np.arange(rows) * down, np.arange(columns) * right, indexing="ij")
        found.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full(rows * columns, 2 ** level))
      self._places[canvas] = tuple(Tensor(np.concatenate(part).astype(np.float32)).realize() for part in (found, strides))
    return self._places[canvas]

  def constants(self, canvas: Canvas) -> list[Tensor]: return list(self.places(canvas))

  @property
  def stages(self) -> Mapping[str, tuple[str, ...]]:
    head = "head.classification_head."
    return {"class logits": (f"{head}cls_logits.",), "class head": (f"{head}conv.",)} | self.network.backbone.stages

  def features(self, x: Tensor, layer: str = "backbone") -> list[Tensor]:
    features = self.network.backbone.body.feature_maps(x)
    return self.network.backbone.fpn(features) if layer == "pyramid" else features

  def head(self, features: list[Tensor], layer: str = "backbone") -> Outputs:
    return self.network.heads(features if layer == "pyramid" else self.network.backbone.fpn(features))

  def levels(self, layer: str = "backbone") -> dict[str, int]:
    return {f"P{n}": 2 ** n for n in anchors.LEVELS} if layer == "pyramid" else {f"C{n}": 2 ** n for n in anchors.LEVELS[:3]}

  def losses(self, outputs: Outputs, boxes: Tensor, labels: Tensor, canvas: Canvas) -> dict[str, Tensor]:
    """As in `Detector`: focal loss of all places, 1 - GIoU and cross-entropy of the centreness of those that learn a box, each over the number of
    these in the batch (torchvision `FCOSHead.compute_loss`)."""
    logits, points, strides = outputs[0], *self.places(canvas)
    assigned = assigners.fcos(points, strides, self._limits(strides), boxes, labels, radius=RADIUS)
    at, known = assigned.index.maximum(0), (assigned.index >= 0).contiguous()
    count = known.sum().maximum(1).cast(dtypes.float32)
    label = known.where(labels.gather(1, at), -1).contiguous()
    own = boxes.gather(1, at.unsqueeze(-1).expand(*at.shape, 4)).contiguous()
    focal = sigmoid_focal_loss(logits, label.unsqueeze(-1).eq(Tensor.arange(logits.shape[-1]))).sum() / count
    # places that learn nothing have a box of their own to be compared with, whose GIoU has a gradient that is a number
    found = self._decode(outputs[1], points, strides)
    apart = known.where(1 - generalized_iou(found, known.unsqueeze(-1).where(own, found.detach())), 0).sum() / count
    centre = known.where(binary_cross_entropy(outputs[2].squeeze(-1).contiguous(), assigned.quality), 0).sum() / count
    return {"loss": focal + apart + centre, "classification": focal, "bbox_regression": apart, "bbox_ctrness": centre}

  def _limits(self, strides: Tensor) -> tuple[Tensor, Tensor]:
    """The farthest side of a box is more than the first, f32 [N], and at most the second: here the largest number below FAR strides, as torchvision
    leaves out the bound. The first level takes whatever is nearer, the last one whatever is farther."""
    first, last = 2 ** anchors.LEVELS[0], 2 ** anchors.LEVELS[-1]
    below = float(np.nextafter(np.float32(FAR), np.float32(0)))
    return (strides == first).where(0, strides * NEAR), (strides == last).where(float("inf"), strides * below)

  def _decode(self, sides: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """xyxy [B,N,4] in pixels of distances [B,N,4] in strides."""
    away = sides.float() * strides.reshape(1, -1, 1)
    return (points - away[..., :2]).cat(points + away[..., 2:], dim=-1)

  def candidates(self, outputs: Outputs, canvas: Canvas) -> tuple[Tensor, Tensor]:
    """Scores are the root of class score times centreness."""
    points, strides = (t.to(outputs[0].device) for t in self.places(canvas))
    scores = (outputs[0].float().sigmoid() * outputs[2].float().sigmoid()).sqrt()
    return self.of_classes(scores), self._decode(outputs[1], points, strides)

  def detect(self, outputs: Outputs, canvas: Canvas, sizes: np.ndarray, origins: np.ndarray | None = None, hidden: Tensor | None = None,
             **options: Any) -> postprocess.Detections:
    with lock:
      scores, boxes = self.read(outputs, canvas)
      if hidden is not None: scores = (hidden.to(scores.device) < 0).where(0, scores)
      return postprocess.select(scores, boxes, None, self._level_sizes(canvas), sizes, origins=origins, sigmoid=False, **self.options(options))

  def _level_sizes(self, canvas: Canvas) -> list[int]: return [rows * columns for rows, columns in anchors.feature_sizes(*canvas)]

  def level_of(self, row: int, canvas: Canvas) -> str:
    return f"P{anchors.LEVELS[int(np.searchsorted(np.cumsum(self._level_sizes(canvas)), row, side='right'))]}"

  def freeze(self, trainable_layers: int) -> None: retinanet.freeze(self.network, trainable_layers)

  def assume(self, about: Mapping[str, Any]) -> None:
    super().assume(about)
    self.exact_strides = bool(about.get("exact_strides", False))
    self._places.clear()

  def about(self) -> dict[str, Any]: return super().about() | {"norm": self.norm, "exact_strides": self.exact_strides}

  def init_rule(self, key: str, shape: tuple[int, ...]) -> Any: return fcos.init_rule(self.network, key, shape)


def build(name: str, num_classes: int, **options: Any) -> FCOS:
  """The detector `name`, one of `NAMES`; options are those of `FCOS`."""
  return FCOS(name, num_classes, **options)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int, dict[str, Any]] | None:
  """Name, number of classes and options for `build` of the detector whose tensors have these names and shapes; None if it is no FCOS."""
  if (name := fcos.recognise(shapes)) is None: return None
  frozen = any(key.startswith("backbone.body.") and key.endswith("running_mean") for key in shapes)
  options = {"norm": "frozen" if frozen else "group", "channels": shapes["backbone.fpn.inner_blocks.0.0.weight"][0]}
  return name, shapes["head.classification_head.cls_logits.weight"][0], options
