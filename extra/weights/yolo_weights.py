"""Weights of the YOLO family from the files that its authors publish, by name and never in silence."""
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
import numpy as np
from tinygrad.nn.state import get_state_dict
from tinydet.errors import UserError
from tinydet.models import yolo
from tinydet.nn.init import assign
from tinydet.weights import checkpoint, darknet_file, torch_file

WRAPPERS = ("model_ema", "ema", "state_dict", "model_state_dict", "model")   # where a training checkpoint keeps its weights; averages come first


class Opened(NamedTuple):
  """What a file of YOLO weights holds: the network's name and number of classes, its tensors under the network's names, what else is known
  ("class_names", "stride", "from"), and what a user should know, one line each."""
  name: str
  num_classes: int
  tensors: dict[str, np.ndarray]
  about: dict[str, Any]
  notes: list[str]


def open_file(path: Path, name: str | None = None) -> Opened:
  """Read a file of weights: darknet's `.weights`, torch's formats (a state dict, wrapped or not, or a whole pickled model, of which nothing is run),
  or safetensors. `name` says which network it should be. UserError, one line, where it is broken, of no network here, or of another than `name`."""
  if path.suffix == ".weights":
    found, num_classes, tensors = darknet_file.load(path, name)
    return Opened(found, num_classes, tensors, {}, [])
  tensors, about, notes = read(path)
  tensors, more = canonical(tensors)
  recognised = yolo.recognise({key: value.shape for key, value in tensors.items()})
  if recognised is None: raise UserError(f"{path}: is no YOLO network of this project; its first tensors are {_some(sorted(tensors))}")
  if name is not None and name != recognised[0]: raise UserError(f"{path}: is of {recognised[0]}, not of {name}")
  return Opened(*recognised, tensors, about, notes + [f"{path.name}: {line}" for line in more])


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
  """The tensors in a file of torch's or of safetensors, what is known of them, and notes. Wrappers and a DataParallel's prefix are undone."""
  with open(path, "rb") as f: start = f.read(9)
  if path.suffix == ".safetensors" or (start[5:8] == b"\0\0\0" and start[8:] == b"{"):
    tree, metadata = checkpoint.load(path)
    return {key.removeprefix("model.") if key.startswith("model.model.") else key: value for key, value in tree.items()}, dict(metadata or {}), []
  tree, notes = torch_file.load(path), []
  for _ in WRAPPERS:
    if not isinstance(tree, Mapping) or any(isinstance(value, np.ndarray) for value in tree.values()): break
    wrapper = next((key for key in WRAPPERS if isinstance(tree.get(key), Mapping | torch_file.Module)), None)
    if wrapper is None: break
    if "ema" in wrapper: notes.append(f"{path.name}: takes its averaged weights ({wrapper})")
    tree = tree[wrapper]
  about: dict[str, Any] = {}
  if isinstance(tree, torch_file.Module):
    about = {"from": tree.name} | _about(tree.about)
    tree = tree.tensors
  if not isinstance(tree, Mapping) or not tree or not all(isinstance(k, str) and isinstance(v, np.ndarray) for k, v in tree.items()):
    raise UserError(f"{path}: no weights found: neither a state_dict nor a model, alone or under {', '.join(WRAPPERS)}")
  if all(key.startswith("module.") for key in tree): tree = {key.removeprefix("module."): value for key, value in tree.items()}
  return dict(tree), about, notes


def _about(attributes: dict[str, Any]) -> dict[str, Any]:
  """Class names in label order and strides, of a pickled model's attributes, where they are what they should be."""
  known: dict[str, Any] = {}
  names, stride = attributes.get("names"), attributes.get("stride")
  if isinstance(names, dict) and set(names) == set(range(len(names))): names = [names[i] for i in range(len(names))]
  if isinstance(names, list) and names and all(isinstance(n, str) for n in names): known["class_names"] = names
  if isinstance(stride, np.ndarray) and stride.dtype.kind in "fi": known["stride"] = [float(s) for s in stride.reshape(-1)[:8]]
  return known


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


def fit(network: Any, tensors: Mapping[str, np.ndarray], path: Path) -> None:
  """Assign `tensors` to `network`. UserError, in one line, names all that is missing, not known or of another shape, and a wrong number of classes;
  nothing is assigned then."""
  wanted = {key: t for key, t in get_state_dict(network).items() if not key.endswith("num_batches_tracked")}
  classes = [yolo.count_classes({k: t.shape for k, t in side.items()}) for side in (tensors, wanted)]
  if None not in classes and classes[0] != classes[1]: raise UserError(f"{path}: has {classes[0]} classes, and this network {classes[1]}")
  lists = (("missing", [k for k in wanted if k not in tensors and not constant(k)]), ("not known here", [k for k in tensors if k not in wanted]),
           ("of another shape", [f"{k} {list(tensors[k].shape)}, here {list(t.shape)}" for k, t in wanted.items()
                                 if k in tensors and tensors[k].shape != t.shape]))
  if any(keys for _, keys in lists):
    kind = yolo.recognise({k: v.shape for k, v in tensors.items()})
    differences = "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in lists if keys)
    raise UserError(f"{path}: {f'is {kind[0]} and ' if kind else ''}does not fit this network: {differences}")
  for key, tensor in wanted.items():
    if key in tensors: assign(tensor, tensors[key])


def constant(key: str) -> bool:
  """Whether the tensor `key` is the same in every file, so that one may leave it out."""
  return key.endswith(("dfl.conv.weight", "detect.proj", "proj_conv.weight", "anchor_grid"))


def _some(names: list[str], most: int = 10) -> str:
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
