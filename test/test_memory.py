"""What is told as "memory ran out", by the texts of tinygrad's devices."""
import errno
import pytest
from tinygrad import Device, Tensor
from tinygrad.helpers import MAX_BUFFER_SIZE
from tinydet.runtime.memory import out_of_memory


def caused(error: BaseException, cause: BaseException) -> BaseException:
  error.__cause__ = cause
  return error


def failed(cause: BaseException) -> BaseException:
  """As tinygrad's allocators say it, of whatever its device said."""
  return caused(MemoryError("Allocation of 2.00 GB failed on CUDA. Used: 7.10 GB"), cause)


@pytest.mark.parametrize("error", [
  MemoryError(), MemoryError("Allocation of 2.00 GB failed on CUDA. Used: 7.10 GB"), RuntimeError("CUDA Error 2, out of memory"),
  failed(RuntimeError("CUDA Error 2, out of memory")), failed(MemoryError("Metal OOM while allocating size=8589934592")),
  failed(MemoryError("rm_alloc returned NV_ERR_NO_MEMORY: 81")), failed(MemoryError("Can't allocate 1073741824 bytes")),
  failed(MemoryError("Failed to allocate memory (OOM). Request size=0x40000000 ((0, 1))")),
  failed(caused(MemoryError("Cannot allocate 1024 bytes: no memory is available."), OSError(errno.ENOMEM, "Cannot allocate memory"))),
  failed(RuntimeError("OpenCL Error -4: CL_MEM_OBJECT_ALLOCATION_FAILURE")), RuntimeError("OpenCL Error -6: CL_OUT_OF_HOST_MEMORY"),
  OSError(errno.ENOMEM, "Cannot allocate memory"), caused(ValueError("a step failed"), OSError(errno.ENOMEM, "Cannot allocate memory"))], ids=str)
def test_memory_ran_out(error): assert out_of_memory(error)


@pytest.mark.parametrize("error", [
  RuntimeError("CUDA Error 700, an illegal memory access was encountered"), RuntimeError("CUDA Error 716, misaligned address"),
  failed(RuntimeError("CUDA Error 700, an illegal memory access was encountered")), RuntimeError("CUDA Error 719, unspecified launch failure"),
  RuntimeError("GPU fault\nMMU fault: 0x7F00 | NotPresent=1"), failed(RuntimeError("Device fault detected")),
  RuntimeError("Device is in error state"), OSError(errno.ENOSPC, "No space left"),
  caused(MemoryError("Cannot allocate host-visible VRAM. Ensure the resizable BAR option is enabled on your system."), OSError(errno.EINVAL, "x")),
  RuntimeError("Failed to map external pointer to GPU memory"), RuntimeError("memory"), ValueError("out of memory"),
  RuntimeError("Cannot map buffer without view to cpu"), RuntimeError("OpenCL Error -5: CL_OUT_OF_RESOURCES"), KeyboardInterrupt()], ids=str)
def test_another_error_is_not_taken_for_it(error): assert not out_of_memory(error)


def test_this_device_for_real():
  if Device.DEFAULT != "CPU" or MAX_BUFFER_SIZE: pytest.skip("how much another device has is not known")
  with pytest.raises((MemoryError, OSError, RuntimeError)) as caught: Tensor.empty(1 << 50).contiguous().realize().uop.buffer.ensure_allocated()
  assert out_of_memory(caught.value)
