"""How far training in bf16 and half strays from training in float32: the same net, weights, pictures and rule, step by step.

    python test/precision_parity.py --steps 50 --norm frozen

prints the losses' largest and mean distance from float32's, relative to them. Not collected by pytest; `test_precision.py` runs ten steps of it."""
import argparse, itertools, json, sys, time
import numpy as np
from tinydet.runtime.device import require_device
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.datasets import open_dataset
from tinydet.datasets.loader import Loader
from tinydet.datasets.transforms import compose, resize
from tinydet.detection.anchors import anchors
from tinydet.detection.losses import detection_losses
from tinydet.detection.matcher import match
from tinydet.models import retinanet
from tinydet.models.preprocess import normalize
from tinydet.training.loop import make_step
from tinydet.training.optim import Optimizer, schedule
from tinydet.runtime.precision import DTYPES
from tinydet.weights.weights import load_weights

SIDE, BATCH, PICTURES, LR = 64, 4, 200, 1e-4


def losses_of(dtype: str, steps: int, norm: str) -> np.ndarray:
  """Classification and regression loss of the first `steps` steps, 50 at most, f64 [steps,2], of a RetinaNet-ResNet10-quarter in `dtype`.

  64x64, batch 4. `norm` "batch" starts from random weights, "frozen" from the detector that ships with the code; the rule is that of
  `--preset mlperf`, Adam at 1e-4, here after 10 steps of warm-up."""
  data = open_dataset("shapes:1", "train", size=SIDE, count=PICTURES)
  loader = Loader(data, BATCH, compose(resize(SIDE, SIDE)), seed=0, shuffle=True, drop_last=True, workers=0)
  name = "retinanet_resnet10_quarter_fpn"
  model = retinanet.build(name, len(data.class_names), norm)
  if norm == "frozen": load_weights("shapes", model, name)
  tensors = get_state_dict(model)
  params = {key: t for key, t in tensors.items() if t.is_param}
  optimizer = Optimizer(params, "adam", schedule("constant", LR, steps, warmup_steps=10), loss_scale=2.0 ** 14 if dtype == "half" else None)
  level_anchors = Tensor(anchors(SIDE, SIDE)).realize()

  def losses(images: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    classes, matched = match(level_anchors, boxes, labels)
    classification, regression = detection_losses(*model(normalize(images, DTYPES[dtype])), level_anchors, classes, matched)
    return {"loss": classification + regression, "classification": classification, "bbox_regression": regression}

  step = make_step(losses, optimizer, [t for t in tensors.values() if not t.is_param])
  found = []
  for batch in itertools.islice(loader.epoch(0), steps):
    scalars = step(*(Tensor(a).realize() for a in (batch.images, batch.boxes, batch.labels)))()
    assert not scalars["skipped"], f"{dtype}: step {len(found) + 1} was skipped"
    found.append((scalars["classification"], scalars["bbox_regression"]))
  loader.close()
  return np.array(found)


def distances(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
  """|found - expected| of each step's loss, relative to the expected one: f64 [steps]."""
  return abs(found.sum(1) - expected.sum(1)) / expected.sum(1)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--norm", choices=("frozen", "batch"), default="frozen")
  parser.add_argument("--dtypes", default="float32,bf16,half")
  args = parser.parse_args()
  require_device()
  curves = {}
  for dtype in args.dtypes.split(","):
    begun = time.process_time()
    curves[dtype] = losses_of(dtype, args.steps, args.norm)
    first, last = curves[dtype][[0, -1]].sum(1)
    print(f"{dtype}: loss {first:.4f} -> {last:.4f}  ({time.process_time() - begun:.0f} s of processor time)", flush=True)
    if dtype != "float32":
      away = distances(curves[dtype], curves["float32"])
      print(f"  relative to float32: first {away[0]:.1e}, mean {away.mean():.1e}, largest {away.max():.1e} at step {away.argmax() + 1}", flush=True)
  json.dump({dtype: curve.tolist() for dtype, curve in curves.items()}, sys.stderr)
