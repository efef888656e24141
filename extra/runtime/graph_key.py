"""The key of a captured graph on disk: a digest of all that it was made from, the same in every process."""
import contextlib, functools, hashlib, os, platform, re
from pathlib import Path
import tinygrad
from tinygrad import Device, UOp
from tinydet.runtime import clang
from tinydet.parts import take

FORMAT = 2   # of the files

_parts = take("tinygrad.uop.ops:CallInfo", "tinygrad.helpers:ContextVar._cache", instead="captured graphs are not kept for the next run")
if _parts: CallInfo, _settings_by_name = _parts


def graph_key(calls: UOp, fused: list[int], held: set[UOp], inputs: list[UOp], buffers: list[UOp]) -> str | None:
  """A digest of what `compiling.make` makes its kernels from; None where this tinygrad does not tell."""
  if not _parts: return None
  places = {buffer: f"{'held' if buffer in held else 'free'} {i}" for i, buffer in enumerate(buffers)}
  places |= {buffer: f"{places.get(buffer)} input {i}" for i, buffer in enumerate(inputs)}
  digests: dict[UOp, bytes] = {}
  for u in calls.toposort():
    if u in places: what = (places[u], u.dtype, u.shape, u.device)
    elif isinstance(u.arg, CallInfo): what = (u.op, u.dtype, u.arg.name, u.arg.precompile, u.arg.precompile_backward)   # not its address
    else: what = (u.op, u.dtype, u.arg)
    digests[u] = hashlib.sha256(str(what).encode() + b"".join(digests[s] for s in u.src)).digest()
  devices = sorted({device for buffer in buffers for device in (buffer.device if isinstance(buffer.device, tuple) else (buffer.device,))})
  about = (FORMAT, digests[calls], fused, _compiler(), [_device(device) for device in devices], _settings())
  return hashlib.sha256(repr(about).encode()).hexdigest()


def _device(name: str) -> tuple[str, str, str]:
  renderer = Device[name].renderer
  return name, str(renderer.target), type(renderer).__name__


@functools.cache
def _compiler() -> tuple[str, ...]:
  """This Python, processor, tinygrad and our part in it: the code of a version may have been changed by its owner."""
  sources = hashlib.sha256("".join(_tinygrads_sources().values()).encode())
  for file in sorted(file for room in ("runtime", "nn") for file in (Path(__file__).parents[1]/room).glob("*.py")): sources.update(file.read_bytes())
  with contextlib.suppress(OSError):   # kernels for the CPU are compiled for this very one
    about = re.findall(r"^(?:flags|Features|model name)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    sources.update("".join(sorted(set(about))).encode())
  return sources.hexdigest(), platform.python_version(), platform.machine(), platform.processor(), " ".join(clang.command())


@functools.cache
def _tinygrads_sources() -> dict[Path, str]:
  root = Path(tinygrad.__file__).parent
  files = sorted(file for part in ("", "codegen", "engine", "mixin", "renderer", "runtime", "schedule", "uop")
                 for file in (root.glob("*.py") if not part else (root/part).rglob("*.py")) if "autogen" not in file.parts)
  return {file: file.read_text(encoding="utf-8") for file in files}


@functools.cache
def _names() -> tuple[set[str], set[str]]:
  """The environment variables that tinygrad reads, and its settings (`ContextVar`) that are always there: a device's are made when it is tried."""
  sources = _tinygrads_sources()
  return ({name for text in sources.values() for name in re.findall(r'getenv\("(\w+)"', text)},
          {name for file, text in sources.items() if "runtime" not in file.parts for name in re.findall(r'ContextVar\("(\w+)"', text)})


def _settings() -> list[tuple[str, str]]:
  # the device and the compiler are in the key by what they come to
  silent = {"DEBUG", "DEV", "CACHEDB", "CC", "XDG_CACHE_HOME"}
  variables, settings = _names()
  values = {name: os.environ[name] for name in variables & os.environ.keys()}
  values |= {name: str(var.value) for name, var in _settings_by_name.items() if name in settings}
  return sorted((name, value) for name, value in values.items() if name not in silent)
