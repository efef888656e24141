"""An optimiser's update on processors: a dozen tensors at a time, each with all that is kept of it, written where they lie by one kernel in C; and
the sum of the squares of many gradients.

tinygrad's own has a kernel for each tensor that changes, some hundreds of them, and reads the gradient once for each. Its sums wait for each
addition."""
from collections.abc import Sequence
from typing import NamedTuple
from tinygrad import Tensor
from tinydet.nn.kernel_cpu import c_kernel, parts_of

MOST_ARGUMENTS = 62   # a kernel takes, beside the core's number
WORK = 8              # as many multiplications as a number costs, in what `c_kernel` counts

# `now` is what changes from update to update. All tensors, one after the other, are a row of TOTAL numbers, of which each core has a part.
CODE = """
enum { SCALE, LR, BIAS_LR, MOMENTUM, LR_ADAM, ROOT, EMA_DECAY, FIRM };
static void part(long from, long to, float *restrict p, const float *restrict g, float *restrict first, float *restrict second, float *restrict ema,
                 const float *restrict now, float decay, int is_bias) {
  const float scale = now[SCALE], lr = is_bias ? now[BIAS_LR] : now[LR], momentum = now[MOMENTUM], average = now[EMA_DECAY];
  for (long i = from; i < to; i++) {
    const float d = g[i] * scale + (DECOUPLED ? 0 : decay * p[i]);
    float value = p[i];
    if (ADAM) {
      const float a = first[i] = BETA1 * first[i] + REST1 * d, b = second[i] = BETA2 * second[i] + REST2 * d * d;
      if (DECOUPLED) value *= 1 - lr * decay;
      value -= now[LR_ADAM] * a / (__builtin_sqrtf(b) / now[ROOT] + EPSILON);
    } else {
      const float a = first[i] = momentum * first[i] + d;
      value -= lr * (NESTEROV ? d + momentum * a : a);
    }
    p[i] = value;
    if (EMA) ema[i] = average * ema[i] + (1 - average) * value;
  }
}
void NAME(PARAMETERS, const float *now, int core) {
  if (!now[FIRM]) return;   // something was not finite: all stays as it was
  float *const tensors[][KEPT] = { TENSORS };
  const float *const gradients[] = { GRADIENTS };
  const long begin = (long)TOTAL * core / CORES, end = (long)TOTAL * (core + 1) / CORES;
  long start = 0;
  for (int t = 0; t < COUNT; start += sizes[t++].size) {
    const long from = begin - start, to = end - start;
    float *const *own = tensors[t];
    part(from < 0 ? 0 : from, to > sizes[t].size ? sizes[t].size : to, own[0], gradients[t], own[1], ADAM ? own[2] : 0, EMA ? own[KEPT - 1] : 0, now,
         sizes[t].decay, sizes[t].is_bias);
  }
}
"""

# Each core has a part of the row of all numbers, as above. In float32 for so many of them, then in float64.
SQUARES = """
enum { PIECE = 1 << 14 };
static double squares(const float *restrict x, long count) {
  double total = 0;
  for (long from = 0; from < count; from += PIECE) {
    const long to = LEAST(count, from + PIECE);
    long i = from;
    vector sums[8] = {0};
    for (; i + 8 * LANES <= to; i += 8 * LANES) UNROLLED (int k = 0; k < 8; k++) {
      const vector v = *(const vector *)(x + i + k * LANES);
      sums[k] += v * v;
    }
    float rest = 0;
    for (; i < to; i++) rest += x[i] * x[i];
    const vector all = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    UNROLLED (int l = 0; l < LANES; l++) rest += all[l];
    total += rest;
  }
  return total;
}
void NAME(float *restrict out, PARAMETERS, int core) {
  const float *const tensors[] = { TENSORS };
  const long begin = (long)TOTAL * core / CORES, end = (long)TOTAL * (core + 1) / CORES;
  long start = 0;
  double total = 0;
  for (int t = 0; t < TENSOR_COUNT; start += sizes[t++]) {
    const long from = LEAST(begin > start ? begin - start : 0, sizes[t]), to = LEAST(end > start ? end - start : 0, sizes[t]);
    total += squares(tensors[t] + from, to - from);
  }
  out[core] = total;
}
"""


class Entry(NamedTuple):
  """A tensor to update: it and all that is kept of it (momentum or first moment, second moment, average), its gradient f32, and its kind."""
  kept: tuple[Tensor, ...]
  gradient: Tensor
  decay: float
  is_bias: bool


def update(entries: Sequence[Entry], now: Tensor, constants: dict[str, int | str]) -> None:
  """Let all `entries` learn, in as few kernels as can be; what they keep is then to be realised. `now` f32 [8] is what CODE reads: what a gradient
  is multiplied by, learning rate, that of biases, momentum, Adam's rate and root, the average's decay, and 1, or 0 for no change. `constants` are
  ADAM, DECOUPLED, NESTEROV, EMA (0 or 1), BETA1, BETA2, REST1 and REST2, what they lack to 1, and EPSILON."""
  each = len(entries[0].kept) + 1
  most = (MOST_ARGUMENTS - 1) // each
  for at in range(0, len(entries), most): _together(entries[at:at + most], now, constants)


def _together(entries: Sequence[Entry], now: Tensor, constants: dict[str, int | str]) -> None:
  kept, count = len(entries[0].kept), range(len(entries))
  table = ", ".join(f"{{ {e.gradient.numel()}, {e.decay!r}f, {int(e.is_bias)} }}" for e in entries)
  code = f"static const struct {{ long size; float decay; int is_bias; }} sizes[] = {{ {table} }};\n" + CODE
  total = sum(e.gradient.numel() for e in entries)
  named = {"PARAMETERS": ", ".join([f"float *t{i}_{k}" for i in count for k in range(kept)] + [f"const float *g{i}" for i in count]),
           "TENSORS": ", ".join("{ " + ", ".join(f"t{i}_{k}" for k in range(kept)) + " }" for i in count),
           "GRADIENTS": ", ".join(f"g{i}" for i in count), "TOTAL": total, "COUNT": len(entries), "KEPT": kept, **constants}
  tensors = [t for e in entries for t in e.kept]
  for tensor, changed in zip(tensors, c_kernel("update", code, tuple(tensors), total * WORK, (*(e.gradient for e in entries), now), named)):
    tensor.replace(changed)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
  """Of all numbers of `tensors`, f32, as f32 [1]."""
  rows = [t.contiguous() for t in tensors]
  sums = [_squares(rows[at:at + MOST_ARGUMENTS - 1]) for at in range(0, len(rows), MOST_ARGUMENTS - 1)]
  return (sums[0].cat(*sums[1:]) if len(sums) > 1 else sums[0]).sum().reshape(1)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
  """A sum of each core that takes part, f32 [cores]."""
  total = sum(t.numel() for t in tensors)
  names = [f"t{i}" for i in range(len(tensors))]
  code = f"static const long sizes[] = {{ {', '.join(str(t.numel()) for t in tensors)} }};\n" + SQUARES
  return c_kernel("sum_of_squares", code, parts_of(total), total, tuple(tensors), {
    "PARAMETERS": ", ".join(f"const float *{name}" for name in names), "TENSORS": ", ".join(names), "TENSOR_COUNT": len(tensors), "TOTAL": total,
    "COUNT": 16})
