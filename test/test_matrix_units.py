"""Convolutions on a GPU's matrix units, which tinygrad's Python device imitates number by number: all three directions use them, and are right."""
import json, os, subprocess, sys
import numpy as np, pytest

PROGRAM = """
import json, sys
import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops
from tinydet.nn.conv import conv2d
from tinydet.runtime import compiling
from tinydet.runtime.graphs import jit

units = []
def make(*args, make=compiling.make):
  linear = make(*args)
  sums = [call.src[0] for call in linear.src if any(u.op is Ops.REDUCE or u.op is Ops.WMMA for u in call.src[0].toposort())]
  units.extend(any(u.op is Ops.WMMA for u in program.src[1].src) for program in sums)
  return linear
compiling.make = make
stride, kernel, padding = json.loads(sys.argv[1])

@jit
def graph(x, weight, grad):
  out = conv2d(x, weight, None, stride, padding)
  found = [t.float().contiguous() for t in (out, *out.gradient(x, weight, gradient=grad))]
  Tensor.realize(*found)
  return found

arrays = np.load(sys.argv[2])
found = graph(*(Tensor(arrays[key]).cast(dtypes.bfloat16).realize() for key in ("x", "weight", "grad")))
np.savez(sys.argv[2], *(t.numpy() for t in found))
print(json.dumps(units))
"""


def rounded(values):
  """To bfloat16, by cutting off what it has no bits for."""
  return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize(("stride", "kernel", "padding"), [(1, 3, 1), (2, 3, 1), (1, 1, 0)])
def test_convolutions_and_their_gradients(stride, kernel, padding, tmp_path):
  rng, (height, width) = np.random.default_rng(0), (6, 16)
  x, weight = (rounded(rng.standard_normal(shape)) for shape in ((1, 16, height, width), (8, 16, kernel, kernel)))
  windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), *[(padding, padding)] * 2)), (kernel, kernel), (2, 3))
  windows = windows[:, :, ::stride, ::stride].astype(np.float64)
  grad = rounded(rng.standard_normal((1, 8, *windows.shape[2:4])))
  np.savez(tmp_path/"a.npz", x=x, weight=weight, grad=grad)
  environ = {key: value for key, value in os.environ.items() if key != "TC_OPT"} | {"DEV": "PYTHON::sm_80", "CACHELEVEL": "0", "NOOPT": "0"}
  command = [sys.executable, "-c", PROGRAM, json.dumps([stride, kernel, padding]), tmp_path/"a.npz"]
  done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1]) == [True] * 3
  found = np.load(tmp_path/"a.npz")
  padded = np.zeros((1, 16, height + 2 * padding, width + 2 * padding))
  for i in range(grad.shape[2]):
    for j in range(grad.shape[3]):
      place = padded[:, :, i * stride:i * stride + kernel, j * stride:j * stride + kernel]
      place += np.einsum("bo,ockl->bckl", grad[:, :, i, j], weight.astype(np.float64))
  expected = (np.einsum("bcijkl,ockl->boij", windows, weight), padded[:, :, padding:padding + height, padding:padding + width],
              np.einsum("bcijkl,boij->ockl", windows, grad))
  for values, oracle in zip((found[name] for name in found.files), expected):
    assert values.shape == oracle.shape
    np.testing.assert_allclose(values, oracle, rtol=2 ** -8, atol=2 ** -8 * abs(oracle).max() / 8)   # bfloat16 rounds by 2 ** -9
