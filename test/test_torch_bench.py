"""The step of torchvision that `bench_retinanet.py --torch` measures is ours."""
import dataclasses, json
import numpy as np, pytest
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.detection.anchors import anchors
from tinydet.detection.losses import detection_losses
from tinydet.detection.matcher import match
from tinydet.models import retinanet
from tinydet.models.preprocess import normalize
from test_bench import STEP, bench, program
from torch_peer import torch
from by_hand import by_hand

BENCH = program()
SMALL = BENCH.Config(size=(96, 64))


def theirs(config, steps):
  model = retinanet.build(BENCH.detector_name(config), config.classes, config.norm)
  step = BENCH.torch_step(config, {key: t.numpy() for key, t in get_state_dict(model).items()}, "cpu")
  batch = [torch.from_numpy(array) for array in BENCH.random_batch(config)]
  return [step(*batch) for _ in range(steps)], model


def test_the_first_loss_is_ours():
  (loss,), model = theirs(SMALL, 1)
  images, boxes, labels = map(Tensor, BENCH.random_batch(SMALL))
  level_anchors = Tensor(anchors(64, 96))
  ours = sum(detection_losses(*model(normalize(images)), level_anchors, *match(level_anchors, boxes, labels)))
  assert ours.item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("changes", by_hand(
  [{"variant": "v2", "norm": "batch"}, {"backbone": "resnext50_32x4d", "norm": "group"}, {"dtype": "bf16"}], {"variant": "v2", "norm": "batch"}))
def test_other_networks_take_our_weights_and_learn(changes):
  losses, _ = theirs(dataclasses.replace(SMALL, **changes), 3)
  assert np.isfinite(losses).all() and losses[2] < losses[0]


@pytest.mark.by_hand
def test_its_numbers(tmp_path):
  done = bench(tmp_path, "--only-torch", "--size", "64", "--steps", "1", "--loader-images", "0", "--postprocess-size", "0", "--json", "out.json")
  assert done.returncode == 0, done.stderr
  step = json.loads((tmp_path / "out.json").read_text())["step"]
  assert set(step) - STEP == {"threads", "device", "versions"} and step["device"] == "cpu" and step["threads"] == torch.get_num_threads()
  assert 0 < step["step_min_s"] == step["step_median_s"] < step["first_step_s"] and step["images_per_s"] == pytest.approx(2 / step["step_median_s"])
