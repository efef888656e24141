"""Convolutions on processors: the output and both gradients as kernels in C, which tinygrad compiles and runs like its own.

tinygrad's own kernel multiplies each number about as often as it loads it. These keep as many sums as there are registers, a tile of some output
channels times some columns, and load a number once for a whole side of the tile: five times the speed on current processors. As C they are also
ready in a third of the time, since what takes tinygrad longest in a convolution is to spell it.

A picture lies in memory as one row of numbers. Where its rows are all padded to one pitch, the pixel that is so many rows and columns away is the
same step ahead for each, so a tap of the kernel is a constant step, and all columns of a picture together are one long axis. What comes out where a
window reaches over the end of a row is left out; in gradients it meets zeros."""
import functools, math
from collections.abc import Callable
from typing import Any
from tinygrad import Device, Tensor, UOp, dtypes, function
from tinydet.parts import take

_parts = take("tinygrad.dtype:AddrSpace", "tinygrad.helpers:NUM_CPU_THREADS", "tinygrad.renderer:Estimates", "tinygrad.renderer.cstyle:ClangRenderer",
              "tinygrad.uop.ops:KernelInfo", "tinygrad.uop.ops:Ops", "tinygrad.uop.ops:ProgramInfo", "tinygrad.uop.ops:Ops.PROGRAM",
              "tinygrad:Tensor.custom_kernel", "tinygrad:Tensor.invalids", instead="convolutions on the CPU are tinygrad's own, several times slower")
if _parts: AddrSpace, NUM_CPU_THREADS, Estimates, ClangRenderer, KernelInfo, Ops, ProgramInfo, *_ = _parts

LEAST_WORK = 128 << 10   # products that are worth another core: tinygrad's own measure

# Of what follows in C, capitals that no enum has are defined for each kernel: COUNT is the length of the long axis, GROUPS those of the convolution,
# IN and OUT the channels of one group, BATCH the pictures, and so on. A vector that would reach over the end of the axis begins earlier, so do a
# block of channels and a tile at theirs: what is computed twice is the same both times.
HEAD = """
#if defined(__AVX512F__)
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
"""

# Output [BATCH, GROUPS*OUT, PHASES, PLANE], of which PHASES have each its own taps: those from `first[phase]` on, x the step from the place of the
# output, w the place in the weight. Sums of DOWN output channels at ACROSS vectors of the long axis.
CORRELATE = """
enum { VECTORS = WHOLE(COUNT, LANES), FEWER = WHOLE(VECTORS, ACROSS_MOST - 1) * (ACROSS_MOST - 1) < WHOLE(VECTORS, ACROSS_MOST) * ACROSS_MOST,
       ACROSS = LEAST(VECTORS, ACROSS_MOST > 2 && FEWER ? ACROSS_MOST - 1 : ACROSS_MOST), TILES = WHOLE(VECTORS, ACROSS),
       DOWN = LEAST(OUT, SUMS / ACROSS), BLOCKS = WHOLE(OUT, DOWN) };
void NAME(float *restrict out, const float *restrict x, const float *restrict weight BIAS_PARAMETER, int core) {
  const long items = (long)BATCH * TILES * PHASES * GROUPS * BLOCKS;
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const int block = item % BLOCKS, group = item / BLOCKS % GROUPS, phase = item / BLOCKS / GROUPS % PHASES;
    const long tile = item / BLOCKS / GROUPS / PHASES % TILES, b = item / BLOCKS / GROUPS / PHASES / TILES;
    const long o = LEAST(block * DOWN, OUT - DOWN);
    const float *in = x + (b * GROUPS + group) * IN * X_PLANE, *w = weight + (long)group * OUT * IN * TAPS + o * W_OUT;
    long at[ACROSS];
    UNROLLED (int v = 0; v < ACROSS; v++) at[v] = LEAST((tile * ACROSS + v) * LANES, COUNT - LANES);
    vector sum[DOWN][ACROSS];
    UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int v = 0; v < ACROSS; v++) sum[d][v] = (vector){0} + BIAS(group * OUT + o + d);
    for (int i = 0; i < IN; i++, in += X_PLANE, w += W_IN)
      for (int t = first[phase]; t < first[phase + 1]; t++) {
        vector a[ACROSS];
        UNROLLED (int v = 0; v < ACROSS; v++) a[v] = *(const vector *)(in + taps[t].x + at[v]);
        UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int v = 0; v < ACROSS; v++) sum[d][v] += a[v] * w[taps[t].w + d * W_OUT];
      }
    float *to = out + (((b * GROUPS + group) * OUT + o) * PHASES + phase) * PLANE;
    UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int v = 0; v < ACROSS; v++) sum[d][v] = ACTIVATED(sum[d][v]);
    if (WIDTH == PITCH) UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int v = 0; v < ACROSS; v++)
      *(vector *)(to + (long)d * PHASES * PLANE + at[v]) = sum[d][v];
    else UNROLLED (int v = 0; v < ACROSS; v++) {
      long row = at[v] / PITCH, column = at[v] % PITCH;
      if (column + LANES <= WIDTH) UNROLLED (int d = 0; d < DOWN; d++)   // most lie in one row
        *(vector *)(to + (long)d * PHASES * PLANE + row * WIDTH + column) = sum[d][v];
      else for (int l = 0; l < LANES; l++) {
        if (column < WIDTH) UNROLLED (int d = 0; d < DOWN; d++) to[(long)d * PHASES * PLANE + row * WIDTH + column] = sum[d][v][l];
        if (++column == PITCH) { column = 0; row++; }
      }
    }
  }
}
"""

# Gradient [GROUPS*OUT, IN, TAPS] of the weight: vectors run along the long axis, over which is summed. Sums of DOWN output channels with ACROSS pairs
# of an input channel and a tap; LAST are the lanes that a last, overlapping vector adds.
WEIGHT_GRADIENT = """
enum { DOWN = LEAST(OUT, 4), ACROSS = LEAST(IN * TAPS, SUMS / DOWN), BLOCKS = WHOLE(OUT, DOWN), TILES = WHOLE(IN * TAPS, ACROSS),
       LAST = COUNT % LANES };
typedef int bits __attribute__((vector_size(4 * LANES), aligned(4)));
void NAME(float *restrict out, const float *restrict x, const float *restrict gradient, int core) {
  bits last;
  UNROLLED (int l = 0; l < LANES; l++) last[l] = l < LANES - LAST ? 0 : -1;
  const long items = (long)GROUPS * BLOCKS * TILES;
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const long tile = item % TILES, block = item / TILES % BLOCKS, group = item / TILES / BLOCKS;
    const long o = LEAST(block * DOWN, OUT - DOWN), pair = LEAST(tile * ACROSS, IN * TAPS - ACROSS);
    long at[ACROSS];
    UNROLLED (int p = 0; p < ACROSS; p++) at[p] = (group * IN + (pair + p) / TAPS) * X_PLANE + taps[(pair + p) % TAPS].x;
    vector sum[DOWN][ACROSS];
    UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int p = 0; p < ACROSS; p++) sum[d][p] = (vector){0};
    for (long b = 0; b < BATCH; b++) {
      const float *in = x + b * GROUPS * IN * X_PLANE, *g = gradient + ((b * GROUPS + group) * OUT + o) * G_PLANE + G_START;
      for (int n = 0; n < COUNT / LANES; n++, in += LANES, g += LANES) {
        vector a[ACROSS];
        UNROLLED (int p = 0; p < ACROSS; p++) a[p] = *(const vector *)(in + at[p]);
        UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int p = 0; p < ACROSS; p++) sum[d][p] += a[p] * *(const vector *)(g + d * G_PLANE);
      }
      if (LAST) UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int p = 0; p < ACROSS; p++)
        sum[d][p] += *(const vector *)(in + at[p] + LAST - LANES) * (vector)(*(const bits *)(g + d * G_PLANE + LAST - LANES) & last);
    }
    vector done[DOWN][ACROSS];   // in memory: as a loop this compiles in two thirds of the time
    UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int p = 0; p < ACROSS; p++) done[d][p] = sum[d][p];
    for (int d = 0; d < DOWN; d++) for (int p = 0; p < ACROSS; p++) {
      vector all = done[d][p];
      UNROLLED (int half = LANES / 2; half; half /= 2) UNROLLED (int l = 0; l < half; l++) all[l] += all[l + half];
      out[(group * OUT + o + d) * IN * TAPS + pair + p] = all[0];
    }
  }
}
"""

WITH_BIAS = """
#define BIAS_PARAMETER , const float *restrict bias
#define BIAS(channel) bias[channel]
"""
WITHOUT_BIAS = """
#define BIAS_PARAMETER
#define BIAS(channel) 0
"""

LINEAR = """
#define ACTIVATED(x) x
"""
# 2^y as 2^whole * 2^part, the latter, of a number within a half of 0, as seven terms of its series
SILU = """
typedef int whole __attribute__((vector_size(4 * LANES), aligned(4)));
static inline vector silu(vector x) {
  vector y = __builtin_elementwise_max(__builtin_elementwise_min(x * -1.44269504f, (vector){0} + 126), (vector){0} - 126);
  whole n = __builtin_convertvector(y + 127.5f, whole) - 127;
  y -= __builtin_convertvector(n, vector);
  vector part = ((((((y * 1.5403530e-4f + 1.3333558e-3f) * y + 9.6181291e-3f) * y + 5.5504109e-2f) * y + 0.24022651f) * y + 0.69314718f) * y + 1);
  return x / (1 + part * (vector)((n + 127) << 23));
}
#define ACTIVATED(x) silu(x)
"""

Taps = list[list[tuple[int, int]]]   # of each phase: (step in the input, place in the weight)


@functools.cache   # inside a `function` a device cannot be asked
def _renderer() -> Any: return Device["CPU"].renderer


def fits(*tensors: Tensor) -> bool:
  """Whether these kernels can compute with `tensors`: all are on one CPU, and its kernels are C."""
  return bool(_parts) and all(t.device == "CPU" for t in tensors) and isinstance(_renderer(), ClangRenderer)


def _kernel(name: str, code: str, size: int, products: int, taps: Taps, tensors: tuple[Tensor, ...], sizes: dict[str, int]) -> Tensor:
  """The `size` numbers that the kernel makes of `tensors`, which it finds in memory as one row each; `products` are its multiplications."""
  cores = max(1, min(NUM_CPU_THREADS.value, products // LEAST_WORK))
  starts = [sum(map(len, taps[:phase])) for phase in range(len(taps) + 1)]
  source = "".join(f"#define {key} {value}\n" for key, value in {"NAME": name, "CORES": cores, "PHASES": len(taps), **sizes}.items())
  source += f"static const struct {{ int x, w; }} taps[] = {{ {', '.join(f'{{{x}, {w}}}' for phase in taps for x, w in phase)} }};\n"
  source += f"static const int first[] = {{ {', '.join(map(str, starts))} }};\n{HEAD}{code}"

  def program(*arguments: UOp) -> UOp:
    core = UOp.param(len(arguments), dtypes.int, (), vmin_vmax=(0, cores - 1), name="core_id", addrspace=AddrSpace.ALU)
    moved = 4 * (size + sum(t.numel() for t in tensors))
    sink = UOp.sink(arg=KernelInfo(name=name, estimates=Estimates(2 * products, moved, moved)))
    numbers = tuple(range(len(arguments)))
    info = ProgramInfo(name, (cores, 1, 1), (1, 1, 1), (core,), numbers, numbers[:1], numbers[1:], _renderer().target)
    return UOp(Ops.PROGRAM, src=(sink, UOp(Ops.LINEAR, src=(*arguments, core)), UOp(Ops.SOURCE, arg=source)), arg=info)

  return Tensor.invalids(size, dtype=dtypes.float32, device="CPU").custom_kernel(*tensors, fxn=program)[0]


def _run(make: Callable[..., Tensor], *tensors: Tensor, gradient: Callable | None = None) -> Tensor:
  """`make(*tensors)`, which is a kernel of them. As a function of its own that makes its own memory, that and `tensors` of one axis: in each other
  way tinygrad copies the result, or what is assigned to later, as weights are."""
  flat = (t.reshape(-1).contiguous() for t in tensors)
  return function(make, precompile=True, grad_fxn=gradient)(*flat).contiguous()   # without which it is run at each use


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int, silu: bool = False) -> Tensor:
  """2-D convolution in float32, with its gradients: x [B,Cin,H,W], weight [Cout,Cin/groups,KH,KW], bias [Cout] -> [B,Cout,OH,OW], with `silu` through
  SiLU, which costs nothing where a number is in a register anyway. On the way back the convolution is then run once more.

  For tensors that `fits` takes."""
  (batch, channels, *size), (out_channels, per_group, *kernel) = x.shape, weight.shape
  out_size = [(side + 2 * padding - k) // stride + 1 for side, k in zip(size, kernel)]
  over = [(k - 1) // stride for k in kernel]                    # rows and columns that a window reaches beyond its first
  rows, pitch = (side + o for side, o in zip(out_size, over))
  phases = [min(k, stride) for k in kernel]                     # a stride of 2 sorts the pixels into even and odd ones
  places = [(p, q, p * kernel[1] + q) for p in range(kernel[0]) for q in range(kernel[1])]
  products = batch * out_channels * math.prod(out_size) * per_group * len(places)
  x_taps = [[(((p % stride * phases[1] + q % stride) * rows + p // stride) * pitch + q // stride, w) for p, q, w in places]]
  common = {"BATCH": batch, "GROUPS": groups, "TAPS": len(places), "PITCH": pitch}
  one_way = common | {"COUNT": (out_size[0] - 1) * pitch + out_size[1], "IN": per_group, "OUT": out_channels // groups,
                      "X_PLANE": math.prod(phases) * rows * pitch}

  def forward(*tensors: Tensor, silu: bool = silu) -> Tensor:
    code = (WITHOUT_BIAS if bias is None else WITH_BIAS) + (SILU if silu else LINEAR) + CORRELATE
    sizes = {"PLANE": math.prod(out_size), "WIDTH": out_size[1], "W_OUT": per_group * len(places), "W_IN": len(places)}
    return _kernel("conv", code, batch * out_channels * math.prod(out_size), products, x_taps, tensors, one_way | sizes)

  # The gradient is padded to the pitch of the input. Of that of the input only what is not padding is computed, where it lies in one piece.
  inside = padding if stride == 1 else 0
  top = over[0] - inside + (over[1] > inside)
  in_rows, in_columns = rows - 2 * inside, pitch - 2 * inside
  g_rows = top + in_rows + inside

  def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    taps = [[((top + inside - p // stride) * pitch + inside - q // stride, w) for p, q, w in places if (p % stride, q % stride) == (a, b)]
            for a in range(phases[0]) for b in range(phases[1])]
    sizes = {"COUNT": (in_rows - 1) * pitch + in_columns, "IN": out_channels // groups, "OUT": per_group, "X_PLANE": g_rows * pitch,
             "PLANE": in_rows * in_columns, "WIDTH": in_columns, "W_OUT": len(places), "W_IN": per_group * len(places)}
    size = batch * channels * len(taps) * in_rows * in_columns
    return _kernel("conv_input_gradient", WITHOUT_BIAS + LINEAR + CORRELATE, size, products, taps, (grad, weight), common | sizes)

  def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    sizes = {"G_PLANE": g_rows * pitch, "G_START": top * pitch}
    return _kernel("conv_weight_gradient", WEIGHT_GRADIENT, math.prod(weight.shape), products, x_taps, (x, grad), one_way | sizes)

  def gradient(grad: UOp, call: UOp) -> tuple[UOp, ...]:
    x, flat_weight, *flat_bias = (Tensor(u) for u in call.src[1:3 + (bias is not None)])
    g = Tensor(grad)
    if silu:
      before = _run(functools.partial(forward, silu=False), x, flat_weight, *flat_bias)
      g = g * (s := before.sigmoid()) * (1 + before * (1 - s))
    g = g.reshape(batch, out_channels, *out_size)
    g = g.pad(((0, 0), (0, 0), (top, g_rows - top - out_size[0]), (0, over[1]))).reshape(-1).contiguous()
    of_x = _run(input_gradient, g, flat_weight).reshape(batch, channels, *phases, in_rows, in_columns)
    of_x = of_x.pad(((0, 0),) * 4 + ((inside, inside),) * 2).reshape(-1)
    return of_x.uop, _run(weight_gradient, x, g).uop, *([] if bias is None else [g.reshape(batch, out_channels, -1).sum((0, 2)).uop])

  x = x.pad(((0, 0), (0, 0), *((padding, side * stride - length - padding) for side, length in zip((rows, pitch), size))))
  x = x.reshape(batch, channels, rows, stride, pitch, stride).permute(0, 1, 3, 5, 2, 4)
  x = x.shrink((None, None, (0, phases[0]), (0, phases[1]), None, None))
  return _run(forward, x, weight, *([] if bias is None else [bias]), gradient=gradient).reshape(batch, out_channels, *out_size)
