"""What test_classifiers.py and classifier_parity.py share: parameters that anyone can rebuild (golden/README.md), and the logits of torchvision."""
import math, zlib
from pathlib import Path
import numpy as np
from tinygrad.nn.state import get_state_dict
from tinydet.nn import init

GOLDEN = Path(__file__).parent / "golden" / "classifiers"


def values(key, shape, norm_weight):
  """Of the tensor `key`, by the rule."""
  n, scale = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape), math.sqrt(2 / max(1, math.prod(shape[1:])))
  if key.endswith("num_batches_tracked"): return np.zeros(shape)
  if key.endswith("running_var"): return 1 + 0.2 * abs(n)
  if key.endswith("running_mean"): return 0.1 * n
  if key.endswith("bias"): return 0.05 * n
  return norm_weight + 0.1 * n if n.ndim == 1 else n * scale


def fill(model, norm_weight):
  for key, t in get_state_dict(model).items(): init.set_values(t, values(key, t.shape, norm_weight))
  return model
