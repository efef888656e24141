"""The networks against torchvision: names and shapes of its `state_dict` by rule, its published parameter counts, and what it computes."""
import math, zlib
from pathlib import Path
import numpy as np, pytest
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.detection.anchors import anchors
from tinydet.detection.losses import detection_losses
from tinydet.detection.matcher import match
from tinydet.models import resnet, retinanet
from tinydet.models.preprocess import normalize
from tinydet.nn import init
from tinydet.nn.pool import upsample
from tinydet.weights import checkpoint, torch_file
from tinydet.weights.weights import load_weights
from by_hand import by_hand

GOLDEN = Path(__file__).parent / "golden"
NORM = ("weight", "bias", "running_mean", "running_var")
# (blocks of each stage, bottleneck, width of the 3x3 in the first stage, its groups); parameters and tensors as torchvision documents them
RESNETS = {
  "resnet18": ((2, 2, 2, 2), False, 64, 1, 11_689_512, 122), "resnet34": ((3, 4, 6, 3), False, 64, 1, 21_797_672, 218),
  "resnet50": ((3, 4, 6, 3), True, 64, 1, 25_557_032, 320), "resnet101": ((3, 4, 23, 3), True, 64, 1, 44_549_160, 626),
  "resnet152": ((3, 8, 36, 3), True, 64, 1, 60_192_808, 932),
  "wide_resnet50_2": ((3, 4, 6, 3), True, 128, 1, 68_883_240, 320), "wide_resnet101_2": ((3, 4, 23, 3), True, 128, 1, 126_886_696, 626),
  "resnext50_32x4d": ((3, 4, 6, 3), True, 128, 32, 25_028_904, 320), "resnext101_32x8d": ((3, 4, 23, 3), True, 256, 32, 88_791_336, 626)}


@pytest.fixture
def blank(monkeypatch):
  """Networks without values: only names and shapes matter, and drawing 10^8 numbers takes seconds."""
  monkeypatch.setattr(init, "initialize", lambda model, rule, seed=0: None)


def resnet_shapes(name, frozen=False):
  """The tensors of torchvision's `name`, less its classifier."""
  depths, bottleneck, first_width, groups, *_ = RESNETS[name]
  shapes = {}
  def conv_and_norm(prefix, conv, norm, out_channels, in_channels, kernel):
    shapes[f"{prefix}{conv}.weight"] = (out_channels, in_channels, kernel, kernel)
    shapes.update({f"{prefix}{norm}.{part}": (out_channels,) for part in NORM})
    if not frozen: shapes[f"{prefix}{norm}.num_batches_tracked"] = ()
  conv_and_norm("", "conv1", "bn1", 64, 3, 7)
  channels = 64
  for stage, depth in enumerate(depths):
    width = first_width << stage
    out = 256 << stage if bottleneck else width
    for block in range(depth):
      prefix = f"layer{stage + 1}.{block}."
      if bottleneck:
        conv_and_norm(prefix, "conv1", "bn1", width, channels, 1)
        conv_and_norm(prefix, "conv2", "bn2", width, width // groups, 3)
        conv_and_norm(prefix, "conv3", "bn3", out, width, 1)
      else:
        conv_and_norm(prefix, "conv1", "bn1", width, channels, 3)
        conv_and_norm(prefix, "conv2", "bn2", width, width, 3)
      if block == 0 and channels != out: conv_and_norm(prefix, "downsample.0", "downsample.1", out, channels, 1)
      channels = out
  return shapes


def detector_shapes(backbone, classes, v2):
  """The tensors of torchvision's `retinanet_<backbone>_fpn[_v2]`."""
  shapes = {f"backbone.body.{key}": shape for key, shape in resnet_shapes(backbone, frozen=not v2).items()}
  last = shapes["backbone.body.layer4.0.downsample.0.weight"][0]
  def conv(key, out_channels, in_channels, kernel=3):
    shapes.update({f"{key}.weight": (out_channels, in_channels, kernel, kernel), f"{key}.bias": (out_channels,)})
  for i in range(3):
    conv(f"backbone.fpn.inner_blocks.{i}.0", 256, last >> (2 - i), 1)
    conv(f"backbone.fpn.layer_blocks.{i}.0", 256, 256)
  conv("backbone.fpn.extra_blocks.p6", 256, last if v2 else 256)
  conv("backbone.fpn.extra_blocks.p7", 256, 256)
  for head in ("classification", "regression"):
    for i in range(4):
      conv(f"head.{head}_head.conv.{i}.0", 256, 256)
      if v2:
        del shapes[f"head.{head}_head.conv.{i}.0.bias"]
        shapes.update({f"head.{head}_head.conv.{i}.1.{part}": (256,) for part in ("weight", "bias")})
  conv("head.classification_head.cls_logits", 9 * classes, 256)
  conv("head.regression_head.bbox_reg", 36, 256)
  return shapes


def shapes_of(model): return {key: t.shape for key, t in get_state_dict(model).items()}
def learnt(model): return {key for key, t in get_state_dict(model).items() if t.is_param}
def count(model): return sum(t.numel() for t in get_state_dict(model).values() if t.is_param)


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_has_torchvisions_tensors(name, blank):
  model = resnet.build(name)
  expected = resnet_shapes(name) | {"fc.weight": (1000, 512 if name in ("resnet18", "resnet34") else 2048), "fc.bias": (1000,)}
  assert shapes_of(model) == expected
  assert (count(model), len(expected)) == RESNETS[name][-2:]
  assert learnt(model) == {key for key in expected if key.rpartition(".")[2] in ("weight", "bias")}


@pytest.mark.parametrize(("name", "parameters"), [
  # torchvision counts v1 with its FrozenBatchNorm, whose 53,120 numbers are buffers, and v2 with BatchNorm
  ("retinanet_resnet50_fpn", 34_014_999), ("retinanet_resnet50_fpn_v2", 38_198_935), ("retinanet_resnet18_fpn", None),
  ("retinanet_resnext50_32x4d_fpn", None), ("retinanet_wide_resnet101_2_fpn_v2", None)])
def test_detector_has_torchvisions_tensors(name, parameters, blank):
  model, v2 = retinanet.build(name, 91), name.endswith("_v2")
  expected = detector_shapes(name.removeprefix("retinanet_").removesuffix("_v2").removesuffix("_fpn"), 91, v2)
  assert shapes_of(model) == expected
  assert {"backbone.body.layer1.0.conv1.weight", "backbone.fpn.inner_blocks.0.0.weight", "backbone.fpn.layer_blocks.2.0.bias",
          "backbone.fpn.extra_blocks.p6.weight", "head.classification_head.conv.0.0.weight", "head.regression_head.bbox_reg.bias"} <= expected.keys()
  norms = {key for key in expected if key.startswith("backbone.body.") and len(expected[key]) < 2}
  assert learnt(model) == {key for key in expected if key not in norms or (v2 and key.endswith(("weight", "bias")))}
  if parameters: assert count(model) == parameters


@pytest.mark.parametrize(("layers", "fixed"), [
  (5, ()), (4, ("conv1", "bn1")), (3, ("conv1", "bn1", "layer1")), (0, ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"))])
def test_freeze_leaves_the_last_stages_to_learn(layers, fixed, blank):
  model = retinanet.build("retinanet_resnet18_fpn_v2", 3)
  before = learnt(model)
  retinanet.freeze(model, layers)
  assert learnt(model) == {key for key in before if not key.startswith(tuple(f"backbone.body.{stage}." for stage in fixed))}
  assert any(key.startswith("backbone.fpn.") for key in learnt(model))


def test_frozen_stages_cost_nothing_in_the_backward_pass(blank):
  """Of a convolution that learns there are two more kernels at least, for its weight's gradient and for its input's; of a frozen one neither."""
  kernels = {}
  for layers in (5, 3, 0):
    model = retinanet.build("retinanet_resnet10_quarter_fpn", 2, "frozen")
    for t in get_state_dict(model).values(): init.set_values(t, np.ones(t.shape))
    retinanet.freeze(model, layers)
    params = [t for t in get_state_dict(model.backbone).values() if t.is_param]
    x = Tensor(np.ones((1, 3, 32, 32), np.float32)).realize()
    loss = sum(level.square().sum() for level in model.backbone.fpn(model.backbone.body.features(x)[1:]))
    kernels[layers] = len(loss.schedule_linear(*loss.gradient(*params)).src)
  convolutions = {"conv1": 1, "layer1": 2, "layer2": 3, "layer3": 3, "layer4": 3}
  assert kernels[5] - kernels[3] >= 2 * (convolutions["conv1"] + convolutions["layer1"]) - 1   # the picture has no gradient
  assert kernels[3] - kernels[0] >= 2 * (convolutions["layer2"] + convolutions["layer3"] + convolutions["layer4"])


def test_unknown_names():
  for name in ("retinanet_resnet51_fpn", "fcos_resnet50_fpn", "retinanet_resnet50", "retinanet_resnet50_fpn_v3"):
    with pytest.raises(ValueError, match="is no detector"): retinanet.build(name, 3)
  with pytest.raises(KeyError): resnet.build("resnet51")


def test_the_detectors_first_values():
  sd = {key: t.numpy() for key, t in get_state_dict(retinanet.build("retinanet_resnet10_quarter_fpn", 6, "batch", seed=4)).items()}
  np.testing.assert_allclose(sd["head.classification_head.cls_logits.bias"], -math.log(99), rtol=1e-6)   # a score of 0.01
  assert sd["head.classification_head.conv.0.0.weight"].std() == pytest.approx(0.01, rel=0.05)
  assert sd["head.regression_head.bbox_reg.weight"].std() == pytest.approx(0.01, rel=0.05)
  w = sd["backbone.body.layer4.0.conv2.weight"]                                                        # He et al. 2015, by the outputs
  assert w.std() == pytest.approx(math.sqrt(2 / (w.shape[0] * 9)), rel=0.02) and abs(w.mean()) < 0.02 * w.std()
  w = sd["backbone.fpn.layer_blocks.1.0.weight"]                                                      # uniform within sqrt(3 / inputs)
  bound = math.sqrt(3 / (w.shape[1] * 9))
  assert 0.98 * bound < abs(w).max() <= bound and w.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
  for key, value in sd.items():
    if ".bn" in key and key.endswith(("weight", "running_var")): assert (value == 1).all(), key
    elif not key.endswith(("weight", "running_var", "cls_logits.bias")): assert not value.any(), key
  assert sd["backbone.body.bn1.num_batches_tracked"].dtype == np.int64


def test_normalize_and_upsample():
  images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
  expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(normalize(Tensor(images)).numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
  x = np.random.default_rng(1).standard_normal((1, 2, 2, 3)).astype(np.float32)
  np.testing.assert_array_equal(upsample(Tensor(x), (3, 6)).numpy(), x.repeat(2, 2).repeat(2, 3)[:, :, :3])


# ------------------------------------------------------------------------------------------------------------------------------ golden outputs


def fill(model):
  """The golden files' parameters (golden/README.md)."""
  for key, t in get_state_dict(model).items():
    n, scale = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(t.shape), math.sqrt(2 / max(1, math.prod(t.shape[1:])))
    if key.endswith("num_batches_tracked"): values = np.zeros(t.shape)
    elif key.endswith("running_var"): values = 1 + 0.2 * abs(n)
    elif key.endswith("running_mean"): values = 0.1 * n
    elif key.endswith("cls_logits.bias"): values = -2 + 0.1 * n
    elif key.endswith("bias"): values = 0.05 * n
    elif n.ndim == 1: values = 0.5 + 0.1 * n
    elif key.endswith("bbox_reg.weight"): values = 0.1 * n * scale
    else: values = n * scale
    init.set_values(t, values)
  return model


def assert_close(value, golden, relative):
  assert abs(value - golden).max() <= relative * abs(golden).max()


@pytest.mark.parametrize("name", by_hand(["resnet18", "resnet50", "resnext50_32x4d"], "resnet50"))
def test_logits_of_torchvision(name, blank):
  golden = np.load(GOLDEN / f"{name}.npz")
  assert_close(fill(resnet.build(name))(normalize(Tensor(golden["images"]))).numpy(), golden["logits"], 1e-4)


@pytest.mark.parametrize("name", ["resnet18_fpn", *(pytest.param(name, marks=pytest.mark.by_hand)
                                                    for name in ("resnet50_fpn", "resnet50_fpn_v2", "resnext50_32x4d_fpn"))])
def test_detector_of_torchvision(name, blank, tmp_path):
  """Outputs, both losses and gradients, of weights that came from a file. The second image of resnet18's file has no boxes."""
  golden = np.load(GOLDEN / f"retinanet_{name}.npz")
  filled, model, other = (retinanet.build(f"retinanet_{name}", int(golden["num_classes"])) for _ in range(3))
  values = {key: t.numpy() for key, t in get_state_dict(fill(filled)).items()}
  torch_file.save(tmp_path / "x.pth", values)
  checkpoint.save(tmp_path / "x.safetensors", values)
  assert load_weights(str(tmp_path / "x.pth"), model) == load_weights(str(tmp_path / "x.safetensors"), other) == []
  for key, t in get_state_dict(other).items(): np.testing.assert_array_equal(t.numpy(), values[key], err_msg=key)
  batch, height, width = golden["images"].shape[:3]
  np.testing.assert_array_equal(anchors(height, width), golden["anchors"])

  boxes, labels = np.zeros((batch, 6, 4), np.float32), np.full((batch, 6), -1, np.int32)
  for i in range(batch):
    n = len(golden[f"target{i}_labels"])
    boxes[i, :n], labels[i, :n] = golden[f"target{i}_boxes"], golden[f"target{i}_labels"]
  level_anchors = Tensor(golden["anchors"])
  classes, matched = match(level_anchors, Tensor(boxes), Tensor(labels))
  outputs = model(normalize(Tensor(golden["images"])))
  losses = detection_losses(*outputs, level_anchors, classes, matched, "giou" if name.endswith("_v2") else "l1")
  tensors, keys = get_state_dict(model), [key.removeprefix("gradnorm/") for key in golden if key.startswith("gradnorm/")]
  norms = [g.square().sum().sqrt() for g in (losses[0] + losses[1]).gradient(*(tensors[key] for key in keys))]
  Tensor.realize(*outputs, *losses, *norms)

  assert_close(outputs[0].numpy(), golden["cls_logits"], 1e-4)
  assert_close(outputs[1].numpy(), golden["bbox_regression"], 1e-4)
  assert losses[0].item() == pytest.approx(golden["loss_classification"].item(), rel=1e-4)
  assert losses[1].item() == pytest.approx(golden["loss_bbox_regression"].item(), rel=1e-4)
  assert len(keys) == 8
  for key, norm in zip(keys, norms): assert norm.item() == pytest.approx(golden[f"gradnorm/{key}"].item(), rel=1e-3), key
