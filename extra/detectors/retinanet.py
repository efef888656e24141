"""RetinaNet (Lin et al. 2017) as a detector: nine anchors a place, focal loss, one of three box losses, one of four ways to say who learns what."""
from collections.abc import Mapping, Sequence
from typing import Any
import numpy as np
from tinygrad import Tensor
from tinydet.detection import anchor_fit, anchors, assigners, postprocess
from tinydet.detection.boxes import decode
from tinydet.detection.losses import detection_losses
from tinydet.detection.matcher import match
from tinydet.detectors.detector import Canvas, Detector, Outputs
from tinydet.models import classifiers, retinanet
from tinydet.weights.weights import select_classes

ASSIGNERS = ("iou", "atss", "tal", "simota")
NAMES = tuple(f"retinanet_{backbone}_fpn{variant}" for backbone in classifiers.NAMES for variant in ("", "_v2"))


class RetinaNet(Detector):
  """Outputs are (cls_logits [B,A,K], bbox_regression [B,A,4]). `exact_strides` puts anchors where the cells are (see `anchors.anchors`),
  `assigner` is one of `ASSIGNERS`, how anchors are given the boxes that they learn."""
  def __init__(self, name: str, num_classes: int, norm: str | None = None, seed: int = 0, box_loss: str = "l1", exact_strides: bool = False,
               channels: int | None = None, assigner: str = "iou"):
    self.assigner = assigner
    self.name, self.num_classes, self.norm, self.box_loss, self.exact_strides = name, num_classes, norm, box_loss, exact_strides
    self.assigner = assigner
    self.network = retinanet.build(name, num_classes, norm, seed, channels)
    self.sizes, self.ratios = anchors.SIZES, anchors.ASPECT_RATIOS
    self._anchors: dict[Canvas, Tensor] = {}

  @property
  def stages(self) -> Mapping[str, tuple[str, ...]]:
    head = "head.classification_head."
    return {"class logits": (f"{head}cls_logits.",), "class head": (f"{head}conv.",)} | self.network.backbone.stages

  def anchors(self, canvas: Canvas) -> Tensor:
    """f32 [A,4] xyxy pixels of the canvas."""
    if canvas not in self._anchors:
      self._anchors[canvas] = Tensor(anchors.anchors(*canvas, self.exact_strides, self.sizes, self.ratios)).realize()
    return self._anchors[canvas]

  def anchor_shapes(self) -> np.ndarray: return anchor_fit.anchor_shapes(self.sizes, self.ratios)

  def fit_anchors(self, shapes: np.ndarray) -> None:
    self.sizes, self.ratios = anchor_fit.fit_levels(shapes)
    self._anchors.clear()

  def constants(self, canvas: Canvas) -> list[Tensor]: return [self.anchors(canvas)]

  def features(self, x: Tensor, layer: str = "backbone") -> list[Tensor]:
    features = self.network.backbone.body.feature_maps(x)
    return self.network.backbone.fpn(features) if layer == "pyramid" else features

  def head(self, features: list[Tensor], layer: str = "backbone") -> Outputs:
    levels = features if layer == "pyramid" else self.network.backbone.fpn(features)
    return self.network.head.classification_head(levels), self.network.head.regression_head(levels)

  def levels(self, layer: str = "backbone") -> dict[str, int]:
    return {f"P{n}": 2 ** n for n in anchors.LEVELS} if layer == "pyramid" else {f"C{n}": 2 ** n for n in anchors.LEVELS[:3]}

  def losses(self, outputs: Outputs, boxes: Tensor, labels: Tensor, canvas: Canvas) -> dict[str, Tensor]:
    classes, matched = self.assigned(outputs, boxes, labels, canvas)
    classification, regression = detection_losses(*outputs, self.anchors(canvas), classes, matched, self.box_loss)
    return {"loss": classification + regression, "classification": classification, "bbox_regression": regression}

  def assigned(self, outputs: Outputs, boxes: Tensor, labels: Tensor, canvas: Canvas) -> tuple[Tensor, Tensor]:
    """Classes i32 [B,A] and boxes f32 [B,A,4] that anchors learn (see `match`), by the assigner: of most overlap (`matcher.py`), ATSS of all nine
    anchors of a place, task alignment as in its paper (13 best, by score times the sixth power of the IoU), or SimOTA."""
    places = self.anchors(canvas)
    if self.assigner == "iou": return match(places, boxes, labels)
    points = ((places[:, :2] + places[:, 2:]) * 0.5).contiguous()
    if self.assigner == "atss":
      found = assigners.atss(points, places, anchors.level_sizes(*canvas), boxes, labels, per_place=anchors.PER_POSITION)
    else:
      scores, predicted = outputs[0].detach().float().sigmoid().contiguous(), decode(outputs[1].detach().float(), places).contiguous()
      if self.assigner == "tal": found = assigners.task_aligned(points, predicted, scores, boxes, labels, topk=13, alpha=1.0, beta=6.0, kind="iou")
      else: found = assigners.simota(points, self._strides(canvas), predicted, assigners.classification_cost(scores, labels), boxes, labels)
    return assigners.learnt(found.index, boxes, labels)

  def _strides(self, canvas: Canvas) -> Tensor:
    """f32 [A], of each anchor's level."""
    parts = [Tensor.full((size,), float(2 ** level)) for level, size in zip(anchors.LEVELS, anchors.level_sizes(*canvas))]
    return parts[0].cat(*parts[1:]).contiguous()

  def candidates(self, outputs: Outputs, canvas: Canvas) -> tuple[Tensor, Tensor]:
    return outputs[0], decode(outputs[1].float(), self.anchors(canvas).to(outputs[1].device))

  def class_scores(self, outputs: Outputs, canvas: Canvas) -> Tensor: return outputs[0]

  def detect(self, outputs: Outputs, canvas: Canvas, sizes: np.ndarray, origins: np.ndarray | None = None, hidden: Tensor | None = None,
             **options: Any) -> postprocess.Detections:
    logits, deltas = outputs   # of the candidates, only the best of each level are decoded
    if hidden is not None: logits = logits + hidden.to(logits.device)
    return postprocess.select(logits, deltas, self.anchors(canvas), anchors.level_sizes(*canvas), sizes, origins=origins, **self.options(options))

  def level_of(self, row: int, canvas: Canvas) -> str:
    return f"P{anchors.LEVELS[int(np.searchsorted(np.cumsum(anchors.level_sizes(*canvas)), row, side='right'))]}"

  def choose(self, labels: Sequence[int | None]) -> None:
    """As in `Detector`, by the weights themselves: of hundreds of classes the others cost nothing then."""
    head, rows = self.network.head.classification_head, self.network.class_rows
    key = "head.classification_head.cls_logits."
    chosen = select_classes({f"{key}{part}": getattr(head.cls_logits, part).numpy() for part in ("weight", "bias")}, rows, labels)
    head.cls_logits.weight, head.cls_logits.bias = (Tensor(chosen[f"{key}{part}"]) for part in ("weight", "bias"))
    head.per_anchor = self.num_classes = self.network.num_classes = len(labels)

  def freeze(self, trainable_layers: int) -> None: retinanet.freeze(self.network, trainable_layers)

  def assume(self, about: Any) -> None:
    super().assume(about)
    self.exact_strides = bool(about.get("exact_strides", False))
    self.sizes, self.ratios = anchor_fit.read_levels(about.get("anchors"))
    self._anchors.clear()

  def about(self) -> dict[str, Any]:
    published = (self.sizes, self.ratios) == (anchors.SIZES, anchors.ASPECT_RATIOS)
    fitted = {} if published else {"anchors": {"sizes": self.sizes, "ratios": self.ratios}}
    return super().about() | {"norm": self.norm, "exact_strides": self.exact_strides} | fitted

  def init_rule(self, key: str, shape: tuple[int, ...]) -> Any: return retinanet.init_rule(self.network, key, shape)


def build(name: str, num_classes: int, **options: Any) -> RetinaNet:
  """The detector `name`, one of `NAMES`; options are those of `RetinaNet`."""
  return RetinaNet(name, num_classes, **options)


def recognise(shapes: Any) -> tuple[str, int, dict[str, Any]] | None:
  """Name, number of classes and options for `build` of the detector whose tensors have these names and shapes; None if it is no RetinaNet."""
  if (name := retinanet.recognise(shapes)) is None: return None
  num_anchors = shapes["head.regression_head.bbox_reg.weight"][0] // 4
  num_classes = shapes["head.classification_head.cls_logits.weight"][0] // num_anchors
  frozen = any(key.startswith("backbone.body.") and key.endswith("running_mean") for key in shapes)
  return name, num_classes, {"norm": "frozen" if frozen else "group", "channels": shapes["backbone.fpn.inner_blocks.0.0.weight"][0]}
