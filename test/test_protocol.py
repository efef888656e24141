"""The house has no favourite: a detector of twenty lines, known to no room, is trained, resumed, scored, explained and detected with."""
import json, types
from typing import ClassVar
import numpy as np, pytest
from PIL import Image
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet import detect, detectors
from tinydet.config import parse
from tinydet.datasets.shapes import Shapes
from tinydet.detection import postprocess
from tinydet.detectors.detector import Detector, Preprocessing
from tinydet.errors import UserError
from tinydet.nn import init
from tinydet.nn.layers import Conv2d
from tinydet.runtime.mpi import ALONE
from tinydet.training.detection import DetectionConfig, open_splits, start_from, train_detector
from tinydet.training.run import Run
from tinydet.weights import checkpoint


class ToyNetwork:
  """Two strided convolutions, then for each cell of 8 pixels a logit a class and the middle of a square box."""
  def __init__(self, num_classes):
    self.stem, self.out = [Conv2d(3, 8, 3, 4, 1), Conv2d(8, 16, 3, 2, 1)], Conv2d(16, num_classes + 2, 1)
    self.class_rows = {"out.weight": (1, 0), "out.bias": (1, 0)}


class Toy(Detector):
  name, preprocessing, multiple, selection = "toy", Preprocessing((0.5,) * 3, (0.25,) * 3, True, True, (9, 9, 9)), 8, {"nms_threshold": 0.9}
  stages: ClassVar = {"output": ("out.",), "stem": ("stem.",)}

  def __init__(self, num_classes):
    self.network, self.num_classes = ToyNetwork(num_classes), num_classes
    init.initialize(self.network, self.init_rule)

  def init_rule(self, key, shape): return init.kaiming_uniform if key.endswith("weight") else init.constant(0)
  def levels(self, layer="backbone"): return {"C3": 8}
  def features(self, x, layer="backbone"): return [x.sequential([self.network.stem[0], Tensor.relu, self.network.stem[1]]).relu().dropout(0.1)]
  def head(self, features, layer="backbone"): return (self.network.out(features[0]).flatten(2).transpose(1, 2),)

  def candidates(self, outputs, canvas):
    cell = Tensor.arange(outputs[0].shape[1])
    centre = Tensor.stack(cell % (canvas[1] // 8), cell // (canvas[1] // 8), dim=-1) * 8 + 4 + outputs[0][..., -2:] * 8
    return outputs[0][..., :-2], (centre - 12).cat(centre + 12, dim=-1)

  def losses(self, outputs, boxes, labels, canvas):
    logits, found = self.candidates(outputs, canvas)
    middle, known = ((boxes[..., :2] + boxes[..., 2:]) / 2).unsqueeze(2), (labels >= 0).unsqueeze(2)   # [B,M,1,2] and [B,M,1]
    near = known & ((middle - ((found[..., :2] + found[..., 2:]) / 2).detach().unsqueeze(1)).abs().max(-1) < 6)
    target = (near.unsqueeze(-1) & (labels.reshape(*labels.shape, 1, 1) == Tensor.arange(self.num_classes))).any(1)
    return {"loss": (target.where(-logits, logits).softplus() * target.where(5, 1)).mean()}


def build(name, num_classes, **options): return Toy(num_classes)
def recognise(shapes): return ("toy", shapes["out.bias"][0] - 2, {}) if "stem.0.weight" in shapes and "out.bias" in shapes else None


TINY = ("--data shapes:1 --size 64 --train-images 64 --bs 8 --epochs 2 --workers 0 --wandb disabled --run-name toy --lr 0.02 --log-every 4 "
        "--pictures 1").split()


def run(folder, *flags):
  """A trainer for the toy, as a program's main has it."""
  config = parse(DetectionConfig, {}, [*TINY, "--out", str(folder), *flags], {})
  run = Run(config, ALONE, "toy", 0.0)
  try:
    data = open_splits(config, run.ranks)
    toy = detectors.build("toy", len(data[0].class_names))
    train_detector(run, toy, toy.fit(config.size), data, {}, start_from(config, toy, data[0].class_names, run))
  finally: run.close()
  return folder / "toy"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
  """The toy among the families, and a run of it."""
  detectors.FAMILIES.append(family := types.SimpleNamespace(NAMES=("toy",), build=build, recognise=recognise))
  yield run(tmp_path_factory.mktemp("protocol"))
  detectors.FAMILIES.remove(family)


def test_it_learns_and_its_file_says_what_it_is(family):
  lines = [json.loads(line) for line in (family / "metrics.jsonl").read_text().splitlines()]
  losses = [line["train/loss"] for line in lines if "train/loss" in line]
  assert losses[-1] < 0.7 * losses[0] and {"report.html", "best.safetensors"} <= {p.name for p in family.iterdir()}
  _, about = checkpoint.load(family / "best.safetensors")
  assert (about["model"], about["num_classes"], about["size"]) == ("toy", 6, [64, 64])
  assert about["input"] == {"mean": [0.5] * 3, "std": [0.25] * 3, "letterbox": True, "centred": True, "fill": [9] * 3}


@pytest.mark.by_hand
def test_a_resumed_run_is_the_same_to_the_bit(family, tmp_path):
  run(tmp_path, "--save-steps", "5", "--keep", "9")
  for part in (tmp_path / "toy").glob("checkpoint-[18]*"): part.unlink()   # those of steps 8, 10, 15 and 16: it goes on from 5
  run(tmp_path, "--resume", "auto")
  whole, resumed = (checkpoint.load(folder / "checkpoint-16.safetensors")[0] for folder in (family, tmp_path / "toy"))
  assert whole.keys() == resumed.keys()
  for key, values in whole.items(): np.testing.assert_array_equal(values, resumed[key], err_msg=key)


def test_it_detects_in_one_call_and_boxes_come_back_through_the_letterbox(family):
  shapes = Shapes("val", 1, size=64, count=1)
  wide = np.full((64, 128, 3), 128, np.uint8)
  wide[:, 40:104] = shapes[0].image
  toy = detectors.open_detector(str(family))[0]
  for picture, pad in ((wide, (0, 16)), (np.ascontiguousarray(wide.transpose(1, 0, 2)), (16, 0))):
    found, = detect(picture, weights=family, score_threshold=0.0, max_detections=20)
    canvas = np.full((64, 64, 3), 9, np.uint8)
    canvas[pad[1]:64 - pad[1], pad[0]:64 - pad[0]] = toy.fit((64, 64)).place(picture).image[pad[1]:64 - pad[1], pad[0]:64 - pad[0]]
    every = toy.predict(canvas[None]).boxes[0]
    expected = ((every - np.float32(pad * 2)) * 2).clip(0, np.float32([*picture.shape[1::-1]] * 2))   # the canvas has it at half its size
    assert len(found.scores) == 20 and found.names[0] in shapes.class_names
    assert np.abs(found.boxes[:, None] - expected).max(-1).min(1).max() < 1e-3


def test_all_candidates_come_before_any_selection(family):
  toy = detectors.open_detector(str(family))[0]
  images = np.stack([Shapes("val", 1, size=64, count=2)[i].image for i in range(2)])
  found = toy.predict(images)
  assert found.boxes.shape == (2, 64, 4) and found.scores.shape == (2, 64, 6) and found.boxes.dtype == found.scores.dtype == np.float32
  assert (found.scores > 0).all() and (found.scores < 1).all() and (found.scores[0] != found.scores[1]).any()
  with pytest.raises(UserError, match="toy needs sides that are multiples of 8"): toy.predict(images[:, :60])
  with pytest.raises(TypeError, match=r"u8 \[B,H,W,3\]"): toy.predict(images.astype(np.float32))


@pytest.fixture
def program(request):
  import importlib.util
  from pathlib import Path
  spec = importlib.util.spec_from_file_location(f"program_{request.param}", Path(__file__).parents[1] / "examples" / f"{request.param}.py")
  spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
  return module


@pytest.mark.parametrize("program", ["evaluate"], indirect=True)
def test_its_score_is_the_runs_own(family, program, capsys):
  program.main(parse(program.Config, {}, ["--weights", str(family), "--data", "shapes:1", "--workers", "0"], {}))
  out = capsys.readouterr().out
  assert "toy from" in out
  best = checkpoint.load(family / "best.safetensors")[1]["mAP"]
  assert f"area=   all | maxDets=100 ] = {best:.3f}" in out


@pytest.mark.parametrize("program", ["explain"], indirect=True)
def test_it_is_explained_and_checked(family, program, tmp_path):
  picture = np.full((48, 96, 3), 128, np.uint8)   # not of the canvas's proportions
  picture[:, 20:68] = Shapes("val", 1, size=48, count=1)[0].image
  Image.fromarray(picture).save(tmp_path / "a.png")
  config = parse(program.Config, {}, ["--weights", str(family), "--threshold", "0.0", "--top", "2", "--check", "--out", str(tmp_path / "out")], {})
  config.source = (str(tmp_path / "a.png"),)
  before = {k: t.numpy() for k, t in get_state_dict(detectors.open_detector(str(family))[0].network).items()}
  program.main(config)
  found = json.loads((tmp_path / "out" / "explanations.json").read_text())
  assert len(found["pictures"][0]["detections"]) == 2 and [s["stage"] for s in found["mean"]["randomised"]] == ["output", "stem"]
  assert set(found["pictures"][0]["detections"][0]["shares"]) == {"C3"} and (tmp_path / "out" / "a-1.jpg").is_file()
  for key, t in get_state_dict(detectors.open_detector(str(family))[0].network).items(): np.testing.assert_array_equal(t.numpy(), before[key])


def test_names_that_no_family_knows():
  with pytest.raises(ValueError, match=r"'retinanet_resnet5_fpn' is no detector; did you mean .*retinanet_resnet50_fpn"):
    detectors.build("retinanet_resnet5_fpn", 3)


def test_pictures_are_prepared_as_the_weights_say(family, tmp_path):
  tensors, about = checkpoint.load(family / "best.safetensors")
  checkpoint.save(tmp_path / "other.safetensors", tensors, about | {"input": about["input"] | {"mean": [0.1] * 3, "fill": [200] * 3}})
  usual, other = (detectors.open_detector(str(path))[0] for path in (family, tmp_path / "other.safetensors"))
  assert (other.preprocessing.mean, other.fit((64, 64)).fill) == ((0.1,) * 3, (200,) * 3)
  images = np.full((1, 64, 64, 3), 128, np.uint8)
  assert abs(usual.prepare(Tensor(images)).numpy() - (128 / 255 - 0.5) / 0.25).max() < 1e-6
  assert abs(other.prepare(Tensor(images)).numpy() - (128 / 255 - 0.1) / 0.25).max() < 1e-6


def test_what_outputs_mean_is_traced_once(monkeypatch):
  """And anew where other classes are asked for; each batch gets its own boxes."""
  detector, traced, rng = detectors.build("yolov8t", 3), [], np.random.default_rng(0)
  candidates = detector.candidates
  monkeypatch.setattr(detector, "candidates", lambda *given: traced.append(1) or candidates(*given))
  batches = [tuple(Tensor(rng.standard_normal((1, channels, 84)).astype(np.float32)).realize() for channels in (64, 3)) for _ in range(2)]
  def look(outputs): return detector.detect(outputs, (64, 64), np.array([[64, 64]]), score_threshold=0.5)
  found = [look(outputs) for outputs in batches]
  assert len(traced) == 1
  for outputs, one in zip(batches, found, strict=True):
    scores, boxes = candidates(outputs, (64, 64))
    plain = postprocess.select(scores, boxes, None, [84], np.array([[64, 64]]), **detector.options({"sigmoid": False, "score_threshold": 0.5}))
    for part, value in vars(plain).items(): np.testing.assert_allclose(getattr(one, part), value, rtol=1e-6, atol=1e-5, err_msg=part)
  assert (found[0].scores[0, :5] != found[1].scores[0, :5]).all()
  detector.choose([2, None])
  other = look(batches[0])
  assert len(traced) == 2 and set(other.labels[0, :other.counts[0]]) == {0}
