"""Weights: what a run writes, what a network starts from, and how a file from elsewhere is made to fit, by name and never in silence."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.errors import UserError
from tinydet.models import resnet, retinanet
from tinydet.nn.init import set_values
from tinydet.weights import checkpoint, pretrained, torch_file

SHIPPED = {"shapes": Path(__file__).parent.parent / "models" / "shapes.safetensors"}
WRAPPERS = ("model_ema", "ema", "state_dict", "model_state_dict", "model")   # where a training checkpoint keeps its weights; averages come first
EPS = 1e-5   # what a norm layer adds to its variance


def save_weights(path: Path, tensors: Mapping[str, Tensor | np.ndarray], metadata: dict, half: bool = False) -> None:
  """Write weights alone, under torchvision's keys; in half precision where `half` and the tensor is float32."""
  arrays = {k: t if isinstance(t, np.ndarray) else t.numpy() for k, t in tensors.items()}
  checkpoint.save(path, {k: a.astype(np.float16) if half and a.dtype == np.float32 else a for k, a in arrays.items()}, metadata)


def find(name: str, architecture: str) -> tuple[Path, dict]:
  """The file behind `--weights name` for the network `architecture`, and what is known of it beside what it says itself.

  `name` is a key of SHIPPED, a published name (downloaded if need be), a file, or the folder of a run (its best weights). UserError otherwise."""
  if name in SHIPPED: return SHIPPED[name], {}
  if name in pretrained.NAMES:
    entry = pretrained.published(name, architecture)
    return pretrained.fetch_published(entry), pretrained.about(entry)
  path = Path(name)
  if path.is_dir():
    best = path / "best.safetensors"
    if (found := best if best.is_file() else checkpoint.newest(path)) is None:
      raise UserError(f"--weights {name}: holds neither best.safetensors nor a checkpoint; is it the folder of a run?")
    return found, {}
  if not path.is_file():
    raise UserError(f"--weights {name}: no such file or run; give none, {', '.join([*SHIPPED, *pretrained.NAMES])}, a file or the folder of a run")
  return path, {}


def read(path: Path) -> tuple[dict[str, np.ndarray], dict, list[str]]:
  """The weights in a file, under torchvision's current keys; its metadata, {} where it has none; and what a user should know, one line each.

  Reads safetensors (of a run or from elsewhere) and torch's formats, whatever the suffix, and never runs what is in them. Wrappers ("state_dict",
  "model", averages), the prefixes of DataParallel and torch.compile, and torchvision's older names of the pyramid and heads are undone.
  UserError where the file is broken or holds no weights."""
  with open(path, "rb") as f: start = f.read(9)
  # a safetensors file begins with its header's length, whose high bytes are 0, and a JSON object; torch's begin with "PK", a pickle or a tar entry
  if path.suffix == ".safetensors" or (start[5:8] == b"\0\0\0" and start[8:] == b"{"): tree, metadata = checkpoint.load(path)
  else: tree, metadata = torch_file.load(path), {}
  notes: list[str] = []
  if isinstance(tree, Mapping) and any(k.startswith("optimizer.") for k in tree if isinstance(k, str)):   # a checkpoint of a run
    average = {k.removeprefix("optimizer.ema."): v for k, v in tree.items() if k.startswith("optimizer.ema.")}
    tree = {k.removeprefix("model."): v for k, v in tree.items() if k.startswith("model.")} | average
  for _ in WRAPPERS:
    if not isinstance(tree, Mapping) or any(isinstance(v, np.ndarray) for v in tree.values()): break
    wrapper = next((key for key in WRAPPERS if isinstance(tree.get(key), Mapping)), None)
    if wrapper is None: break
    if "ema" in wrapper: notes.append(f"{path.name}: takes its averaged weights ({wrapper})")
    tree = tree[wrapper]
  if not isinstance(tree, Mapping) or not any(isinstance(v, np.ndarray) for v in tree.values()):
    holds = f"holds {', '.join(map(repr, list(tree)[:5]))}" if isinstance(tree, Mapping) else f"is a {type(tree).__name__}"
    raise UserError(f"{path}: no weights found: it {holds}; save a state_dict, alone or under {', '.join(WRAPPERS)}")
  tree = {k: v for k, v in tree.items() if k != "n_averaged"}   # torch's AveragedModel counts its updates beside the weights
  if odd := [str(k) for k, v in tree.items() if not isinstance(k, str) or not isinstance(v, np.ndarray)]:
    raise UserError(f"{path}: {_some(odd)} among its weights is no tensor")
  for prefix in ("module.", "_orig_mod.", "module."):
    if all(k.startswith(prefix) for k in tree): tree = {k.removeprefix(prefix): v for k, v in tree.items()}
  return {retinanet.current_key(k): v for k, v in tree.items()}, metadata if isinstance(metadata, dict) else {}, notes


def open_weights(name: str, architecture: str) -> tuple[Path, dict[str, np.ndarray], dict, list[str]]:
  """The file behind `--weights name` (see `find`), its tensors, what is known of it, and notes for the user (see `read`)."""
  path, known = find(name, architecture)
  tensors, metadata, notes = read(path)
  # Norms of a network that adds another constant to the variance: as part of the variance it needs no special network, here or in torchvision.
  if shift := known.get("eps", EPS) - EPS: tensors = {k: v + np.float32(shift) if k.endswith("running_var") else v for k, v in tensors.items()}
  return path, tensors, metadata | known, notes


def fit(model: Any, tensors: Mapping[str, np.ndarray], path: Path) -> list[str]:
  """Assign `tensors` to `model` and return what a user should know, one line each: a classifier starts the backbone of a detector, and another number
  of classes keeps everything but the class logits. Every other tensor that is missing, unknown or misshapen is named in a UserError, and nothing is
  assigned."""
  wanted, tensors, notes = get_state_dict(model), dict(tensors), []
  if is_backbone := "backbone.body.conv1.weight" in wanted and "conv1.weight" in tensors:
    unused = [k for k in tensors if k.startswith("fc.")]
    tensors = {f"backbone.body.{k}": v for k, v in tensors.items() if k not in unused}
    notes.append(f"{path.name}: is a classifier; pyramid and heads start anew" + (f", {', '.join(unused)} not used" if unused else ""))
  def counts(key: str) -> bool: return key.endswith("num_batches_tracked")   # torch's frozen norms do not have them; they only count
  logits = [k for k, t in wanted.items() if ("cls_logits" in k or k.startswith("fc.")) and k in tensors and tensors[k].shape != t.shape and
            tensors[k].shape[1:] == t.shape[1:]]
  missing = [k for k in wanted if k not in tensors and not counts(k) and (not is_backbone or k.startswith("backbone.body."))]
  unknown = [k for k in tensors if k not in wanted and not counts(k)]
  misshapen = [f"{k} {list(tensors[k].shape)}, here {list(t.shape)}" for k, t in wanted.items()
               if k in tensors and k not in logits and tensors[k].shape != t.shape]
  if missing or unknown or misshapen:
    lists = (("missing", missing), ("not known here", unknown), ("of another shape", misshapen))
    kind = retinanet.recognise(shapes := {k: v.shape for k, v in tensors.items()}) or resnet.recognise(shapes)
    differences = "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in lists if keys)
    raise UserError(f"{path}: {f'is a {kind} and ' if kind else ''}does not fit this network: {differences}")
  if logits: notes.append(f"{path.name}: knows other classes, {', '.join(logits)} start anew")
  for key, tensor in wanted.items():
    if key in tensors and key not in logits: set_values(tensor, tensors[key])
  return notes


def load_weights(name: str, model: Any, architecture: str = "") -> list[str]:
  """Start `model` from `--weights name` (see `find`; a published name needs the builder name of the model), and return notes for the user
  (see `fit`)."""
  path, tensors, _, notes = open_weights(name, architecture)
  return notes + fit(model, tensors, path)


def open_detector(name: str, architecture: str = "retinanet_resnet50_fpn",
                  class_names: list[str] | None = None) -> tuple[retinanet.RetinaNet, dict, list[str]]:
  """A detector ready to use from `--weights name`, which of a file needs no more than its tensors: `(model, about, notes)`.

  `architecture` matters for published names only. With `class_names` the detector has just these classes in this order, matched to its own by name
  where it knows them; a class that it never learnt is never found. `about` holds "model" (builder name), "num_classes", "norm", "weights" (the file)
  and, where known, "class_names", "category_ids", "size" [width, height], "max_size", "mAP". UserError where it is no detector of this project."""
  path, tensors, about, notes = open_weights(name, architecture)
  shapes = {k: t.shape for k, t in tensors.items()}
  if (built := retinanet.recognise(shapes)) is None:
    kind = resnet.recognise(shapes)
    what = f"is a classifier, {kind}" if kind else f"is no RetinaNet of this project, its first tensors are {_some(sorted(shapes))}"
    raise UserError(f"{path}: {what}; give the weights of a detector")
  num_anchors = shapes["head.regression_head.bbox_reg.weight"][0] // 4
  num_classes = shapes["head.classification_head.cls_logits.weight"][0] // num_anchors
  about |= {"model": built, "weights": str(path)}
  if class_names is not None:
    tensors = retinanet.select_classes(tensors, labels := _labels(path, class_names, about.get("class_names"), num_classes))
    if unknown := [n for n, label in zip(class_names, labels) if label is None]:
      notes.append(f"{path.name}: never learnt {_some(unknown)}: not to be found")
    about |= {"class_names": class_names, "category_ids": None}
    num_classes = len(class_names)
  norm = "frozen" if "backbone.body.bn1.running_mean" in shapes else "group"
  model = retinanet.build(built, num_classes, norm)
  notes += fit(model, tensors, path)
  return model, about | {"num_classes": num_classes, "norm": norm}, notes


def _labels(path: Path, wanted: list[str], known: list[str] | None, num_classes: int) -> list[int | None]:
  """A detector's own label of each class in `wanted`."""
  if known is None:
    if len(wanted) == num_classes: return list(range(num_classes))
    raise UserError(f"{path}: has {num_classes} classes, does not say which, and the data has {len(wanted)}")
  labels = {name.strip().lower(): label for label, name in reversed(list(enumerate(known)))}
  found = [labels.get(name.strip().lower()) for name in wanted]
  if not any(label is not None for label in found): raise UserError(f"{path}: knows {_some(known)}, and none of the data's {_some(wanted)}")
  return found


def _some(names: list[str], most: int = 10) -> str:
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
