"""Memory that ran out, told from other errors of devices. The texts are those of tinygrad 0.14 and of the drivers behind it."""
import errno, re

# RuntimeErrors of drivers; what tinygrad itself cannot allocate is a MemoryError
_FULL = re.compile(r"CUDA Error 2\b|CUDA_ERROR_OUT_OF_MEMORY|CL_MEM_OBJECT_ALLOCATION_FAILURE|CL_OUT_OF_HOST_MEMORY|NV_ERR_NO_MEMORY|"
                   r"\bout of (?:\w+ )?memory\b|cannot allocate memory", re.IGNORECASE)
# a fault of an earlier kernel may show first where memory is asked for, and tinygrad then says that an allocation failed
_FAULT = re.compile(r"illegal|misaligned|MMU fault|fault detected|error state|launch failure|unspecified|resizable BAR", re.IGNORECASE)


def out_of_memory(e: BaseException) -> bool:
  """Whether `e` says, by itself or by what it was raised from, that a device or the host has no memory left."""
  chain: list[BaseException] = []
  while e is not None and e not in chain:
    chain.append(e)
    e = e.__cause__
  if any(_FAULT.search(str(error)) for error in chain): return False
  return any(isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM) or
             (isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None) for error in chain)
