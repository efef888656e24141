"""Kernels on several cores of the CPU: the same numbers, and inputs that change from call to call."""
import os, subprocess, sys
import numpy as np
import pytest
from tinygrad import Context, Device, GlobalCounters, Tensor, TinyJit
from tinydet.runtime import cpu as cores
from tinydet.runtime.devices import to_host
from tinydet.runtime.graphs import jit

pytestmark = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="is about the CPU device")


@pytest.fixture(autouse=True)
def all_cores(monkeypatch):
  """Two parts to a kernel, on a machine of one core too."""
  monkeypatch.setattr(cores.NUM_CPU_THREADS, "value", 2)
  before = Device["CPU"].runtime_t, Device["CPU"].graph
  cores.use_all_cores()
  yield
  Device["CPU"].runtime_t, Device["CPU"].graph = before


def test_a_divided_kernel_gives_what_numpy_gives(monkeypatch):
  a, b = (np.random.default_rng(i).standard_normal((256, 256)).astype(np.float32) for i in range(2))
  parts, run = [], cores._run
  monkeypatch.setattr(cores, "_run", lambda kernels, words: (parts.extend(kernels[:, 1]), run(kernels, words))[1])
  with Context(NOOPT=0): product = (Tensor(a).realize() @ Tensor(b).realize()).realize()   # plain loops are not divided
  np.testing.assert_allclose(product.numpy(), a.astype(np.float64) @ b, rtol=1e-3, atol=1e-4)
  assert 2 in parts, "no kernel was divided"


def test_a_graph_takes_new_inputs_and_counts_its_kernels():
  weight = Tensor(np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)).realize()
  @TinyJit
  def layers(x):
    for _ in range(3): x = (x @ weight).tanh().contiguous()
    return x.realize()
  for i in range(4):
    x = np.random.default_rng(i).standard_normal((64, 128)).astype(np.float32)
    expected = x.astype(np.float64)
    for _ in range(3): expected = np.tanh(expected @ weight.numpy())
    x = Tensor(x).realize()
    GlobalCounters.reset()
    np.testing.assert_allclose(layers(x).numpy(), expected, rtol=1e-3, atol=1e-4)
    if i > 1: assert GlobalCounters.kernel_count == 3
  assert any(call.src[0].op.name == "CUSTOM_FUNCTION" for call in layers.captured.linear.src)


def test_a_graph_updates_its_state():
  total = Tensor.zeros(1000).contiguous().realize()
  @TinyJit
  def add(x):
    total.assign(total + x).realize()
    return (total * 2).realize()
  for i in range(1, 6):
    x = Tensor.full((1000,), float(i)).contiguous().realize()
    assert add(x).numpy()[0] == i * (i + 1)


def test_a_captured_function_uses_all_cores_whoever_asks(monkeypatch):
  """A library's user calls `predict`, and no program has asked for the device before."""
  device = Device["CPU"]
  monkeypatch.setattr(device, "runtime_t", cores.CPUProgram)
  monkeypatch.setattr(device, "graph", None)
  jit(lambda x: (x + 1).contiguous())(Tensor.ones(4).contiguous().realize())
  assert device.runtime_t is cores.ThreadedProgram and device.graph is cores.CPUGraph


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int32", "bool"])
def test_what_leaves_the_device_is_what_is_there(dtype):
  values = np.arange(12).reshape(3, 4) % 2 if dtype == "bool" else np.arange(12).reshape(3, 4)
  whole = Tensor(values.astype(np.float32)).cast(dtype).clone().realize()
  for tensor in (whole, whole[1:, 2:], whole.reshape(-1)[5:6].reshape(())):
    np.testing.assert_array_equal(found := to_host(tensor), tensor.numpy())
    assert found.dtype == tensor.numpy().dtype and found.shape == tensor.shape


def test_debug_2_shows_each_kernel():
  program = ("import tinydet; tinydet.runtime.device.require_device()\nfrom tinygrad import Tensor, TinyJit\n@TinyJit\n"
             "def f(x): return (x + 1).contiguous().sum().realize()\nfor _ in range(3): f(Tensor.ones(64, 64).contiguous().realize())")
  done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"DEBUG": "2"}, capture_output=True, text=True, check=True)
  assert "batched" not in done.stdout
