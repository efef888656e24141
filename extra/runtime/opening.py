"""What opening a device need not wait for: half a second of every start.

tinygrad 0.14 spells four small kernels whenever it opens its CPU device, which only the queues between devices run, and imports all that drives
NVIDIA's GPUs to find out that there is none."""
import os, sys, threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from tinydet.parts import take

NVIDIA = "0x10de"   # its number as a maker of PCI devices


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
  """Keep `module`, tinygrad's of devices, from trying NVIDIA's GPUs for a default where there is none."""
  if "NV" in getattr(module, "ALL_DEVICES", ()) and not nvidia_may_be_here():
    module.ALL_DEVICES = [name for name in module.ALL_DEVICES if name != "NV"]


def nvidia_may_be_here(root: Path = Path("/")) -> bool:
  """Whether tinygrad could find an NVIDIA GPU: by its driver's file, on the PCI bus, or on another machine. `root` is the folder of /dev and /sys."""
  if sys.platform != "linux" or os.environ.get("REMOTE") or (root/"dev/nvidiactl").exists(): return True
  try: return any(file.read_text().strip() == NVIDIA for file in (root/"sys/bus/pci/devices").glob("*/vendor"))
  except OSError: return True
