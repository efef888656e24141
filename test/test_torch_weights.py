"""The same networks in torchvision and here: weights cross over in every format, both ways, and the outputs agree."""
import argparse, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.models import resnet, retinanet
from tinydet.models.preprocess import normalize
from tinydet.weights import checkpoint, weights
from tinydet.weights.weights import fit, load_weights, open_weights
from test_weights import old_layout
from torch_peer import torch, torchvision
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

ROOT = Path(__file__).parents[1]
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


def randomise(model, seed=0):
  """Values that make every tensor matter, norm statistics included."""
  generator = torch.Generator().manual_seed(seed)
  for key, t in model.state_dict().items():
    if key.endswith("num_batches_tracked"): t.fill_(7)
    elif key.endswith("running_var"): t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    elif t.ndim == 1: t.copy_(torch.randn(t.shape, generator=generator) * 0.1 + (0.7 if key.endswith("weight") else 0))
    else: t.copy_(torch.randn(t.shape, generator=generator) * (2 / t[0].numel()) ** 0.5)
  return model.eval()


def torch_detector(norm_layer=FrozenBatchNorm2d, classes=5):
  """torchvision has builders for ResNet-50 only; its RetinaNet takes any backbone."""
  body = _resnet_fpn_extractor(torchvision.models.resnet18(norm_layer=norm_layer), 5, returned_layers=[2, 3, 4],
                               extra_blocks=LastLevelP6P7(256, 256))
  return randomise(RetinaNet(body, classes))


def outputs(model):
  with torch.no_grad():
    features = list(model.backbone(torch.from_numpy(normalize(Tensor(IMAGES)).numpy())).values())
    head = model.head(features)
  return head["cls_logits"].numpy(), head["bbox_regression"].numpy()


def assert_close(value, expected, relative=1e-4): assert abs(value - expected).max() <= relative * abs(expected).max()


@pytest.fixture(scope="module")
def detector(): return torch_detector()


FORMS = {
  "zip": lambda model, path: torch.save(model.state_dict(), path),
  "legacy": lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
  "parallel": lambda model, path: torch.save(torch.nn.DataParallel(model).state_dict(), path),
  "training": lambda model, path: torch.save({"model": model.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer":
                                              torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()}, path),
  "lightning": lambda model, path: torch.save({"state_dict": model.state_dict()}, path),
  "average": lambda model, path: torch.save({"model": {k: v * 0 for k, v in model.state_dict().items()},
                                             "model_ema": torch.optim.swa_utils.AveragedModel(model, use_buffers=True).state_dict()}, path),
  "old names": lambda model, path: torch.save(old_layout(model.state_dict()), path),
  "safetensors": lambda model, path: checkpoint.save(path.with_suffix(".safetensors"), {k: v.numpy() for k, v in model.state_dict().items()})}


@pytest.mark.parametrize("form", FORMS)
def test_every_format_loads(detector, tmp_path, form):
  FORMS[form](detector, tmp_path / "x.pth")
  model = retinanet.build("retinanet_resnet18_fpn", 5)
  notes = load_weights(str(next(tmp_path.iterdir())), model)
  assert notes == (["x.pth: takes its averaged weights (model_ema)"] if form == "average" else [])
  theirs, ours = detector.state_dict(), get_state_dict(model)
  assert theirs.keys() == ours.keys()
  for key, values in theirs.items(): np.testing.assert_array_equal(ours[key].numpy(), values.numpy(), err_msg=key)


def test_outputs_agree(detector, tmp_path):
  torch.save(detector.state_dict(), tmp_path / "x.pth")
  model = retinanet.build("retinanet_resnet18_fpn", 5)
  load_weights(str(tmp_path / "x.pth"), model)
  for value, expected in zip(model(normalize(Tensor(IMAGES))), outputs(detector)): assert_close(value.numpy(), expected)


def test_half_precision(detector, tmp_path):
  torch.save({k: v.half() if v.is_floating_point() else v for k, v in detector.state_dict().items()}, tmp_path / "x.pth")
  model = retinanet.build("retinanet_resnet18_fpn", 5)
  load_weights(str(tmp_path / "x.pth"), model)
  for key, values in detector.state_dict().items(): np.testing.assert_array_equal(get_state_dict(model)[key].numpy(), values.half().float().numpy())


def test_the_old_names_are_torchvisions(detector):
  """What torchvision takes for its own older layout is what `old_layout` makes: the oracle for `retinanet.current_key`."""
  other = torch_detector().requires_grad_(False)
  for t in other.state_dict().values(): t.zero_()
  other.load_state_dict(dict(old_layout(detector.state_dict())), strict=True)   # a plain dict has no version, as files from then
  for key, values in detector.state_dict().items(): assert torch.equal(other.state_dict()[key], values), key


def test_a_norm_that_adds_nothing_to_the_variance(detector, tmp_path, monkeypatch):
  """torchvision's COCO_V1 network has eps 0 in its frozen norms."""
  exact = torch_detector()
  for key, t in exact.state_dict().items():
    if key.endswith("running_var"): t.mul_(1e-4)
    if key.endswith(("bn1.weight", "bn2.weight", "downsample.1.weight")): t.mul_(1e-2)
  for module in exact.modules():
    if isinstance(module, FrozenBatchNorm2d): module.eps = 0.0
  torch.save(exact.state_dict(), tmp_path / "x.pth")
  monkeypatch.setattr(weights, "find", lambda name, architecture: (tmp_path / "x.pth", {"eps": 0.0}))
  path, tensors, _, _ = open_weights("coco", "retinanet_resnet18_fpn")
  model = retinanet.build("retinanet_resnet18_fpn", 5)
  fit(model, tensors, path)
  expected = outputs(exact)
  for value, wanted in zip(model(normalize(Tensor(IMAGES))), expected): assert_close(value.numpy(), wanted)
  for module in exact.modules():
    if isinstance(module, FrozenBatchNorm2d): module.eps = 1e-5
  assert abs(outputs(exact)[0] - expected[0]).max() > 0.01 * abs(expected[0]).max(), "else this shows nothing"


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_classifiers(name, tmp_path):
  theirs = randomise(getattr(torchvision.models, name)())
  torch.save(theirs.state_dict(), tmp_path / "x.pth")
  model = resnet.build(name)
  assert load_weights(str(tmp_path / "x.pth"), model) == []
  with torch.no_grad(): expected = theirs(torch.from_numpy(normalize(Tensor(IMAGES)).numpy())).numpy()
  assert_close(model(normalize(Tensor(IMAGES))).numpy(), expected)
  detector = retinanet.build(f"retinanet_{name}_fpn", 3)
  assert "fc.weight, fc.bias not used" in load_weights(str(tmp_path / "x.pth"), detector)[0]
  for key, t in get_state_dict(detector.backbone.body).items():
    np.testing.assert_array_equal(t.numpy(), theirs.state_dict()[key].numpy(), err_msg=key)


@pytest.mark.parametrize("norm_layer", [FrozenBatchNorm2d, torch.nn.BatchNorm2d])
def test_export_to_torchvision(tmp_path, norm_layer):
  """A network from here in torchvision, strictly, whatever kind of norm it is built with there."""
  model = retinanet.build("retinanet_resnet18_fpn", 5, seed=3)
  checkpoint.save(tmp_path / "best.safetensors", {k: t.numpy() for k, t in get_state_dict(model).items()}, {"size": [64, 64]})
  done = subprocess.run([sys.executable, str(ROOT / "examples" / "export_weights.py"), "--weights", str(tmp_path), "--out", str(tmp_path / "x.pth")],
                        capture_output=True, text=True, check=False, timeout=300)
  assert done.returncode == 0, done.stderr
  theirs = torch_detector(norm_layer)
  theirs.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
  for expected, value in zip(outputs(theirs.eval()), model(normalize(Tensor(IMAGES)))): assert_close(value.numpy(), expected)


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_torchvisions_own_builders_take_an_export(tmp_path, name):
  model = retinanet.build(name, 7, seed=1)
  checkpoint.save(tmp_path / "x.safetensors", {k: t.numpy() for k, t in get_state_dict(model).items()})
  done = subprocess.run([sys.executable, str(ROOT / "examples" / "export_weights.py"), "--weights", str(tmp_path / "x.safetensors"), "--out",
                         str(tmp_path / "x.pth")], capture_output=True, text=True, check=False, timeout=300)
  assert done.returncode == 0 and name in done.stdout, done.stderr
  theirs = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=7)
  theirs.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
  for key, t in get_state_dict(model).items(): np.testing.assert_array_equal(t.numpy(), theirs.state_dict()[key].numpy(), err_msg=key)
