"""SSD's crop and expansion, pasted objects, holes: against rules written out in numpy, wherever in its canvas the picture lies."""
from dataclasses import replace
import numpy as np, pytest
from tinydet.datasets.patches import HIDDEN, LARGEST_HOLE, cutout, expand, iou_crop, paste
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import Draw, pad_to

FILL = (114, 114, 114)


def scene(seed, size=(60, 80), count=4):
  """A black picture with squares that do not overlap, each of a colour of its own, and their exact boxes; label i has colour 250 - 20 i."""
  rng, image, boxes = np.random.default_rng(seed), np.zeros((*size, 3), np.uint8), []
  for _ in range(200):
    side = int(rng.integers(9, 16))
    left, top = (int(rng.integers(0, room - side)) for room in size[::-1])
    if len(boxes) == count: break
    if image[top:top + side, left:left + side].any(): continue
    image[top:top + side, left:left + side] = 250 - 20 * len(boxes)
    boxes.append((left, top, left + side, top + side))
  return Sample(image, np.float32(boxes).reshape(-1, 4), np.arange(len(boxes), dtype=np.int32), seed, size, size)


class Scenes:
  name, class_names, sizes, max_boxes = "scenes", list("abcd"), np.array([(60, 80)] * 8), 4
  def __len__(self): return 8
  def __getitem__(self, i): return scene(i)
  def image_name(self, i): return str(i)


def draw(epoch, index=0): return Draw((0, epoch, index), Scenes(), index, epoch)


def colours_under(sample, tolerance=3):
  """Whether the middle of each box has the colour of its label."""
  middles = ((sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2).astype(int)
  return all(abs(int(sample.image[y, x, 0]) - (250 - 20 * label)) <= tolerance for (x, y), label in zip(middles, sample.labels))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("transform", [expand(1.0, FILL), iou_crop(1.0), paste(1.0), cutout(1.0)])
def test_boxes_keep_their_objects_and_inputs_stay(transform, padded):
  changed = 0
  for epoch in range(15):
    sample = scene(epoch)
    if padded: sample = pad_to(96, 100, FILL, True)(sample, draw(0))
    image, boxes = sample.image.copy(), sample.boxes.copy()
    found = transform(sample, draw(epoch))
    np.testing.assert_array_equal(sample.image, image)
    np.testing.assert_array_equal(sample.boxes, boxes)
    changed += found is not sample
    (top, left), (height, width) = found.origin, found.content_size
    assert (found.boxes >= (left, top, left, top)).all() and (found.boxes <= (left + width, top + height, left + width, top + height)).all()
    assert found.boxes.dtype == np.float32 and found.labels.dtype == np.int32 and len(found.boxes) == len(found.labels)
    if transform.func.__name__ == "_iou_crop":
      whole = np.unique(found.image)   # a kept object's centre is in the part, so its colour is; clipped, the middle of its box still is of it
      assert all(250 - 20 * label in whole for label in found.labels)
    if transform.func.__name__ in ("_iou_crop", "_paste"): assert transform.func.__name__ == "_paste" or colours_under(found)
  assert changed > 9


def test_expansion_is_exact():
  for epoch in range(8):
    sample, rng = scene(epoch), draw(epoch)
    found = expand(1.0, FILL)(sample, draw(epoch))
    rng.random()
    factor = rng.uniform(1, 4)
    places = rng.random(2)
    new = np.array([round(80 / factor), round(60 / factor)])
    at = [round(float(p) * room) for p, room in zip(places, np.array([80, 60]) - new)]
    kept = (sample.boxes[:, 2:] - sample.boxes[:, :2]).min(1) / factor > 2.1
    wanted = sample.boxes * np.tile(new / (80, 60), 2) + np.tile(at, 2)
    assert found.image.shape == (60, 80, 3)
    np.testing.assert_allclose(found.boxes, wanted[kept], atol=1e-4) if kept.all() else None
    outside = np.ones((60, 80), bool)
    outside[at[1]:at[1] + new[1], at[0]:at[0] + new[0]] = False
    assert (found.image[outside] == 114).all() and (found.image[~outside] != 114).any()


def test_a_crop_shows_an_object_and_all_whose_centres_it_holds():
  sizes = set()
  for epoch in range(60):
    sample = scene(epoch)
    found = iou_crop(1.0)(sample, draw(epoch))
    h, w = found.content_size
    assert found.image.shape == (h, w, 3) and 0.29 * 60 <= h <= 60 and 0.29 * 80 <= w <= 80
    sizes.add((h, w))
    assert len(found.boxes) >= 1
    # Where it was cut: the place at which the picture shows what was found.
    at = [(y, x) for y in range(60 - h + 1) for x in range(80 - w + 1) if (sample.image[y:y + h, x:x + w] == found.image).all()]
    centres = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2
    agree = []
    for y, x in at:
      inside = ((centres > (x, y)) & (centres < (x + w, y + h))).all(1)
      cut = (sample.boxes[inside] - (x, y, x, y)).clip(0, (w, h, w, h))
      agree.append(np.array_equal(sample.labels[inside], found.labels) and np.allclose(cut, found.boxes))
    assert any(agree)
  assert len(sizes) > 25
  bare = replace(scene(0), boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int32))
  assert iou_crop(1.0)(bare, draw(1)).boxes.shape == (0, 4)


def test_pasted_objects_come_whole_and_hide_little():
  pasted = 0
  for epoch in range(30):
    sample = scene(epoch)
    found = paste(1.0)(sample, draw(epoch))
    before, after = sample.boxes.astype(np.float64), found.boxes.astype(np.float64)
    np.testing.assert_array_equal(after[:len(before)], before)
    for i in range(len(before), len(after)):
      x1, y1, x2, y2 = (int(v) for v in after[i])
      later = np.zeros((60, 80), bool)
      for other in after[i + 1:].astype(int): later[other[1]:other[3], other[0]:other[2]] = True
      seen = ~later[y1:y2, x1:x2]
      assert (np.abs(found.image[y1:y2, x1:x2, 0].astype(int) - (250 - 20 * found.labels[i])) <= 2)[seen].all()
      shared = (np.minimum(after[:i, 2:], after[i, 2:]) - np.maximum(after[:i, :2], after[i, :2])).clip(0, None).prod(1)
      assert (shared <= 0.3 * (after[:i, 2:] - after[:i, :2]).prod(1) + 1e-6).all()
      pasted += 1
  assert pasted > 40
  assert paste(1.0, last_epoch=5)(scene(0), draw(5)).boxes.shape == (4, 4) and len(paste(1.0, last_epoch=5)(scene(0), draw(4)).boxes) > 4


def test_holes_drop_what_they_hide():
  dropped = 0
  for epoch in range(40):
    sample = scene(epoch)
    found = cutout(1.0)(sample, draw(epoch))
    hidden = (found.image != sample.image).any(-1)
    for box, label in zip(sample.boxes.astype(int), sample.labels):
      share = hidden[box[1]:box[3], box[0]:box[2]].mean()
      assert (label in found.labels) == (share <= HIDDEN)
      dropped += share > HIDDEN
    assert 0 < hidden.mean() < 6 * LARGEST_HOLE ** 2
  assert dropped > 5
