"""How well the shapes of anchors fit the boxes of a data set, and which would fit better. A shape is width x height; two are laid centre on centre,
or as far apart as a box and the next cell of a level."""
from collections.abc import Mapping, Sequence
from typing import Any
import numpy as np
from tinydet.detection.anchors import ASPECT_RATIOS, LEVELS, SIZES, base_anchors
from tinydet.errors import UserError

MISSED = 0.4   # IoU below which no anchor of a place is meant for a box but as a last resort (Lin et al. 2017, section 4)
ENOUGH = 10    # boxes of a class that is judged by itself
SCALES = 2.0 ** np.arange(-2, 1.01, 0.25)   # of the published sizes, that are tried
AWAY = 0.25    # of a stride, across and down: how far the centre of a box lies from the next cell's, on average
ROUNDS = 50    # of k-means at most; it ends far earlier


def anchor_shapes(sizes: Sequence[Sequence[float]] = SIZES, ratios: Sequence[float] = ASPECT_RATIOS) -> np.ndarray:
  """f64 [45,2], (width, height) in pixels of RetinaNet's anchors on all levels."""
  boxes = np.concatenate([base_anchors(of_level, ratios) for of_level in sizes]).astype(np.float64)
  return boxes[:, 2:] - boxes[:, :2]


def best_iou(shapes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
  """f64 [N], the largest IoU of each of `shapes` [N,2] with any of `anchors` [A,2], both (width, height), centre on centre."""
  best = np.zeros(len(shapes))
  for anchor in anchors: best = np.maximum(best, _iou(shapes, anchor))
  return best


def placed_iou(shapes: np.ndarray, sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> np.ndarray:
  """f64 [N], the largest IoU of each of `shapes` [N,2] with RetinaNet's anchors of `sizes` and `ratios`, each `AWAY` of its level's stride from it.
  Small anchors on a coarse level fit a box that lies on a cell's centre, and miss the one between two cells."""
  best = np.zeros(len(shapes))
  for level, of_level in zip(LEVELS, sizes, strict=True):
    for anchor in anchor_shapes([of_level], ratios): best = np.maximum(best, _iou(shapes, anchor, AWAY * 2 ** level))
  return best


def most_missed(by_class: Mapping[str, np.ndarray], anchors: np.ndarray) -> tuple[float, str, np.ndarray]:
  """The share of shapes below `MISSED` with all `anchors` [A,2], of what that is, in words, and those shapes [N,2]: of the class of `by_class`, name
  -> [N,2], that has most, or of all boxes. A class of fewer than `ENOUGH` says nothing by itself."""
  groups = {"the boxes": np.concatenate([*by_class.values()])}
  groups |= {f"class '{name}'": shapes for name, shapes in by_class.items() if len(shapes) >= ENOUGH}
  shares = {words: float((best_iou(shapes, anchors) < MISSED).mean()) for words, shapes in groups.items()}
  worst = max(shares, key=lambda words: shares[words])
  return shares[worst], worst, groups[worst]


def fit_shapes(shapes: np.ndarray, count: int) -> np.ndarray:
  """f64 [count,2], the smallest first: k-means of `shapes` f64 [N,2] by IoU (Redmon & Farhadi 2017, section 2), begun at even steps of their area and
  of what they are wide for their height, so that the same boxes give the same shapes."""
  found = shapes[np.lexsort((shapes[:, 0] / shapes[:, 1], shapes.prod(1)))[((np.arange(count) + 0.5) / count * len(shapes)).astype(int)]]
  before = None
  for _ in range(ROUNDS):
    nearest = np.stack([_iou(shapes, one) for one in found], 1).argmax(1)
    if before is not None and (nearest == before).all(): break
    before = nearest
    found = np.array([shapes[nearest == i].mean(0) if (nearest == i).any() else one for i, one in enumerate(found)])
  return found[np.argsort(found.prod(1), kind="stable")]


def fit_levels(shapes: np.ndarray) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
  """Sizes of each level and ratios (height / width) of a RetinaNet's anchors for `shapes` f64 [N,2] (width, height), as `anchors.anchors` takes them.

  Ratios are k-means of the shapes, all made equal in area. Sizes stay an octave a level, as its strides do, all published ones times that of `SCALES`
  with the best mean of `placed_iou`."""
  ratios = tuple(sorted(round(float(height / width), 4) for width, height in fit_shapes(shapes / np.sqrt(shapes.prod(1, keepdims=True)), 3)))
  def scaled(scale: float) -> tuple[tuple[float, ...], ...]: return tuple(tuple(round(size * scale, 2) for size in level) for level in SIZES)
  best = max(SCALES, key=lambda scale: placed_iou(shapes, scaled(scale), ratios).mean())
  return scaled(float(best)), ratios


def read_levels(about: Any) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
  """Sizes and ratios from the metadata of a file of weights, {"sizes": [5][3], "ratios": [3]}; the published ones where it is None. UserError where
  it is anything else."""
  if about is None: return SIZES, ASPECT_RATIOS
  try:
    sizes, ratios = (np.array(about[key], np.float64) for key in ("sizes", "ratios"))
    if sizes.shape != (5, 3) or ratios.shape != (3,) or not all((0 < x).all() and (x < 1e5).all() for x in (sizes, ratios)): raise ValueError
  except (TypeError, ValueError, KeyError, IndexError):
    raise UserError("anchors: the weights' metadata has to say three sizes for each of five levels, and three ratios; train them again") from None
  return tuple(map(tuple, sizes.tolist())), tuple(ratios.tolist())


def _iou(shapes: np.ndarray, anchor: np.ndarray, away: float = 0.0) -> np.ndarray:
  """f64 [N], of shapes and an anchor whose centres are `away` pixels apart across and down."""
  inner = (np.minimum(shapes / 2, anchor / 2 + away) - np.maximum(-shapes / 2, away - anchor / 2)).clip(0).prod(1)
  return inner / (shapes.prod(1) + anchor.prod() - inner)
