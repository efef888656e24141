import numpy as np, pytest
from pathlib import Path
from hypothesis import Phase, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from tinygrad import Tensor
from tinydet.detection.postprocess import CROWDED, _decode_and_clip, Detections, highest_rejected_logit, select, to_original

GOLDEN = Path(__file__).parent / "golden"
# one shape for every test of the device form, as each shape compiles for seconds; levels longer than, as long as and shorter than topk
LEVEL_SIZES, CLASSES, TOPK, MAX_DETECTIONS = [300, 40, 3], 4, 40, 30
ANCHORS = sum(LEVEL_SIZES)
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking thousands of logits takes minutes and explains little
SIZES = np.array([[64, 48], [40, 64]])
REJECTED_LOGIT = np.float32(highest_rejected_logit(0.05))


def run(logits, deltas, anchors, on_host, sizes=SIZES):
  return select(Tensor(logits), Tensor(deltas), Tensor(anchors), LEVEL_SIZES, sizes, topk=TOPK, max_detections=MAX_DETECTIONS, on_host=on_host)


def oracle(logits, deltas, anchors, size):
  """One image in float64, box by box: the sequential statement of the rule. Returns a list of (box, score, label)."""
  candidates, start, classes = [], 0, logits.shape[1]
  with np.errstate(over="ignore"): scores = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
  for n in LEVEL_SIZES:
    entries = [(a, c) for a in range(start, start + n) for c in range(classes) if scores[a, c] > np.float32(0.05)]
    candidates += sorted(entries, key=lambda e: -logits[e])[:TOPK]
    start += n
  kept = []
  for a, c in sorted(candidates, key=lambda e: -logits[e]):
    (x1, y1, x2, y2), (dx, dy, dw, dh) = anchors[a].astype(np.float64), deltas[a].astype(np.float64)
    w, h = x2 - x1, y2 - y1
    cx, cy, bw, bh = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h, w * np.exp(min(dw, np.log(1000 / 16))), h * np.exp(min(dh, np.log(1000 / 16)))
    box = np.clip([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], 0, [size[1], size[0], size[1], size[0]])
    if not any(label == c and overlap(box, other) > 0.5 for other, _, label in kept): kept.append((box, scores[a, c], c))
  return kept[:MAX_DETECTIONS]


def overlap(a, b):
  intersection = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
  union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
  return intersection / union if union > 0 else 0


def assert_equals_oracle(found: Detections, logits, deltas, anchors, sizes=SIZES):
  for i in range(len(logits)):
    expected = oracle(logits[i], deltas[i], anchors, sizes[i])
    n = len(expected)
    assert found.counts[i] == n
    np.testing.assert_allclose(found.boxes[i, :n], np.array([e[0] for e in expected]).reshape(n, 4), atol=1e-4)
    np.testing.assert_array_equal(found.scores[i, :n], np.array([e[1] for e in expected], np.float32))
    np.testing.assert_array_equal(found.labels[i, :n], [e[2] for e in expected])
    at, names = found.anchors[i, :n], found.labels[i, :n]   # where each came from: the score and box are that place's own
    with np.errstate(over="ignore"): scores = (1 / (1 + np.exp(-logits[i].astype(np.float64)))).astype(np.float32)
    np.testing.assert_array_equal(scores[at, names], found.scores[i, :n])
    np.testing.assert_allclose(found.boxes[i, :n], _decode_and_clip(deltas[i, at], anchors[at], np.float32([0, 0, *sizes[i]])), atol=1e-4)
    assert len({*zip(at.tolist(), names.tolist())}) == n and (found.anchors[i, n:] == -1).all()
    assert not found.boxes[i, n:].any() and not found.scores[i, n:].any() and (found.labels[i, n:] == -1).all()


def grid_anchors(seed):
  """Anchors on whole pixels with even sides, so that float32 computes every IoU without a rounding that could cross the threshold."""
  rng = np.random.default_rng(seed)
  center, half = rng.integers(0, 64, (ANCHORS, 2)), rng.integers(2, 16, (ANCHORS, 2))
  return np.concatenate([center - half, center + half], 1).astype(np.float32)


def golden(name):
  data = np.load(GOLDEN / f"retinanet_{name}.npz")
  height, width = data["images"].shape[1:3]
  strides = (8, 16, 32, 64, 128)
  return data, [9 * -(-height // s) * -(-width // s) for s in strides], np.array([[height, width]] * len(data["images"]))


@pytest.mark.parametrize(("name", "on_host"), [
  ("resnet18_fpn", True), ("resnet50_fpn", True), ("resnet50_fpn_v2", True), ("resnext50_32x4d_fpn", True),
  ("resnet18_fpn", False), ("resnet50_fpn", False),  # these two share one shape
])
def test_detections_of_torchvision(name, on_host):
  data, level_sizes, sizes = golden(name)
  found = select(*(Tensor(data[k]) for k in ("cls_logits", "bbox_regression", "anchors")), level_sizes, sizes, on_host=on_host)
  for i in range(len(sizes)):
    boxes, scores, labels = (data[f"det{i}_{k}"] for k in ("boxes", "scores", "labels"))
    n = found.counts[i]
    assert n == len(scores)
    near = (np.abs(found.boxes[i, :n, None] - boxes).max(-1) < 0.01) & (np.abs(found.scores[i, :n, None] - scores) < 1e-5) \
      & (found.labels[i, :n, None] == labels)
    assert near.any(0).mean() >= 0.99 and near.any(1).mean() >= 0.99
    assert (np.diff(found.scores[i, :n]) <= 0).all()


# ties, signed zeros, infinities, logits that share one score, and both sides of the threshold
LOGITS = np.array([-np.inf, -9, REJECTED_LOGIT, np.nextafter(REJECTED_LOGIT, np.float32(0)), -2, -1, -0.0, 0.0, 1,
                   np.nextafter(np.float32(1), np.float32(2)), 20, 21, np.inf], np.float32)
SHIFTS = np.array([0, 0.25, -0.5, 1, 64], np.float32)  # 64 sides away: outside, flattened to no area


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(hnp.arrays(np.int8, (2, ANCHORS, CLASSES), elements=st.integers(0, len(LOGITS) - 1)),
       hnp.arrays(np.int8, (2, ANCHORS, 2), elements=st.integers(0, len(SHIFTS) - 1)), st.integers(0, 5))
def test_forms_equal_the_sequential_rule(logit_choice, shift_choice, seed):
  logits, anchors = LOGITS[logit_choice], grid_anchors(seed)
  deltas = np.concatenate([SHIFTS[shift_choice], np.zeros_like(SHIFTS[shift_choice])], -1)
  for on_host in (True, False): assert_equals_oracle(run(logits, deltas, anchors, on_host), logits, deltas, anchors)


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.25]), st.sampled_from([-7, -4.6, -2]), st.sampled_from([0.1, 2]))
def test_forms_equal_on_dense_scores(seed, step, bias, spread):
  rng = np.random.default_rng(seed)
  logits = (rng.standard_normal((2, ANCHORS, CLASSES)) * spread + bias).astype(np.float32)
  if step: logits = np.round(logits / step).astype(np.float32) * np.float32(step)
  deltas, anchors = np.zeros((2, ANCHORS, 4), np.float32), grid_anchors(seed % 7)
  for on_host in (True, False): assert_equals_oracle(run(logits, deltas, anchors, on_host), logits, deltas, anchors)


@pytest.mark.parametrize("step", [0.0, 0.5, 4.0])
def test_the_host_on_few_and_on_crowded_classes(step):
  """Fewer and more entries above the threshold than `CROWDED` for each anchor of a level, with ties among and within the best anchors."""
  rng, classes = np.random.default_rng(0), 12
  for bias in (-5, 3):
    logits = (rng.standard_normal((2, ANCHORS, classes)) + bias).astype(np.float32)
    if step: logits = np.round(logits / step).astype(np.float32) * np.float32(step)
    share = (logits > REJECTED_LOGIT).mean() * classes
    assert share > CROWDED if bias > 0 else share < CROWDED
    deltas, anchors = np.zeros((2, ANCHORS, 4), np.float32), grid_anchors(3)
    assert_equals_oracle(run(logits, deltas, anchors, True), logits, deltas, anchors)


@pytest.mark.parametrize("on_host", [True, False])
def test_scaled_boxes_decode_and_clip(on_host):
  rng = np.random.default_rng(0)
  logits = (rng.standard_normal((2, ANCHORS, CLASSES)) * 2 - 3).astype(np.float32)
  deltas = rng.standard_normal((2, ANCHORS, 4)).astype(np.float32)
  deltas[:, ::5, 2:] = 90  # beyond the clamp of the log scale
  assert_equals_oracle(run(logits, deltas, grid_anchors(1), on_host), logits, deltas, grid_anchors(1))


@pytest.mark.parametrize("on_host", [True, False])
def test_chain_longer_than_one_pass_of_suppression(on_host):
  # each box overlaps only its neighbours, each is worse than the one before: whether the last stays depends on all the others
  left = np.arange(ANCHORS, dtype=np.float32)[:, None] * 2
  anchors = np.concatenate([left, left * 0, left + 8, left * 0 + 8], 1).astype(np.float32)
  logits = np.full((2, ANCHORS, CLASSES), -9, np.float32)
  order = np.r_[np.arange(30), 300:340]  # 30 of the first level, all of the second
  anchors[order, 0] = np.arange(len(order)) * 2
  anchors[order, 2] = anchors[order, 0] + 8
  logits[:, order, 1] = -np.arange(len(order), dtype=np.float32) / 64
  deltas, sizes = np.zeros((2, ANCHORS, 4), np.float32), np.array([[8, 600], [8, 80]])
  found = run(logits, deltas, anchors, on_host, sizes)
  assert 20 < found.counts[0] < MAX_DETECTIONS + 1
  assert_equals_oracle(found, logits, deltas, anchors, sizes)


@pytest.mark.parametrize("on_host", [True, False])
def test_boxes_without_area_overlap_nothing_and_images_without_scores_stay_empty(on_host):
  logits = np.full((2, ANCHORS, CLASSES), -9, np.float32)
  logits[0, :3, 0] = 3, 2, 1
  logits[1, :5] = np.nan
  anchors, deltas = np.tile(np.float32([70, 70, 80, 80]), (ANCHORS, 1)), np.zeros((2, ANCHORS, 4), np.float32)
  found = run(logits, deltas, anchors, on_host)
  assert found.counts.tolist() == [3, 0]
  np.testing.assert_array_equal(found.boxes[0, :3], [[48, 64, 48, 64]] * 3)
  assert not found.scores[1].any() and not found.boxes[1].any() and (found.labels[1] == -1).all()


def test_rejected_logit_is_the_boundary_of_the_float32_score():
  score = lambda x: np.float32(1 / (1 + np.exp(-np.float64(x))))
  for threshold in (0.001, 0.05, 0.3, 0.5, 0.9):
    logit = np.float32(highest_rejected_logit(threshold))
    assert score(logit) <= np.float32(threshold) < score(np.nextafter(logit, np.float32(np.inf)))
  assert highest_rejected_logit(-0.1) == -np.inf and highest_rejected_logit(1.0) == np.inf


def test_to_original():
  boxes, sizes = np.float32([[[10, 20, 30, 40]]]), np.array([[80, 60]])
  found = to_original(Detections(boxes, np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32), np.ones(1, np.int32)), sizes, np.array([[160, 30]]))
  np.testing.assert_allclose(found.boxes, [[[5, 40, 15, 80]]])
  assert found.boxes.dtype == np.float32
  np.testing.assert_array_equal(boxes, [[[10, 20, 30, 40]]])
