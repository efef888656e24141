"""Depthwise convolutions on processors, as kernels in C: a few multiplications for each number, so what counts is to read and write it once.

A plane is laid out with zeros around in a core's own cache, and some rows of the output are made of it at a time, in whole vectors of a row."""
import math
from tinygrad import Tensor
from tinydet.nn.kernel_cpu import LAY_OUT, LINEAR, SILU, WITH_BIAS, WITHOUT_BIAS, c_kernel

# Output [BATCH, CHANNELS, OUT_H, WIDTH]
CONVOLVE = """
enum { DOWN = LEAST(OUT_H, 4) };
void NAME(float *restrict out, float *restrict scratch, const float *restrict x, const float *restrict weight BIAS_PARAMETER, int core) {
  float *mine = scratch + (long)core * SCRATCH;
  const long items = (long)BATCH * CHANNELS;
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const long channel = item % CHANNELS;
    float w[TAPS], *to = out + item * OUT_H * WIDTH;
    for (int t = 0; t < TAPS; t++) w[t] = weight[channel * TAPS + t];
    lay_out(mine, x + item * HEIGHT * COLUMNS, 0);
    for (int row = 0; row < OUT_H; row += DOWN) for (int column = 0; column < WIDTH; column += LANES) {
      const int r = LEAST(row, OUT_H - DOWN), c = LEAST(column, WIDTH - LANES);
      vector sum[DOWN];
      UNROLLED (int d = 0; d < DOWN; d++) sum[d] = (vector){0} + BIAS(channel);
      UNROLLED (int i = 0; i < KERNEL_ROWS; i++) UNROLLED (int j = 0; j < TAPS_A_ROW; j++) UNROLLED (int d = 0; d < DOWN; d++)
        sum[d] += *(const vector *)(mine + FROM(i, j) + (r + d) * PITCH + c) * w[i * TAPS_A_ROW + j];
      UNROLLED (int d = 0; d < DOWN; d++) *(vector *)(to + (r + d) * WIDTH + c) = ACTIVATED(sum[d]);
    }
  }
}
"""

# Gradient [CHANNELS, TAPS] of the weight. Sums of the taps of SOME rows of the kernel at a time; LAST are the lanes that a last, overlapping vector
# adds.
WEIGHT_GRADIENT = """
enum { SOME = LEAST(KERNEL_ROWS, SUMS < 2 * TAPS_A_ROW ? 1 : SUMS / TAPS_A_ROW), LAST = WIDTH % LANES };
typedef int bits __attribute__((vector_size(4 * LANES), aligned(4)));
void NAME(float *restrict out, float *restrict scratch, const float *restrict x, const float *restrict gradient, int core) {
  float *mine = scratch + (long)core * SCRATCH;
  bits last;
  UNROLLED (int l = 0; l < LANES; l++) last[l] = l < LANES - LAST ? 0 : -1;
  for (long channel = (long)CHANNELS * core / CORES; channel < (long)CHANNELS * (core + 1) / CORES; channel++) {
    vector all[KERNEL_ROWS][TAPS_A_ROW];
    for (long b = 0; b < BATCH; b++) {
      lay_out(mine, x + (b * CHANNELS + channel) * HEIGHT * COLUMNS, 0);
      const float *g = gradient + (b * CHANNELS + channel) * OUT_H * WIDTH;
      for (int some = 0; some < KERNEL_ROWS; some += SOME) {
        vector sum[SOME][TAPS_A_ROW];
        const int first = LEAST(some, KERNEL_ROWS - SOME);
        UNROLLED (int i = 0; i < SOME; i++) UNROLLED (int j = 0; j < TAPS_A_ROW; j++) sum[i][j] = (vector){0};
        for (int r = 0; r < OUT_H; r++) for (int column = 0; column < WIDTH; column += LANES) {
          const int c = LEAST(column, WIDTH - LANES);
          vector v = *(const vector *)(g + r * WIDTH + c);
          if (c != column) v = (vector)((bits)v & last);
          UNROLLED (int i = 0; i < SOME; i++) UNROLLED (int j = 0; j < TAPS_A_ROW; j++)
            sum[i][j] += v * *(const vector *)(mine + FROM((first + i), j) + r * PITCH + c);
        }
        UNROLLED (int i = 0; i < SOME; i++) UNROLLED (int j = 0; j < TAPS_A_ROW; j++)
          if (first + i >= some) all[first + i][j] = b ? all[first + i][j] + sum[i][j] : sum[i][j];
      }
    }
    for (int i = 0; i < KERNEL_ROWS; i++) for (int j = 0; j < TAPS_A_ROW; j++) {
      float sum = 0;
      for (int l = 0; l < LANES; l++) sum += all[i][j][l];
      out[channel * TAPS + i * TAPS_A_ROW + j] = sum;
    }
  }
}
"""

# Gradient [BATCH, CHANNELS, OUT_H, WIDTH] of the input behind a stride of SPACE. That of the output lies with zeros between its columns. Taps of one
# phase meet pixels of one phase: rows p, p + SPACE, ... of the kernel the rows whose number and the padding leave p.
INPUT_GRADIENT = """
enum { DOWN = OUT_H < SPACE ? 1 : LEAST(OUT_H / SPACE, 4) };
void NAME(float *restrict out, float *restrict scratch, const float *restrict gradient, const float *restrict weight, int core) {
  float *mine = scratch + (long)core * SCRATCH;
  const long items = (long)BATCH * CHANNELS;
  for (long p = 0; p < SCRATCH; p++) mine[p] = 0;   // what is no gradient stays so
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const float *w = weight + item % CHANNELS * TAPS, *plane = gradient + item * HEIGHT * COLUMNS;
    float *to = out + item * OUT_H * WIDTH;
    for (int r = 0; r < HEIGHT; r++)
      for (int c = 0; c < COLUMNS; c++) mine[(r + ABOVE) * PITCH + c * SPACE + BEFORE] = plane[r * COLUMNS + c];
    for (int row = 0; row < WHOLE(OUT_H, SPACE); row += DOWN) for (int column = 0; column < WIDTH; column += LANES) {
      const int c = LEAST(column, WIDTH - LANES);
      UNROLLED (int p = 0; p < SPACE; p++) {
        const int first = (p + SPACE * PADDING - PADDING) % SPACE, meets = (first + PADDING) / SPACE, count = WHOLE(OUT_H - first, SPACE);
        const int r = LEAST(row, count - DOWN);
        if (count < DOWN) continue;   // of so low a picture
        vector sum[DOWN];
        UNROLLED (int d = 0; d < DOWN; d++) sum[d] = (vector){0};
        UNROLLED (int u = 0; u < WHOLE(KERNEL_ROWS, SPACE); u++) if (p + SPACE * u < KERNEL_ROWS)
          UNROLLED (int j = 0; j < TAPS_A_ROW; j++) UNROLLED (int d = 0; d < DOWN; d++)
            sum[d] += *(const vector *)(mine + (ABOVE + r + d + meets - u) * PITCH + c + j) * w[(p + SPACE * u) * TAPS_A_ROW + TAPS_A_ROW - 1 - j];
        UNROLLED (int d = 0; d < DOWN; d++) *(vector *)(to + (first + (r + d) * SPACE) * WIDTH + c) = sum[d];
      }
    }
  }
}
"""

# where a tap of the kernel meets the first pixel of the output in what is laid out
FROM = """
#define FROM(i, j) (((i) % STRIDE * PHASE_COLUMNS + (j) % STRIDE) * ROWS * PITCH + (i) / STRIDE * PITCH + (j) / STRIDE)
"""


def _laid_out(batch: int, channels: int, size: tuple[int, int], out_size: tuple[int, int], kernel: tuple[int, int], stride: int) -> dict[str, int]:
  """What all kernels know of pictures of `size` of which `out_size` is made."""
  rows, pitch = (side + (k - 1) // stride for side, k in zip(out_size, kernel))
  phases = [min(k, stride) for k in kernel]
  return {"COUNT": out_size[1], "BATCH": batch, "CHANNELS": channels, "HEIGHT": size[0], "COLUMNS": size[1], "OUT_H": out_size[0],
          "WIDTH": out_size[1], "KERNEL_ROWS": kernel[0], "TAPS_A_ROW": kernel[1], "TAPS": math.prod(kernel), "STRIDE": stride, "ROWS": rows,
          "PITCH": pitch, "PHASE_ROWS": phases[0], "PHASE_COLUMNS": phases[1], "SCRATCH": math.prod(phases) * rows * pitch}


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, batch: int, channels: int, size: tuple[int, int], out_size: tuple[int, int],
             kernel: tuple[int, int], stride: int, padding: int, silu: bool) -> Tensor:
  """The output [batch*channels*OH*OW], as one row, from as such rows x [batch,channels,H,W], weight [channels,KH,KW] and bias [channels]."""
  sizes = _laid_out(batch, channels, size, out_size, kernel, stride)
  code = (WITHOUT_BIAS if bias is None else WITH_BIAS) + (SILU if silu else LINEAR) + LAY_OUT + FROM + CONVOLVE
  numbers = batch * channels * math.prod(out_size)
  return c_kernel("conv", code, numbers, numbers * math.prod(kernel), (x, weight, *([] if bias is None else [bias])),
                  sizes | {"PADDING": padding}, sizes["SCRATCH"])


def input_gradient(grad: Tensor, weight: Tensor, batch: int, channels: int, size: tuple[int, int], out_size: tuple[int, int],
                   kernel: tuple[int, int], stride: int, padding: int) -> Tensor:
  """That of the input [batch*channels*H*W], as one row, from that of the output."""
  sizes = _laid_out(batch, channels, out_size, size, kernel, 1)
  # rows of zeros that the first and the last pixels' taps meet
  above, below = -((padding - kernel[0] + 1) // stride), max(0, (size[0] - 1 + padding) // stride - out_size[0] + 1)
  sizes |= {"PADDING": padding, "SPACE": stride, "ABOVE": above, "BEFORE": kernel[1] - 1 - padding,
            "SCRATCH": (above + out_size[0] + below) * sizes["PITCH"]}
  products = batch * channels * math.prod(out_size) * math.prod(kernel)
  return c_kernel("conv_input_gradient", INPUT_GRADIENT, batch * channels * math.prod(size), products, (grad, weight), sizes, sizes["SCRATCH"])


def weight_gradient(x: Tensor, grad: Tensor, batch: int, channels: int, size: tuple[int, int], out_size: tuple[int, int], kernel: tuple[int, int],
                    stride: int, padding: int) -> Tensor:
  """That of the weight [channels*KH*KW], as one row, from the input and that of the output."""
  sizes = _laid_out(batch, channels, size, out_size, kernel, stride) | {"PADDING": padding}
  products = batch * channels * math.prod(out_size) * math.prod(kernel)
  return c_kernel("conv_weight_gradient", LAY_OUT + FROM + WEIGHT_GRADIENT, channels * math.prod(kernel), products, (x, grad), sizes,
                  sizes["SCRATCH"])
