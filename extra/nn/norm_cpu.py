"""Batch norm on the batch's own statistics, and the activation behind it, on processors: a kernel in C on the way there and one on the way back.

tinygrad's own reads the picture four times on the way there and six times on the way back, in a dozen kernels. Here a core takes a channel, of all
pictures, through all its passes: it comes from memory once, the later passes find it in the core's own cache."""
from tinygrad import Tensor, UOp
from tinydet.nn.kernel_cpu import SILU, c_kernel, run

# What follows the norm, and its slope times a gradient. The slope of x sigmoid(x) is s + x s (1 - s), with s = sigmoid(x).
ACTIVATIONS = {
  "": """
static inline vector active(vector z) { return z; }
static inline vector back(vector z, vector g) { return g; }
""",
  "relu": """
static inline vector active(vector z) { return __builtin_elementwise_max(z, (vector){0}); }
static inline vector back(vector z, vector g) { return KEPT(g, z > 0); }
""",
  "silu": SILU + """
static inline vector active(vector z) { return silu(z); }
static inline vector back(vector z, vector g) {
  const vector s = 1 / above_sigmoid(z);
  return g * s * (1 + z * (1 - s));
}
"""}

# Each channel's numbers, COUNT in a picture at a time, vector after vector; the last vector overlaps the one before, of which sums take LAST lanes.
OVER = """
enum { LAST = COUNT % LANES };
typedef int bits __attribute__((vector_size(4 * LANES), aligned(4)));
static inline double whole_of(vector v) { double all = 0; for (int l = 0; l < LANES; l++) all += v[l]; return all; }
static inline bits last_lanes(void) { bits last; UNROLLED (int l = 0; l < LANES; l++) last[l] = l < LANES - LAST ? 0 : -1; return last; }
#define KEPT(v, last) ((vector)((bits)(v) & (last)))
#define AT(p, i) (*(const vector *)((p) + (i)))
"""

FORWARD = """
void NAME(float *restrict out, float *restrict means, float *restrict variances, const float *restrict x, const float *restrict weight,
          const float *restrict bias, int core) {
  const bits last = last_lanes();
  for (long c = (long)CHANNELS * core / CORES; c < (long)CHANNELS * (core + 1) / CORES; c++) {
    double sum = 0;
    for (long b = 0; b < BATCH; b++) {
      const float *in = x + (b * CHANNELS + c) * COUNT;
      vector s = {0}, t = {0};
      long i = 0;
      for (; i + 2 * LANES <= COUNT; i += 2 * LANES) { s += AT(in, i); t += AT(in, i + LANES); }
      for (; i + LANES <= COUNT; i += LANES) s += AT(in, i);
      if (LAST) s += KEPT(AT(in, COUNT - LANES), last);
      sum += whole_of(s + t);
    }
    const double mean = sum / ((double)BATCH * COUNT);
    const vector middle = (vector){0} + (float)mean;
    double squares = 0;
    for (long b = 0; b < BATCH; b++) {
      const float *in = x + (b * CHANNELS + c) * COUNT;
      vector s = {0}, t = {0}, d;
      long i = 0;
      for (; i + 2 * LANES <= COUNT; i += 2 * LANES) { d = AT(in, i) - middle; s += d * d; d = AT(in, i + LANES) - middle; t += d * d; }
      for (; i + LANES <= COUNT; i += LANES) { d = AT(in, i) - middle; s += d * d; }
      if (LAST) { d = AT(in, COUNT - LANES) - middle; s += KEPT(d * d, last); }
      squares += whole_of(s + t);
    }
    const double variance = squares / ((double)BATCH * COUNT), inverse = 1 / __builtin_sqrt(variance + EPSILON);
    means[c] = mean, variances[c] = variance;
    const float scale = weight[c] * inverse, shift = bias[c] - mean * (weight[c] * inverse);
    for (long b = 0; b < BATCH; b++) {
      const float *in = x + (b * CHANNELS + c) * COUNT;
      float *to = out + (b * CHANNELS + c) * COUNT;
      for (long i = 0; i + LANES <= COUNT; i += LANES) *(vector *)(to + i) = active(AT(in, i) * scale + shift);
      if (LAST) *(vector *)(to + COUNT - LANES) = active(AT(in, COUNT - LANES) * scale + shift);
    }
  }
}
"""

BACKWARD = """
void NAME(float *restrict out, float *restrict of_weight, float *restrict of_bias, const float *restrict gradient, const float *restrict x,
          const float *restrict weight, const float *restrict bias, const float *restrict means, const float *restrict variances, int core) {
  const bits last = last_lanes();
  for (long c = (long)CHANNELS * core / CORES; c < (long)CHANNELS * (core + 1) / CORES; c++) {
    const float mean = means[c], inverse = 1 / __builtin_sqrt((double)variances[c] + EPSILON), w = weight[c], shift = bias[c];
    double sum = 0, product = 0;
    for (long b = 0; b < BATCH; b++) {
      const float *in = x + (b * CHANNELS + c) * COUNT, *g = gradient + (b * CHANNELS + c) * COUNT;
      vector s = {0}, t = {0};
      for (long i = 0; i + LANES <= COUNT; i += LANES) {
        const vector normal = (AT(in, i) - mean) * inverse, d = back(normal * w + shift, AT(g, i));
        s += d, t += d * normal;
      }
      if (LAST) {
        const vector normal = (AT(in, COUNT - LANES) - mean) * inverse, d = KEPT(back(normal * w + shift, AT(g, COUNT - LANES)), last);
        s += d, t += d * normal;
      }
      sum += whole_of(s), product += whole_of(t);
    }
    of_weight[c] = product, of_bias[c] = sum;
    const float share = sum / ((double)BATCH * COUNT), slope = product / ((double)BATCH * COUNT), scale = w * inverse;
    for (long b = 0; b < BATCH; b++) {
      const float *in = x + (b * CHANNELS + c) * COUNT, *g = gradient + (b * CHANNELS + c) * COUNT;
      float *to = out + (b * CHANNELS + c) * COUNT;
      for (long i = 0; i < COUNT; i += LANES) {
        const long at = LEAST(i, COUNT - LANES);
        const vector normal = (AT(in, at) - mean) * inverse;
        *(vector *)(to + at) = (back(normal * w + shift, AT(g, at)) - share - normal * slope) * scale;
      }
    }
  }
}
"""

FOLLOW = """
void NAME(float *restrict means, float *restrict variances, long long *batches, const float *restrict mean, const float *restrict variance,
          int core) {
  for (int c = 0; c < COUNT; c++) {
    const float unbiased = variance[c] * CORRECTION;
    if (__builtin_isfinite(mean[c])) means[c] = (1 - MOMENTUM) * means[c] + MOMENTUM * mean[c];
    if (__builtin_isfinite(unbiased)) variances[c] = (1 - MOMENTUM) * variances[c] + MOMENTUM * unbiased;
  }
  *batches += 1;
}
"""

WORK = 16   # as many multiplications as a number costs on its way, in what `c_kernel` counts


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str = "") -> tuple[Tensor, Tensor, Tensor]:
  """x f32 [B,C,H,W] with mean 0 and variance 1 of each channel, times `weight` and plus `bias` [C], through an activation of `ACTIVATIONS`; and the
  mean and variance f32 [C] that it had, which have no gradient. For tensors that `kernel_cpu.fits` takes."""
  batch, channels, height, width = x.shape
  sizes = {"BATCH": batch, "CHANNELS": channels, "COUNT": height * width, "EPSILON": eps}
  code, numbers, amount, what = ACTIVATIONS[activation], x.numel(), x.numel() * WORK, (x.shape, eps, activation)

  def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
    return c_kernel("batch_norm", OVER + code + FORWARD, (numbers, channels, channels), amount, tensors, sizes)

  def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    return c_kernel("batch_norm_gradient", OVER + code + BACKWARD, (numbers, channels, channels), 2 * amount, tensors, sizes)

  def gradient(grad: UOp, call: UOp) -> tuple[UOp, ...]:
    # Mean and variance as they lie in memory, where `run` has them: without contiguous the kernel would run once more.
    own = map(Tensor, (*call.src[1:4], *(call.gettuple(i).contiguous() for i in (1, 2))))
    return tuple(t.uop for t in run(("batch_norm_gradient", *what), backward, Tensor(grad), *own))

  out, mean, variance = run(("batch_norm", *what), forward, x, weight, bias, gradient=gradient)
  return out.reshape(x.shape), mean.detach(), variance.detach()


def follow(running: tuple[Tensor, Tensor, Tensor], mean: Tensor, variance: Tensor, momentum: float, correction: float) -> None:
  """Let `running`, mean and variance f32 [C] and the number of batches i64, follow a batch's, whose variance is multiplied by `correction`: in one
  kernel for all three."""
  sizes = {"COUNT": mean.shape[0], "MOMENTUM": f"{momentum!r}f", "CORRECTION": f"{correction!r}f"}
  for tensor, changed in zip(running, c_kernel("batch_norm_running", FOLLOW, running, 1, (mean, variance), sizes)): tensor.replace(changed)
