import contextlib, copy, importlib.util, io, json, sys
from pathlib import Path
import numpy as np, pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tinydet.scoring.coco_metric import METRIC_NAMES, CocoMetric
from tinydet.detection.postprocess import Detections

CATEGORY_IDS = [7, 90, 3, 12]  # label order, neither sorted nor without gaps; 12 has no truth


def truth_of(rng, images=12):
  """Random truth of three classes: crowds on some images, nothing on two of them, all three sizes."""
  annotations = []
  for image_id in range(100, 100 + images - 2):
    for _ in range(rng.integers(1, 8)):
      x, y, w, h = *rng.uniform(0, 300, 2), *rng.choice([15, 60, 200], 2) * rng.uniform(0.7, 1.3, 2)
      annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": int(rng.choice(CATEGORY_IDS[:3])), "bbox": [x, y, w, h],
                          "area": w * h, "iscrowd": int(rng.random() < 0.15)})
  return {"images": [{"id": i, "width": 512, "height": 512} for i in range(100, 100 + images)], "annotations": annotations,
          "categories": [{"id": c, "name": f"class {c}"} for c in sorted(CATEGORY_IDS)]}


def detections_of(rng, truth, image_ids, slots=20):
  """Near-misses of the truth and strays; some images get nothing."""
  found = Detections(np.zeros((len(image_ids), slots, 4), np.float32), np.zeros((len(image_ids), slots), np.float32),
                     np.full((len(image_ids), slots), -1, np.int32), np.zeros(len(image_ids), np.int32))
  for i, image_id in enumerate(image_ids):
    real = [a for a in truth["annotations"] if a["image_id"] == image_id]
    n = found.counts[i] = 0 if image_id % 5 == 1 else rng.integers(1, slots)
    for d in range(n):
      if real and rng.random() < 0.7:
        a = real[rng.integers(len(real))]
        x, y, w, h = np.array(a["bbox"]) * rng.uniform(0.9, 1.1, 4)
        label = CATEGORY_IDS.index(a["category_id"])
      else: x, y, w, h, label = *rng.uniform(0, 200, 4), rng.integers(4)
      found.boxes[i, d], found.labels[i, d] = (x, y, x + w, y + h), label
    found.scores[i, :n] = -np.sort(-rng.random(n))
  return found


def direct(truth, results, image_ids=None):
  with contextlib.redirect_stdout(io.StringIO()):
    coco = COCO()
    coco.dataset = copy.deepcopy(truth)
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
    if image_ids is not None: evaluation.params.imgIds = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
  with contextlib.redirect_stdout(out := io.StringIO()): evaluation.summarize()
  return evaluation, out.getvalue()


@pytest.mark.parametrize(("seed", "subset"), [(0, None), (1, None), (2, [100, 103, 104, 110])])
def test_equals_pycocotools(seed, subset):
  rng = np.random.default_rng(seed)
  truth = truth_of(rng)
  before = copy.deepcopy(truth)
  metric = CocoMetric(truth, CATEGORY_IDS, subset)
  image_ids = subset or [image["id"] for image in truth["images"]]
  expected = []
  for start in range(0, len(image_ids), 4):
    ids = image_ids[start:start + 4]
    found = detections_of(rng, truth, ids)
    metric.add(found, np.array(ids))
    for i, image_id in enumerate(ids):
      for (x1, y1, x2, y2), score, label in list(zip(*(a[i].tolist() for a in (found.boxes, found.scores, found.labels))))[:found.counts[i]]:
        expected.append({"image_id": image_id, "category_id": CATEGORY_IDS[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
  assert metric.results() == expected == json.loads(json.dumps(metric.results()))
  result, (evaluation, table) = metric.compute(), direct(truth, expected, subset)
  assert list(result.metrics) == list(METRIC_NAMES) and list(result.metrics.values()) == evaluation.stats.tolist()
  assert result.table == table and 0 < result.metrics["mAP"] < 1
  order = [sorted(CATEGORY_IDS).index(c) for c in CATEGORY_IDS]
  np.testing.assert_array_equal(result.precision, evaluation.eval["precision"][:, :, order, 0, 2])
  assert result.precision.shape == (10, 101, 4)
  for k, (name, ap) in enumerate(result.class_ap.items()):
    p = result.precision[:, :, k]
    assert name == f"class {CATEGORY_IDS[k]}" and (np.isnan(ap) if (p == -1).all() else ap == p[p > -1].mean())
  assert np.isnan(result.class_ap["class 12"]) and truth == before
  assert metric.compute().metrics == result.metrics


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools_to_the_last_digit_where_much_is_equal(seed):
  """Few different boxes, scores and areas, so that ties abound; areas on the limits of the ranges; up to 150 detections of a class on an image."""
  rng = np.random.default_rng(seed)
  sides, classes = np.array([16, 32, 32, 48, 96, 128]), [5, 2, 9, 30, 31]   # nothing is 30, nothing is found of 31
  def boxes(n): return np.concatenate([rng.choice([0, 16, 20], (n, 2)), rng.choice(sides, (n, 2))], 1).astype(float)
  truth = {"images": [{"id": int(i), "width": 256, "height": 256} for i in rng.permutation(40)],
           "categories": [{"id": c, "name": f"c{c}"} for c in classes], "annotations": []}
  results = []
  for image_id in rng.permutation(40).tolist():
    for box in boxes(rng.integers(0, 9)):
      truth["annotations"].append({"id": len(truth["annotations"]) + 1, "image_id": image_id, "category_id": int(rng.choice([2, 5, 9, 31])),
                                   "bbox": box.tolist(), "area": float(rng.choice([box[2] * box[3], 1024, 9216, 1e10, 1e11])),
                                   "iscrowd": int(rng.random() < 0.2)})
    for box in boxes(rng.choice([0, 3, 30, 300])):
      results.append({"image_id": image_id, "category_id": int(rng.choice([5, 5, 2, 9, 30])), "bbox": box.tolist(),
                      "score": float(rng.choice([0.1, 0.25, 0.5, 0.9]))})
  metric = CocoMetric(truth, classes)
  metric.add_results(results)
  result, (evaluation, table) = metric.compute(), direct(truth, results)
  assert list(result.metrics.values()) == evaluation.stats.tolist() and result.table == table and 0 < result.metrics["mAP"] < 1
  np.testing.assert_array_equal(result.precision, evaluation.eval["precision"][:, :, np.searchsorted(sorted(classes), classes), 0, 2])


def bench_scale():
  spec = importlib.util.spec_from_file_location("bench_scale", Path(__file__).parents[1] / "examples" / "bench_scale.py")
  sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.by_hand
def test_pycocotools_gives_the_same_by_slices_of_classes_as_in_one_go(monkeypatch):
  """What `bench_scale.py --against-pycocotools` compares with at a size that is too much for one go."""
  bench = bench_scale()
  metric = bench.made_up_metric(bench.Config(val_images=1000, val_detections=20, classes=7))
  whole, _ = direct(metric.ground_truth, metric.results())
  slices, score_classes = [], bench.score_classes
  monkeypatch.setattr(bench, "score_classes", lambda metric, categories: slices.append(categories) or score_classes(metric, categories))
  sliced, ours = bench.score_with_pycocotools(metric, 6000), metric.accumulate()
  assert slices == [[1], [2, 3], [4, 5, 6], [7]], "the first class has more detections than are to be scored at a time"
  for key in ("precision", "recall"):
    np.testing.assert_array_equal(sliced.eval[key], whole.eval[key])
    np.testing.assert_array_equal(ours.eval[key], whole.eval[key])
  assert sliced.stats.tolist() == whole.stats.tolist() == list(metric.compute().metrics.values()) and 0 < whole.stats[0] < 1


def test_no_detections_score_zero():
  truth = truth_of(np.random.default_rng(0))
  metric = CocoMetric(truth, CATEGORY_IDS)
  assert set(metric.compute().metrics.values()) == {0.0} and metric.results() == []
  nothing = Detections(np.zeros((1, 5, 4), np.float32), np.zeros((1, 5), np.float32), np.full((1, 5), -1, np.int32), np.zeros(1, np.int32))
  metric.add(nothing, np.array([100]))
  result = metric.compute()
  assert set(result.metrics.values()) == {0.0} and result.class_ap["class 7"] == 0


def test_perfect_detections_score_one_even_on_annotation_id_zero():
  truth = {"images": [{"id": 0}], "annotations": [{"id": 0, "image_id": 0, "category_id": 5, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0}],
           "categories": [{"id": 5, "name": "cell"}]}
  metric = CocoMetric(truth, [5])
  metric.add(Detections(np.float32([[[1, 2, 11, 12]]]), np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32), np.ones(1, np.int32)), np.array([0]))
  result = metric.compute()
  assert (result.metrics["mAP"], result.metrics["AR1"], result.class_ap["cell"]) == pytest.approx((1, 1, 1))
  assert result.metrics["mAP_large"] == -1


def test_padding_is_skipped_and_wrong_images_are_refused():
  truth = truth_of(np.random.default_rng(0))
  metric = CocoMetric(truth, CATEGORY_IDS, [100, 101])
  one = Detections(np.ones((1, 1, 4), np.float32), np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32), np.ones(1, np.int32))
  metric.add(one, np.array([-1]))
  assert metric.results() == []
  metric.add(one, np.array([100]))
  for image_id in (100, 102):
    with pytest.raises(ValueError, match=str(image_id)): metric.add(one, np.array([image_id]))
  with pytest.raises(ValueError, match="55"): CocoMetric(truth, CATEGORY_IDS, [55])
  assert len(metric.results()) == 1


@pytest.mark.parametrize(("overlap", "right"), [(0.9, True), (0.55, True), (0.3, False), (0.018, False)])
def test_a_difficult_box_excuses_only_what_matches_it(overlap, right):
  """Pascal VOC's rule (VOCevaldet): at IoU 0.5 it is neither right nor wrong, below it is a false positive; a crowd would excuse all inside."""
  side = 100.0
  truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "x"}], "annotations": [
    {"id": 1, "image_id": 1, "category_id": 1, "bbox": [200, 200, 50, 50], "area": 2500, "iscrowd": 0},
    {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, side, side], "area": side ** 2, "iscrowd": 0, "difficult": 1}]}
  metric = CocoMetric(truth, [1])
  inside = [0, 0, side, side * overlap]
  metric.found[1] = (np.array([inside, inside, [200, 200, 50, 50]], np.float64), np.array([0.9, 0.8, 0.7]), np.array([1, 1, 1]))
  assert metric.compute().metrics["mAP50"] == pytest.approx(1.0 if right else 1 / 3, abs=1e-6)
