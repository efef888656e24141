"""darknet's `.weights` files: a header and one row of float32, without names. Which network it is for shows in its length."""
import struct
from collections.abc import Mapping
from pathlib import Path
import numpy as np
from tinydet.errors import UserError
from tinydet.models import darknet, yolo
from tinydet.weights.checkpoint import whole_file

MOST_CLASSES = 10_000


def load(path: Path, name: str | None = None) -> tuple[str, int, dict[str, np.ndarray]]:
  """The network's name, its number of classes, and its tensors by name, read-only views of the file's content.

  The file's length says which of the five networks it is for, with 80 classes first, else with any number; `name` says which one to take it for.
  UserError where it is none or another. The header is int32 major, minor, revision, then the pictures seen: 8 bytes from version 0.2 on, 4 before."""
  try: data = path.read_bytes()
  except OSError as e: raise UserError(f"cannot read {path}: {e.strerror or e}") from e
  if len(data) < 20: raise UserError(f"{path}: is cut short: {len(data)} bytes are no darknet weights")
  major, minor, _ = struct.unpack_from("<3i", data)
  if not (0 <= major < 1000 and 0 <= minor < 1000): raise UserError(f"{path}: is no file of darknet's weights: it claims version {major}.{minor}")
  start = 20 if major * 10 + minor >= 2 else 16
  floats, odd = divmod(len(data) - start, 4)
  fitting = [] if odd else _fitting(floats)
  found = next((pair for pair in fitting if name in (None, pair[0])), None)
  if found is None:
    what = f"is of {fitting[0][0]}, not of {name}" if fitting else f"holds {floats} numbers, which are the weights of no network here " \
           f"({', '.join(f'{n} has {_floats(n, 80)}' for n in darknet.NETWORKS)}); it is another network's, or cut short"
    raise UserError(f"{path}: {what}")
  values, tensors, at = np.frombuffer(data, "<f4", floats, start), {}, 0
  for key, shape in _layout(*found):
    size = int(np.prod(shape))
    tensors[key], at = values[at:at + size].reshape(shape), at + size
  return *found, tensors


def save(path: str | Path, name: str, tensors: Mapping[str, np.ndarray], seen: int = 0) -> None:
  """Write the tensors of the darknet network `name` as a `.weights` file, version 0.2.5; whole or not at all."""
  num_classes = yolo.count_classes({key: value.shape for key, value in tensors.items()})
  if name not in darknet.NETWORKS or num_classes is None: raise ValueError(f"{name!r} is no network of darknet's with a YOLO head")
  with whole_file(Path(path)) as f:
    f.write(struct.pack("<3iq", 0, 2, 5, seen))
    for key, _ in _layout(name, num_classes): f.write(np.ascontiguousarray(tensors[key], "<f4").tobytes())


def _layout(name: str, num_classes: int) -> list[tuple[str, tuple[int, ...]]]:
  """Names and shapes in a file's order."""
  return [(key, tensor.shape) for key, tensor in darknet.tensors_in_order(yolo.made(name, num_classes))]


def _floats(name: str, num_classes: int) -> int:
  return sum(int(np.prod(shape)) for _, shape in _layout(name, num_classes))


def _fitting(floats: int) -> list[tuple[str, int]]:
  """(name, number of classes) of the networks with so many numbers, those of 80 classes first. Each class adds the same to a network."""
  found = []
  for name in darknet.NETWORKS:
    one, two = _floats(name, 1), _floats(name, 2)
    more, odd = divmod(floats - one, two - one)
    if not odd and 0 <= more < MOST_CLASSES: found.append((name, 1 + more))
  return sorted(found, key=lambda pair: pair[1] != 80)
