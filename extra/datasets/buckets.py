"""Canvases for pictures of many shapes: each batch is padded to one of a few, so that little is padded and few graphs are compiled."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import numpy as np
from tinydet.datasets.transforms import Transform, pad_to, resized_sizes

MULTIPLE = 32   # of a canvas's sides, in pixels: the stride of C5, and what torchvision pads to


@dataclass(frozen=True)
class Buckets:
  """Which canvas each picture of a data set is padded to.

  `canvases` are (height, width), the one with fewest pixels first; `of` i64 [N] is each picture's place among them; `padding` is the share of all
  their pixels that is no picture, and `square_padding` what it would be on the one square that holds every picture."""
  canvases: tuple[tuple[int, int], ...]
  of: np.ndarray
  padding: float
  square_padding: float
  padded: Transform | None = None   # how a picture comes into the canvas where there is only one, and it is not at the top left

  def pad(self, canvas: tuple[int, int]) -> Transform:
    """The transform that puts a picture into one of the canvases."""
    return self.padded or pad_to(*canvas)

  def __str__(self) -> str:
    names = ", ".join(f"{width}x{height}" for height, width in self.canvases)
    return (f"{len(self.canvases)} canvas{'es' * (len(self.canvases) > 1)}: {names}; {self.padding:.1%} of the pixels are padding; "
            f"one square canvas would be {self.square_padding:.1%}")

  def transform(self, canvas: tuple[int, int], usual: Transform) -> Transform:
    """How pictures come to a canvas, before they are padded: as the loader's `usual` transform does it."""
    return usual

  def batches(self, order: np.ndarray, batch_size: int, drop_last: bool, seed: tuple[int, ...] = ()) -> list[tuple[tuple[int, int], np.ndarray]]:
    """Canvas and pictures of each batch, where pictures come in `order`, i64 [N]: a batch begins when its last picture has come.

    What is left of a canvas's pictures goes on to the next larger one that holds it. What nothing larger holds is the short last batch of its canvas,
    or passed over with `drop_last`: with a random order, other pictures each time. The number of batches of each canvas does not depend on the order.
    The first batch is one of the largest canvas, since memory that suffices for it suffices for all."""
    found, places = [], self.of[order % len(self.of)]   # of copies too
    waiting = [np.flatnonzero(places == c) for c in range(len(self.canvases))]
    for c, canvas in enumerate(self.canvases):
      positions = np.sort(waiting[c])
      full = len(positions) // batch_size * batch_size
      found += [(canvas, batch) for batch in positions[:full].reshape(-1, batch_size)]
      larger = next((d for d in range(c + 1, len(self.canvases)) if all(np.greater_equal(self.canvases[d], canvas))), None)
      if larger is not None: waiting[larger] = np.append(waiting[larger], positions[full:])
      elif full < len(positions) and not drop_last: found.append((canvas, positions[full:]))
    found.sort(key=lambda batch: batch[1][-1])
    first = next((i for i, (canvas, _) in enumerate(found) if canvas == self.canvases[-1]), 0)
    return [(canvas, order[positions]) for canvas, positions in found[first:first + 1] + found[:first] + found[first + 1:]]


@dataclass(frozen=True)
class Scales:
  """Canvases that each batch draws one of, whatever its pictures (Redmon & Farhadi 2017, "multi-scale training"): one graph each.

  `transforms` are of each (height, width), the one with fewest pixels first: they bring a picture to the whole of that canvas."""
  transforms: Mapping[tuple[int, int], Transform]

  @property
  def canvases(self) -> tuple[tuple[int, int], ...]: return tuple(self.transforms)

  def __str__(self) -> str: return f"one of {', '.join(f'{width}x{height}' for height, width in self.canvases)} a batch"

  def transform(self, canvas: tuple[int, int], usual: Transform) -> Transform:
    """The one of this canvas."""
    return self.transforms[canvas]

  def batches(self, order: np.ndarray, batch_size: int, drop_last: bool, seed: tuple[int, ...] = ()) -> list[tuple[tuple[int, int], np.ndarray]]:
    """Canvas and pictures of each batch, in `order`. The canvas follows from `seed` and the batch's number; the first is the largest, since memory
    that suffices for it suffices for all."""
    count = len(order) // batch_size if drop_last else -(-len(order) // batch_size)
    drawn = np.random.default_rng((*seed, len(self.canvases))).integers(len(self.canvases), size=count)
    drawn[:1] = len(self.canvases) - 1
    return [(self.canvases[c], order[i * batch_size:(i + 1) * batch_size]) for i, c in enumerate(drawn)]


def one_bucket(pictures: int, canvas: tuple[int, int], padded: Transform | None = None) -> Buckets:
  """All pictures on one `canvas`, into which `padded` puts one that does not fill it."""
  return Buckets((canvas,), np.zeros(pictures, np.int64), 0.0, 0.0, padded)


def choose_buckets(sizes: Sequence[tuple[int, int]] | np.ndarray, shorter: int, max_size: int, count: int, batch_size: int) -> Buckets:
  """At most `count` canvases for pictures of `sizes` [N,2] (height, width) that come through `transforms.resize_shorter(shorter, max_size)`.

  Resized, the flatter of two pictures is at least as wide and at most as high. Each canvas takes a range of aspect ratios, at least `batch_size`
  pictures so that they fill a batch; of all such divisions the one with fewest pixels is found by dynamic programming."""
  square = [-(-max_size // MULTIPLE) * MULTIPLE] * 2
  content = resized_sizes(np.asarray(sizes, np.int64), shorter, max_size)
  padded = -(-content // MULTIPLE) * MULTIPLE
  order = np.lexsort((-padded[:, 1], padded[:, 0]))   # the flattest first
  ends, heights, widths = _divide(padded[order], count, min(batch_size, len(order)))
  by_area = np.lexsort((widths, heights, heights * widths))
  of = np.empty(len(order), np.int64)
  of[order] = np.repeat(np.argsort(by_area), np.diff(ends, prepend=0))
  canvases = tuple(zip(heights[by_area].tolist(), widths[by_area].tolist()))
  used = int(np.prod(canvases, axis=1)[of].sum())
  return Buckets(canvases, of, 1 - int(content.prod(1).sum()) / used, 1 - float(content.prod(1).mean() / np.prod(square)))


def _divide(padded: np.ndarray, count: int, at_least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The best division of `padded` [N,2], sorted, into at most `count` runs of `at_least` or more: the end, height and width of each."""
  n = len(padded)
  # A run ends where the shape changes, or where it or its neighbours could not be shorter.
  changes = np.append(np.flatnonzero((padded[1:] != padded[:-1]).any(1)) + 1, [0, n])
  cuts = np.unique((changes[:, None] + np.arange(1 - count, count) * at_least).clip(0, n))
  sizes = cuts[None] - cuts[:, None]                                                     # [from,to]
  height, width = padded[cuts[1:] - 1, 0], padded[cuts[:-1], 1]                          # of the last and the first picture: the largest
  pixels = np.full(sizes.shape, np.inf)
  pixels[:-1, 1:] = np.where(sizes[:-1, 1:] >= at_least, sizes[:-1, 1:] * height[None] * width[:, None], np.inf)
  best, before = [np.where(cuts == 0, 0, np.inf)], []
  for _ in range(count):
    totals = best[-1][:, None] + pixels
    before.append(totals.argmin(0))
    best.append(totals.min(0))
  ends, at = [], len(cuts) - 1
  for k in range(int(np.argmin([b[-1] for b in best])), 0, -1):
    ends.append(at)
    at = before[k - 1][at]
  ends = np.array(ends[::-1])
  starts = np.append(0, ends[:-1])
  return cuts[ends], padded[cuts[ends] - 1, 0], padded[cuts[starts], 1]
