"""Opening a device: the CPU's queue kernels are spelled when they are first run, and run as ever; GPUs are tried where there may be one."""
import json, os, subprocess, sys
from types import SimpleNamespace
import pytest
from tinydet.runtime.opening import SIGNS, may_be_here, use_in_devices

QUEUES = """
import json, threading
import tinydet
from tinygrad import Device, Tensor, codegen, dtypes
from tinygrad.device import Buffer
spelled, spell = [], codegen.do_to_program
def counted(kernel, renderer):
  spelled.append(kernel)
  return spell(kernel, renderer)
codegen.do_to_program = counted
from tinygrad.runtime import ops_cpu
device = Device["CPU"]
opened, signal = len(spelled), device.prgs[ops_cpu.signal_prog]
addresses = []
threads = [threading.Thread(target=lambda: addresses.append(signal.addr)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
memory = Buffer("CPU", 1, dtypes.uint32).ensure_allocated()
signal(memory._buf, vals=(41,))
print(json.dumps([opened, len(spelled), len(addresses), len(set(addresses)), memory.as_memoryview().cast("I")[0], hasattr(signal, "no_such_name")]))
"""


def test_kernels_of_queues_are_spelled_when_they_are_first_run():
  done = subprocess.run([sys.executable, "-c", QUEUES], capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"DEV": "CPU"})
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == [0, 1, 4, 1, 41, False]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is on its bus in files")
@pytest.mark.parametrize(("name", "device", "bus"), [("NV", "nvidiactl", "pci 0x10de"), ("CUDA", "nvidiactl", "pci 0x10de"), ("CUDA", "dxg", None),
                                                     ("AMD", "kfd", "pci 0x1002"), ("AMD", None, "usb add1"), ("QCOM", "kgsl-3d0", None)])
def test_where_a_gpu_may_be(tmp_path, monkeypatch, name, device, bus):
  monkeypatch.delenv("REMOTE", raising=False)
  assert not may_be_here(name, tmp_path)
  kinds = {"pci": "vendor", "usb": "idVendor"}
  def plug(kind: str, maker: str, port: str) -> None:
    (folder := tmp_path/"sys/bus"/kind/"devices"/port).mkdir(parents=True)
    (folder/kinds[kind]).write_text(maker + "\n")
  for kind, maker, port in (("pci", "0x8086", "0000:00:01.0"), ("usb", "1d6b", "usb1")): plug(kind, maker, port)
  assert not may_be_here(name, tmp_path)
  monkeypatch.setenv("REMOTE", "host:6667")
  assert may_be_here(name, tmp_path)
  monkeypatch.delenv("REMOTE")
  if bus:
    plug(*bus.split(), "added")
    assert may_be_here(name, tmp_path)
    (tmp_path/"sys/bus"/bus[:3]/"devices/added"/kinds[bus[:3]]).unlink()
    assert not may_be_here(name, tmp_path)
  if device:
    (tmp_path/"dev").mkdir()
    (tmp_path/"dev"/device).touch()
    assert may_be_here(name, tmp_path)


def test_what_is_tried_for_a_default():
  """All that is not ruled out, in tinygrad's order; what a program asks for by name is never ruled out."""
  module = SimpleNamespace(ALL_DEVICES=["METAL", "AMD", "NV", "CL", "CPU", "WEBGPU"])
  use_in_devices(module)
  assert module.ALL_DEVICES == [name for name in ("METAL", "AMD", "NV", "CL", "CPU", "WEBGPU") if name not in SIGNS or may_be_here(name)]
  assert "CPU" in module.ALL_DEVICES
  done = subprocess.run([sys.executable, "-c", "import tinydet; from tinygrad import Device; print(Device['CUDA'])"], capture_output=True, text=True,
                        check=False, timeout=60, env=os.environ | {"DEV": "CPU"})
  assert done.returncode == 0 or "libcuda" in done.stderr or "CUDA" in done.stderr, done.stderr
