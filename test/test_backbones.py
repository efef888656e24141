"""Every family of classifiers under a RetinaNet: it learns, what is frozen does not, and it detects."""
from functools import partial
import numpy as np, pytest
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet import detectors
from tinydet.models import classifiers, convnext, densenet, efficientnet, mnasnet, mobilenet, regnet, vgg
from tinydet.nn import init
from tinydet.training import optim
from tinydet.training.loop import make_step

CANVAS = (64, 64)
# Networks as shallow as their designs allow, under the names of real ones. `python test/test_backbones.py` trains these, or real ones that it is
# given.
SHALLOW = {
  "alexnet": classifiers.NETWORKS["alexnet"], "squeezenet1_1": classifiers.NETWORKS["squeezenet1_1"],
  "vgg11_bn": partial(vgg.VGG, depths=(1,) * 5, normed=True), "densenet121": partial(densenet.DenseNet, growth=8, depths=(1,) * 4, width=16),
  "mobilenet_v3_small": partial(mobilenet.MobileNetV3, last_channels=8,
                                settings=(*mobilenet.SMALL[:2], mobilenet.SMALL[3], (5, 96, 96, True, "HS", 2))),
  "mnasnet0_5": partial(mnasnet.MNASNet, alpha=0.25),
  "efficientnet_b0": partial(efficientnet.EfficientNet, share=0.2, last_channels=64, settings=(
    ("fused", 1, 3, 1, 8, 8, 1), ("fused", 4, 3, 2, 8, 16, 1), ("MB", 4, 3, 2, 16, 16, 2), ("MB", 4, 3, 2, 16, 24, 1), ("MB", 4, 3, 2, 24, 32, 1))),
  "regnet_y_400mf": partial(regnet.RegNet, parameters=(4, 16, 16.0, 1.6, 8), se=True),
  "convnext_tiny": partial(convnext.ConvNeXt, width=8, depths=(1,) * 4, dropped=0.1)}


def train(name, norm="batch", steps=2):
  """A detector on the backbone `name`, its values before and after `steps` steps in which all but the stem learns, and the losses."""
  detector = detectors.build(f"retinanet_{name}_fpn", 2, norm=norm, exact_strides=True, channels=16)
  detector.freeze(4)
  tensors = get_state_dict(detector.network)
  for key, t in tensors.items():   # ConvNeXt begins with blocks of 1e-6, of whose gradients a float32 weight takes no notice
    if key.endswith("layer_scale"): init.set_values(t, np.ones(t.shape))
  before = {key: t.numpy() for key, t in tensors.items()}
  params, buffers = {key: t for key, t in tensors.items() if t.is_param}, [t for t in tensors.values() if not t.is_param]
  optimizer = optim.Optimizer(params, "sgd", optim.schedule("constant", 1e-2, 1))
  for constant in detector.constants(CANVAS): constant.realize()
  step = make_step(lambda images, boxes, labels: detector.losses(detector(images), boxes, labels, CANVAS), optimizer, buffers)
  images = np.random.default_rng(0).integers(0, 256, (2, *CANVAS, 3), np.uint8)
  batch = [Tensor(a).realize() for a in (images, np.float32([[[10, 10, 50, 50]], [[5, 20, 40, 60]]]), np.int32([[1], [0]]))]
  losses = [step(*batch)()["loss"] for _ in range(steps)]
  return detector, images, before, {key: t.numpy() for key, t in tensors.items()}, losses


def check(detector, images, before, after, losses):
  assert np.isfinite(losses).all() and losses[-1] < losses[0]
  stem = tuple(detector.network.body + prefix for prefix in detector.network.backbone.body.stages[0])
  tensors = get_state_dict(detector.network)
  still = {key for key in before if tensors[key].is_param and (before[key] == after[key]).all()}
  # a bias before a norm that takes the mean away has no gradient, and one pixel of P7 has too little for a float32 weight to notice
  assert not {key for key in still if key.startswith(detector.network.body) and not key.endswith("bias")}, still
  fixed = {key for key, t in tensors.items() if not t.is_param and key.endswith(("weight", "bias"))}
  assert fixed and fixed == {key for key in before if key.startswith(stem) and key.endswith(("weight", "bias"))}
  for key in fixed: np.testing.assert_array_equal(before[key], after[key], err_msg=key)
  found = detector.detect(detector.infer(Tensor(images)), CANVAS, np.array([CANVAS] * 2), score_threshold=0.0)
  assert (found.scores > 0).any(1).all() and (found.boxes >= 0).all() and (found.boxes <= 64).all()


# one of them in CI, as each takes a quarter to two minutes to compile
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.by_hand] * (name != "mobilenet_v3_small")) for name in SHALLOW])
def test_a_backbone_learns_and_detects(name, monkeypatch):
  monkeypatch.setitem(classifiers.NETWORKS, name, SHALLOW[name])
  check(*train(name))


if __name__ == "__main__":
  import sys, time
  if not sys.argv[1:]: classifiers.NETWORKS |= SHALLOW
  for name in sys.argv[1:] or SHALLOW:
    begun = time.time()
    check(*train(name))
    print(f"{name}: {time.time() - begun:.0f} s", flush=True)
