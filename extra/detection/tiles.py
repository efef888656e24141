"""Large pictures in overlapping tiles: where to cut them, and how to join what was found in each. Numpy only."""
import math
import numpy as np

NEAR = 1 / 40   # of a tile's side: a box that ends this close to a border of its tile is taken to go on beyond it
NOWHERE = np.array([-np.inf, -np.inf, np.inf, np.inf])


def windows(height: int, width: int, tile: tuple[int, int] | None, overlap: float = 0.2) -> np.ndarray:
  """i32 [V,4] xyxy, the parts of a picture of `height` x `width` pixels to look at: the whole of it, then its tiles, row by row.

  `tile` is (width, height) in pixels; no tiles where it is None or the picture no larger. Neighbours share at least `overlap` of a tile's side, so
  that an object up to that size is whole in one of them; they are spread evenly."""
  def starts(length: int, side: int) -> list[int]:
    count = 1 if length <= side else 1 + math.ceil((length - side) / max(1, side * (1 - overlap)))
    return np.linspace(0, length - min(side, length), count).round().astype(int).tolist()
  parts = [(0, 0, width, height)]
  if tile is not None and (width > tile[0] or height > tile[1]):
    w, h = min(tile[0], width), min(tile[1], height)
    parts += [(x, y, x + w, y + h) for y in starts(height, h) for x in starts(width, w)]
  return np.array(parts, np.int32)


def merge(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, window: np.ndarray, height: int, width: int,
          nms_threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Every object once, best first: `(boxes, scores, labels)` of a picture of `height` x `width` pixels from what was found in its windows.

  Args: boxes f32 [N,4] xyxy, scores f32 [N] and labels i32 [N] from all windows, in pixels of the picture; window [N,4] xyxy, where each was found.

  Class-wise NMS of the boxes that no inner border of their window cuts; then of the cut ones, each compared with another as its window would have
  cut that. One that is the same as a kept box by that, or lies for the most part in a better whole one, goes; what it is the same as gets the higher
  score of the two, and two cut ones become the box around both. So a box cut by a border leaves only where another shows that it is a part, an
  object larger than a tile is put together from its parts, and parts of two objects are not taken for one where either is seen whole."""
  window, picture = np.asarray(window, np.float64), np.array([0, 0, width, height])
  sides = np.tile(window[:, 2:] - window[:, :2], 2)
  cut = (window != picture) & (np.abs(boxes - window) <= NEAR * sides)
  limits = np.where(cut, window, NOWHERE)   # where a box is cut; infinite where it is not
  order = np.lexsort((-scores, cut.any(1)))
  boxes, scores, labels, limits = boxes[order].astype(np.float64), scores[order].copy(), labels[order], limits[order]
  keep = np.zeros(len(boxes), bool)
  for label in np.unique(labels):
    mine = np.flatnonzero(labels == label)
    for n, i in enumerate(mine):
      while True:
        kept, is_cut = mine[:n][keep[mine[:n]]], np.isfinite(limits[i]).any()
        overlap, whole = _iou(_clip(boxes[i], limits[kept]), _clip(boxes[kept], limits[i])), np.isinf(limits[kept]).all(1)
        same = overlap > nms_threshold
        part = is_cut & (_shared(boxes[i:i + 1], boxes[kept]) > 0.5 * (boxes[i, 2:] - boxes[i, :2]).prod()) & (scores[kept] >= scores[i])
        if (whole & (same | part)).any():
          if (whole & same).any(): scores[best] = max(scores[best := kept[np.where(whole, overlap, -1).argmax()]], scores[i])
          break
        if not same.any():
          keep[i] = True
          break
        group = np.concatenate([[i], kept[same]])
        keep[group], scores[i] = False, scores[group].max()
        outermost, axes = np.concatenate([boxes[group, :2].argmin(0), boxes[group, 2:].argmax(0)]), np.arange(4)
        boxes[i], limits[i] = boxes[group[outermost], axes], limits[group[outermost], axes]
  kept = np.flatnonzero(keep)
  kept = kept[np.argsort(-scores[kept], kind="stable")]
  return boxes[kept].astype(np.float32), scores[kept], labels[kept]


def _clip(boxes: np.ndarray, limits: np.ndarray) -> np.ndarray:
  """xyxy boxes cut to limits; either may be a single one."""
  return np.clip(boxes, np.concatenate([limits[..., :2]] * 2, -1), np.concatenate([limits[..., 2:]] * 2, -1))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """[N] from a and b [N,4], pair by pair; 0 where neither has an area."""
  shared = _shared(a, b)
  union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
  return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Areas [N] in pixels that a and b [N,4] share, pair by pair."""
  return np.maximum(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0).prod(1)
