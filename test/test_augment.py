"""Mosaics, zoom and shift, colour and mixtures: boxes stay on what they are of, whatever is drawn, and the number of workers changes nothing."""
from dataclasses import replace
import numpy as np, pytest
from tinydet.datasets.augment import boxes_at_most, hsv, place, stays
from tinydet.datasets.loader import Loader
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


@pytest.mark.parametrize("options", [{}, {"zoom": 0.5, "shift": 0.1}, {"mosaic": 1.0}, {"mosaic": 1.0, "zoom": 0.5, "shift": 0.1}])
def test_boxes_stay_on_what_they_are_of(options):
  data, seen = Squares(), 0
  for index in range(12):
    sample = place(64, 96, FILL, **options)(data[index], draw(index))
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
  assert seen > (20 if "mosaic" in options else 8)


def test_nothing_drawn_is_a_letterbox():
  sample = place(64, 96, FILL)(Squares()[0], draw(0))   # 60x90 in 64x96
  assert (sample.image[:, 0] == 0).all()
  sample = place(64, 64, FILL)(Squares()[0], draw(0))   # scaled to 43x64: 10 rows above, 11 below
  assert (sample.image[:10] == 114).all() and (sample.image[53:] == 114).all() and (sample.image[10] == 0).all()


def test_the_same_draw_is_the_same_picture_and_mosaics_close():
  data, transform = Squares(), place(64, 64, FILL, mosaic=1.0, zoom=0.3, shift=0.1, mix=1.0, last_epoch=3)
  first, second, later = (transform(data[4], draw(4, epoch)) for epoch in (0, 0, 1))
  np.testing.assert_array_equal(first.image, second.image)
  assert (first.image != later.image).any() and len(transform(data[4], draw(4, 3)).boxes) <= 1
  assert max(len(transform(data[i], draw(i, 2)).boxes) for i in range(12)) > 3


def test_workers_change_nothing():
  data = Shapes("train", 1, size=64, count=12)
  transform = compose(place(64, 64, FILL, mosaic=1.0, mix=0.5, zoom=0.5, shift=0.1, last_epoch=1, most=16), hsv(), horizontal_flip())
  batches = []
  for workers in (0, 2):
    loader = Loader(data, 4, transform, seed=3, shuffle=True, drop_last=True, workers=workers, max_boxes=boxes_at_most(data, 1.0, 0.5, 16))
    batches.append([batch for epoch in (0, 1) for batch in loader.epoch(epoch)])
    loader.close()
  assert batches[0][0].boxes.shape == (4, 16, 4)
  for a, b in zip(*batches, strict=True):
    for field in vars(a): np.testing.assert_array_equal(getattr(a, field), getattr(b, field), field)


def test_what_is_left_of_a_box():
  whole = np.float32([[0, 0, 10, 10], [-95, 0, 5, 10], [-8, 0, 5, 10], [0, 0, 1.5, 30], [0, 0, 300, 2.5], [0, 0, 3, 3]])
  np.testing.assert_array_equal(stays(whole.clip(0, None), whole), [True, False, True, False, False, True])


def test_most_boxes_and_colour():
  data, wide = Squares(), place(96, 96, FILL, mosaic=1.0, most=2)
  for i in range(6): assert len(wide(data[i], draw(i)).boxes) <= 2
  assert [boxes_at_most(data, *chances, 200) for chances in ((0, 0), (1, 0))] == [8, 8] and boxes_at_most(Shapes("train"), 1.0, 0.1, 40) == 40
  sample = data[0]
  grey = replace(sample, image=np.full((8, 8, 3), 100, np.uint8), content_size=(8, 8))
  np.testing.assert_array_equal(hsv(0.5, 0.5, 0.0)(grey, draw(0)).image, grey.image)   # grey has no hue to turn
  values = [int(hsv()(grey, draw(i)).image[0, 0, 0]) for i in range(30)]
  assert 58 <= min(values) < 85 and 115 < max(values) <= 141
