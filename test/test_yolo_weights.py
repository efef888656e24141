"""Files of YOLO weights: in the formats of their authors, written by the tests (official_files), and what is wrong with a file said by name."""
import hashlib, re, struct, time, tracemalloc
from typing import NamedTuple
import numpy as np, pytest
from tinygrad.nn.state import get_state_dict
from tinydet.errors import UserError
from tinydet.models import darknet, yolo
from tinydet.nn import init
from tinydet import detectors
from tinydet.weights import checkpoint, darknet_file, torch_file, weights, yolo_weights
from official_files import Models, Tensor, stand_in, write
from yolo_golden import GOLDEN, darknet_stream, fill
from by_hand import by_hand

NAMES = ["person", "dog", "car", "cat", "bus", "tree"]
AUTHORS = {"yolov8n": ("ultralytics.nn.tasks.DetectionModel", "ultralytics.nn.modules.block.C2f"),
           "yolov10n": ("ultralytics.nn.tasks.YOLOv10DetectionModel", "ultralytics.nn.modules.block.SCDown"),
           "yolov5n-classic": ("models.yolo.DetectionModel", "models.common.C3"),
           "yolov6n": ("yolov6.models.yolo.Model", "yolov6.layers.common.RepVGGBlock")}


@pytest.fixture(autouse=True)
def blank(monkeypatch):
  """Networks without values: they come from the golden rule or from files."""
  monkeypatch.setattr(init, "initialize", lambda network, rule, seed=0: None)


def state(name, num_classes=6):
  """The network's state dict with golden values, and zeros where the rule leaves what is built."""
  network = yolo.build(name, num_classes)
  for key, tensor in get_state_dict(network).items():
    if key.endswith(("num_batches_tracked", "anchors", "anchor_grid", "proj", "proj_conv.weight", "dfl.conv.weight")):
      init.set_values(tensor, np.zeros(tensor.shape))
  return {key: t.numpy() for key, t in get_state_dict(fill(network)).items()}


class Opened(NamedTuple):
  """What `open_weights` gives."""
  path: object
  tensors: dict
  about: dict
  notes: list


def loaded(path, name, num_classes=6):
  """The state dict of a network that took the file's weights."""
  opened = Opened(*weights.open_weights(str(path), name))
  assert detectors.recognise({key: value.shape for key, value in opened.tensors.items()})[:2] == (name, num_classes)
  network = yolo.build(name, num_classes)
  assert weights.fit(network, opened.tensors, path) == []
  return {key: t.numpy() for key, t in get_state_dict(network).items() if not key.endswith("num_batches_tracked")}, opened


@pytest.mark.parametrize("name", by_hand(AUTHORS, "yolov10n", "yolov5n-classic"))
def test_a_whole_model_as_its_authors_pickle_it(name, tmp_path):
  values = state(name)
  Models(*AUTHORS[name]).write(path := tmp_path / "x.pt", values, NAMES)
  found, opened = loaded(path, name)
  for key, value in found.items(): np.testing.assert_array_equal(value, values[key].astype(np.float16).astype(np.float32), err_msg=key)
  assert opened.about == {"from": AUTHORS[name][0], "class_names": NAMES, "stride": [8.0, 16.0, 32.0]} and not opened.notes
  Models(*AUTHORS[name]).write(path, values, NAMES, half=False)
  for key, value in loaded(path, name)[0].items(): np.testing.assert_array_equal(value, values[key], err_msg=key)


def test_other_wrappers_and_averages(tmp_path):
  values = state("yolov8n")
  plain = {key: Tensor(value) for key, value in values.items()}
  for tree in (plain, {"model": plain, "amp": {}, "start_epoch": 3}, {"model_state_dict": {f"module.{k}": v for k, v in plain.items()}}):
    assert loaded(write(tmp_path / "x.pth", tree, []), "yolov8n")[0].keys() <= values.keys()
  made = Models(*AUTHORS["yolov8n"])
  tree = made.checkpoint(values, NAMES)
  tree["ema"] = made.module({key: np.ones_like(value) for key, value in values.items()})
  found, opened = loaded(write(tmp_path / "x.pt", tree, made.classes), "yolov8n")
  assert all((value == 1).all() for value in found.values()) and opened.notes == ["x.pt: takes its averaged weights (ema)"]
  checkpoint.save(tmp_path / "x.safetensors", values)
  np.testing.assert_array_equal(loaded(tmp_path / "x.safetensors", "yolov8n")[0]["model.0.conv.weight"], values["model.0.conv.weight"])


def test_reading_takes_little_memory_and_time(tmp_path):
  values = {key: np.zeros(t.shape, np.float32) for key, t in get_state_dict(yolo.build("yolov8m")).items()}
  size = Models(*AUTHORS["yolov8n"]).write(path := tmp_path / "x.pt", values, NAMES).stat().st_size
  begin = time.monotonic()
  tracemalloc.start()
  tensors, _, _ = weights.read(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert tensors.keys() == {key for key in values if not key.endswith("num_batches_tracked")}
  assert size > 50e6 and peak < 1.5 * size and time.monotonic() - begin < 3 * size / 100e6 + 2


def test_nothing_in_a_model_is_run_and_other_code_is_refused(tmp_path):
  made = Models(*AUTHORS["yolov8n"])
  def refusal(value, classes):
    with pytest.raises(UserError) as error: torch_file.load(write(tmp_path / "x.pt", value, classes))
    return str(error.value)
  class Evil:
    def __reduce__(self): return eval, (f"open({str(tmp_path / 'mark')!r}, 'w')",)
  model = made.module({"conv.weight": np.ones((2, 2), np.float32)}, made.root, evil=Evil())
  assert "refers to __builtin__.eval, which a checkpoint has no use for" in refusal({"model": model}, made.classes)
  assert not (tmp_path / "mark").exists()
  alone = stand_in("ultralytics.nn.tasks.DetectionModel")
  assert "refers to ultralytics.nn.tasks.DetectionModel, which is code" in refusal({"model": alone()}, [alone])
  inner = made.module({"weight": np.ones(3, np.float32)})
  inner._modules["again"] = inner
  assert "inside themselves" in refusal(inner, made.classes)
  odd = made.leaf(**made.state({"weight": 3}, {}, {}))
  assert "where a Tensor belongs" in refusal(odd, made.classes)
  assert "where a module belongs" in refusal(made.leaf(**made.state({}, {}, {"a": {}})), made.classes)


def test_modules_that_many_share_are_bounded(tmp_path):
  made = Models(*AUTHORS["yolov8n"])
  inner = made.module({"weight": np.ones(3, np.float32)})
  for _ in range(40): inner = made.leaf(**made.state({}, {}, {"a": inner, "b": inner}))
  with pytest.raises(UserError, match="more small objects"): torch_file.load(write(tmp_path / "x.pt", inner, made.classes))


def test_what_does_not_fit_is_said_by_name(tmp_path):
  values = {key: value for key, value in state("yolov8n").items() if not key.endswith("num_batches_tracked")}
  network, path = yolo.build("yolov8n", 6), tmp_path / "x.pt"
  def refusal(changed, pattern):
    with pytest.raises(UserError) as error: weights.fit(network, changed, path)
    assert re.search(pattern, str(error.value)) and "\n" not in str(error.value) and str(path) in str(error.value), str(error.value)
  less = {key: value for key, value in values.items() if key != "model.4.cv1.bn.bias"}
  refusal(less, r"is a yolov8n and does not fit this network: 1 missing \(model\.4\.cv1\.bn\.bias\)$")
  refusal(values | {"model.99.weight": np.ones(1)}, r"1 not known here \(model\.99\.weight\)")
  refusal(values | {"model.9.cv2.conv.weight": np.ones((2, 2, 1, 1))}, r"model\.9\.cv2\.conv\.weight \[2, 2, 1, 1\], here \[256, 512, 1, 1\]")
  other = yolo.build("yolov8n", 80)
  notes = weights.fit(other, values, path)
  assert len(notes) == 2 and "knows other classes" in notes[0] and "class branches are of another width there" in notes[1]
  np.testing.assert_array_equal(get_state_dict(other)["model.22.cv2.0.0.conv.weight"].numpy(), values["model.22.cv2.0.0.conv.weight"])
  with pytest.raises(UserError, match="is a yolov8n and does not fit this network"): weights.fit(yolo.build("yolov8s", 6), values, path)
  torch_file.save(path, {"a": np.ones(3)})
  with pytest.raises(UserError, match="is no detector of this project"): detectors.open_detector(str(path))


def test_the_bias_before_a_norm_is_folded():
  values = state("yolo12n")
  keys = [key for key in values if key.endswith(".pe.bn.running_mean")]
  biases = {key.replace("bn.running_mean", "conv.bias"): np.arange(len(values[key]), dtype=np.float32) for key in keys}
  tensors, _ = yolo_weights.canonical(values | biases)
  assert len(keys) == 8 and tensors.keys() == {key for key in values if not key.endswith("num_batches_tracked")}
  for key in keys: np.testing.assert_allclose(tensors[key], values[key] - np.arange(len(values[key])), atol=1e-5)


def test_implicit_knowledge_becomes_part_of_the_head():
  values, rng = state("yolov7"), np.random.default_rng(0)
  implicit = {}
  for level, channels in enumerate((256, 512, 1024)):
    implicit |= {f"model.105.ia.{level}.implicit": rng.standard_normal((1, channels, 1, 1)).astype(np.float32),
                 f"model.105.im.{level}.implicit": rng.standard_normal((1, 33, 1, 1)).astype(np.float32)}
  tensors, notes = yolo_weights.canonical(values | implicit)
  assert notes == ["is a training file: 6 implicit tensors became part of the head"]
  x = rng.standard_normal(256)
  weight, bias = values["model.105.m.0.weight"].reshape(33, 256), values["model.105.m.0.bias"]
  expected = (weight @ (x + implicit["model.105.ia.0.implicit"].reshape(-1)) + bias) * implicit["model.105.im.0.implicit"].reshape(-1)
  np.testing.assert_allclose(tensors["model.105.m.0.weight"].reshape(33, 256) @ x + tensors["model.105.m.0.bias"], expected, rtol=1e-4, atol=1e-4)


def test_the_mit_files_of_yolov9(tmp_path):
  """Their names, their groups in the box branch and their auxiliary layers."""
  values, given = {key: value for key, value in state("yolov9s").items() if not key.endswith("num_batches_tracked")}, {}
  for key, value in values.items():
    if re.search(r"22\.cv2\.\d\.[12](\.conv)?\.weight", key):   # four groups: what is outside of them is zero
      blocks = np.kron(np.eye(4), np.ones((value.shape[0] // 4, value.shape[1] // 4)))[:, :, None, None]
      values[key] = value = (value * blocks).astype(np.float32)
      value = np.concatenate([part[:, g * part.shape[1] // 4:(g + 1) * part.shape[1] // 4] for g, part in enumerate(np.split(value, 4))])
    key = key.removeprefix("model.")
    if "dfl" in key: key = "22.heads.0.anc2vec.anc2vec.weight"
    key = re.sub(r"^22\.cv2\.(\d)\.(\d)", r"22.heads.\1.anchor_conv.\2", re.sub(r"^22\.cv3\.(\d)\.(\d)", r"22.heads.\1.class_conv.\2", key))
    key = re.sub(r"\.m\.(\d+)\.cv2\.", r".bottleneck.\1.conv2.", re.sub(r"\.m\.(\d+)\.cv1\.", r".bottleneck.\1.conv1.", key))
    given[re.sub(r"^(3|5|7|16|19)\.conv1\.", r"\1.conv.", re.sub(r"\bcv(\d)\.", r"conv\1.", key))] = value
  assert {"0.conv.weight", "4.conv2.0.bottleneck.1.conv1.conv2.bn.bias", "3.conv.conv.weight", "22.heads.2.anchor_conv.2.bias"} <= given.keys()
  torch_file.save(path := tmp_path / "v9-s.pt", given | {"24.heads.0.anchor_conv.0.conv.weight": np.ones((4, 4, 3, 3), np.float32)})
  found, _ = loaded(path, "yolov9s")
  for key, value in found.items():
    if "dfl" not in key: np.testing.assert_array_equal(value, values[key], err_msg=key)


SIZES = {"yolov3": 248_007_048, "yolov3-spp": 252_209_544, "yolov3-tiny": 35_434_956, "yolov4": 257_717_640, "yolov4-tiny": 24_251_276}


@pytest.mark.parametrize("name", by_hand(SIZES, "yolov3", "yolov3-spp", "yolov4"))
def test_the_released_darknet_files_are_recognised_by_their_size(name, tmp_path):
  size, path = SIZES[name], tmp_path / "x.weights"
  with open(path, "wb") as f:
    f.write(struct.pack("<3iq", 0, 2, 5, 32013312))
    f.truncate(size)
  assert darknet_file.load(path)[:2] == (name, 80)
  with open(path, "wb") as f:   # version 0.1 counted the pictures in four bytes
    f.write(struct.pack("<3ii", 0, 1, 0, 32013312))
    f.truncate(size - 4)
  assert darknet_file.load(path)[:2] == (name, 80)


@pytest.mark.parametrize("name", ["yolov3-tiny", "yolov4-tiny"])
def test_darknet_files_hold_what_the_golden_files_say(name, tmp_path):
  network, golden = yolo.build(name), np.load(GOLDEN / f"{name}.npz")
  content = struct.pack("<3iq", 0, 2, 5, 0) + darknet_stream(network)[0].tobytes()
  assert hashlib.sha256(content).hexdigest() == str(golden["weights_sha256"])
  (path := tmp_path / "x.weights").write_bytes(content)
  found, _ = loaded(path, name, 80)
  for key, tensor in darknet.tensors_in_order(fill(network)): np.testing.assert_array_equal(found[key], tensor.numpy(), err_msg=key)
  darknet_file.save(tmp_path / "y.weights", name, found)
  assert (tmp_path / "y.weights").read_bytes() == content


def test_darknet_files_of_other_classes_and_of_nothing_here(tmp_path):
  network = yolo.build("yolov4-tiny", 6)
  values = {key: np.zeros(t.shape, np.float32) for key, t in darknet.tensors_in_order(network)}
  darknet_file.save(path := tmp_path / "x.weights", "yolov4-tiny", values)
  assert darknet_file.load(path)[:2] == ("yolov4-tiny", 6)
  for change, name, pattern in ((lambda c: c, "yolov3", "is of yolov4-tiny, not of yolov3"), (lambda c: c[:-4], None, "no network here"),
                                (lambda c: c[:7], None, "cut short"), (lambda c: b"\xff" * 20 + c, None, "claims version"),
                                (lambda c: c[:-1], None, "no network here")):
    (tmp_path / "y.weights").write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=pattern): darknet_file.load(tmp_path / "y.weights", name)
  with pytest.raises(UserError, match=r"none\.weights"): darknet_file.load(tmp_path / "none.weights")


SMALL = ("yolov3-tiny", "yolov4-tiny", "yolov5n", "yolov5n-classic", "yolov6n", "yolov8t", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo26n")


@pytest.mark.parametrize("names", [SMALL, pytest.param([name for name in yolo.NAMES if name not in SMALL], marks=pytest.mark.by_hand)])
def test_every_network_is_recognised_by_its_tensors(names):
  for name in names:
    network = yolo.made(name, 7)
    shapes = {key: t.shape for key, t in get_state_dict(network).items()}
    assert yolo.recognise(shapes) == (name, 7), name
  assert yolo.recognise({}) is None and yolo.recognise({"model.0.conv.weight": (16, 3, 3, 3), "model.22.cv3.0.2.bias": (7,)}) is None
