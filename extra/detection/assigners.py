"""Assigners: which cell of a single-stage head learns which box. Pure functions of tensors in fixed shapes, for use inside a captured step.

All take boxes f32 [B,M,4] xyxy pixels and labels i32 [B,M], -1 where a box is padding, and give `Assigned`. M x N pairs of box and cell are held as
f32 [B,M,N], three or four such arrays at a time. Among equals the first cell and the first box win, everywhere."""
import math
from collections.abc import Sequence
from typing import NamedTuple
from tinygrad import Tensor, dtypes
from tinydet.detection.boxes import area, iou, similarity

MANY = 64         # times as many values as are looked for: worth blocks
CANDIDATES = 10   # predictions whose IoU with a box, added up, is how many learn it (SimOTA)


class Assigned(NamedTuple):
  """What each of N cells learns."""
  index: Tensor    # i32 [B,N], the box, -1 for none
  quality: Tensor  # f32 [B,N], how good a match it is, as the assigner has it; 0 for none


def task_aligned(points: Tensor, predicted: Tensor, scores: Tensor, boxes: Tensor, labels: Tensor, *, topk: int = 10, alpha: float = 0.5,
                 beta: float = 6.0, kind: str = "ciou", last_topk: int = 0, smallest: float = 0.0) -> Assigned:
  """Task alignment learning (Feng et al. 2021, section 3.3): t = score^alpha IoU^beta of the cells whose centre is inside a box; its `topk` best
  learn it, and of several boxes a cell learns the one that it overlaps most. The quality is t, scaled so that a box's best has its best IoU.

  Args: `points` f32 [N,2] cell centres in pixels; `predicted` f32 [B,N,4] xyxy pixels and `scores` f32 [B,N,K] in 0..1, both without gradient; `kind`
  of IoU (see `boxes.similarity`), of which negative values count as 0. With `last_topk` only so many of a box's cells stay in the end, and sides
  below `smallest` pixels count as that long for what is inside (YOLO26's one-to-one head: 1 and 16)."""
  inside = (_margin(points, _widened(boxes, smallest)) > 1e-9) & (labels >= 0).unsqueeze(-1)
  overlap = inside.where(similarity(boxes.unsqueeze(2), predicted.unsqueeze(1), kind).maximum(0), -1).contiguous()   # a box outside owns nothing
  of_class = scores.transpose(1, 2).contiguous().gather(1, labels.maximum(0).unsqueeze(-1).expand(*labels.shape, scores.shape[1]))
  aligned = inside.where(of_class ** alpha * overlap.maximum(0) ** beta, -1).contiguous()
  chosen = largest(aligned, topk) & inside
  index = owner(chosen, overlap)
  if last_topk:
    owned = _owned(index, boxes.shape[1])
    index = (largest(owned.where(aligned, -1).contiguous(), last_topk) & owned).any(1).where(index, -1).contiguous()
  owned = _owned(index, boxes.shape[1])
  scale = owned.where(overlap, 0).max(2) / (owned.where(aligned, 0).max(2) + 1e-9)
  return Assigned(index, owned.where(aligned * scale.contiguous().unsqueeze(-1), 0).sum(1).contiguous())


def atss(points: Tensor, anchors: Tensor, level_sizes: Sequence[int], boxes: Tensor, labels: Tensor, *, topk: int = 9, unbiased: bool = True,
         yolov6: bool = False, per_place: int = 1) -> Assigned:
  """Adaptive training sample selection (Zhang et al. 2019, section 3.3): a box's candidates are on each level the `topk` anchors with the nearest
  centres; those learn it that overlap it by mean + standard deviation of the candidates' IoUs, with their centre inside. Of several boxes an anchor
  learns the one that it overlaps most. The quality is 1.

  Args: `points` f32 [N,2], centres, and `anchors` f32 [N,4] xyxy, both in pixels, level by level; `level_sizes` how many each level has; `unbiased`:
  the deviation divides by n - 1. Anchors of the paper have 8 strides a side, YOLOv6's 5; `yolov6`: only an IoU above the threshold is enough, and an
  anchor that two boxes want goes to the one that it overlaps most, be it a third. With `per_place` anchors at each place, next to one another, all of
  the `topk` nearest places are candidates."""
  valid, overlap = (labels >= 0).unsqueeze(-1), iou(boxes, anchors).contiguous()
  middle, places = (boxes[..., :2] + boxes[..., 2:]) * 0.5, [size // per_place for size in level_sizes]
  away = (middle.unsqueeze(2) - points[::per_place]).square().sum(-1).contiguous()   # [B,M,N / per_place]
  near = [largest(-level, min(topk, size)) for level, size in zip(away.split(places, dim=2), places)]
  candidate = near[0].cat(*near[1:], dim=2).contiguous()
  if per_place > 1: candidate = candidate.unsqueeze(-1).expand(*candidate.shape, per_place).reshape(overlap.shape).contiguous()
  count = sum(min(topk, size) for size in places) * per_place
  mean = candidate.where(overlap, 0).sum(2, keepdim=True) / count
  spread = (candidate.where((overlap - mean.contiguous()).square(), 0).sum(2, keepdim=True) / (count - unbiased)).sqrt()
  threshold = (mean + spread).contiguous()
  enough = overlap > threshold if yolov6 else overlap >= threshold
  wanted = (candidate & enough & (_margin(points, boxes) > 1e-9) & valid).contiguous()
  index = owner(wanted, (valid if yolov6 else wanted).where(overlap, -1).contiguous())
  return Assigned(index, (index >= 0).cast(dtypes.float32))


def fcos(points: Tensor, strides: Tensor, limits: tuple[Tensor, Tensor], boxes: Tensor, labels: Tensor, *, radius: float = 0.0) -> Assigned:
  """FCOS (Tian et al. 2019, section 3.2): a cell learns the smallest box that its centre is inside of and whose farthest side is its level's
  business. The quality is the centreness.

  Args: `points` f32 [N,2] in pixels; `strides` f32 [N]; `limits` f32 [N] each: the farthest side is more than the first and at most the second;
  `radius` > 0: the point is also within so many strides of the box's centre."""
  sides = _sides(points, boxes)
  nearest, farthest = sides[0], sides[0]
  for side in sides[1:]: nearest, farthest = nearest.minimum(side), farthest.maximum(side)
  wanted = (nearest > 0) & (farthest > limits[0]) & (farthest <= limits[1]) & (labels >= 0).unsqueeze(-1)
  if radius: wanted = wanted & _central(points, strides, boxes, radius)
  size = area(boxes).unsqueeze(-1)
  index = owner(wanted, wanted.where(-size, -float("inf")).contiguous())
  left, top, right, bottom = (_own(side, index) for side in sides)
  across, down = ((a.minimum(b) / a.maximum(b).maximum(1e-9)).maximum(0) for a, b in ((left, right), (top, bottom)))
  return Assigned(index, (index >= 0).where((across * down).sqrt(), 0).contiguous())


def simota(points: Tensor, strides: Tensor, predicted: Tensor, cost: Tensor, boxes: Tensor, labels: Tensor, *, radius: float = 1.5,
           wanted: Tensor | None = None) -> Assigned:
  """SimOTA (Ge et al. 2021, section 2.3): each box takes the cells of lowest cost, as many as the ten best IoUs among the candidates add up to, at
  least one; of several boxes a cell learns the one of lowest cost. Candidates are the cells within `radius` strides of the centre of any box. The
  quality is the IoU of the prediction.

  Args: `points` f32 [N,2] and `strides` f32 [N]; `predicted` f32 [B,N,4] xyxy pixels; `cost` f32 [B,M,N] of classification (see
  `classification_cost`), to which 3 (-log IoU) and a million where the cell is outside the box's own radius are added. With `wanted` bool [B,M,N]
  candidates are the cells that any box wants, none is outside, and points are not looked at (YOLOv7)."""
  valid = (labels >= 0).unsqueeze(-1)
  central = ((_central(points, strides, boxes, radius) if wanted is None else wanted) & valid).contiguous()
  candidate = (central.any(1, keepdim=True) & valid).contiguous()
  overlap = candidate.where(similarity(boxes.unsqueeze(2), predicted.unsqueeze(1), "iou"), 0).contiguous()
  if wanted is None: cost = cost + central.where(0, 1e6)
  total = candidate.where(cost - 3 * (overlap + 1e-8).log(), float("inf")).contiguous()
  count = largest(overlap, CANDIDATES).where(overlap, 0).sum(2, keepdim=True).cast(dtypes.int32).maximum(1)
  index = owner(largest(-total, CANDIDATES, count.contiguous()) & candidate, -total)
  return Assigned(index, (index >= 0).where(_own(overlap, index), 0).contiguous())


def classification_cost(probabilities: Tensor, labels: Tensor) -> Tensor:
  """f32 [B,M,N]: the cross-entropy, over all classes, of `probabilities` f32 [B,N,K] with each box's class alone (labels i32 [B,M])."""
  p, q = (x.maximum(1e-45).log().maximum(-100) for x in (probabilities, 1 - probabilities))
  others = -q.sum(2).contiguous()
  change = (q - p).transpose(1, 2).contiguous()
  return others.unsqueeze(1) + change.gather(1, labels.maximum(0).unsqueeze(-1).expand(*labels.shape, p.shape[1]))


def near_shapes(cells: Tensor, strides: Tensor, anchors: Tensor, boxes: Tensor, labels: Tensor, *, limit: float = 4.0) -> tuple[Tensor, Tensor]:
  """YOLOv5's rule: bool [B,M,N], which anchors may learn which box, and f32 [B,M,N], how many times longer or shorter than the box its worse side is.

  That is less than `limit`, and the cell is that of the box's centre, or its neighbour beside, above or below that is nearest to the centre.

  Args: `cells` f32 [2,N], column and row of each anchor's cell, `strides` f32 [N], `anchors` f32 [N,2], w and h in pixels."""
  away, own = _from_centre(cells, strides, boxes)
  size = (boxes[..., 2:] - boxes[..., :2]).unsqueeze(2)
  ratios = [(size[..., i] / anchors[:, i]) for i in range(2)]
  worst = ratios[0].maximum(1 / ratios[0]).maximum(ratios[1].maximum(1 / ratios[1])).contiguous()
  near = (own[0] & (away[1] < 1)) | (own[1] & (away[0] < 1))
  return (near & (worst < limit) & (labels >= 0).unsqueeze(-1)).contiguous(), worst


def best_shape(cells: Tensor, strides: Tensor, anchors: Tensor, shapes: Tensor, boxes: Tensor, labels: Tensor, *, also: float = 1.0) -> Assigned:
  """darknet's rule (Redmon & Farhadi 2018, section 2.1): in the cell of its centre the anchor learns a box whose shape is most alike, that is, whose
  IoU with it about one centre is the largest of all `shapes`; and every other anchor of more than `also` (YOLOv4: 0.213). Of several boxes an anchor
  learns the one most alike. The quality is 1.

  Args: as `near_shapes`; `shapes` f32 [A,2] are those of all levels, of which `anchors` has one for each candidate."""
  size = (boxes[..., 2:] - boxes[..., :2]).unsqueeze(2)
  def alike(shape: Tensor) -> Tensor:
    shared = size[..., 0].minimum(shape[:, 0]) * size[..., 1].minimum(shape[:, 1])
    return shared / (size[..., 0] * size[..., 1] + shape[:, 0] * shape[:, 1] - shared)
  _, own = _from_centre(cells, strides, boxes)
  best = shapes[alike(shapes).contiguous().argmax(-1)].contiguous().unsqueeze(2)   # [B,M,1,2]; two levels may have it
  wanted = ((best == anchors).all(-1) | (alike(anchors) > also)) & own[0] & own[1] & (labels >= 0).unsqueeze(-1)
  index = owner(wanted.contiguous(), wanted.where(alike(anchors), -1).contiguous())
  return Assigned(index, (index >= 0).cast(dtypes.float32))


def learnt(index: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
  """The labels i32 [B,N] of the boxes that cells learn, -1 for none, and the boxes f32 [B,N,4], 0 where none, of `Assigned.index`."""
  at, known = index.maximum(0), index >= 0
  own = boxes.gather(1, at.unsqueeze(-1).expand(*at.shape, 4))
  return known.where(labels.gather(1, at), -1).cast(dtypes.int32).contiguous(), known.unsqueeze(-1).where(own, 0).contiguous()


def targets(assigned: Assigned, boxes: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
  """What cells learn: boxes f32 [B,N,4], 0 where none, and scores f32 [B,N,K], the quality at the box's class."""
  label, own = learnt(assigned.index, boxes, labels)
  return own, (label.unsqueeze(-1) == Tensor.arange(num_classes)).where(assigned.quality.unsqueeze(-1), 0).contiguous()


def largest(values: Tensor, k: int, count: Tensor | None = None) -> Tensor:
  """bool [...,n]: the `k` largest of `values` f32 [...,n], the earlier among equals; with `count` i32 [...,1], 1 to `k`, only so many.

  In `k` rounds of a maximum over integers that hold value and place: a kernel each, where a sort takes hundreds. Of many values only the `k` blocks
  are gone through whose own maxima are the largest, which have all that is looked for."""
  n = values.shape[-1]
  bits = values.bitcast(dtypes.int32)
  ordered = (bits < 0).where(-(bits & 0x7fffffff), bits).bitcast(dtypes.uint32).bitwise_xor(1 << 31)
  keys = ordered.cast(dtypes.uint64) * (1 << 32) + (n - Tensor.arange(n)).cast(dtypes.uint64)
  few = keys
  if k > 2 and n >= MANY * k:
    side = math.isqrt(n // k)   # of a block: as many blocks as values in `k` of them
    blocks = -(-n // side)
    parts = keys.pad((*[None] * (keys.ndim - 1), (0, blocks * side - n))).reshape(*keys.shape[:-1], blocks, side)
    best = _falling(parts.max(-1).contiguous(), k)
    block = (n - best[0].cat(*best[1:], dim=-1).bitwise_and(0xffffffff).cast(dtypes.int32)) // side   # a key's lower half tells its place
    few = parts.gather(-2, block.contiguous().unsqueeze(-1).expand(*block.shape, side)).reshape(*block.shape[:-1], k * side).contiguous()
  kept, *lower = _falling(few, min(k, n))
  for i, bound in enumerate(lower, 1): kept = bound if count is None else (count > i).where(bound, kept).contiguous()
  return keys >= kept


def _falling(keys: Tensor, k: int) -> list[Tensor]:
  """The `k` largest of unlike integers [...,n], the largest first, [...,1] each."""
  bounds: list[Tensor] = []
  for _ in range(k): bounds.append((keys if not bounds else (keys < bounds[-1]).where(keys, 0)).max(-1, keepdim=True).contiguous())
  return bounds


def owner(wanted: Tensor, preference: Tensor) -> Tensor:
  """i32 [B,N]: the box that each cell learns, -1 for none. A cell that several want, bool [B,M,N], learns the one of highest `preference` f32
  [B,M,N] of all boxes, in memory: equality is asked of it."""
  boxes = wanted.shape[1]
  number = Tensor.arange(boxes).reshape(1, boxes, 1)
  count, only = wanted.sum(1, dtype=dtypes.int32), wanted.where(number, -1).max(1)
  preferred = (preference == preference.max(1, keepdim=True).contiguous()).where(number, boxes).min(1)
  return (count > 1).where(preferred, only).cast(dtypes.int32).contiguous()


def _owned(index: Tensor, boxes: int) -> Tensor: return index.unsqueeze(1) == Tensor.arange(boxes).reshape(1, boxes, 1)


def _own(values: Tensor, index: Tensor) -> Tensor:
  """[B,N] of `values` [B,M,N]: those of each cell's own box, or of the first."""
  return values.gather(1, index.maximum(0).unsqueeze(1)).squeeze(1)


def _sides(points: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
  """Distances [B,M,N] from `points` [N,2] to the left, upper, right and lower edge of `boxes` [B,M,4]."""
  x, y, (x1, y1, x2, y2) = points[:, 0], points[:, 1], (boxes[..., i:i + 1] for i in range(4))
  return x - x1, y - y1, x2 - x, y2 - y


def _margin(points: Tensor, boxes: Tensor) -> Tensor:
  """[B,M,N]: how far inside a box a point is, negative outside."""
  left, top, right, bottom = _sides(points, boxes)
  return left.minimum(right).minimum(top.minimum(bottom))


def _widened(boxes: Tensor, smallest: float) -> Tensor:
  """`boxes` whose sides are at least `smallest`, about the same centre."""
  if not smallest: return boxes
  middle, half = (boxes[..., :2] + boxes[..., 2:]) * 0.5, ((boxes[..., 2:] - boxes[..., :2]) * 0.5).maximum(smallest / 2)
  return (middle - half).cat(middle + half, dim=-1).contiguous()


def _from_centre(cells: Tensor, strides: Tensor, boxes: Tensor) -> tuple[list[Tensor], list[Tensor]]:
  """Along x and y, [B,M,N] each: how many strides a box's centre is from that of a cell of `cells` [2,N], and whether it is in that column or row."""
  middle = ((boxes[..., :2] + boxes[..., 2:]) * 0.5).unsqueeze(2)
  places = [middle[..., i] / strides for i in range(2)]
  return [(place - cells[i] - 0.5).abs() for i, place in enumerate(places)], [place.floor() == cells[i] for i, place in enumerate(places)]


def _central(points: Tensor, strides: Tensor, boxes: Tensor, radius: float) -> Tensor:
  """bool [B,M,N]: whether a point is less than `radius` of its strides from a box's centre, along both axes."""
  middle = (boxes[..., :2] + boxes[..., 2:]) * 0.5
  x, y = ((points[:, i] - middle[..., i:i + 1]).abs() for i in range(2))
  return x.maximum(y) < radius * strides
