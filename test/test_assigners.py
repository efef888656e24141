"""Assigners against the official programs' results (golden/yolo/README.md) and against plain loops in float64."""
import numpy as np, pytest
from hypothesis import assume, given, settings, strategies as st
from tinygrad import Tensor
from tinydet.detection import anchors, assigners
from tinydet.detection.assigners import Assigned, atss, classification_cost, fcos, simota, targets, task_aligned
from tinydet.detectors import retinanet
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


# ---- against plain loops in float64, on boxes that real data has: none, tiny, over the border, the same twice; and on equal values


GRID = np.float32([((c + 0.5) * s, (r + 0.5) * s) for s in (8, 16, 32) for r in range(64 // s) for c in range(64 // s)])
STRIDES = np.float32(np.repeat([8, 16, 32], [64, 16, 4]))
BOXES = 3   # a picture; one shape of tensors for all examples


@st.composite
def pictures(draw):
  """Boxes f32 [2,3,4] in steps of half a pixel, labels, predictions near the boxes, and scores of few different values."""
  rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
  kind = draw(st.sampled_from(["any", "tiny", "over", "same"]))
  side = rng.integers(1, 12, (2, BOXES, 2)) / 2 if kind == "tiny" else rng.integers(4, 120, (2, BOXES, 2)) / 2
  corner = rng.integers(-40 if kind == "over" else 0, 120, (2, BOXES, 2)) / 2
  boxes = np.concatenate([corner, corner + side], -1).astype(np.float32)
  if kind == "same": boxes[:, 1] = boxes[:, 0]
  labels = np.where(np.arange(BOXES) < rng.integers(0, BOXES + 1, (2, 1)), rng.integers(0, 2, (2, BOXES)), -1).astype(np.int32)
  near = boxes[:, rng.integers(0, BOXES, len(GRID))] + rng.integers(-3, 4, (2, len(GRID), 4))
  predicted = np.concatenate([np.minimum(near[..., :2], near[..., 2:]), np.maximum(near[..., :2], near[..., 2:]) + 1], -1).astype(np.float32)
  return boxes, labels, predicted, (rng.integers(1, 9, (2, len(GRID), 2)) / 10).astype(np.float32)


def pairwise_iou(a, b):
  sides = np.minimum(a[2:], b[:, 2:]) - np.maximum(a[:2], b[:, :2])
  shared = sides.clip(0).prod(1)
  return shared / ((a[2:] - a[:2]).prod() + (b[:, 2:] - b[:, :2]).prod(1) - shared)


def in_steps(values): return np.round(values.astype(np.float64), 5)   # what float32 cannot tell apart is equal


@settings(max_examples=12, deadline=None)
@given(pictures())
def test_task_alignment_by_hand(picture):
  boxes, labels, predicted, scores = picture
  found = task_aligned(*map(Tensor, (GRID, predicted, scores, boxes, labels)), topk=4, alpha=1.0, beta=1.0, kind="iou")
  index, quality = found.index.numpy(), found.quality.numpy()
  for b in range(2):
    valid = [m for m in range(BOXES) if labels[b, m] >= 0]
    overlap, aligned, chosen = (np.zeros((BOXES, len(GRID))) for _ in range(3))
    for m in valid:
      box = boxes[b, m].astype(np.float64)
      inside = ((GRID > box[:2]) & (GRID < box[2:])).all(1)
      overlap[m] = inside * pairwise_iou(box, predicted[b].astype(np.float64))
      aligned[m] = overlap[m] * scores[b, :, labels[b, m]]
      ranked = sorted(np.flatnonzero(inside), key=lambda n: (-in_steps(aligned[m])[n], n))
      at = in_steps(aligned[m])
      if len(ranked) > 4 and at[ranked[3]] - at[ranked[4]] < 2e-5: assume(at[ranked[3]] == 0)   # equal but for rounding: either may be in
      chosen[m, ranked[:4]] = 1
    expected = np.where(chosen.sum(0) > 1, in_steps(overlap).argmax(0), np.where(chosen.sum(0) > 0, chosen.argmax(0), -1))
    matters = np.array([n for n in range(len(GRID)) if expected[n] < 0 or aligned[expected[n], n] > 1e-4], int)
    surest = np.sort(overlap, 0)
    sure = [n for n in matters if chosen[:, n].sum() < 2 or surest[-1, n] - surest[-2, n] > 1e-4 or (boxes[b, 0] == boxes[b, 1]).all()]
    np.testing.assert_array_equal(index[b, sure], expected[sure])
    assert (index[b] < 0).all() or valid
    for m in range(BOXES):
      mine = index[b] == m
      if mine.any() and aligned[m, mine].max() > 1e-4:
        assert quality[b, mine].max() == pytest.approx(overlap[m, mine].max(), abs=1e-3)
  assert (quality[index < 0] == 0).all() and np.isfinite(quality).all()


@settings(max_examples=6, deadline=None)
@given(pictures())
def test_what_holds_of_every_assigner(picture):
  """Cells learn boxes that are none of padding, that have them inside or near; among duplicates the first; the qualities are numbers in 0..1."""
  boxes, labels, predicted, scores = picture
  g, s, p, c, x, y = map(Tensor, (GRID, STRIDES, predicted, scores, boxes, labels))
  half = np.repeat(STRIDES[:, None] * 4, 2, 1)
  level = np.log2(STRIDES / 8).astype(int)
  limits = tuple(Tensor(np.float32([0, 16, 32, np.inf])[level + i]) for i in (0, 1))
  every = [task_aligned(g, p, c, x, y), task_aligned(g, p, c, x, y, topk=7, last_topk=1, smallest=16.0),
           atss(g, Tensor(np.concatenate([GRID - half, GRID + half], 1)), (64, 16, 4), x, y), fcos(g, s, limits, x, y),
           simota(g, s, p, classification_cost(c, y), x, y)]
  Tensor.realize(*(t for found in every for t in found))
  for number, found in enumerate(every):
    index, quality = found.index.numpy(), found.quality.numpy()
    assert np.isfinite(quality).all() and (quality >= 0).all() and (quality <= 1 + 1e-4).all() and (quality[index < 0] == 0).all()
    for b, n in np.argwhere(index >= 0):
      box = boxes[b, index[b, n]]
      assert labels[b, index[b, n]] >= 0
      if number in (0, 2, 3): assert (GRID[n] > box[:2]).all() and (GRID[n] < box[2:]).all()
    if number == 1: assert max((index == m).sum(1).max() for m in range(BOXES)) <= 1
    if number == 3:   # of equal boxes of any class the first; the smallest of others
      area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
      for b, n in np.argwhere(index >= 0):
        sides = np.concatenate([GRID[n] - boxes[b, :, :2], boxes[b, :, 2:] - GRID[n]], 1)
        low, high = np.array([0, 16, 32, np.inf])[level[n]:level[n] + 2]
        fits = (sides.min(1) > 0) & (sides.max(1) > low) & (sides.max(1) <= high) & (labels[b] >= 0)
        assert index[b, n] == np.where(fits, area[b], np.inf).argmin()


@pytest.mark.parametrize(("n", "k"), [(700, 10), (2100, 13), (641, 7), (320, 3)])
def test_the_largest_of_many(n, k):
  """By blocks: against numpy's stable sort, many values being equal, some rows almost all of them, and the largest all in one block or at the end."""
  rng = np.random.default_rng(n)
  values = rng.integers(-3, 40, (5, n)).astype(np.float32) / 7
  values[1] = -1
  values[1, -3:] = 2
  values[2, 20:20 + k] = 50 + rng.random(k)
  values[3] = rng.standard_normal(n)
  values[4] = np.arange(n)
  counts = rng.integers(1, k + 1, (5, 1)).astype(np.int32)
  order = np.argsort(-values, axis=1, kind="stable")
  for found, wanted in ((assigners.largest(Tensor(values), k), [k] * 5), (assigners.largest(Tensor(values), k, Tensor(counts)), counts[:, 0])):
    for row, places, count in zip(found.numpy(), order, wanted, strict=True): assert set(np.flatnonzero(row)) == set(places[:count])


def test_the_largest_among_equals_are_the_first():
  values = np.float32([[0, 3, 3, -1, 3, 2], [-5, -5, -5, -5, -7, -5], [np.inf, -np.inf, 0, -0.0, 1e-40, 1]])
  expected = [[1, 2, 4], [0, 1, 2], [0, 4, 5]]
  for row, places in zip(assigners.largest(Tensor(values), 3).numpy(), expected): assert np.flatnonzero(row).tolist() == places
  some = assigners.largest(Tensor(values), 3, Tensor(np.int32([[1], [2], [3]]))).numpy()
  assert [np.flatnonzero(row).tolist() for row in some] == [[1], [0, 1], [0, 4, 5]]
  assert assigners.largest(Tensor(values), 9).numpy().all()


def test_what_an_untrained_network_says_of_a_crowd():
  """Predictions that miss their boxes by far, and boxes over one another: a cell of several boxes, none of which it overlaps, learns none that it is
  outside of, and what is learnt stays in 0..1."""
  rng = np.random.default_rng(1)
  corner, side = rng.random((2, 24, 2)) * 40, rng.random((2, 24, 2)) * 24 + 4
  boxes, labels = np.concatenate([corner, corner + side], -1).astype(np.float32), rng.integers(0, 2, (2, 24)).astype(np.int32)
  away = GRID + rng.integers(-30, 30, (2, len(GRID), 2))
  predicted = np.concatenate([away - 2, away + 2], -1).astype(np.float32)
  found = task_aligned(*map(Tensor, (GRID, predicted, rng.random((2, len(GRID), 2)).astype(np.float32), boxes, labels)))
  index, quality = found.index.numpy(), found.quality.numpy()
  assert quality.min() >= 0 and quality.max() <= 1 and (index >= 0).sum() > 50
  for b, n in np.argwhere(index >= 0): assert (GRID[n] > boxes[b, index[b, n], :2]).all() and (GRID[n] < boxes[b, index[b, n], 2:]).all()


# ---- under a RetinaNet: nine anchors a place


CANVAS = (64, 96)


def nine_anchors():
  """Anchors f32 [A,4] of a canvas, and each one's level."""
  sizes = anchors.level_sizes(*CANVAS)
  return anchors.anchors(*CANVAS, exact_strides=True), np.repeat(np.arange(len(sizes)), sizes)


def crowd():
  """Boxes of two pictures: the same twice, one over the border, one smaller than a stride, padding before others."""
  boxes = np.float32([[[10, 10, 42, 44], [10, 10, 42, 44], [60, 30, 110, 70], [33, 33, 36, 37]],
                      [[0, 0, 0, 0], [12, 20, 60, 50], [0, 0, 0, 0], [2, 3, 30, 20]]])
  return boxes, np.int32([[1, 0, 2, 1], [-1, 2, -1, 0]])


def test_atss_of_nine_anchors_a_place():
  places, level = nine_anchors()
  boxes, labels = crowd()
  detector = retinanet.build("retinanet_resnet10_quarter_fpn", 3, norm="batch", exact_strides=True, assigner="atss")
  classes, matched = (t.numpy() for t in detector.assigned((), Tensor(boxes), Tensor(labels), CANVAS))
  points = (places[:, :2] + places[:, 2:]).astype(np.float64) / 2
  wanted = np.full((2, 4, len(places)), -1.0)
  for b, m in np.argwhere(labels >= 0):
    box = boxes[b, m].astype(np.float64)
    away = ((points - (box[:2] + box[2:]) / 2) ** 2).sum(1)
    candidate = []
    for number in range(5):
      of_level = np.flatnonzero(level == number).reshape(-1, 9)
      nearest = sorted(range(len(of_level)), key=lambda i: (round(away[of_level[i, 0]], 6), i))[:9]
      candidate += of_level[nearest].reshape(-1).tolist()
    overlap = pairwise_iou(box, places.astype(np.float64))
    threshold = overlap[candidate].mean() + overlap[candidate].std(ddof=1)
    inside = ((points > box[:2]) & (points < box[2:])).all(1)
    chosen = [n for n in candidate if overlap[n] >= threshold and inside[n]]
    wanted[b, m, chosen] = overlap[chosen]
  best = np.where(wanted.max(1) >= 0, wanted.argmax(1), -1)
  assert [(best[b] >= 0).sum() > 5 for b in range(2)] == [True, True]
  np.testing.assert_array_equal(classes, np.where(best >= 0, np.take_along_axis(labels, best, 1), -1))
  np.testing.assert_array_equal(matched, np.where(best[..., None] >= 0, np.take_along_axis(boxes, best[..., None], 1), 0))


@pytest.mark.parametrize("kind", ["tal", "simota"])
def test_a_retinanet_learns_by_what_it_predicts(kind):
  places, level = nine_anchors()
  boxes, labels = crowd()
  rng = np.random.default_rng(2)
  logits, deltas = (rng.standard_normal((2, len(places), n)).astype(np.float32) * 0.3 for n in (3, 4))
  points, size = (places[:, :2] + places[:, 2:]) / 2, places[:, 2:] - places[:, :2]
  middle, half = points + deltas[..., :2] * size, np.exp(deltas[..., 2:]) * size / 2
  predicted, scores = np.concatenate([middle - half, middle + half], -1), 1 / (1 + np.exp(-logits))
  given = [Tensor(np.float32(x)) for x in (points, predicted, scores, boxes)] + [Tensor(labels)]
  if kind == "tal": index = task_aligned(*given, topk=13, alpha=1.0, beta=6.0, kind="iou").index.numpy()
  else:
    cost = classification_cost(given[2], given[4])
    index = simota(given[0], Tensor(np.float32(8 * 2 ** level)), given[1], cost, *given[3:]).index.numpy()
  detector = retinanet.build("retinanet_resnet10_quarter_fpn", 3, norm="batch", exact_strides=True, assigner=kind)
  classes, matched = (t.numpy() for t in detector.assigned((Tensor(logits), Tensor(deltas)), Tensor(boxes), Tensor(labels), CANVAS))
  assert (index >= 0).sum() > 10
  np.testing.assert_array_equal(classes, np.where(index >= 0, np.take_along_axis(labels, index, 1), -1))
  np.testing.assert_array_equal(matched, np.where(index[..., None] >= 0, np.take_along_axis(boxes, index[..., None], 1), 0))
