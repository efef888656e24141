"""Several kernels to one run of clang: the same object files as one by one, whatever clang is at hand."""
import itertools, stat, subprocess, sys
import numpy as np, pytest
from tinygrad import Tensor, codegen
from tinygrad.engine import realize
from tinydet.runtime import clang
from tinydet.runtime.together import MOST, batches, compile_all

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kernels are compiled one by one there")
FLAGS = ("-fno-unroll-loops", "-c", "-x", "c", "-O2", "-fPIC", "-ffreestanding", "-nostdlib", "-fno-ident", "--target=x86_64-none-unknown-elf")


def source(i: int) -> bytes: return f"void f(float *x) {{ for (int i = 0; i < {i} * 100; i++) x[i] *= {i}; }}".encode()


def asked(count: int) -> list:
  """Of two kinds, by turns."""
  return [((*FLAGS, ("-march=x86-64", "-march=x86-64-v3")[i % 2], "-", "-o", "-"), source(i)) for i in range(2, count + 2)]


def alone(arguments: tuple, source: bytes) -> bytes:
  return subprocess.run([*clang.command(), *arguments], input=source, capture_output=True, check=True).stdout


@pytest.fixture
def runs(monkeypatch) -> list:
  """The commands that are run."""
  begun, run, output = [], subprocess.run, subprocess.check_output
  monkeypatch.setattr(subprocess, "run", lambda command, **options: begun.append(command) or run(command, **options))
  monkeypatch.setattr(subprocess, "check_output", lambda command, **options: begun.append(command) or output(command, **options))
  return begun


def test_the_same_files_as_one_by_one(runs):
  what = asked(9)
  expected = [alone(*each) for each in what]
  assert len(set(expected)) == 9
  clang._frontend.cache_clear()
  runs.clear()
  assert clang.objects(what) == expected
  assert len(runs) == 4, "two kinds, each asked about and run once"
  assert clang.objects(what[::2]) == expected[::2] and len(runs) == 5
  assert clang.objects(what[:1]) == expected[:1] and clang.objects([]) == []


@pytest.mark.parametrize("refused", ["-cc1", "-###", "nothing is written"])
def test_a_compiler_that_takes_one_at_a_time(tmp_path, monkeypatch, refused, runs):
  """A wrapper around clang that does not know its inner ways, or a disk that is full."""
  what = asked(4)
  expected = [alone(*each) for each in what]
  wrapper = tmp_path/"clang"
  command = " ".join(clang.command())
  end = "exit 0" if refused == "nothing is written" else "exit 1"
  wrapper.write_text(f'#!/bin/sh\nfor word in "$@"; do case "$word" in {"-cc1" if refused[0] != "-" else refused}) {end};; esac; done\n'
                     f'exec {command} "$@"\n')
  wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setenv("CC", str(wrapper))
  runs.clear()
  assert clang.objects(what) == expected and sum(command[0] == str(wrapper) for command in runs) >= 4 + 2


def test_what_cannot_be_compiled_is_told():
  what = asked(3)
  what[1] = what[1][0], b"float f(void) { return nonsense; }"
  with pytest.raises(subprocess.CalledProcessError): clang.objects(what)


def test_parts_that_end_together():
  tasks = list(range(45))
  parts = list(batches(tasks, 2))
  assert list(itertools.chain(*parts)) == tasks and len(parts[0]) == MOST and len(parts[-1]) == len(parts[-2]) == 1
  assert [len(part) for part in batches(tasks[:3], 2)] == [1, 1, 1] and list(batches([], 2)) == []


@pytest.fixture
def tasks(monkeypatch, tmp_path) -> list:
  """Seven kernels to compile, none of which was ever compiled."""
  found, x = [], Tensor(np.ones((5, 12), np.float32)).realize()
  def note(one, arguments):
    found.extend(arguments)
    return [one(argument) for argument in found]
  monkeypatch.setattr(realize, "map", note, raising=False)
  monkeypatch.setattr(realize, "get_worker_pool", lambda: None)
  monkeypatch.setattr(realize, "to_program_cache", {})
  Tensor.realize(*[(x + i).sum(1) * (i + 1) for i in range(7)])
  assert len(found) == 7
  return found


def test_programs_as_tinygrad_makes_them(tasks, monkeypatch):
  renderer = tasks[0][1][1]
  compiler = renderer.compiler
  monkeypatch.setattr(compiler, "cachekey", None)
  monkeypatch.setattr(codegen, "to_program_cache", {})
  expected = [realize._compile_kernel(task) for task in tasks]
  given, objects = [], clang.objects
  monkeypatch.setattr(clang, "objects", lambda asked: given.append(len(asked)) or objects(asked))
  made = compile_all(realize._compile_kernel, tasks)
  assert made == expected and given == [7] and renderer.compiler is compiler
  assert all(program.src[-1].arg[:4] == b"\x7fELF" for _, program in made)


def test_kernels_that_are_kept_are_not_compiled_again(tasks, monkeypatch):
  compiler = tasks[0][1][1].compiler
  monkeypatch.setattr(compiler, "cachekey", "test_together")
  from tinydet.runtime import together
  program, _, _, *rest = together._parts()
  table: dict = {}
  monkeypatch.setattr(together, "_parts", lambda: (program, lambda name, key: table.get((name, key)),
                                                   lambda name, key, value: table.__setitem__((name, key), value), *rest))
  first = compile_all(realize._compile_kernel, tasks[:4])
  assert len(table) == 4
  given, objects = [], clang.objects
  monkeypatch.setattr(clang, "objects", lambda asked: given.append(len(asked)) or objects(asked))
  assert compile_all(realize._compile_kernel, tasks)[:4] == first and given == [3] and len(table) == 7


def test_an_error_is_the_kernels_own(tasks, monkeypatch):
  monkeypatch.setattr(type(tasks[0][1][1]), "render", lambda self, uops: "nonsense")
  monkeypatch.setattr(tasks[0][1][1].compiler, "cachekey", None)
  with pytest.raises(subprocess.CalledProcessError): compile_all(realize._compile_kernel, tasks)
