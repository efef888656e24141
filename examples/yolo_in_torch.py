"""YOLOv8n in plain torch, for `bench_yolo.py` to measure against: forward pass, loss, and what becomes of its outputs. Only that program imports
it: torch is no requirement of this package."""
import math
from collections.abc import Callable
import numpy as np
import torch
from torch.nn import functional as F

STRIDES, BINS = (8, 16, 32), 16


def forward(x: torch.Tensor, w: dict[str, torch.Tensor], conv: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
  """YOLOv8n's box and class logits [B,64,N] and [B,K,N]; `conv(x, key, stride)` is a convolution with what follows it."""
  def c2f(x: torch.Tensor, key: str, shortcut: bool, depth: int) -> torch.Tensor:
    parts = list(conv(x, f"{key}.cv1").chunk(2, 1))
    for i in range(depth):
      y = conv(conv(parts[-1], f"{key}.m.{i}.cv1"), f"{key}.m.{i}.cv2")
      parts.append(parts[-1] + y if shortcut else y)
    return conv(torch.cat(parts, 1), f"{key}.cv2")

  def branch(x: torch.Tensor, key: str) -> torch.Tensor:
    return F.conv2d(conv(conv(x, f"{key}.0"), f"{key}.1"), w[f"{key}.2.weight"], w[f"{key}.2.bias"])

  x = c2f(conv(conv(x, "model.0", 2), "model.1", 2), "model.2", True, 1)
  p3 = c2f(conv(x, "model.3", 2), "model.4", True, 2)
  p4 = c2f(conv(p3, "model.5", 2), "model.6", True, 2)
  pooled = [conv(c2f(conv(p4, "model.7", 2), "model.8", True, 1), "model.9.cv1")]
  for _ in range(3): pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
  p5 = conv(torch.cat(pooled, 1), "model.9.cv2")
  p4 = c2f(torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1), "model.12", False, 1)
  n3 = c2f(torch.cat([F.interpolate(p4, scale_factor=2.0), p3], 1), "model.15", False, 1)
  n4 = c2f(torch.cat([conv(n3, "model.16", 2), p4], 1), "model.18", False, 1)
  n5 = c2f(torch.cat([conv(n4, "model.19", 2), p5], 1), "model.21", False, 1)
  return [torch.cat([branch(n, f"model.22.{kind}.{i}").flatten(2) for i, n in enumerate((n3, n4, n5))], 2) for kind in ("cv2", "cv3")]


def decoded(box: torch.Tensor, side: int) -> tuple[torch.Tensor, ...]:
  """Of a head's box logits on square pictures: cells' centres [N,2] in strides, strides [N,1], logits [B,N,4,bins], boxes [B,N,4] in strides."""
  batch, _, n = box.shape
  grids = [torch.cartesian_prod(torch.arange(side // s), torch.arange(side // s)).flip(1) + 0.5 for s in STRIDES]
  centre, stride = torch.cat(grids), torch.cat([torch.full((len(grid), 1), float(s)) for s, grid in zip(STRIDES, grids)])
  sides = box.view(batch, 4, BINS, n).permute(0, 3, 1, 2)
  mean = sides.softmax(3) @ torch.arange(BINS).float()
  return centre, stride, sides, torch.cat([centre - mean[..., :2], centre + mean[..., 2:]], -1)


def detections(box: torch.Tensor, classes: torch.Tensor, side: int, score_threshold: float, nms_threshold: float, most: int) -> list[torch.Tensor]:
  """Rows x1, y1, x2, y2, score, class [n,6] of each picture, best first: all pairs of cell and class above a threshold, after greedy NMS by class."""
  _, stride, _, found = decoded(box, side)
  results = []
  for boxes, scores in zip(found * stride, classes.sigmoid().transpose(1, 2)):
    cell, label = (scores > score_threshold).nonzero(as_tuple=True)
    best, order = scores[cell, label].sort(descending=True)
    corners, label = boxes[cell[order]], label[order]
    apart = corners + label[:, None] * (8.0 * side)   # boxes of other classes never overlap
    area = (apart[:, 2:] - apart[:, :2]).prod(1)
    shared = (torch.minimum(apart[:, None, 2:], apart[:, 2:]) - torch.maximum(apart[:, None, :2], apart[:, :2])).clamp(0).prod(2)
    over = (shared / (area[:, None] + area - shared) > nms_threshold).triu(1).numpy()
    kept = np.ones(len(over), bool)
    for i in range(len(over)):
      if kept[i]: kept &= ~over[i]
    rows = torch.cat([corners, best[:, None], label[:, None].float()], 1)
    results.append(rows[torch.from_numpy(kept)][:most])
  return results


def loss(box: torch.Tensor, classes: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, side: int) -> torch.Tensor:
  """YOLOv8's loss of square pictures: task alignment (10 best, score^0.5 CIoU^6); CIoU 7.5, cross-entropy 0.5, distribution focal 1.5."""
  batch, _, n = box.shape
  centre, stride, sides, found = decoded(box, side)
  with torch.no_grad():
    points = centre * stride
    margin = torch.cat([points - boxes[:, :, None, :2], boxes[:, :, None, 2:] - points], -1).amin(-1)
    inside = (margin > 1e-9) & (labels >= 0)[..., None]
    overlap = ciou(boxes[:, :, None], (found * stride)[:, None]).clamp(0) * inside
    score = classes.sigmoid().gather(1, labels.clamp(0)[..., None].expand(-1, -1, n))
    aligned = score.sqrt() * overlap ** 6 * inside
    wanted = torch.zeros_like(inside).scatter_(2, aligned.topk(10, 2).indices, True) & inside
    first = F.one_hot(overlap.argmax(1), boxes.shape[1]).transpose(1, 2).bool()
    wanted = torch.where(wanted.sum(1, keepdim=True) > 1, first, wanted)
    scale = (overlap * wanted).amax(2, keepdim=True) / ((aligned * wanted).amax(2, keepdim=True) + 1e-9)
    quality, known, index = (aligned * wanted * scale).amax(1), wanted.any(1), wanted.int().argmax(1)
    own = boxes.gather(1, index[..., None].expand(-1, -1, 4)) / stride
    goal = F.one_hot(labels.clamp(0).gather(1, index), classes.shape[1]) * quality[..., None]
    total = quality.sum().clamp(1)
  weight = quality[known]
  terms = 7.5 * ((1 - ciou(found[known], own[known])) * weight).sum()
  terms = terms + 0.5 * F.binary_cross_entropy_with_logits(classes.transpose(1, 2), goal.float(), reduction="sum")
  place = torch.cat([centre - own[..., :2], own[..., 2:] - centre], -1).clamp(0, BINS - 1.01)[known]
  low, logits = place.long(), sides[known].flatten(0, 1)
  near = [F.cross_entropy(logits, bin_.flatten(), reduction="none").view(place.shape) for bin_ in (low, low + 1)]
  share = place - low
  return (terms + 1.5 * ((near[0] * (1 - share) + near[1] * share).mean(-1) * weight).sum()) / total * batch


def ciou(a: torch.Tensor, b: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
  """CIoU of boxes [...,4] (Zheng et al. 2019)."""
  low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
  (aw, ah), (bw, bh) = ((t[..., 2:] - t[..., :2]).unbind(-1) for t in (a, b))
  shared = (high - low).clamp(0).prod(-1)
  iou = shared / (aw * ah + bw * bh - shared + eps)
  hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).square().sum(-1) + eps
  away = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(-1) / 4
  shape = 4 / math.pi ** 2 * (torch.atan(bw / (bh + eps)) - torch.atan(aw / (ah + eps))).square()
  with torch.no_grad(): alpha = shape / (shape - iou + 1 + eps)
  return iou - away / hull - alpha * shape
