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


ZIG_ONLY = "import sysconfig; sysconfig.get_path = lambda *_: '/nonexistent'; from tinydet.runtime import clang; print(*clang.command(), sep='\\n')"
COMPUTES = "from tinygrad import Tensor; print((Tensor([1., 2.]) * 3 + 1).tolist())"


def test_without_clang_tinygrad_still_computes_on_the_cpu(tmp_path):
  code = f"from tinydet.runtime import device; print(device.require_device()); {COMPUTES}"
  assert python(code, tmp_path, DEV="CPU").stdout.splitlines() == ["CPU", "[4.0, 7.0]"]


@pytest.mark.parametrize("order", ["import tinydet; ", "import tinygrad; import tinydet; ", "import tinygrad.engine.realize, tinydet; "])
def test_importing_the_package_is_enough_and_leaves_the_environment_alone(tmp_path, order):
  """Several kernels at once are compiled in processes of their own."""
  code = f"import os; before = dict(os.environ); {order}assert os.environ == before; {COMPUTES}"
  code += "\nTensor.realize(*[Tensor.ones(i, 9).contiguous().realize().sum() for i in range(2, 6)])\n"
  code += "import subprocess, sys; assert set(os.environ) == set(before) | {'DEV'}"   # which tinygrad itself sets
  code += "\nfrom tinydet.runtime import workers; assert workers._started[0].processes"
  assert python(code, tmp_path, PARALLEL="2").stdout.splitlines() == ["[4.0, 7.0]"]


def test_ziglang_compiles_as_tinygrad_asks(tmp_path):
  command = python(ZIG_ONLY, tmp_path).stdout.splitlines()
  assert Path(command[0]).is_absolute() and Path(command[0]).stem == "zig" and command[1:] == ["clang"]
  compiled = subprocess.run([*command, *FLAGS], input=b"void f(float *x) { *x = __builtin_sqrtf(*x); }", capture_output=True, check=True).stdout
  assert compiled[:4] == b"\x7fELF" and not (tmp_path/"cache").exists(), "nothing was written for it"


@pytest.mark.parametrize("folder", ["a file", "/proc/nohome"])
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, folder):
  (tmp_path/"file").write_text("a file, not a folder")
  cache = str(tmp_path/"file") if folder == "a file" else folder
  code = f"from tinydet.runtime import device; print(device.require_device()); {COMPUTES}\nimport tempfile; print(tempfile.gettempdir())"
  code += "\nfrom tinydet.runtime.graphs import jit; print(jit(lambda x: (x + 1).contiguous().sum())(Tensor([1., 2.]).realize()).item())"
  (tmp_path/"tmp").mkdir()
  run = python(code, tmp_path, DEV="CPU", HOME=cache, XDG_CACHE_HOME=cache, TMPDIR=str(tmp_path/"tmp"))
  assert run.stdout.splitlines() == ["CPU", "[4.0, 7.0]", str(tmp_path/"tmp"), "5.0"]
  assert run.stderr.count("\n") == 1 and "cannot be written" in run.stderr and "XDG_CACHE_HOME" in run.stderr, run.stderr
  assert not list((tmp_path/"tmp").iterdir()), "what it wrote is gone"


@pytest.mark.parametrize("spoilt", ["tinygrad", "tinygrad/cache.db"])
def test_kernels_that_others_may_have_written_are_not_run(tmp_path, spoilt):
  code = f"from tinydet.runtime import device; print(device.require_device()); {COMPUTES}"
  assert not python(code, tmp_path, DEV="CPU").stderr
  (tmp_path/"cache"/spoilt).chmod(0o777)
  before = (tmp_path/"cache"/"tinygrad"/"cache.db").read_bytes()
  run = python(code, tmp_path, DEV="CPU")
  assert run.stdout.splitlines() == ["CPU", "[4.0, 7.0]"] and run.stderr.count("\n") == 1 and "can be written by everybody" in run.stderr
  assert not python(code, tmp_path, DEV="CPU", CACHEDB=str(tmp_path/"cache"/"tinygrad"/"cache.db")).stderr, "named by the user"
  assert before == (tmp_path/"cache"/"tinygrad"/"cache.db").read_bytes()


def test_the_users_choice_of_compiler_stands(tmp_path):
  code = "from tinydet.runtime import clang; print(*clang.command())"
  assert python(code, tmp_path, CC="/some/clang").stdout.strip() == "/some/clang"
  (bin := tmp_path/"bin").mkdir()
  (bin/"clang").write_text("#!/bin/sh\n")
  (bin/"clang").chmod(0o755)
  assert python(code, tmp_path, PATH=str(bin)).stdout.strip() == "clang"


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
