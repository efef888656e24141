"""3x3 convolutions of stride 1 on processors by a quarter of the multiplications (Lavin & Gray 2016, F(4x4,3x3)), as kernels in C.

Each 4x4 piece of the output is found from 6x6 pixels at 36 points: pixels and weights are taken to the points, multiplied there channel by channel,
and taken back. The points of a side are 0, +-sqrt(1/2), +-sqrt(2) and infinity: with the usual 0, +-1, +-2 and infinity the result is four times as
far from the exact one; with these it is as near as a plain sum."""
from tinygrad import Tensor
from tinydet.nn.kernel_cpu import LINEAR, SILU, WAYS, WITH_BIAS, WITHOUT_BIAS, Way, c_kernel, parts_of

LANES, MOST = 16, 3 << 20   # of the widest vectors that a band of tiles is chosen for; bytes of what a core has at hand at a time, about
# Weights are brought to their points by the core that needs them, so many numbers at a time, which stay in its second cache: all at once they are
# four times the weights, and travel to memory and back. Where a core would do so for more than these, more often than that, a kernel does it before.
AT_HAND, MOST_TIMES = 1 << 17, 2


def _orders(lanes: int) -> str:
  """EVERY0 to EVERY3, each fourth number of four vectors; FOURS(PAIRS(a, b), PAIRS(c, d)), four vectors woven into one row."""
  every = (f"#define EVERY{j}(q) __builtin_shufflevector(q, q{''.join(f', {j + 4 * n}' for n in range(lanes))})\n" for j in range(4))
  pairs = "".join(f", {n}, {lanes + n}" for n in range(lanes))
  fours = "".join(f", {2 * n}, {2 * n + 1}, {2 * (lanes + n)}, {2 * (lanes + n) + 1}" for n in range(lanes))
  return "".join(every) + f"#define PAIRS(a, b) __builtin_shufflevector(a, b{pairs})\n#define FOURS(a, b) __builtin_shufflevector(a, b{fours})\n"


# COUNT is long enough for the widest vectors. A row of tiles is TX, of which TY lie below each other; a part of the work is BAND rows of PICTURES
# pictures and a SPLITS-th of the channels. Steps from point to point are odd numbers of lines, or they would meet in the same ones of a cache.
SHARED = f"""
enum {{ TX = WHOLE(OUT_W, 4), TY = WHOLE(OUT_H, 4), TILES = PICTURES * BAND * TX, VECTORS = WHOLE(TILES, LANES),
       FEWER = WHOLE(VECTORS, ACROSS_MOST - 1) * (ACROSS_MOST - 1) < WHOLE(VECTORS, ACROSS_MOST) * ACROSS_MOST,
       ACROSS = LEAST(VECTORS, ACROSS_MOST > 2 && FEWER ? ACROSS_MOST - 1 : ACROSS_MOST), CHUNKS = WHOLE(VECTORS, ACROSS),
       STEP = ACROSS * LANES, ROW = (WHOLE(CHUNKS * STEP + LANES, 16) | 1) * 16, PANEL = (WHOLE(IN * STEP, 16) | 1) * 16,
       DOWN = LEAST(OUT, SUMS / ACROSS), BLOCKS = WHOLE(OUT, DOWN), MINE = WHOLE(BLOCKS, SPLITS), ROOM = WHOLE(TX, LANES) * LANES * 4 + 8,
       V_STEP = CHUNKS * PANEL + (CHUNKS % 2 ? 0 : 16), M_STEP = MINE * DOWN * ROW + (MINE * DOWN % 2 ? 0 : 16),
       POINT = (WHOLE(WHOLE(IN, LANES) * DOWN * LANES, 16) | 1) * 16, BLOCK = 36 * POINT,
       TOGETHER = AT_HAND < BLOCK ? 1 : LEAST(MINE, AT_HAND / BLOCK) }};
#if defined(__AVX512F__)
{_orders(16)}#elif defined(__AVX__)
{_orders(8)}#else
{_orders(4)}#endif
#define A 0.70710678f
#define B 1.41421356f
"""

TO_POINTS = """
// u [36][POINT: IN / LANES][DOWN][LANES] of a block of the weights, of which FLIP turns the taps around: written in one go
#define POINTS(z, a, b, c) { \\
  const vector e = -(2.f / 3) * a - (1.f / 3) * c, f = -(2.f / 3) * A * b, g = (1.f / 6) * a + (1.f / 3) * c, h = (1.f / 6) * B * b; \\
  z(0, a) z(1, e + f) z(2, e - f) z(3, g + h) z(4, g - h) z(5, c) }
APART void weights_to_points(float *u, const float *weight) {
  for (long i = 0; i < IN; i += LANES, u += DOWN * LANES) {
    float taps[DOWN][9][LANES];
    for (int d = 0; d < DOWN; d++) for (int l = 0; l < LANES; l++) {
      const float *from = weight + d * W_OUT + LEAST(i + l, IN - 1) * W_IN;
      UNROLLED (int t = 0; t < 9; t++) taps[d][t][l] = from[FLIP ? 8 - t : t];
    }
    for (int d = 0; d < DOWN; d++) {
      vector w[9], half[6][3];
      UNROLLED (int t = 0; t < 9; t++) w[t] = *(const vector *)taps[d][t];
      UNROLLED (int q = 0; q < 3; q++) {
#define Z(p, value) half[p][q] = value;
        POINTS(Z, w[q], w[3 + q], w[6 + q])
#undef Z
      }
      UNROLLED (int p = 0; p < 6; p++) {
#define Z(q, value) *(vector *)(u + (p * 6 + q) * POINT + d * LANES) = value;
        POINTS(Z, half[p][0], half[p][1], half[p][2])
#undef Z
      }
    }
  }
}
"""

WEIGHTS = """
void NAME(float *restrict u, const float *restrict weight, int core) {
  for (long block = BLOCKS * core / CORES; block < BLOCKS * (core + 1) / CORES; block++)
    weights_to_points(u + block * BLOCK, weight + LEAST(block * DOWN, OUT - DOWN) * W_OUT);
}
"""

# six pixels of a row or column at the points
FORWARD = """
#define FORWARD(type, z, d0, d1, d2, d3, d4, d5) { \\
  const type e = d4 - 2.f * d2, f = A * d3 - B * d1, g = d4 - .5f * d2, h = B * d3 - A * d1; \\
  z(0, d0 - 2.5f * d2 + d4) z(1, e + f) z(2, e - f) z(3, g + h) z(4, g - h) z(5, d1 - 2.5f * d3 + d5) }
"""

# x [BATCH, IN, HEIGHT, WIDTH], with PADDING zeros around
CONVOLVE = FORWARD + """
#define BACK(z, m0, m1, m2, m3, m4, m5) { \\
  const vector s = m1 + m2, t = m1 - m2, p = m3 + m4, q = m3 - m4; \\
  z(0, m0 + s + p) z(1, A * t + B * q) z(2, .5f * s + 2.f * p) z(3, .35355339f * t + 2.82842712f * q + m5) }
typedef float wide __attribute__((vector_size(16 * LANES), aligned(4)));
enum { BANDS = WHOLE(TY, BAND), GATHERED = WHOLE(BATCH, PICTURES) };

// `at` [36][ROW] of a row of pieces
APART void to_points(float *at, float rows[6][ROOM], const float *picture, long top) {
  static const float nothing[WIDTH];   // zeros
  const float *r[6];
  UNROLLED (int k = 0; k < 6; k++) r[k] = top + k >= 0 && top + k < HEIGHT ? picture + (top + k) * WIDTH : nothing;
  for (int c = 0; c < WIDTH; c++) {
#define Z(k, value) rows[k][c + PADDING] = value;
    FORWARD(float, Z, r[0][c], r[1][c], r[2][c], r[3][c], r[4][c], r[5][c])
#undef Z
  }
  for (int t = 0; t < TX; t += LANES) for (int k = 0; k < 6; k++) {
    const wide p = *(const wide *)(rows[k] + 4 * t), q = *(const wide *)(rows[k] + 4 * t + 4);
    const vector d0 = EVERY0(p), d1 = EVERY1(p), d2 = EVERY2(p), d3 = EVERY3(p), d4 = EVERY0(q), d5 = EVERY1(q);
#define Z(j, value) *(vector *)(at + (k * 6 + j) * ROW + t) = value;
    FORWARD(vector, Z, d0, d1, d2, d3, d4, d5)
#undef Z
  }
}

// v [CHUNKS][PANEL: IN][STEP]: one piece of memory for each tile
APART void multiply(float *m, const float *v, const float *u) {
  for (int chunk = 0; chunk < CHUNKS; chunk++, v += PANEL, m += STEP) {
    const float *in = v, *w = u;
    vector sum[DOWN][ACROSS];
    UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) sum[d][a] = (vector){0};
    for (int i = 0; i < IN; i += LANES, w += DOWN * LANES) {
      for (int l = 0; l < LEAST(LANES, IN - i); l++, in += STEP)
        UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++)
          sum[d][a] += *(const vector *)(in + a * LANES) * w[d * LANES + l];
    }
    UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) *(vector *)(m + d * ROW + a * LANES) = sum[d][a];
  }
}

APART void from_points(float *plane, const float *m, long top, float bias) {
  for (int t = 0; t < TX; t += LANES) {
    vector half[6][4], done[4][4];
    UNROLLED (int k = 0; k < 6; k++) {
      const float *at = m + (long)k * 6 * M_STEP + t;
      vector l[6];
      UNROLLED (int j = 0; j < 6; j++) l[j] = *(const vector *)(at + (long)j * M_STEP);
#define Z(c, value) half[k][c] = value;
      BACK(Z, l[0], l[1], l[2], l[3], l[4], l[5])
#undef Z
    }
    UNROLLED (int c = 0; c < 4; c++) {
#define Z(r, value) done[r][c] = ACTIVATED((value + bias));
      BACK(Z, half[0][c], half[1][c], half[2][c], half[3][c], half[4][c], half[5][c])
#undef Z
    }
    UNROLLED (int r = 0; r < 4; r++) if (top + r < OUT_H) {
      float *to = plane + (top + r) * OUT_W + 4 * t, piece[4 * LANES];
      const wide all = FOURS(PAIRS(done[r][0], done[r][1]), PAIRS(done[r][2], done[r][3]));
      if (4 * t + 4 * LANES <= OUT_W) *(wide *)to = all;
      else {
        *(wide *)piece = all;
        for (int c = 0; c < OUT_W - 4 * t; c++) to[c] = piece[c];
      }
    }
  }
}

void NAME(float *restrict out, float *restrict scratch, const float *restrict x, const float *restrict weight BIAS_PARAMETER, int core) {
  float *v = scratch + (long)core * SCRATCH, *m = v + 36 * V_STEP, *pieces = m + 36 * M_STEP, *u = pieces + 36 * ROW, rows[6][ROOM];
  for (int k = 0; k < 6; k++) for (int c = 0; c < ROOM; c++) rows[k][c] = 0;
  for (int f = 0; f < 36; f++) for (int c = TILES; c < ROW; c++) pieces[f * ROW + c] = 0;
  const long items = (long)GATHERED * BANDS * SPLITS;
  long there = -1;   // the part of the weights that is at its points
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const long split = item / (GATHERED * BANDS), first = LEAST(item % BANDS * BAND, TY - BAND);
    const long from = BLOCKS * split / SPLITS, to = BLOCKS * (split + 1) / SPLITS, b = LEAST(item / BANDS % GATHERED * PICTURES, BATCH - PICTURES);
    for (long i = 0; i < IN; i++) {
      for (int p = 0; p < PICTURES; p++) for (int y = 0; y < BAND; y++)
        to_points(pieces + (p * BAND + y) * TX, rows, x + ((b + p) * IN + i) * HEIGHT * WIDTH, (first + y) * 4 - PADDING);
      for (int f = 0; f < 36; f++) for (int n = 0; n < CHUNKS; n++) UNROLLED (int a = 0; a < ACROSS; a++)
        *(vector *)(v + (long)f * V_STEP + n * PANEL + i * STEP + a * LANES) = *(vector *)(pieces + f * ROW + n * STEP + a * LANES);
    }
#if READY
    for (int f = 0; f < 36; f++) for (long block = from; block < to; block++)
      multiply(m + f * M_STEP + (block - from) * DOWN * ROW, v + f * V_STEP, weight + block * BLOCK + f * POINT);
#else
    for (long group = from; group < to; group += TOGETHER) {
      const long end = LEAST(to, group + TOGETHER);
      if (TOGETHER < MINE || there != split) for (long block = group; block < end; block++)
        weights_to_points(u + (block - group) * BLOCK, weight + LEAST(block * DOWN, OUT - DOWN) * W_OUT);
      there = split;
      for (int f = 0; f < 36; f++) for (long block = group; block < end; block++)
        multiply(m + f * M_STEP + (block - from) * DOWN * ROW, v + f * V_STEP, u + (block - group) * BLOCK + f * POINT);
    }
#endif
    for (long block = from; block < to; block++) for (int d = 0; d < DOWN; d++) for (int p = 0; p < PICTURES; p++) for (int y = 0; y < BAND; y++) {
      const long o = LEAST(block * DOWN, OUT - DOWN) + d;
      from_points(out + ((b + p) * OUT + o) * OUT_H * OUT_W, m + ((block - from) * DOWN + d) * ROW + (p * BAND + y) * TX, (first + y) * 4, BIAS(o));
    }
  }
}
"""


def pays(batch: int, channels: int, out_channels: int, out_size: tuple[int, int], at_points: int = 600, weights: int = 300) -> bool:
  """Whether this way is the faster one: for few channels, or few pieces for many weights, getting to the points and back takes what is saved.

  Of each pair of channels, in multiplications: `at_points` is what a channel of a piece costs on its ways, `weights` what the pair's weights do."""
  pieces = batch * -(-out_size[0] // 4) * -(-out_size[1] // 4)
  there_and_back = at_points * pieces * (1 / channels + 1 / out_channels)
  return min(channels, out_channels) >= 32 and 36 * pieces + there_and_back + weights < 9 * batch * out_size[0] * out_size[1]


def _plans(batch: int, channels: int, out_channels: int, out_size: tuple[int, int], cores: int) -> list[tuple[int, int, int, int]]:
  """Pictures, rows of tiles and parts of the channels that a part of the work takes: first those of which the last core to be ready is ready first.
  And how often a core then needs the same weights."""
  across, down = (-(-side // 4) for side in reversed(out_size))
  found: list[tuple[float, tuple[int, int, int, int]]] = []
  for pictures, band in [(1, band) for band in range(1, down + 1)] + [(n, down) for n in range(2, batch + 1)]:
    tiles = pictures * band * across
    if found and tiles > 64 and (channels + out_channels) * tiles * 144 > MOST: break
    vectors = -(-tiles // LANES)
    computed = vectors if vectors < 4 else min(-(-vectors // 3) * 3, -(-vectors // 4) * 4)
    for splits in (1, 2, 4):
      items = -(-batch // pictures) * -(-down // band) * splits
      if splits > 1 and (items // splits) % cores == 0: break
      rows = pictures * band * -(-across // LANES)
      # cycles: two multiplications of vectors in one, some 200 for a row of tiles on its way to the points, 130 back; weights read again
      cost = -(-items // cores) * (18 * computed * channels * out_channels / splits + 200 * rows * channels + 130 * rows * out_channels / splits
                                   + 9 * channels * out_channels / splits)
      found.append((cost, (pictures, band, splits, -(-items // max(cores, splits)))))
  return [plan for _, plan in sorted(found, key=lambda each: each[0])]


def correlate(x: Tensor, weight: Tensor, bias: Tensor | None, batch: int, channels: int, out_channels: int, size: tuple[int, int], padding: int, *,
              turned: bool = False, silu: bool = False, name: str = "conv") -> Tensor:
  """What convolutions of 3x3 taps give, f32 [batch*out_channels*OH*OW] as one row, from as such rows x [batch,channels,H,W], weight
  [out_channels,channels,3,3] and bias [out_channels]; with `padding` zeros around the pictures, and through SiLU where `silu`.

  `turned`: weight is [channels,out_channels,3,3] and its taps are turned around, as the gradient of an input takes them."""
  out_size = (size[0] + 2 * padding - 2, size[1] + 2 * padding - 2)
  products = batch * out_channels * out_size[0] * out_size[1] * channels * 9
  cores = parts_of(products)
  step = (9, out_channels * 9) if turned else (channels * 9, 9)
  code = (WITHOUT_BIAS if bias is None else WITH_BIAS) + (SILU if silu else LINEAR) + SHARED

  def way(plan: tuple[int, int, int, int], ready: bool, at_hand: int) -> Way:
    pictures, band, splits, _ = plan
    # no smaller than what the kernels' own enums come to for any vectors
    row = pictures * band * -(-out_size[1] // 4) + 96
    scratch = 36 * ((channels + out_channels // splits + 49) * row + 48) + (0 if ready else max(at_hand, 36 * 24 * (channels + 24)))
    scratch = -(-scratch // 16) * 16   # each core's begins with a line of the cache
    return code + ("" if ready else TO_POINTS) + CONVOLVE, {
      "COUNT": 64, "BATCH": batch, "IN": channels, "OUT": out_channels, "HEIGHT": size[0], "WIDTH": size[1], "OUT_H": out_size[0],
      "OUT_W": out_size[1], "PADDING": padding, "PICTURES": pictures, "BAND": band, "SPLITS": splits, "AT_HAND": at_hand, "SCRATCH": scratch,
      "W_OUT": step[0], "W_IN": step[1], "FLIP": int(turned), "READY": int(ready)}, scratch

  plans = _plans(batch, channels, out_channels, out_size, cores)
  _, _, splits, times = plans[0]
  ready = times > MOST_TIMES and 36 * channels * out_channels // splits > AT_HAND
  made, sizes, scratch = way(plans[0], ready, AT_HAND)
  if ready: weight = c_kernel(f"{name}_weights", SHARED + TO_POINTS + WEIGHTS, 36 * (channels + 24) * (out_channels + 24),
                              36 * channels * out_channels, (weight,), sizes)
  tensors = (x, weight) if bias is None else (x, weight, bias)
  return c_kernel(name, made, batch * out_channels * out_size[0] * out_size[1], products, tensors, sizes, scratch,
                  lambda: [*(way(plan, ready, AT_HAND) for plan in plans[:WAYS]), *(way(plans[0], ready, n) for n in (AT_HAND // 4, 2 * AT_HAND))])
