"""Boxes: `xyxy` in pixels everywhere. Tensors may live on any device; leading dimensions broadcast."""
import math
from tinygrad import Tensor
from tinygrad.function import function

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


SIMILARITIES = ("iou", "giou", "diou", "ciou", "siou")


def similarity(a: Tensor, b: Tensor, kind: str = "iou", eps: float = 1e-7) -> Tensor:
  """How alike boxes `a` and `b` are, [...] of [...,4] each, which broadcast: 1 for the same, down to -1 and below.

  "iou"; "giou" less the share of the hull that neither covers (Rezatofighi et al. 2019); "diou" less the squared distance of centres over the hull's
  diagonal; "ciou" also less alpha v for the shape (Zheng et al. 2019; alpha has no gradient); "siou" less angle, distance and shape costs (Gevorgyan
  2022)."""
  (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = ([t[..., i] for i in range(4)] for t in (a, b))
  aw, ah, bw, bh = ax2 - ax1, ay2 - ay1 + eps, bx2 - bx1, by2 - by1 + eps
  shared = (ax2.minimum(bx2) - ax1.maximum(bx1)).maximum(0) * (ay2.minimum(by2) - ay1.maximum(by1)).maximum(0)
  union = aw * ah + bw * bh - shared + eps
  overlap = shared / union
  if kind == "iou": return overlap
  hull_w, hull_h = ax2.maximum(bx2) - ax1.minimum(bx1), ay2.maximum(by2) - ay1.minimum(by1)
  if kind == "giou": return overlap - (hull_w * hull_h + eps - union) / (hull_w * hull_h + eps)
  dx, dy = (bx1 + bx2 - ax1 - ax2) * 0.5, (by1 + by2 - ay1 - ay2) * 0.5
  if kind == "siou": return overlap - _siou_costs(dx, dy, hull_w, hull_h, (aw + eps, ah), (bw + eps, bh)) * 0.5
  apart = overlap - (dx * dx + dy * dy) / (hull_w * hull_w + hull_h * hull_h + eps)
  if kind == "diou": return apart
  slopes = [_arctan(w / h) for w, h in ((bw, bh), (aw, ah))]
  if a.shape != b.shape: slopes = [slope.contiguous() for slope in slopes]   # of each box once, not of each pair
  shape = 4 / math.pi ** 2 * (slopes[0] - slopes[1]).square()
  return apart - (shape / (shape - overlap + (1 + eps))).detach() * shape


def _siou_costs(dx: Tensor, dy: Tensor, hull_w: Tensor, hull_h: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
  """Distance and shape costs of SIoU: `dx`, `dy` between the centres, sides of the hull, and (w, h) of either box."""
  away = (dx * dx + dy * dy + 1e-24).sqrt()
  sine = (dx.abs() / away).minimum(dy.abs() / away)   # of the angle to the nearer axis
  angle = 2 * sine * (1 - sine * sine).maximum(0).sqrt()
  distance = sum(1 - ((angle - 2) * (d / side).square()).exp() for d, side in ((dx, hull_w), (dy, hull_h)))
  shape = sum((1 - (-(p - q).abs() / p.maximum(q)).exp()) ** 4 for p, q in zip(a, b))
  return distance + shape


def _arctan(x: Tensor) -> Tensor:
  """The arc tangent, with its gradient in closed form."""
  return function(lambda x: x.atan(), grad_fxn=lambda grad, call: ((Tensor(grad) / (1 + Tensor(call.src[1]).square())).uop,))(x)
