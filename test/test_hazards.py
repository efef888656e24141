"""What is asked of every store is answered as tinygrad answers it, and what it is for holds: what is stored is read before it is written over."""
import numpy as np
import pytest
from tinygrad import Tensor
from tinydet.parts import take
from tinydet.runtime import hazards

rangeify, Ops = take("tinygrad.schedule.rangeify", "tinygrad.uop.ops:Ops", instead="")


def test_tinygrad_asks_here():
  assert hazards.fix_store_hazard in [rule for _, rule in rangeify.earliest_rewrites.patterns]


def test_the_answer_is_that_of_a_walk():
  """Of graphs drawn at random, each value against each buffer, made before and after."""
  rng = np.random.default_rng(0)
  buffers = [Tensor.empty(4, 4).contiguous().realize() for _ in range(12)]
  values, yes = list(buffers), 0
  for _ in range(60):
    a, b = (values[i] for i in rng.integers(0, len(values), 2))
    values.append([a + b, a.permute(1, 0) * 2, a.flip(0), a.sum(0).expand(4, 4), (a @ b).contiguous()][rng.integers(0, 5)])
  for value in values:
    walked = value.uop.toposort(enter_calls=False)
    for buffer in buffers:
      base = buffer.uop.base
      assert base.op in (Ops.BUFFER, Ops.PARAM) and hazards.may_read(value.uop, base) >= (base in walked)
      yes += hazards.may_read(value.uop, base) != (base in walked)
  assert yes < 0.05 * len(values) * len(buffers), "few walks are for nothing"


@pytest.mark.parametrize("change", ["permute", "flip", "shift", "read after"])
def test_what_is_stored_is_read_first(change):
  array = np.arange(36, dtype=np.float32).reshape(6, 6)
  x = Tensor(array.copy()).contiguous().realize()
  if change == "permute": x.assign(x.permute(1, 0) + 1)
  if change == "flip": x.assign(x.flip(0) * 2)
  if change == "shift": x[1:].assign(x[:-1] + 0)
  y = x.sum(0) + 0
  if change == "read after": x.assign(x + y)
  array = {"permute": lambda: array.T + 1, "flip": lambda: array[::-1] * 2, "shift": lambda: np.concatenate([array[:1], array[:-1]]),
           "read after": lambda: array + array.sum(0)}[change]()
  np.testing.assert_array_equal(x.realize().numpy(), array)
  if change != "read after": np.testing.assert_array_equal(y.numpy(), array.sum(0))
