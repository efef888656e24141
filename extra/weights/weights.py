"""Weights: what a run writes, what a network starts from, and how a file from elsewhere is made to fit, by name and never in silence."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.errors import UserError
from tinydet import models
from tinydet.models import classifiers, densenet, fcos, retinanet
from tinydet.nn.init import set_all
from tinydet.weights import checkpoint, darknet_file, pretrained, torch_file, yolo_published, yolo_weights

WRITERS = {".pth": lambda path, tensors, about: torch_file.save(path, tensors), ".pt": lambda path, tensors, about: torch_file.save(path, tensors),
           ".safetensors": checkpoint.save}   # of plain files of weights, by suffix
SHIPPED = {name: Path(__file__).parent.parent / "models" / f"{name}.safetensors" for name in ("shapes", "shapes-yolo")}
WRAPPERS = ("model_ema", "ema", "state_dict", "model_state_dict", "model")   # where a training checkpoint keeps its weights; averages come first
EPS = 1e-5   # what a norm layer adds to its variance


def save_weights(path: Path, tensors: Mapping[str, Tensor | np.ndarray], metadata: dict, half: bool = False) -> None:
  """Write weights alone, under torchvision's keys; in half precision where `half` and the tensor is float32."""
  arrays = {k: t if isinstance(t, np.ndarray) else t.numpy() for k, t in tensors.items()}
  checkpoint.save(path, {k: a.astype(np.float16) if half and a.dtype == np.float32 else a for k, a in arrays.items()}, metadata)


def export_weights(name: str, architecture: str, out: str | Path, half: bool = False) -> tuple[str, dict[str, np.ndarray], list[str]]:
  """Write the weights `--weights name` as one plain file, of which the suffix, one of WRITERS, says the format. Returns the network's name, what was
  written, and notes. UserError where it is no network of this project."""
  path, tensors, about, notes = open_weights(name, architecture)
  if (network := models.recognise({key: tensor.shape for key, tensor in tensors.items()})) is None:
    raise UserError(f"{path}: is no network of this project")
  # torch's batch norms count their batches, and its strict loading asks for the count; frozen norms ignore it
  for key in [k for k in tensors if k.endswith("running_var")]: tensors.setdefault(key.replace("running_var", "num_batches_tracked"), np.array(0))
  if half: tensors = {k: v.astype(np.float16) if v.dtype.kind == "f" else v for k, v in tensors.items()}
  WRITERS[Path(out).suffix.lower()](Path(out), tensors, about | {"model": network})
  return network, tensors, notes


def find(name: str, architecture: str) -> tuple[Path, dict]:
  """The file behind `--weights name` for the network `architecture`, and what is known of it beside what it says itself.

  `name` is a key of SHIPPED, a published name (downloaded if need be), a file, or the folder of a run (its best weights). UserError otherwise."""
  if name in SHIPPED: return SHIPPED[name], {}
  if name in yolo_published.PUBLISHED:
    path, notes = yolo_published.fetch_published(name)
    for note in notes: print(f"note: {note}")
    return path, yolo_published.about(name)
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
  return path, pretrained.known_file(path)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict, list[str]]:
  """The weights in a file, under torchvision's current keys; its metadata, {} where it has none; and what a user should know, one line each.

  Reads safetensors (of a run or from elsewhere) and torch's formats, whole pickled models too, whatever the suffix, darknet's `.weights`, and never
  runs what is in them. Wrappers ("state_dict", "model", averages), the prefixes of DataParallel and torch.compile, torchvision's older names of the
  pyramid and heads, and what YOLO's authors write otherwise (see `yolo_weights.canonical`) are undone. UserError where the file is broken or holds no
  weights."""
  if path.suffix == ".weights":
    network, _, tensors = darknet_file.load(path)
    return tensors, {"model": network}, []
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
    wrapper = next((key for key in WRAPPERS if isinstance(tree.get(key), Mapping | torch_file.Module)), None)
    if wrapper is None: break
    if "ema" in wrapper: notes.append(f"{path.name}: takes its averaged weights ({wrapper})")
    tree = tree[wrapper]
  if isinstance(tree, torch_file.Module):
    metadata = {"from": tree.name} | yolo_weights.about_model(tree.about)
    tree = tree.tensors
  if not isinstance(tree, Mapping) or not any(isinstance(v, np.ndarray) for v in tree.values()):
    holds = f"holds {', '.join(map(repr, list(tree)[:5]))}" if isinstance(tree, Mapping) else f"is a {type(tree).__name__}"
    raise UserError(f"{path}: no weights found: it {holds}; save a state_dict, alone or under {', '.join(WRAPPERS)}")
  tree = {k: v for k, v in tree.items() if k != "n_averaged"}   # torch's AveragedModel counts its updates beside the weights
  if odd := [str(k) for k, v in tree.items() if not isinstance(k, str) or not isinstance(v, np.ndarray)]:
    raise UserError(f"{path}: {some(odd)} among its weights is no tensor")
  for prefix in ("module.", "_orig_mod.", "module."):
    if all(k.startswith(prefix) for k in tree): tree = {k.removeprefix(prefix): v for k, v in tree.items()}
  if yolo_weights.is_yolo(tree):
    tree, more = yolo_weights.canonical(tree)
    notes += [f"{path.name}: {line}" for line in more]
  current = fcos.current_key if fcos.MARK in tree else retinanet.current_key
  return {densenet.current_key(current(k)): v for k, v in tree.items()}, metadata if isinstance(metadata, dict) else {}, notes


def open_weights(name: str, architecture: str) -> tuple[Path, dict[str, np.ndarray], dict, list[str]]:
  """The file behind `--weights name` (see `find`), its tensors, what is known of it, and notes for the user (see `read`)."""
  path, known = find(name, architecture)
  tensors, metadata, notes = read(path)
  # Norms of a network that adds another constant to the variance: as part of the variance it needs no special network, here or in torchvision.
  if shift := known.get("eps", EPS) - EPS: tensors = {k: v + np.float32(shift) if k.endswith("running_var") else v for k, v in tensors.items()}
  return path, tensors, metadata | known, notes


def fit(model: Any, tensors: Mapping[str, np.ndarray], path: Path, class_names: Sequence[str] | None = None,
        known: Sequence[str] | None = None) -> list[str]:
  """Assign `tensors` to `model` and return what a user should know, one line each: a classifier starts the backbone of a detector, and other classes
  keep everything but the class logits. Every other tensor that is missing, unknown or misshapen is named in a UserError, and nothing is assigned.

  `class_names` are the model's classes and `known` those of the file, where each is known: a class of both keeps its logits."""
  wanted, tensors, notes = get_state_dict(model), dict(tensors), []
  body = getattr(model, "body", None)
  if is_backbone := body is not None and not any(k.startswith(body) for k in tensors) and any(f"{body}{k}" in wanted for k in tensors):
    unused = [k for k in tensors if k.startswith((*model.top, *classifiers.AUXILIARIES))]
    tensors = {f"{body}{k}": v for k, v in tensors.items() if k not in unused}
    notes.append(f"{path.name}: is a classifier; pyramid and heads start anew" + (f", {', '.join(unused)} not used" if unused else ""))
  else:   # torchvision and YOLOv9's authors leave auxiliary layers out of a network that is not to be trained
    def aside(keys: Any, others: Any) -> list[str]: return [k for k in keys if k.startswith(classifiers.AUXILIARIES) and k not in others]
    if extra := aside(tensors, wanted): notes.append(f"{path.name}: {some(extra)} not used")
    if alone := aside(wanted, tensors): notes.append(f"{path.name}: has no auxiliary layers, which start anew")
    tensors = {k: v for k, v in tensors.items() if k not in extra}
  def counts(key: str) -> bool: return key.endswith("num_batches_tracked")   # torch's frozen norms do not have them; they only count
  rows = {k: row for k, row in getattr(model, "class_rows", {}).items() if k in tensors and tensors[k].shape[1:] == wanted[k].shape[1:]}
  own = {k: wanted[k].numpy() for k in rows}
  if rows: tensors, note = _fit_classes(tensors, rows, own, path, class_names, known)
  if rows and note: notes.append(note)
  anew = _class_branches(model, tensors, wanted)
  if anew: notes.append(f"{path.name}: the class branches are of another width there, {len(anew)} tensors start anew")
  tensors = {k: v for k, v in tensors.items() if k not in anew}
  missing = [k for k in wanted if k not in tensors and k not in anew and not counts(k) and not yolo_weights.constant(k) and
             (k.startswith(body) if is_backbone else k not in alone)]
  unknown = [k for k in tensors if k not in wanted and not counts(k)]
  misshapen = [f"{k} {list(tensors[k].shape)}, here {list(t.shape)}" for k, t in wanted.items() if k in tensors and tensors[k].shape != t.shape]
  if missing or unknown or misshapen:
    lists = (("missing", missing), ("not known here", unknown), ("of another shape", misshapen))
    kind = models.recognise({k: v.shape for k, v in tensors.items()})
    differences = "; ".join(f"{len(keys)} {what} ({some(keys)})" for what, keys in lists if keys)
    raise UserError(f"{path}: {f'is a {kind} and ' if kind else ''}does not fit this network: {differences}")
  set_all((tensor, tensors[key]) for key, tensor in wanted.items() if key in tensors)
  return notes


def _class_branches(model: Any, tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Tensor]) -> set[str]:
  """The tensors behind the class logits that are as wide as the number of classes has it, where that is another one in the file."""
  prefixes = getattr(model, "class_branches", ())
  if not prefixes: return set()
  return {k for k, t in wanted.items() if k.startswith(prefixes) and k in tensors and tensors[k].shape != t.shape and len(t.shape) == tensors[k].ndim}


def _fit_classes(tensors: dict[str, np.ndarray], rows: Mapping[str, tuple[int, int]], own: Mapping[str, np.ndarray], path: Path,
                 class_names: Sequence[str] | None, known: Sequence[str] | None) -> tuple[dict[str, np.ndarray], str | None]:
  """`tensors` with the classes of the network whose values are `own`, and what to say of it."""
  key, (times, before) = next(iter(rows.items()))
  here, there = (array.shape[0] // times - before for array in (own[key], tensors[key]))
  if class_names is not None and known is not None and len(known) == there: labels = match_names(class_names, known)
  elif here == there:
    said = class_names is None or known is None
    return tensors, None if class_names is None or not said else f"{path.name}: does not say which {there} classes it knows: taken for the data's"
  else: labels = [None] * here
  if labels == list(range(there)): return tensors, None
  tensors = select_classes(tensors, rows, labels, own)
  if not any(label is not None for label in labels): return tensors, f"{path.name}: knows other classes, {some(list(rows), 2)} start anew"
  kept = [name for name, label in zip(class_names or (), labels) if label is not None]
  new = [name for name, label in zip(class_names or (), labels) if label is None]
  return tensors, f"{path.name}: knows {some(kept)}" + (f"; the class logits of {some(new)} start anew" if new else ", in another order")


def select_classes(tensors: Mapping[str, np.ndarray], rows: Mapping[str, tuple[int, int]], labels: Sequence[int | None],
                   own: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
  """The weights of a network whose class i is class `labels[i]` of the one with `tensors`; for None what it has in `own`, or without that a class
  that nothing is ever taken for. `rows` is the network's `class_rows`."""
  chosen = dict(tensors)
  for key, (times, before) in rows.items():
    values = (array := tensors[key]).reshape(times, -1, *array.shape[1:])
    fresh = None if own is None else own[key].reshape(times, -1, *array.shape[1:])
    nothing = np.full_like(values[:, 0], -100.0 if key.endswith("bias") else 0.0)
    picked = [values[:, before + label] if label is not None else nothing if fresh is None else fresh[:, before + i].astype(array.dtype)
              for i, label in enumerate(labels)]
    chosen[key] = np.concatenate([values[:, :before], np.stack(picked, 1)], 1).reshape(-1, *array.shape[1:])
  return chosen


def match_names(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
  """The place in `known` of each name in `wanted`, whatever its case, None where it is not there."""
  places = {name.strip().lower(): place for place, name in reversed(list(enumerate(known)))}
  return [places.get(name.strip().lower()) for name in wanted]


def load_weights(name: str, model: Any, architecture: str = "", class_names: Sequence[str] | None = None) -> list[str]:
  """Start `model` from `--weights name` (see `find`; a published name needs the builder name of the model), and return notes for the user
  (see `fit`)."""
  path, tensors, about, notes = open_weights(name, architecture)
  return notes + fit(model, tensors, path, class_names, about.get("class_names"))


def some(names: Sequence[str], most: int = 10) -> str:
  """The first names of a list, for a message."""
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
