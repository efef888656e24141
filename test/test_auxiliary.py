"""YOLOv9's layers for training alone: what they compute, that they teach, and that they are gone where nothing is learnt."""
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet import detectors
from tinydet.errors import UserError
from tinydet.models import yolo, yolo_blocks
from tinydet.nn.init import set_values
from tinydet.training.resume import Checkpoints
from tinydet.weights import checkpoint, weights
from by_hand import by_hand

CANVAS = (64, 64)


def test_split_and_fuse():
  """Against numpy: of each split's groups the same one, each pixel repeated, and the last map, added up."""
  rng = np.random.default_rng(0)
  maps = [rng.standard_normal((2, 6, side, side)).astype(np.float32) for side in (8, 4, 2)]
  splits, expected = [], rng.standard_normal((2, 5, 8, 8)).astype(np.float32)
  fused = [Tensor(expected)]
  for x, widths in zip(maps, ((3, 5), (2, 5, 4), (7, 5))):
    splits.append(split := yolo_blocks.Split(6, widths))
    weight, bias = rng.standard_normal((sum(widths), 6)).astype(np.float32), rng.standard_normal(sum(widths)).astype(np.float32)
    set_values(split.conv.weight, weight[:, :, None, None])
    set_values(split.conv.bias, bias)
    group = (np.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None])[:, widths[0]:widths[0] + 5]
    expected = expected + np.kron(group, np.ones((1, 1, 8 // x.shape[2], 8 // x.shape[2])))
    fused.insert(-1, split(Tensor(x)))
  np.testing.assert_allclose(yolo_blocks.Fuse(1)(fused).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "millions"), by_hand(
  [("yolov9t", 3.09), ("yolov9s", 9.99), ("yolov9m", 33.06), ("yolov9c", 51.62)], "yolov9s", "yolov9m"))
def test_each_gives_another_head_of_the_same_shapes(name, millions):
  network = yolo.made(name, 80, auxiliary=True)
  with Context(TRAINING=1): outputs = network.with_auxiliary(Tensor.empty(1, 3, *CANVAS))   # only shapes
  assert [t.shape for t in outputs] == [(1, 64, 84), (1, 80, 84)] * 2
  assert sum(np.prod(t.shape) for t in get_state_dict(network).values() if t.is_param) / 1e6 == pytest.approx(millions, abs=0.005)
  assert set(get_state_dict(yolo.made(name, 80))) == {key for key in get_state_dict(network) if not key.startswith("auxiliary.")}


@pytest.fixture(scope="module")
def detector(): return detectors.build("yolov9t", 3, auxiliary=True)


TRUTH = (Tensor([[[8.0, 8, 40, 40], [30, 20, 60, 62]]]), Tensor([[0, 2]]), CANVAS)


def test_its_head_counts_a_quarter(detector):
  rng = np.random.default_rng(2)
  outputs = tuple(Tensor(rng.standard_normal((1, channels, 84)).astype(np.float32)) for channels in (64, 3, 64, 3))
  whole, own, beside = (detector.losses(part, *TRUTH)["loss"].item() for part in (outputs, outputs[:2], outputs[2:]))
  assert beside != pytest.approx(own, rel=1e-3) and whole == pytest.approx(own + beside / 4, rel=1e-5)


def test_where_nothing_is_learnt_it_is_not_computed(detector):
  images, shapes = Tensor.empty(1, *CANVAS, 3, dtype="uint8"), [(1, 64, 84), (1, 3, 84)]
  with Context(TRAINING=0): assert [t.shape for t in detector(images)] == shapes
  with Context(TRAINING=1): assert [t.shape for t in detector(images)] == shapes * 2


@pytest.mark.by_hand
def test_both_heads_teach(detector):
  """Minutes of compiling: `train_yolo.py --model yolov9t --auxiliary` does the same."""
  images, tensors = Tensor(np.random.default_rng(1).integers(0, 256, (1, *CANVAS, 3), dtype=np.uint8)), get_state_dict(detector.network)
  with Context(TRAINING=1):
    keys = ("model.4.cv4.conv.weight", "model.22.cv3.0.2.weight", "auxiliary.7.cv3.0.2.weight", "auxiliary.0.cv1.conv.weight")
    gradients = detector.losses(detector(images), *TRUTH)["loss"].gradient(*(tensors[key] for key in keys))
    Tensor.realize(*gradients)
  assert all(abs(g.numpy()).max() > 0 for g in gradients)


def test_the_best_weights_are_without_it_and_start_it_anew(tmp_path):
  detector = detectors.build("yolov9t", 3, auxiliary=True)   # one whose statistics wait for no batch
  network = detector.network
  arrays = {key: t.numpy() for key, t in get_state_dict(network).items()}
  keeper = SimpleNamespace(ranks=SimpleNamespace(rank=0), folder=tmp_path, about=detector.about(), weights=lambda: arrays)
  Checkpoints.keep_best(keeper, {"epoch": 1})
  kept, about = checkpoint.load(tmp_path / "best.safetensors")
  assert set(kept) == {key for key in arrays if not key.startswith("auxiliary.")} and about["model"] == "yolov9t"
  assert weights.fit(network, kept, Path("best.safetensors")) == ["best.safetensors: has no auxiliary layers, which start anew"]
  whole, = weights.fit(detectors.build("yolov9t", 3).network, arrays, Path("whole.safetensors"))
  assert whole.startswith("whole.safetensors: auxiliary.") and whole.endswith("not used")


def test_others_have_none():
  with pytest.raises(UserError, match=r"^--auxiliary: yolov8n has no auxiliary layers; yolov9t, yolov9s, yolov9m, yolov9c have$"):
    detectors.build("yolov8n", 3, auxiliary=True)
