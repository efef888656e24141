"""The embedded data set: coloured shapes on textured backgrounds, drawn on the fly, with boxes that are exact by construction.

Two families of six classes share edges, corners and curves but no class, so that what is learnt on one can be carried to the other.
"""
from dataclasses import dataclass
from typing import Any
import numpy as np
from PIL import Image, ImageChops, ImageDraw
from tinydet.datasets.sample import Sample
from tinydet.errors import UserError

COUNT_SHARES = (0.08, 0.27, 0.27, 0.2, 0.12, 0.04, 0.02)  # chance of 0, 1, 2, ... objects on an image
MIN_VISIBLE = 0.4                                         # part of a shape that must stay in sight
SPLITS = ("train", "val")
DEFAULT_COUNT = {"train": 4000, "val": 500}


def _arc(start: float, stop: float, points: int = 48, radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
  """Points f64 [points,2] of a circle from angle `start` to `stop`, in turns, y downwards."""
  angle = 2 * np.pi * np.linspace(start, stop, points)
  return np.stack([np.cos(angle), np.sin(angle)], 1) * radius + centre


def _star(points: int, inner: float) -> np.ndarray:
  radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
  return _arc(-0.25, 0.75, 2 * points + 1)[:-1] * radius[:, None]


def _crescent() -> np.ndarray:
  """A disc less a disc of radius 0.8 whose centre lies 0.45 to the right: the circles meet at x = 0.625 of the first, 0.175 of the second."""
  meet = np.arccos((1 + 0.45 ** 2 - 0.8 ** 2) / (2 * 0.45)) / (2 * np.pi)
  height = np.sin(2 * np.pi * meet)
  inner = np.arctan2(height, np.cos(2 * np.pi * meet) - 0.45) / (2 * np.pi)
  return np.concatenate([_arc(meet, 1 - meet), _arc(1 - inner, inner, radius=0.8, centre=(0.45, 0.0))])


def _heart() -> np.ndarray:
  t = 2 * np.pi * np.linspace(0, 1, 64, endpoint=False)
  return np.stack([16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1) / 16


# class name -> outline as polygons: the first is filled, any further ones are holes in it
FAMILIES: dict[int, dict[str, list[np.ndarray]]] = {
  1: {
    "circle": [_arc(0, 1)],
    "square": [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)],
    "triangle": [_arc(-0.25, 0.75, 4)[:-1]],
    "star": [_star(5, 0.4)],
    "cross": [np.array([[-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1], [1, 3], [-1, 3], [-1, 1], [-3, 1], [-3, -1], [-1, -1]], float)],
    "ring": [_arc(0, 1), _arc(0, 1, radius=0.55)],
  },
  2: {
    "kite": [np.array([[0, -1.25], [0.8, -0.3], [0, 1.25], [-0.8, -0.3]], float)],
    "heart": [_heart()],
    "crescent": [_crescent()],
    "arrow": [np.array([[-1.3, -0.3], [0.2, -0.3], [0.2, -0.85], [1.3, 0], [0.2, 0.85], [0.2, 0.3], [-1.3, 0.3]], float)],
    "half-disc": [_arc(0.5, 1.0)],
    "ell": [np.array([[-0.9, -1.1], [-0.2, -1.1], [-0.2, 0.4], [0.9, 0.4], [0.9, 1.1], [-0.9, 1.1]], float)],
  },
}


@dataclass
class Shape:
  """One placed shape: `mask` and `left`, `top` are in half pixels, twice the resolution of the image, and may hang over its border."""
  label: int
  mask: Image.Image
  polygons: list[np.ndarray]  # f64 [P,2] in half pixels of `mask`
  left: int
  top: int

  def box(self, size: int) -> np.ndarray:
    """The tight box f32 [4] of the mask inside the image, xyxy in pixels."""
    left, top, right, bottom = self.mask.getbbox()
    return np.clip(np.array([left + self.left, top + self.top, right + self.left, bottom + self.top], np.float32) / 2, 0, size)


class Shapes:
  """The embedded data set `family` (1 or 2) as `count` images of `size` x `size` pixels; image i depends on (seed, family, split, i) only.

  An image holds 0 to 6 shapes, 8% hold none. The longer side of a shape's box is 0.08 + 0.56 * sqrt(u) of the image, u uniform: three octaves.
  Shapes may overlap, and hang over the border by a tenth, but at least `MIN_VISIBLE` of each stays in sight.
  A box is the tight box of the shape's whole mask, clipped to the image, in steps of half a pixel.
  """
  max_boxes = len(COUNT_SHARES) - 1

  def __init__(self, split: str = "train", family: int = 1, size: int = 128, count: int | None = None, seed: int = 0):
    if split not in SPLITS: raise UserError(f"shapes: split '{split}' is unknown, choose one of {', '.join(SPLITS)}")
    if family not in FAMILIES: raise UserError(f"shapes: family {family} is unknown, choose one of {', '.join(map(str, FAMILIES))}")
    self.split, self.family, self.size, self.seed = split, family, size, seed
    self.count = DEFAULT_COUNT[split] if count is None else count
    self.name = f"shapes:{family}"
    self.class_names = list(FAMILIES[family])
    self.category_ids = list(range(6 * family - 5, 6 * family + 1))
    self.warnings: list[str] = []

  def __len__(self) -> int: return self.count

  @property
  def sizes(self) -> np.ndarray: return np.full((self.count, 2), self.size)

  def image_name(self, index: int) -> str: return f"{self.name}/{self.split}/{index}"

  def __getitem__(self, index: int) -> Sample:
    shapes = self.shapes(index)
    boxes = np.stack([s.box(self.size) for s in shapes]) if shapes else np.zeros((0, 4), np.float32)
    labels = np.array([s.label for s in shapes], np.int32)
    image = _render(shapes, self.size, self._rng(index, 1))
    return Sample(image, boxes, labels, index + 1, (self.size, self.size), (self.size, self.size))

  def shapes(self, index: int) -> list[Shape]:
    """The shapes of image `index`, lowest first, without drawing the image."""
    return _place_shapes(list(FAMILIES[self.family].values()), self.size, self._rng(index, 0))

  def ground_truth(self) -> dict[str, Any]:
    """The whole split in the form of a COCO instances file."""
    annotations: list[dict[str, Any]] = []
    for i in range(self.count):
      for shape in self.shapes(i):
        x0, y0, x1, y1 = shape.box(self.size).tolist()
        annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "category_id": self.category_ids[shape.label],
                            "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0})
    images = [{"id": i + 1, "file_name": self.image_name(i), "height": self.size, "width": self.size} for i in range(self.count)]
    return {"images": images, "annotations": annotations, "categories": [{"id": c, "name": n} for c, n in zip(self.category_ids, self.class_names)]}

  def _rng(self, index: int, stream: int) -> np.random.Generator:
    if not 0 <= index < self.count: raise IndexError(index)
    return np.random.default_rng((self.seed, self.family, SPLITS.index(self.split), index, stream))


def _place_shapes(outlines: list[list[np.ndarray]], size: int, rng: np.random.Generator) -> list[Shape]:
  owner = np.full((2 * size, 2 * size), -1, np.int8)
  shapes: list[Shape] = []
  areas: list[int] = []
  for _ in range(rng.choice(len(COUNT_SHARES), p=COUNT_SHARES)):
    label = int(rng.integers(len(outlines)))
    mask, polygons = _rasterise(outlines[label], 2 * size * (0.08 + 0.56 * rng.random() ** 0.5), rng)
    solid = np.asarray(mask) > 0
    extent = np.array(mask.getbbox()[2:])
    for _ in range(10):  # a place that hides too much of a lower shape is drawn again; a shape that finds none is left out
      left, top = (int(x) for x in rng.uniform(-0.1 * extent, 2 * size - 0.9 * extent))
      rows, columns = slice(max(top, 0), top + solid.shape[0]), slice(max(left, 0), left + solid.shape[1])
      covered = owner.copy()
      window = covered[rows, columns]
      inside = solid[rows.start - top:, columns.start - left:][:window.shape[0], :window.shape[1]]
      window[inside] = len(shapes)
      visible = np.bincount(covered[covered >= 0], minlength=len(shapes) + 1)
      if all(visible >= MIN_VISIBLE * np.array([*areas, solid.sum()])):
        owner = covered
        shapes.append(Shape(label, mask, polygons, left, top))
        areas.append(int(solid.sum()))
        break
  return shapes


def _rasterise(outline: list[np.ndarray], longer: float, rng: np.random.Generator) -> tuple[Image.Image, list[np.ndarray]]:
  """Stretch, mirror and turn an outline at random, scale it to `longer` half pixels on its longer side, and fill it."""
  angle, stretch, mirror = np.deg2rad(rng.uniform(-18, 18)), rng.uniform(0.8, 1.25) ** 0.5, rng.choice([-1.0, 1.0])
  cos, sin = np.cos(angle), np.sin(angle)
  matrix = np.array([[cos, sin], [-sin, cos]]) * [[mirror * stretch], [1 / stretch]]
  points = [p @ matrix for p in outline]
  low, high = points[0].min(0), points[0].max(0)
  scale = longer / (high - low).max()
  width, height = (int(x) for x in np.ceil((high - low) * scale) + 1)
  points = [(p - low) * scale for p in points]
  mask = Image.new("L", (width + width % 2, height + height % 2))
  draw = ImageDraw.Draw(mask)
  for i, polygon in enumerate(points): draw.polygon((polygon - 0.5).ravel().tolist(), fill=0 if i else 255)
  return mask, points


def _render(shapes: list[Shape], size: int, rng: np.random.Generator) -> np.ndarray:
  """Draw background, shapes in order, and noise: u8 [size,size,3]."""
  first = rng.uniform(20, 235, 3)
  ground = [first, np.clip(first + rng.uniform(-70, 70, 3), 0, 255)]
  image = Image.fromarray(_texture(size, size, *ground, rng.choice(list(TEXTURES)), rng))
  taken = list(np.linspace(*ground, 5))
  for shape in shapes:
    colour = _distinct_colour(taken, 45 if rng.random() < 0.15 else 100, rng)
    taken = [*taken, colour]
    left, top = shape.left // 2, shape.top // 2
    canvas = Image.new("L", (shape.mask.width + 2, shape.mask.height + 2))
    offset = (shape.left - 2 * left, shape.top - 2 * top)
    canvas.paste(shape.mask, offset)
    alpha = canvas.reduce(2)
    second = np.clip(colour + (colour - np.mean(ground, 0)) * rng.uniform(0.2, 0.6), 0, 255)
    style = "plain" if rng.random() < 0.4 else rng.choice(list(TEXTURES))
    image.paste(Image.fromarray(_texture(alpha.height, alpha.width, colour, second, style, rng)), (left, top), alpha)
    if rng.random() < 0.25:
      edge = Image.new("L", canvas.size)
      draw = ImageDraw.Draw(edge)
      for polygon in shape.polygons:
        draw.line([*(polygon + offset).ravel().tolist(), *(polygon[:2] + offset).ravel().tolist()], fill=255, width=2 + max(shape.mask.size) // 12)
      rim = tuple(int(x) for x in _distinct_colour([*taken, second], 60, rng))
      image.paste(rim, (left, top), ImageChops.darker(edge, canvas).reduce(2))
  grain = rng.integers(-8, 9, (size, size, 3), np.int8)
  return np.clip(np.asarray(image) + grain.astype(np.int16), 0, 255).astype(np.uint8)


def _distinct_colour(others: list[np.ndarray], distance: float, rng: np.random.Generator) -> np.ndarray:
  """The first of 16 random colours that differs by `distance` in some channel from all of `others`, else the one that differs most."""
  candidates = rng.uniform(0, 255, (16, 3))
  nearest = np.abs(candidates[:, None] - np.stack(others)).max(2).min(1)
  return candidates[np.argmax(nearest >= distance) if (nearest >= distance).any() else np.argmax(nearest)]


def _gradient(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  angle = rng.uniform(0, 2 * np.pi)
  ramp = np.cos(angle) * x / x.size + np.sin(angle) * y / y.size
  return (ramp - ramp.min()) / max(np.ptp(ramp), 1e-6)


def _stripes(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(4, 20)
  return 0.5 + np.clip(2 * np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period)), -0.5, 0.5)


def _checks(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  cell = rng.integers(3, 14)
  return ((y // cell + x // cell) % 2).astype(np.float32)


def _noise(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  return rng.random((y.size, x.size), np.float32)


def _blobs(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  cell = rng.integers(6, 24)
  coarse = Image.fromarray(rng.random((2 + y.size // cell, 2 + x.size // cell), np.float32))
  return np.asarray(coarse.resize((x.size, y.size), Image.Resampling.BICUBIC)).clip(0, 1)


# name -> f32 [H,W] in 0..1 from a column of y and a row of x
TEXTURES = {"gradient": _gradient, "stripes": _stripes, "checks": _checks, "noise": _noise, "blobs": _blobs}


def _texture(height: int, width: int, first: np.ndarray, second: np.ndarray, style: str, rng: np.random.Generator) -> np.ndarray:
  """A picture u8 [height,width,3] between two colours; "plain" is the first alone."""
  if style == "plain": return np.broadcast_to(first.astype(np.uint8), (height, width, 3)).copy()
  mix = TEXTURES[style](np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None], rng)
  return (first.astype(np.float32) + mix[..., None] * (second - first).astype(np.float32)).astype(np.uint8)
