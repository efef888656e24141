"""Networks only: tensors in, tensors out, under the parameter names of the files that were published for them."""
from collections.abc import Mapping
from typing import Any


def build_classifier(name: str, num_classes: int = 1000, seed: int = 0) -> Any:
  """The classifier that torchvision's builder `name` makes, initialised from `seed`: a call on a normalised batch f32 [B,3,H,W] (see
  `models.preprocess.normalize`) gives logits [B,num_classes], under `Context(TRAINING=1)` with dropout and the batch's statistics.

  `weights.load_weights("imagenet", model, name)` gives it its published weights. KeyError for another name, which names all."""
  from tinydet.models import classifiers
  return classifiers.build(name, num_classes, seed=seed)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """The builder name of the network whose tensors have these names and shapes; None if it is none of this project."""
  from tinydet.models import classifiers, fcos, retinanet, yolo
  found = yolo.recognise(shapes)
  return retinanet.recognise(shapes) or fcos.recognise(shapes) or classifiers.recognise(shapes) or (found and found[0])
