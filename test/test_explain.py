"""Explanations: the arithmetic against finite differences and closed forms, and on the shipped detector the checks that a map has to pass."""
import functools, importlib.util, json, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinygrad import Tensor
from tinydet.datasets.shapes import Shapes
from tinydet.detection import explain
from tinydet.detection.anchors import PER_POSITION, anchors, feature_sizes
from tinydet.predict import Predictor
from tinydet.errors import UserError
from tinydet.config import parse, split_words
from tinydet.runtime.graphs import jit

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("program_explain", ROOT / "examples" / "explain.py")
sys.modules[spec.name] = program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
SET = Shapes("val", 1, 128, count=8)


# ---- arithmetic

RNG = np.random.default_rng(0)
ACTIVATIONS = [RNG.standard_normal((4, 5, 4)), RNG.standard_normal((4, 3, 2))]
KERNEL, OUTPUT, LABELS = RNG.standard_normal((6, 4, 3, 3)) / 4, RNG.standard_normal((3, 6)) / 2, 3
ENTRY = 9 * LABELS + 1   # class 1 of an anchor in the middle of the first level


def logits_in_float64(activations):
  """A head of a 3x3 convolution, a ReLU and a 1x1 convolution to three classes, position by position; all levels' logits in one row."""
  rows = []
  for a in activations:
    padded = np.pad(a, ((0, 0), (1, 1), (1, 1)))
    for i, j in np.ndindex(a.shape[1:]): rows.append(OUTPUT @ np.maximum((KERNEL * padded[:, i:i + 3, j:j + 3]).sum((1, 2, 3)), 0))
  return np.concatenate(rows)


def head(activations):
  """The same in tinygrad, [1,A,K]."""
  outputs = [a.conv2d(Tensor(np.float32(KERNEL)), padding=1).relu().conv2d(Tensor(np.float32(OUTPUT)[..., None, None])) for a in activations]
  return Tensor.cat(*(o.permute(0, 2, 3, 1).reshape(1, -1, LABELS) for o in outputs), dim=1)


def derivative(function, activations, order, step):
  """Central differences of the given order with respect to each number by itself."""
  weights = {1: {-1: -0.5, 1: 0.5}, 2: {-1: 1, 0: -2, 1: 1}, 3: {-2: -0.5, -1: 1, 1: -1, 2: 0.5}}[order]
  result = [np.zeros_like(a) for a in activations]
  for level, a in enumerate(activations):
    for place in np.ndindex(a.shape):
      for steps, weight in weights.items():
        moved = [x.copy() for x in activations]
        moved[level][place] += steps * step
        result[level][place] += weight * function(moved) / step ** order
  return result


def score_in_float64(activations): return logits_in_float64(activations)[ENTRY]


@functools.cache
def gradients_in_float64(): return derivative(score_in_float64, ACTIVATIONS, 1, 1e-6)


def test_gradients_are_those_of_finite_differences():
  found = [g.numpy()[0] for g in explain.gradients(head, [Tensor(np.float32(a)[None]) for a in ACTIVATIONS], Tensor([ENTRY]))]
  for mine, theirs in zip(found, gradients_in_float64(), strict=True): np.testing.assert_allclose(mine, theirs, atol=1e-5)
  assert np.abs(found[0]).max() > 0.1 and not found[1].any()   # the score lies on the first level


def test_grad_cam_weighs_channels_by_their_mean_gradient():
  a, g = ACTIVATIONS[0], gradients_in_float64()[0]
  expected = np.zeros((5, 4))
  for k in range(4): expected += g[k].sum() / 20 * a[k]
  assert (expected < 0).any() and (expected > 0).any()
  np.testing.assert_allclose(explain.grad_cam(a, g), np.where(expected > 0, expected, 0), atol=1e-12)


def test_grad_cam_plus_plus_is_the_closed_form_of_the_derivatives_of_the_exponential():
  a = np.abs(ACTIVATIONS[0])   # as after a ReLU
  entry = logits_in_float64([a]).argmax()
  score = lambda activations: np.exp(logits_in_float64(activations)[entry])
  first, second, third = (derivative(score, [a], order, step)[0] for order, step in ((1, 1e-6), (2, 1e-4), (3, 1e-3)))
  weights = np.zeros(4)
  for k, i, j in np.ndindex(a.shape):   # equations 10 and 19 as they are printed
    if first[k, i, j] > 1e-7: weights[k] += second[k, i, j] / (2 * second[k, i, j] + a[k].sum() * third[k, i, j]) * first[k, i, j]
  expected = np.maximum(np.einsum("k,kij->ij", weights, a), 0)
  assert expected.max() > 0.1 and (first < -0.01).any()
  found = explain.grad_cam_plus_plus(a, derivative(lambda x: np.log(score(x)), [a], 1, 1e-6)[0])
  np.testing.assert_allclose(found / found.max(), expected / expected.max(), atol=1e-3)
  assert not explain.grad_cam_plus_plus(a, np.zeros_like(a)).any()


def test_eigen_cam_projects_on_the_eigenvector_of_the_largest_eigenvalue():
  a = np.abs(ACTIVATIONS[0])
  flat = a.reshape(4, -1)
  values, vectors = np.linalg.eigh(flat @ flat.T)
  expected = np.abs(vectors[:, values.argmax()] @ flat).reshape(5, 4)   # of one sign, as the activations are
  for sign in (1, -1): np.testing.assert_allclose(explain.eigen_cam(sign * a), expected, atol=1e-12)


def test_the_products_of_hires_cam_add_up_to_a_score_without_biases():
  parts = [a * g for a, g in zip(ACTIVATIONS, gradients_in_float64())]   # the head has none, and is linear on this side of its ReLU
  np.testing.assert_allclose(sum(p.sum() for p in parts), score_in_float64(ACTIVATIONS), atol=1e-8)
  np.testing.assert_allclose(explain.hires_cam(ACTIVATIONS[0], gradients_in_float64()[0]), np.maximum(parts[0].sum(0), 0))


def test_a_cell_lies_where_its_anchors_are():
  rows, columns = feature_sizes(96, 160)[1]
  at = anchors(96, 160)[sum(h * w for h, w in feature_sizes(96, 160)[:1]) * PER_POSITION:][:rows * columns * PER_POSITION:PER_POSITION]
  centers = ((at[:, :2] + at[:, 2:]) / 2).reshape(rows, columns, 2)
  for i, j in ((0, 0), (2, 3), (rows - 1, columns - 1)):
    cell = np.zeros((rows, columns))
    cell[i, j] = 1
    heat = explain.resample(cell, 16, (96, 160), (96, 160))
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert heat.max() == 1 and (x, y) == tuple(centers[i, j])
    assert heat[min(y + 8, 95), x] == (0.5 if i < rows - 1 else 1), "half a stride on, half the heat; the edge is held"
  twice = explain.resample(cell, 16, (96, 160), (192, 320))   # the same for a picture that was halved for the network
  np.testing.assert_allclose(twice.reshape(96, 2, 160, 2).mean((1, 3)), heat, atol=0.02)


def test_levels_weigh_by_their_share_of_the_score():
  maps, shares = explain.level_maps("hirescam", ACTIVATIONS, [np.ones((4, 5, 4)), np.zeros((4, 3, 2))])
  assert shares.tolist() == [1, 0] and maps[0].max() > 0
  parts = explain.combine([np.eye(4), np.eye(2) + 1], np.array([0.75, 0.25]), [8, 16], (32, 32), (64, 48))
  np.testing.assert_allclose(parts.sum((1, 2)) / parts.sum(), [0.75, 0.25], rtol=1e-5)
  assert parts.shape == (2, 64, 48) and abs(parts.sum(0).max() - 1) < 1e-6
  assert not explain.combine([np.zeros((4, 4))], np.zeros(1), [8], (32, 32), (32, 32)).any()


def test_inside_is_the_part_of_the_heat_in_the_box():
  heat = np.arange(12.).reshape(3, 4)
  assert explain.inside(heat, np.array([1.2, 0.6, 3.4, 3.0])) == pytest.approx((5 + 6 + 9 + 10) / 66)
  assert explain.inside(np.zeros((3, 4)), np.array([0, 0, 4, 3])) == 0


# ---- measures

def test_rank_correlation_and_ssim_are_those_of_scipy_and_scikit_image():
  y, x = np.mgrid[:24, :31] / 24
  # rounded: which of them are equal is up to a processor's last bit otherwise
  a = np.clip(np.sin(5 * x) * np.cos(3 * y), 0, 1).round(6)
  b = np.clip(np.exp(-4 * (x - 0.5) ** 2 - 3 * (y - 0.4) ** 2) - 0.3, 0, 1).round(6)
  assert (a == 0).mean() > 0.1   # with ties
  assert explain.rank_correlation(a, b) == pytest.approx(0.10015921722805483)   # scipy 1.17 spearmanr
  # scikit-image 0.26 structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)
  assert explain.ssim(a, b) == pytest.approx(-0.056330554196926216)
  assert explain.rank_correlation(a, a ** 3) == pytest.approx(1) and explain.ssim(a, a) == pytest.approx(1)
  assert explain.rank_correlation(a, np.zeros_like(a)) == 0


def test_curves_of_a_score_that_sees_one_quarter():
  picture, other = np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8, 3), np.uint8)
  quarter = np.zeros((8, 8))
  quarter[:4, :4] = 1
  seen = lambda pictures: (pictures[:, :4, :4, 0] == 200).mean((1, 2))
  changed = [(step == 0).all(-1).sum() for step in explain.blend(picture, other, quarter)]
  assert changed == np.linspace(0, 64, explain.STEPS).round().tolist() and not explain.blend(picture, other, quarter)[4, :4, :4].any()
  expected = np.maximum(1 - np.linspace(0, 4, explain.STEPS), 0)   # gone after a quarter of the pixels
  expected = (expected[1:] + expected[:-1]).mean() / 2
  for heat, gone in ((quarter, expected), (1 - quarter, 1 - expected)):
    found = explain.deletion_and_insertion(seen, picture, other, other, heat)
    np.testing.assert_allclose(found, (gone, 1 - gone), atol=0.01)


def test_cascade_writes_in_place_and_gives_everything_back():
  first, second = Tensor([1., 2.]).realize(), Tensor([[3.]]).realize()
  @jit
  def total(): return (first.sum() + second.sum()).contiguous()
  stages = {"one": {"a": first}, "two": {"b": second}}
  draw = lambda key, shape: np.full(shape, {"a": 10, "b": 20}[key])
  assert total().item() == 6
  assert [(name, total().item()) for name in explain.cascade(stages, draw)] == [("one", 23), ("two", 40)] and total().item() == 6
  stopped = explain.cascade(stages, draw)
  assert next(stopped) == "one" and total().item() == 23
  stopped.close()
  assert total().item() == 6 and first.tolist() == [1, 2]


# ---- the shipped detector

DETECTOR = functools.cache(lambda: Predictor("shapes"))
NETWORK = functools.cache(lambda make=program.Network: make(DETECTOR().detector, "backbone"))


@pytest.fixture
def run(monkeypatch, tmp_path):
  """The program in this process, with the one network that all tests share; returns what it wrote to explanations.json."""
  monkeypatch.setattr(program, "Predictor", lambda *_, **__: DETECTOR())
  monkeypatch.setattr(program, "Network", lambda *_: NETWORK())
  def run(*words):
    free, flags = split_words([*map(str, words), "--weights", "shapes", "--out", str(tmp_path / "out")], ("--check",))
    config = parse(program.Config, program.PRESETS, flags, {})
    config.source = free or None
    program.main(config)
    return json.loads((tmp_path / "out" / "explanations.json").read_text())
  return run


def entry_of(detection): return detection["anchor"] * 6 + SET.class_names.index(detection["class"])


@pytest.mark.by_hand
def test_maps_beat_random_ones_and_depend_on_the_weights(run, tmp_path, capsys, monkeypatch):
  """Petsiuk et al. 2018 and Adebayo et al. 2018 on the surest detection of pictures of shapes."""
  monkeypatch.setattr(program, "RANDOM_MAPS", 2)
  before = DETECTOR().detector.network.backbone.body.conv1.weight.numpy()
  result = run("--data", "shapes:1", "--images", "6", "--top", "1", "--check")
  detections = [d | {"image": SET[i].image} for i, p in enumerate(result["pictures"]) for d in p["detections"]]
  assert len(detections) >= 5
  curves = result["mean"]["curves"]
  assert curves["deletion"] < 0.7 * curves["random_deletion"] and curves["insertion"] > 1.2 * curves["random_insertion"]
  assert np.mean([d["curves"]["deletion"] < d["curves"]["random_deletion"] for d in detections]) > 0.7
  stages = result["mean"]["randomised"]
  assert [s["stage"] for s in stages] == list(DETECTOR().detector.stages)
  assert all(s["rank_correlation"] < 0.7 and s["ssim"] < 0.8 for s in stages) and stages[-1]["rank_correlation"] < 0.55
  np.testing.assert_array_equal(DETECTOR().detector.network.backbone.body.conv1.weight.numpy(), before)
  for d in detections:   # the anchor is the detection's own, and --check left the network as it was
    assert NETWORK().scores(d["image"][None], entry_of(d), 16)[0] == pytest.approx(d["score"], abs=1e-5)
    assert sum(d["shares"].values()) == pytest.approx(1) and list(d["shares"]) == ["C3", "C4", "C5"]
    assert (d["shares"]["C3"] == 0) == (d["level"] != "P3")   # the pyramid goes top-down: C3 reaches P3 only
    with Image.open(tmp_path / "out" / d["drawn"]) as drawn: assert drawn.size[0] == 2 * program.PANEL
  area = np.mean([(d["box"][2] - d["box"][0]) * (d["box"][3] - d["box"][1]) for d in detections]) / 128 ** 2
  assert result["mean"]["inside"] > 1.5 * area
  out = capsys.readouterr().out
  assert "weights randomised down to" in out and f"mean of {len(detections)}" in out


@pytest.mark.by_hand
def test_eigen_cam_does_not_see_the_head_and_hires_cam_tells_detections_apart():
  image = SET[1].image   # a square above a ring
  features, (logits, _) = NETWORK().forward(image)
  best = logits.numpy()[0].argmax(0)
  square, ring = (int(best[label]) * 6 + label for label in (SET.class_names.index("square"), SET.class_names.index("ring")))
  likeness = {}
  for method in ("hirescam", "gradcam", "eigencam"):
    heats = [explain.combine(maps, shares, [8, 16, 32], (128, 128), (128, 128)).sum(0)
             for maps, shares in NETWORK().maps(method, features, [square, ring])]
    likeness[method] = explain.rank_correlation(*heats)
  assert likeness["hirescam"] < likeness["gradcam"] < likeness["eigencam"]
  (maps, _), = NETWORK().maps("eigencam", features, [square])
  model = DETECTOR().detector.network
  stages = {"logits": {"w": model.head.classification_head.cls_logits.weight}, "layer4": {"w": model.backbone.body.layer4[0].conv2.weight}}
  rng = np.random.default_rng(0)
  for stage in explain.cascade(stages, lambda key, shape: rng.standard_normal(shape) * 0.05):
    features, _ = NETWORK().forward(image)
    (others, _), = NETWORK().maps("eigencam", features, [square])
    np.testing.assert_array_equal(maps[0], others[0])
    assert np.array_equal(maps[2], others[2]) == (stage == "logits")


@pytest.mark.by_hand
def test_files_of_any_size_and_pictures_without_a_detection(run, tmp_path, capsys):
  (tmp_path / "in" / "sub").mkdir(parents=True)
  Image.fromarray(SET[0].image).resize((200, 300)).save(tmp_path / "in" / "a.png")
  Image.fromarray(SET[1].image).save(tmp_path / "in" / "sub" / "a.png")
  Image.new("RGB", (64, 64), "gray").save(tmp_path / "in" / "b.png")
  (tmp_path / "in" / "c.jpg").write_bytes(b"no picture")
  result = run(tmp_path / "in", "--method", "gradcam++", "--top", "2", "--threshold", "0.6")
  files = {Path(p["file"]).relative_to(tmp_path / "in").as_posix(): p for p in result["pictures"]}
  assert list(files) == ["a.png", "b.png", "sub/a.png"] and files["b.png"]["detections"] == []
  assert [d["drawn"] for p in files.values() for d in p["detections"]] == ["a-1.jpg", "a-2.jpg", "a_2-1.jpg", "a_2-2.jpg"]
  scores = [d["score"] for d in files["sub/a.png"]["detections"]]
  assert min(scores) > 0.6 and scores == sorted(scores, reverse=True)
  square = next(d for d in files["sub/a.png"]["detections"] if d["class"] == "square")
  truth = SET[1].boxes[SET[1].labels == SET.class_names.index("square")][0]
  np.testing.assert_allclose(square["box"], truth, atol=6)
  with Image.open(tmp_path / "out" / "a-1.jpg") as drawn: assert drawn.size[0] == 2 * round(program.PANEL * 200 / 300)
  out, err = capsys.readouterr()
  assert "nothing scores more than 0.6" in out and "c.jpg: cannot be read as a picture" in err and "curves" not in result["mean"]
  assert list(program.expand((str(tmp_path),))[0]) == sorted(tmp_path.glob("in/**/*.*")), "what the program wrote is no source"


@pytest.mark.parametrize(("words", "message"), [
  (["--method", "cam"], r"--method cam: expected one of hirescam, gradcam, gradcam\+\+, eigencam"),
  (["nowhere.png"], "nowhere.png: no such file or folder"), (["webcam"], "is a video or a camera"), (["--top", "0"], "at least 1"),
  (["x.png", "--data", "shapes:1"], "takes its pictures from the data set"), (["--layer", "P9"], "expected one of backbone, pyramid")])
def test_bad_input_gets_one_line(run, words, message, tmp_path):
  with pytest.raises(UserError, match=message): run(*words)
  assert not (tmp_path / "out").exists()


def test_missing_weights_are_named(tmp_path):
  Image.fromarray(SET[0].image).save(tmp_path / "a.png")
  config = parse(program.Config, program.PRESETS, ["--weights", str(tmp_path / "none"), "--out", str(tmp_path / "out")], {})
  config.source = (str(tmp_path / "a.png"),)
  with pytest.raises(UserError, match=r"--weights .*none: no such file or run"): program.main(config)
  assert not (tmp_path / "out").exists()
