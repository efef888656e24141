"""Where an argument lies in memory is answered as tinygrad works it out."""
import numpy as np
import pytest
from tinygrad import Device, Tensor, UOp, dtypes
from tinydet.parts import take
from tinydet.runtime import views

Ops, = take("tinygrad.uop.ops:Ops", instead="")
KINDS = Ops.BUFFER, Ops.SHRINK, Ops.BITCAST


def test_tinygrad_asks_here(): assert UOp.contiguous_view.__module__ == views.__name__


def worked_out(view, monkeypatch):
  """tinygrad's own answer."""
  with monkeypatch.context() as patch:
    patch.setattr(views, "bytes_of", lambda *args: None)
    return view.contiguous_view()


@pytest.mark.parametrize("size", [1, 4, 256, 4096])
def test_parts_of_a_workspace(size, monkeypatch):
  arena = UOp.new_buffer("CPU", 8192, dtypes.int8)
  for start in (0, 256, 8192 - size):
    for dtype in (dtypes.float32, dtypes.half, dtypes.uint8, dtypes.int64):
      if size % dtype.itemsize or start % dtype.itemsize: continue
      view = arena[start:start + size].bitcast(dtype)
      found = view.contiguous_view()
      assert found == worked_out(view, monkeypatch) == (arena, start)
      if view.op is Ops.BITCAST and view.src[0].op is Ops.SHRINK: assert views.bytes_of(view, *KINDS) == found


def test_the_others_are_worked_out(monkeypatch):
  arena, floats = UOp.new_buffer("CPU", 4096, dtypes.int8), UOp.new_buffer("CPU", 64, dtypes.float32)
  several = UOp.new_buffer(("CPU", "CPU:1"), 64, dtypes.int8)
  for other in (floats, floats[4:8], floats[4:8].bitcast(dtypes.int32), arena[8:24], arena.bitcast(dtypes.float32),
                arena.reshape(64, 64)[3:5].bitcast(dtypes.float32), arena[16:48].flip(0).bitcast(dtypes.int16),
                several[16:32].bitcast(dtypes.float32)):
    assert views.bytes_of(other, *KINDS) is None and other.contiguous_view() == worked_out(other, monkeypatch)


@pytest.mark.skipif(Device.DEFAULT.startswith("CL"), reason="buffers of OpenCL have no parts")
def test_what_lies_there_is_read():
  array = np.arange(64, dtype=np.float32)
  whole = Tensor(array.view(np.int8)).realize()
  part = whole.uop.base[64:96].bitcast(dtypes.float32)
  np.testing.assert_array_equal(np.frombuffer(part.buffer.ensure_allocated().as_memoryview(), np.float32), array[16:24])
