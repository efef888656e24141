"""Memory that ran out, told from other errors of devices, and what is left of the host's. The texts are those of tinygrad 0.14 and of the drivers
behind it."""
import errno, os, re
from pathlib import Path

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


def available() -> int:
  """Bytes of the host's memory that a program may still take; where the system does not say, half of all there is."""
  try: return 1024 * int(re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)[1])
  except (OSError, TypeError): pass
  try: return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
  except (AttributeError, ValueError, OSError): return 4 << 30
