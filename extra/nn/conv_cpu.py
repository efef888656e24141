"""Convolutions on processors: the output and both gradients as kernels in C, which tinygrad compiles and runs like its own.

tinygrad's own kernel multiplies each number about as often as it loads it. These keep as many sums as there are registers, a tile of some output
channels times some columns, and load a number once for a whole side of the tile: five times the speed on current processors. As C they are also
ready in a third of the time, since what takes tinygrad longest in a convolution is to spell it.

A picture lies in memory as one row of numbers. Where its rows are all padded to one pitch, the pixel that is so many rows and columns away is the
same step ahead for each, so a tap of the kernel is a constant step, and all columns of a picture together are one long axis. What comes out where a
window reaches over the end of a row is left out; in gradients it meets zeros."""
import functools, math
from tinygrad import Tensor, UOp
from tinydet.nn import depthwise_cpu, pointwise_cpu, strided_gradient_cpu, weight_gradient_cpu, winograd_cpu, winograd_gradient_cpu
from tinydet.nn.kernel_cpu import LAY_OUT, LINEAR, SILU, WAYS, WITH_BIAS, WITHOUT_BIAS, Way, bands, c_kernel, divide, parts_of, run, shards, with_taps

# Sums of DOWN output channels, PLANE numbers apart, at ACROSS vectors of the long axis from `start` on, over all taps: x the step from the place of
# the output, w the place in the weight.
TILE = """
enum { VECTORS = WHOLE(COUNT, LANES), FEWER = WHOLE(VECTORS, ACROSS_MOST - 1) * (ACROSS_MOST - 1) < WHOLE(VECTORS, ACROSS_MOST) * ACROSS_MOST,
       ACROSS = LEAST(VECTORS, ACROSS_MOST > 2 && FEWER ? ACROSS_MOST - 1 : ACROSS_MOST), TILES = WHOLE(VECTORS, ACROSS),
       DOWN = LEAST(OUT, SUMS / ACROSS), BLOCKS = WHOLE(OUT, DOWN), AHEAD = TAPS > 1 ? 3 : 12 };
static inline void tile(float *restrict to, const float *restrict in, const float *restrict w, long start BIAS_PARAMETER) {
  long at[ACROSS];
  UNROLLED (int v = 0; v < ACROSS; v++) at[v] = LEAST(start + v * LANES, COUNT - LANES);
  vector sum[DOWN][ACROSS];
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int v = 0; v < ACROSS; v++) sum[d][v] = (vector){0} + BIAS(d);
  for (int i = 0; i < IN; i++, in += X_PLANE, w += W_IN) {
    // where a channel's weights lie far from the one's before, as in gradients, nothing foresees them
    if (W_IN > TAPS) UNROLLED (int k = 0; k < DOWN * W_OUT; k += 16) __builtin_prefetch(w + AHEAD * W_IN + k);
    for (int t = 0; t < TAPS; t++) {
      vector a[ACROSS];
      UNROLLED (int v = 0; v < ACROSS; v++) a[v] = *(const vector *)(in + taps[t].x + at[v]);
      // of a large plane the next tile has to be fetched: no processor foresees that it lies beside this one
      if (TAPS == 1 && COUNT > 1000) UNROLLED (int v = 0; v < ACROSS; v++) __builtin_prefetch(in + at[v] + ACROSS * LANES);
      UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int v = 0; v < ACROSS; v++) sum[d][v] += a[v] * w[taps[t].w + d * W_OUT];
    }
  }
  UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int v = 0; v < ACROSS; v++) sum[d][v] = ACTIVATED(sum[d][v]);
  if (WIDTH == PITCH) UNROLLED (int d = 0; d < DOWN; d++) UNROLLED (int v = 0; v < ACROSS; v++)
    *(vector *)(to + (long)d * PLANE + at[v]) = sum[d][v];
  else UNROLLED (int v = 0; v < ACROSS; v++) {
    long row = at[v] / PITCH, column = at[v] % PITCH;
    if (column + LANES <= WIDTH) UNROLLED (int d = 0; d < DOWN; d++)   // most lie in one row
      *(vector *)(to + (long)d * PLANE + row * WIDTH + column) = sum[d][v];
    else for (int l = 0; l < LANES; l++) {
      if (column < WIDTH) UNROLLED (int d = 0; d < DOWN; d++) to[(long)d * PLANE + row * WIDTH + column] = sum[d][v][l];
      if (++column == PITCH) { column = 0; row++; }
    }
  }
}
"""

# Output [BATCH, GROUPS*OUT, PLANE] by one tap from pictures as they are
POINTWISE = TILE + """
void NAME(float *restrict out, const float *restrict x, const float *restrict weight BIAS_PARAMETER, int core) {
  const long items = (long)BATCH * TILES * GROUPS * BLOCKS;
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const int block = item % BLOCKS, group = item / BLOCKS % GROUPS;
    const long n = item / BLOCKS / GROUPS % TILES, b = item / BLOCKS / GROUPS / TILES, o = LEAST(block * DOWN, OUT - DOWN);
    tile(out + ((b * GROUPS + group) * OUT + o) * PLANE, x + (b * GROUPS + group) * IN * X_PLANE, weight + (long)group * OUT * IN * TAPS + o * W_OUT,
         n * ACROSS * LANES BIAS_FROM(group * OUT + o));
  }
}
"""

# The same by several taps from pictures [BATCH, GROUPS*IN, HEIGHT, COLUMNS], of which BAND rows of the output at a time find theirs in `scratch`,
# sorted into PHASE_ROWS x PHASE_COLUMNS phases of the stride and with zeros around; a SPLITS-th of the output channels each.
CONVOLVE = TILE + """
enum { OUT_H = PLANE / WIDTH, BANDS = WHOLE(OUT_H, BAND) };
""" + LAY_OUT + """
void NAME(float *restrict out, float *restrict scratch, const float *restrict x, const float *restrict weight BIAS_PARAMETER, int core) {
  float *mine = scratch + (long)core * IN * X_PLANE;
  const long items = (long)BATCH * GROUPS * BANDS * SPLITS;
  for (long item = items * core / CORES; item < items * (core + 1) / CORES; item++) {
    const long split = item % SPLITS, top = LEAST(item / SPLITS % BANDS * BAND, OUT_H - BAND);
    const long picture = item / SPLITS / BANDS, group = picture % GROUPS;
    for (long i = 0; i < IN; i++) lay_out(mine + i * X_PLANE, x + (picture * IN + i) * HEIGHT * COLUMNS, top);
    for (long n = 0; n < TILES; n++) for (long block = BLOCKS * split / SPLITS; block < BLOCKS * (split + 1) / SPLITS; block++) {
      const long o = LEAST(block * DOWN, OUT - DOWN);
      tile(out + (picture * OUT + o) * PLANE + top * WIDTH, mine, weight + (long)group * OUT * IN * TAPS + o * W_OUT, n * ACROSS * LANES
           BIAS_FROM(group * OUT + o));
    }
  }
}
"""


def _convolve(name: str, code: str, tensors: tuple[Tensor, ...], batch: int, groups: int, channels: tuple[int, int], size: tuple[int, int],
              kernel: tuple[int, int], stride: int, padding: int, gradient: bool = False) -> Tensor:
  """The plain sum over the taps of pictures of `size` as one row, from as such rows pictures and weight. `channels` are those in and out of a group;
  `gradient`: the weight is the one of which this is the input's gradient, the other way round and with its taps turned."""
  ins, outs = channels
  out_size = [(side + 2 * padding - k) // stride + 1 for side, k in zip(size, kernel)]
  over = [(k - 1) // stride for k in kernel]                    # rows and columns that a window reaches beyond its first
  phases = [min(k, stride) for k in kernel]                     # a stride of 2 sorts the pixels into even and odd ones
  taps, pitch = math.prod(kernel), out_size[1] + over[1]
  products = batch * groups * outs * math.prod(out_size) * ins * taps
  amount = batch * groups * outs * math.prod(out_size), products

  def way(band: int, splits: int, high: int, code: str) -> Way:
    places = [(((p % stride * phases[1] + q % stride) * high + p // stride) * pitch + q // stride, p * kernel[1] + q)
              for p in range(kernel[0]) for q in range(kernel[1])]
    if gradient: places = [(x, taps - 1 - w) for x, w in places]
    x_plane = math.prod(phases) * high * pitch
    return with_taps(code, [places]), {
      "BATCH": batch, "GROUPS": groups, "TAPS": taps, "PITCH": pitch, "COUNT": (band - 1) * pitch + out_size[1], "IN": ins, "OUT": outs,
      "X_PLANE": x_plane, "PLANE": math.prod(out_size), "WIDTH": out_size[1], "W_OUT": taps if gradient else ins * taps,
      "W_IN": outs * taps if gradient else taps, "BAND": band, "SPLITS": splits, "HEIGHT": size[0], "COLUMNS": size[1], "STRIDE": stride,
      "PADDING": padding, "PHASE_ROWS": phases[0], "PHASE_COLUMNS": phases[1], "ROWS": high}, ins * x_plane

  if kernel == (1, 1) and stride == 1 and not padding:   # the picture is taken as it is
    code, sizes, _ = way(out_size[0], 1, out_size[0], code + POINTWISE)
    return c_kernel(name, code, *amount, tensors, sizes)
  each = ins * math.prod(phases) * pitch
  plans = bands(batch * groups, out_size[0], over[0], each, products // (batch * groups * out_size[0]), parts_of(products))
  first, *others = (functools.partial(way, band, splits, band + over[0], code + CONVOLVE) for band, splits in plans[:WAYS])
  code, sizes, scratch = first()
  return c_kernel(name, code, *amount, tensors, sizes, scratch, lambda: [other() for other in others])


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int, silu: bool = False) -> Tensor:
  """2-D convolution in float32, with its gradients: x [B,Cin,H,W], weight [Cout,Cin/groups,KH,KW], bias [Cout] -> [B,Cout,OH,OW], with `silu` through
  SiLU, which costs nothing where a number is in a register anyway. On the way back the convolution is then run once more.

  For tensors that `fits` takes. Of pictures divided among devices each computes its own, and the weight's gradients are added."""
  # `gradient` is kept with the graph, and with it what it refers to: no tensors, or they stay as long
  (pictures, channels, *size), (out_channels, per_group, *kernel), shape, biased = x.shape, weight.shape, weight.shape, bias is not None
  what = (x.shape, shape, stride, padding, groups)
  batch = pictures // (devices := shards(x))
  size, kernel, outs = tuple(size), tuple(kernel), out_channels // groups
  out_size = tuple((side + 2 * padding - k) // stride + 1 for side, k in zip(size, kernel))
  fast, fast_gradient = (kernel == (3, 3) and stride == groups == 1 and way.pays(batch, channels, out_channels, out_size)
                         for way in (winograd_cpu, winograd_gradient_cpu))
  plain = kernel == (1, 1) and stride == groups == 1 and not padding and pointwise_cpu.pays(batch, math.prod(size), channels, out_channels)
  depthwise = (batch, channels, size, out_size, kernel, stride, padding) if groups == channels == out_channels else None

  def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = silu) -> Tensor:
    if fast: return winograd_cpu.correlate(x, weight, bias, batch, channels, out_channels, size, padding, silu=silu)
    if plain: return pointwise_cpu.correlate("conv", x, weight, bias, batch, channels, out_channels, math.prod(size), silu=silu)
    if depthwise: return depthwise_cpu.convolve(x, weight, bias, *depthwise, silu)
    code = (WITHOUT_BIAS if bias is None else WITH_BIAS) + (SILU if silu else LINEAR)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return _convolve("conv", code, tensors, batch, groups, (per_group, outs), size, kernel, stride, padding)

  def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    if fast: return winograd_cpu.correlate(grad, weight, None, batch, out_channels, channels, out_size, 2 - padding, turned=True,
                                           name="conv_input_gradient")
    if plain:
      return pointwise_cpu.correlate("conv_input_gradient", grad, weight, None, batch, out_channels, channels, math.prod(out_size), turned=True)
    if depthwise: return depthwise_cpu.input_gradient(grad, weight, *depthwise)
    if stride > 1 or kernel[0] != kernel[1]: return strided_gradient_cpu.input_gradient(grad, weight, batch, groups, shape, size, stride, padding)
    return _convolve("conv_input_gradient", WITHOUT_BIAS + LINEAR, (grad, weight), batch, groups, (outs, per_group), out_size, kernel, 1,
                     kernel[0] - 1 - padding, gradient=True)

  def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    if fast_gradient: return winograd_gradient_cpu.weight_gradient(x, grad, batch, channels, out_channels, size, padding)
    if depthwise: return depthwise_cpu.weight_gradient(x, grad, *depthwise)
    return weight_gradient_cpu.weight_gradient(x, grad, batch, groups, shape, size, stride, padding)

  def gradient(grad: UOp, call: UOp) -> tuple[UOp, ...]:
    x, flat_weight, *flat_bias = (Tensor(u) for u in call.src[1:3 + biased])
    g = Tensor(grad)
    if silu:
      before = run(("conv", *what, False), functools.partial(forward, silu=False), x, flat_weight, *flat_bias)
      g = g * (s := before.sigmoid()) * (1 + before * (1 - s))
    g = divide(g.reshape(pictures, out_channels, *out_size), devices).reshape(-1).contiguous()
    of_x = run(("conv_input_gradient", *what), input_gradient, g, flat_weight)
    of_weight = run(("conv_weight_gradient", *what), weight_gradient, x, g)
    if devices > 1: of_weight = of_weight.reshape(devices, -1).sum(0)
    return of_x.uop, of_weight.uop, *([g.reshape(pictures, out_channels, -1).sum((0, 2)).uop] if biased else [])

  made = run(("conv", *what, silu), forward, x, weight, *([] if bias is None else [bias]), gradient=gradient)
  return made.reshape(pictures, out_channels, *out_size)
