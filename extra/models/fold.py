"""For inference: each batch norm becomes part of the convolution before it, and re-parameterised branches become one convolution."""
from typing import Any
import numpy as np
from tinygrad import Tensor
from tinydet.models.yolo_blocks import Conv
from tinydet.nn.init import set_all
from tinydet.nn.layers import BatchNorm, Conv2d


def fold(module: Any) -> None:
  """Fold `module`, a network of `Conv` and of blocks with `branches`, in place. Its outputs stay what they were in evaluation, to rounding; its state
  dict does not, and it can no longer be trained as before."""
  children = enumerate(module) if isinstance(module, list) else list(vars(module).items()) if hasattr(module, "__dict__") else []
  for key, child in children:
    if hasattr(child, "branches"):
      child = _merged(child)
      if isinstance(module, list): module[key] = child
      else: setattr(module, key, child)
    elif isinstance(child, Conv):
      if child.bn is not None: _set(child, *_with_norm(child.conv, child.bn, child.conv.weight.shape[2]))
    elif not isinstance(child, Tensor | Conv2d | BatchNorm): fold(child)


def _merged(block: Any) -> Conv:
  """One convolution in place of `block`'s branches, which are added up."""
  convs = [conv for conv, _ in block.branches() if conv is not None]
  largest = max(convs, key=lambda conv: conv.weight.shape[2])
  out_channels, per_group, kernel, _ = largest.weight.shape
  merged = Conv(per_group * largest.groups, out_channels, kernel, largest.stride, largest.groups, block.act)
  parts = [_with_norm(conv, norm, kernel) for conv, norm in block.branches()]
  _set(merged, sum(weight for weight, _ in parts), sum(bias for _, bias in parts))
  return merged


def _with_norm(conv: Conv2d | None, norm: BatchNorm, kernel: int) -> tuple[np.ndarray, np.ndarray]:
  """f64 weight [Cout,Cin/groups,kernel,kernel] and bias [Cout] of `conv` (None: what leaves a picture as it is) and the norm behind it."""
  gamma, beta, mean, variance = (t.numpy().astype(np.float64) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
  scale = gamma / np.sqrt(variance + norm.eps)
  weight = np.eye(len(scale)).reshape(len(scale), -1, 1, 1) if conv is None else conv.weight.numpy().astype(np.float64)
  around = (kernel - weight.shape[2]) // 2
  return np.pad(weight * scale.reshape(-1, 1, 1, 1), ((0, 0), (0, 0), (around, around), (around, around))), beta - mean * scale


def _set(conv: Conv, weight: np.ndarray, bias: np.ndarray) -> None:
  conv.bn, conv.conv.bias = None, Tensor.empty(len(bias))
  set_all([(conv.conv.weight, weight), (conv.conv.bias, bias)])
