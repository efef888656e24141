"""Transforms of a `Sample`: each function here returns `(Sample, np.random.Generator) -> Sample` and never changes its input.

A loader's generator is a `Draw`, which knows the data set, the picture's place in it and the epoch: a transform may make one picture of several.

They are `functools.partial` objects of module functions, not closures, so that a loader can send them to its worker processes.
"""
import math
from dataclasses import replace
from functools import partial
from collections.abc import Callable
from typing import Any
import numpy as np
from PIL import Image, ImageStat
from tinydet.datasets.sample import Sample

Transform = Callable[[Sample, np.random.Generator], Sample]
MEAN_GREY = (124, 116, 104)  # mean colour of ImageNet: zero after the usual normalisation
LUMA = np.array([0.299, 0.587, 0.114])


class Draw(np.random.Generator):
  """The random numbers of one sample, those of `np.random.default_rng(seed)`, and what it is of: picture `index` of `dataset`, in epoch `epoch`."""
  def __init__(self, seed: tuple[int, ...], dataset: Any, index: int, epoch: int):
    super().__init__(np.random.PCG64(seed))
    self.dataset, self.index, self.epoch = dataset, index, epoch


def compose(*transforms: Transform) -> Transform:
  """The given transforms one after the other; `compose()` is the identity."""
  return partial(_compose, transforms)


def resize(height: int, width: int) -> Transform:
  """Stretch the picture to exactly `height` x `width` pixels (aspect ratio not kept); bilinear with antialiasing."""
  return partial(_resize, height, width)


def resize_shorter(shorter: int, maximum: int) -> Transform:
  """Resize, keeping the aspect ratio, to `shorter` pixels on the shorter side, or to `maximum` on the longer one where it would be longer.

  The other side is rounded down, as in torchvision's GeneralizedRCNNTransform. Follow with `pad_to` for a fixed canvas.
  """
  return partial(_resize_shorter, shorter, maximum)


def resize_inside(height: int, width: int) -> Transform:
  """Resize, keeping the aspect ratio, to the largest size that fits `height` x `width` pixels, the other side rounded. Follow with `pad_to` for a
  letterbox."""
  return partial(_resize_inside, height, width)


def pad_to(height: int, width: int, fill: tuple[int, int, int] = MEAN_GREY, centred: bool = False) -> Transform:
  """Put the picture at the top left, or in the middle, of a `height` x `width` canvas of colour `fill`; `content_size` keeps the picture's size and
  `origin` says where it is.

  In the middle, the odd pixel of padding goes to the right and bottom. Raises ValueError when the picture is larger than the canvas.
  """
  return partial(_pad_to, height, width, fill, centred)


def horizontal_flip(p: float = 0.5) -> Transform:
  """Mirror the picture left to right with probability `p`; padding stays where it is."""
  return partial(_horizontal_flip, p)


def scale_jitter(low: float, high: float, height: int, width: int, fill: tuple[int, int, int] = MEAN_GREY) -> Transform:
  """Large-scale jitter (Ghiasi et al. 2021, "Simple Copy-Paste", section 3; torchvision's ScaleJitter and FixedSizeCrop).

  The picture is resized, keeping its aspect ratio, to a uniform random factor in [`low`, `high`] of the largest size that fits the
  `height` x `width` canvas; what is larger than the canvas is cropped at a random place, what is smaller is padded at the right and bottom.
  Boxes are clipped; those left with less than a tenth of their area, or less than 1 pixel on a side, are dropped.
  """
  return partial(_scale_jitter, low, high, height, width, fill)


def random_resized_crop(height: int, width: int, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Transform:
  """Stretch a random part of the picture to `height` x `width` pixels (Szegedy et al. 2014, section 6; torchvision's RandomResizedCrop).

  The part has a share of the area uniform in `scale` and a width over height whose logarithm is uniform in that of `ratio`; if ten such draws do not
  fit the picture, it is the largest central part within `ratio`. Boxes are clipped to it; those of which nothing is left are dropped.
  """
  return partial(_random_resized_crop, height, width, scale, ratio)


def center_crop_resize(resize: int, size: int) -> Transform:
  """Resize to `resize` pixels on the shorter side, keeping the aspect ratio, and cut out the central square of `size` pixels.

  As torchvision's Resize and CenterCrop; only the square is computed. Boxes are clipped to it; those of which nothing is left are dropped.
  Raises ValueError when `size` is more than `resize`.
  """
  if size > resize: raise ValueError(f"a square of {size} pixels cannot be cut out of a picture of {resize} on its shorter side")
  return partial(_center_crop_resize, resize, size)


def photometric_jitter(brightness: float = 0.125, contrast: float = 0.5, saturation: float = 0.5, hue: float = 0.05, p: float = 0.5) -> Transform:
  """Random brightness, contrast, saturation and hue, each with probability `p`; defaults are torchvision's RandomPhotometricDistort.

  Factors are uniform in [1 - x, 1 + x]; `hue` is in turns. Contrast comes before or after the colour changes with equal chance. Each step is linear
  in the colour (hue: a rotation about the grey axis that keeps the luma), so all are joined in one colour matrix and clipped once, at the end.
  """
  return partial(_photometric_jitter, brightness, contrast, saturation, hue, p)


def _compose(transforms: tuple[Transform, ...], sample: Sample, rng: np.random.Generator) -> Sample:
  for transform in transforms: sample = transform(sample, rng)
  return sample


def _bare(sample: Sample) -> Sample:
  """`sample` without padding above and to the left of its content, so that boxes count from its corner."""
  if sample.origin == (0, 0): return sample
  top, left = sample.origin
  return replace(sample, image=sample.picture, boxes=sample.boxes - np.array([left, top] * 2, np.float32), origin=(0, 0))


def _resize(height: int, width: int, sample: Sample, rng: np.random.Generator) -> Sample:
  sample = _bare(sample)
  h, w = sample.content_size
  picture = sample.picture
  if (h, w) != (height, width): picture = picture.resize((width, height), Image.Resampling.BILINEAR)
  return replace(sample, image=picture, boxes=resized_boxes(sample.boxes, (h, w), (height, width)), content_size=(height, width))


def resized_boxes(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
  """`boxes` f32 [M,4] of a picture of the size `old` in one that is stretched to `new`, (height, width) each."""
  return boxes * np.array([new[1] / old[1], new[0] / old[0]] * 2, np.float32)


def first_size(transform: Transform, size: tuple[int, int]) -> tuple[int, int] | None:
  """(height, width) that `transform` first resizes a whole picture of `size` to; None where it does something else first."""
  while isinstance(transform, partial) and transform.func is _compose and transform.args[0]: transform = transform.args[0][0]
  if not isinstance(transform, partial) or transform.func not in READ_AT: return None
  return READ_AT[transform.func](size, *transform.args)


def inside_size(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
  """What `resize_inside` makes of a picture of `size` (height, width)."""
  scale = min(height / size[0], width / size[1])
  return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resized_sizes(sizes: np.ndarray, shorter: int, maximum: int) -> np.ndarray:
  """What `resize_shorter` makes of pictures of `sizes` i64 [N,2], (height, width) each."""
  short, long = sizes.min(1, keepdims=True), sizes.max(1, keepdims=True)
  fits = shorter * long <= maximum * short
  return np.maximum(1, sizes * np.where(fits, shorter, maximum) // np.where(fits, short, long))


def _resize_shorter(shorter: int, maximum: int, sample: Sample, rng: np.random.Generator) -> Sample:
  return _resize(*resized_sizes(np.array([sample.content_size]), shorter, maximum)[0].tolist(), sample, rng)


def _resize_inside(height: int, width: int, sample: Sample, rng: np.random.Generator) -> Sample:
  return _resize(*inside_size(sample.content_size, height, width), sample, rng)


def _pad_to(height: int, width: int, fill: tuple[int, int, int], centred: bool, sample: Sample, rng: np.random.Generator) -> Sample:
  h, w = sample.content_size
  if h > height or w > width: raise ValueError(f"a picture of {h}x{w} pixels does not fit a canvas of {height}x{width}")
  origin = ((height - h) // 2, (width - w) // 2) if centred else (0, 0)
  moved = [new - old for new, old in zip(origin, sample.origin)]
  boxes = sample.boxes + np.array([moved[1], moved[0]] * 2, np.float32) if any(moved) else sample.boxes
  image = np.empty((height, width, 3), np.uint8)
  content = sample.image[sample.window]
  if (h, w) != (height, width): image[:] = fill
  placed = replace(sample, image=image, boxes=boxes, origin=origin)
  image[placed.window] = content
  return placed


def _horizontal_flip(p: float, sample: Sample, rng: np.random.Generator) -> Sample:
  if rng.random() >= p: return sample
  edges, boxes = 2 * sample.origin[1] + sample.content_size[1], sample.boxes.copy()   # left and right edge of the content, added up
  boxes[:, [0, 2]] = edges - sample.boxes[:, [2, 0]]
  mirrored = sample.picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)   # three times as fast as numpy's [:, ::-1]
  return replace(sample, image=sample.with_content(mirrored), boxes=boxes)


# What `first_size` is of a transform's size and arguments, for those that begin by resizing; `augment` adds its own.
READ_AT: dict[Callable, Callable[..., tuple[int, int] | None]] = {
  _resize: lambda size, *wanted: wanted, _resize_inside: inside_size,
  _resize_shorter: lambda size, *limits: tuple(resized_sizes(np.array([size]), *limits)[0].tolist())}


def _scale_jitter(low: float, high: float, height: int, width: int, fill: tuple[int, int, int], sample: Sample, rng: np.random.Generator) -> Sample:
  sample = _bare(sample)
  h, w = sample.content_size
  scale = min(height / h, width / w) * rng.uniform(low, high)
  full_h, full_w = max(1, int(h * scale)), max(1, int(w * scale))
  new_h, new_w = min(full_h, height), min(full_w, width)
  top, left = (int(x) for x in rng.integers(0, [full_h - new_h + 1, full_w - new_w + 1]))
  window = (left * w / full_w, top * h / full_h, min((left + new_w) * w / full_w, w), min((top + new_h) * h / full_h, h))
  picture = sample.picture.resize((new_w, new_h), Image.Resampling.BILINEAR, box=window)

  whole = sample.boxes * np.array([full_w / w, full_h / h] * 2, np.float32) - np.array([left, top] * 2, np.float32)
  boxes = whole.clip(0, np.array([new_w, new_h] * 2, np.float32))
  sides, whole_sides = boxes[:, 2:] - boxes[:, :2], whole[:, 2:] - whole[:, :2]
  keep = (sides.min(1, initial=np.inf) >= 1) & (sides.prod(1) >= 0.1 * whole_sides.prod(1))
  cropped = replace(sample, image=picture, boxes=boxes[keep], labels=sample.labels[keep], content_size=(new_h, new_w))
  return _pad_to(height, width, fill, False, cropped, rng)


def _random_resized_crop(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], sample: Sample,
                         rng: np.random.Generator) -> Sample:
  sample = _bare(sample)
  h, w = sample.content_size
  for _ in range(10):
    area, aspect = h * w * rng.uniform(*scale), math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    part_w, part_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < part_w <= w and 0 < part_h <= h:
      top, left = (int(x) for x in rng.integers(0, [h - part_h + 1, w - part_w + 1]))
      break
  else:
    part_w, part_h = min(w, max(1, round(h * ratio[1]))), min(h, max(1, round(w / ratio[0])))
    top, left = (h - part_h) // 2, (w - part_w) // 2
  picture = sample.picture.crop((left, top, left + part_w, top + part_h)).resize((width, height), Image.Resampling.BILINEAR)
  return _cropped(sample, picture, (left, top), (width / part_w, height / part_h))


def _center_crop_resize(resize: int, size: int, sample: Sample, rng: np.random.Generator) -> Sample:
  sample = _bare(sample)
  h, w = sample.content_size
  full_h, full_w = h * resize // min(h, w), w * resize // min(h, w)
  x, y = w / full_w, h / full_h
  left, top = round((full_w - size) / 2) * x, round((full_h - size) / 2) * y
  window = (left, top, min(left + size * x, w), min(top + size * y, h))
  picture = sample.picture.resize((size, size), Image.Resampling.BILINEAR, box=window)
  return _cropped(sample, picture, (left, top), (1 / x, 1 / y))


def _cropped(sample: Sample, picture: Image.Image, origin: tuple[float, float], scale: tuple[float, float]) -> Sample:
  """`sample` with `picture` for its image: what lay at `origin` (x, y) is now at the top left, `scale` (x, y) times as large."""
  limits = np.array([picture.width, picture.height] * 2, np.float32)
  boxes = ((sample.boxes - np.array(origin * 2, np.float32)) * np.array(scale * 2, np.float32)).clip(0, limits)
  keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
  return replace(sample, image=picture, boxes=boxes[keep], labels=sample.labels[keep], content_size=(picture.height, picture.width))


def _photometric_jitter(brightness: float, contrast: float, saturation: float, hue: float, p: float,
                        sample: Sample, rng: np.random.Generator) -> Sample:
  limits = np.array([brightness, contrast, saturation, hue])
  change = np.where(rng.random(4) < p, rng.uniform(-limits, limits), 0)
  contrast_first = rng.random() < 0.5
  if not change.any(): return sample
  picture = sample.picture
  matrix = colour_matrix(np.array(ImageStat.Stat(picture).mean), *change, contrast_first=contrast_first)
  return replace(sample, image=sample.with_content(picture.convert("RGB", tuple(matrix.ravel()))))


def colour_matrix(mean: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float, *, contrast_first: bool) -> np.ndarray:
  """The affine map f64 [3,4] of RGB that scales brightness, contrast and saturation by 1 + x and turns the hue by `hue` turns.

  `mean` f64 [3] is the picture's mean colour: contrast scales the distance to its luma.
  """
  linear, offset = np.eye(3) * (1 + brightness), np.zeros(3)
  grey = np.outer(np.ones(3), LUMA)
  axis, angle = np.ones(3) / math.sqrt(3), 2 * math.pi * hue
  turn = np.eye(3) * math.cos(angle) + np.outer(axis, axis) * (1 - math.cos(angle)) + np.cross(axis, np.eye(3)).T * math.sin(angle)
  turn += np.outer(np.ones(3), LUMA - LUMA @ turn)
  colour = turn @ (grey + (np.eye(3) - grey) * (1 + saturation))
  for step in ("contrast", "colour") if contrast_first else ("colour", "contrast"):
    if step == "colour": linear, offset = colour @ linear, colour @ offset
    else:
      luma = LUMA @ (linear @ mean + offset)
      linear, offset = linear * (1 + contrast), offset * (1 + contrast) - luma * contrast
  return np.concatenate([linear, offset[:, None]], 1)
