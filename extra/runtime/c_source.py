"""A function of one tensor as C: the kernels that tinygrad makes of it for a processor, called one after the other, and a file of weights."""
import re
from collections.abc import Callable
from typing import NamedTuple
from tinygrad import Context, Tensor, TinyJit, UOp
from tinydet.errors import UserError
from tinydet.parts import take
from tinydet.runtime.graphs import lock

_parts = take("tinygrad.engine.jit:get_call_arg_uops", "tinygrad.uop.ops:Ops", "tinygrad.helpers:NUM_CPU_THREADS",
              instead="no C file can be written")

# what clang knows and gcc does not
_PORTABLE = r"""#ifndef __clang__
#define __builtin_bit_cast(type, value) (((union { __typeof__(value) from; type to; }){ .from = (value) }).to)
#define PICKED(a, b, is) ({ __typeof__(a) x_ = (a), y_ = (b); __typeof__(x_ is y_) m_ = x_ is y_; \
  (__typeof__(x_))((m_ & (__typeof__(m_))x_) | (~m_ & (__typeof__(m_))y_)); })
#define __builtin_elementwise_max(a, b) PICKED(a, b, >)
#define __builtin_elementwise_min(a, b) PICKED(a, b, <)
#endif"""


class Program(NamedTuple):
  """`code` in C with a function `run(weights, input, outputs...)`, and the bytes that `weights` points to."""
  code: str
  weights: bytes


def c_program(function: Callable[[Tensor], dict[str, Tensor]], example: Tensor) -> Program:
  """`function` of a realised tensor on the CPU as C for one core, for gcc and clang; its results are float32, by name. `weights` and `input` must lie
  at multiples of 64 bytes. UserError on another device, or where tinygrad has no such parts."""
  if not _parts: raise UserError("a C file cannot be written with this release of tinygrad; install the one that setup.py names")
  if example.device != "CPU": raise UserError(f"a C file is written from kernels for processors, and these are {example.device}'s; run with DEV=CPU")
  arguments_of, ops, _ = _parts
  with lock, Context(JIT=2, NUM_CPU_THREADS=1):
    graph = TinyJit(lambda x: {name: t.contiguous() for name, t in function(x).items()})
    graph.cnt = 1   # captured at this call
    results, calls = graph(example), graph.captured.linear.src
  written = {_place(u)[0] for call in calls for i, u in enumerate(_pointers(call, arguments_of)) if i in call.src[0].arg.outs}
  blob, pieces, memory, kernels, lines = bytearray(), {}, {}, {}, []

  def pointer(u: UOp) -> str:
    base, offset = _place(u)
    if base.op is ops.PARAM: return f"(void*)(input + {offset})"
    if base in written:
      memory.setdefault(base, f"m{len(memory)}")
      return f"(void*)({memory[base]} + {offset})"
    if base not in pieces:
      blob.extend(b"\0" * (-len(blob) % 64))
      pieces[base] = len(blob)
      blob.extend(bytes(base.buffer.as_memoryview()))
    return f"(void*)(weights + {pieces[base] + offset})"

  for call in calls:
    program = call.src[0]
    source = program.src[2].arg
    if source not in kernels: kernels[source] = f"k{len(kernels)}"
    arguments = [pointer(u) for u in _pointers(call, arguments_of)]
    for core in range(program.arg.launch_dims({})[0][0]):
      lines.append(f"  {kernels[source]}({', '.join([*arguments, *[str(core)] * len(program.arg.runtimevars)])});")
  bodies = [_alone(source, name) for source, name in kernels.items()]
  outs = [f"  __builtin_memcpy({name}, {pointer(t.uop.base)}, {t.nbytes()});" for name, t in results.items()]
  sizes = [f"static unsigned char {name}[{base.buffer.nbytes}] __attribute__((aligned(64)));" for base, name in memory.items()]
  signature = f"void run(const unsigned char* weights, const unsigned char* input, {', '.join(f'float* {name}' for name in results)}) {{"
  return Program("\n".join([_PORTABLE, *bodies, *sizes, signature, *lines, *outs, "}", ""]), bytes(blob))


def _pointers(call: UOp, arguments_of: Callable) -> list[UOp]: return [arguments_of(call)[i] for i in call.src[0].arg.globals]


def _place(u: UOp) -> tuple[UOp, int]:
  """The buffer that an argument lies in, and how many bytes from its beginning."""
  if (view := u.contiguous_view()) is None: return u, 0
  return view[0], view[1] * view[0].dtype.itemsize


def _alone(source: str, name: str) -> str:
  """A kernel's source as a part of a file: its function called `name`, no other name of it known to the next, its vectors as gcc has them too."""
  source = re.sub(r"typedef (\w[\w ]*) (\w+) __attribute__\(\(aligned\((\d+)\),ext_vector_type\(\d+\)\)\);",
                  r"typedef \1 \2 __attribute__((aligned(\3),vector_size(\3)));", source)
  macros = dict(re.findall(r"^#define (\w+)(?: (\w+)$)?", source, re.M))
  function = re.search(r"^void (\w+)\(", source, re.M)[1]
  function = macros.get(function) or function
  own = re.findall(r"^(?:static|APART) (?:const |inline )*(?:struct \{.*?\}|\w+) \*?(\w+)", source, re.M)
  own += re.findall(r"^typedef .*?(\w+)(?: __attribute__.*)?;", source, re.M)
  for inner in re.findall(r"^enum \{(.*?)\};", source, re.M | re.S): own += re.findall(r"(\w+) = ", inner)
  before = [f"#define {function} {name}", *(f"#define {each} {each}_{name}" for each in dict.fromkeys(own))]
  after = [f"#undef {each}" for each in dict.fromkeys([function, *own, *macros])]
  return "\n".join([*before, re.sub(r"^void ", "static void ", source, flags=re.M), *after])
