"""The default device, ready to run."""
import atexit, ctypes, os, shutil, sqlite3, subprocess, tempfile
from pathlib import Path
from typing import Any
from tinydet.cache import belongs_to_user
from tinydet.errors import UserError
from tinydet.runtime import clang
from tinydet.parts import note, take


def require_device() -> str:
  """Open tinygrad's default device, with what compiles for it, and return its name; UserError with the mend where it cannot be opened or, for the
  CPU, cannot compile. What runs on the CPU may use all its cores."""
  from tinygrad import Device
  wanted, compiler = os.environ.get("DEV"), " ".join(clang.command())
  probe = [*clang.command(), "--target=x86_64-none-unknown-elf", "-x", "c", "-c", "-", "-o", "-"]
  try: compiles = bool(subprocess.run(probe, input=b"int x;", capture_output=True, check=True, timeout=60).stdout)
  except (OSError, subprocess.SubprocessError): compiles = False
  mend = ("install one (pip install ziglang, apt install clang, brew install llvm), or set CC to the path of a clang" if not os.environ.get("CC") else
          "unset CC (a variable of the environment, which conda's compilers set too), or set it to the path of a clang; gcc will not do")
  clangless = f"the CPU device compiles with clang, and {compiler} does not work as one: {mend}"
  _keep_kernels()
  try: Device[name := default_device()]
  except Exception as e:
    if not compiles and (wanted is None or wanted.upper().startswith("CPU")): raise UserError(clangless) from e
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise UserError(f"device {wanted or '(any)'} cannot be opened: {reason}; choose another with DEV, for example DEV=CPU") from e
  if name == "CPU":
    if not compiles: raise UserError(clangless)
    from tinydet.runtime.cpu import use_all_cores
    use_all_cores()
  return name


def default_device() -> str:
  """tinygrad's default device; the CPU in place of an OpenCL driver that is the processor itself and slower by far, unless DEV says otherwise."""
  from tinygrad import Device
  chosen = take("tinygrad.helpers:DEV", instead="an OpenCL driver that is the processor itself is not told from a GPU")
  by_user = chosen is None or bool(chosen[0].device)
  if by_user or not (name := Device.DEFAULT).startswith("CL") or not is_processor(Device[name]): return Device.DEFAULT
  driver = getattr(Device[name], "device_name", "a driver")
  note(f"{name} is {driver}, which runs on the processor: DEV=CPU is taken, which is faster; DEV={name} chooses it all the same")
  chosen[0].value = os.environ["DEV"] = "CPU"   # tinygrad had set the variable, for processes that it starts
  return "CPU"


def is_processor(device: Any) -> bool:
  """Whether an OpenCL device of tinygrad's is a processor."""
  parts = take("tinygrad.runtime.autogen.opencl", instead="an OpenCL driver that is the processor itself is not told from a GPU")
  if parts is None or not hasattr(device, "cl_dev"): return False
  opencl, kind = parts[0], ctypes.c_uint64()
  if opencl.clGetDeviceInfo(device.cl_dev, opencl.CL_DEVICE_TYPE, ctypes.sizeof(kind), ctypes.byref(kind), None): return False
  return bool(kind.value & opencl.CL_DEVICE_TYPE_CPU) and not kind.value & opencl.CL_DEVICE_TYPE_GPU


def _keep_kernels() -> None:
  """Give tinygrad a folder of this run's own for compiled kernels where it cannot write to the user's, for it would find no device then, or where
  others can, for it would run what they put there. One that the user names by CACHEDB is not doubted."""
  parts = take("tinygrad.helpers", *(f"tinygrad.helpers:{name}" for name in ("CACHEDB", "CACHELEVEL", "db_connection", "_db_connection")),
               instead="it needs a cache folder that can be written")
  if parts is None or not parts[2]: return
  helpers, file, reason = parts[0], Path(parts[1]), ""
  try:
    helpers.db_connection()
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)): raise PermissionError
    if "CACHEDB" not in os.environ and not all(belongs_to_user(path, group=True) for path in (file.parent, file) if path.exists()):
      reason = "is another user's or can be written by everybody"
  except (OSError, sqlite3.Error): reason = "cannot be written"
  if reason:
    folder = tempfile.mkdtemp(prefix="tinydet-")   # its owner's alone
    atexit.register(_remove, folder, os.getpid())
    note(f"{file.parent} {reason}: what is compiled is not kept for the next run; set XDG_CACHE_HOME to a folder of your own")
    helpers.CACHEDB = f"{folder}/cache.db"


def _remove(folder: str, owner: int) -> None:
  if os.getpid() == owner: shutil.rmtree(folder, ignore_errors=True)
