"""YOLO's networks against the official programs (golden/yolo/README.md): tensors, raw outputs, boxes, scores, detections; and what is published."""
import numpy as np, pytest
from tinygrad import Tensor
from tinydet.detection import postprocess
from tinydet.detectors import yolo as detectors
from tinydet.models import yolo
from tinydet.nn import init
from yolo_golden import GOLDEN, fill, keys_sha256, parameters
from by_hand import by_hand

FILES = sorted(path.stem for path in GOLDEN.glob("yolo*.npz"))
ANCHORED = {"yolov7", "yolov3", "yolov3-tiny", "yolov4-tiny"}
FOLDED = {"yolov6n", "yolov9t", "yolov10n", "yolov8m"}   # for these the outputs are those of the folded network; blocks: test_yolo_facts.py


@pytest.fixture
def blank(monkeypatch):
  """Networks without values: only names and shapes matter."""
  monkeypatch.setattr(init, "initialize", lambda network, rule, seed=0: None)


def matched(found, golden, iou=0.98):
  """The share of rows (x1, y1, x2, y2, score, class) of each that the other has too."""
  def inside(a, b):
    hits = 0
    for row in a:
      near = b[(b[:, 5] == row[5]) & (abs(b[:, 4] - row[4]) < 2e-4)]
      size = max(row[2] - row[0], row[3] - row[1])
      hits += bool(len(near)) and (abs(near[:, :4] - row[:4]).max(1) <= 1e-3 * size + 0.05).any()
    return hits / max(len(a), 1)
  return min(inside(found, golden), inside(golden, found))


def rows(found, i):
  n = found.counts[i]
  return np.column_stack([found.boxes[i, :n], found.scores[i, :n], found.labels[i, :n]])


def assert_boxes(boxes, golden):
  size = np.maximum(golden[..., 2] - golden[..., 0], golden[..., 3] - golden[..., 1])
  assert (abs(boxes - golden).max(-1) <= 1e-3 * size + 0.05).all()


def with_golden_values(name):
  golden = np.load(GOLDEN / f"{name}.npz")
  detector = detectors.build(name, int(golden["num_classes"]))
  fill(detector.network)
  return golden, detector


@pytest.mark.parametrize("name", FILES)
def test_tensors_of_the_official_files(name, blank):
  golden = np.load(GOLDEN / f"{name}.npz")
  network = yolo.build(name, int(golden["num_classes"]))
  assert (keys_sha256(network), parameters(network)) == (str(golden["keys_sha256"]), int(golden["parameters"]))
  if "parameters_80" in golden:
    network = yolo.build(name)
    assert (keys_sha256(network), parameters(network)) == (str(golden["keys_sha256_80"]), int(golden["parameters_80"]))


# large ones, or of blocks that others have too, or test_yolo_facts.py or test_yolo_losses.py has
BY_HAND = ("yolov8m", "yolov10n", "yolov5n", "yolo26n", "yolov3", "yolov7", "yolov9t", "yolo11n", "yolo12n")


@pytest.mark.parametrize("name", by_hand(FILES, *BY_HAND))
def test_outputs_of_the_official_programs(name):
  golden, detector = with_golden_values(name)
  if name in FOLDED: detector.fold()
  images = golden["images"]
  outputs = detector(Tensor(images))
  scores, boxes = detector.candidates(outputs, images.shape[1:3])
  Tensor.realize(*outputs, boxes, scores)
  raw = [t.numpy() for t in outputs]
  assert all(abs(output[0] - output[1]).max() > 0.05 for output in raw)   # what a picture shows is in the numbers
  if name in ANCHORED:
    for output, stride in zip(raw, golden["strides"], strict=True):
      expected = golden[f"raw_stride{int(stride)}"]
      if name == "yolov7": output = output.reshape(len(images), 3, -1, *output.shape[2:]).transpose(0, 1, 3, 4, 2)
      np.testing.assert_allclose(output, expected, rtol=0, atol=2e-3 if name == "yolov7" else 1e-3)
  else:
    heads = {"one2many_raw": raw[:2], "one2one_raw": raw[2:]} if "one2one_raw" in golden else {"raw": raw[:2]}
    for key, (box, classes) in heads.items(): np.testing.assert_allclose(np.concatenate([box, classes], 1), golden[key], rtol=0, atol=2e-3)
    if "raw_dist" in golden: np.testing.assert_allclose(raw[2], golden["raw_dist"], rtol=0, atol=2e-3)
  prefix = "one2one_" if "one2one_raw" in golden else ""
  assert_boxes(boxes.numpy(), golden["mask123_boxes" if name == "yolov3-tiny" else f"{prefix}boxes"])
  np.testing.assert_allclose(scores.numpy(), golden[f"{prefix}scores"], rtol=0, atol=2e-4)
  assert_detections(detector, outputs, boxes, scores, golden)


def assert_detections(detector, outputs, boxes, scores, golden):
  """All of the golden file's selections, in both forms where they differ."""
  sizes = np.tile(golden["images"].shape[1:3], (2, 1))
  def select(boxes, scores, best_class_only=False, **options):
    if best_class_only: scores = (scores == scores.max(-1, keepdim=True)).where(scores, -1)
    return postprocess.select(scores, boxes, None, [scores.shape[1]], sizes, **{**detector.selection, "sigmoid": False, **options})
  if detector.facts.end2end:
    found = detector.detect(outputs, golden["images"].shape[1:3], sizes, score_threshold=0)
    for i in range(2): assert matched(rows(found, i), golden["one2one_detections"][i]) >= 0.99
    sides = outputs[0] if detector.facts.bins == 1 else detectors.decoding.expected_sides(outputs[0], 16)
    boxes = detectors.decoding.decode_sides(sides, golden["images"].shape[1:3], detector.facts.strides)
    scores = outputs[1].sigmoid().transpose(1, 2)
    assert_boxes(boxes.numpy(), golden["one2many_boxes"])
    np.testing.assert_allclose(scores.numpy(), golden["one2many_scores"], rtol=0, atol=2e-4)
  if detector.facts.decode == "darknet":
    prefix = "mask123_" if detector.name == "yolov3-tiny" else ""
    found = select(boxes, scores, score_threshold=0.4, nms_threshold=0.45, max_detections=2000)
    for i in range(2): assert matched(rows(found, i), golden[f"{prefix}nms{i}"]) >= 0.99
    return
  for key, threshold, best_class_only in (("nms_val", 0.001, False), ("nms_predict", 0.25, True)):
    found = select(boxes, scores, score_threshold=threshold, nms_threshold=0.7, best_class_only=best_class_only)
    for i in range(2): assert matched(rows(found, i), golden[f"{key}{i}"]) >= 0.99, key
