"""Detectors by name, and which one a file of weights belongs to. `Detector` is what every program asks of one; a family is a module here with
`NAMES`, `build(name, num_classes, **options)` and `recognise(shapes)`."""
import difflib, re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from tinydet import models
from tinydet.detectors import fcos, retinanet, yolo
from tinydet.detectors.detector import Detector, Predicted, Preprocessing
from tinydet.errors import UserError
from tinydet.models import retinanet as networks
from tinydet.weights import pretrained, weights, yolo_published

__all__ = ["FAMILIES", "Detector", "Predicted", "Preprocessing", "best_start", "build", "known_names", "open_detector", "recognise", "start"]
FAMILIES = [retinanet, fcos, yolo]


def known_names() -> list[str]:
  """All names that `build` takes."""
  return [name for family in FAMILIES for name in family.NAMES]


def build(name: str, num_classes: int, **options: Any) -> Detector:
  """The detector `name` with fresh weights; options are its family's. Its `network` is what `get_state_dict` takes, its `predict(images)` gives all
  candidates. ValueError for a name that no family knows."""
  for family in FAMILIES:
    if name in family.NAMES: return family.build(name, num_classes, **options)
  raise ValueError(f"{name!r} is no detector{_mend(name)}")


def known(name: str) -> str:
  """Parse the name of a detector. For `option(parse=known)`."""
  if name not in known_names(): raise ValueError(f"no such detector{_mend(name)}")
  return name


def _mend(name: str) -> str:
  close = difflib.get_close_matches(name, known_names(), 3)
  if close: return f"; did you mean {', '.join(close)}?"
  kinds = dict.fromkeys(re.sub(r"^([a-z]+)_\w+_fpn", r"\1_BACKBONE_fpn", known) for known in known_names())   # one for seventy backbones
  return f": choose from {', '.join(kinds)}; docs/networks.md has the backbones"


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int, dict[str, Any]] | None:
  """Name, number of classes and options for `build` of the detector whose tensors have these names and shapes; None where there is none."""
  return next((found for family in FAMILIES if (found := family.recognise(shapes)) is not None), None)


def published_name(weights_name: str, variant: str = "v1") -> str:
  """The detector that a published name of weights stands for; `variant` is which of torchvision's "coco" is: RetinaNet v1 or v2, or fcos."""
  if weights_name in known_names(): return weights_name
  if variant == "fcos": return "fcos_resnet50_fpn"
  return f"retinanet_{'resnext50_32x4d' if weights_name == 'mlperf' else 'resnet50'}_fpn" + "_v2" * (variant == "v2")


def open_detector(name: str, variant: str = "v1", class_names: Sequence[str] | None = None) -> tuple[Detector, dict[str, Any], list[str]]:
  """A detector ready to use from `--weights name`, which of a file needs no more than its tensors: `(detector, about, notes)`.

  `variant` is which of torchvision's networks "coco" is. With `class_names` the detector has just these classes in this order, matched to its own
  by name where it knows them; a class that it never learnt is never found. `about` holds what the file says of itself, and "model" (builder name),
  "num_classes", "weights" (the file) and, where known, "class_names", "category_ids", "size" [width, height], "max_size", "mAP". UserError where it
  is no detector of this project."""
  path, tensors, about, notes = weights.open_weights(name, published_name(name, variant))
  shapes = {k: t.shape for k, t in tensors.items()}
  if (found := recognise(shapes)) is None:
    kind = models.recognise(shapes)
    what = f"is a classifier, {kind}" if kind else f"is no detector of this project, its first tensors are {weights.some(sorted(shapes))}"
    raise UserError(f"{path}: {what}; give the weights of a detector")
  model = about["model"] if about.get("model") in networks.variants(shapes) else found[0]   # the shapes of some are those of v1 and v2
  detector = build(model, found[1], **found[2])
  notes += weights.fit(detector.network, tensors, path)
  detector.assume(about)
  about |= {"weights": str(path)}
  if detector.usual_size is not None: about.setdefault("size", list(detector.usual_size))
  if detector.class_names is not None: about.setdefault("class_names", detector.class_names)
  if class_names is not None:
    labels = _labels(path, class_names, about.get("class_names"), detector.num_classes)
    if unknown := [n for n, label in zip(class_names, labels) if label is None]:
      notes.append(f"{path.name}: never learnt {weights.some(unknown)}: not to be found")
    about |= {"class_names": list(class_names), "category_ids": None}
    detector.choose(labels)
  return detector, about | detector.about(), notes


def start(detector: Detector, name: str, class_names: Sequence[str]) -> list[str]:
  """Let `detector`, for `class_names`, begin with `--weights name`, a detector's or its backbone's; returns notes for the user. A class that the file
  knows by name keeps its logits, another one's start anew. UserError where the file does not fit."""
  path, tensors, about, notes = weights.open_weights(name, detector.name)
  shapes = {k: t.shape for k, t in tensors.items()}
  known = about.get("class_names")
  if recognise(shapes) is not None: detector.assume(about)
  else: detector.assume_input(about)
  return notes + weights.fit(detector.network, tensors, path, list(class_names), list(known) if known else None)


def best_start(architecture: str) -> tuple[str, str]:
  """What `--weights auto` is for a network: the best weights that are published for it or its backbone and can be had, else what ships with the code,
  else "none"; and why, in words for the user."""
  failed = []
  for name, why in _starts(architecture):
    try: weights.find(name, architecture)
    except UserError as e: failed.append(f"{name} ({e})")
    else: return name, why + f"; not to be had: {'; '.join(failed)}" * bool(failed)
  what = f"not to be had: {'; '.join(failed)}" if failed else f"nothing is published for {architecture}"
  return "none", f"random ones, which need far more pictures and epochs; {what}"


def _starts(architecture: str) -> list[tuple[str, str]]:
  """Names that `--weights` takes and that fit a network, the best first, and what they are."""
  if architecture in yolo_published.PUBLISHED: return [(architecture, "its authors', of COCO")]
  shipped = {"retinanet_resnet10_quarter_fpn": "shapes", "yolov8t": "shapes-yolo"}
  if architecture in shipped: return [(shipped[architecture], "which ship with the code and know simple shapes")]
  backbone, found = architecture.removeprefix("retinanet_").removeprefix("fcos_").removesuffix("_v2").removesuffix("_fpn"), []
  for entry in sorted(pretrained.PUBLISHED, key=lambda e: e.score, reverse=True):
    if entry.architecture == architecture: found.insert(0, (entry.name, f"a detector of this network, mAP {entry.score:g} on its own data"))
  for entry in pretrained.PUBLISHED:
    if entry.architecture == backbone and entry.name == "imagenet": found.append((entry.name, "a classifier for its backbone"))
  return found


def _labels(path: Path, wanted: Sequence[str], known: Sequence[str] | None, num_classes: int) -> list[int | None]:
  """A detector's own label of each class in `wanted`."""
  if known is None:
    if len(wanted) == num_classes: return list(range(num_classes))
    raise UserError(f"{path}: has {num_classes} classes, does not say which, and the data has {len(wanted)}")
  found = weights.match_names(wanted, known)
  if not any(label is not None for label in found):
    raise UserError(f"{path}: knows {weights.some(known)}, and none of the data's {weights.some(wanted)}")
  return found
