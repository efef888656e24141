"""The input's gradient of a convolution in strides on processors, as a kernel in C.

Input pixel i = stride * q + phase - padding takes part in output pixel q - tap // stride by the taps of which tap % stride is its phase. So each
phase of the pixels has a plain convolution of its own, by some of the taps. A core lays out a band of the output's gradient with zeros around, takes
some input channels through all phases, and weaves those into rows as they lie in the picture. Weights are copied in the order in which they are
multiplied."""
import math
from tinygrad import Tensor
from tinydet.nn.kernel_cpu import LAY_OUT, WAYS, Way, bands, c_kernel, parts_of, with_taps

# x [BATCH, GROUPS*OUT, H, W] from the gradient [BATCH, GROUPS*IN, HEIGHT, COLUMNS] and the weight [GROUPS*IN, OUT, TAPS], S and P the convolution's
# stride and padding. A part of the work is BAND of the ROWS_OF_PHASE rows of each phase of a picture, and a SPLITS-th of a group's channels.
GRADIENT = """
enum { VECTORS = WHOLE(COUNT, LANES), ACROSS = LEAST(VECTORS, ACROSS_MOST), TILES = WHOLE(VECTORS, ACROSS), DOWN = LEAST(OUT, SUMS / ACROSS),
       BLOCKS = WHOLE(OUT, DOWN), BANDS = WHOLE(ROWS_OF_PHASE, BAND), BLOCK = DOWN * IN * TAPS };
""" + LAY_OUT + """
// u [PHASES][IN][taps of the phase][DOWN] of a block of channels
APART void pack_weights(float *restrict u, const float *restrict weight) {
  for (int f = 0; f < PHASES; f++) for (long i = 0; i < IN; i++) for (int t = first[f]; t < first[f + 1]; t++, u += DOWN)
    UNROLLED (int d = 0; d < DOWN; d++) u[d] = weight[(i * OUT + d) * TAPS + taps[t].w];
}

// all DOWN channels of one phase at ACROSS vectors of the long axis: made [DOWN][PHASES][COUNT]
static inline void multiply(float *restrict to, const float *restrict in, const float *restrict u, long start, int tap, int end) {
  long at[ACROSS];
  UNROLLED (int a = 0; a < ACROSS; a++) at[a] = LEAST(start + a * LANES, COUNT - LANES);
  vector sum[DOWN][ACROSS];
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) sum[d][a] = (vector){0};
  for (long i = 0; i < IN; i++, in += X_PLANE) for (int t = tap; t < end; t++, u += DOWN) {
    vector x[ACROSS];
    UNROLLED (int a = 0; a < ACROSS; a++) x[a] = *(const vector *)(in + taps[t].x + at[a]);
    UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) sum[d][a] += x[a] * u[d];
  }
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) *(vector *)(to + (long)d * PHASES * COUNT + at[a]) = sum[d][a];
}

// the rows of one channel's picture from `top` on, which begin in the middle of a stride where there is padding
APART void weave(float *restrict picture, const float *restrict made, long top) {
  const long begin = WHOLE(P, S), end = (W + P) / S;
  for (long q = 0; q < BAND; q++, made += PITCH) for (int p = 0; p < S; p++) {
    const long row = (top + q) * S + p - P;
    if (row < 0 || row >= H) continue;
    float *restrict to = picture + row * W;
    if (p >= PHASE_DOWN) { for (long c = 0; c < W; c++) to[c] = 0; continue; }
    const float *restrict from = made + (long)p * PHASE_ACROSS * COUNT;
    for (long c = begin; c < end; c++) UNROLLED (int b = 0; b < S; b++) to[c * S + b - P] = b < PHASE_ACROSS ? from[b * COUNT + c] : 0;
    for (long c = 0; c < LEAST(begin * S - P, W); c++) to[c] = (c + P) % S < PHASE_ACROSS ? from[(c + P) % S * COUNT + (c + P) / S] : 0;
    for (long c = end < begin ? 0 : end * S - P; c < W; c++) to[c] = (c + P) % S < PHASE_ACROSS ? from[(c + P) % S * COUNT + (c + P) / S] : 0;
  }
}

void NAME(float *restrict out, float *restrict scratch, const float *restrict gradient, const float *restrict weight, int core) {
  float *laid = scratch + (long)core * SCRATCH, *made = laid + (long)IN * X_PLANE, *u = made + (long)DOWN * PHASES * COUNT;
  const long items = (long)GROUPS * SPLITS * BATCH * BANDS;
  long there = -1;   // the part of the weights that is packed
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const long part = item / (BATCH * BANDS), group = part / SPLITS, split = part % SPLITS, picture = item / BANDS % BATCH * GROUPS + group;
    const long top = LEAST(item % BANDS * BAND, ROWS_OF_PHASE - BAND), from = BLOCKS * split / SPLITS, to = BLOCKS * (split + 1) / SPLITS;
    if (there != part) for (long block = from; block < to; block++)
      pack_weights(u + (block - from) * BLOCK, weight + (group * IN * OUT + LEAST(block * DOWN, OUT - DOWN)) * TAPS);
    there = part;
    for (long i = 0; i < IN; i++) lay_out(laid + i * X_PLANE, gradient + (picture * IN + i) * HEIGHT * COLUMNS, top);
    for (long block = from; block < to; block++) {
      const long o = LEAST(block * DOWN, OUT - DOWN);
      for (int f = 0; f < PHASES; f++) for (long n = 0; n < TILES; n++)
        multiply(made + f * COUNT, laid, u + (block - from) * BLOCK + first[f] * IN * DOWN, n * ACROSS * LANES, first[f], first[f + 1]);
      for (int d = 0; d < DOWN; d++) weave(out + (picture * OUT + o + d) * H * W, made + (long)d * PHASES * COUNT, top);
    }
  }
}
"""


def input_gradient(grad: Tensor, weight: Tensor, batch: int, groups: int, shape: tuple[int, ...], size: tuple[int, int], stride: int,
                   padding: int) -> Tensor:
  """The gradient [batch,Cin,H,W] of the input as one row, with H, W of `size`, from as such rows that of the output and the weight, of `shape`
  [Cout,Cin/groups,KH,KW]."""
  out_channels, per_group, *kernel = shape
  ins, taps = out_channels // groups, math.prod(kernel)
  out_height, out_width = ((side + 2 * padding - k) // stride + 1 for side, k in zip(size, kernel))
  rows, columns = ((side + padding - 1) // stride + 1 for side in size)   # of each phase
  over = max((k - 1) // stride for k in kernel)                           # output pixels that take part beside that at q
  down, across = (min(k, stride) for k in kernel)                         # phases with a tap
  pitch = columns + over
  products = batch * out_height * out_width * math.prod(shape)
  phases = [[(p, q) for p in range(a, kernel[0], stride) for q in range(b, kernel[1], stride)] for a in range(down) for b in range(across)]

  def way(band: int, splits: int) -> Way:
    x_plane, count = (band + over) * pitch, (band - 1) * pitch + columns
    # no smaller than what the kernel's own enums come to for any vectors
    scratch = ins * x_plane + min(24, per_group) * down * across * count + (per_group // splits + 48) * ins * taps
    places = [[((over - p // stride) * pitch + over - q // stride, p * kernel[1] + q) for p, q in phase] for phase in phases]
    return with_taps(GRADIENT, places), {
      "COUNT": count, "BATCH": batch, "GROUPS": groups, "IN": ins, "OUT": per_group, "TAPS": taps, "PHASES": down * across, "S": stride, "P": padding,
      "H": size[0], "W": size[1], "PHASE_DOWN": down, "PHASE_ACROSS": across, "ROWS_OF_PHASE": rows, "BAND": band, "SPLITS": splits,
      "X_PLANE": x_plane, "SCRATCH": scratch, "PITCH": pitch, "ROWS": band + over, "HEIGHT": out_height, "COLUMNS": out_width, "STRIDE": 1,
      "PADDING": over, "PHASE_ROWS": 1, "PHASE_COLUMNS": 1}, scratch

  plans = bands(batch * groups, rows, over, ins * pitch, products // (batch * groups * rows), parts_of(products))
  code, sizes, scratch = way(*plans[0])
  return c_kernel("conv_input_gradient", code, batch * groups * per_group * math.prod(size), products, (grad, weight), sizes, scratch,
                  lambda: [way(*plan) for plan in plans[1:WAYS]])
