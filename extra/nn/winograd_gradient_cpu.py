"""The gradient of a 3x3 convolution's weights at stride 1 on processors, by a quarter of the multiplications, as a kernel in C.

The output's 4x4 pieces come from pixels and weights at 36 points (`winograd_cpu`); turned around, the weight's gradient at a point is a matrix
product over all pieces: their gradients there [Cout, pieces] times their pixels there [pieces, Cin]. Both are turned first, so that vectors run along
channels all the way; what the products add up to is taken back from the points once, at the end."""
import math
from tinygrad import Tensor
from tinydet.nn import winograd_cpu
from tinydet.nn.kernel_cpu import Way, c_kernel, parts_of
from tinydet.nn.weight_gradient_cpu import TURN, turning

PACK = 16     # channels that fill a line of the cache: they come to their points together
PIECES = 128  # that are multiplied at a time, about: more take the sums less often out of memory, fewer stay in the cache

# x [BATCH, IN, HEIGHT, WIDTH] with PADDING zeros around, gradient [BATCH, OUT, OUT_H, OUT_W] -> [OUT, IN, 3, 3]. A core has an OUT_SPLITS-th of the
# output and an IN_SPLITS-th of the input channels, in packs of 16, the last of which begins earlier where it would reach over the end. At a time it
# takes BAND rows of pieces, of which a picture has TY. Steps are odd numbers of lines, or they would meet in the same lines of a cache.
WEIGHT_GRADIENT = """
#define A 0.70710678f
#define B 1.41421356f
#define ODD(a) ((a) | 1)
#define FIRST(pack, channels) LEAST((pack) * 16, (channels) - 16)
enum { TX = WHOLE(OUT_W, 4), TY = WHOLE(OUT_H, 4), HALVES = 16 / LANES, OUTS = WHOLE(OUT, 16), INS = WHOLE(IN, 16),
       OUT_MOST = WHOLE(OUTS, OUT_SPLITS), IN_MOST = WHOLE(INS, IN_SPLITS), ACROSS = LEAST(ACROSS_MOST, IN_MOST * HALVES), STEP = ACROSS * LANES,
       DOWN = LEAST(16, SUMS / ACROSS), PACKS = WHOLE(WHOLE(IN_MOST * 16, STEP) * STEP, 16), U_ROW = ODD(PACKS) * 16, G_ROW = ODD(OUT_MOST) * 16,
       PANEL = ODD(BAND * TX) * 16, X_POINT = ODD(PACKS * ODD(BAND * TX)) * 16, G_POINT = BAND * TX * G_ROW + (BAND * TX % 2 ? 0 : 16),
       U_POINT = (OUT_MOST + 1) * 16 * U_ROW + 16, ROOM = (TX * 4 + 2) * 16, TURNED = (6 * (WIDTH > OUT_W ? WIDTH : OUT_W) + LANES) * 16 };

// `numbers` of 16 planes, pixel by pixel
APART void turn_planes(float *restrict to, const float *restrict from, long plane, int numbers) {
  for (int h = 0; h < 16; h += LANES)
    if (numbers < LANES) for (int p = 0; p < numbers; p++) for (int l = 0; l < LANES; l++) to[p * 16 + h + l] = from[(h + l) * plane + p];
    else for (int p = 0; p < numbers; p += LANES) {
      const int at = LEAST(p, numbers - LANES);
      turn(to + at * 16 + h, 16, from + h * plane + at, plane);
    }
}

// rows [6][ROOM], of which those beyond the picture's columns are zeros; `turned` has TURNED numbers, `nothing` a row of zeros
APART void pixels_to_points(float *at, float *rows, float *turned, const float *nothing, const float *planes, long top) {
  const long from = top < 0 ? 0 : top, to = LEAST(top + 6, HEIGHT);
  turn_planes(turned, planes + from * WIDTH, (long)HEIGHT * WIDTH, (to - from) * WIDTH);
  const float *r[6];
  UNROLLED (int k = 0; k < 6; k++) r[k] = top + k >= from && top + k < to ? turned + (top + k - from) * WIDTH * 16 : nothing;
  for (int c = 0; c < WIDTH * 16; c += LANES) {
#define GET(k) *(const vector *)(r[k] + c)
#define Z(k, value) *(vector *)(rows + k * ROOM + PADDING * 16 + c) = value;
    const vector d0 = GET(0), d1 = GET(1), d2 = GET(2), d3 = GET(3), d4 = GET(4), d5 = GET(5);
    FORWARD(vector, Z, d0, d1, d2, d3, d4, d5)
#undef Z
#undef GET
  }
  for (int t = 0; t < TX; t++) for (int k = 0; k < 6; k++) UNROLLED (int v = 0; v < 16; v += LANES) {
#define GET(j) *(const vector *)(rows + k * ROOM + (4 * t + j) * 16 + v)
#define Z(j, value) *(vector *)(at + (long)(k * 6 + j) * X_POINT + t * 16 + v) = value;
    const vector d0 = GET(0), d1 = GET(1), d2 = GET(2), d3 = GET(3), d4 = GET(4), d5 = GET(5);
    FORWARD(vector, Z, d0, d1, d2, d3, d4, d5)
#undef Z
#undef GET
  }
}

// what takes back from the points to a piece, the other way round
#define SPREAD(z, y0, y1, y2, y3) { \\
  const vector e = y0 + .5f * y2, f = A * y1 + .35355339f * y3, g = y0 + 2.f * y2, h = B * y1 + 2.82842712f * y3; \\
  z(0, y0) z(1, e + f) z(2, e - f) z(3, g + h) z(4, g - h) z(5, y3) }
APART void gradients_to_points(float *at, float *rows, float *turned, const float *nothing, const float *planes, long top) {
  turn_planes(turned, planes + top * OUT_W, (long)OUT_H * OUT_W, LEAST(4, OUT_H - top) * OUT_W);
  const float *r[4];
  UNROLLED (int k = 0; k < 4; k++) r[k] = top + k < OUT_H ? turned + k * OUT_W * 16 : nothing;
  for (int c = 0; c < OUT_W * 16; c += LANES) {
#define GET(k) *(const vector *)(r[k] + c)
#define Z(k, value) *(vector *)(rows + k * ROOM + c) = value;
    const vector y0 = GET(0), y1 = GET(1), y2 = GET(2), y3 = GET(3);
    SPREAD(Z, y0, y1, y2, y3)
#undef Z
#undef GET
  }
  for (int t = 0; t < TX; t++) for (int k = 0; k < 6; k++) UNROLLED (int v = 0; v < 16; v += LANES) {
#define GET(j) *(const vector *)(rows + k * ROOM + (4 * t + j) * 16 + v)
#define Z(j, value) *(vector *)(at + (long)(k * 6 + j) * G_POINT + t * G_ROW + v) = value;
    const vector y0 = GET(0), y1 = GET(1), y2 = GET(2), y3 = GET(3);
    SPREAD(Z, y0, y1, y2, y3)
#undef Z
#undef GET
  }
}

// x [PANEL: pieces][16], one for each 16 channels
APART void multiply(float *restrict u, const float *restrict x, const float *restrict g, long pieces, int first) {
  vector sum[DOWN][ACROSS];
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++)
    sum[d][a] = first ? (vector){0} : *(vector *)(u + (long)d * U_ROW + a * LANES);
  if (!first) UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < STEP; a += 16) __builtin_prefetch(u + (long)d * U_ROW + STEP + a, 1);
  for (long t = 0; t < pieces; t++, x += 16, g += G_ROW) {
    vector v[ACROSS];
    UNROLLED (int a = 0; a < ACROSS; a++) v[a] = *(const vector *)(x + a * LANES / 16 * PANEL + a * LANES % 16);
    UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) sum[d][a] += v[a] * g[d];
  }
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) *(vector *)(u + (long)d * U_ROW + a * LANES) = sum[d][a];
}

// what takes weights to the points, the other way round
#define GATHER(z, u0, u1, u2, u3, u4, u5) { \\
  const vector e = u1 + u2, f = u1 - u2, g = u3 + u4, h = u3 - u4; \\
  z(0, u0 - (2.f / 3) * e + (1.f / 6) * g) z(1, (1.f / 6) * B * h - (2.f / 3) * A * f) z(2, u5 + (1.f / 3) * (g - e)) }
APART void from_points(float *taps, const float *u) {
  vector half[3][6], done[9];
  UNROLLED (int j = 0; j < 6; j++) {
#define GET(k) *(const vector *)(u + (long)(k * 6 + j) * U_POINT)
#define Z(p, value) half[p][j] = value;
    GATHER(Z, GET(0), GET(1), GET(2), GET(3), GET(4), GET(5))
#undef Z
#undef GET
  }
  UNROLLED (int p = 0; p < 3; p++) {
#define Z(q, value) done[p * 3 + q] = value;
    GATHER(Z, half[p][0], half[p][1], half[p][2], half[p][3], half[p][4], half[p][5])
#undef Z
  }
  for (int l = 0; l < LANES; l++) UNROLLED (int t = 0; t < 9; t++) taps[l * 9 + t] = done[t][l];
}

void NAME(float *restrict out, float *restrict scratch, const float *restrict x, const float *restrict gradient, int core) {
  float *at_x = scratch + (long)core * SCRATCH, *at_g = at_x + 36L * X_POINT, *u = at_g + 36L * G_POINT, *turned = u + 36L * U_POINT;
  float *x_rows = turned + TURNED, *g_rows = x_rows + 6 * ROOM, *nothing = g_rows + 6 * ROOM;
  for (long i = 0; i < 12 * ROOM + TURNED; i++) x_rows[i] = 0;
  for (long item = (long)OUT_SPLITS * IN_SPLITS * core / CORES; item < (long)OUT_SPLITS * IN_SPLITS * (core + 1) / CORES; item++) {
    const long in = item % IN_SPLITS, o = item / IN_SPLITS, i0 = INS * in / IN_SPLITS, i1 = INS * (in + 1) / IN_SPLITS;
    const long o0 = OUTS * o / OUT_SPLITS, o1 = OUTS * (o + 1) / OUT_SPLITS, outs = (o1 - o0) * 16, ins = (i1 - i0) * 16;
    for (long row = 0; row < BATCH * TY; row += BAND) {
      const long rows = LEAST(BAND, BATCH * TY - row);
      for (long r = 0; r < rows; r++) {
        const long b = (row + r) / TY, top = (row + r) % TY * 4;
        for (long i = i0; i < i1; i++)
          pixels_to_points(at_x + (i - i0) * PANEL + r * TX * 16, x_rows, turned, nothing,
                           x + (b * IN + FIRST(i, IN)) * HEIGHT * WIDTH, top - PADDING);
        for (long i = o0; i < o1; i++)
          gradients_to_points(at_g + r * TX * G_ROW + (i - o0) * 16, g_rows, turned, nothing,
                              gradient + (b * OUT + FIRST(i, OUT)) * OUT_H * OUT_W, top);
      }
      // the last tiles reach over the end: what they add up there is left out
      for (long f = 0; f < 36; f++) for (long p = 0; p < outs; p += DOWN) for (long i = 0; i < ins; i += STEP)
        multiply(u + f * U_POINT + p * U_ROW + i, at_x + f * X_POINT + i / 16 * PANEL + i % 16, at_g + f * G_POINT + p, rows * TX, !row);
    }
    for (long p = 0; p < outs; p++) for (long i = 0; i < ins; i += LANES)
      from_points(out + ((FIRST(o0 + p / 16, OUT) + p % 16) * IN + FIRST(i0 + i / 16, IN) + i % 16) * 9, u + p * U_ROW + i);
  }
}
"""


def pays(batch: int, channels: int, out_channels: int, out_size: tuple[int, int]) -> bool:
  """Whether this way is the faster one: the sums at the points of each pair of channels are kept in memory, and taken back from there."""
  return winograd_cpu.pays(batch, channels, out_channels, out_size, at_points=900, weights=1300)


def _splits(outs: int, ins: int, cores: int) -> list[tuple[int, int]]:
  """Parts of so many packs of output and input channels, one for each core: first those with which the last core to be ready is ready first."""
  def cost(out_splits: int, in_splits: int) -> float:
    own_outs, own_ins = -(-outs // out_splits), -(-ins // in_splits)
    # of a piece and a core, in cycles: sixteen multiplications in one, some 500 for a pack on its way to the points
    return -(-out_splits * in_splits // cores) * (36 * PACK * own_outs * own_ins + 500 * (own_outs + own_ins))
  return sorted(((o, i) for o in range(1, min(outs, cores) + 1) for i in range(1, min(ins, -(-cores // o)) + 1)), key=lambda splits: cost(*splits))


def weight_gradient(x: Tensor, grad: Tensor, batch: int, channels: int, out_channels: int, size: tuple[int, int], padding: int) -> Tensor:
  """Gradient of a weight [out_channels,channels,3,3] as one row, from as such rows x [batch,channels,H,W], with H, W of `size`, and the output's."""
  height, width = out_size = tuple(side + 2 * padding - 2 for side in size)
  products = batch * out_channels * math.prod(out_size) * channels * 9
  outs, ins, across, down = -(-out_channels // PACK), -(-channels // PACK), -(-width // 4), -(-height // 4)
  code = turning(PACK) + TURN + winograd_cpu.FORWARD + WEIGHT_GRADIENT

  def way(pieces: int, out_splits: int, in_splits: int) -> Way:
    band = min(batch * down, max(1, pieces // across))
    own_outs, own_ins = -(-outs // out_splits), -(-ins // in_splits)
    # no smaller than what the kernel's own enums come to for any vectors
    row = own_ins + 5
    scratch = PACK * (36 * ((band * across + 1) * (row + own_outs + 1) + (own_outs + 1) * PACK * row + 1)
                      + 2 * (6 * max(width, size[1]) + PACK) + 12 * (across * 4 + 2))
    return code, {"COUNT": 64, "BATCH": batch, "IN": channels, "OUT": out_channels, "HEIGHT": size[0], "WIDTH": size[1], "OUT_H": height,
                  "OUT_W": width, "PADDING": padding, "BAND": band, "OUT_SPLITS": out_splits, "IN_SPLITS": in_splits, "SCRATCH": scratch}, scratch

  splits = _splits(outs, ins, parts_of(products))
  made, sizes, scratch = way(PIECES, *splits[0])
  return c_kernel("conv_weight_gradient", made, out_channels * channels * 9, products, (x, grad), sizes, scratch,
                  lambda: [way(pieces, *each) for each in splits[:2] for pieces in (PIECES // 4, PIECES // 2, PIECES, 2 * PIECES)])
