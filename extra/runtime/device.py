"""The default device, ready to run: its CPU device finds a clang, the system's or else the one that `pip install` brought."""
import hashlib, importlib.util, os, secrets, shlex, shutil, signal, subprocess, sys, sysconfig, threading
from pathlib import Path


def find_clang() -> str | None:
  """Absolute path of a clang that is not on PATH: one beside this Python, or PyPI's ziglang behind a one-line script in the user's cache folder.

  tinygrad runs `$CC` as a single path, and zig's compiler is `zig clang`, hence the script. None where there is neither (Windows included).
  """
  if (beside := shutil.which("clang", path=sysconfig.get_path("scripts"))) is not None: return beside
  package = importlib.util.find_spec("ziglang")
  if package is not None and package.origin is not None and os.access(zig := Path(package.origin).absolute().with_name("zig"), os.X_OK):
    script = f'#!/bin/sh\nexec {shlex.quote(str(zig))} clang "$@"\n'
    try:
      cache = os.environ.get("XDG_CACHE_HOME") or Path.home()/("Library/Caches" if sys.platform == "darwin" else ".cache")
      wrapper = Path(cache).absolute()/"tinydet"/f"clang-{hashlib.sha256(script.encode()).hexdigest()[:12]}"
      if not wrapper.exists() or wrapper.read_text() != script or not os.access(wrapper, os.X_OK):
        wrapper.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = wrapper.with_name(f"{wrapper.name}.{secrets.token_hex(4)}")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700), "w") as f: f.write(script)
        os.replace(partial, wrapper)
      return str(wrapper)
    except (OSError, RuntimeError, ValueError): return None
  return None


def require_device() -> str:
  """Open tinygrad's default device, with what compiles for it, and return its name; UserError with the mend where it cannot be opened or, for the
  CPU, cannot compile. What runs on the CPU may use all its cores."""
  from tinydet.errors import UserError
  from tinygrad import Device
  wanted, compiler = os.environ.get("DEV"), os.environ.get("CC") or "clang"
  probe = [compiler, "--target=x86_64-none-unknown-elf", "-x", "c", "-c", "-", "-o", "-"]
  try: compiles = bool(subprocess.run(probe, input=b"int x;", capture_output=True, check=True, timeout=60).stdout)
  except (OSError, subprocess.SubprocessError): compiles = False
  mend = ("install one (pip install ziglang, apt install clang, brew install llvm), or set CC to the path of a clang" if not os.environ.get("CC") else
          "unset CC, or set it to the path of a clang; gcc will not do")
  clangless = f"the CPU device compiles with clang, and {compiler} does not work as one: {mend}"
  try: Device[name := Device.DEFAULT]
  except Exception as e:
    if not compiles and (wanted is None or wanted.upper().startswith("CPU")): raise UserError(clangless) from e
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise UserError(f"device {wanted or '(any)'} cannot be opened: {reason}; choose another with DEV, for example DEV=CPU") from e
  if name == "CPU":
    if not compiles: raise UserError(clangless)
    from tinydet.runtime.cpu import use_all_cores
    use_all_cores()
  start_compilers()
  return name


def start_compilers() -> None:
  """Start tinygrad's compiling processes, if they are not there yet, so that they ignore SIGTERM and SIGUSR1, which schedulers and mpirun send to all
  processes of a job.

  One that died of it might hold the lock of their queue, and this process would wait for that lock, for ever, at the next kernel or at its exit.
  Their pool ends them by SIGKILL instead."""
  from tinygrad.engine import worker
  process = getattr(worker, "_WorkerProcess", None)
  if process is None or threading.current_thread() is not threading.main_thread(): return   # where signals cannot be set
  process.terminate = process.kill
  numbers = [number for name in ("SIGTERM", "SIGUSR1") if (number := getattr(signal, name, None))]
  before = [signal.signal(number, signal.SIG_IGN) for number in numbers]   # which they inherit
  try: worker.get_worker_pool()
  finally:
    for number, handler in zip(numbers, before): signal.signal(number, handler)


def set_up() -> None:
  """Point tinygrad to a clang where PATH has none."""
  # tinygrad replaces a process that compiles after 16 kernels, and each new one imports tinygrad first: a tenth of the time to a first step.
  os.environ.setdefault("BEAM_MAX_TASKS_PER_CHILD", "1000")
  if not os.environ.get("CC") and shutil.which("clang") is None and (clang := find_clang()) is not None: os.environ["CC"] = clang
