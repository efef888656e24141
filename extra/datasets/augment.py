"""Augmentation that makes a canvas of one or several pictures: mosaics, random zoom and shift, colour, mixtures. As `transforms`, but that all pixels
of what comes out are its content.

What is drawn follows from the sample's generator alone (`transforms.Draw`): from seed, epoch and index, whatever the number of workers.

A rule for boxes holds throughout: they are clipped to the canvas, and dropped where less than a tenth of their area is left, less than 2 pixels of a
side, or a box more than a hundred times as long as wide."""
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
import numpy as np
from PIL import Image
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import Transform, inside_size

SMALLEST_SHARE, SMALLEST_SIDE, SLIMMEST = 0.1, 2.0, 100.0   # of a box that stays: area, pixels, longer over shorter side
MIXTURE = 32.0   # both parameters of the beta distribution that a mixture's shares are drawn from


def place(height: int, width: int, fill: Sequence[int], *, zoom: float = 0.0, shift: float = 0.0, mosaic: float = 0.0, mix: float = 0.0,
          last_epoch: int | None = None, most: int | None = None) -> Transform:
  """Bring a picture, or several, onto a canvas of `height` x `width` pixels (YOLOv4's mosaic and YOLOv5's zoom and shift).

  With chance `mosaic` four pictures, the others random ones of the data set, meet at a point in the middle half of a sheet of twice the canvas's
  sides, each as large as fits the canvas, else one lies in the middle of the canvas. That is zoomed by 1 - `zoom` to 1 + `zoom` and shifted by up to
  `shift` of a side; what nothing covers has the colour `fill`. With chance `mix` the result is blended with another one made likewise, which brings
  its boxes along (Zhang et al. 2018). From epoch `last_epoch` on (the first is 0) there are no mosaics and no mixtures. Of more than `most` boxes
  the largest stay."""
  return partial(_place, height, width, tuple(fill), zoom, shift, mosaic, mix, last_epoch, most)


def hsv(hue: float = 0.015, saturation: float = 0.7, value: float = 0.4) -> Transform:
  """Turn the hue by up to `hue` of itself, and scale saturation and value by up to 1 +- the others, each uniform (YOLOv5)."""
  return partial(_hsv, hue, saturation, value)


def _place(height: int, width: int, fill: tuple[int, ...], zoom: float, shift: float, mosaic: float, mix: float, last_epoch: int | None,
           most: int | None, sample: Sample, rng: np.random.Generator) -> Sample:
  canvas, late = (height, width), last_epoch is not None and rng.epoch >= last_epoch
  composed = _composed(canvas, fill, zoom, shift, 0.0 if late else mosaic, sample, rng)
  if not late and mix and rng.random() < mix:
    other = _composed(canvas, fill, zoom, shift, mosaic, _another(canvas, rng), rng)
    share = rng.beta(MIXTURE, MIXTURE)
    composed = replace(composed, image=Image.blend(other.picture, composed.picture, share),
                       boxes=np.concatenate([composed.boxes, other.boxes]), labels=np.concatenate([composed.labels, other.labels]))
  if most is None or len(composed.boxes) <= most: return composed
  kept = np.sort(np.argsort(-_areas(composed.boxes), kind="stable")[:most])
  return replace(composed, boxes=composed.boxes[kept], labels=composed.labels[kept])


def _another(canvas: tuple[int, int], rng: np.random.Generator) -> Sample:
  """A random picture of the data set, read at about the canvas's size where the data set can."""
  data, index = rng.dataset, int(rng.integers(len(rng.dataset)))
  return data.resized(index, inside_size(tuple(data.sizes[index]), *canvas)) if hasattr(data, "resized") else data[index]


def _composed(canvas: tuple[int, int], fill: tuple[int, ...], zoom: float, shift: float, mosaic: float, sample: Sample,
              rng: np.random.Generator) -> Sample:
  """One picture or a mosaic of four on the canvas, zoomed and shifted."""
  height, width = canvas
  four = mosaic > 0 and rng.random() < mosaic
  samples = [sample, *(_another(canvas, rng) for _ in range(3))] if four else [sample]
  meet_x, meet_y = rng.uniform(-0.5, 0.5, 2) * (width, height) if four else (0.0, 0.0)   # from the middle of what is zoomed
  scale = rng.uniform(1 - zoom, 1 + zoom)
  middle_x, middle_y = (0.5 + rng.uniform(-shift, shift, 2)) * (width, height)
  paper, boxes, labels = Image.new("RGB", (width, height), fill), [], []
  for corner, one in enumerate(samples):
    h, w = inside_size(one.content_size, height, width)
    if four: left, top = meet_x - w * (corner % 2 == 0), meet_y - h * (corner < 2)
    else: left, top = (width - w) // 2 - width / 2, (height - h) // 2 - height / 2
    sheet = (-width, -height, width, height) if four else (-width / 2, -height / 2, width / 2, height / 2)   # what lies outside is cut off
    part = _paste(paper, one, (left, top, left + w, top + h), sheet, scale, (middle_x, middle_y))
    boxes.append(part[0]), labels.append(part[1])
  return replace(sample, image=paper, boxes=np.concatenate(boxes), labels=np.concatenate(labels), content_size=canvas, origin=(0, 0))


def _paste(paper: Image.Image, sample: Sample, place: tuple[float, ...], sheet: tuple[float, ...], scale: float,
           middle: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
  """Put `sample` at `place` (x1, y1, x2, y2) of a sheet, which is then scaled about its middle and laid with it on `middle`; only what is seen is
  computed. Returns the boxes that are left, and their labels."""
  shown = [max(place[0], sheet[0]), max(place[1], sheet[1]), min(place[2], sheet[2]), min(place[3], sheet[3])]
  h, w = sample.content_size
  across, down = (place[2] - place[0]) / w, (place[3] - place[1]) / h
  offset = np.array([*sample.origin[::-1]] * 2, np.float32)
  whole = ((sample.boxes - offset) * (across, down, across, down) + np.array(place[:2] * 2)) * scale + np.array(middle * 2)
  window = [round(shown[i] * scale + middle[i % 2]) for i in range(4)]
  window = [min(max(side, 0), paper.size[i % 2]) for i, side in enumerate(window)]
  if window[2] > window[0] and window[3] > window[1]:
    of_picture = [((side - middle[i % 2]) / scale - place[i % 2]) / (across, down)[i % 2] for i, side in enumerate(window)]
    box = [min(max(side, 0.0), float((w, h)[i % 2])) for i, side in enumerate(of_picture)]
    if box[2] > box[0] and box[3] > box[1]:
      size = (window[2] - window[0], window[3] - window[1])
      paper.paste(sample.picture.resize(size, Image.Resampling.BILINEAR, box=tuple(box)), tuple(window[:2]))
  boxes = whole.clip(np.array(window[:2] * 2), np.array(window[2:] * 2)).astype(np.float32)
  kept = stays(boxes, whole)
  return boxes[kept], sample.labels[kept]


def stays(boxes: np.ndarray, whole: np.ndarray) -> np.ndarray:
  """bool [M]: which of `boxes` [M,4], clipped from `whole` [M,4], are still worth learning; see the rule above."""
  sides = boxes[:, 2:] - boxes[:, :2]
  short, long = sides.min(1, initial=np.inf), sides.max(1, initial=0)
  return (short >= SMALLEST_SIDE) & (_areas(boxes) >= SMALLEST_SHARE * _areas(whole)) & (long <= SLIMMEST * short)


def _areas(boxes: np.ndarray) -> np.ndarray: return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _hsv(hue: float, saturation: float, value: float, sample: Sample, rng: np.random.Generator) -> Sample:
  factors = 1 + rng.uniform(-1, 1, 3) * (hue, saturation, value)
  levels = np.arange(256)
  turned = (levels * factors[0]) % 256
  tables = [turned, *(np.minimum(levels * factor, 255) for factor in factors[1:])]
  changed = sample.picture.convert("HSV").point(np.concatenate(tables).astype(np.uint8).tolist()).convert("RGB")
  return replace(sample, image=sample.with_content(changed))


def boxes_at_most(dataset: Any, mosaic: float, mix: float, most: int) -> int:
  """The length of a loader's box axis for `place`: enough for every mosaic and mixture of `dataset`, but at most `most`, in steps of 8."""
  each = dataset.max_boxes * (4 if mosaic else 1) * (2 if mix else 1)
  return max(8, -(-max(dataset.max_boxes, min(each, most)) // 8) * 8)
