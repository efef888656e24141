"""The memory in which captured graphs work, made ready while the graph is traced.

A system gives memory page by page, when it is first touched; a gigabyte takes half a second so, in a virtual machine a whole one. Tracing leaves a
core idle meanwhile. So as much is touched beside it as the last graph of its kind took."""
import contextlib, sqlite3, threading
from collections import Counter
import numpy as np
from tinygrad import UOp, dtypes
from tinygrad.dtype import DType
from tinydet.parts import take

LEAST = 64 << 20   # bytes that are worth it
PAGE = 4096

_parts = take("tinygrad.helpers:diskcache_get", "tinygrad.helpers:diskcache_put", "tinygrad:UOp.new_buffer",
              instead="the memory of a captured graph is touched when it is first run")


class Workspace:
  """Called with a device, a number and a dtype: the buffer of as many that a graph works in. One for kernels and one for copies on each device, kept
  in `shared`, where they are taken from if they are large enough. `kind` says what graph it is; `device` is its one, if that is a CPU."""
  def __init__(self, shared: dict[tuple, UOp], kind: str, device: str | None):
    self.shared, self.kind, self.count = shared, kind, Counter()
    self.size = self.ready = None   # the size in bytes of the last graph of this kind; None where none was noted
    if _parts:
      with contextlib.suppress(sqlite3.Error): self.size = _parts[0]("tinydet_memory", kind)   # a cache that is broken or read only costs speed
    if device is None or self.size is None or self.size < LEAST or (device, 1) in shared: return
    self.ready = UOp.new_buffer(device, self.size, dtypes.char)
    self.touching = threading.Thread(target=_touch, args=(self.ready,), name="touching memory")
    self.touching.start()

  def __call__(self, device: str | tuple[str, ...], size: int, dtype: DType) -> UOp:
    self.count[device] += 1
    at, first = (device, self.count[device]), self.count.total() == 1
    if first and _parts and size != self.size:
      with contextlib.suppress(sqlite3.Error): _parts[1]("tinydet_memory", self.kind, size)
    if at not in self.shared or self.shared[at].max_numel() < size:
      touched = self._touched(size, dtype) if first else None
      self.shared[at] = UOp.new_buffer(device, size, dtype) if touched is None else touched
    return self.shared[at]

  def _touched(self, size: int, dtype: DType) -> UOp | None:
    """The memory that was made ready, if there is any and it is not much more than is needed."""
    if (ready := self.ready) is None: return None
    self.ready = None
    self.touching.join()
    return ready if dtype is dtypes.char and size <= ready.max_numel() <= size * 5 // 4 else None


def _touch(buffer: UOp) -> None:
  try: memory = buffer.buffer.ensure_allocated().as_memoryview(force_zero_copy=True)
  except MemoryError: return
  np.frombuffer(memory, np.uint8)[::PAGE] = 0
