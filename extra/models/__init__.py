"""Networks only: tensors in, tensors out, under the parameter names of the files that were published for them."""
from collections.abc import Mapping


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """The builder name of the network whose tensors have these names and shapes; None if it is none of this project."""
  from tinydet.models import resnet, retinanet, yolo
  found = yolo.recognise(shapes)
  return retinanet.recognise(shapes) or resnet.recognise(shapes) or (found and found[0])
