"""How well the shapes of anchors fit the boxes of a data set. Places are left out: a shape is width x height, and two are laid centre on centre."""
import numpy as np
from tinydet.detection.anchors import SIZES, base_anchors

MISSED = 0.4   # IoU below which no anchor of a place is meant for a box but as a last resort (Lin et al. 2017, section 4)


def anchor_shapes() -> np.ndarray:
  """f64 [45,2], (width, height) in pixels of RetinaNet's anchors on all levels."""
  boxes = np.concatenate([base_anchors(sizes) for sizes in SIZES]).astype(np.float64)
  return boxes[:, 2:] - boxes[:, :2]


def best_iou(shapes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
  """f64 [N], the largest IoU of each of `shapes` [N,2] with any of `anchors` [A,2], both (width, height), centre on centre."""
  best = np.zeros(len(shapes))
  for width, height in anchors:
    inner = np.minimum(shapes[:, 0], width) * np.minimum(shapes[:, 1], height)
    best = np.maximum(best, inner / (shapes.prod(1) + width * height - inner))
  return best
