"""One process, several devices: parameters on each, the batch divided among them, by tinygrad's own sharded tensors."""
import numpy as np
from tinygrad import Device, Tensor
from extra.errors import UserError


def devices(count: int) -> tuple[str, ...]:
  """The first `count` devices of the default kind; UserError where one cannot be opened."""
  names = tuple(f"{Device.DEFAULT.split(':')[0]}:{i}" if i else Device.DEFAULT for i in range(count))
  for name in names:
    try: Device[name]
    except Exception as e: raise UserError(f"--gpus {count}: device {name} cannot be opened ({str(e).splitlines()[0] or type(e).__name__})") from e
  return tuple(Device.canonicalize(name) for name in names)


def replicate(tensors: list[Tensor], names: tuple[str, ...]) -> None:
  """Put a copy of each tensor on each device, in place."""
  if len(names) > 1:
    for tensor in tensors: tensor.shard_(names)
  Tensor.realize(*tensors)


def to_devices(array: np.ndarray, names: tuple[str, ...]) -> Tensor:
  """Host [B,...] -> a realised tensor whose first axis is divided among the devices; B must be a multiple of their number."""
  tensor = Tensor(np.ascontiguousarray(array), device=names[0]) if len(names) == 1 else Tensor(np.ascontiguousarray(array)).shard(names, axis=0)
  return tensor.realize()
