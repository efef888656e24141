import json
import numpy as np, pytest
from tinydet.scoring.analysis import KINDS, analyse, average_precision, best_and_worst, confusion, error_kinds, rank_pictures
from tinydet.scoring.coco_metric import CocoMetric

CATEGORY_IDS = [7, 90, 3, 12]   # label order, neither sorted nor without gaps


def truth_of(rows, images=(1,), categories=CATEGORY_IDS):
  """Ground truth of rows (image id, category id, box xywh, crowd)."""
  annotations = [{"id": n, "image_id": i, "category_id": c, "bbox": list(box), "area": box[2] * box[3], "iscrowd": int(any(crowd))}
                 for n, (i, c, box, *crowd) in enumerate(rows, 1)]
  return {"images": [{"id": i, "width": 512, "height": 512} for i in images], "annotations": annotations,
          "categories": [{"id": c, "name": f"class {c}"} for c in sorted(categories)]}


def found_of(rows):
  """Detections of rows (image id, category id, box xywh, score)."""
  return {i: (np.array([r[2] for r in rows if r[0] == i], np.float64), np.array([r[3] for r in rows if r[0] == i]),
              np.array([r[1] for r in rows if r[0] == i])) for i in {r[0] for r in rows}}


def random_case(seed, images=14, most=40):
  """Truth of three of the four classes with crowds, and near-misses, wrong classes, doubles and strays for detections."""
  rng = np.random.default_rng(seed)
  truth, found = [], []
  for i in range(100, 100 + images):
    for _ in range(rng.integers(0, 8)):
      truth.append((i, int(rng.choice(CATEGORY_IDS[:3])), (*rng.uniform(0, 300, 2), *rng.uniform(20, 200, 2)), rng.random() < 0.15))
    here = [t for t in truth if t[0] == i]
    for _ in range(rng.integers(0, most)):
      if here and rng.random() < 0.8:
        _, category, box, _ = here[rng.integers(len(here))]
        found.append((i, category if rng.random() < 0.7 else int(rng.choice(CATEGORY_IDS)), np.array(box) * rng.uniform(0.8, 1.2, 4), rng.random()))
      else: found.append((i, int(rng.choice(CATEGORY_IDS)), (*rng.uniform(0, 400, 2), *rng.uniform(5, 80, 2)), rng.random()))
  return truth_of(truth, range(100, 100 + images)), found_of(found)


@pytest.mark.parametrize(("seed", "most"), [(0, 40), (1, 40), (2, 700)])   # the last has more than 100 detections of a class on a picture
def test_ap50_is_that_of_pycocotools(seed, most):
  truth, found = random_case(seed, most=most)
  metric = CocoMetric(truth, CATEGORY_IDS)
  metric.found = found
  assert 0 < sum(a["iscrowd"] for a in truth["annotations"]) < len(truth["annotations"])
  assert error_kinds(truth, CATEGORY_IDS, found)["AP50"] == pytest.approx(metric.compute().metrics["mAP50"], abs=1e-12)


def test_average_precision_by_hand():
  # hit, miss, hit of 4: precision is 1 up to recall 1/4, then 2/3 up to 1/2: 26 and 25 of COCO's 101 recalls
  assert average_precision(np.array([0.9, 0.5, 0.7]), np.array([True, True, False]), 4) == pytest.approx((26 * 1 + 25 * 2 / 3) / 101)
  assert average_precision(np.empty(0), np.empty(0, bool), 3) == 0


ONE_OF_EACH_TRUTH = truth_of([(1, 7, (0, 0, 100, 100)), (1, 7, (200, 0, 100, 100)), (1, 90, (0, 200, 100, 100)), (1, 3, (200, 200, 100, 100)),
                              (1, 3, (400, 400, 100, 100), True)], images=(1, 2))
ONE_OF_EACH = [(1, 7, (0, 0, 100, 100), 0.9),        # right
               (1, 7, (0, 0, 100, 90), 0.8),         # the same again: duplicate
               (1, 7, (270, 0, 100, 100), 0.7),      # IoU 30 / 170: localisation
               (1, 3, (0, 200, 100, 100), 0.6),      # a 90 taken for a 3: class
               (1, 90, (270, 0, 100, 100), 0.5),     # IoU 30 / 170 with a 7: both
               (1, 90, (0, 400, 50, 50), 0.4),       # nothing there: background
               (2, 7, (0, 0, 100, 100), 0.35),       # nothing on the whole picture: background
               (1, 3, (410, 410, 20, 20), 0.3)]      # in a crowd of its class: does not count; the 3 is missed


def test_errors_of_each_kind():
  result = error_kinds(ONE_OF_EACH_TRUTH, CATEGORY_IDS, found_of(ONE_OF_EACH))
  assert {kind: entry["count"] for kind, entry in result["kinds"].items()} == {
    "class": 1, "localisation": 1, "both": 1, "duplicate": 1, "background": 2, "missed": 1}
  assert result["correct"] == 1
  # AP50 of 7 is that of one hit of two, of 90 and of 3 it is 0
  assert result["AP50"] == pytest.approx(51 / 101 / 3)
  gain = {kind: entry["delta_AP50"] * 3 for kind, entry in result["kinds"].items()}
  assert gain["class"] == pytest.approx(1)                             # 90: the 3 of score 0.6 hits, before everything else
  assert gain["localisation"] == pytest.approx((51 + 50 * 2 / 3) / 101 - 51 / 101)   # 7: hit, duplicate, hit
  assert gain["missed"] == pytest.approx(0)                            # 3: its only truth gone, its false positive left
  for kind in ("both", "duplicate", "background"): assert gain[kind] == pytest.approx(0)   # all of them rank below the only hit


def test_error_kinds_above_a_score():
  result = error_kinds(ONE_OF_EACH_TRUTH, CATEGORY_IDS, found_of(ONE_OF_EACH), score_threshold=0.65)
  assert {kind: entry["count"] for kind, entry in result["kinds"].items()} == {
    "class": 0, "localisation": 1, "both": 0, "duplicate": 1, "background": 0, "missed": 2}


def test_a_truth_is_mended_once_and_not_where_it_is_found():
  truth = truth_of([(1, 7, (0, 0, 100, 100)), (1, 7, (300, 0, 100, 100))])
  found = found_of([(1, 7, (0, 0, 100, 100), 0.5), (1, 90, (0, 0, 100, 100), 0.9),     # of the wrong class on a truth that is found
                    (1, 90, (300, 0, 100, 100), 0.8), (1, 3, (300, 0, 100, 100), 0.7)])   # two on one that is not
  result = error_kinds(truth, CATEGORY_IDS, found)
  assert result["kinds"]["class"] == {"count": 3, "delta_AP50": pytest.approx(50 / 101)}


def grid_case():
  """24 pictures of boxes and detections by arithmetic alone."""
  truth, found, n = [], [], 0
  for i in range(1, 25):
    for k in range(i % 4):
      truth.append((i, (7, 90, 3)[(i + k) % 3], (120 * k + i, 10 * k, 60 + 7 * (i % 5), 50 + 9 * k)))
    for _ in range(i % 7):
      n += 1
      k = n % 3
      x, y, w, h = 120 * k + i, 10 * k, 60 + 7 * (i % 5), 50 + 9 * k
      found.append((i, (7, 90, 3)[(i + k + (n % 5 == 0)) % 3], (x + (n * 37 % 11) * 5, y + n * 13 % 7, w, h), (n * 61 % 101 + n / 1000) / 102))
  return truth_of(truth, range(1, 25), (7, 90, 3)), found_of(found)


def test_equals_the_authors_program():
  """The numbers of tidecv 1.0.1, `TIDERun(..., 0.5, 0.1, TIDE.BOX, 10000)`, on the same data."""
  result = error_kinds(grid_case()[0], [7, 90, 3], grid_case()[1])
  expected = {"AP50": 7.747178079, "kinds": {
    "class": (2, 1.760176018),
    "localisation": (16, 26.239764032),
    "both": (4, 0.0),
    "duplicate": (3, 0.032760629),
    "background": (37, 5.28598238),
    "missed": (15, 5.643518133)}}
  assert 100 * result["AP50"] == pytest.approx(expected["AP50"], abs=1e-6)
  assert {kind: (entry["count"], pytest.approx(100 * entry["delta_AP50"], abs=1e-6)) for kind, entry in result["kinds"].items()} == expected["kinds"]


def test_nothing_to_find_and_nothing_found():
  nothing = error_kinds(truth_of([]), CATEGORY_IDS, {})
  assert np.isnan(nothing["AP50"]) and all(entry["count"] == 0 for entry in nothing["kinds"].values())
  missed = error_kinds(truth_of([(1, 7, (0, 0, 9, 9))]), CATEGORY_IDS, {})
  assert missed["AP50"] == 0 and missed["kinds"]["missed"] == {"count": 1, "delta_AP50": 1.0}
  assert confusion(truth_of([]), CATEGORY_IDS, {}).sum() == 0


def test_confusion_by_hand():
  matrix = confusion(ONE_OF_EACH_TRUTH, CATEGORY_IDS, found_of(ONE_OF_EACH), score_threshold=0.3)
  expected = np.zeros((5, 5), int)
  expected[0, 0] = 1           # 7 found
  expected[0, 4] = 1           # the other 7 missed
  expected[1, 2] = 1           # a 90 taken for a 3
  expected[2, 4] = 1           # the 3 missed; the crowd is no truth
  expected[4] = [3, 2, 0, 0, 0]   # duplicate, localisation and stray of 7; both and stray of 90; what is in a crowd of its class is excused
  np.testing.assert_array_equal(matrix, expected)


def test_confusion_lets_the_better_score_choose_first():
  truth = truth_of([(1, 7, (0, 0, 100, 100))])
  assert confusion(truth, CATEGORY_IDS, found_of([(1, 90, (0, 0, 100, 90), 0.8), (1, 7, (0, 0, 100, 100), 0.7)]))[0].tolist() == [0, 1, 0, 0, 0]
  assert confusion(truth, CATEGORY_IDS, found_of([(1, 90, (0, 0, 100, 90), 0.6), (1, 7, (0, 0, 100, 100), 0.7)]))[0].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", [3, 4])
def test_confusion_counts_every_truth_and_every_detection_once(seed):
  truth, found = random_case(seed)
  for annotation in truth["annotations"]: annotation["iscrowd"] = 0
  matrix = confusion(truth, CATEGORY_IDS, found, score_threshold=0.4)
  of_class = [sum(a["category_id"] == c for a in truth["annotations"]) for c in CATEGORY_IDS]
  found_as = [sum(int(((scores >= 0.4) & (categories == c)).sum()) for _, scores, categories in found.values()) for c in CATEGORY_IDS]
  assert matrix[:4].sum(1).tolist() == of_class and matrix[:, :4].sum(0).tolist() == found_as and matrix[4, 4] == 0


def test_pictures_from_best_to_worst():
  truth = truth_of([(1, 7, (0, 0, 100, 100)), (2, 7, (0, 0, 100, 100)), (3, 7, (0, 0, 100, 100)), (3, 90, (200, 0, 100, 100)),
                    (6, 7, (0, 0, 50, 50), True)], images=range(1, 7))
  found = found_of([(1, 7, (0, 0, 100, 100), 0.9), (1, 7, (0, 0, 100, 100), 0.1),   # all, exactly; the double scores too little to count
                    (2, 7, (0, 0, 100, 80), 0.9),                                   # all, at IoU 0.8
                    (3, 7, (0, 0, 100, 100), 0.9),                                  # one of two
                    (5, 7, (0, 0, 100, 100), 0.9),                                  # one of none
                    (6, 7, (10, 10, 20, 20), 0.9)])                                 # inside a crowd; and 4: none of none
  ranked = rank_pictures(truth, CATEGORY_IDS, found)
  assert {p["image_id"]: p["quality"] for p in ranked} == pytest.approx({1: 1, 4: 1, 6: 1, 2: 0.8, 3: 2 / 3, 5: 0})
  assert [p["image_id"] for p in ranked][3:] == [2, 3, 5]
  assert ranked[4] == {"image_id": 3, "quality": pytest.approx(2 / 3), "truth": 2, "found": 1, "correct": 1}
  best, worst = best_and_worst(ranked, 2)
  assert [p["image_id"] for p in best] == [1, 2] and [p["image_id"] for p in worst] == [5, 3]
  best, worst = best_and_worst(ranked, 10)
  assert len(best) == 3 and len(worst) == 3 and not {p["image_id"] for p in best} & {p["image_id"] for p in worst}
  assert best_and_worst(ranked[:1], 4) == (ranked[:1], [])


def test_the_record_of_an_evaluation_is_json_and_agrees_with_the_metric():
  truth, found = random_case(5)
  metric = CocoMetric(truth, CATEGORY_IDS, list(range(100, 112)))
  metric.found = {i: arrays for i, arrays in found.items() if i < 112}
  result = metric.compute()
  record = json.loads(json.dumps(analyse(metric, result, pictures=3), allow_nan=False))
  assert [c["name"] for c in record["classes"]] == [f"class {c}" for c in CATEGORY_IDS]
  for entry in record["classes"][:3]: assert entry["AP"] == pytest.approx(result.class_ap[entry["name"]])
  assert record["classes"][3] | {"boxes": 0, "AP": None, "AP50": None, "precision": None} == record["classes"][3]
  assert np.mean([c["AP50"] for c in record["classes"][:3]]) == pytest.approx(result.metrics["mAP50"])
  assert record["errors"]["AP50"] == pytest.approx(result.metrics["mAP50"]) and record["images"] == 12
  assert record["recall"][:3] == [0, 0.02, 0.04] and len(record["precision"]["AP"]) == 51
  np.testing.assert_allclose(record["precision"]["AP75"], result.precision[5, ::2, :3].mean(1), atol=1e-4)
  assert sum(c["boxes"] for c in record["classes"]) == sum(n for i, _, n in record["confusion"] if i < 4)
  assert set(record["errors"]["kinds"]) == set(KINDS) and len(record["best"]) == len(record["worst"]) == 3
