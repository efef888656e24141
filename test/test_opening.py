"""Opening a device: the CPU's queue kernels are spelled when they are first run, and run as ever; NVIDIA's GPUs are tried where there may be one."""
import json, os, subprocess, sys
import pytest
from tinydet.runtime.opening import nvidia_may_be_here

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
def test_where_an_nvidia_gpu_may_be(tmp_path, monkeypatch):
  monkeypatch.delenv("REMOTE", raising=False)
  assert not nvidia_may_be_here(tmp_path)
  for name, maker in (("0000:00:01.0", "0x8086"), ("0000:00:02.0", "0x1002")):
    (tmp_path/"sys/bus/pci/devices"/name).mkdir(parents=True)
    (tmp_path/"sys/bus/pci/devices"/name/"vendor").write_text(maker + "\n")
  assert not nvidia_may_be_here(tmp_path)
  monkeypatch.setenv("REMOTE", "host:6667")
  assert nvidia_may_be_here(tmp_path)
  monkeypatch.delenv("REMOTE")
  (tmp_path/"sys/bus/pci/devices/0000:00:02.0/vendor").write_text("0x10de\n")
  assert nvidia_may_be_here(tmp_path)
  (tmp_path/"sys/bus/pci/devices/0000:00:02.0/vendor").unlink()
  (tmp_path/"dev").mkdir()
  (tmp_path/"dev/nvidiactl").touch()
  assert nvidia_may_be_here(tmp_path)
