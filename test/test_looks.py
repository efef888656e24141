"""Several looks at a picture: what each sees, fusion against a plain one in Python floats, and that the whole of it does not mind a mirror."""
from types import SimpleNamespace
import numpy as np, pytest
from tinydet.detection.looks import LOOKS, SAME, back, fuse, join, look, scaled
from tinydet.detection.postprocess import Detections
from tinydet.predict import Predictor


def iou(a, b):
  shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
  union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
  return shared / union if union > 0 else 0.0


def plain(boxes, scores, labels, which, looks):
  objects = []
  for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
    near = [(iou(o["box"], boxes[i]), -n) for n, o in enumerate(objects) if o["label"] == labels[i]]
    if near and max(near)[0] > SAME: one = objects[-max(near)[1]]
    else: objects.append(one := {"label": labels[i], "members": []})
    one["members"].append(i)
    total = sum(scores[m] for m in one["members"])
    one["box"] = [sum(boxes[m][k] * scores[m] for m in one["members"]) / total for k in range(4)]
  for one in objects: one["score"] = sum(max([scores[m] for m in one["members"] if which[m] == v], default=0) for v in range(looks)) / looks
  return sorted(objects, key=lambda o: -o["score"])


@pytest.mark.parametrize("count", [0, 1, 60])
def test_fusion(count):
  rng = np.random.default_rng(count)
  corner = rng.uniform(0, 60, (count, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(20, 50, (count, 2))], 1)
  scores, labels, which = rng.uniform(0.05, 1, count), rng.integers(0, 2, count), rng.integers(0, 4, count)
  found, wanted = fuse(boxes, scores, labels, which, 4), plain(boxes.tolist(), scores.tolist(), labels.tolist(), which.tolist(), 4)
  assert len(found[0]) == len(wanted) and found[0].shape == (len(wanted), 4) and (count < 60 or len(wanted) < 50)
  np.testing.assert_allclose(found[1], [o["score"] for o in wanted], rtol=1e-5)
  for box, label, one in zip(found[0], found[2], wanted):
    np.testing.assert_allclose(box, one["box"], rtol=1e-4)
    assert label == one["label"]


def test_an_object_that_one_look_saw_scores_its_share():
  boxes = np.float32([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
  found = fuse(boxes, np.float32([0.8, 0.4, 0.6, 0.5]), np.int32([0, 0, 0, 1]), np.array([0, 1, 0, 1]), 2)
  np.testing.assert_allclose(found[0], [[1 / 3, 0, 10 + 1 / 3, 10], [50, 50, 60, 60], [0, 0, 10, 10]], rtol=1e-5)
  np.testing.assert_allclose(found[1], [0.6, 0.3, 0.25], rtol=1e-6)
  assert found[2].tolist() == [0, 0, 1]


@pytest.mark.parametrize(("scale", "mirrored"), [*LOOKS["scales"], (0.75, True)])
def test_a_mark_is_found_where_it_was(scale, mirrored):
  """Through a look and back, with the picture off the middle of its canvas."""
  images = np.full((2, 128, 160, 3), 90, np.uint8)
  origins, sizes = np.int32([[10, 20], [0, 0]]), np.int32([[100, 120], [128, 160]])
  for row, (y, x) in enumerate(origins): images[row, y + 30:y + 60, x + 15:x + 35] = 255
  seen, new_sizes, new_origins = look(images, sizes, origins, scale, mirrored)
  height, width = seen.shape[1:3]
  assert (height, width) == scaled((128, 160), scale) == {1: (128, 160), 1.25: (160, 192), 0.75: (96, 128)}[scale]
  assert (new_origins >= 0).all() and (new_origins + new_sizes <= (height, width)).all()
  boxes = []
  for image in seen:
    ys, xs = np.nonzero(image[..., 0] > 172)
    boxes.append([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]])
  empty = np.zeros((2, 1), np.float32)
  found = back(Detections(np.float32(boxes), empty, empty.astype(np.int32), np.int32([1, 1])), (height, width), (128, 160), mirrored)
  for row, (y, x) in enumerate(origins): np.testing.assert_allclose(found[row, 0], [x + 15, y + 30, x + 35, y + 60], atol=0 if scale == 1 else 0.9)


def test_a_batch_keeps_the_best_and_a_threshold():
  one = Detections(np.float32([[[0, 0, 9, 9], [20, 20, 30, 30]]] * 2), np.float32([[0.9, 0.3]] * 2), np.int32([[1, 0]] * 2), np.int32([2, 0]))
  none = Detections(np.zeros((2, 2, 4), np.float32), np.zeros((2, 2), np.float32), np.full((2, 2), -1, np.int32), np.zeros(2, np.int32))
  found = join([one, none], [one.boxes, none.boxes], 0.2, 5)
  assert found.counts.tolist() == [1, 0] and found.boxes.shape == (2, 5, 4) and found.labels[0].tolist() == [1, -1, -1, -1, -1]
  assert found.scores[0, 0] == np.float32(0.45) and join([one, none], [one.boxes, none.boxes], 0.05, 1).counts.tolist() == [1, 0]


class Blobs(Predictor):
  """A detector without a network: the one bright thing of each picture, which it takes for class 1 where its red is full."""
  def __init__(self): self.tta, self.seen, self.detector = "scales", [], SimpleNamespace(options=lambda given: {k: v for k, v in given.items() if v})

  def _find(self, images, sizes, origins, seconds=None, hidden=None, **options):
    self.seen.append(images.shape[1:3])
    found = Detections(np.zeros((len(images), 1, 4), np.float32), np.zeros((len(images), 1), np.float32), np.full((len(images), 1), -1, np.int32),
                       np.zeros(len(images), np.int32))
    for row, image in enumerate(images):
      ys, xs = np.nonzero(image.max(-1) > 150)
      if not len(ys): continue
      found.boxes[row, 0], found.counts[row] = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), 1
      found.scores[row, 0], found.labels[row, 0] = 0.8, int(image[(ys.min() + ys.max()) // 2, (xs.min() + xs.max()) // 2, 0] > 240)
    return found


def test_a_predictor_joins_all_its_looks():
  images = np.zeros((3, 64, 128, 3), np.uint8)
  images[0, 10:40, 80:120], images[1, 20:50, 8:40, 1] = 255, 250
  blobs = Blobs()
  found = blobs.find(images, np.full((3, 2), (64, 128)), np.zeros((3, 2), np.int32), score_threshold=0.1, max_detections=None)
  assert blobs.seen == [(64, 128)] * 2 + [(64, 160)] * 2   # a side of 80 is no multiple of 32
  assert found.counts.tolist() == [1, 1, 0] and found.labels[:2, 0].tolist() == [1, 0] and found.boxes.shape == (3, 300, 4)
  np.testing.assert_allclose(found.scores[:2, 0], 0.8, rtol=1e-6)
  np.testing.assert_allclose(found.boxes[:2, 0], [[80, 10, 120, 40], [8, 20, 40, 50]], atol=0.7)
  blobs.tta = "none"
  assert blobs.find(images, None, None).boxes.shape == (3, 1, 4)
