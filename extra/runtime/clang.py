"""The clang that tinygrad's CPU device compiles with, the system's or else the one that `pip install` brought, and how tinygrad learns of it.

tinygrad runs $CC, or clang. The environment is the user's, so nothing is written there: what tinygrad's own module calls to start a compiler is
replaced in that module."""
import contextlib, functools, importlib.util, os, shlex, shutil, subprocess, sys, sysconfig, tempfile, threading
from collections.abc import Iterator
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
  compiler.subprocess = SimpleNamespace(**{**vars(subprocess), "check_output": _run})


_here = threading.local()   # `asked`: what this thread is not to run, but to note


def _run(arguments: list[str], input: bytes, **options: Any) -> bytes:
  """What clang writes to its standard output, asked with tinygrad's `arguments`."""
  # what is worth unrolling is unrolled in the kernels' text: clang's own takes a third of its time, and gives nothing
  arguments = ["-fno-unroll-loops", *arguments[1:]]
  if (asked := getattr(_here, "asked", None)) is not None:
    asked.append((tuple(arguments), input))
    return b""
  return subprocess.check_output([*command(), *arguments], input=input, **options)


@contextlib.contextmanager
def noting() -> Iterator[list[tuple[tuple[str, ...], bytes]]]:
  """Inside, what tinygrad asks of clang in this thread is not run: it is noted in the list, each time its arguments and a source, for `objects`."""
  _here.asked = asked = []
  try: yield asked
  finally: del _here.asked


def objects(asked: list[tuple[tuple[str, ...], bytes]]) -> list[bytes]:
  """What clang makes of each source with its arguments, as object files; subprocess.CalledProcessError where one cannot be compiled.

  Those with the same arguments are given to one run, as it takes clang as long to be loaded as to compile a small kernel."""
  made: dict[int, bytes] = {}
  for arguments in dict.fromkeys(arguments for arguments, _ in asked):
    places = [i for i, (others, _) in enumerate(asked) if others == arguments]
    made.update(zip(places, _together(arguments, [asked[i][1] for i in places])))
  return [made[i] if i in made else subprocess.check_output([*command(), *arguments], input=source) for i, (arguments, source) in enumerate(asked)]


def _together(arguments: tuple[str, ...], sources: list[bytes]) -> list[bytes]:
  """The object files of all `sources`, or of none where this clang cannot make them in one run."""
  if len(sources) < 2 or not (frontend := _frontend(tuple(command()), arguments)): return []
  with contextlib.suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryDirectory() as folder:
    files = [Path(folder)/str(i)/"-" for i in range(len(sources))]   # the name that an object file has from standard input
    for file, source in zip(files, sources):
      file.parent.mkdir()
      file.write_bytes(source)
    subprocess.run([*command(), *frontend, *map(str, files)], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return [file.with_suffix(".o").read_bytes() for file in files]   # beside its source, as no output is named
  return []


@functools.cache
def _frontend(compiler: tuple[str, ...], arguments: tuple[str, ...]) -> tuple[str, ...]:
  """The arguments of the compiler proper, which takes many files, less those and the output; none where `compiler` does not tell. A clang with
  `arguments` that read from standard input is what starts it, for one file."""
  with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
    told = subprocess.run([*compiler, *arguments, "-###"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stderr
    for line in told.splitlines():
      if "-cc1" not in (words := shlex.split(line)): continue
      words = words[words.index("-cc1"):]
      output = words.index("-o")
      if words[output + 1] == words[-1] == "-": return (*words[:output], *words[output + 2:-1])
  return ()
