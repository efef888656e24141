"""Augmentation of parts of a picture: SSD's crop and expansion, objects pasted in from other pictures, holes. As `transforms`, one sample at a time;
what is drawn follows from seed, epoch and index alone."""
import math
from dataclasses import replace
from functools import partial
import numpy as np
from PIL import Image
from tinydet.datasets.augment import another, areas, stays
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import Transform, inside_size

OVERLAPS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)   # least IoU of a crop and some object; None leaves the picture whole
LEAST_SIDE, MOST_ASPECT, TRIALS = 0.3, 2.0, 40    # of a crop: share of each side, longer over shorter share, draws before another overlap is tried
PASTED, COVERS, PLACES = 8, 0.3, 4                # objects pasted at most, share of another object that one may cover, places tried for it
SMALLEST_PASTED = 8                               # pixels of a side: less shows nothing
HOLES, LARGEST_HOLE, HIDDEN = 6, 0.4, 0.6         # at most; their sides, as a share of the picture's; share of a box that may be covered


def expand(p: float, fill: tuple[int, int, int], largest: float = 4.0) -> Transform:
  """With chance `p`, shrink the picture by 1 to `largest`, evenly drawn, and put it at a random place of a sheet of its former size and of the colour
  `fill`: the objects become small ones (Liu et al. 2015, "SSD", section 3.6, where the sheet grows instead)."""
  return partial(_expand, p, tuple(fill), largest)


def iou_crop(p: float) -> Transform:
  """With chance `p`, cut out a part that shows some object to a drawn extent (Liu et al. 2015, section 2.2 "data augmentation").

  The least IoU of the part and some object is one of `OVERLAPS`, which also has "any part" and "the whole picture"; its sides are `LEAST_SIDE` to 1
  of the picture's. Objects whose centre lies in it stay, clipped. A picture without objects is cut anywhere."""
  return partial(_iou_crop, p)


def paste(p: float, *, last_epoch: int | None = None) -> Transform:
  """With chance `p`, paste up to `PASTED` objects of another picture in, boxes and all, as there are no outlines (YOLOv7's paste-in, after Ghiasi et
  al. 2021).

  An object has the size that it would have if its picture filled this one. It goes to the first of `PLACES` random places where it covers at most
  `COVERS` of each object there, or nowhere. From epoch `last_epoch` on nothing is pasted."""
  return partial(_paste, p, last_epoch)


def cutout(p: float) -> Transform:
  """With chance `p`, cover up to `HOLES` random rectangles with an even grey (DeVries & Taylor 2017). Objects that are then covered by more than
  `HIDDEN` are dropped; boxes of the others stay."""
  return partial(_cutout, p)


def _expand(p: float, fill: tuple[int, int, int], largest: float, sample: Sample, rng: np.random.Generator) -> Sample:
  if rng.random() >= p: return sample
  h, w = sample.content_size
  factor, places = rng.uniform(1, largest), rng.random(2)
  new_h, new_w = max(1, round(h / factor)), max(1, round(w / factor))
  left, top = (round(float(at) * room) for at, room in zip(places, (w - new_w, h - new_h)))
  sheet = Image.new("RGB", (w, h), fill)
  sheet.paste(sample.picture.resize((new_w, new_h), Image.Resampling.BILINEAR), (left, top))
  boxes = (sample.boxes - _corner(sample)) * np.float32([new_w / w, new_h / h] * 2) + np.float32([left, top] * 2)
  kept = stays(boxes, boxes)
  return replace(sample, image=sheet, boxes=boxes[kept], labels=sample.labels[kept], origin=(0, 0))


def _iou_crop(p: float, sample: Sample, rng: np.random.Generator) -> Sample:
  if rng.random() >= p: return sample
  height, width = sample.content_size
  boxes = (sample.boxes - _corner(sample)).astype(np.float64)
  centres = (boxes[:, :2] + boxes[:, 2:]) / 2
  for _ in range(TRIALS):
    if (least := OVERLAPS[int(rng.integers(len(OVERLAPS)))]) is None: return sample
    for _ in range(TRIALS):
      across, down = rng.uniform(LEAST_SIDE, 1, 2)
      if not 1 / MOST_ASPECT <= across / down <= MOST_ASPECT: continue
      w, h = max(1, round(width * across)), max(1, round(height * down))
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      part = np.array([left, top, left + w, top + h], np.float64)
      inside = ((centres > part[:2]) & (centres < part[2:])).all(1)
      if len(boxes) and (not inside.any() or _iou(boxes[inside], part).max() < least): continue
      cut = (boxes.clip(np.tile(part[:2], 2), np.tile(part[2:], 2)) - np.tile(part[:2], 2)).astype(np.float32)
      return replace(sample, image=sample.picture.crop((left, top, left + w, top + h)), boxes=cut[inside], labels=sample.labels[inside],
                     content_size=(h, w), origin=(0, 0))
  return sample


def _paste(p: float, last_epoch: int | None, sample: Sample, rng: np.random.Generator) -> Sample:
  if rng.random() >= p or (last_epoch is not None and rng.epoch >= last_epoch): return sample
  height, width = sample.content_size
  other = another((height, width), rng)
  scale = np.array(inside_size(other.content_size, height, width)[::-1] * 2) / np.array(other.content_size[::-1] * 2)
  source = (other.boxes - _corner(other)).clip(0, np.array(other.content_size[::-1] * 2, np.float32))
  boxes, labels, picture = [(box - _corner(sample)).astype(np.float64) for box in sample.boxes], list(sample.labels), None
  for i in rng.permutation(len(source))[:PASTED]:
    w, h = (int(side) for side in np.round((source[i] * scale)[2:] - (source[i] * scale)[:2]))
    if min(w, h) < SMALLEST_PASTED or w > width or h > height: continue
    for _ in range(PLACES):
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      box = np.array([left, top, left + w, top + h], np.float64)
      if boxes and (_shared(np.array(boxes), box) > COVERS * areas(np.array(boxes))).any(): continue
      if picture is None: picture = sample.picture.copy()   # transforms never change their input
      picture.paste(other.picture.resize((w, h), Image.Resampling.BILINEAR, box=tuple(float(side) for side in source[i])), (left, top))
      boxes.append(box)
      labels.append(other.labels[i])
      break
  if picture is None: return sample
  return replace(sample, image=sample.with_content(picture), boxes=np.float32(boxes) + _corner(sample), labels=np.array(labels, np.int32))


def _cutout(p: float, sample: Sample, rng: np.random.Generator) -> Sample:
  if rng.random() >= p: return sample
  height, width = sample.content_size
  picture, covered = sample.picture.copy(), np.zeros((height, width), bool)
  for _ in range(int(rng.integers(1, HOLES + 1))):
    w, h = (max(1, round(side * float(share))) for side, share in zip((width, height), rng.uniform(0, LARGEST_HOLE, 2)))
    left, top, level = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), int(rng.integers(64, 192))
    picture.paste((level,) * 3, (left, top, left + w, top + h))
    covered[top:top + h, left:left + w] = True
  boxes = sample.boxes - _corner(sample)
  kept = np.array([_covered(covered, box) <= HIDDEN for box in boxes], bool)
  return replace(sample, image=sample.with_content(picture), boxes=sample.boxes[kept], labels=sample.labels[kept])


def _covered(covered: np.ndarray, box: np.ndarray) -> float:
  """The share of the pixels of `box` that is covered; those it touches count."""
  x1, y1, x2, y2 = math.floor(max(box[0], 0)), math.floor(max(box[1], 0)), math.ceil(box[2]), math.ceil(box[3])
  part = covered[y1:y2, x1:x2]
  return float(part.mean()) if part.size else 0.0


def _corner(sample: Sample) -> np.ndarray:
  """f32 [4], to take off boxes so that they count from the corner of the content."""
  return np.array([*sample.origin[::-1]] * 2, np.float32)


def _shared(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
  """[M], the area that each of `boxes` [M,4] has in common with `box` [4]."""
  return (np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])).clip(0, None).prod(1)


def _iou(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
  shared = _shared(boxes, box)
  return shared / np.maximum(areas(boxes) + areas(box[None]) - shared, 1e-9)
