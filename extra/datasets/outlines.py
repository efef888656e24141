"""Upright boxes around outlines that are none: turned boxes and polygons."""
import math
from collections.abc import Sequence
import numpy as np


def around_turned(cx: float, cy: float, width: float, height: float, radians: float) -> list[float]:
  """xyxy of the upright box around one of `width` x `height` that is turned about its middle."""
  cos, sin = abs(math.cos(radians)), abs(math.sin(radians))
  x, y = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
  return [cx - x, cy - y, cx + x, cy + y]


def around_points(points: Sequence[float]) -> list[float]:
  """xyxy of the upright box around x, y, x, y, ..., at least one point."""
  return [min(points[0::2]), min(points[1::2]), max(points[0::2]), max(points[1::2])]


def iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """f64 [N], the intersection over union of xyxy boxes [N,4], pair by pair; 0 where both have no area."""
  inner = (np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])).clip(0).prod(1)
  union = (one[:, 2:] - one[:, :2]).prod(1) + (other[:, 2:] - other[:, :2]).prod(1) - inner
  return np.divide(inner, union, out=np.zeros(len(one)), where=union > 0)
