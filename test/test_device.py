"""Which device is taken where nothing was said, on machines with OpenCL drivers of all kinds; tinygrad's answers are imitated."""
import ctypes
from types import SimpleNamespace
import pytest
import tinygrad
from tinygrad.helpers import DEV, Target
from tinydet import parts
from tinydet.runtime import device

CPU, GPU, DEFAULT = 2, 4, 1


@pytest.fixture
def machine(monkeypatch):
  """Sets up what tinygrad finds by itself: the device's name, and what OpenCL says of its kind."""
  parts.noted.clear()
  monkeypatch.setenv("DEV", "as tinygrad set it")
  before = DEV.value
  def set_up(name: str, kind: int, by_user: str = "") -> None:
    DEV.value = [Target(device=by_user)]
    class Devices:
      @property
      def DEFAULT(self): return DEV.device or name
      def __getitem__(self, asked): return SimpleNamespace(cl_dev=7, device_name="cpu-skylake", asked=asked)
    monkeypatch.setattr(tinygrad, "Device", Devices())
    def info(_device, what, size, place, _size):
      assert what == 0x1000 and size == 8
      ctypes.cast(place, ctypes.POINTER(ctypes.c_uint64))[0] = kind
      return 0
    opencl = SimpleNamespace(clGetDeviceInfo=info, CL_DEVICE_TYPE=0x1000, CL_DEVICE_TYPE_CPU=CPU, CL_DEVICE_TYPE_GPU=GPU)
    take = parts.take
    monkeypatch.setattr(device, "take", lambda *places, **options: (opencl,) if places[0].endswith(".opencl") else take(*places, **options))
  yield set_up
  DEV.value = before


def test_a_driver_that_is_the_processor_gives_way_to_the_cpu_device(machine, capsys, monkeypatch):
  machine("CL", CPU | DEFAULT)
  assert device.default_device() == "CPU" and DEV.device == "CPU" and device.os.environ["DEV"] == "CPU"
  line, = capsys.readouterr().err.splitlines()
  assert line == "note: CL is cpu-skylake, which runs on the processor: DEV=CPU is taken, which is faster; DEV=CL chooses it all the same"


@pytest.mark.parametrize(("name", "kind", "by_user", "expected"), [
  ("CL", GPU, "", "CL"), ("CL", GPU | DEFAULT, "", "CL"), ("CL", CPU, "CL", "CL"), ("CUDA", CPU, "", "CUDA"), ("CPU", CPU, "", "CPU")])
def test_others_stand(machine, capsys, name, kind, by_user, expected):
  machine(name, kind, by_user)
  assert device.default_device() == expected and not capsys.readouterr().err and DEV.device == by_user


def test_a_driver_that_does_not_answer_is_left_alone(machine, monkeypatch):
  machine("CL", CPU)
  monkeypatch.setattr(device, "is_processor", lambda _: False)
  assert device.default_device() == "CL"


def test_the_constants_are_opencls():
  opencl = pytest.importorskip("tinygrad.runtime.autogen.opencl")
  assert (opencl.CL_DEVICE_TYPE, opencl.CL_DEVICE_TYPE_CPU, opencl.CL_DEVICE_TYPE_GPU) == (0x1000, CPU, GPU)
