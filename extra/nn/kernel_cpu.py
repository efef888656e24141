"""Kernels in C for processors, which tinygrad compiles and runs like its own: what all of them share."""
import dataclasses, functools
from collections.abc import Callable
from typing import Any
from tinygrad import Device, Tensor, UOp, dtypes, getenv
from tinydet.parts import take

_parts = take("tinygrad.dtype:AddrSpace", "tinygrad.helpers:NUM_CPU_THREADS", "tinygrad.helpers:BEAM", "tinygrad.renderer:Estimates",
              "tinygrad.renderer.cstyle:ClangRenderer", "tinygrad.uop.ops:KernelInfo", "tinygrad.uop.ops:Ops", "tinygrad.uop.ops:ProgramInfo",
              "tinygrad.uop.ops:Ops.PROGRAM", "tinygrad:Tensor.custom_kernel", "tinygrad:Tensor.invalids", "tinygrad:UOp.unshard",
              "tinygrad:UOp._shard", "tinygrad:UOp.param_like", "tinygrad:UOp.maketuple", "tinygrad.uop.ops:Ops.BUFFER",
              "tinygrad.uop.ops:AxisType", instead="convolutions on the CPU are tinygrad's own, several times slower")
if _parts: AddrSpace, NUM_CPU_THREADS, BEAM, Estimates, ClangRenderer, KernelInfo, Ops, ProgramInfo, *_, AxisType = _parts

LEAST_WORK = 128 << 10   # products that are worth another core: tinygrad's own measure
WAYS = 8                 # of the likeliest plans to divide a kernel's work, how many BEAM is to choose from
BAND_MOST = 96 << 10     # numbers of a picture that are laid out at a time: they are to stay in a core's own cache
MOST_TRACED = 4096       # functions that are kept, of a few kilobytes each
_traced: dict[tuple, UOp] = {}   # what `run` has made a function of, by all that it depends on
Way = tuple[str, dict[str, int], int]   # code of a kernel, its sizes, and the memory that it works in
ways: dict[str, tuple[str, ...]] = {}   # a kernel's source -> those of others that do the same, in other pieces, where BEAM is to choose

# Of what follows in C, capitals that no enum has are defined for each kernel: COUNT is the length of the long axis, GROUPS those of the convolution,
# IN and OUT the channels of one group, BATCH the pictures, and so on. A vector that would reach over the end of the axis begins earlier, so do a
# block of channels and a tile at theirs: what is computed twice is the same both times.
HEAD = """
#if defined(__AVX512F__)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)   // or clang halves them: it prefers 256 bits on Intel's
enum { WIDEST = 16, SUMS = 24, ACROSS_MOST = 4 };
#elif defined(__AVX__)
enum { WIDEST = 8, SUMS = 12, ACROSS_MOST = 2 };
#elif defined(__aarch64__)
enum { WIDEST = 4, SUMS = 24, ACROSS_MOST = 4 };
#else
enum { WIDEST = 4, SUMS = 12, ACROSS_MOST = 2 };
#endif
enum { LANES = COUNT < 2 ? 1 : COUNT < 4 ? 2 : COUNT < 8 || WIDEST == 4 ? 4 : COUNT < 16 || WIDEST == 8 ? 8 : 16 };
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
#define UNROLLED _Pragma("clang loop unroll(full)") for
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define WHOLE(a, b) (((a) + (b) - 1) / (b))
#define APART __attribute__((noinline)) static   // long ones: all in one function takes clang half as long again
"""

TAIL = """
#if defined(__AVX512F__)
#pragma clang attribute pop
#endif
"""

WITH_BIAS = """
#define BIAS_PARAMETER , const float *restrict bias
#define BIAS_FROM(channel) , bias + channel
#define BIAS(channel) bias[channel]
"""
WITHOUT_BIAS = """
#define BIAS_PARAMETER
#define BIAS_FROM(channel)
#define BIAS(channel) 0
"""

LINEAR = """
#define ACTIVATED(x) x
"""
# 2^y as 2^whole * 2^part, the latter, of a number within a half of 0, as seven terms of its series
SILU = """
typedef int whole __attribute__((vector_size(4 * LANES), aligned(4)));
static inline vector above_sigmoid(vector x) {   // 1 + exp(-x)
  vector y = __builtin_elementwise_max(__builtin_elementwise_min(x * -1.44269504f, (vector){0} + 126), (vector){0} - 126);
  whole n = __builtin_convertvector(y + 127.5f, whole) - 127;
  y -= __builtin_convertvector(n, vector);
  vector part = ((((((y * 1.5403530e-4f + 1.3333558e-3f) * y + 9.6181291e-3f) * y + 5.5504109e-2f) * y + 0.24022651f) * y + 0.69314718f) * y + 1);
  return 1 + part * (vector)((n + 127) << 23);
}
static inline vector silu(vector x) { return x / above_sigmoid(x); }
#define ACTIVATED(x) silu(x)
"""

# Pictures [GROUPS*IN, HEIGHT, COLUMNS] as they are: the ROWS rows of one from `top` on, sorted into PHASE_ROWS x PHASE_COLUMNS phases of the stride
# and with zeros around
LAY_OUT = """
APART void lay_out(float *restrict to, const float *restrict picture, long top) {
  for (int r = 0; r < ROWS; r++) UNROLLED (int p = 0; p < PHASE_ROWS; p++) {
    const long row = (top + r) * STRIDE + p - PADDING;
    UNROLLED (int q = 0; q < PHASE_COLUMNS; q++) {
      float *line = to + (p * PHASE_COLUMNS + q) * ROWS * PITCH + r * PITCH;
      const int start = q < PADDING ? WHOLE(PADDING - q, STRIDE) : 0, stop = LEAST(PITCH, (COLUMNS - 1 + PADDING - q) / STRIDE + 1);
      if (row < 0 || row >= HEIGHT) { for (int c = 0; c < PITCH; c++) line[c] = 0; continue; }
      const float *from = picture + row * COLUMNS + q - PADDING;
      for (int c = 0; c < start; c++) line[c] = 0;
      for (int c = start; c < stop; c++) line[c] = from[c * STRIDE];
      for (int c = stop; c < PITCH; c++) line[c] = 0;
    }
  }
}
"""


@functools.cache   # inside a `function` a device cannot be asked
def _renderer() -> Any: return Device["CPU"].renderer


def fits(*tensors: Tensor) -> bool:
  """Whether these kernels can compute with `tensors`: all are on the CPU, or on the same several CPU devices and there divided by their first axis or
  not at all, and its kernels are C."""
  first = tensors[0].device
  if not _parts or any(t.device != first for t in tensors) or not isinstance(_renderer(), ClangRenderer): return False
  if isinstance(first, str): return on_host(first)
  return all(map(on_host, first)) and all(t.uop.axis in (None, 0) for t in tensors)


def on_host(device: str) -> bool:
  """Whether it is one of tinygrad's CPU devices: CPU, CPU:1, ..."""
  return device.partition(":")[0] == "CPU"


def shards(x: Tensor) -> int:
  """Among how many devices the first axis of `x` is divided."""
  return len(x.device) if isinstance(x.device, tuple) and x.uop.axis == 0 else 1


def divide(x: Tensor, devices: int) -> Tensor:
  """`x` with its first axis divided among its devices, so many, each of which has it whole or its own part already."""
  return x if shards(x) == devices else Tensor(x.uop._shard(0, UOp.range(devices, -1, AxisType.DEVICE)).unshard(0))


def parts_of(products: int) -> int:
  """Into how many parts, for as many cores, a kernel of so many multiplications is divided."""
  return max(1, min(NUM_CPU_THREADS.value, products // LEAST_WORK))


def searched() -> int:
  """How far BEAM is to search for the fastest of several ways; 0 where it is not."""
  return getenv("JITBEAM", BEAM.value) if _parts else 0


def with_taps(code: str, taps: list[list[tuple[int, int]]]) -> str:
  """`code` behind the tables that it reads its taps from: of each phase some, each (step in the input, place in the weight)."""
  starts = [sum(map(len, taps[:phase])) for phase in range(len(taps) + 1)]
  tables = f"static const struct {{ int x, w; }} taps[] = {{ {', '.join(f'{{{x}, {w}}}' for phase in taps for x, w in phase)} }};\n"
  return tables + f"static const int first[] = {{ {', '.join(map(str, starts))} }};\n" + code


def bands(pictures: int, rows: int, over: int, row: int, products: int, cores: int) -> list[tuple[int, int]]:
  """Rows of the output and parts of the channels that a part of the work takes, of so many `pictures` of `rows`, each of which is laid out in `row`
  numbers and takes `products` multiplications: first those of which the last core to be ready is ready first."""
  def cost(band: int, splits: int) -> float:
    # sixteen multiplications, or four numbers laid out, in a cycle
    return -(-pictures * -(-rows // band) * splits // cores) * (band * products / splits / 16 + (band + over) * row / 4 + 1000)
  likely = [band for band in range(1, rows + 1) if band == 1 or (band + over) * row <= BAND_MOST]
  return sorted(((band, splits) for band in likely for splits in (1, 2, 4)), key=lambda choice: cost(*choice))


def spelled(name: str, code: str, cores: int, sizes: dict[str, int]) -> str:
  """The whole source of a kernel, which needs no header."""
  return "".join(f"#define {key} {value}\n" for key, value in {"NAME": name, "CORES": cores, **sizes}.items()) + HEAD + code + TAIL


def c_kernel(name: str, code: str, size: int | tuple[int | Tensor, ...], products: int, tensors: tuple[Tensor, ...], sizes: dict[str, int],
             scratch: int = 0, others: Callable[[], list[Way]] = list) -> Any:
  """The `size` numbers that the kernel makes of `tensors`, which it finds in memory as one row each, or of several sizes a tuple of such results,
  where a tensor is one that it changes in place; `products` are its multiplications. Where `tensors` are divided among devices, all this is of one
  device's part, and so are the results divided.

  `code` defines the function NAME(outs..., scratch, tensors..., core), where `scratch` numbers of memory for a part are asked for, else NAME(outs...,
  tensors..., core); `sizes` are the capitals in it. `others` gives more ways to do the same, of which BEAM takes the one that it finds fastest."""
  cores = parts_of(products)
  written = (size,) if isinstance(size, int) else size
  source = spelled(name, code, cores, sizes)
  if searched():
    found = others()
    ways[source] = tuple(text for text in dict.fromkeys(spelled(name, way[0], cores, way[1]) for way in found) if text != source)
    scratch = max([scratch, *(way[2] for way in found)])
  outs = (*written, cores * scratch) if scratch else written

  def program(*arguments: UOp) -> UOp:
    core = UOp.param(len(arguments), dtypes.int, (), vmin_vmax=(0, cores - 1), name="core_id", addrspace=AddrSpace.ALU)
    moved = 4 * sum(t.numel() // shards(t) if isinstance(t, Tensor) else t for t in (*written, *tensors))
    sink = UOp.sink(arg=KernelInfo(name=name, estimates=Estimates(2 * products, moved, moved)))
    numbers = tuple(range(len(arguments)))
    info = ProgramInfo(name, (cores, 1, 1), (1, 1, 1), (core,), numbers, numbers[:len(outs)], numbers[len(outs):], _renderer().target)
    return UOp(Ops.PROGRAM, src=(sink, UOp(Ops.LINEAR, src=(*arguments, core)), UOp(Ops.SOURCE, arg=source)), arg=info)

  divided = any(shards(t) > 1 for t in tensors)

  def memory(numbers: int) -> Tensor:
    made = Tensor.invalids(numbers, dtype=dtypes.float32, device=tensors[0].device)
    return Tensor(made.uop.unshard(0)) if divided else made

  first, *rest = (t if isinstance(t, Tensor) else memory(t) for t in outs)
  results = tuple(first.custom_kernel(*rest, *tensors, fxn=program)[:len(written)])
  return results[0] if isinstance(size, int) else results


def run(key: tuple, make: Callable[..., Any], *tensors: Tensor, gradient: Callable | None = None) -> Any:
  """`make(*tensors)`, which is a kernel of them, or a tuple of its results. As a function of its own that makes its own memory, that and `tensors` of
  one axis: in each other way tinygrad copies the result, or what is assigned to later, as weights are.

  `key` and the kinds of `tensors` say all that `make` depends on: what is traced once is kept under them, as tracing is most of a second start."""
  rows = tuple(map(_row, tensors))
  inputs = [row.uop for row in rows]
  whole = (key, parts_of(1 << 60), searched(), *((u.dtype, u.shape, u.device, u.axis, inputs.index(u)) for u in inputs))
  if (body := _traced.get(whole)) is None:
    if len(_traced) >= MOST_TRACED: _traced.clear()
    body = _traced[whole] = _body(make, inputs)
  call = body.call(*dict.fromkeys(inputs), grad_fxn=gradient, name=key[0], precompile=True)
  # contiguous, or it is run at each use
  results = tuple(Tensor(call.gettuple(i)).contiguous() for i in range(len(body.src)))
  return results[0] if len(results) == 1 else results


def _body(make: Callable[..., Any], inputs: list[UOp]) -> UOp:
  """What `make` computes of parameters in place of `inputs`, a tuple. As tinygrad's `function` makes it, of which only what kernels need is done."""
  parameters = {u: u.param_like(i) for i, u in enumerate(dict.fromkeys(inputs))}
  made = make(*(Tensor(parameters[u]) for u in inputs))
  body = UOp.maketuple(*(t.uop for t in ((made,) if isinstance(made, Tensor) else made)))
  # numbered from 0, or no other process would find it in the cache of graphs
  own = [u for u in body.toposort() if u.op is Ops.BUFFER]
  return body.substitute({u: u.replace(arg=dataclasses.replace(u.arg, slot=i)) for i, u in enumerate(own)})


def _row(x: Tensor) -> Tensor:
  """`x` as one axis. What `run` gave is that already, below its shape, and tinygrad would copy it."""
  u = x.uop
  while u.op is Ops.RESHAPE: u = u.src[0]
  return Tensor(u) if u.op is Ops.CONTIGUOUS and len(u.shape) == 1 else x.reshape(-1).contiguous()
