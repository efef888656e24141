"""Where a network starts from: published names of tensors old and new, wrappers, other classes, classifiers; and nothing skipped in silence."""
import json, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from tinygrad.nn.state import get_state_dict
from tinydet.errors import UserError
from tinydet.models import classifiers, resnet, retinanet
from tinydet.nn import init
from tinydet.weights import checkpoint, torch_file
from tinydet.detectors import build, open_detector
from tinydet.weights.weights import fit, load_weights, open_weights, read, save_weights
from by_hand import by_hand

ROOT = Path(__file__).parents[1]
NAME = "retinanet_resnet10_quarter_fpn"


@pytest.fixture(scope="module")
def six_classes(tmp_path_factory):
  model, path = retinanet.build(NAME, 6, "batch", seed=3), tmp_path_factory.mktemp("weights") / "six.safetensors"
  save_weights(path, get_state_dict(model), {})
  return {k: t.numpy() for k, t in get_state_dict(model).items()}, path


def test_weights_for_other_classes_start_anew(six_classes):
  tensors, path = six_classes
  same, other = retinanet.build(NAME, 6, "frozen", seed=0), retinanet.build(NAME, 4, "batch", seed=0)
  own = {k: t.numpy() for k, t in get_state_dict(other).items()}
  assert load_weights(str(path), same) == []
  for key, t in get_state_dict(same).items(): np.testing.assert_array_equal(t.numpy(), tensors[key], err_msg=key)
  notes = load_weights(str(path), other)
  new = [f"head.classification_head.cls_logits.{part}" for part in ("weight", "bias")]
  assert len(notes) == 1 and "six.safetensors" in notes[0] and all(key in notes[0] for key in new)
  for key, t in get_state_dict(other).items(): np.testing.assert_array_equal(t.numpy(), own[key] if key in new else tensors[key], err_msg=key)


def save(path, tensors, metadata=None):
  """Write tensors in the format of the suffix."""
  if path.suffix == ".safetensors": checkpoint.save(path, tensors, metadata)
  else: torch_file.save(path, tensors)
  return str(path)


def test_weights_in_half_precision(six_classes, tmp_path):
  tensors, _ = six_classes
  save_weights(tmp_path / "half.safetensors", get_state_dict(retinanet.build(NAME, 6, "batch", seed=3)), {}, half=True)
  stored, _ = checkpoint.load(tmp_path / "half.safetensors")
  assert {a.dtype for a in stored.values()} == {np.dtype(np.float16), np.dtype(np.int64)}
  model = retinanet.build(NAME, 6, "batch", seed=0)
  load_weights(str(tmp_path / "half.safetensors"), model)
  for key, t in get_state_dict(model).items(): np.testing.assert_array_equal(t.numpy(), tensors[key].astype(np.float16).astype(tensors[key].dtype))


@pytest.mark.parametrize(("name", "message"), [
  ("retinanet_resnet10_quarter_fpn_v2", r"six\.safetensors: "), ("retinanet_resnet18_fpn", r"six\.safetensors: ")])
def test_weights_of_another_network(six_classes, name, message, monkeypatch):
  monkeypatch.setattr(init, "initialize", lambda model, rule, seed=0: None)
  with pytest.raises(UserError, match=message) as e: load_weights(str(six_classes[1]), retinanet.build(name, 6))
  assert "\n" not in str(e.value) and ("does not fit this network" in str(e.value))


def old_layout(tensors):
  """The names that torchvision gave a detector's tensors before its version 0.14."""
  old = {}
  for key, value in tensors.items():
    key = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
    old[re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", key)] = value
  return old


@pytest.fixture
def blank(monkeypatch):
  """Networks without values: only names and shapes matter, and drawing 10^8 numbers takes seconds."""
  monkeypatch.setattr(init, "initialize", lambda model, rule, seed=0: None)


def shapes_of(model): return {key: t.shape for key, t in get_state_dict(model).items()}


@pytest.mark.parametrize("backbone", resnet.BACKBONES)
def test_networks_are_recognised_by_their_tensors(backbone, blank):
  assert classifiers.recognise(shapes_of(resnet.build(backbone))) == backbone
  assert retinanet.recognise(shapes_of(resnet.build(backbone))) is None
  for name in (f"retinanet_{backbone}_fpn", f"retinanet_{backbone}_fpn_v2"):
    shapes = shapes_of(retinanet.build(name, 7))
    assert retinanet.recognise(shapes) == name and classifiers.recognise(shapes) is None
    assert retinanet.recognise({k: s for k, s in shapes.items() if "layer3.0" not in k}) is None


@pytest.mark.parametrize("backbone", ["resnet10_quarter", "shufflenet_v2_x0_5", "mobilenet_v2", "squeezenet1_1", "alexnet"])
def test_a_pyramid_of_any_width_tells_the_variants_apart(backbone, blank):
  last = classifiers.made(backbone, None).out_channels[-1]
  for width in {32, 64, 128, 256, last}:
    for variant in ("", "_v2"):
      name = f"retinanet_{backbone}_fpn{variant}"
      shapes = shapes_of(retinanet.build(name, 7, channels=width))
      assert name in retinanet.variants(shapes)
      # of networks without norms only a file's own word can tell
      if width != last or any(key.endswith("running_mean") for key in shapes): assert retinanet.recognise(shapes) == name, width


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("variant", ["", "_v2"])
def test_a_file_says_where_its_p6_comes_from(variant, norm, tmp_path):
  name = f"{NAME}{variant}"
  model = retinanet.build(name, 2, norm, channels=128)   # as wide as C5: tensors of v1 and v2 have the same shapes
  save_weights(tmp_path / "w.safetensors", get_state_dict(model), {"model": name, "norm": norm})
  detector, about, notes = open_detector(str(tmp_path / "w.safetensors"))
  assert detector.name == about["model"] == name and detector.network.backbone.fpn.p6_from == ("c5" if variant else "p5") and not notes
  tensors = get_state_dict(detector.network)
  assert all((tensors[key].numpy() == t.numpy()).all() for key, t in get_state_dict(model).items() if key in tensors)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["fcos_resnet10_quarter_fpn", "fcos_squeezenet1_1_fpn", "retinanet_shufflenet_v2_x0_5_fpn",
                                  "retinanet_mobilenet_v3_small_fpn_v2", "retinanet_densenet121_fpn"])
def test_a_detectors_own_file_opens_to_the_bit(name, suffix, tmp_path):
  made = build(name, 3, norm="batch" if "_v2" in name else "frozen", seed=7, channels=16)
  kept = {key: t.numpy() for key, t in get_state_dict(made.network).items()}
  opened, _, notes = open_detector(save(tmp_path / f"w{suffix}", kept))
  assert (opened.name, opened.num_classes, notes) == (name, 3, [])
  tensors = get_state_dict(opened.network)
  assert tensors.keys() == {key for key in kept if key in tensors or not key.endswith("num_batches_tracked")}
  for key, t in tensors.items(): np.testing.assert_array_equal(t.numpy(), kept[key], err_msg=key)


def test_an_old_pyramid_under_fcos(tmp_path):
  kept = {key: t.numpy() for key, t in get_state_dict(build("fcos_resnet10_quarter_fpn", 3, channels=16).network).items()}
  old = {re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", key): a for key, a in kept.items()}
  assert old.keys() != kept.keys()
  opened, _, _ = open_detector(save(tmp_path / "w.pth", old))
  for key, t in get_state_dict(opened.network).items(): np.testing.assert_array_equal(t.numpy(), kept[key], err_msg=key)


def test_old_names(blank):
  """`test_torch_weights.py` shows that these are torchvision's old names."""
  for name in ("retinanet_resnet18_fpn", "retinanet_resnet50_fpn"):
    keys = list(get_state_dict(retinanet.build(name, 3)))
    old = list(old_layout(dict.fromkeys(keys)))
    assert "backbone.fpn.inner_blocks.0.weight" in old and "head.regression_head.conv.6.bias" in old
    assert [retinanet.current_key(key) for key in old] == keys
  for key in get_state_dict(retinanet.build("retinanet_resnet50_fpn_v2", 3)): assert retinanet.current_key(key) == key


@pytest.mark.parametrize(("wrap", "note"), [
  (lambda t: t, None),
  (lambda t: {"module." + k: v for k, v in t.items()}, None),
  (lambda t: {"_orig_mod.module." + k: v for k, v in t.items()}, None),
  (old_layout, None),
  (lambda t: {k: v.astype(np.float64) for k, v in t.items()}, None)])
def test_ways_of_writing_the_same_weights(six_classes, tmp_path, wrap, note):
  tensors, _ = six_classes
  if any(v.dtype == np.float64 for v in wrap(tensors).values()): path = save(tmp_path / "x.pth", wrap(tensors))
  else: path = save(tmp_path / "x.safetensors", wrap(tensors))
  model = retinanet.build(NAME, 6, "batch", seed=0)
  assert load_weights(path, model) == []
  for key, t in get_state_dict(model).items(): np.testing.assert_array_equal(t.numpy(), tensors[key], err_msg=key)


def test_the_format_is_told_by_the_content(six_classes, tmp_path):
  tensors, path = six_classes
  save(tmp_path / "a.pth", tensors)
  for source, name in ((path, "safetensors_named.pth"), (tmp_path / "a.pth", "torch_named.pt")):
    (renamed := tmp_path / name).write_bytes(source.read_bytes())
    found, _, notes = read(renamed)
    assert notes == [] and found.keys() == tensors.keys()
    for key, values in found.items(): np.testing.assert_array_equal(values, tensors[key], err_msg=key)


def test_what_does_not_fit_is_named(six_classes, tmp_path):
  tensors, _ = six_classes
  model = retinanet.build(NAME, 6, "batch", seed=0)
  before = {k: t.numpy() for k, t in get_state_dict(model).items()}
  gone, odd = "backbone.fpn.layer_blocks.1.0.bias", "backbone.body.layer1.0.conv1.weight"
  broken = {k: v for k, v in tensors.items() if k != gone} | {"extra_head.weight": np.zeros(3, np.float32), odd: tensors[odd][:, :, :1]}
  with pytest.raises(UserError) as e: load_weights(save(tmp_path / "broken.safetensors", broken), model)
  message = str(e.value)
  assert "\n" not in message and "broken.safetensors" in message and f"1 missing ({gone})" in message and "extra_head.weight" in message
  assert f"{odd} [16, 16, 1, 3], here [16, 16, 3, 3]" in message
  for key, t in get_state_dict(model).items(): np.testing.assert_array_equal(t.numpy(), before[key], err_msg=key)
  many = {k: v for k, v in tensors.items() if not k.startswith("head.")} | {f"strange.{i}": np.zeros(1, np.float32) for i in range(30)}
  with pytest.raises(UserError, match=r"missing \(head\..*30 not known here \(strange\.0, .* and 20 more\)"):
    load_weights(save(tmp_path / "many.safetensors", many), model)


def test_a_classifier_starts_the_backbone(tmp_path):
  classifier, detector = resnet.build("resnet10_quarter", 5, seed=1), retinanet.build(NAME, 6, "frozen", seed=0)
  own = {k: t.numpy() for k, t in get_state_dict(detector).items()}
  values = {k: t.numpy() for k, t in get_state_dict(classifier).items()}
  notes = load_weights(save(tmp_path / "c.safetensors", values), detector)
  assert len(notes) == 1 and "is a classifier" in notes[0] and "fc.weight, fc.bias not used" in notes[0]
  for key, t in get_state_dict(detector).items():
    expected = values[key.removeprefix("backbone.body.")] if key.startswith("backbone.body.") else own[key]
    np.testing.assert_array_equal(t.numpy(), expected, err_msg=key)

  del values["layer2.0.bn1.running_mean"]
  with pytest.raises(UserError, match=r"1 missing \(backbone.body.layer2.0.bn1.running_mean\)"):
    load_weights(save(tmp_path / "d.safetensors", values), detector)
  other = resnet.build("resnet10_quarter", 3, seed=2)
  with pytest.raises(UserError, match="missing"): load_weights(str(tmp_path / "d.safetensors"), other)
  assert "fc.weight, fc.bias start anew" in load_weights(str(tmp_path / "c.safetensors"), other)[0]
  np.testing.assert_array_equal(other.layer4[0].conv2.weight.numpy(), classifier.layer4[0].conv2.weight.numpy())


@pytest.mark.parametrize(("tensors", "message"), [
  ({}, "no weights found"), ({"a": np.zeros(2, np.float32)}, r"missing .*1 not known here \(a\)")])
def test_files_that_are_no_network(tmp_path, tensors, message):
  with pytest.raises(UserError, match=message): load_weights(save(tmp_path / "x.pth", tensors), resnet.build("resnet10_quarter", 3))


def test_a_runs_folder(six_classes, tmp_path):
  _, path = six_classes
  run = tmp_path / "run"
  run.mkdir()
  with pytest.raises(UserError, match=r"neither best\.safetensors nor a checkpoint"): load_weights(str(run), retinanet.build(NAME, 6))
  (run / "best.safetensors").write_bytes(path.read_bytes())
  assert load_weights(str(run), retinanet.build(NAME, 6)) == []
  with pytest.raises(UserError, match="no such file or run"): load_weights(str(tmp_path / "nowhere"), retinanet.build(NAME, 6))


def test_open_a_detector_for_the_classes_of_some_data(six_classes, tmp_path):
  tensors, path = six_classes
  save_weights(named := tmp_path / "named.safetensors", get_state_dict(retinanet.build(NAME, 6, "batch", seed=3)),
               {"class_names": ["a", "b", "C", "d", "e", "f"], "size": [64, 48]})
  detector, about, notes = open_detector(str(named), class_names=["F", "x", "b"])
  model = detector.network
  assert (about["model"], about["num_classes"], about["size"], about["class_names"]) == (NAME, 3, [64, 48], ["F", "x", "b"])
  assert len(notes) == 1 and "never learnt x" in notes[0]
  for part, nothing in (("weight", 0), ("bias", -100)):
    logits = getattr(model.head.classification_head.cls_logits, part).numpy().reshape(9, 3, -1)
    known = tensors[f"head.classification_head.cls_logits.{part}"].reshape(9, 6, -1)
    np.testing.assert_array_equal(logits[:, 0], known[:, 5])
    np.testing.assert_array_equal(logits[:, 2], known[:, 1])
    assert (logits[:, 1] == nothing).all()
  assert open_detector(str(named))[1]["num_classes"] == 6
  with pytest.raises(UserError, match="and none of the data's x, y"): open_detector(str(named), class_names=["x", "y"])
  assert open_detector(str(path), class_names=["u", "v", "w", "x", "y", "z"])[2] == []      # it does not say which six it knows
  with pytest.raises(UserError, match="has 6 classes, does not say which, and the data has 2"): open_detector(str(path), class_names=["x", "y"])
  save(tmp_path / "c.pth", {k: t.numpy() for k, t in get_state_dict(resnet.build("resnet10_quarter", 5)).items()})
  with pytest.raises(UserError, match="is a classifier, resnet10_quarter; give the weights of a detector"): open_detector(str(tmp_path / "c.pth"))


def test_another_constant_beside_the_variance(six_classes, monkeypatch):
  """w / sqrt(v) of a file whose network adds nothing equals w / sqrt(v' + 1e-5) of the network here."""
  tensors, path = six_classes
  from tinydet.weights import weights
  monkeypatch.setattr(weights, "find", lambda name, architecture: (path, {"eps": 0.0}))
  _, shifted, _, _ = open_weights("any", "any")
  for key, values in shifted.items():
    if key.endswith("running_var"): np.testing.assert_allclose(values.astype(np.float64) + 1e-5, tensors[key].astype(np.float64), rtol=1e-7)
    else: np.testing.assert_array_equal(values, tensors[key])


def program(name, *flags):
  return subprocess.run([sys.executable, str(ROOT / "examples" / name), *map(str, flags)], capture_output=True, text=True, check=False, timeout=300,
                        stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export(tmp_path, suffix):
  done = program("export_weights.py", "--weights", "shapes", "--out", tmp_path / f"out{suffix}")
  assert done.returncode == 0, done.stderr
  assert "retinanet_resnet10_quarter_fpn" in done.stdout
  exported, metadata, _ = read(tmp_path / f"out{suffix}")
  shipped, about, _ = read(ROOT / "extra" / "models" / "shapes.safetensors")
  assert (metadata.get("class_names") == about["class_names"]) if suffix == ".safetensors" else metadata == {}
  model = retinanet.build(NAME, 6, "batch")
  assert exported.keys() == get_state_dict(model).keys()
  assert fit(model, exported, tmp_path) == []
  for key, values in shipped.items(): np.testing.assert_array_equal(exported[key], values, err_msg=key)
  for flags in (["--out", tmp_path / "x.onnx"], ["--weights", tmp_path / "none.pth"]):
    done = program("export_weights.py", *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stdout == ""
  assert not (tmp_path / "x.onnx").exists()


@pytest.mark.by_hand
def test_evaluate_and_score_a_file_again(tmp_path):
  found, data = tmp_path / "found.json", ("--data", "shapes:1", "--images", 8, "--workers", 0)
  scored = program("evaluate.py", *data, "--weights", "shapes", "--bs", 4, "--size", 64, "--to-json", found)
  assert scored.returncode == 0, scored.stderr
  results = json.loads(found.read_text())
  assert results and results[0].keys() == {"image_id", "category_id", "bbox", "score"} and f"{len(results)} detections" in scored.stdout
  again = program("evaluate.py", *data, "--from-json", found)
  assert again.returncode == 0, again.stderr
  def table(text): return [line for line in text.splitlines() if "Average" in line or re.match(r"(circle|ring|star) ", line)]
  assert table(again.stdout) == table(scored.stdout) and len(table(again.stdout)) == 15

  bad = {"cut.json": found.read_text()[:-9], "object.json": "{}", "score.json": json.dumps([results[0] | {"score": None}]),
         "box.json": json.dumps([results[0] | {"bbox": [1, 2, 3]}]), "image.json": json.dumps([results[0] | {"image_id": 999}]),
         "category.json": json.dumps([results[0] | {"category_id": 7}])}
  for name, text in bad.items():
    (tmp_path / name).write_text(text)
    done = program("evaluate.py", *data, "--from-json", tmp_path / name)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and name in done.stderr, (name, done.stderr)


@pytest.mark.parametrize(("name", "backbone", "file"), by_hand([
  ("imagenet", "resnet18", "resnet18-f37072fd.pth"), ("imagenet_v2", "resnet50", "resnet50-11ad3fa6.pth"),
  ("coco", "resnet50", "retinanet_resnet50_fpn_coco-eeacb38b.pth"), ("mlperf", "resnext50_32x4d", "retinanet_model_10.zip")], "imagenet_v2", "coco"))
def test_published_weights_without_a_network(name, backbone, file, tmp_path, monkeypatch):
  monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")   # nobody listens there
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.delenv("TINYDET_MIRROR", raising=False)
  done = program("train_retinanet.py", "--weights", name, "--backbone", backbone, "--size", 64, "--out", tmp_path / "runs", "--workers", 0)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
  assert file in done.stderr and "https://" in done.stderr and str(tmp_path / "cache") in done.stderr and "TINYDET_MIRROR" in done.stderr
  assert not (tmp_path / "runs").exists() and not list(tmp_path.rglob("*.pth*")) and not list(tmp_path.rglob("*.zip*"))
