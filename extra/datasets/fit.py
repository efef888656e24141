"""How a picture comes into the canvas that a network sees, and which canvases there are: stretched, by its shorter side, or letterboxed."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
import numpy as np
from tinydet.datasets.buckets import MULTIPLE, Buckets, choose_buckets, one_bucket
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import MEAN_GREY, Transform, compose, inside_size, pad_to, resize, resize_inside, resize_shorter, resized_sizes


@dataclass(frozen=True)
class Fit:
  """The size that a network sees pictures at, and how they come to it.

  `size` is (width, height). With `max_size` it is the shorter side instead, `max_size` bounds the longer one, the aspect ratio is kept, and the
  canvas is what holds the picture. Else the picture is stretched to `size`, or with `letterbox` fitted into it with its aspect ratio. What is no
  picture has the colour `fill`; the picture lies at the top left, or in the middle where `centred`."""
  size: tuple[int, int]
  max_size: int = 0
  letterbox: bool = False
  fill: tuple[int, int, int] = MEAN_GREY
  centred: bool = False

  def __str__(self) -> str:
    """The size in words."""
    return f"{min(self.size)} to {self.max_size} pixels" if self.max_size else f"{self.size[0]}x{self.size[1]}"

  def resize(self) -> Transform:
    """Bring a picture to its size inside the canvas, without padding: padding costs nothing before the other transforms are done."""
    width, height = self.size
    if self.max_size: return resize_shorter(min(self.size), self.max_size)
    return resize_inside(height, width) if self.letterbox else resize(height, width)

  def resized(self, sizes: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """i64 [N,2]: what `resize` makes of pictures of `sizes` [N,2], (height, width) each."""
    sizes, (width, height) = np.asarray(sizes, np.int64).reshape(-1, 2), self.size
    if self.max_size: return resized_sizes(sizes, min(self.size), self.max_size)
    if self.letterbox: return np.array([inside_size(tuple(size), height, width) for size in sizes.tolist()], np.int64).reshape(-1, 2)
    return np.broadcast_to(np.array([height, width]), sizes.shape)

  def pad(self, canvas: tuple[int, int]) -> Transform:
    """Put a picture that `resize` made into a canvas (height, width)."""
    return pad_to(*canvas, self.fill, self.centred)

  def place(self, image: np.ndarray) -> Sample:
    """A picture u8 [H,W,3] in the smallest of `canvases` that holds it."""
    size = image.shape[:2]
    whole = Sample(np.ascontiguousarray(image), np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 0, size, size)
    sample = self.resize()(whole, np.random.default_rng(0))
    canvas = next(canvas for canvas in self.canvases() if all(np.less_equal(sample.content_size, canvas)))
    return self.pad(canvas)(sample, np.random.default_rng(0))

  def canvas(self) -> tuple[int, int]:
    """(height, width) of the one canvas that holds every picture: with `max_size` a square, for either orientation."""
    side = _up(self.max_size)
    return (side, side) if self.max_size else (self.size[1], self.size[0])

  def canvases(self) -> tuple[tuple[int, int], ...]:
    """Canvases (height, width) that hold between them whatever comes out of `resize`, where the pictures are not known beforehand."""
    if not self.max_size: return (self.canvas(),)
    short, long = _up(min(*self.size, self.max_size)), _up(self.max_size)
    return tuple(dict.fromkeys([(short, long), (long, short)]))

  def buckets(self, sizes: Sequence[tuple[int, int]] | np.ndarray, count: int, batch_size: int) -> Buckets:
    """At most `count` canvases for pictures of `sizes` [N,2] (height, width); see `choose_buckets`."""
    if self.max_size: return choose_buckets(sizes, min(self.size), self.max_size, count, batch_size)
    return one_bucket(len(sizes), self.canvas(), self.pad(self.canvas()))

  def whole(self) -> Transform:
    """`resize` and `pad`, into the one canvas."""
    return compose(self.resize(), self.pad(self.canvas()))


def _up(side: int) -> int: return -(-side // MULTIPLE) * MULTIPLE


def seen_shapes(dataset: Any, fit: Fit) -> dict[str, np.ndarray]:
  """Class -> f64 [N,2], width and height in pixels of the network's input, of all objects of `dataset` that are to be learnt."""
  truth = dataset.ground_truth()
  sizes = np.array([(image["height"], image["width"]) for image in truth["images"]])
  scale = dict(zip((image["id"] for image in truth["images"]), fit.resized(sizes) / sizes))
  rows: dict[int, list[tuple[float, float]]] = {}
  for a in truth["annotations"]:
    width, height = a["bbox"][2] * scale[a["image_id"]][1], a["bbox"][3] * scale[a["image_id"]][0]
    if width > 0 < height and not (a.get("iscrowd") or a.get("difficult")): rows.setdefault(a["category_id"], []).append((width, height))
  return {category["name"]: np.array(rows[category["id"]], np.float64) for category in truth["categories"] if category["id"] in rows}
