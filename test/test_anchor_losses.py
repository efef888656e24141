"""Losses of YOLOs with anchors against plain loops in float64: terms, and the gradient against finite differences."""
import math
import numpy as np, pytest
from tinygrad import Tensor
from tinydet.detection.anchor_losses import Gains, candidates as candidates_of, darknet_losses, ratio_losses
from tinydet.detectors import yolo
from by_hand import by_hand

CANVAS, STRIDES, K = (64, 96), (8, 16, 32), 3
SCALE = (1.2, 1.1, 1.05)
ANCHORS = np.array([[(6, 8), (10, 6), (14, 14)], [(20, 12), (16, 30), (30, 30)], [(30, 30), (60, 40), (80, 60)]], np.float32)   # one of two levels
SHAPES = [(2, 3 * (5 + K), CANVAS[0] // s, CANVAS[1] // s) for s in STRIDES]
# The same box twice, one over the border, one smaller than a stride, one that no ratio fits, a cell that two want; padding before and after.
BOXES = np.float32([[[10, 10, 22, 24], [10, 10, 22, 24], [70, 40, 110, 90], [33, 33, 36, 37], [1, 30, 95, 33], [9, 11, 22, 22], [40, 5, 70, 36]],
                    [[0, 0, 0, 0], [20, 20, 52, 51], [0, 0, 0, 0], [50, 20, 90, 60], [0, 0, 0, 0], [12, 40, 19, 47], [0, 0, 0, 0]]])
LABELS = np.int32([[0, 1, 2, 1, 0, 2, 1], [-1, 0, -1, 2, -1, 1, -1]])


def sigmoid(x): return 1 / (1 + np.exp(-x))
def entropy(x, y): return np.logaddexp(0, x) - x * y


def ciou(a, b):
  aw, ah, bw, bh = a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]
  shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
  overlap = shared / (aw * ah + bw * bh - shared)
  hull = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
  away = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
  v = 4 / math.pi ** 2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
  return overlap, overlap - away / hull, v


def overlap_of(a, b):
  shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
  return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def candidates():
  """(level, anchor, row, column) of each, in order."""
  return [(i, a, r, c) for i, s in enumerate(STRIDES) for a in range(3) for r in range(CANVAS[0] // s) for c in range(CANVAS[1] // s)]


def decoded(t, at, darknet):
  (i, a, r, c), s = at, sigmoid
  k = SCALE[i] if darknet else 2.0
  x, y = ((s(t[j]) * k - (k - 1) / 2 + (c, r)[j]) * STRIDES[i] for j in range(2))
  w, h = ((np.exp(t[2 + j]) if darknet else (2 * s(t[2 + j])) ** 2) * float(ANCHORS[i, a, j]) for j in range(2))
  return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def shape_iou(w, h, anchor):
  shared = min(w, anchor[0]) * min(h, anchor[1])
  return shared / (w * h + anchor[0] * anchor[1] - shared)


def who(levels, kind):
  """The box that each candidate learns, -1 for none, [2][N], by the rules of `kind`."""
  at, owners = candidates(), []
  for b in range(2):
    valid = [m for m in range(len(LABELS[b])) if LABELS[b, m] >= 0]
    wants = []   # (candidate, box, preference)
    for m in valid:
      x1, y1, x2, y2 = BOXES[b, m].astype(np.float64)
      w, h = x2 - x1, y2 - y1
      best = max((tuple(map(float, a)) for a in ANCHORS.reshape(-1, 2)), key=lambda a: shape_iou(w, h, a))
      for n, (i, a, r, c) in enumerate(at):
        gx, gy = (x1 + x2) / 2 / STRIDES[i], (y1 + y2) / 2 / STRIDES[i]
        anchor = tuple(map(float, ANCHORS[i, a]))
        if kind in ("v3", "v4"):
          alike = shape_iou(w, h, anchor)
          if (int(gx), int(gy)) == (c, r) and (anchor == best or (kind == "v4" and alike > 0.213)): wants.append((n, m, alike))
        else:
          worst = max(w / anchor[0], anchor[0] / w, h / anchor[1], anchor[1] / h)
          beside, below = (int(np.sign(g % 1 - 0.5)) for g in (gx, gy))   # in the middle it has no neighbour
          cells = {(int(gx), int(gy)), (int(gx) + beside, int(gy)), (int(gx), int(gy) + below)}
          if worst < 4 and (c, r) in cells: wants.append((n, m, -worst))
    owner = {}
    if kind == "v7":
      pool = sorted({n for n, _, _ in wants})
      cost = {}
      for m in valid:
        own = {}
        for n in pool:
          i, a, r, c = at[n]
          t = levels[i][b].reshape(3, 5 + K, SHAPES[i][2], SHAPES[i][3])[a, :, r, c]
          own[n] = overlap_of(BOXES[b, m].astype(np.float64), decoded(t, at[n], False))
          p = np.sqrt(sigmoid(t[5:]) * sigmoid(t[4]))
          y = np.arange(K) == LABELS[b, m]
          cost[n, m] = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum() - 3 * np.log(own[n] + 1e-8)
        k = max(1, int(sum(sorted(own.values())[-10:])))
        for n in sorted(pool, key=lambda n: cost[n, m])[:k]:
          if n not in owner or cost[n, m] < cost[n, owner[n]]: owner[n] = m
    else:
      for n, m, preference in wants:
        if n not in owner or preference > owner[n][1]: owner[n] = (m, preference)
      owner = {n: m for n, (m, _) in owner.items()}
    owners.append([owner.get(n, -1) for n in range(len(at))])
  return owners


def losses(levels, kind, owners, fixed=None):
  """Terms in float64, and what is fixed while the gradient is taken: targets of objectness, weights of shape, who is not told."""
  at, terms = candidates(), dict.fromkeys(("box", "objectness", "classes"), 0.0)
  counts = [max(1, sum(o >= 0 and at[n][0] == i for own in owners for n, o in enumerate(own))) for i in range(3)]
  sizes = [sum(a[0] == i for a in at) for i in range(3)]
  first, fixed = fixed is None, fixed or {}
  gains = {"v5": (0.05, 1.0, 0.5), "v7": (0.05, 0.7, 0.3)}.get(kind)
  for b in range(2):
    for n, place in enumerate(at):
      i, a, r, c = place
      t = levels[i][b].reshape(3, 5 + K, SHAPES[i][2], SHAPES[i][3])[a, :, r, c]
      found, m = decoded(t, place, kind in ("v3", "v4")), owners[b][n]
      if first: fixed[b, n, "told"] = m >= 0 or all(overlap_of(BOXES[b, j], found) <= 0.7 for j in range(len(LABELS[b])) if LABELS[b, j] >= 0)
      goal = float(m >= 0)
      if m >= 0:
        box, y = BOXES[b, m].astype(np.float64), np.arange(K) == LABELS[b, m]
        overlap, apart, v = ciou(found, box)
        if first: fixed[b, n, "alpha"] = v / (v - overlap + 1)
        alike = apart - fixed[b, n, "alpha"] * v
        if gains:
          if first: fixed[b, n, "goal"] = max(alike, 0)
          goal = fixed[b, n, "goal"]
          terms["box"] += gains[0] * (1 - alike) / counts[i]
          terms["classes"] += gains[2] * K / 80 * entropy(t[5:], y).mean() / counts[i]
        else:
          terms["classes"] += entropy(t[5:], y).sum() / 2
          if kind == "v4": terms["box"] += 0.07 * (1 - alike) / 2
          else:
            size = box[2:] - box[:2]
            off = entropy(t[:2], (box[:2] + box[2:]) / 2 / STRIDES[i] - (c, r)).sum() + 0.5 * ((t[2:4] - np.log(size / ANCHORS[i, a])) ** 2).sum()
            terms["box"] += off * (2 - size.prod() / (CANVAS[0] * CANVAS[1])) / 2
      if gains: terms["objectness"] += gains[1] * (64 * 96 / 640 ** 2) * (4, 1, 0.4)[i] * entropy(t[4], goal) / (2 * sizes[i])
      elif fixed[b, n, "told"]: terms["objectness"] += entropy(t[4], goal) / 2
  return terms, fixed


@pytest.mark.parametrize("kind", by_hand(["v3", "v4", "v5", "v7"], "v3", "v5"))
def test_terms_and_gradient(kind, monkeypatch):
  if kind == "v3": monkeypatch.setattr("test_anchor_losses.SCALE", (1.0, 1.0, 1.0))
  rng = np.random.default_rng(3)
  levels = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
  inputs = [Tensor(level) for level in levels]
  given = (inputs, Tensor(ANCHORS), Tensor(BOXES), Tensor(LABELS), CANVAS, STRIDES)
  if kind in ("v3", "v4"): found = darknet_losses(*given, SCALE, ciou=kind == "v4")
  else: found = ratio_losses(*given, Gains() if kind == "v5" else Gains(objectness=0.7, classes=0.3, simota=True))
  gradients = sum(found.values()).gradient(*inputs)
  Tensor.realize(*found.values(), *gradients)
  levels = [level.astype(np.float64) for level in levels]
  owners = who(levels, kind)
  assert [sum(o >= 0 for o in own) for own in owners] > [3, 3]
  expected, fixed = losses(levels, kind, owners)
  assert {name: t.item() for name, t in found.items()} == pytest.approx(expected, rel=1e-5)
  for _ in range(2):
    way = [rng.standard_normal(shape) for shape in SHAPES]
    ahead, behind = (sum(losses([x + sign * 1e-5 * w for x, w in zip(levels, way)], kind, owners, fixed)[0].values()) for sign in (1, -1))
    assert sum((g.numpy() * w).sum() for g, w in zip(gradients, way)) == pytest.approx((ahead - behind) / 2e-5, rel=1e-3, abs=1e-5)


def test_pictures_without_boxes_and_wild_logits():
  levels = [Tensor(np.full(shape, 30, np.float32)) for shape in SHAPES]
  for labels in (np.full_like(LABELS, -1), LABELS):
    given = (levels, Tensor(ANCHORS), Tensor(BOXES), Tensor(labels), CANVAS, STRIDES)
    for found in (darknet_losses(*given, SCALE, ciou=True), ratio_losses(*given, Gains(simota=True))):
      gradients = sum(found.values()).gradient(*levels)
      Tensor.realize(*found.values(), *gradients)
      assert all(np.isfinite(t.numpy()).all() for t in (*found.values(), *gradients))
      if (labels < 0).all(): assert found["box"].item() == found["classes"].item() == 0 < found["objectness"].item()


@pytest.mark.parametrize(("name", "terms", "options"), [
  ("yolov3-tiny", "darknet_losses", {"ciou": False}), ("yolov3-spp", "darknet_losses", {"ciou": False}),
  ("yolov4", "darknet_losses", {"ciou": True}), ("yolov4-tiny", "darknet_losses", {"ciou": True}),
  ("yolov5n-classic", "ratio_losses", Gains()), ("yolov7", "ratio_losses", Gains(objectness=0.7, classes=0.3, simota=True))])
def test_networks_learn_by_their_own_rule(name, terms, options, monkeypatch):
  detector = yolo.build(name, K)
  outputs = detector(Tensor.empty(2, 64, 96, 3, dtype="uint8"))   # only shapes: nothing is computed
  given = []
  def noted(*args, **kwargs):
    given.append((args, kwargs or args[6]))
    return {"box": Tensor(1.0), "classes": Tensor(2.0)}
  monkeypatch.setattr(yolo, terms, noted)
  found = detector.losses(outputs, Tensor(BOXES), Tensor(LABELS), CANVAS)
  (args, chosen), = given
  assert chosen == options and args[0] is outputs and args[4:6] == (CANVAS, detector.facts.strides)
  assert found["loss"].item() == 3 * (1 if terms == "darknet_losses" else 2)   # times the pictures
  if terms == "darknet_losses": assert args[6] == detector.facts.scale_xy
  at = candidates_of(CANVAS, detector.facts.strides, args[1])
  assert [x.shape[1] for x in outputs] == [3 * (5 + K)] * len(outputs)
  np.testing.assert_array_equal(at.anchors.numpy()[[0, -1]], np.reshape(detector.facts.anchors, (-1, 2))[[0, -1]])
