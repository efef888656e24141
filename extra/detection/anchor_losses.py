"""Losses of the YOLOs with anchors, in float32: darknet's v3 and v4, YOLOv5's and YOLOv7's.

A candidate is an anchor in a cell, N in all, in the order of `yolo.decode_anchors`; it learns one box at most. All functions take the head's `levels`
[B,3*(5+K),h,w], `anchors` f32 [levels,3,2] (w, h in pixels), `boxes` f32 [B,M,4] xyxy pixels, `labels` i32 [B,M], -1 for padding, the `canvas`
(height, width) and the levels' `strides`, and give the terms "box", "objectness" and "classes", each with its gain."""
import math
from collections.abc import Sequence
from typing import NamedTuple
from tinygrad import Tensor, dtypes
from tinygrad.function import function
from tinydet.detection import yolo
from tinydet.detection.assigners import Assigned, best_shape, classification_cost, near_shapes, owner, simota, targets
from tinydet.detection.boxes import iou, similarity
from tinydet.detection.yolo_losses import binary_cross_entropy

IGNORED = 0.7          # IoU with any box above which a candidate that learns none is not told to be background (darknet's cfg files)
LARGEST_DELTA = 5.0    # of a picture's gradient by a box's logits (YOLOv4's cfg: max_delta)
BALANCE = (4.0, 1.0, 0.4)   # weights of the levels' objectness, the finest first (YOLOv5)


class Candidates(NamedTuple):
  """What is fixed of the N candidates, and how many each level has."""
  cells: Tensor     # f32 [2,N], column and row
  strides: Tensor   # f32 [N]
  anchors: Tensor   # f32 [N,2], w and h in pixels
  sizes: tuple[int, ...]


class Gains(NamedTuple):
  """Of the terms of `ratio_losses`, and whether SimOTA chooses among the candidates."""
  box: float = 0.05
  objectness: float = 1.0
  classes: float = 0.5
  simota: bool = False


def candidates(canvas: tuple[int, int], strides: Sequence[int], anchors: Tensor) -> Candidates:
  """The candidates of a head with `anchors` f32 [levels,3,2]."""
  parts = []
  for i, stride in enumerate(strides):
    cells, steps = yolo.cells(canvas, (stride,))
    n = steps.shape[0]
    parts.append((cells.unsqueeze(1).expand(2, 3, n).reshape(2, 3 * n), steps.unsqueeze(0).expand(3, n).reshape(3 * n),
                  anchors[i].unsqueeze(1).expand(3, n, 2).reshape(3 * n, 2)))
  joined = [parts[0][k].cat(*(part[k] for part in parts[1:]), dim=1 if k == 0 else 0).contiguous() for k in range(3)]
  return Candidates(*joined, tuple(part[1].shape[0] for part in parts))


def logits(levels: Sequence[Tensor]) -> Tensor:
  """f32 [B,5+K,N]: x, y, w, h, objectness and classes of all candidates."""
  flat = [x.float().reshape(x.shape[0], 3, x.shape[1] // 3, -1).transpose(1, 2).reshape(x.shape[0], x.shape[1] // 3, -1) for x in levels]
  return flat[0].cat(*flat[1:], dim=2).contiguous()


def darknet_losses(levels: Sequence[Tensor], anchors: Tensor, boxes: Tensor, labels: Tensor, canvas: tuple[int, int], strides: tuple[int, ...],
                   scale_xy: Sequence[float], *, ciou: bool) -> dict[str, Tensor]:
  """YOLOv3's terms (Redmon & Farhadi 2018, section 2), or with `ciou` YOLOv4's: sums over candidates, means over pictures.

  Without, x and y have the cross-entropy with the place in the cell, as darknet hands that error on as the logit's own gradient, and w and h half
  the squared difference of logarithms; all times 2 less the box's share of the canvas."""
  at, x = candidates(canvas, strides, anchors), logits(levels)
  batch, num_classes = x.shape[0], x.shape[1] - 5
  place = x[:, :4]
  if ciou: place = _clipped(place, LARGEST_DELTA / batch)
  scale = _of_levels(scale_xy, at.sizes)
  centre, half = yolo.centre_and_half(place[:, :2], place[:, 2:], at.cells, at.strides, at.anchors.transpose(0, 1), scale)
  found = (centre - half).cat(centre + half, dim=1).transpose(1, 2).contiguous()
  assigned = best_shape(at.cells, at.strides, at.anchors, anchors.reshape(-1, 2), boxes, labels, also=0.213 if ciou else 1.0)
  known, own, classes = _wanted(assigned, at, boxes, labels, num_classes)
  if ciou: terms = {"box": known.where(1 - similarity(known.unsqueeze(-1).where(found, own), own, "ciou"), 0).sum() * 0.07}
  else:
    middle, size = (own[..., :2] + own[..., 2:]).transpose(1, 2) * 0.5, (own[..., 2:] - own[..., :2]).transpose(1, 2)
    weight = 2 - size[:, 0] * size[:, 1] / (canvas[0] * canvas[1])
    off = binary_cross_entropy(place[:, :2], (middle / at.strides - at.cells).contiguous()).sum(1)
    off = off + 0.5 * (place[:, 2:] - (size / at.anchors.transpose(0, 1)).log().contiguous()).square().sum(1)
    terms = {"box": known.where(off * weight, 0).sum()}
  overlap = (labels >= 0).unsqueeze(-1).where(iou(boxes, found.detach()), 0).max(1)
  told = known | (overlap <= IGNORED)
  terms["objectness"] = told.where(binary_cross_entropy(x[:, 4], known.cast(dtypes.float32).contiguous()), 0).sum()
  terms["classes"] = known.unsqueeze(1).where(binary_cross_entropy(x[:, 5:], classes), 0).sum()
  return {name: term / batch for name, term in terms.items()}


def ratio_losses(levels: Sequence[Tensor], anchors: Tensor, boxes: Tensor, labels: Tensor, canvas: tuple[int, int], strides: tuple[int, ...],
                 gains: Gains) -> dict[str, Tensor]:
  """YOLOv5's and v7's terms: of each level the mean over what learns, of objectness over all candidates with the CIoU as what is wanted.

  Of several boxes that YOLOv5's rule gives one candidate it learns the one whose shape is nearest; the family's own program counts each in the first
  and the last term, and the last of them in objectness."""
  at, x = candidates(canvas, strides, anchors), logits(levels)
  batch, num_classes = x.shape[0], x.shape[1] - 5
  centre, half = yolo.centre_and_half(x[:, :2], x[:, 2:4], at.cells, at.strides, at.anchors.transpose(0, 1), None)
  found = (centre - half).cat(centre + half, dim=1).transpose(1, 2).contiguous()
  wanted, worst = near_shapes(at.cells, at.strides, at.anchors, boxes, labels)
  if gains.simota:
    probabilities = (x[:, 5:].sigmoid() * x[:, 4:5].sigmoid()).sqrt().transpose(1, 2).detach().contiguous()
    assigned = simota(at.cells.transpose(0, 1), at.strides, found.detach(), classification_cost(probabilities, labels), boxes, labels, wanted=wanted)
  else:
    index = owner(wanted, wanted.where(-worst, -math.inf).contiguous())
    assigned = Assigned(index, (index >= 0).cast(dtypes.float32))
  known, own, classes = _wanted(assigned, at, boxes, labels, num_classes)
  # What each candidate weighs in the mean of its level.
  share = _of_levels([1 / part.sum().maximum(1).cast(dtypes.float32).contiguous() for part in known.split(list(at.sizes), dim=1)], at.sizes)
  alike = similarity(known.unsqueeze(-1).where(found, own), own, "ciou").contiguous()
  terms = {"box": (known.where(1 - alike, 0) * share).sum() * gains.box}
  told = known.where(alike.detach().maximum(0), 0).contiguous()
  balance = _of_levels([b / (batch * n) for b, n in zip(BALANCE, at.sizes)], at.sizes)
  terms["objectness"] = (binary_cross_entropy(x[:, 4], told) * balance).sum() * (gains.objectness * canvas[0] * canvas[1] / 640 ** 2)
  entropy = known.unsqueeze(1).where(binary_cross_entropy(x[:, 5:], classes), 0).sum(1)
  return terms | {"classes": (entropy * share).sum() * (gains.classes / 80 if num_classes > 1 else 0)}   # the mean over classes, times K / 80


def _wanted(assigned: Assigned, at: Candidates, boxes: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
  """What candidates learn: bool [B,N] whether anything; boxes f32 [B,N,4], the anchor itself where nothing; classes f32 [B,K,N], 1 at the box's."""
  known = assigned.index >= 0
  own, classes = targets(Assigned(assigned.index, known.cast(dtypes.float32)), boxes, labels, num_classes)
  middle, half = (at.cells.transpose(0, 1) + 0.5) * at.strides.unsqueeze(-1), at.anchors * 0.5
  return known, known.unsqueeze(-1).where(own, (middle - half).cat(middle + half, dim=1)).contiguous(), classes.transpose(1, 2).contiguous()


def _of_levels(values: Sequence[Tensor | float], sizes: Sequence[int]) -> Tensor:
  """f32 [N]: each level's value for its candidates."""
  # of a dtype: tinygrad 0.14 adds up what it is to join where the parts are plain numbers
  parts = [(v if isinstance(v, Tensor) else Tensor(float(v), dtype=dtypes.float32)).reshape(1).expand(size) for v, size in zip(values, sizes)]
  return parts[0].cat(*parts[1:]).contiguous()


def _clipped(x: Tensor, largest: float) -> Tensor:
  """`x`, whose gradient is kept within -`largest` to `largest`."""
  return function(lambda x: x * 1, grad_fxn=lambda grad, call: (Tensor(grad).clamp(-largest, largest).uop,))(x)
