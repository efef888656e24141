"""The golden files of YOLO's networks (test/golden/yolo/README.md): the parameters that they were made with."""
import hashlib, math, re, zlib
from pathlib import Path
import numpy as np
from tinygrad.nn.state import get_state_dict
from tinydet.models import darknet
from tinydet.models.layer_list import LayerList
from tinydet.models.yolo_blocks import Conv
from tinydet.nn import init

GOLDEN = Path(__file__).parent / "golden" / "yolo"
CLASS = r"cv3\.\d\.2\.(weight|bias)$|cls_preds\.\d\.(weight|bias)$"
BOX = r"cv2\.\d\.2\.(weight|bias)$|reg_preds(_dist)?\.\d\.(weight|bias)$"
ANCHORED = r"^model\.\d+\.m\.\d\.(weight|bias)$"
LINEAR, BOTTLENECK = r"\.(qkv|proj|pe)\.|\.(mlp|ffn)\.1\.", r"\.m\.\d+\.cv2\."
RESIDUAL, BRANCH = r"\.cv1\.4\.|\.conv2\.rbr_", r"\.(conv1|conv2|rbr_dense|rbr_1x1)\."
AS_BUILT = ("dfl.conv.weight", "detect.proj", "proj_conv.weight", "anchors", "anchor_grid", "num_batches_tracked")
NO_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked", "anchors", "anchor_grid")


def draw(key, shape): return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)


def value(key, shape):
  """The tensor `key`, by the rule's table."""
  n, j = draw(key, shape), np.arange(shape[0])
  def has(pattern): return re.search(pattern, key) is not None
  if key.endswith("running_var"): return 1 + 0.2 * abs(n)
  if key.endswith("running_mean"): return 0.1 * n
  if key.endswith("bias"):
    if has(CLASS): return -2 + 0.3 * n
    if has(BOX): return 0.5 * n + 2 if len(n) == 4 else 0.5 * n - 0.35 * (j % (len(n) // 4))
    return 0.5 * n - (j % (len(n) // 3) >= 4) if has(ANCHORED) else 0.1 * n
  if n.ndim == 1: return 0.3 + 0.1 * n if "rbr_identity" in key or key.endswith("gamma") else 1 + 0.1 * n
  if shape[1] > 1: n = n - n.mean(tuple(range(1, n.ndim)), keepdims=True)
  gain = 0.3 if has(LINEAR) else 1.2 if has(BOTTLENECK) else 0.3 if has(RESIDUAL) else {3: 30, 1: 2}.get(shape[1], 3)
  scale = 2 if has(CLASS) or has(ANCHORED) else 0.3 if has(BOX) and shape[0] == 4 else 1
  return scale * n * math.sqrt(gain / (2 if has(BRANCH) else 1) / math.prod(shape[1:]))


def fill(network):
  """`network` with the golden files' parameters."""
  if isinstance(network, LayerList) and isinstance(network.model[-1], darknet.Outputs):
    stream, at = darknet_stream(network)[0], 0
    for _, tensor in darknet.tensors_in_order(network):
      init.set_values(tensor, stream[at:at + tensor.numel()].reshape(tensor.shape))
      at += tensor.numel()
  else:
    for key, tensor in get_state_dict(network).items():
      if not key.endswith(AS_BUILT): init.set_values(tensor, value(key, tensor.shape))
  return network


def darknet_stream(network):
  """What a .weights file of the rule holds behind its header, f32, and the lines of `keys_sha256`."""
  arrays, lines = [], []
  convolutions = [(module, number) for number, module in enumerate(network.model) if isinstance(module, Conv | darknet.Output)]
  for index, (module, number) in enumerate(convolutions):
    shape, normed = module.conv.weight.shape, isinstance(module, Conv)
    added, channel = isinstance(network.model[number + 1], darknet.Add), np.arange(shape[0]) % 85
    one = {part: draw(f"{index}.{part}", shape[:1]) for part in ("bias", "weight", "running_mean", "running_var")}
    kernel = draw(f"{index}.kernel", shape)
    kernel = (kernel - kernel.mean((1, 2, 3), keepdims=True)) * math.sqrt((22 if shape[1] == 3 else 0.5 if added else 2.4) / math.prod(shape[1:]))
    if normed:
      parts = {"bias": 0.1 * one["bias"], "weight": 1 + 0.1 * one["weight"], "running_mean": 0.1 * one["running_mean"],
               "running_var": 1 + 0.2 * abs(one["running_var"]), "kernel": kernel}
    else: parts = {"bias": 0.5 * one["bias"] - (channel > 4), "kernel": kernel * np.where(np.isin(channel, (2, 3)), 0.4, 1.5).reshape(-1, 1, 1, 1)}
    arrays += [part.astype("<f4").reshape(-1) for part in parts.values()]
    lines += [f"{index}.{name} {','.join(map(str, part.shape))}" for name, part in parts.items()]
  return np.concatenate(arrays), lines


def keys_sha256(network):
  if isinstance(network, LayerList) and isinstance(network.model[-1], darknet.Outputs): lines = darknet_stream(network)[1]
  else: lines = [f"{k} {','.join(map(str, t.shape))}" for k, t in get_state_dict(network).items() if not k.endswith("num_batches_tracked")]
  return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def parameters(network): return sum(t.numel() for key, t in get_state_dict(network).items() if not key.endswith(NO_PARAMETERS))
