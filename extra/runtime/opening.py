"""What opening a device need not wait for: half a second of every start.

tinygrad 0.14 spells four small kernels whenever it opens its CPU device, which only the queues between devices run, and imports all that drives
the GPUs of each maker to find out that there is none."""
import os, sys, threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from tinydet.parts import take

# What each kind of GPU is found by on Linux, under /: a file of its driver or a folder of devices; of these, the file that names the maker, and the
# numbers of makers. AMD's also sit behind a USB controller; NVIDIA's driver has other files on Jetsons and on Windows' Linux.
_NVIDIA: tuple = ("dev/nvidiactl", "dev/nvmap", "dev/dxg", ("sys/bus/pci/devices", "vendor", {"0x10de"}))
SIGNS: dict[str, tuple] = {
  "NV": _NVIDIA, "CUDA": _NVIDIA, "QCOM": ("dev/kgsl-3d0",),
  "AMD": ("dev/kfd", ("sys/bus/pci/devices", "vendor", {"0x1002"}), ("sys/bus/usb/devices", "idVendor", {"add1", "3801"}))}


def use_in_cpu(module: ModuleType) -> None:
  """Let `module`, tinygrad's of the CPU device, spell the kernels of its queues when the first of them is run."""
  parts = take("tinygrad.runtime.ops_cpu:CPUProgram", "tinygrad.runtime.ops_cpu:do_to_program", "tinygrad.runtime.ops_cpu:Context",
               instead="the CPU device is opened a third of a second later")
  if parts is None or sys.platform == "win32": return   # there a program that goes is asked for its address
  program, spell, context = parts
  load, lock = program.__init__, threading.RLock()

  def spelled_later(kernel: Any, renderer: Any) -> SimpleNamespace:
    def spelled() -> Any:
      with context(EMULATED_DTYPES="", TRACK_MATCH_STATS=0): return spell(kernel, renderer).to_elf()
    return SimpleNamespace(to_elf=lambda: _Later(spelled))

  def __init__(self: Any, device: Any, binary: Any) -> None:
    if isinstance(binary, _Later): self._later = device, binary.spelled
    else: load(self, device, binary)

  def __getattr__(self: Any, name: str) -> Any:
    with lock:   # another thread may be at it
      if (later := vars(self).pop("_later", None)) is not None: load(self, later[0], later[1]())
    if name not in vars(self): raise AttributeError(name)
    return vars(self)[name]

  module.do_to_program, program.__init__, program.__getattr__ = spelled_later, __init__, __getattr__


class _Later:
  """In place of a kernel's machine code: what makes it."""
  def __init__(self, spelled: Callable[[], Any]): self.spelled = spelled


def use_in_devices(module: ModuleType) -> None:
  """Keep `module`, tinygrad's of devices, from trying for a default what cannot be here."""
  if hasattr(module, "ALL_DEVICES"): module.ALL_DEVICES = [name for name in module.ALL_DEVICES if may_be_here(name)]


def may_be_here(name: str, root: Path = Path("/")) -> bool:
  """Whether tinygrad could find a device of this name: by its driver's file, on a bus, or on another machine. `root` is the folder of /dev and
  /sys."""
  if name not in SIGNS or sys.platform != "linux" or os.environ.get("REMOTE"): return True
  def there(sign: str | tuple[str, str, set[str]]) -> bool:
    if isinstance(sign, str): return (root/sign).exists()
    folder, file, makers = sign
    return any(maker.read_text().strip() in makers for maker in (root/folder).glob(f"*/{file}"))
  try: return any(map(there, SIGNS[name]))
  except OSError: return True
