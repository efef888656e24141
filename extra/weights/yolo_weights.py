"""What the authors of YOLO's networks write into their files, as the networks here have it."""
import re
from collections.abc import Mapping
from typing import Any
import numpy as np


def about_model(attributes: Mapping[str, Any]) -> dict[str, Any]:
  """Class names in label order and strides, of a pickled model's attributes, where they are what they should be."""
  known: dict[str, Any] = {}
  names, stride = attributes.get("names"), attributes.get("stride")
  if isinstance(names, dict) and set(names) == set(range(len(names))): names = [names[i] for i in range(len(names))]
  if isinstance(names, list) and names and all(isinstance(n, str) for n in names): known["class_names"] = names
  if isinstance(stride, np.ndarray) and stride.dtype.kind in "fi": known["stride"] = [float(s) for s in stride.reshape(-1)[:8]]
  return known


def is_yolo(tensors: Mapping[str, Any]) -> bool:
  """Whether tensors of these names are a YOLO network's: numbered layers, or meituan's parts."""
  return any(re.match(r"(model\.)?\d+\.|backbone\.stem\.", key) for key in tensors)


def canonical(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
  """`tensors` as the networks here have them, and notes: a bias before a norm becomes part of its mean (YOLOv12's `pe.conv.bias`), implicit knowledge
  of its convolution (YOLOv7's training files), convolutions in groups are written out (YOLOv9's own files) and renamed (YOLOv9's MIT files)."""
  tensors, notes = {k: v for k, v in tensors.items() if not k.endswith(("num_batches_tracked", "anc2vec.weight"))}, []
  if any(".heads.0.anchor_conv." in key for key in tensors): tensors = _from_mit(tensors)
  for key in [k for k in tensors if re.fullmatch(r"model\.22\.cv2\.\d\.[12](\.conv)?\.weight", k)]:
    inputs = len(tensors.get(f"{'.'.join(key.split('.')[:4])}.0.conv.weight", ()))
    if inputs > tensors[key].shape[1]: tensors[key] = _ungrouped(tensors[key], inputs // tensors[key].shape[1])
  for key in [k for k in tensors if k.endswith(".conv.bias") and f"{k[:-10]}.bn.running_mean" in tensors]:
    mean = f"{key[:-10]}.bn.running_mean"
    tensors[mean] = tensors[mean].astype(np.float32) - tensors.pop(key).astype(np.float32)
  if implicit := [key for key in tensors if re.fullmatch(r"model\.\d+\.i[am]\.\d\.implicit", key)]:
    _fold_implicit(tensors)
    notes.append(f"is a training file: {len(implicit)} implicit tensors became part of the head")
  for key in [k for k in tensors if re.fullmatch(r"model\.\d+\.anchor_grid", k)]:
    if "model.105.anchors" not in tensors: del tensors[key]   # older YOLOv5 files have it, of no use
  return tensors, notes


def _fold_implicit(tensors: dict[str, np.ndarray]) -> None:
  """m (W (x + a) + b) as one convolution: YOLOR's implicit knowledge (Wang et al. 2021), of every level of the head."""
  for weight in [k for k in tensors if re.fullmatch(r"model\.\d+\.m\.\d\.weight", k)]:
    head, level = weight.split(".m.")[0], weight.split(".")[3]
    added, factor = tensors.pop(f"{head}.ia.{level}.implicit", None), tensors.pop(f"{head}.im.{level}.implicit", None)
    bias, w = f"{head}.m.{level}.bias", tensors[weight].astype(np.float32)
    b = tensors[bias].astype(np.float32)
    if added is not None: b = b + w.reshape(len(w), -1) @ added.astype(np.float32).reshape(-1)
    if factor is not None: w, b = w * factor.astype(np.float32).reshape(-1, 1, 1, 1), b * factor.astype(np.float32).reshape(-1)
    tensors[weight], tensors[bias] = w, b


# The MIT files' names of a block's parts, and YOLOv9's own, in the order in which they are replaced.
_MIT = ((r"^(\d+)\.", r"model.\1."), (r"^(model\.\d+)\.conv\.(conv|bn)\.", r"\1.cv1.\2."),
        (r"\.heads\.(\d)\.anchor_conv\.(\d)", r".cv2.\1.\2"), (r"\.heads\.(\d)\.class_conv\.(\d)", r".cv3.\1.\2"),
        (r"\.bottleneck\.(\d+)\.conv1\.", r".m.\1.cv1.@"), (r"\.bottleneck\.(\d+)\.conv2\.", r".m.\1.cv2."),
        (r"(?<!@)\bconv([1-5])\.(?!weight|bias)", r"cv\1."), ("@", ""))


def _from_mit(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """YOLOv9 under its own names, from those of WongKinYiu/YOLO; the auxiliary branch, layers from 23 on, is for training only and left out."""
  renamed = {}
  for key, value in tensors.items():
    if not (match := re.match(r"(?:model\.)?(\d+)\.", key)) or int(match[1]) > 22: continue
    key = key.removeprefix("model.")
    for pattern, replacement in _MIT: key = re.sub(pattern, replacement, key)
    renamed[key] = value
  return renamed


def _ungrouped(weight: np.ndarray, groups: int) -> np.ndarray:
  """[Cout,Cin/groups,k,k] of a convolution in groups -> [Cout,Cin,k,k], zeros elsewhere."""
  out_channels, per_group, *kernel = weight.shape
  full = np.zeros((out_channels, per_group * groups, *kernel), np.float32)
  for g in range(groups):
    rows = slice(g * out_channels // groups, (g + 1) * out_channels // groups)
    full[rows, g * per_group:(g + 1) * per_group] = weight[rows]
  return full


def constant(key: str) -> bool:
  """Whether the tensor `key` is the same in every file, so that one may leave it out."""
  return key.endswith(("dfl.conv.weight", "detect.proj", "proj_conv.weight", "anchor_grid"))
