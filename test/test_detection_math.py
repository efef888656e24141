"""Boxes, anchors, assignment and losses against float64 numpy. Each function is captured once and then run on many values."""
import math
import numpy as np, pytest
from hypothesis import Phase, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from tinygrad import Device, Tensor
from tinydet.detection import boxes as B
from tinydet.detection.anchors import LEVELS, PER_POSITION, anchors, feature_sizes, level_sizes
from tinydet.detection.losses import BOX_LOSSES, detection_losses, sigmoid_focal_loss
from tinydet.detection.matcher import match
from tinydet.runtime.graphs import jit

N = 16
MANY = settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


def on_device(function):
  """`function` of tensors as one of numpy arrays, captured at its first call: every call must have the same shapes."""
  @jit
  def captured(*tensors):
    Tensor.realize(*(results := [t.contiguous() for t in function(*tensors)]))
    return results
  return lambda *arrays: [t.numpy().copy() for t in captured(*(Tensor(np.ascontiguousarray(a)).realize() for a in arrays))]


def corners(smallest, n=N):
  """n boxes on a grid of 1/8 pixel, where float32 has their sides and areas without rounding."""
  whole = hnp.arrays(np.int64, (n, 4), elements=st.integers(0, 2000))
  return whole.map(lambda a: np.concatenate([a[:, :2] - 500, a[:, :2] - 500 + np.maximum(a[:, 2:], smallest)], 1).astype(np.float32) / 8)


# ------------------------------------------------------------------------------------------------------------------------------ boxes


def encode(boxes, anchors):
  boxes, anchors = boxes.astype(np.float64), anchors.astype(np.float64)
  size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
  shift = (boxes[..., 2:] + boxes[..., :2] - anchors[..., 2:] - anchors[..., :2]) / 2
  with np.errstate(divide="ignore"): return np.concatenate([shift / anchor_size, np.log(size / anchor_size)], -1)


def decode(deltas, anchors):
  deltas, anchors = deltas.astype(np.float64), anchors.astype(np.float64)
  anchor_size = anchors[..., 2:] - anchors[..., :2]
  center = (anchors[..., 2:] + anchors[..., :2]) / 2 + deltas[..., :2] * anchor_size
  size = anchor_size * np.exp(np.minimum(deltas[..., 2:], math.log(1000 / 16)))
  return np.concatenate([center - size / 2, center + size / 2], -1)


def overlap(a, b):
  """Intersection and union, in float64, of boxes that broadcast."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  sides = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0)
  intersection = sides.prod(-1)
  return intersection, (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection


def iou(a, b):
  intersection, union = overlap(a[:, None], b[None])
  return np.where(union > 0, intersection / np.where(union > 0, union, 1), 0)


def giou(a, b):
  intersection, union = overlap(a, b)
  hull = (np.maximum(a[..., 2:], b[..., 2:]).astype(np.float64) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
  return intersection / union - (hull - union) / hull


box_functions = on_device(lambda a, b, deltas, size: (
  B.encode(a, b), B.decode(deltas, b), B.decode(B.encode(a, b), b), B.iou(a, b), B.generalized_iou(a, b), B.area(a),
  B.clip(a, 90.0, 120.0), B.clip(a, size[:, 0], size[:, 1])))
SIZES = np.random.default_rng(0).integers(1, 200, (N, 2)).astype(np.float32)


@MANY
@given(corners(1), corners(1), hnp.arrays(np.float32, (N, 4), elements=st.floats(-8, 8, width=32)))
def test_boxes(a, b, deltas):
  encoded, decoded, round_trip, overlaps, generalized, area, clipped, clipped_each = box_functions(a, b, deltas, SIZES)
  np.testing.assert_allclose(encoded, encode(a, b), rtol=1e-5, atol=2e-6)
  expected = decode(deltas, b)
  np.testing.assert_allclose(decoded, expected, atol=1e-5 * max(1, abs(expected).max()))
  # a side is recovered exactly up to the clamp: at most 62.5 times the anchor's
  kept = ((a[:, 2:] - a[:, :2]) < 62 * (b[:, 2:] - b[:, :2])).all(1)
  np.testing.assert_allclose(round_trip[kept], a[kept], atol=2e-3)
  np.testing.assert_allclose(overlaps, iou(a, b), atol=1e-6)
  np.testing.assert_allclose(generalized, giou(a, b), atol=1e-5)
  assert (generalized >= -1 - 1e-6).all() and (generalized <= 1 + 1e-6).all()
  np.testing.assert_allclose(area, (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1]), rtol=1e-6)
  np.testing.assert_array_equal(clipped, np.clip(a, 0, [120, 90, 120, 90]))
  np.testing.assert_array_equal(clipped_each, np.clip(a, 0, SIZES[:, [1, 0, 1, 0]]))


def test_boxes_at_the_limits():
  anchor = np.tile(np.array([[10, 20, 42, 36]], np.float32), (N, 1))
  flat, deltas = anchor.copy(), np.zeros((N, 4), np.float32)
  flat[:8, 2:], flat[8:, 3] = flat[:8, :2], flat[8:, 1]           # points, and boxes without height
  deltas[0], deltas[1], deltas[2], deltas[3] = [0, 0, 1e4, 88], [0, 0, math.log(62.5), math.log(62.5) - 1], [0, 0, -1e4, -90], [1, -2, 0, 0]
  _, decoded, _, overlaps, generalized, area, _, _ = box_functions(flat, anchor, deltas, SIZES)
  size = decoded[:, 2:] - decoded[:, :2]
  np.testing.assert_allclose(size[0], [62.5 * 32, 62.5 * 16], rtol=1e-5)       # clamped, not infinite
  np.testing.assert_allclose(size[1], [62.5 * 32, 62.5 * 16 / math.e], rtol=1e-5)
  assert not size[2].any() and not area.any() and not overlaps.any()
  np.testing.assert_array_equal(decoded[3], anchor[3] + [32, -32, 32, -32])
  np.testing.assert_array_equal(decoded[4:], anchor[4:])
  assert np.isfinite(generalized).all() and not box_functions(flat, flat, deltas, SIZES)[3].any()   # 0 / 0 among flat boxes


# ------------------------------------------------------------------------------------------------------------------------------ anchors


@pytest.mark.parametrize(("height", "width"), [(128, 160), (100, 75), (33, 257)])
def test_anchors_position_by_position(height, width):
  """One at a time, as the definition has it; against torchvision's own numbers in test_models.py."""
  expected, level_counts = [], []
  for level in range(3, 8):
    rows, columns = -(-height // 2 ** level), -(-width // 2 ** level)
    level_counts.append(9 * rows * columns)
    for row, column, ratio, octave in np.ndindex(rows, columns, 3, 3):
      side, aspect = int(32 * 2 ** (level - 3) * 2 ** (octave / 3)), 2.0 ** (ratio - 1)
      half_height, half_width = (np.round(s / 2) for s in (side * math.sqrt(aspect), side / math.sqrt(aspect)))
      x, y = column * (width // columns), row * (height // rows)
      expected.append([x - half_width, y - half_height, x + half_width, y + half_height])
  found = anchors(height, width)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, expected)
  assert level_sizes(height, width) == level_counts and PER_POSITION == 9
  assert [9 * h * w for h, w in feature_sizes(height, width)] == level_counts


# ------------------------------------------------------------------------------------------------------------------------------ assignment

IMAGES, BOXES, ANCHORS = 3, 5, 40
assign = on_device(match)


def torchvisions_matcher(anchors, boxes, labels):
  """One image: torchvision's Matcher(0.5, 0.4, allow_low_quality_matches=True), except that a box that overlaps nothing claims nothing."""
  classes, box_of = np.full(len(anchors), -1), np.full(len(anchors), -1)
  real = np.flatnonzero(labels >= 0)
  if len(real) == 0: return classes, box_of
  quality = iou(boxes[real], anchors)
  best, box_of = quality.max(0), real[quality.argmax(0)]
  classes[(best >= 0.4) & (best < 0.5)] = -2
  classes[best >= 0.5] = labels[box_of[best >= 0.5]]
  for row in quality:
    if row.max() > 0:
      claimed = np.flatnonzero(row == row.max())
      classes[claimed] = labels[box_of[claimed]]
  return classes, box_of


def check_assignment(anchors, boxes, labels):
  classes, matched = assign(anchors, boxes, labels)
  assert classes.dtype == np.int32
  for i in range(len(boxes)):
    expected, box_of = torchvisions_matcher(anchors, boxes[i], labels[i])
    if Device.DEFAULT != "CPU":   # whose quotients may be off by a bit, and with them what is at a threshold
      best = iou(boxes[i][labels[i] >= 0], anchors).max(0, initial=0)
      expected = np.where((abs(best[:, None] - (0.4, 0.5)) < 1e-6).any(1), classes[i], expected)
    np.testing.assert_array_equal(classes[i], expected)
    learning = expected >= 0
    np.testing.assert_array_equal(matched[i][learning], boxes[i][box_of[learning]])
  return classes, matched


@st.composite
def scene(draw):
  """Whole coordinates up to 32: two different IoU differ by more than float32 rounds, and equal ones abound."""
  def whole(shape, side):
    a = draw(hnp.arrays(np.int64, (*shape, 4), elements=st.integers(0, 16)))
    return np.concatenate([a[..., :2], a[..., :2] + np.maximum(a[..., 2:], side)], -1).astype(np.float32)
  boxes, labels = whole((IMAGES, BOXES), 0), draw(hnp.arrays(np.int32, (IMAGES, BOXES), elements=st.integers(-1, 2)))
  padding = draw(st.sampled_from([0.0, -7.0, 1e30, np.inf, np.nan]))
  boxes[labels < 0] = padding
  return whole((ANCHORS,), 1), boxes, labels


@settings(MANY, max_examples=150)
@given(scene())
def test_assignment(scene): check_assignment(*scene)


def test_assignment_case_by_case():
  anchors, boxes, labels = np.zeros((ANCHORS, 4), np.float32), np.zeros((IMAGES, BOXES, 4), np.float32), np.full((IMAGES, BOXES), -1, np.int32)
  anchors[:] = [1000, 1000, 1010, 1010]                       # far from everything
  anchors[:7] = [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [0, 0, 10, 3], [50, 0, 60, 10], [52, 0, 62, 10], [48, 0, 58, 10]]
  boxes[0, 0], labels[0, 0] = [0, 0, 10, 10], 2               # IoU 1, 0.5, 0.4, 0.3
  boxes[0, 1], labels[0, 1] = [48, 2, 62, 3], 1               # at best 0.1 in 14 + 90: three anchors tie
  boxes[0, 2], labels[0, 2] = [500, 500, 510, 510], 0         # overlaps no anchor
  boxes[2, 4], labels[2, 4] = [0, 0, 10, 10], 0               # behind padding; the second image has nothing but padding
  boxes[labels < 0] = [0, 0, 10, 10]                          # padding that would fit an anchor exactly
  classes, matched = check_assignment(anchors, boxes, labels)
  between = -2 if Device.DEFAULT == "CPU" else classes[0, 2]   # the quotient 4 / 10 may be off by a bit
  assert classes[0].tolist() == [2, 2, between, -1, 1, 1, 1] + [-1] * 33
  assert (classes[1] == -1).all()
  assert classes[2].tolist() == [0, 0, between, -1] + [-1] * 36
  assert matched[0, 4].tolist() == [48, 2, 62, 3]


# ------------------------------------------------------------------------------------------------------------------------------ losses


def focal(logits, targets, alpha=0.25, gamma=2.0):
  """From the paper's definition: -alpha_t (1 - p_t)^gamma log p_t."""
  logits = logits.astype(np.float64)
  log_p, log_not_p = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
  log_pt, log_miss = np.where(targets, log_p, log_not_p), np.where(targets, log_not_p, log_p)
  return -np.where(targets, alpha, 1 - alpha) * np.exp(gamma * log_miss) * log_pt


def slope(function, x, step=1e-5):
  """Central differences, for a function that works element by element."""
  x = x.astype(np.float64)
  return (function(x + step) - function(x - step)) / (2 * step)


def focal_and_gradient(logits, targets, grad):
  loss = sigmoid_focal_loss(logits, targets)
  return loss, (loss * grad).sum().gradient(logits)[0]


focal_functions = on_device(focal_and_gradient)
GRAD = np.random.default_rng(1).standard_normal(N).astype(np.float32)


@MANY
@given(hnp.arrays(np.float32, N, elements=st.floats(-200, 200, width=32)), hnp.arrays(bool, N))
def test_focal_loss(logits, targets):
  loss, gradient = focal_functions(logits, targets, GRAD)
  np.testing.assert_allclose(loss, focal(logits, targets), rtol=2e-5, atol=1e-11)
  np.testing.assert_allclose(gradient, GRAD * slope(lambda x: focal(x, targets), logits), rtol=1e-4, atol=1e-8)


def test_focal_loss_at_the_limits():
  logits = np.array([200, -200, 200, -200, 1e4, -1e4, 0, -0.0, 88.8, -88.8, 1e-30, -4.6, 0, 0, 0, 0], np.float32)
  targets = np.array([1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0], bool)
  loss, gradient = focal_functions(logits, targets, np.ones(N, np.float32))
  np.testing.assert_allclose(loss[:8], [0, 50, 150, 0, 0, 0, 0.0625 * math.log(2), 0.1875 * math.log(2)], rtol=1e-6)
  np.testing.assert_array_equal(gradient[[0, 3, 4, 5, 8, 9]], 0.0)         # right and sure: nothing to learn, exactly
  np.testing.assert_allclose(gradient[1:3], [-0.25, 0.75], rtol=1e-6)      # wrong and sure: the slope of the cross-entropy
  assert np.isfinite(loss).all() and np.isfinite(gradient).all()


ROWS = 6                                                                   # anchors an image below
CLASSES = np.array([[0, 2, -1, -2, 1, -1], [-1, -1, -2, -1, -1, -1]], np.int32)   # three positives and one ignored; none and one ignored


def box_loss(kind, deltas, matched, anchors):
  error = abs(deltas - encode(matched, anchors))
  if kind == "l1": return error.sum(-1)
  if kind == "smooth_l1": return np.where(error < 1 / 9, 4.5 * error ** 2, error - 1 / 18).sum(-1)
  return 1 - giou(decode(deltas, anchors), matched)


def losses_in_float64(kind, logits, deltas, anchors, matched):
  targets, counted, positive = CLASSES[..., None] == np.arange(logits.shape[-1]), CLASSES >= -1, CLASSES >= 0
  positives = np.maximum(1, positive.sum(1))
  classification = (focal(logits, targets) * counted[..., None]).sum((1, 2)) / positives
  regression = [sum(box_loss(kind, deltas[i, a], matched[i, a], anchors[a]) for a in np.flatnonzero(positive[i])) for i in range(2)] / positives
  return classification.mean(), regression.mean()


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_detection_losses_and_their_gradients(kind):
  def function(logits, deltas, anchors, classes, matched):
    parts = detection_losses(logits, deltas, anchors, classes, matched, kind)
    return *parts, *(parts[0] + 2 * parts[1]).gradient(logits, deltas)
  run, rng = on_device(function), np.random.default_rng(2)
  for garbage in (0.0, np.nan, np.inf):       # what the matcher leaves where there is no box to learn
    logits, deltas = (rng.standard_normal((2, ROWS, n)).astype(np.float32) * s for n, s in ((3, 3), (4, 0.3)))
    corner, size = rng.uniform(0, 50, (2, ROWS, 2)), rng.uniform(5, 60, (2, ROWS, 2))
    matched = np.concatenate([corner, corner + size], -1).astype(np.float32)
    base = matched[0] + rng.uniform(-2, 2, (ROWS, 4)).astype(np.float32)
    matched[CLASSES < 0] = garbage
    classification, regression, by_logits, by_deltas = run(logits, deltas, base, CLASSES, matched)
    expected = losses_in_float64(kind, logits, deltas, base, matched)
    np.testing.assert_allclose([classification, regression], expected, rtol=1e-5)
    assert not by_logits[CLASSES == -2].any() and not by_deltas[CLASSES < 0].any()
    for found, which in ((by_logits, 0), (by_deltas, 1)):
      for index in [(0, 0, 0), (0, 1, 2), (0, 4, 1), (0, 4, 3 - (which == 0)), (1, 0, 1)]:
        def total(t, index=index, which=which, logits=logits, deltas=deltas, base=base, matched=matched):
          inputs = [logits.astype(np.float64), deltas.astype(np.float64)]
          inputs[which][index] += t
          parts = losses_in_float64(kind, *inputs, base, matched)
          return parts[0] + 2 * parts[1]
        assert found[index] == pytest.approx(slope(total, np.array(0.0)), rel=1e-3, abs=1e-6)


def test_box_losses_are_zero_where_the_boxes_agree():
  a = np.array([[0, 0, 10, 20], [5, 5, 9, 30]], np.float32)
  b = np.array([[1, -2, 12, 15], [5, 5, 9, 30]], np.float32)
  deltas = Tensor(encode(b, a).astype(np.float32))
  found = Tensor.stack(*(loss(deltas, Tensor(b), Tensor(a)) for loss in BOX_LOSSES.values())).numpy()
  np.testing.assert_allclose(found, 0, atol=1e-6)


@pytest.mark.parametrize("size", [(120, 120), (100, 170), (128, 256)])
def test_anchors_lie_where_the_cells_are(size):
  """With exact strides the middle of cell (i, j) of level l is at (i, j) * 2^l; torchvision's places are the same where 128 divides the sides."""
  found, theirs, start = anchors(*size, exact_strides=True), anchors(*size), 0
  for level, (rows, columns) in zip(LEVELS, feature_sizes(*size)):
    middle = (found[start:start + 9 * rows * columns, :2] + found[start:start + 9 * rows * columns, 2:]).reshape(rows, columns, 9, 2) / 2
    y, x = np.meshgrid(np.arange(rows) * 2 ** level, np.arange(columns) * 2 ** level, indexing="ij")
    np.testing.assert_allclose(middle, np.stack([x, y], -1)[:, :, None].repeat(9, 2), atol=0.5)
    start += 9 * rows * columns
  assert (found == theirs).all() == (size == (128, 256)) and found.shape == theirs.shape
