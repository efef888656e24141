"""Augmentation that makes a canvas of one or several pictures: mosaics, random zoom, shift, rotation, shear and perspective, colour, mixtures. As
`transforms`, but that all pixels of what comes out are its content. `patches` has what is done to parts of a picture.

What is drawn follows from the sample's generator alone (`transforms.Draw`): from seed, epoch and index, whatever the number of workers.

A rule for boxes holds throughout: they are clipped to the canvas, and dropped where less than a tenth of their area is left, less than 2 pixels of a
side, or a box more than a hundred times as long as wide. One that is turned becomes the upright box around its four corners."""
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
import numpy as np
from PIL import Image
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import READ_AT, Transform, inside_size

SMALLEST_SHARE, SMALLEST_SIDE, SLIMMEST = 0.1, 2.0, 100.0   # of a box that stays: area, pixels, longer over shorter side
MIXTURE = 32.0   # both parameters of the beta distribution that a mixture's shares are drawn from


@dataclass(frozen=True)
class Strength:
  """How much `place` changes, each drawn evenly from its range.

  `zoom` scales by 1 - zoom to 1 + zoom, `shift` moves by up to that share of a side, `rotate` turns by up to so many degrees either way, `shear`
  slants each axis by up to so many degrees, `perspective` makes what lies at an edge of the canvas up to that share nearer or farther. `mosaic` is
  the chance of several pictures, `nine` the share of mosaics that have nine instead of four, `mix` the chance of a blend."""
  zoom: float = 0.0
  shift: float = 0.0
  rotate: float = 0.0
  shear: float = 0.0
  perspective: float = 0.0
  mosaic: float = 0.0
  nine: float = 0.0
  mix: float = 0.0

  @property
  def most_pictures(self) -> int:
    """That one canvas may show."""
    return (1 if not self.mosaic else 9 if self.nine else 4) * (2 if self.mix else 1)


def place(height: int, width: int, fill: Sequence[int], strength: Strength = Strength(), *, last_epoch: int | None = None,
          most: int | None = None) -> Transform:
  """Bring a picture, or several, onto a canvas of `height` x `width` pixels (YOLOv4's mosaic, YOLOv5's zoom, shift and the rest).

  In a mosaic of four the pictures, the others random ones of the data set, meet at a point in the middle half of a sheet of twice the canvas's
  sides, each as large as fits the canvas; of nine they lie in rows of three about such a point, each as large as fits two thirds of the canvas's
  sides. Else one lies in the middle of the canvas. All this is then changed by `strength`; what nothing covers has the colour `fill`. A blend is of
  two made likewise, with the boxes of both (Zhang et al. 2018). From epoch `last_epoch` on (the first is 0) there are no mosaics and no blends. Of
  more than `most` boxes the largest stay."""
  return partial(_place, height, width, tuple(fill), strength, last_epoch, most)


def hsv(hue: float = 0.015, saturation: float = 0.7, value: float = 0.4) -> Transform:
  """Turn the hue by up to `hue` of itself, and scale saturation and value by up to 1 +- the others, each uniform (YOLOv5)."""
  return partial(_hsv, hue, saturation, value)


def grey(p: float) -> Transform:
  """Take the colour out of a picture with chance `p`: all channels are its luma."""
  return partial(_grey, p)


def _place(height: int, width: int, fill: tuple[int, ...], strength: Strength, last_epoch: int | None, most: int | None, sample: Sample,
           rng: np.random.Generator) -> Sample:
  canvas = (height, width)
  if last_epoch is not None and rng.epoch >= last_epoch: strength = replace(strength, mosaic=0.0, mix=0.0)
  composed = _composed(canvas, fill, strength, sample, rng)
  if strength.mix and rng.random() < strength.mix:
    other = _composed(canvas, fill, strength, another(canvas, rng), rng)
    share = rng.beta(MIXTURE, MIXTURE)
    composed = replace(composed, image=Image.blend(other.picture, composed.picture, share),
                       boxes=np.concatenate([composed.boxes, other.boxes]), labels=np.concatenate([composed.labels, other.labels]))
  if most is None or len(composed.boxes) <= most: return composed
  kept = np.sort(np.argsort(-areas(composed.boxes), kind="stable")[:most])
  return replace(composed, boxes=composed.boxes[kept], labels=composed.labels[kept])


def _read_at(size: tuple[int, int], height: int, width: int, *_: Any) -> tuple[int, int] | None:
  """(height, width) to read a picture of `size` at for a canvas: only where that decodes less of it, for it will be resized again."""
  inside = inside_size(size, height, width)
  return inside if size[0] >= 2 * inside[0] and size[1] >= 2 * inside[1] else None


READ_AT[_place] = _read_at


def another(canvas: tuple[int, int], rng: np.random.Generator) -> Sample:
  """A random picture of the data set, read for a canvas (height, width)."""
  data, index = rng.dataset, int(rng.integers(len(rng.dataset)))
  size = _read_at(tuple(data.sizes[index]), *canvas) if hasattr(data, "resized") else None
  return data[index] if size is None else data.resized(index, size)


def _composed(canvas: tuple[int, int], fill: tuple[int, ...], strength: Strength, sample: Sample, rng: np.random.Generator) -> Sample:
  """One picture or a mosaic on the canvas, changed by what is drawn."""
  height, width = canvas
  count = 1 if rng.random() >= strength.mosaic else 9 if rng.random() < strength.nine else 4
  samples = [sample, *(another(canvas, rng) for _ in range(count - 1))]
  cell = (height, width) if count < 9 else (max(1, height * 2 // 3), max(1, width * 2 // 3))   # what each picture fits
  meet = rng.uniform(-0.5, 0.5, 2) * cell[::-1] if count > 1 else np.zeros(2)   # from the middle of the sheet
  half = np.array([width, height]) * (1 if count > 1 else 0.5)                       # of the sheet, beyond which pictures are cut off
  scale = rng.uniform(1 - strength.zoom, 1 + strength.zoom)
  middle = (0.5 + rng.uniform(-strength.shift, strength.shift, 2)) * (width, height)
  warp = _warp(canvas, strength, middle, rng)
  paper, sheet_at, onto = Image.new("RGB", (width, height), fill), middle, None
  if warp is not None: paper, sheet_at, onto = _paper(canvas, fill, warp, half * scale)
  boxes, labels = [], []
  for number, one in enumerate(samples):
    h, w = inside_size(one.content_size, *cell)
    left, top = meet + _corner(count, number, (w, h), cell[::-1])
    part = _paste(paper, one, (left, top, left + w, top + h), half, scale, sheet_at, onto, canvas)
    boxes.append(part[0]), labels.append(part[1])
  if onto is not None: paper = paper.transform((width, height), Image.Transform.PERSPECTIVE, _coefficients(onto), Image.Resampling.BILINEAR,
                                               fillcolor=fill)
  return replace(sample, image=paper, boxes=np.concatenate(boxes), labels=np.concatenate(labels), content_size=canvas, origin=(0, 0))


def _corner(count: int, number: int, size: tuple[int, int], cell: tuple[int, int]) -> np.ndarray:
  """f64 [2]: left and top of picture `number` of `count`, from where they meet; `size` is its width and height, `cell` what it fits."""
  size, cell = np.array(size), np.array(cell)
  if count == 1: return (cell - size) // 2 - cell / 2
  if count == 4: return -size * (number % 2 == 0, number < 2)
  column, row = (number + 4) % 9 % 3, (number + 4) % 9 // 3   # the first one lies in the middle
  return np.array([(-c / 2 - s, (c - s) // 2 - c / 2, c / 2)[at] for at, s, c in zip((column, row), size, cell)])


def _warp(canvas: tuple[int, int], strength: Strength, middle: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
  """f64 [3,3], from points (x, y, 1) about the middle of the sheet to the canvas: shear and rotation, then the sheet's middle goes to `middle`, then
  perspective about the canvas's; None where nothing but the second is drawn."""
  if not (strength.rotate or strength.shear or strength.perspective): return None
  angle = math.radians(rng.uniform(-strength.rotate, strength.rotate))
  across, down = np.tan(np.radians(rng.uniform(-strength.shear, strength.shear, 2)))
  centre = np.array(canvas[::-1]) / 2
  far = rng.uniform(-strength.perspective, strength.perspective, 2) / centre
  turned = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
  return _moved(centre) @ np.array([[1, 0, 0], [0, 1, 0], [*far, 1]]) @ _moved(middle - centre) @ turned @ [[1, across, 0], [down, 1, 0], [0, 0, 1]]


def _moved(by: np.ndarray) -> np.ndarray: return np.array([[1, 0, by[0]], [0, 1, by[1]], [0, 0, 1]])


def _paper(canvas: tuple[int, int], fill: tuple[int, ...], warp: np.ndarray, half: np.ndarray) -> tuple[Image.Image, np.ndarray, np.ndarray]:
  """Paper for what of a sheet, `half` its sides from its middle, comes to the canvas; where its middle lies on that; and the map [3,3] of the paper
  to the canvas."""
  height, width = canvas
  seen = apply(np.linalg.inv(warp), np.array([[0, 0], [width, 0], [0, height], [width, height]], float))
  low, high = (np.floor(np.clip(seen.min(0), -half, half)), np.ceil(np.clip(seen.max(0), -half, half)))
  size = np.maximum(high - low, 1).astype(int)
  return Image.new("RGB", tuple(size.tolist()), fill), -low, warp @ _moved(low)


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
  """`points` f64 [N,2] through the projective map `matrix` f64 [3,3]."""
  moved = np.concatenate([points, np.ones((len(points), 1))], 1) @ matrix.T
  return moved[:, :2] / np.maximum(moved[:, 2:], 1e-3)   # what lies behind the eye is as far off as can be


def _coefficients(onto: np.ndarray) -> tuple[float, ...]:
  """What Pillow asks for: the map back, scaled so that its last number is 1."""
  back = np.linalg.inv(onto)
  return tuple((back / back[2, 2]).ravel()[:8].tolist())


def _paste(paper: Image.Image, sample: Sample, place: tuple[float, ...], half: np.ndarray, scale: float, middle: np.ndarray,
           onto: np.ndarray | None, canvas: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """Put `sample` at `place` (x1, y1, x2, y2) of a sheet, `half` its sides from its middle, which is then scaled about that and laid with it on
  `middle` of the paper; only what is seen is computed. Returns the boxes that are left on the canvas, to which `onto` takes the paper, and their
  labels."""
  shown = [*np.maximum(place[:2], -half), *np.minimum(place[2:], half)]
  h, w = sample.content_size
  across, down = (place[2] - place[0]) / w, (place[3] - place[1]) / h
  offset = np.array([*sample.origin[::-1]] * 2, np.float32)
  whole = ((sample.boxes - offset) * (across, down, across, down) + np.array(place[:2] * 2)) * scale + np.tile(middle, 2)
  window = [round(shown[i] * scale + middle[i % 2]) for i in range(4)]
  cut = np.array(window)
  window = [min(max(side, 0), paper.size[i % 2]) for i, side in enumerate(window)]
  if window[2] > window[0] and window[3] > window[1]:
    of_picture = [((side - middle[i % 2]) / scale - place[i % 2]) / (across, down)[i % 2] for i, side in enumerate(window)]
    box = [min(max(side, 0.0), float((w, h)[i % 2])) for i, side in enumerate(of_picture)]
    if box[2] > box[0] and box[3] > box[1]:
      size = (window[2] - window[0], window[3] - window[1])
      paper.paste(sample.picture.resize(size, Image.Resampling.BILINEAR, box=tuple(box)), tuple(window[:2]))
  boxes = whole.clip(np.tile(cut[:2], 2), np.tile(cut[2:], 2))
  if onto is not None: whole, boxes = around(onto, whole), around(onto, boxes)
  boxes = boxes.clip(0, np.array(canvas[::-1] * 2)).astype(np.float32)
  kept = stays(boxes, whole)
  return boxes[kept], sample.labels[kept]


def around(matrix: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """f64 [M,4]: upright boxes around the corners of `boxes` [M,4] that a projective map [3,3] moved."""
  corners = apply(matrix, boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)).reshape(-1, 4, 2)
  return np.concatenate([corners.min(1), corners.max(1)], 1)


def stays(boxes: np.ndarray, whole: np.ndarray) -> np.ndarray:
  """bool [M]: which of `boxes` [M,4], clipped from `whole` [M,4], are still worth learning; see the rule above."""
  sides = boxes[:, 2:] - boxes[:, :2]
  short, long = sides.min(1, initial=np.inf), sides.max(1, initial=0)
  return (short >= SMALLEST_SIDE) & (areas(boxes) >= SMALLEST_SHARE * areas(whole)) & (long <= SLIMMEST * short)


def areas(boxes: np.ndarray) -> np.ndarray:
  """[M], of boxes [M,4] xyxy."""
  return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _hsv(hue: float, saturation: float, value: float, sample: Sample, rng: np.random.Generator) -> Sample:
  factors = 1 + rng.uniform(-1, 1, 3) * (hue, saturation, value)
  levels = np.arange(256)
  turned = (levels * factors[0]) % 256
  tables = [turned, *(np.minimum(levels * factor, 255) for factor in factors[1:])]
  changed = sample.picture.convert("HSV").point(np.concatenate(tables).astype(np.uint8).tolist()).convert("RGB")
  return replace(sample, image=sample.with_content(changed))


def _grey(p: float, sample: Sample, rng: np.random.Generator) -> Sample:
  if rng.random() >= p: return sample
  return replace(sample, image=sample.with_content(sample.picture.convert("L").convert("RGB")))


def boxes_at_most(dataset: Any, pictures: int, most: int) -> int:
  """The length of a loader's box axis where `pictures` of `dataset` come onto one canvas: enough for all of them, but at most `most`, in steps
  of 8."""
  return max(8, -(-max(dataset.max_boxes, min(dataset.max_boxes * pictures, most)) // 8) * 8)
