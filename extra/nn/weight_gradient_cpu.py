"""The gradient of a convolution's weight on processors, as a kernel in C.

It is a matrix product: gradients [Cout, pixels] times inputs [pixels, Cin*taps]. Summed along the pixels of two planes, as they lie in memory, each
tile of sums would read whole planes of the whole batch, and add up the lanes of its vectors in the end. So a piece of the picture is taken at a
time: its gradients are turned, so that vectors run along the output channels, its input is laid out beside them, and all sums take their part of
it while it is in the core's own cache."""
import math
from tinygrad import Tensor
from tinydet.nn.kernel_cpu import LAY_OUT, Way, c_kernel, parts_of

PIECE = 160   # pixels taken at a time, about: their gradients of four vectors fill a first-level cache

TURN = """
// LANES rows of LANES numbers become columns
APART void turn(float *restrict to, long to_step, const float *restrict from, long from_step) {
  vector q[LANES];
  UNROLLED (int l = 0; l < LANES; l++) q[l] = *(const vector *)(from + l * from_step);
#define EXCHANGE(s) UNROLLED (int i = 0; i < LANES; i++) if (!(i & s)) { \\
    const vector low = LOW##s(q[i], q[i + s]), high = HIGH##s(q[i], q[i + s]); q[i] = low; q[i + s] = high; }
  EXCHANGES
  UNROLLED (int l = 0; l < LANES; l++) *(vector *)(to + l * to_step) = q[l];
}
"""

# Gradient [GROUPS*OUT, IN, KERNEL_ROWS, TAPS_A_ROW] of the weight. A tile of sums has ACROSS vectors of output channels, and the taps of one row of
# the kernel of DEEP input channels; `sums` holds all tiles of a core's share: an OUT_SPLITS-th of the output and an IN_SPLITS-th of the input
# channels.
WEIGHT_GRADIENT = """
#define AT_LEAST_1(a) ((a) < 1 ? 1 : (a))
enum { VECTORS = WHOLE(OUT, LANES), SHARE = LEAST(ACROSS_MOST, WHOLE(VECTORS, OUT_SPLITS)), ACROSS = LEAST(SHARE, AT_LEAST_1(SUMS / TAPS_A_ROW)),
       CHUNKS = WHOLE(VECTORS, ACROSS), DEEP = LEAST(IN, AT_LEAST_1(SUMS / ACROSS / TAPS_A_ROW)), DOWN = DEEP * TAPS_A_ROW, BLOCKS = WHOLE(IN, DEEP),
       STEP = ACROSS * LANES, TAPS = KERNEL_ROWS * TAPS_A_ROW, G_PLANE = OUT_H * WIDTH };

// `numbers` of LANES planes, pixel by pixel
APART void pack(float *restrict to, const float *restrict from, int numbers) {
  if (numbers < LANES) for (int p = 0; p < numbers; p++) for (int l = 0; l < LANES; l++) to[p * STEP + l] = from[l * G_PLANE + p];
  else for (int p = 0; p < numbers; p += LANES) turn(to + LEAST(p, numbers - LANES) * STEP, STEP, from + LEAST(p, numbers - LANES), G_PLANE);
}

APART void multiply(float *restrict sums, const float *restrict g, const float *restrict x, long x_picture, int pictures, int rows,
                            int first) {
  vector sum[DOWN][ACROSS];
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) sum[d][a] = (vector){0};
  for (int n = 0; n < pictures; n++, x += x_picture, g += BAND * WIDTH * STEP) for (int r = 0; r < rows; r++) {
    const float *from = x + r * PITCH, *by = g + r * WIDTH * STEP;
    for (int c = 0; c < WIDTH; c++, from++, by += STEP) {
      vector v[ACROSS];
      UNROLLED (int a = 0; a < ACROSS; a++) v[a] = *(const vector *)(by + a * LANES);
      UNROLLED (int k = 0; k < DEEP; k++) UNROLLED (int j = 0; j < TAPS_A_ROW; j++) UNROLLED (int a = 0; a < ACROSS; a++)
        sum[k * TAPS_A_ROW + j][a] += v[a] * from[(long)k * X_PLANE + j % STRIDE * ROWS * PITCH + j / STRIDE];
    }
  }
  if (!first) UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) sum[d][a] += *(vector *)(sums + d * STEP + a * LANES);
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) *(vector *)(sums + d * STEP + a * LANES) = sum[d][a];
}

void NAME(float *restrict out, float *restrict scratch, const float *restrict x, const float *restrict gradient, int core) {
  float *g = scratch + (long)core * SCRATCH, *laid = g + PICTURES * BAND * WIDTH * STEP, *sums = laid + (PLAIN ? 0 : (long)PICTURES * IN * X_PLANE);
  const long items = (long)GROUPS * OUT_SPLITS * IN_SPLITS;
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const long part = item % IN_SPLITS, share = item / IN_SPLITS % OUT_SPLITS, group = item / IN_SPLITS / OUT_SPLITS;
    const long block = BLOCKS * part / IN_SPLITS, blocks = BLOCKS * (part + 1) / IN_SPLITS - block;
    const long chunk = CHUNKS * share / OUT_SPLITS, chunks = CHUNKS * (share + 1) / OUT_SPLITS - chunk;
    const long start = LEAST(block * DEEP, IN - DEEP), mine = LEAST((block + blocks) * DEEP, IN) - block * DEEP, inputs = mine + block * DEEP - start;
    if (!blocks || !chunks) continue;
    for (long b = 0; b < BATCH; b += PICTURES) for (long top = 0; top < OUT_H; top += BAND) {
      const int pictures = LEAST(PICTURES, BATCH - b), rows = LEAST(BAND, OUT_H - top);
#if PLAIN
      const float *in = x + ((b * GROUPS + group) * IN + start) * X_PLANE + top * PITCH;
#else
      const float *in = laid;
      for (int n = 0; n < pictures; n++) for (long i = 0; i < inputs; i++)
        lay_out(laid + (n * inputs + i) * X_PLANE, x + (((b + n) * GROUPS + group) * IN + start + i) * HEIGHT * COLUMNS, top);
#endif
      for (long k = 0; k < chunks; k++) {
        for (int n = 0; n < pictures; n++) for (int a = 0; a < ACROSS; a++) {
          const long o = LEAST((LEAST((chunk + k) * ACROSS, VECTORS - ACROSS) + a) * LANES, OUT - LANES);
          pack(g + n * BAND * WIDTH * STEP + a * LANES, gradient + (((b + n) * GROUPS + group) * OUT + o) * G_PLANE + top * WIDTH,
               rows * WIDTH);
        }
        for (long i = 0; i < blocks; i++) for (int r = 0; r < KERNEL_ROWS; r++)
          multiply(sums + ((k * blocks + i) * KERNEL_ROWS + r) * DOWN * STEP, g,
                   in + (LEAST((block + i) * DEEP, IN - DEEP) - start) * X_PLANE + (r % STRIDE * PHASE_COLUMNS * ROWS + r / STRIDE) * PITCH,
                   PLAIN ? (long)GROUPS * IN * X_PLANE : inputs * X_PLANE, pictures, rows, b + top == 0);
      }
    }
    // turned back: the sums of a channel lie side by side in the weight
    const long pairs = mine * TAPS;
    for (long k = 0; k < chunks; k++) for (int a = 0; a < ACROSS; a++) for (long pair = 0; pair < pairs; pair += LANES) {
      const long o = LEAST((LEAST((chunk + k) * ACROSS, VECTORS - ACROSS) + a) * LANES, OUT - LANES);
      const long at = pairs < LANES ? 0 : LEAST(pair, pairs - LANES);
      float *to = out + (group * OUT + o) * IN * TAPS + block * DEEP * TAPS + at, columns[LANES * LANES], rows[LANES * LANES];
      for (int l = 0; l < LANES; l++) {
        const long i = block * DEEP + LEAST(at + l, pairs - 1) / TAPS, t = LEAST(at + l, pairs - 1) % TAPS, of = i / DEEP;
        const long d = (i - LEAST(of * DEEP, IN - DEEP)) * TAPS_A_ROW + t % TAPS_A_ROW;
        *(vector *)(columns + l * LANES)
          = *(const vector *)(sums + (((k * blocks + of - block) * KERNEL_ROWS + t / TAPS_A_ROW) * DOWN + d) * STEP + a * LANES);
      }
      if (pairs >= LANES) { turn(to, IN * TAPS, columns, LANES); continue; }
      turn(rows, LANES, columns, LANES);
      for (int l = 0; l < LANES; l++) for (int p = 0; p < pairs; p++) to[l * IN * TAPS + p] = rows[l * LANES + p];
    }
  }
}
"""


def _exchanges(lanes: int) -> str:
  """The steps that turn `lanes` vectors, each by a bit of a number: LOW and HIGH of two exchange the lanes that have it with those that have not."""
  steps, text = [s for s in (1, 2, 4, 8) if s < lanes], ""
  for s in steps:
    orders = {"LOW": [lanes + l - s if l & s else l for l in range(lanes)], "HIGH": [lanes + l if l & s else l + s for l in range(lanes)]}
    for name, order in orders.items(): text += f"#define {name}{s}(a, b) __builtin_shufflevector(a, b, {', '.join(map(str, order))})\n"
  return text + f"#define EXCHANGES {' '.join(f'EXCHANGE({s})' for s in steps)}\n"


def turning(lanes: int) -> str:
  """What `TURN` needs, of vectors of so many lanes at most."""
  return "#if defined(__AVX512F__)\n{}#elif defined(__AVX__)\n{}#else\n{}#endif\n".format(*(_exchanges(min(lanes, n)) for n in (16, 8, 4)))


def weight_gradient(x: Tensor, grad: Tensor, batch: int, groups: int, shape: tuple[int, ...], size: tuple[int, int], stride: int,
                    padding: int) -> Tensor:
  """Gradient of a weight of `shape` [Cout,Cin/groups,KH,KW] as one row, from as such rows x [batch,Cin,H,W], with H, W of `size`, and the gradient of
  the output."""
  out_channels, per_group, *kernel = shape
  out_height, width = ((side + 2 * padding - k) // stride + 1 for side, k in zip(size, kernel))
  pitch = width + (kernel[1] - 1) // stride
  products = batch * out_height * width * math.prod(shape)
  cores = parts_of(products)
  outs = out_channels // groups
  plain = kernel == [1, 1] and stride == 1 and not padding
  phases = [min(k, stride) for k in kernel]
  lanes = next((n for n in (16, 8, 4, 2) if outs >= n), 1)   # as HEAD has it
  code = turning(lanes) + TURN + ("" if plain else LAY_OUT) + WEIGHT_GRADIENT

  def way(piece: int, out_splits: int) -> Way:
    in_splits = 1 if groups >= cores else -(-cores // out_splits)
    bands = max(1, round(out_height * width / piece))
    band = -(-out_height // min(bands, out_height))
    pictures = min(batch, max(1, piece // (band * width))) if band == out_height else 1
    rows = band + (kernel[0] - 1) // stride
    x_plane = math.prod(size) if plain else math.prod(phases) * rows * pitch
    scratch = pictures * band * width * 64 + (0 if plain else pictures * per_group * x_plane) \
      + (outs // out_splits + 160) * (per_group // in_splits + 48) * kernel[0] * kernel[1]
    return code, {
      "COUNT": outs, "BATCH": batch, "GROUPS": groups, "IN": per_group, "OUT": outs, "HEIGHT": size[0], "COLUMNS": size[1], "STRIDE": stride,
      "PADDING": padding, "KERNEL_ROWS": kernel[0], "TAPS_A_ROW": kernel[1], "PHASE_ROWS": phases[0], "PHASE_COLUMNS": phases[1], "ROWS": rows,
      "PITCH": pitch, "OUT_H": out_height, "WIDTH": width, "BAND": band, "PICTURES": pictures, "PLAIN": int(plain), "X_PLANE": x_plane,
      "OUT_SPLITS": out_splits, "IN_SPLITS": in_splits, "SCRATCH": scratch}, scratch

  most = 1 if groups >= cores else max(1, min(cores, outs // 16))
  made, sizes, scratch = way(PIECE, most)
  return c_kernel("conv_weight_gradient", made, math.prod(shape), products, (x, grad), sizes, scratch,
                  lambda: [way(piece, splits) for splits in {most: 0, 1: 0} for piece in (PIECE // 2, PIECE, 3 * PIECE // 2, 3 * PIECE)])
