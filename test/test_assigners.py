"""Assigners against the official programs' results (golden/yolo/README.md) and against plain loops in float64."""
import numpy as np, pytest
from tinygrad import Tensor
from tinydet.detection import assigners
from tinydet.detection.assigners import Assigned, atss, classification_cost, fcos, simota, targets, task_aligned
from yolo_golden import GOLDEN


def tensors(golden, *keys): return [Tensor(golden[key].astype(np.int32 if key == "gt_labels" else np.float32)) for key in keys]


def assert_like(golden, prefix, found, scores=None, exact=True):
  index = golden[f"{prefix}gt_index"]
  sure = golden[f"{prefix}sure"] if f"{prefix}sure" in golden else np.ones(index.shape, bool)
  np.testing.assert_array_equal(np.where(sure, found.index.numpy(), 0), np.where(sure, index, 0))
  counts = [(x.sum(1)) for x in (found.index.numpy() >= 0, golden[f"{prefix}fg_mask"])]
  assert (abs(counts[0] - counts[1]) <= (0 if exact else (~sure).sum(1))).all()
  if scores is None: return
  np.testing.assert_allclose(*(np.where(sure[..., None], x, 0) for x in (scores, golden[f"{prefix}target_scores"])), atol=1e-5)


@pytest.mark.parametrize(("file", "prefix", "options"), [
  ("tal", "topk10_", {}), ("tal", "topk1_", {"topk": 1}), ("stal", "topk7to1_", {"topk": 7, "last_topk": 1, "smallest": 16})])
def test_task_aligned(file, prefix, options):
  golden = np.load(GOLDEN / f"{file}.npz")
  points, predicted, scores, boxes, labels = tensors(golden, "points", "pred_boxes", "pred_scores", "gt_boxes", "gt_labels")
  found = task_aligned(points, predicted, scores, boxes, labels, **options)
  own, wanted = targets(found, boxes, labels, scores.shape[2])
  assert_like(golden, prefix, found, wanted.numpy())
  sure = golden[f"{prefix}sure"] & golden[f"{prefix}fg_mask"]
  np.testing.assert_array_equal(own.numpy()[sure], golden[f"{prefix}target_boxes"][sure])


@pytest.mark.parametrize("unbiased", [True, False])
def test_atss(unbiased):
  golden, prefix = np.load(GOLDEN / "atss_paper.npz"), "unbiased_" if unbiased else "biased_"
  sizes = np.unique(golden["strides"], return_counts=True)[1].tolist()
  assert_like(golden, prefix, atss(*tensors(golden, "points", "anchors"), sizes, *tensors(golden, "gt_boxes", "gt_labels"), unbiased=unbiased))


def test_atss_of_yolov6():
  golden = np.load(GOLDEN / "atss_yolov6.npz")
  points, anchors, boxes, labels, predicted = tensors(golden, "points", "anchors", "gt_boxes", "gt_labels", "pred_boxes")
  found = atss(points, anchors, np.unique(golden["strides"], return_counts=True)[1].tolist(), boxes, labels, yolov6=True)
  own, _ = targets(found, boxes, labels, 5)
  quality = assigners.similarity(own, predicted) * found.quality
  assert_like(golden, "", found, targets(Assigned(found.index, quality), boxes, labels, 5)[1].numpy(), exact=False)   # equal distances


@pytest.mark.parametrize("levels", ["p3p7", "p3p5"])
@pytest.mark.parametrize("radius", [0, 1.5])
def test_fcos(levels, radius):
  golden, prefix = np.load(GOLDEN / "fcos.npz"), f"{levels}_{'centre' if radius else 'all'}_"
  strides, ranges = golden[f"{levels}_strides"], golden[f"{levels}_ranges"].astype(np.float32)
  level = np.searchsorted(np.unique(strides), strides)
  boxes, labels = tensors(golden, "gt_boxes", "gt_labels")
  found = fcos(Tensor(golden[f"{levels}_points"]), Tensor(strides), (Tensor(ranges[level]), Tensor(ranges[level + 1])), boxes, labels, radius=radius)
  assert_like(golden, prefix, found)
  np.testing.assert_allclose(found.quality.numpy(), golden[f"{prefix}centerness"], atol=1e-5)


def test_simota():
  golden = np.load(GOLDEN / "simota.npz")
  points, strides, predicted, boxes, labels = tensors(golden, "points", "strides", "pred_boxes", "gt_boxes", "gt_labels")
  classes, objectness = tensors(golden, "class_logits", "objectness_logits")
  probabilities = (classes.sigmoid() * objectness.sigmoid().unsqueeze(-1)).sqrt()
  found = simota(points, strides, predicted, classification_cost(probabilities, labels), boxes, labels)
  assert_like(golden, "", found, targets(found, boxes, labels, 5)[1].numpy())
  sure = golden["sure"]
  np.testing.assert_allclose(found.quality.numpy()[sure], golden["pred_iou"][sure], atol=1e-5)
