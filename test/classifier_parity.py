"""By hand: the logits of all classifiers, or of those named, against torchvision's, from the same drawn parameters (pip install -e '.[torch]').

    python test/classifier_parity.py [NAME ...]

The last number is the largest difference over the largest logit; more than 1e-4 is an error. Inception sees 96x96 pixels, the others 64x64. A network
takes 3 to 30 seconds to compile."""
import sys, time
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.models import classifiers
from tinydet.models.preprocess import normalize
from tinydet.nn import init
from classifier_golden import GOLDEN, values
from torch_peer import torch, torchvision

bad = []
for name in sys.argv[1:] or [name for name in classifiers.NAMES if name != "resnet10_quarter"]:
  begun, file = time.time(), GOLDEN / f"{name}.npz"
  model, side = classifiers.made(name), 96 if name == "inception_v3" else 64
  norm_weight = float(np.load(file)["norm_weight"]) if file.exists() else 0.9
  tensors = {key: values(key, t.shape, norm_weight).astype(np.float32) for key, t in get_state_dict(model).items()}
  patches = np.random.default_rng(1).integers(0, 256, (2, side // 8, side // 8, 3), np.uint8)
  x = normalize(Tensor(patches.repeat(8, 1).repeat(8, 2)))
  theirs = getattr(torchvision.models, name)(weights=None, **({"init_weights": False} if name in ("inception_v3", "googlenet") else {})).eval()
  for key, t in theirs.state_dict().items():
    if t.ndim: t.copy_(torch.from_numpy(tensors[key]))   # in place: MNASNet loads no dictionary that does not say its version
  with torch.no_grad(): expected = theirs(torch.from_numpy(x.numpy())).numpy()
  for key, t in get_state_dict(model).items(): init.set_values(t, tensors[key])
  error = abs(model(x).numpy() - expected).max() / abs(expected).max()
  if not error < 1e-4: bad.append(name)
  apart = abs(expected[0] - expected[1]).max() / abs(expected).max()
  print(f"{name}: {time.time() - begun:.0f} s, the two pictures differ by {apart:.1e}, off by {error:.1e}", flush=True)
sys.exit(f"not torchvision's logits: {', '.join(bad)}" if bad else 0)
