"""1x1 convolutions and their input gradients on processors as the matrix product that they are, as a kernel in C.

A pixel's channels lie a plane apart, each in another page of memory, and a gradient's weights a row apart. So a core copies the columns that it is at
into one piece, as it does the weights, in the order in which they are multiplied, and then uses each of them many times."""
from tinygrad import Tensor
from tinydet.nn.kernel_cpu import LINEAR, SILU, WAYS, WITH_BIAS, WITHOUT_BIAS, Way, c_kernel, parts_of

AT_HAND = 1 << 16   # numbers of pictures that a core has at hand at a time: they are to stay in its second cache
LEAST_COLUMNS = 96  # of a picture that are worth the copies

# out [BATCH, OUT, COUNT] from x [BATCH, IN, COUNT], with the weight of two channels at o * W_OUT + i * W_IN. A part of the work is COLUMNS of a
# picture and a SPLITS-th of the output channels.
PRODUCT = """
enum { MOST = WHOLE(COLUMNS, LANES), ACROSS = LEAST(MOST, ACROSS_MOST), STEP = ACROSS * LANES, DOWN = LEAST(OUT, SUMS / ACROSS),
       BLOCKS = WHOLE(OUT, DOWN), CHUNKS = WHOLE(COUNT, COLUMNS) };

// u [IN][DOWN] of a block of output channels
APART void pack_weights(float *restrict u, const float *restrict weight) {
  for (long i = 0; i < IN; i++, u += DOWN) UNROLLED (int d = 0; d < DOWN; d++) u[d] = weight[(long)d * W_OUT + i * W_IN];
}

// v [tiles][IN][STEP] of the columns from `first` on, and a word to the memory on which come next
APART void pack_columns(float *restrict v, const float *restrict x, long first, int tiles) {
  for (int n = 0; n < tiles; n++) {
    long at[ACROSS];
    UNROLLED (int a = 0; a < ACROSS; a++) at[a] = LEAST(first + (n * ACROSS + a) * LANES, COUNT - LANES);
    const float *from = x;
    for (long i = 0; i < IN; i++, v += STEP, from += COUNT) UNROLLED (int a = 0; a < ACROSS; a++) {
      *(vector *)(v + a * LANES) = *(const vector *)(from + at[a]);
      __builtin_prefetch(from + at[a] + STEP);
    }
  }
}

APART void multiply(float *restrict to, const float *restrict v, const float *restrict u, long first BIAS_PARAMETER) {
  vector sum[DOWN][ACROSS];
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) sum[d][a] = (vector){0} + BIAS(d);
  for (long i = 0; i < IN; i++, v += STEP, u += DOWN) {
    vector x[ACROSS];
    UNROLLED (int a = 0; a < ACROSS; a++) x[a] = *(const vector *)(v + a * LANES);
    UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++) sum[d][a] += x[a] * u[d];
  }
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int a = 0; a < ACROSS; a++)
    *(vector *)(to + (long)d * COUNT + LEAST(first + a * LANES, COUNT - LANES)) = ACTIVATED(sum[d][a]);
}

void NAME(float *restrict out, float *restrict scratch, const float *restrict x, const float *restrict weight BIAS_PARAMETER, int core) {
  float *v = scratch + (long)core * SCRATCH, *u = v + (long)WHOLE(MOST, ACROSS) * STEP * IN;
  const long items = (long)SPLITS * BATCH * CHUNKS;
  long there = -1;   // the part of the weights that is packed
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const long split = item / (BATCH * CHUNKS), b = item / CHUNKS % BATCH, column = item % CHUNKS * COLUMNS;
    const long from = BLOCKS * split / SPLITS, to = BLOCKS * (split + 1) / SPLITS;
    const int tiles = WHOLE(WHOLE(LEAST(COLUMNS, COUNT - column), LANES), ACROSS);
    if (there != split) for (long block = from; block < to; block++)
      pack_weights(u + (block - from) * DOWN * IN, weight + LEAST(block * DOWN, OUT - DOWN) * W_OUT);
    there = split;
    pack_columns(v, x + b * IN * COUNT, column, tiles);
    for (long block = from; block < to; block++) for (int n = 0; n < tiles; n++) {
      const long o = LEAST(block * DOWN, OUT - DOWN);
      multiply(out + (b * OUT + o) * COUNT, v + (long)n * IN * STEP, u + (block - from) * DOWN * IN, column + n * STEP BIAS_FROM(o));
    }
  }
}
"""


def pays(batch: int, count: int, channels: int, out_channels: int) -> bool:
  """Whether this way is the faster one: for few columns or few channels the copies take what is saved."""
  return count >= LEAST_COLUMNS and min(channels, out_channels) >= 16


def _plans(batch: int, count: int, channels: int, out_channels: int, cores: int) -> list[tuple[int, int]]:
  """Columns and parts of the output channels that a part of the work takes: first those with which the last core to be ready is ready first."""
  def cost(columns: int, splits: int) -> float:
    items = splits * batch * -(-count // columns)
    each, parts = -(-items // cores), -(-splits // cores)
    # in cycles: sixteen multiplications in one, weights packed and read again, columns packed
    own = channels * -(-out_channels // splits)
    return each * (min(columns, count) * own / 16 + own / 2 + columns * channels / 3) + 1.5 * parts * own
  most = max(32, min(AT_HAND // channels, count))
  choices = [32 * 2 ** n for n in range(12) if 32 * 2 ** n <= most]
  return sorted(((columns, splits) for columns in choices for splits in range(1, cores + 1)), key=lambda choice: cost(*choice))


def correlate(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, batch: int, channels: int, out_channels: int, count: int, *,
              turned: bool = False, silu: bool = False) -> Tensor:
  """What a 1x1 convolution gives, f32 [batch*out_channels*count] as one row, from as such rows x [batch,channels,count], weight
  [out_channels,channels] and bias [out_channels]; through SiLU where `silu`. `turned`: the weight is [channels,out_channels]."""
  products = batch * out_channels * count * channels
  code = (WITHOUT_BIAS if bias is None else WITH_BIAS) + (SILU if silu else LINEAR) + PRODUCT
  step = (1, out_channels) if turned else (channels, 1)

  def way(columns: int, splits: int) -> Way:
    scratch = channels * (columns + 64 + out_channels // splits + 48)   # no smaller than the kernel's own enums come to for any vectors
    return code, {"COUNT": count, "BATCH": batch, "IN": channels, "OUT": out_channels, "COLUMNS": columns, "SPLITS": splits, "SCRATCH": scratch,
                  "W_OUT": step[0], "W_IN": step[1]}, scratch

  plans = _plans(batch, count, channels, out_channels, parts_of(products))
  code, sizes, scratch = way(*plans[0])
  return c_kernel(name, code, batch * out_channels * count, products, (x, weight, *([] if bias is None else [bias])), sizes, scratch,
                  lambda: [way(*plan) for plan in plans[1:WAYS]])
