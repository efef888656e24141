"""From a YOLO head's outputs to boxes and scores of all candidates, and to detections.

A candidate is a cell of a level, or an anchor there. Levels come one after the other, the finest first; in a level anchors are slowest, then rows,
then columns. Boxes are xyxy in pixels of the canvas, and may reach over its edge."""
from collections.abc import Sequence
import numpy as np
from tinygrad import Tensor, dtypes
from tinydet.detection import postprocess
from tinydet.detection.postprocess import Detections


def cells(canvas: tuple[int, int], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
  """Column and row f32 [2,N] of each cell of a canvas (height, width), and its level's stride f32 [N]."""
  places, steps = [], []
  for stride in strides:
    rows, columns = canvas[0] // stride, canvas[1] // stride
    n = Tensor.arange(rows * columns)
    places.append(Tensor.stack(n % columns, n // columns).cast(dtypes.float32))
    steps.append(Tensor.full((rows * columns,), float(stride)))
  return places[0].cat(*places[1:], dim=1), steps[0].cat(*steps[1:])


def expected_sides(distribution: Tensor, bins: int) -> Tensor:
  """[B,4*bins,N] logits over 0, 1, ... strides -> the mean f32 [B,4,N] of each side's distribution (DFL, Li et al. 2020)."""
  batch, _, n = distribution.shape
  weights = distribution.float().reshape(batch, 4, bins, n).softmax(2)
  return (weights * Tensor.arange(bins).cast(dtypes.float32).reshape(1, 1, bins, 1)).sum(2)


def decode_sides(sides: Tensor, canvas: tuple[int, int], strides: Sequence[int]) -> Tensor:
  """Distances [B,4,N] in strides from a cell's centre to the left, upper, right and lower edge -> boxes f32 [B,N,4]."""
  places, steps = cells(canvas, strides)
  centre, sides = (places + 0.5).unsqueeze(0), sides.float()
  return ((centre - sides[:, :2]).cat(centre + sides[:, 2:], dim=1) * steps.reshape(1, 1, -1)).transpose(1, 2)


def decode_anchors(levels: Sequence[Tensor], anchors: Tensor, strides: Sequence[int],
                   scale_xy: Sequence[float] | None = None) -> tuple[Tensor, Tensor, Tensor]:
  """Levels [B,3*(5+K),h,w] and their anchors f32 [levels,3,2] (w, h in pixels) -> boxes f32 [B,N,4], objectness f32 [B,N], scores f32 [B,N,K].

  With `scale_xy` a for each level darknet's way: centre (a sigmoid - (a - 1) / 2 + cell) stride, side anchor exp. Without, YOLOv5's and v7's:
  centre (2 sigmoid - 1/2 + cell) stride, side anchor (2 sigmoid)^2. A score is objectness times the class's probability."""
  scales = [None] * len(levels) if scale_xy is None else scale_xy
  parts = [_decode_level(x.float(), anchors[i], stride, scale) for i, (x, stride, scale) in enumerate(zip(levels, strides, scales))]
  boxes, objectness, scores = (part[0].cat(*part[1:], dim=1).contiguous() for part in zip(*parts))
  return boxes, objectness.squeeze(-1), scores


def _decode_level(x: Tensor, anchors: Tensor, stride: int, scale_xy: float | None) -> tuple[Tensor, Tensor, Tensor]:
  """Of one level and its anchors [3,2]: boxes [B,n,4], objectness [B,n,1] and scores [B,n,K]."""
  batch, channels, rows, columns = x.shape
  x = x.reshape(batch, 3, channels // 3, rows, columns)
  def flat(values: Tensor) -> Tensor: return values.permute(0, 1, 3, 4, 2).reshape(batch, 3 * rows * columns, -1)
  cell, size = cells((rows, columns), (1,))[0].reshape(1, 1, 2, rows, columns), anchors.reshape(1, 3, 2, 1, 1)
  centre, half = centre_and_half(x[:, :, :2], x[:, :, 2:4], cell, stride, size, scale_xy)
  present = x[:, :, 4:5].sigmoid()
  return flat((centre - half).cat(centre + half, dim=2)), flat(present), flat(x[:, :, 5:].sigmoid() * present)


def centre_and_half(xy: Tensor, wh: Tensor, cell: Tensor, stride: Tensor | float, anchor: Tensor,
                    scale_xy: Tensor | float | None) -> tuple[Tensor, Tensor]:
  """Centre and half the sides, in pixels, that the logits `xy` and `wh` say of an anchor (w, h in pixels) in a cell; see `decode_anchors`."""
  a = 2.0 if scale_xy is None else scale_xy
  size = (wh.sigmoid() * 2).square() if scale_xy is None else wh.exp()
  return (xy.sigmoid() * a - (a - 1) / 2 + cell) * stride, size * anchor * 0.5


def best_pairs(boxes: Tensor, scores: Tensor, count: int, threshold: float = -1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
  """The one-to-one heads' selection, without NMS: of the `count` candidates with the best class score the `count` best (candidate, class) pairs.

  `boxes` f32 [B,N,4], `scores` f32 [B,N,K] -> boxes [B,D,4], scores [B,D], labels i32 [B,D], candidates i32 [B,D], best first, the earlier among
  equals; D is `count` or N, whichever is less. Pairs whose score is not above `threshold` come last, with score 0 and label -1."""
  batch, n, classes = scores.shape
  count = min(count, n)
  rows = postprocess._largest_keys(postprocess._ordered_keys(scores.max(-1), threshold).unsqueeze(1), count)[:, 0].contiguous()
  of_rows = scores.gather(1, rows.unsqueeze(-1).expand(batch, count, classes)).reshape(batch, 1, count * classes).contiguous()
  keys = postprocess._ordered_keys(of_rows, threshold).contiguous()
  pairs = postprocess._largest_keys(keys, count)[:, 0].contiguous()
  key = keys[:, 0].gather(1, pairs).contiguous()
  position = Tensor.arange(count)
  later, earlier = key.unsqueeze(2), key.unsqueeze(1)
  before = (earlier > later) | ((earlier == later) & (position.reshape(1, 1, count) < position.reshape(1, count, 1)))
  rank = before.sum(-1, dtype=dtypes.int32).contiguous()
  order = (rank.unsqueeze(1) == position.reshape(1, count, 1)).where(position.reshape(1, 1, count), 0).sum(-1, dtype=dtypes.int32).contiguous()
  pairs, valid = pairs.gather(1, order).contiguous(), key.gather(1, order) > 0
  cell = rows.gather(1, pairs // classes).contiguous()
  found = of_rows[:, 0].gather(1, pairs)
  return (boxes.gather(1, cell.unsqueeze(-1).expand(batch, count, 4)).contiguous(), valid.where(found, 0).contiguous(),
          valid.where(pairs % classes, -1).cast(dtypes.int32).contiguous(), cell.cast(dtypes.int32).contiguous())


def best(boxes: Tensor, scores: Tensor, count: int, threshold: float) -> Detections:
  """Detections of a one-to-one head: what `best_pairs` gives, as numpy arrays."""
  Tensor.realize(*(pairs := best_pairs(boxes.float(), scores.float(), count, threshold)))
  found_boxes, found_scores, labels, candidates = (t.numpy() for t in pairs)
  counts, more = (labels >= 0).sum(1).astype(np.int32), ((0, 0), (0, count - labels.shape[1]))
  there = np.pad(labels >= 0, more)
  boxes, labels = np.pad(found_boxes, (*more, (0, 0))) * there[..., None], np.pad(labels, more, constant_values=-1)
  return Detections(boxes, np.pad(found_scores, more), labels, counts, np.where(there, np.pad(candidates, more), -1).astype(np.int32))
