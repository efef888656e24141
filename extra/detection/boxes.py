"""Boxes: `xyxy` in pixels everywhere. Tensors may live on any device; leading dimensions broadcast."""
import math
from tinygrad import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # keeps exp() of an early, wild delta from overflowing (torchvision BoxCoder's bbox_xform_clip)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
  """Deltas [...,4] (dx, dy, log dw, log dh) that take `anchors` [...,4] to `boxes` [...,4] (Girshick et al. 2014, appendix C; unit weights).

  Boxes must have an area: a side of 0 encodes to -inf."""
  size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
  center, anchor_center = boxes[..., :2] + 0.5 * size, anchors[..., :2] + 0.5 * anchor_size
  return ((center - anchor_center) / anchor_size).cat((size / anchor_size).log(), dim=-1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
  """Boxes [...,4] that `deltas` [...,4] make of `anchors` [...,4] (broadcast). Log scales are clamped at log(1000/16) (torchvision `BoxCoder`)."""
  anchor_size = anchors[..., 2:] - anchors[..., :2]
  center = deltas[..., :2] * anchor_size + (anchors[..., :2] + 0.5 * anchor_size)
  half = deltas[..., 2:].clamp(max_=MAX_LOG_SCALE).exp() * anchor_size * 0.5
  return (center - half).cat(center + half, dim=-1)


def clip(boxes: Tensor, bottom: float | Tensor, right: float | Tensor, top: float | Tensor = 0, left: float | Tensor = 0) -> Tensor:
  """`boxes` [...,4] cut to the picture: x into [left, right], y into [top, bottom]; tensors must broadcast against [...]."""
  x1, y1, x2, y2 = (boxes[..., i] for i in range(4))
  limits = ((x1, left, right), (y1, top, bottom), (x2, left, right), (y2, top, bottom))
  return Tensor.stack(*(v.maximum(low).minimum(high) for v, low, high in limits), dim=-1)


def area(boxes: Tensor) -> Tensor:
  """Area [...] in square pixels of `boxes` [...,4]."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Tensor, b: Tensor) -> Tensor:
  """Intersection over union [...,N,M] of every box of `a` [...,N,4] with every box of `b` [...,M,4]; 0 where both have no area."""
  a, b = a.unsqueeze(-2), b.unsqueeze(-3)
  sides = (a[..., 2:].minimum(b[..., 2:]) - a[..., :2].maximum(b[..., :2])).maximum(0)
  intersection = sides[..., 0] * sides[..., 1]
  union = area(a) + area(b) - intersection
  return (union > 0).where(intersection / (union > 0).where(union, 1), 0)


def generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
  """GIoU [...] of boxes `a` and `b`, both [...,4], pair by pair (Rezatofighi et al. 2019; torchvision `generalized_box_iou_loss`)."""
  inner = (a[..., 2:].minimum(b[..., 2:]) - a[..., :2].maximum(b[..., :2])).maximum(0)
  outer = a[..., 2:].maximum(b[..., 2:]) - a[..., :2].minimum(b[..., :2])
  intersection, hull = inner[..., 0] * inner[..., 1], outer[..., 0] * outer[..., 1]
  union = area(a) + area(b) - intersection
  return intersection / (union + eps) - (hull - union) / (hull + eps)
