"""Mosaics, zoom, shift, turns and tilts, colour and mixtures: boxes stay on what they are of, whatever is drawn, and the number of workers changes
nothing."""
from dataclasses import replace
import numpy as np, pytest
from tinydet.datasets.augment import Strength, apply, around, boxes_at_most, grey, hsv, place, stays
from tinydet.datasets.loader import Loader
from tinydet.datasets.patches import cutout, expand, iou_crop, paste
from tinydet.datasets.sample import Sample
from tinydet.datasets.shapes import Shapes
from tinydet.datasets.transforms import Draw, compose, horizontal_flip

FILL = (114, 114, 114)


class Squares:
  """Black pictures of several sizes with one white square each, whose box is exact."""
  name, max_boxes, class_names, sizes = "squares", 1, ["square"], np.array([(60, 90), (80, 50), (64, 64)] * 4)

  def __len__(self): return len(self.sizes)
  def image_name(self, index): return f"square {index}"

  def __getitem__(self, index):
    rng, (height, width) = np.random.default_rng(index), self.sizes[index]
    left, top = (int(rng.integers(5, side - 30)) for side in (width, height))
    image = np.zeros((height, width, 3), np.uint8)
    image[top:top + 25, left:left + 25] = 255
    return Sample(image, np.float32([[left, top, left + 25, top + 25]]), np.int32([0]), index, (height, width), (height, width))


def draw(index, epoch=0, data=None, seed=0): return Draw((seed, epoch, index), data or Squares(), index, epoch)


@pytest.mark.parametrize("options", [{}, {"zoom": 0.5, "shift": 0.1}, {"mosaic": 1.0}, {"mosaic": 1.0, "zoom": 0.5, "shift": 0.1},
                                     {"mosaic": 1.0, "nine": 1.0}, {"mosaic": 1.0, "nine": 0.5, "zoom": 0.4}])
def test_boxes_stay_on_what_they_are_of(options):
  data, seen = Squares(), 0
  for index in range(12):
    sample = place(64, 96, FILL, Strength(**options))(data[index], draw(index))
    assert sample.image.shape == (64, 96, 3) and sample.content_size == (64, 96) and sample.origin == (0, 0)
    white = sample.image.min(-1) > 128
    covered = np.zeros_like(white)
    for x1, y1, x2, y2 in sample.boxes:
      rows, columns = slice(max(0, round(y1) - 1), round(y2) + 1), slice(max(0, round(x1) - 1), round(x2) + 1)
      covered[rows, columns] = True
      inner = white[round(y1) + 1:round(y2) - 1, round(x1) + 1:round(x2) - 1]
      if inner.size: assert inner.mean() > 0.95
      seen += 1
    if "zoom" not in options: assert (white & ~covered).sum() < 60   # slivers, whose boxes were dropped
  assert seen > (36 if options.get("nine") == 1 else 20 if "mosaic" in options else 8)


@pytest.mark.parametrize("options", [{"rotate": 40.0}, {"shear": 25.0}, {"perspective": 0.3}, {"mosaic": 1.0, "rotate": 15.0},
                                     {"rotate": 180.0, "shear": 10.0, "perspective": 0.2, "zoom": 0.4, "shift": 0.3},
                                     {"mosaic": 1.0, "nine": 0.5, "rotate": 30.0, "shear": 10.0, "perspective": 0.3, "zoom": 0.3, "shift": 0.1}])
def test_a_turned_square_fills_the_box_around_it(options):
  data, seen, touched = Squares(), 0, 0
  for index in range(48):
    sample = place(96, 120, FILL, Strength(**options))(data[index % 12], draw(index % 12, index // 12))
    assert sample.image.shape == (96, 120, 3) and (sample.boxes >= 0).all() and (sample.boxes <= (120, 96, 120, 96)).all()
    white = sample.image.min(-1) > 175   # above the fill
    covered = np.zeros_like(white)
    for x1, y1, x2, y2 in sample.boxes:
      rows, columns = slice(max(0, int(y1) - 1), int(y2) + 2), slice(max(0, int(x1) - 1), int(x2) + 2)
      covered[rows, columns] = True
      if x1 < 2 or y1 < 2 or x2 > 118 or y2 > 94 or min(x2 - x1, y2 - y1) < 8 or _meets(sample.boxes, (x1, y1, x2, y2)): continue
      if "mosaic" in options and white[rows, columns].mean() < 0.45: continue   # cut at the edge of a picture: the box is around what is left
      ys, xs = np.nonzero(white[rows, columns])
      found = np.array([xs.min() + columns.start, ys.min() + rows.start, xs.max() + 1 + columns.start, ys.max() + 1 + rows.start])
      assert np.abs(found - (x1, y1, x2, y2)).max() < 2.6, (options, index, found, (x1, y1, x2, y2))
      seen += 1
    touched += (white & ~covered).sum()
  assert seen > 9 and touched < 48 * 12   # but for slivers, whose boxes were dropped, no white is outside of all boxes


def _meets(boxes, box):
  """Whether another box is near `box`."""
  near = (np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2]) > -3).all(1)
  return near.sum() > 1


def test_projective_maps_move_corners():
  rng = np.random.default_rng(0)
  matrix = np.array([[1.1, 0.2, 3], [-0.1, 0.9, 5], [1e-3, -2e-3, 1]])
  boxes = np.sort(rng.uniform(0, 100, (20, 2, 2)), 1).reshape(20, 4)
  for box, found in zip(boxes, around(matrix, boxes)):
    corners = [matrix @ (x, y, 1) for x in box[::2] for y in box[1::2]]
    x, y = np.array([c[:2] / c[2] for c in corners]).T
    np.testing.assert_allclose(found, [x.min(), y.min(), x.max(), y.max()])
  assert apply(np.diag([1.0, 1, -1]), np.ones((1, 2))).min() >= 1000   # behind the eye: far off, on its own side


def test_no_boxes_and_the_smallest_pictures():
  bare = Sample(np.zeros((1, 1, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 0, (1, 1), (1, 1))
  whole = place(32, 64, FILL, Strength(0.9, 1.0, 180, 45, 0.3))
  for epoch in range(20):
    sample = whole(bare, draw(0, epoch))
    assert sample.image.shape == (32, 64, 3) and sample.boxes.shape == (0, 4) and sample.labels.shape == (0,)


def test_nothing_drawn_is_a_letterbox():
  sample = place(64, 96, FILL)(Squares()[0], draw(0))   # 60x90 in 64x96
  assert (sample.image[:, 0] == 0).all()
  sample = place(64, 64, FILL)(Squares()[0], draw(0))   # scaled to 43x64: 10 rows above, 11 below
  assert (sample.image[:10] == 114).all() and (sample.image[53:] == 114).all() and (sample.image[10] == 0).all()


def test_the_same_draw_is_the_same_picture_and_mosaics_close():
  data, transform = Squares(), place(64, 64, FILL, Strength(zoom=0.3, shift=0.1, mosaic=1.0, mix=1.0), last_epoch=3)
  first, second, later = (transform(data[4], draw(4, epoch)) for epoch in (0, 0, 1))
  np.testing.assert_array_equal(first.image, second.image)
  assert (first.image != later.image).any() and len(transform(data[4], draw(4, 3)).boxes) <= 1
  assert max(len(transform(data[i], draw(i, 2)).boxes) for i in range(12)) > 3


def test_workers_change_nothing():
  data = Shapes("train", 1, size=64, count=12)
  strength = Strength(zoom=0.5, shift=0.1, rotate=10, shear=5, perspective=0.1, mosaic=1.0, nine=0.5, mix=0.5)
  transform = compose(expand(0.5, FILL), iou_crop(0.5), place(64, 64, FILL, strength, last_epoch=1, most=16), paste(0.5), hsv(), grey(0.3),
                      horizontal_flip(), cutout(0.5))
  batches = []
  for workers in (0, 2):
    loader = Loader(data, 4, transform, seed=3, shuffle=True, drop_last=True, workers=workers,
                    max_boxes=boxes_at_most(data, strength.most_pictures, 16) + 8)
    batches.append([batch for epoch in (0, 1) for batch in loader.epoch(epoch)])
    loader.close()
  assert batches[0][0].boxes.shape == (4, 24, 4)
  for a, b in zip(*batches, strict=True):
    for field in vars(a): np.testing.assert_array_equal(getattr(a, field), getattr(b, field), field)


def test_what_is_left_of_a_box():
  whole = np.float32([[0, 0, 10, 10], [-95, 0, 5, 10], [-8, 0, 5, 10], [0, 0, 1.5, 30], [0, 0, 300, 2.5], [0, 0, 3, 3]])
  np.testing.assert_array_equal(stays(whole.clip(0, None), whole), [True, False, True, False, False, True])


def test_most_boxes_and_colour():
  data, wide = Squares(), place(96, 96, FILL, Strength(mosaic=1.0), most=2)
  for i in range(6): assert len(wide(data[i], draw(i)).boxes) <= 2
  assert [boxes_at_most(data, count, 200) for count in (1, 4, 9)] == [8, 8, 16] and boxes_at_most(Shapes("train"), 8, 40) == 40
  assert [Strength(mosaic=m, nine=n, mix=b).most_pictures for m, n, b in ((0, 1, 0), (1, 0, 0), (1, 0.1, 0), (1, 0.1, 0.1))] == [1, 4, 9, 18]
  sample = data[0]
  even = replace(sample, image=np.full((8, 8, 3), 100, np.uint8), content_size=(8, 8))
  np.testing.assert_array_equal(hsv(0.5, 0.5, 0.0)(even, draw(0)).image, even.image)   # grey has no hue to turn
  values = [int(hsv()(even, draw(i)).image[0, 0, 0]) for i in range(30)]
  assert 58 <= min(values) < 85 and 115 < max(values) <= 141
  coloured = replace(even, image=np.tile(np.uint8([200, 100, 50]), (8, 8, 1)))
  assert (grey(1.0)(coloured, draw(0)).image == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)).all()
  assert grey(0.0)(coloured, draw(0)) is coloured
