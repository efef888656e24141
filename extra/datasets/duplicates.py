"""Pictures that are nearly the same: a burst, a video's frames, a copy under another name. Across splits they make a score too good."""
from collections.abc import Sequence
import numpy as np
from PIL import Image

SIDE = 16           # pixels of the thumbnails that are compared
BITS_APART = 6      # of the 64 of a difference hash: candidates
LEVELS_APART = 6.0  # root mean square, of 255: what two thumbnails of nearly one picture differ by at most
BLOCK = 512         # hashes compared at once with all others


def thumbnail(picture: Image.Image) -> np.ndarray:
  """u8 [SIDE,SIDE], a picture in little and grey."""
  return np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2))


def difference_hash(small: np.ndarray) -> int:
  """64 bits of a `thumbnail`: whether each of 8x8 cells is brighter than the one to its right (Krawetz' dHash, on 8 rows of 9 cells)."""
  cells = np.asarray(Image.fromarray(small).resize((9, 8), Image.Resampling.BOX), np.int16)
  return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def near_duplicates(small: Sequence[np.ndarray]) -> list[tuple[int, int]]:
  """Pairs (i, j), i < j, of thumbnails that are nearly the same, in order. All pairs are looked at: 20,000 pictures take seconds."""
  if len(small) < 2: return []
  hashes, flat = np.array([difference_hash(s) for s in small], np.uint64), np.stack(small).reshape(len(small), -1).astype(np.float32)
  pairs = []
  for start in range(0, len(hashes), BLOCK):
    rows, columns = np.nonzero(np.bitwise_count(hashes[start:start + BLOCK, None] ^ hashes[None, :]) <= BITS_APART)
    rows += start
    rows, columns = rows[rows < columns], columns[rows < columns]
    apart = np.sqrt(((flat[rows] - flat[columns]) ** 2).mean(1))
    pairs += list(zip(rows[apart <= LEVELS_APART].tolist(), columns[apart <= LEVELS_APART].tolist()))
  return pairs
