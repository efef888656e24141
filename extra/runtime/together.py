"""Kernels compiled several at a time: a run of clang takes as long to load itself as to compile a small one."""
import copy, functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from tinydet.runtime import clang
from tinydet.parts import take

MOST = 8   # kernels to a run: with more, little is saved


@functools.cache   # asked for when tinygrad is there
def _parts() -> tuple[Any, ...] | None:
  return take("tinygrad.codegen:do_to_program", "tinygrad.helpers:diskcache_get", "tinygrad.helpers:diskcache_put", "tinygrad.helpers:Context",
              "tinygrad.runtime.support.compiler_cpu:ClangCompiler", "tinygrad.uop.ops:UOp", "tinygrad.uop.ops:Ops", "tinygrad.uop.ops:Ops.BINARY",
              instead="each kernel is compiled by a run of clang of its own")


def batches(tasks: list, processes: int) -> Iterator[list]:
  """`tasks` in their order, several at a time: fewer towards the end, so that all of so many processes are done at about the same time."""
  at = 0
  while at < len(tasks):
    count = max(1, min(MOST, (len(tasks) - at) // processes)) if _parts() else 1
    yield tasks[at:at + count]
    at += count


def compile_all(one: Callable[[tuple], tuple], tasks: list[tuple]) -> list[tuple]:
  """What tinygrad's `_compile_kernel`, which is `one`, makes of each of `tasks`: (number, (kernel, renderer), settings) -> (number, program). Raises
  what it would raise for the first of them that cannot be compiled."""
  if (parts := _parts()) is None: return [one(task) for task in tasks]
  program_of, kept, keep, Context, ClangCompiler, UOp, Ops, _ = parts
  made: list[tuple] = []
  waiting: list[tuple] = []   # (place in `made`, compiler, source, what clang is asked for it)
  def later(compiler: Any, source: str) -> bytes:
    if compiler.cachekey is not None and (found := kept(compiler.cachekey, source)) is not None: return found
    with clang.noting() as asked: compiler.compile(source)
    waiting.append((len(made), compiler, source, *asked))
    return b""
  for task in tasks:
    number, (kernel, renderer), settings = task
    if type(renderer.compiler) is not ClangCompiler or settings.get("DEBUG", 0) >= 7:   # which shows what clang made
      made.append(one(task))
      continue
    own = copy.copy(renderer)   # a device's is everybody's
    own.compiler = SimpleNamespace(compile_cached=functools.partial(later, renderer.compiler))
    with Context(**settings): made.append((number, program_of(kernel, own)))
  for (place, compiler, source, _), binary in zip(waiting, clang.objects([asked for *_, asked in waiting])):
    number, program = made[place]
    made[place] = number, program.replace(src=(*program.src[:-1], UOp(Ops.BINARY, arg=binary)))
    if compiler.cachekey is not None: keep(compiler.cachekey, source, binary)
  return made
