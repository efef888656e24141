"""Looking at a picture more than once, mirrored and larger, and making one answer of all that was found. Numpy and Pillow only."""
from collections.abc import Sequence
import numpy as np
from PIL import Image
from tinydet.detection.postprocess import Detections

ONE = ((1.0, False),)   # scale, and whether it is mirrored
LOOKS = {"none": ONE, "flip": (*ONE, (1.0, True)), "scales": (*ONE, (1.0, True), (1.25, False), (1.25, True))}   # work of 1, 2 and 5 looks
MULTIPLE = 32   # of a canvas's sides
SAME = 0.55     # IoU from which two boxes of a class are one object (Solovyev et al. 2021)


def look(images: np.ndarray, sizes: np.ndarray, origins: np.ndarray, scale: float, mirrored: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A batch u8 [B,H,W,3] of canvases as a look of `LOOKS` sees it, with pictures of `sizes` at `origins` int [B,2]: all three in the new canvas,
  whose sides are the multiples of 32 next to `scale` times the old ones."""
  (height, width), (new_height, new_width) = images.shape[1:3], scaled(images.shape[1:3], scale)
  if mirrored: images, origins = images[:, :, ::-1], np.stack([origins[:, 0], width - origins[:, 1] - sizes[:, 1]], 1)
  if (new_height, new_width) == (height, width): return np.ascontiguousarray(images), sizes, origins
  resized = [np.asarray(Image.fromarray(np.ascontiguousarray(i)).resize((new_width, new_height), Image.Resampling.BILINEAR)) for i in images]
  factor = np.array([new_height / height, new_width / width])
  low, high = np.floor(origins * factor), np.ceil((origins + sizes) * factor)   # the pixels that show any of the picture
  return np.stack(resized), (high - low).astype(np.int32), low.astype(np.int32)


def scaled(canvas: tuple[int, int], scale: float) -> tuple[int, int]:
  """The canvas (height, width) of a look; itself where a look does not scale, whatever its sides."""
  if scale == 1: return tuple(canvas)
  return tuple(max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in canvas)


def back(found: Detections, seen: tuple[int, int], canvas: tuple[int, int], mirrored: bool) -> np.ndarray:
  """f32 [B,D,4]: boxes that a look on a canvas `seen` (height, width) found, in pixels of the batch's own `canvas`."""
  boxes = found.boxes * np.array([canvas[1] / seen[1], canvas[0] / seen[0]] * 2, np.float32)
  if mirrored: boxes[..., [0, 2]] = canvas[1] - boxes[..., [2, 0]]
  return boxes


def fuse(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, which: np.ndarray, looks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """One box an object, best first: `(boxes, scores, labels)` of a picture from what `looks` looks found (weighted boxes fusion, Solovyev et al.
  2021).

  Args: boxes f32 [N,4] xyxy, scores f32 [N] and labels i32 [N] of all looks, and which of them, int [N], each is from.

  The best box begins an object, as does each that no object of its class overlaps with an IoU above `SAME`; the others join the one they overlap
  most. An object's box is the mean of its boxes, weighted by score; its score is the mean over all looks of the best that each gave it, 0 of one
  that saw none."""
  order = np.argsort(-scores, kind="stable")
  members: list[list[int]] = []
  fused, classes = np.zeros((len(order), 4)), np.full(len(order), -1)
  for i in order.tolist():
    mine = np.flatnonzero(classes[:len(members)] == labels[i])
    overlap = _iou(fused[mine], boxes[i].astype(np.float64)) if len(mine) else np.zeros(0)
    if len(mine) and overlap.max() > SAME: members[at := int(mine[overlap.argmax()])].append(i)
    else:
      at = len(members)
      members.append([i])
    weights = scores[members[at]].astype(np.float64)[:, None]
    fused[at], classes[at] = (boxes[members[at]] * weights).sum(0) / max(weights.sum(), 1e-12), labels[i]
  found = np.zeros(len(members))
  for at, one in enumerate(members):
    best = np.zeros(looks)
    np.maximum.at(best, which[one], scores[one])
    found[at] = best.mean()
  ranked = np.argsort(-found, kind="stable")
  return fused[ranked].astype(np.float32), found[ranked].astype(np.float32), classes[ranked].astype(np.int32)


def join(found: Sequence[Detections], boxes: Sequence[np.ndarray], score_threshold: float, max_detections: int) -> Detections:
  """The looks' detections of a batch as one, with `boxes` [B,D,4] of each look in the same pixels; of what scores `score_threshold` the best
  `max_detections`."""
  batch = len(found[0].counts)
  joined = Detections(np.zeros((batch, max_detections, 4), np.float32), np.zeros((batch, max_detections), np.float32),
                      np.full((batch, max_detections), -1, np.int32), np.zeros(batch, np.int32))
  for row in range(batch):
    counts = [int(one.counts[row]) for one in found]
    parts = [np.concatenate([array[row, :n] for array, n in zip(arrays, counts)])
             for arrays in (boxes, [one.scores for one in found], [one.labels for one in found])]
    fused = fuse(*parts, np.repeat(np.arange(len(found)), counts), len(found))
    n = joined.counts[row] = min(max_detections, int((fused[1] >= np.float32(score_threshold)).sum()))
    joined.boxes[row, :n], joined.scores[row, :n], joined.labels[row, :n] = (part[:n] for part in fused)
  return joined


def _iou(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
  """[N], of boxes [N,4] with one; 0 where neither has an area."""
  shared = (np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])).clip(0, None).prod(1)
  union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - shared
  return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
