"""The random numbers of a run, which dropout, drop path and whatever else calls `Tensor.rand` draw from: state, to be saved and restored.

tinygrad counts on each device the numbers drawn, in a tensor beside the seed. A captured graph advances it like any other state that is there
before."""
import zlib
import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinydet.parts import take

_parts = take("tinygrad:Tensor._next_counter", "tinygrad:Tensor._device_seeds", "tinygrad:Tensor._device_rng_counters",
              instead="random numbers in captured graphs repeat, and are not resumed")


def prepare(*devices: str) -> None:
  """Make ready to draw on the default device and on these."""
  if not _parts: return
  for device in dict.fromkeys(Device.canonicalize(device) for device in (Device.DEFAULT, *devices)):
    if device not in Tensor._device_seeds:
      Tensor._next_counter(device, 0)   # which makes seed and counter, and an update that is not wanted
      Tensor._device_rng_counters[device] = Tensor([0, 0], device=device, dtype=dtypes.uint32)
    Tensor.realize(Tensor._device_seeds[device], Tensor._device_rng_counters[device])


def seed(value: int, rank: int = 0) -> None:
  """Begin anew, as after `Tensor.manual_seed(value)`; a process of another `rank` draws other numbers. Captured graphs go on with the new ones."""
  before = dict(Tensor._device_seeds) if _parts else {}, dict(Tensor._device_rng_counters) if _parts else {}
  Tensor.manual_seed(value if rank == 0 else zlib.crc32(f"{value} {rank}".encode()))
  prepare(*before[0])
  for old, new in zip(before, (Tensor._device_seeds, Tensor._device_rng_counters) if _parts else ()):
    for device, tensor in old.items():
      tensor.assign(new[device]).realize()
      new[device] = tensor


def state() -> dict[str, np.ndarray]:
  """By "random." and device, u32 [4]: its seed and how many numbers were drawn, two words each, low ones first for the count. The default device's is
  random.0, those after it random.1 and so on, whatever their kind."""
  prepare()
  if not _parts: return {}
  return {f"random.{_number(device)}": np.concatenate([key.numpy(), Tensor._device_rng_counters[device].numpy()]).astype(np.uint32)
          for device, key in Tensor._device_seeds.items()}


def restore(arrays: dict[str, np.ndarray], rank: int = 0) -> None:
  """Go on after `state` gave `arrays`, in which other names are passed over. It is rank 0's: those of another `rank` keep the seed that `seed` gave
  them."""
  wanted = {name.removeprefix("random."): values for name, values in arrays.items() if name.startswith("random.")}
  if not _parts or not wanted: return
  kind, _, first = Device.DEFAULT.partition(":")
  names = {number: f"{kind}:{int(first or 0) + int(number)}" if number.isdigit() else number for number in wanted}
  prepare(*names.values())
  for number, values in wanted.items():
    device = Device.canonicalize(names[number])
    for tensor, words in ((Tensor._device_seeds[device], values[:2] if rank == 0 else None), (Tensor._device_rng_counters[device], values[2:])):
      if words is not None: tensor.assign(Tensor(np.ascontiguousarray(words, np.uint32), device=device)).realize()


def _number(device: str) -> str:
  """A device of the default one's kind by its distance from it, another by its name."""
  (kind, _, number), (default, _, first) = device.partition(":"), Device.DEFAULT.partition(":")
  return str(int(number or 0) - int(first or 0)) if kind == default else device
