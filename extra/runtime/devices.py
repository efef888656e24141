"""One process, several devices: parameters on each, the batch divided among them, by tinygrad's own sharded tensors."""
import dataclasses, os
import numpy as np
from tinygrad import Device, Tensor
from tinydet.errors import UserError
from tinydet.nn.init import put
from tinydet.nn.kernel_cpu import on_host
from tinydet.parts import take
from tinydet.runtime.mpi import Ranks


_default = take("tinygrad.helpers:DEV", instead="processes of one machine need a CUDA_VISIBLE_DEVICES of their own each")
_parts = take("tinygrad.dtype:_to_np_dtype", "tinygrad:UOp.has_buffer_identity", instead="results are copied from the CPU device the slow way")


def devices(count: int) -> tuple[str, ...]:
  """The default device and the `count` - 1 after it; UserError where one cannot be opened."""
  kind, _, first = Device.DEFAULT.partition(":")
  names = tuple(f"{kind}:{int(first or 0) + i}" if i else Device.DEFAULT for i in range(count))
  for name in names:
    try: Device[name]
    except Exception as e: raise UserError(f"--gpus {count}: device {name} cannot be opened ({str(e).splitlines()[0] or type(e).__name__})") from e
  return tuple(Device.canonicalize(name) for name in names)


def take_devices(ranks: Ranks, count: int) -> None:
  """Make the default device of process number r of a machine the one numbered r * `count`, so that each has `count` to itself.

  Nothing is done on a processor, and where CUDA_VISIBLE_DEVICES or its like already shows this process `count` devices. UserError where there are too
  few."""
  if not (first := ranks.local_rank * count) or on_host(Device.DEFAULT): return
  shown = next((v for v in map(os.environ.get, ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")) if v), None)
  if shown is not None and len(shown.split(",")) == count: return
  name = f"{Device.DEFAULT.partition(':')[0]}:{first}"
  try: Device[name]
  except Exception as e:
    raise UserError(f"--gpus {count}: rank {ranks.rank} is process {ranks.local_rank} of {ranks.local_size} on {ranks.host} and would begin with "
                    f"device {name}, which cannot be opened ({str(e).splitlines()[0] or type(e).__name__}); start fewer processes a machine") from e
  if not _default: raise UserError(f"--gpus {count}: give each process its own devices, by CUDA_VISIBLE_DEVICES")
  DEV, = _default
  # the target that the user asked for stays behind it, as that names the renderer
  DEV.value = [dataclasses.replace(DEV.value[0], device=name), *DEV.value]


def replicate(tensors: list[Tensor], names: tuple[str, ...]) -> None:
  """Put a copy of each tensor on each device, in place."""
  if tensors: Tensor.realize(*tensors)   # first of all, as tinygrad 0.14 cannot copy arrays of several shapes to OpenCL devices in one go
  if tensors and len(names) > 1: Tensor.realize(*(tensor.shard_(names) for tensor in tensors))


def to_devices(array: np.ndarray, names: tuple[str, ...]) -> Tensor:
  """Host [B,...] -> a realised tensor whose first axis is divided among the devices; B must be a multiple of their number."""
  array = np.ascontiguousarray(array)
  return put(array, names[0]) if len(names) == 1 else Tensor(array).shard(names, axis=0).realize()


def to_host(tensor: Tensor) -> np.ndarray:
  """A copy of a realised tensor's values."""
  if not _parts or tensor.device != "CPU" or not tensor.numel() or not tensor.uop.has_buffer_identity(): return tensor.numpy()
  dtype = np.dtype(_parts[0](tensor.dtype))
  if dtype.itemsize != tensor.dtype.itemsize: return tensor.numpy()   # numpy has no bfloat16, float32 stands for it
  memory = tensor.uop.base.buffer.ensure_allocated().as_memoryview(force_zero_copy=True)
  return np.frombuffer(memory, dtype).reshape(tensor.shape).copy()
