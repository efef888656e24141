import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["-c", "-x", "c", "-O2", "-fPIC", "-ffreestanding", "-fno-math-errno", "-nostdlib", "-fno-ident", "--target=x86_64-none-unknown-elf",
         "-march=x86-64-v3", "-", "-o", "-"]


def python(code, cache, check=True, **environ):
  """Run code with no clang on PATH, no caches and the given variables."""
  environ = {"PATH": str(cache/"nothing"), "HOME": str(cache), "XDG_CACHE_HOME": str(cache/"cache"), "PYTHONPATH": str(ROOT)} | environ
  run = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=120)
  assert not check or run.returncode == 0, run.stderr
  return run


ZIG_ONLY = "import sysconfig; sysconfig.get_path = lambda *_: '/nonexistent'; import os, tinydet; print(os.environ.get('CC'))"


def test_without_clang_tinygrad_still_computes_on_the_cpu(tmp_path):
  code = "from tinydet.runtime import device; print(device.require_device()); from tinygrad import Tensor; print((Tensor([1., 2.]) * 3 + 1).tolist())"
  assert python(code, tmp_path, DEV="CPU").stdout.splitlines() == ["CPU", "[4.0, 7.0]"]


@pytest.mark.skipif(sys.platform == "win32", reason="ziglang is behind a shell script")
def test_ziglang_compiles_as_tinygrad_asks(tmp_path):
  wrapper = Path(python(ZIG_ONLY, tmp_path).stdout.strip())
  assert wrapper.is_absolute() and wrapper.is_relative_to(tmp_path/"cache") and wrapper.stat().st_mode & 0o777 == 0o700
  compiled = subprocess.run([wrapper, *FLAGS], input=b"void f(float *x) { *x = __builtin_sqrtf(*x); }", capture_output=True, check=True).stdout
  assert compiled[:4] == b"\x7fELF"
  # a second start keeps the script, and mends a spoilt one
  before = wrapper.stat().st_mtime_ns
  assert Path(python(ZIG_ONLY, tmp_path).stdout.strip()) == wrapper and wrapper.stat().st_mtime_ns == before
  wrapper.write_text("#!/bin/sh\nexit 1\n")
  python(ZIG_ONLY, tmp_path)
  assert "ziglang/zig clang" in wrapper.read_text() and [p.name for p in wrapper.parent.iterdir()] == [wrapper.name]


def test_a_cache_folder_that_cannot_be_written_is_no_crash(tmp_path):
  (tmp_path/"cache").write_text("a file, not a folder")
  assert python(ZIG_ONLY, tmp_path).stdout.strip() == "None"


def test_the_users_choice_of_compiler_stands(tmp_path):
  code = "import os, tinydet; print(os.environ.get('CC'))"
  assert python(code, tmp_path, CC="/some/clang").stdout.strip() == "/some/clang"
  (bin := tmp_path/"bin").mkdir()
  (bin/"clang").write_text("#!/bin/sh\n")
  (bin/"clang").chmod(0o755)
  assert python(code, tmp_path, PATH=str(bin)).stdout.strip() == "None"


@pytest.mark.parametrize("environ, words", [
  ({"DEV": "CPU", "CC": "/no/such/gcc"}, "/no/such/gcc does not work as one: unset CC"),
  ({"DEV": "CPU", "CC": "/usr/bin/true"}, "/usr/bin/true does not work as one: unset CC"),
  ({"DEV": "NONSENSE"}, "device NONSENSE cannot be opened")])
def test_a_device_that_cannot_work_is_one_line(tmp_path, environ, words):
  code = "import tinydet; from tinydet.errors import exit_on_user_error\nwith exit_on_user_error(): print(tinydet.runtime.device.require_device())"
  run = python(code, tmp_path, check=False, **environ)
  assert run.returncode == 2 and words in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_importing_the_package_is_cheap(tmp_path):
  assert python("import sys, tinydet; print('tinygrad' in sys.modules, 'numpy' in sys.modules)", tmp_path).stdout.split() == ["False", "False"]
