"""What is published of YOLO's networks, by counting; folding; selection; and the faults of TinyYolo that this house does not have."""
import numpy as np, pytest
from tinygrad import Context, Tensor, dtypes
from tinygrad.nn.state import get_state_dict
from tinydet.detection import postprocess, yolo as decoding
from tinydet.detectors import yolo as detectors
from tinydet.errors import UserError
from tinydet.models import yolo, yolo_blocks, yolov6
from tinydet.models.fold import fold
from tinydet.nn import init, layers
from tinydet.nn.pool import max_pool_2x2, max_pool_same, mean_pool_2x2
from tinydet.weights import yolo_published
from yolo_golden import NO_PARAMETERS, fill, parameters, value
from by_hand import by_hand

# Exact numbers of parameters where they are published, of networks with all their heads and norms.
EXACT = {"yolov8n": 3_157_200, "yolov8s": 11_166_560, "yolov8m": 25_902_640, "yolov8l": 43_691_520, "yolov8x": 68_229_648, "yolov9t": 2_128_720,
         "yolov9s": 7_318_368, "yolov9m": 20_216_160, "yolov9c": 25_590_912, "yolo11n": 2_624_080,
         "yolo11s": 9_458_752, "yolo11m": 20_114_688, "yolo11l": 25_372_160, "yolo11x": 56_966_176, "yolo26n": 2_572_280, "yolo26s": 10_009_784,
         "yolo26m": 21_896_248, "yolo26l": 26_299_704, "yolo26x": 58_993_368}
ROUNDED = {   # millions of parameters, GFLOPs (two a multiply-add), side in pixels: as inference needs them, with branches merged and one head
  "yolov3": (61.95, 65.86, 416), "yolov3-spp": (63.00, 141.45, 608), "yolov3-tiny": (8.85, 5.56, 416), "yolov4": (64.36, 60.10, 416),
  "yolov4-tiny": (6.06, 6.91, 416), "yolov5n-classic": (1.9, 4.5, 640), "yolov5s-classic": (7.2, 16.5, 640),
  "yolov5m-classic": (21.2, 49.0, 640), "yolov5l-classic": (46.5, 109.1, 640), "yolov5x-classic": (86.7, 205.7, 640),
  "yolov5n": (2.6, 7.7, 640), "yolov5s": (9.1, 24.0, 640), "yolov5m": (25.1, 64.2, 640), "yolov5l": (53.2, 135.0, 640),
  "yolov5x": (97.2, 246.4, 640), "yolov6n": (4.7, 11.4, 640), "yolov6s": (18.5, 45.3, 640), "yolov6m": (34.9, 85.8, 640),
  "yolov6l": (59.6, 150.7, 640), "yolov7": (36.9, 104.7, 640), "yolov8t": (0.68, 3.41, 640), "yolov8n": (3.2, 8.7, 640), "yolov8s": (11.2, 28.6, 640),
  "yolov8m": (25.9, 78.9, 640), "yolov8l": (43.7, 165.2, 640), "yolov8x": (68.2, 257.8, 640), "yolov9t": (2.0, 7.7, 640),
  "yolov9s": (7.1, 26.4, 640), "yolov9m": (20.0, 76.3, 640), "yolov9c": (25.3, 102.1, 640), "yolov10n": (2.3, 6.7, 640),
  "yolov10s": (7.2, 21.6, 640), "yolov10m": (15.4, 59.1, 640), "yolov10b": (19.1, 92.0, 640), "yolov10l": (24.4, 120.3, 640),
  "yolov10x": (29.5, 160.4, 640), "yolo11n": (2.6, 6.5, 640), "yolo11s": (9.4, 21.5, 640), "yolo11m": (20.1, 68.0, 640),
  "yolo11l": (25.3, 86.9, 640), "yolo11x": (56.9, 194.9, 640), "yolo12n": (2.6, 6.5, 640), "yolo12s": (9.3, 21.4, 640),
  "yolo12m": (20.2, 67.5, 640), "yolo12l": (26.4, 88.9, 640), "yolo12x": (59.1, 199.0, 640), "yolo26n": (2.4, 5.4, 640),
  "yolo26s": (9.5, 20.7, 640), "yolo26m": (20.4, 68.2, 640), "yolo26l": (24.8, 86.4, 640), "yolo26x": (55.7, 193.9, 640)}


def count(name):
  """Parameters in millions and GFLOPs of convolutions, of what inference needs."""
  network, side = yolo.made(name, 80), ROUNDED[name][2]
  merge(network)
  if hasattr(network, "detect"): vars(network.detect).pop("reg_preds_dist", None)
  head = network.model[-1] if hasattr(network, "model") else None
  if hasattr(head, "one2one_cv2"): del head.cv2, head.cv3
  x, work = Tensor.empty(1, 3, side, side), []
  def conv2d(x, weight, bias=None, stride=1, padding=0, groups=1, dtype=None, silu=False):
    h, w = ((s + 2 * padding - weight.shape[2]) // stride + 1 for s in x.shape[2:])
    work.append(2 * h * w * weight.numel())
    return Tensor.empty(x.shape[0], weight.shape[0], h, w)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, "conv2d", conv2d)
    if hasattr(head, "one2one_cv2"):
      head.cv2, head.cv3, real = [], [], yolo_blocks.branch_outputs
      patch.setattr(yolo_blocks, "branch_outputs", lambda branches, levels: real(branches, levels) if branches else None)
    network(x)
  folded = ("dfl.conv.weight", "proj", "proj_conv.weight", "bn.weight")   # and constants
  numbers = sum(t.numel() for key, t in get_state_dict(network).items() if not key.endswith(NO_PARAMETERS + folded))
  return numbers / 1e6, sum(work) / 1e9


def merge(module):
  """Branches by one convolution of their largest kernel, without values."""
  for key, child in enumerate(module) if isinstance(module, list) else list(vars(module).items()) if hasattr(module, "__dict__") else []:
    if hasattr(child, "branches"):
      largest = max((conv for conv, _ in child.branches() if conv is not None), key=lambda conv: conv.weight.shape[2])
      out_channels, per_group, kernel, _ = largest.weight.shape
      one = yolo_blocks.Conv(per_group * largest.groups, out_channels, kernel, largest.stride, largest.groups)
      if isinstance(module, list): module[key] = one
      else: setattr(module, key, one)
    elif not isinstance(child, Tensor): merge(child)


@pytest.mark.parametrize("name", yolo.NAMES)
def test_parameters_and_work_as_published(name):
  if name in EXACT: assert parameters(yolo.made(name, 80)) == EXACT[name]
  millions, gflops = count(name)
  # v9's authors have groups in the box branch and, in t, a wider class branch
  tolerance = 0.1 if name == "yolov9t" else 0.03 if name == "yolov9s" else 0.01
  assert millions == pytest.approx(ROUNDED[name][0], rel=tolerance, abs=0.06) and gflops == pytest.approx(ROUNDED[name][1], rel=tolerance, abs=0.06)


BLOCKS = {"v6": lambda: yolov6.RepVGG(8, 8), "v6 down": lambda: yolov6.RepVGG(4, 8, 2), "v7": lambda: yolo_blocks.RepConvN(8, 4),
          "v9": lambda: yolo_blocks.RepConv(8, 8), "v10": lambda: yolo_blocks.RepVGGDW(8), "depthwise": lambda: yolo_blocks.depthwise(8, 3, 2)}


@pytest.mark.parametrize("kind", BLOCKS)
def test_folded_blocks_compute_the_same(kind):
  """Whole networks of v6, v9 and v10 are held against the golden files folded (test_yolo_networks.py)."""
  block = [BLOCKS[kind]()]
  for key, t in get_state_dict(block).items(): init.set_values(t, value(key, t.shape) if t.shape else np.zeros(()))
  x = Tensor(np.random.default_rng(0).standard_normal((2, 4 if kind == "v6 down" else 8, 6, 10)).astype(np.float32))
  before = block[0](x).numpy()
  fold(block)
  assert len(get_state_dict(block)) == 2
  np.testing.assert_allclose(block[0](x).numpy(), before, rtol=0, atol=1e-5 * abs(before).max())


@pytest.mark.parametrize("name", by_hand(["yolov4-tiny", "yolov8t", "yolov7"], "yolov4-tiny", "yolov7"))
def test_folded_networks_compute_the_same(name):
  network = fill(yolo.build(name, 80 if name == "yolov4-tiny" else 3))
  x = Tensor(np.random.default_rng(0).random((1, 3, 32, 64), np.float32))
  before = [t.numpy() for t in network(x)]
  fold(network)
  assert not any("running" in key or "rbr_" in key for key in get_state_dict(network))
  for a, b in zip(before, network(x), strict=True): assert abs(a - b.numpy()).max() <= 1e-4 * abs(a).max()


SMALL = {"C2f": lambda: yolo_blocks.C2f(8, 8, 1, True), "C3k": lambda: yolo_blocks.c3k2(8, 8, 1, True), "SPPF": lambda: yolo_blocks.SPPF(8, 8, True),
         "PSA": lambda: yolo_blocks.PSABlock(16, 2), "area": lambda: yolo_blocks.A2C2f(64, 64, 1, 2, True, 1.2),
         "ELAN": lambda: yolo_blocks.ELAN(8, 8, 8, 4, 1), "ADown": lambda: yolo_blocks.ADown(8, 8), "CIB": lambda: yolo_blocks.CIB(8, True, True),
         "BottleRep": lambda: yolov6.BottleRep(8, lambda i, o: yolov6.Block(i, o, 3, act=layers.silu)),
         "ConvTranspose": lambda: layers.ConvTranspose2x2(8, 4)}


@pytest.mark.parametrize("kind", by_hand(SMALL, "area", "PSA", "C3k", "SPPF", "CIB"))
def test_blocks_learn(kind):
  """The gradient of input and parameters, along one direction each, against differences of outputs; norms use the batch's statistics."""
  block, rng = [SMALL[kind]()], np.random.default_rng(5)
  tensors = get_state_dict(block)
  for key, t in tensors.items(): init.set_values(t, value(key, t.shape) if t.shape else np.zeros(()))
  learnt = {"x": Tensor(rng.standard_normal((2, {"PSA": 16, "area": 64}.get(kind, 8), 4, 8)).astype(np.float32))}
  learnt |= {key: t for key, t in tensors.items() if t.is_param}
  start = {key: t.numpy() for key, t in learnt.items()}
  ways = {key: rng.standard_normal(v.shape).astype(np.float32) * 0.1 for key, v in start.items()}
  def outputs():
    with Context(TRAINING=1): return block[0](learnt["x"])
  upstream = rng.standard_normal(outputs().shape).astype(np.float32)
  gradients = (outputs() * Tensor(upstream)).sum().gradient(*learnt.values())
  Tensor.realize(*gradients)
  slope = sum(float((g.numpy().astype(np.float64) * way).sum()) for g, way in zip(gradients, ways.values()))
  around = []
  for step in (0.005, -0.005):
    for key, t in learnt.items(): t.assign(Tensor(start[key] + step * ways[key])).realize()
    around.append((outputs().numpy().astype(np.float64) * upstream).sum())
  assert slope == pytest.approx((around[0] - around[1]) / 0.01, rel=2e-2, abs=0.05) and abs(slope) > 0.1


@pytest.mark.parametrize("name", by_hand(["yolov8n", "yolov3-tiny", "yolov7"], "yolov3-tiny", "yolov7"))
def test_the_first_values(name):
  """A score near zero wherever nothing was learnt, and boxes that are boxes."""
  detector = detectors.build(name, 6, seed=3)
  found = detector.predict(np.zeros((1, 64, 96, 3), np.uint8))
  assert found.boxes.shape[1:] == (found.scores.shape[1], 4) and found.scores.shape[2] == 6 and np.isfinite(found.boxes).all()
  if name != "yolov3-tiny": assert found.scores.max() < 0.05
  anchors = detector.anchors().numpy() if detector.facts.anchors else None
  if name == "yolov7": np.testing.assert_allclose(anchors.reshape(-1), [v for level in detector.facts.anchors for v in level], rtol=1e-6)
  with pytest.raises(UserError, match="multiples of 32, such as 96"): detector.predict(np.zeros((1, 64, 90, 3), np.uint8))


def test_unknown_names():
  for name in ("yolov8", "yolov7x", "yolov13n"):
    with pytest.raises(ValueError, match="is no YOLO network"): detectors.build(name)


def test_all_networks_have_published_weights():
  assert set(yolo_published.PUBLISHED) == set(yolo.NAMES) - {"yolov8t"}   # this project's own
  for name, entry in yolo_published.PUBLISHED.items():
    assert entry.url.startswith("https://") and yolo_published.about(name)["num_classes"] == len(yolo_published.about(name)["class_names"]) == 80
    assert (entry.licence == "public domain") == (name in ("yolov3", "yolov3-spp", "yolov3-tiny", "yolov4", "yolov4-tiny"))


def test_licences_are_told_once_and_missing_files_in_a_line(tmp_path, monkeypatch):
  monkeypatch.setenv("TINYDET_MIRROR", str(tmp_path / "mirror"))
  monkeypatch.setattr(yolo_published, "cache_folder", lambda kind: tmp_path / "cache")
  with pytest.raises(UserError, match=r"yolov8n\.pt cannot be downloaded.*fetch https://github\.com/.*yolov8n\.pt elsewhere and put it into"):
    yolo_published.fetch_published("yolov8n")
  (tmp_path / "mirror").mkdir()
  (tmp_path / "mirror" / "yolov8n.pt").write_bytes(b"weights")
  path, notes = yolo_published.fetch_published("yolov8n")
  assert path.read_bytes() == b"weights" and len(notes) == 1 and "AGPL-3.0" in notes[0] and yolo_published.fetch_published("yolov8n") == (path, [])


# ---- max pools, activations


def windows(x, size, stride, before, after):
  """The largest of each window, in numpy."""
  padded = np.pad(x, ((0, 0), (0, 0), (before, after), (before, after)), constant_values=-np.inf)
  view = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))[:, :, ::stride, ::stride]
  return view.max((4, 5))


def test_pools_and_their_gradients():
  rng = np.random.default_rng(0)
  x = -rng.random((2, 3, 6, 8)).astype(np.float32)   # all negative: padding with 0 would show
  weights = rng.standard_normal(x.shape).astype(np.float32)
  for pool, size, stride, before, after in ((lambda t: max_pool_same(t, 5), 5, 1, 2, 2), (lambda t: max_pool_2x2(t, 1), 2, 1, 0, 1),
                                            (max_pool_2x2, 2, 2, 0, 0)):
    t = Tensor(x)
    out = pool(t)
    expected = windows(x, size, stride, before, after)
    w = weights[:, :, :expected.shape[2], :expected.shape[3]]
    gradient = (out * Tensor(w)).sum().gradient(t)[0].numpy()
    np.testing.assert_array_equal(out.numpy(), expected)
    wanted = np.zeros_like(x)
    padded = np.pad(x, ((0, 0), (0, 0), (before, after), (before, after)), constant_values=-np.inf)
    for (b, c, i, j), weight in np.ndenumerate(w):
      window = padded[b, c, i * stride:i * stride + size, j * stride:j * stride + size]
      p, q = np.unravel_index(window.argmax(), window.shape)
      wanted[b, c, i * stride + p - before, j * stride + q - before] += weight
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)
  four = x[:, :, 1:, 1:] + x[:, :, :-1, 1:] + x[:, :, 1:, :-1] + x[:, :, :-1, :-1]
  np.testing.assert_allclose(mean_pool_2x2(Tensor(x)).numpy(), four / 4, atol=1e-6)


def test_activations_and_the_transposed_convolution():
  x = np.float32([-90, -20, -3, -0.5, 0, 0.5, 3, 20, 90])
  d = x.astype(np.float64)
  np.testing.assert_allclose(layers.silu(Tensor(x)).numpy(), d / (1 + np.exp(-d)), rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(layers.mish(Tensor(x)).numpy(), d * np.tanh(np.log1p(np.exp(d))), rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(layers.leaky_relu(Tensor(x)).numpy(), np.where(d > 0, d, 0.1 * d), rtol=1e-6)
  rng = np.random.default_rng(0)
  up, picture = layers.ConvTranspose2x2(3, 2), rng.standard_normal((1, 3, 2, 3)).astype(np.float32)
  weight, bias = rng.standard_normal((3, 2, 2, 2)).astype(np.float32), np.float32([1, -1])
  init.set_values(up.weight, weight), init.set_values(up.bias, bias)
  expected = np.einsum("bihw,iopq->bohpwq", picture, weight).reshape(1, 2, 4, 6) + bias[:, None, None]
  np.testing.assert_allclose(up(Tensor(picture)).numpy(), expected, atol=1e-5)


# ---- selection


def test_selection_of_the_one_to_one_heads():
  """First the best cells, then the best pairs among them; the earlier of equals; few cells; scores below the threshold."""
  rng = np.random.default_rng(0)
  scores, boxes = np.round(rng.random((2, 50, 3)), 2).astype(np.float32), rng.random((2, 50, 4)).astype(np.float32)
  found = [t.numpy() for t in decoding.best_pairs(Tensor(boxes), Tensor(scores), 8, 0.9)]
  for i in range(2):
    cells = np.sort(np.argsort(-scores[i].max(1), kind="stable")[:8])
    order = [k for k in np.argsort(-scores[i][cells].reshape(-1), kind="stable") if scores[i][cells].reshape(-1)[k] > np.float32(0.9)][:8]
    n = len(order)
    np.testing.assert_array_equal(found[2][i][:n], np.array(order) % 3)
    np.testing.assert_array_equal(found[3][i][:n], cells[np.array(order) // 3])
    np.testing.assert_array_equal(found[0][i][:n], boxes[i][cells[np.array(order) // 3]])
    assert (found[2][i][n:] == -1).all() and (found[1][i][n:] == 0).all()
  assert decoding.best_pairs(Tensor(boxes), Tensor(scores), 300)[1].shape == (2, 50)


@pytest.mark.parametrize("on_host", [True, False])
def test_nms_is_by_class_and_greedy(on_host):
  """A box that is itself dropped drops none; another class's box drops none (TinyYolo's faults 10)."""
  boxes = np.float32([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10], [0, 0, 10, 10]])[None]
  scores = np.float32([[0.9, 0], [0.8, 0], [0.7, 0], [0, 0.6]])[None]
  options = {"sigmoid": False, "clip": False, "nms_threshold": 0.4, "on_host": on_host}
  found = postprocess.select(Tensor(scores), Tensor(boxes), None, [4], np.array([[10, 18]]), score_threshold=0.25, **options)
  assert found.counts.tolist() == [3] and found.anchors[0, :3].tolist() == [0, 2, 3] and found.labels[0, :3].tolist() == [0, 0, 1]
  none = postprocess.select(Tensor(scores), Tensor(boxes), None, [4], np.array([[10, 18]]), score_threshold=0.95, **options)
  assert none.counts.tolist() == [0] and not none.scores.any() and (none.labels == -1).all()


@pytest.mark.by_hand
def test_both_forms_of_selection_agree():
  rng = np.random.default_rng(1)
  corners = rng.random((2, 400, 2)) * 90
  boxes = np.concatenate([corners, corners + 5 + rng.random((2, 400, 2)) * 40], -1).astype(np.float32)
  scores = (rng.random((2, 400, 5)) ** 3).astype(np.float32)
  options = {"score_threshold": 0.4, "max_detections": 50, "nms_threshold": 0.7, "topk": 30_000, "sigmoid": False, "clip": False}
  host, device = (postprocess.select(Tensor(scores), Tensor(boxes), None, [400], np.full((2, 2), 150), on_host=on_host, **options)
                  for on_host in (True, False))
  for field in ("counts", "labels", "anchors", "boxes", "scores"): np.testing.assert_array_equal(getattr(host, field), getattr(device, field), field)
  assert host.counts.min() == 50


# ---- TinyYolo's faults, of those that concern inference (others are in test_yolo_networks.py, by golden outputs)


def test_tiny_anchors_are_those_of_the_published_weights():   # 1
  for name in ("yolov3-tiny", "yolov4-tiny"): assert yolo.facts(name).anchors[0] == (23, 27, 37, 58, 81, 82)


def test_yolov4_tiny_widens_cells_alike():   # 2
  assert yolo.facts("yolov4-tiny").scale_xy == (1.05, 1.05) and yolo.facts("yolov4").scale_xy == (1.2, 1.1, 1.05)


def norms(module):
  for child in module if isinstance(module, list | tuple) else vars(module).values() if hasattr(module, "__dict__") else []:
    if isinstance(child, layers.BatchNorm): yield child
    elif not isinstance(child, Tensor): yield from norms(child)


@pytest.mark.parametrize("name", ["yolov3", "yolov4-tiny", "yolov6n", "yolov6l", "yolov7", "yolov8n", "yolov9c", "yolov10x", "yolo12n", "yolo26n"])
def test_what_norms_add_to_the_variance(name):   # 4
  expected = {1e-5} if name in ("yolov3", "yolov4-tiny") else {1e-3}
  assert {norm.eps for norm in norms(yolo.made(name, 80))} == expected


def test_yolov10_has_residuals_in_the_backbone_alone():   # 5
  for size in "nsmblx":
    network = yolo.made(f"yolov10{size}", 80)
    for number, module in enumerate(network.model):
      if not isinstance(module, yolo_blocks.C2f): continue
      for block in module.m: assert block.add == (isinstance(block, yolo_blocks.CIB) or number < 10), number


def test_yolov6_pools_and_plain_boxes():   # 6
  for name, act in (("yolov6m", Tensor.relu), ("yolov6l", layers.silu)):
    assert yolo.made(name, 80).backbone.ERBlock_5[2].sppf.cv1.block.act is act
  assert [yolo.facts(f"yolov6{size}").bins for size in "nsml"] == [1, 1, 17, 17]
  assert isinstance(yolo.made("yolov6n", 80), yolov6.YOLOv6)


def test_one_to_one_heads_are_what_detects():   # 7
  detector = detectors.build("yolo26n", 2)
  outputs = tuple(Tensor.full((1, c, 336), v) for c, v in ((4, 1.0), (2, -9.0), (4, 2.0), (2, 9.0)))
  scores, boxes = detector.candidates(outputs, (128, 128))
  assert scores.numpy().min() > 0.99 and boxes[0, 0].numpy().tolist() == [-12, -12, 20, 20]
  assert detector.detect(outputs, (128, 128), np.array([[128, 128]])).counts.tolist() == [300]   # none dropped, though many overlap


def test_scores_are_objectness_times_class():   # 10
  level = Tensor(np.zeros((1, 3 * 7, 1, 1), np.float32))
  _, objectness, scores = decoding.decode_anchors([level], Tensor(np.ones((1, 3, 2), np.float32)), (32,))
  assert np.allclose(objectness.numpy(), 0.5) and np.allclose(scores.numpy(), 0.25)


def test_half_precision_outputs_are_float32():
  network = yolo.build("yolov8n", 2)
  assert {t.dtype for t in network(Tensor.empty(1, 3, 32, 32, dtype=dtypes.half))} == {dtypes.float32}
