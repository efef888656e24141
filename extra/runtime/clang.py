"""The clang that tinygrad's CPU device compiles with, the system's or else the one that `pip install` brought, and how tinygrad learns of it.

tinygrad runs $CC, or clang. The environment is the user's, so nothing is written there: what tinygrad's own module calls to start a compiler is
replaced in that module."""
import functools, importlib.util, os, shutil, subprocess, sys, sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


def command() -> list[str]:
  """What runs clang: $CC, or the first there is of clang on PATH, one beside this Python, and PyPI's ziglang; plain "clang" where there is none."""
  return [chosen] if (chosen := os.environ.get("CC")) else list(_found(os.environ.get("PATH")))


@functools.cache
def _found(path: str | None) -> tuple[str, ...]:
  if shutil.which("clang", path=path) is not None: return ("clang",)
  if (beside := shutil.which("clang", path=sysconfig.get_path("scripts"))) is not None: return (beside,)
  package = importlib.util.find_spec("ziglang")
  zig = package and package.origin and Path(package.origin).absolute().with_name("zig.exe" if sys.platform == "win32" else "zig")
  return (str(zig), "clang") if zig and os.access(zig, os.X_OK) else ("clang",)


def use_in(compiler: ModuleType) -> None:
  """Let tinygrad's module `compiler` run `command()`."""
  # what is worth unrolling is unrolled in the kernels' text: clang's own takes a third of its time, and gives nothing
  def check_output(arguments: list[str], **options: Any) -> bytes:
    return subprocess.check_output([*command(), "-fno-unroll-loops", *arguments[1:]], **options)
  compiler.subprocess = SimpleNamespace(**{**vars(subprocess), "check_output": check_output})
