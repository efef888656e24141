"""The convolution with its own gradient: against float64 sums over taps, finite differences, and the gradient that tinygrad derives itself."""
import ctypes, platform
import numpy as np, pytest
from tinygrad import Context, Device, Tensor, codegen, dtypes
from tinygrad.device import TinyELF
from tinygrad.engine import realize
from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.runtime.support.compiler_cpu import ClangCompiler
from tinydet.nn import conv, conv_cpu, kernel_cpu, pointwise_cpu, strided_gradient_cpu, weight_gradient_cpu, winograd_cpu, winograd_gradient_cpu
from tinydet.nn.conv import conv2d
from tinydet.nn.layers import Conv2d
from tinydet.runtime.graphs import jit

# batch, channels in and out, height, width, kernel, stride, padding, groups
CASES = [
  (2, 4, 6, 9, 8, 3, 1, 1, 1), (2, 4, 6, 9, 8, 3, 2, 1, 1), (2, 4, 6, 9, 8, 1, 2, 0, 1), (2, 4, 6, 10, 7, 3, 2, 1, 2), (1, 3, 4, 13, 12, 7, 2, 3, 1),
  (2, 4, 4, 6, 6, 3, 1, 1, 4), (2, 4, 6, 7, 8, 1, 1, 0, 2), (1, 2, 2, 9, 9, 2, 3, 0, 1), (1, 3, 3, 8, 5, 2, 2, 1, 3), (1, 2, 3, 8, 7, 3, 1, 2, 1),
  # channels in whole vectors on either side or on both, and outputs of one row, one column, one pixel
  (2, 16, 32, 5, 6, 3, 1, 1, 1), (2, 32, 18, 6, 5, 3, 2, 1, 1), (1, 6, 16, 4, 8, 1, 1, 0, 1), (1, 16, 16, 1, 5, 3, 1, 1, 1),
  (2, 16, 3, 2, 2, 3, 2, 1, 1), (1, 8, 6, 1, 1, 3, 1, 1, 1),
  # by Winograd's way: whole and broken tiles, each padding, several pictures at a time, rows longer than a vector of tiles
  (1, 32, 35, 20, 22, 3, 1, 1, 1), (3, 33, 32, 13, 9, 3, 1, 0, 1), (1, 32, 32, 9, 70, 3, 1, 2, 1), (7, 40, 33, 8, 8, 3, 1, 1, 1)]
WINOGRAD = CASES[-4:]
# gradients of weights in pieces: several pictures at a time and a rest of them, several bands and a shorter one, shares of some channels twice, rows
# of taps wider than a tile, groups, fewer pairs of a channel and a tap than lanes
PIECES = [(5, 5, 40, 9, 7, 3, 1, 1, 1), (2, 7, 72, 23, 31, 3, 2, 1, 1), (3, 33, 130, 19, 20, 1, 1, 0, 1), (1, 3, 24, 40, 44, 11, 4, 2, 1),
          (2, 24, 48, 21, 20, 3, 1, 1, 3), (2, 3, 16, 30, 8, 1, 1, 0, 1), (4, 50, 34, 3, 2, 5, 1, 2, 1), (3, 20, 3, 9, 9, 1, 1, 0, 1)]
# the matrix product
POINTWISE = (2, 21, 40, 13, 9, 1, 1, 0, 1)
# a plane each: whole and broken vectors of a row, rows that are no multiple of four, strides that leave pixels, kernels of many taps
DEPTHWISE = [(2, 5, 5, 9, 33, 3, 1, 1, 5), (3, 6, 6, 13, 16, 3, 2, 1, 6), (2, 3, 3, 8, 11, 5, 2, 2, 3), (1, 4, 4, 15, 20, 7, 1, 3, 4),
             (2, 7, 7, 3, 1, 3, 1, 1, 7), (1, 5, 5, 10, 12, 5, 3, 0, 5), (2, 3, 3, 6, 7, 1, 1, 0, 3), (1, 2, 2, 2, 6, 3, 3, 1, 2)]


def oracle(x, w, bias, stride, padding, groups):
  """Forward in float64, tap by tap, and the function that carries an output gradient back to input and weight."""
  (batch, _, height, width), (cout, per_group, k, _) = x.shape, w.shape
  oh, ow = ((side + 2 * padding - k) // stride + 1 for side in (height, width))
  w, padded = w.astype(np.float64), np.pad(x.astype(np.float64), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
  out = np.zeros((batch, cout, oh, ow)) + bias[:, None, None]
  def taps():
    for i, j in np.ndindex(k, k):
      for o in range(cout):
        first = o // (cout // groups) * per_group
        yield i, j, o, (slice(None), slice(first, first + per_group), slice(i, i + stride * oh, stride), slice(j, j + stride * ow, stride))
  for i, j, o, window in taps(): out[:, o] += np.einsum("bchw,c->bhw", padded[window][..., :oh, :ow], w[o, :, i, j])
  def back(r):
    r = r.astype(np.float64)
    gx, gw = np.zeros_like(padded), np.zeros(w.shape)
    for i, j, o, window in taps():
      gx[window] += np.einsum("bhw,c->bchw", r[:, o], w[o, :, i, j])
      gw[o, :, i, j] = np.einsum("bhw,bchw->c", r[:, o], padded[window])
    return gx[:, :, padding:padding + height, padding:padding + width], gw, r.sum((0, 2, 3))
  return out, back


def draw(case):
  batch, cin, cout, height, width, k, stride, padding, groups = case
  rng = np.random.default_rng(case)
  x, w, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((batch, cin, height, width), (cout, cin // groups, k, k), (cout,)))
  out, back = oracle(x, w, bias, stride, padding, groups)
  return x, w, bias, rng.standard_normal(out.shape).astype(np.float32), out, back


@pytest.mark.parametrize("case", [*CASES, POINTWISE, *DEPTHWISE], ids=str)
def test_output_and_gradients(case):
  *_, stride, padding, groups = case
  x, w, bias, r, out, back = draw(case)
  tensors = [Tensor(a) for a in (x, w, bias)]
  ours = conv2d(*tensors, stride, padding, groups)
  Tensor.realize(*(found := [ours, *(ours * Tensor(r)).sum().gradient(*tensors)]))
  for a, expected in zip(found, [out, *back(r)]):
    np.testing.assert_allclose(a.numpy(), expected, rtol=1e-6, atol=1e-5 * expected.std() if case in WINOGRAD else 2e-5)


@pytest.mark.parametrize("cores", [1, 2, 5])
@pytest.mark.parametrize("case", [*PIECES, DEPTHWISE[1]], ids=str)
def test_gradients_of_weights_in_pieces(case, cores, monkeypatch):
  """However many cores there are, and from memory that is not empty."""
  for module in (conv_cpu, weight_gradient_cpu, kernel_cpu): monkeypatch.setattr(module, "parts_of", lambda products: cores)
  *_, stride, padding, groups = case
  x, w, _, r, _, back = draw(case)
  tensors = [Tensor(a) for a in (x, w)]
  found, = (conv2d(*tensors, None, stride, padding, groups) * Tensor(r)).sum().gradient(tensors[1])
  expected = back(r)[1]
  np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("at_hand, most_times", [(0, 99), (1 << 15, 99), (1 << 18, 99), (0, -1)], ids=["a block", "some", "all", "before"])
def test_weights_at_their_points(at_hand, most_times, cores, monkeypatch):
  """A block of them at a time, some, all, and by a kernel of their own: for channels that no vector divides, and more work than cores."""
  monkeypatch.setattr(winograd_cpu, "AT_HAND", at_hand)
  monkeypatch.setattr(winograd_cpu, "MOST_TIMES", most_times)
  monkeypatch.setattr(winograd_cpu, "MOST", 1 << 10)   # bands of few tiles
  for module in (winograd_cpu, kernel_cpu): monkeypatch.setattr(module, "parts_of", lambda products: cores)
  monkeypatch.setattr(kernel_cpu, "_traced", {})
  names, make = [], winograd_cpu.c_kernel
  monkeypatch.setattr(winograd_cpu, "c_kernel", lambda name, *args: names.append(name) or make(name, *args))
  x, w, bias, r, out, back = draw(case := (2, 40, 51, 37, 50, 3, 1, 1, 1))
  tensors = [Tensor(a) for a in (x, w, bias)]
  ours = conv2d(*tensors, *case[-3:])
  Tensor.realize(*(found := [ours, *(ours * Tensor(r)).sum().gradient(*tensors)]))
  for a, expected in zip(found, [out, *back(r)], strict=True): np.testing.assert_allclose(a.numpy(), expected, rtol=1e-6, atol=1e-5 * expected.std())
  assert ("conv_weights" in names) == (most_times < 0), names


def alone(monkeypatch, module, cores, wide, make, *arrays):
  """What the kernel of `module` that `make` asks for leaves in its result, and then every other way of it that BEAM may choose."""
  asked = []
  monkeypatch.setattr(module, "c_kernel", lambda *args: asked.append(args))
  make(*(Tensor(a).reshape(-1) for a in arrays))
  (name, code, size, _, _, sizes, scratch, others), = asked
  def made(code, sizes, scratch): return run_alone(name, "#define __AVX512F__ 1\n" * wide + kernel_cpu.spelled(name, code, cores, sizes), cores,
                                                   size, scratch, arrays)
  yield made(code, sizes, scratch)
  for way in others(): yield made(*way)


def check_alone(expected, atol, *what):
  """The result of the kernel that `alone` makes of `what` is `expected`."""
  np.testing.assert_allclose(next(alone(*what)).reshape(expected.shape), expected, rtol=1e-6, atol=atol)


def run_alone(name, source, cores, size, scratch, arrays):
  """The result of a kernel made by itself and run core by core, the last first: from memory that was used before, and without a number beyond what
  is asked for."""
  renderer, beyond = Device["CPU"].renderer, 64
  loaded = CPUProgram(Device["CPU"], TinyELF(renderer.compiler.compile_cached(source), name, renderer.target, ()))
  memory = [np.full(numbers + beyond, np.nan, np.float32) for numbers in (size, cores * scratch)]
  pointers = [array.ctypes.data for array in (*memory, *arrays)]
  program = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(pointers), ctypes.c_int)(loaded.addr)
  for core in reversed(range(cores)): program(*pointers, core)
  for array in memory: assert np.isnan(array[-beyond:]).all()
  return memory[0][:size]


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize(("kind", "case"), [("winograd", (3, 33, 40, 17, 10, 3, 1, 1, 1)), ("pointwise", (3, 21, 40, 13, 11, 1, 1, 0, 1)),
                                            ("plain", (3, 5, 40, 13, 11, 3, 2, 1, 1))], ids=lambda value: value if isinstance(value, str) else "")
def test_every_way_that_beam_may_choose(kind, case, wide, monkeypatch):
  for module in (conv_cpu, pointwise_cpu, strided_gradient_cpu, weight_gradient_cpu, winograd_cpu, winograd_gradient_cpu, kernel_cpu):
    monkeypatch.setattr(module, "parts_of", lambda products: 3)
  batch, cin, cout, height, width, k, stride, padding, _ = case
  x, w, bias, r, out, back = draw(case)
  of_x, of_w, _ = back(r)
  shape, numbers, strides = (height, width), height * width, (batch, 1, w.shape, (height, width), stride, padding)
  def plain(*rows):
    code = kernel_cpu.WITH_BIAS + kernel_cpu.LINEAR
    return conv_cpu._convolve("conv", code, rows, batch, 1, (cin, cout), shape, (k, k), stride, padding)
  kernels = {
    "winograd": [(winograd_cpu, lambda *rows: winograd_cpu.correlate(*rows, batch, cin, cout, shape, padding), (x, w, bias), out),
                 (winograd_cpu, lambda *rows: winograd_cpu.correlate(*rows, None, batch, cout, cin, shape, padding, turned=True), (r, w), of_x),
                 (winograd_gradient_cpu, lambda *rows: winograd_gradient_cpu.weight_gradient(*rows, batch, cin, cout, shape, padding), (x, r), of_w)],
    "pointwise": [(pointwise_cpu, lambda *rows: pointwise_cpu.correlate("conv", *rows, batch, cin, cout, numbers), (x, w, bias), out)],
    "plain": [(conv_cpu, plain, (x, w, bias), out),
              (weight_gradient_cpu, lambda *rows: weight_gradient_cpu.weight_gradient(*rows, *strides), (x, r), of_w),
              (strided_gradient_cpu, lambda *rows: strided_gradient_cpu.input_gradient(*rows, *strides), (r, w), of_x)]}[kind]
  for module, make, arrays, expected in kernels:
    found = list(alone(monkeypatch, module, 3, wide, make, *arrays))
    assert len(found) > 2
    for one in found: np.testing.assert_allclose(one.reshape(expected.shape), expected, rtol=1e-6, atol=1e-5 * expected.std())


# strides larger than the kernel and smaller, with and without padding, pixels that no window reaches, groups, fewer channels than a tile has, one row
STRIDED = [(2, 5, 40, 13, 11, 3, 2, 1, 1), (3, 24, 33, 20, 40, 3, 2, 1, 1), (1, 30, 7, 9, 14, 1, 2, 0, 1), (2, 12, 18, 12, 9, 5, 3, 4, 3),
           (1, 3, 20, 31, 33, 7, 2, 3, 1), (2, 6, 6, 10, 7, 2, 4, 0, 1), (1, 40, 12, 3, 5, 3, 2, 2, 1), (4, 9, 10, 1, 8, 1, 3, 0, 1),
           (1, 8, 8, 17, 6, 3, 1, 1, 2), (2, 25, 5, 8, 8, 2, 2, 0, 1), (1, 2, 3, 4, 4, 4, 3, 3, 1)]


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("cores", [1, 3, 8])
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_gradients_of_inputs_behind_strides(case, cores, wide, monkeypatch):
  for module in (strided_gradient_cpu, kernel_cpu): monkeypatch.setattr(module, "parts_of", lambda products: cores)
  batch, *_, height, width, _, stride, padding, groups = case
  _, w, _, r, _, back = draw(case)
  def make(*rows): return strided_gradient_cpu.input_gradient(*rows, batch, groups, w.shape, (height, width), stride, padding)
  of_x = back(r)[0]
  check_alone(of_x, 2e-5 * max(1, of_x.std()), monkeypatch, strided_gradient_cpu, cores, wide, make, r, w)


def test_a_kernel_that_is_not_square():
  """With a stride and without, against torch's definition in float64."""
  rng = np.random.default_rng(5)
  for kernel, stride in (((1, 3), 1), ((3, 1), 2), ((2, 5), 3)):
    padding = min(kernel) - 1
    x, w = (rng.standard_normal(shape) for shape in ((2, 4, 9, 11), (6, 4, *kernel)))
    padded = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, (2, 3))[:, :, ::stride, ::stride]
    r = rng.standard_normal((2, 6, *windows.shape[2:4]))
    of_x = np.zeros_like(padded)
    for p, q in np.ndindex(*kernel):
      of_x[:, :, p:p + stride * r.shape[2]:stride, q:q + stride * r.shape[3]:stride] += np.einsum("bohw,oc->bchw", r, w[:, :, p, q])
    expected = (np.einsum("bchwpq,ocpq->bohw", windows, w), of_x[:, :, padding:padding + 9, padding:padding + 11],
                np.einsum("bchwpq,bohw->ocpq", windows, r))
    tensors = [Tensor(a.astype(np.float32)) for a in (x, w)]
    out = conv2d(*tensors, None, stride, padding)
    for a, b in zip((out, *(out * Tensor(r.astype(np.float32))).sum().gradient(*tensors)), expected):
      np.testing.assert_allclose(a.numpy(), b, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize(("case", "pieces", "cores"), [
  (WINOGRAD[0], 1, 1), (WINOGRAD[1], 30, 2), (WINOGRAD[2], 18, 7), (WINOGRAD[3], 999, 3), ((3, 70, 50, 14, 11, 3, 1, 1, 1), 9, 20),
  ((2, 40, 129, 25, 17, 3, 1, 0, 1), 50, 4)], ids=str)
def test_gradients_of_weights_at_their_points(case, pieces, cores, wide, monkeypatch):
  """Whatever a core's share, with many rows of pieces at a time and one, and a rest of them."""
  monkeypatch.setattr(winograd_gradient_cpu, "PIECES", pieces)
  for module in (winograd_gradient_cpu, kernel_cpu): monkeypatch.setattr(module, "parts_of", lambda products: cores)
  batch, cin, cout, height, width, _, _, padding, _ = case
  x, _, _, r, _, back = draw(case)
  expected = back(r)[1]
  check_alone(expected, 1e-5 * expected.std(), monkeypatch, winograd_gradient_cpu, cores, wide,
              lambda *rows: winograd_gradient_cpu.weight_gradient(*rows, batch, cin, cout, (height, width), padding), x, r)


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize(("case", "most", "cores"), [
  (WINOGRAD[0], 1 << 10, 1), (WINOGRAD[1], 3 << 20, 3), (WINOGRAD[2], 1 << 19, 7), (WINOGRAD[3], 3 << 20, 2),
  ((1, 40, 100, 17, 24, 3, 1, 1, 1), 3 << 20, 5)], ids=str)
def test_convolutions_at_their_points(case, most, cores, wide, monkeypatch):
  """As the test above, either way round."""
  monkeypatch.setattr(winograd_cpu, "MOST", most)
  for module in (winograd_cpu, kernel_cpu): monkeypatch.setattr(module, "parts_of", lambda products: cores)
  batch, cin, cout, height, width, _, _, padding, _ = case
  x, w, bias, r, out, back = draw(case)
  expected, kind = back(r)[0], (monkeypatch, winograd_cpu, cores, wide)
  check_alone(out, 1e-5 * out.std(), *kind, lambda *rows: winograd_cpu.correlate(*rows, batch, cin, cout, (height, width), padding), x, w, bias)
  check_alone(expected, 1e-5 * expected.std(), *kind, lambda *rows: winograd_cpu.correlate(
    *rows, None, batch, cout, cin, out.shape[2:], 2 - padding, turned=True), r, w)


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize(("case", "at_hand", "cores"), [
  ((3, 17, 40, 12, 9, 1, 1, 0, 1), 1 << 16, 1), ((2, 70, 23, 1, 130, 1, 1, 0, 1), 1 << 11, 3),
  ((1, 33, 129, 20, 21, 1, 1, 0, 1), 1 << 13, 20)], ids=str)
def test_pointwise_convolutions(case, at_hand, cores, wide, monkeypatch):
  """As the test above: some columns at a time and all, with more cores than columns, and either way round."""
  monkeypatch.setattr(pointwise_cpu, "AT_HAND", at_hand)
  for module in (pointwise_cpu, kernel_cpu): monkeypatch.setattr(module, "parts_of", lambda products: cores)
  batch, cin, cout, height, width, *_ = case
  assert pointwise_cpu.pays(batch, height * width, cin, cout)
  x, w, bias, r, out, back = draw(case)
  kind, numbers = (monkeypatch, pointwise_cpu, cores, wide), height * width
  check_alone(out, 2e-5, *kind, lambda *rows: pointwise_cpu.correlate("conv", *rows, batch, cin, cout, numbers), x, w, bias)
  check_alone(back(r)[0], 2e-5, *kind, lambda *rows: pointwise_cpu.correlate(
    "conv_input_gradient", *rows, None, batch, cout, cin, numbers, turned=True), r, w)


@pytest.mark.parametrize("case", [CASES[3], WINOGRAD[3], PIECES[1], POINTWISE, DEPTHWISE[2]], ids=str)
def test_two_devices_share_the_pictures(case):
  """Each by the same kernels; a gradient that is the same number everywhere has no parts yet."""
  case = (2 * case[0], *case[1:])
  *_, stride, padding, groups = case
  x, w, bias, r, out, back = draw(case)
  names = ("CPU", "CPU:1")
  tensors = [Tensor(a).shard(names, axis) for a, axis in ((x, 0), (w, None), (bias, None))]
  assert kernel_cpu.fits(*tensors)
  ours = conv2d(*tensors, stride, padding, groups)
  weighted = (ours * Tensor(r).shard(names, 0)).sum().gradient(*tensors)
  Tensor.realize(*(found := [ours, *weighted, *ours.sum().gradient(*tensors)]))
  for a, expected in zip(found, [out, *back(r), *back(np.ones_like(r))], strict=True):
    np.testing.assert_allclose(a.numpy(), expected, rtol=1e-5, atol=1e-5 * expected.std() + 2e-6)


def test_tinygrads_own_convolution_gives_the_same():
  case = CASES[3]
  *_, stride, padding, groups = case
  x, w, bias, r, out, back = draw(case)
  tensors = [Tensor(a) for a in (x, w, bias)]
  theirs = tensors[0].conv2d(tensors[1], tensors[2], groups, stride, padding=padding)
  Tensor.realize(*(found := [theirs, *(theirs * Tensor(r)).sum().gradient(*tensors)]))
  for a, expected in zip(found, [out, *back(r)]): np.testing.assert_allclose(a.numpy(), expected, rtol=1e-6, atol=2e-5)


def test_the_oracle_against_finite_differences():
  case = CASES[4]
  *_, stride, padding, groups = case
  x, w, bias, r, _, back = draw(case)
  def loss(x, w): return (oracle(x, w, bias, stride, padding, groups)[0] * r).sum()
  gx, gw, _ = back(r)
  for index in [(0, 0, 0, 0), (0, 1, 12, 11), (0, 2, 6, 5), (0, 0, 3, 11)]:
    step = np.zeros(x.shape)
    step[index] = 1e-3
    assert (loss(x + step, w) - loss(x - step, w)) / 2e-3 == pytest.approx(gx[index], abs=1e-8)
  for index in [(0, 0, 0, 0), (3, 2, 6, 6), (1, 1, 3, 4)]:
    step = np.zeros(w.shape)
    step[index] = 1e-3
    assert (loss(x, w + step) - loss(x, w - step)) / 2e-3 == pytest.approx(gw[index], abs=1e-8)


def test_bfloat16():
  case = CASES[3]
  *_, stride, padding, groups = case
  x, w, bias, r, out, back = draw(case)
  tensors = [Tensor(a).cast(dtypes.bfloat16) for a in (x, w, bias)]
  y = conv2d(*tensors, stride, padding, groups)
  found = [y, *(y * Tensor(r).cast(dtypes.bfloat16)).sum().gradient(*tensors)]
  assert all(t.dtype == dtypes.bfloat16 for t in found)
  for a, expected in zip(found, [out, *back(r)]):
    a = a.float().numpy()
    assert np.isfinite(a).all() and abs(a - expected).max() < 0.02 * abs(expected).max()


def test_convolutions_of_equal_shape_in_one_graph():
  """Each keeps its own numbers, forward and back, and takes the weights of the moment each time the captured graph runs."""
  case, rng = (1, 16, 16, 4, 6, 3, 1, 1, 1), np.random.default_rng(0)
  x, *weights = (Tensor(rng.standard_normal(shape).astype(np.float32) * 0.1).realize() for shape in ((1, 16, 4, 6), *[(16, 16, 3, 3)] * 3))

  @jit
  def step(x):
    y = x
    for w in weights: y = conv2d(y, w, None, 1, 1)
    gradients = y.square().sum().gradient(*weights)
    Tensor.realize(y, *(w.assign(w - 0.01 * g) for w, g in zip(weights, gradients)))
    return y

  expected = [w.numpy().astype(np.float64) for w in weights]
  for _ in range(3):
    y, backs = x.numpy().astype(np.float64), []
    for w in expected:
      y, back = oracle(y, w, np.zeros(16), *case[-3:])
      backs.append(back)
    np.testing.assert_allclose(step(x).numpy(), y, atol=1e-4 * abs(y).max())
    g = 2 * y
    for i in (2, 1, 0):
      g, gw, _ = backs[i](g)
      expected[i] = expected[i] - 0.01 * gw
    for w, e in zip(weights, expected): np.testing.assert_allclose(w.numpy(), e, atol=1e-5)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="flags of x86 processors")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx", "-D__AVX512F__=1"])
def test_processors_with_other_vectors(flag, monkeypatch):
  """The kernels choose vectors and tiles by what the processor has: here it has less, or says that it has more, of which clang makes two."""
  compiler = Device["CPU"].renderer.compiler
  assert isinstance(compiler, ClangCompiler)
  monkeypatch.setattr(compiler, "args", [*compiler.args, flag])
  monkeypatch.setattr(compiler, "cachekey", None)   # what is compiled so is not for others
  for module in (codegen, realize): monkeypatch.setattr(module, "to_program_cache", {})
  for case in (CASES[4], CASES[5], CASES[11], *WINOGRAD, PIECES[1], POINTWISE, *DEPTHWISE[:4:2]):
    *_, stride, padding, groups = case
    x, w, bias, r, out, back = draw(case)
    tensors = [Tensor(a) for a in (x, w, bias)]
    y = conv2d(*tensors, stride, padding, groups)
    with Context(PARALLEL=0): Tensor.realize(*(found := [y, *(y * Tensor(r)).sum().gradient(*tensors)]))   # in this process
    for a, expected in zip(found, [out, *back(r)]):
      np.testing.assert_allclose(a.numpy(), expected, rtol=1e-6, atol=1e-5 * expected.std() if case in WINOGRAD else 2e-5)


@pytest.mark.parametrize(("shape", "stride", "groups"), [((2, 6, 9, 13), 1, 1), ((1, 8, 12, 40), 2, 8), ((1, 3, 20, 5), 1, 3)])
def test_silu_inside_the_convolution(shape, stride, groups):
  """The same numbers and gradients as SiLU behind it, on the kernels in C and without; from where exp overflows to where it vanishes."""
  rng = np.random.default_rng(3)
  x = (rng.standard_normal(shape) * 40).astype(np.float32)
  weight = rng.standard_normal((shape[1], shape[1] // groups, 3, 3)).astype(np.float32)
  bias, upstream = rng.standard_normal(shape[1]).astype(np.float32), None
  results = []
  for inside in (True, False):
    tensors = [Tensor(a) for a in (x, weight, bias)]
    out = conv2d(*tensors, stride, 1, groups, silu=inside)
    if not inside: out = out * out.sigmoid()
    upstream = rng.standard_normal(out.shape).astype(np.float32) if upstream is None else upstream
    results.append([t.numpy() for t in (out, *(out * Tensor(upstream)).sum().gradient(*tensors))])
  for a, b in zip(*results): np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * abs(b).max())
  assert results[0][0].min() > -0.2785


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 2, 3, 4, 7, 8, 11)], ids=str)
def test_what_devices_other_than_processors_compute(case, monkeypatch):
  """Without the kernels in C: both gradients as convolutions, strides by phases."""
  monkeypatch.setattr(kernel_cpu, "fits", lambda x, weight: False)
  *_, stride, padding, groups = case
  x, w, bias, r, out, back = draw(case)
  tensors = [Tensor(a) for a in (x, w, bias)]
  ours = conv2d(*tensors, stride, padding, groups)
  Tensor.realize(*(found := [ours, *(ours * Tensor(r)).sum().gradient(*tensors)]))
  for a, expected in zip(found, [out, *back(r)], strict=True): np.testing.assert_allclose(a.numpy(), expected, rtol=1e-6, atol=2e-5)


def test_channels_that_make_an_odd_number_of_tiles(monkeypatch):
  """In half precision 83 channels are 11 tiles of 8: one more is computed and left out, of the output and of both gradients."""
  monkeypatch.setattr(kernel_cpu, "fits", lambda x, weight: False)
  case = (1, 3, 83, 5, 6, 3, 2, 1, 1)
  x, w, bias, r, out, back = draw(case)
  tensors = [Tensor(a).cast("half") for a in (x, w, bias)]
  assert conv._odd_tiles(*tensors[:2], 1) and not conv._odd_tiles(Tensor(x), Tensor(w), 1)
  ours = conv2d(*tensors, 2, 1)
  Tensor.realize(*(found := [ours, *(ours * Tensor(r).cast("half")).sum().gradient(*tensors)]))
  assert ours.shape == out.shape
  for a, expected in zip(found, [out, *back(r)], strict=True):
    np.testing.assert_allclose(a.numpy(), expected, rtol=1e-2, atol=1e-2 * abs(expected).max())


@pytest.mark.parametrize(("kernel", "stride", "padding", "size", "before"), [
  ((1, 7), 1, (0, 3), (5, 6), None), ((7, 1), 1, (3, 0), (8, 3), None),            # rows and columns, as Inception has them
  (3, 2, 0, (8, 9), 1), (3, 1, 0, (5, 6), 1), (11, 4, 2, (18, 23), 2), (2, 2, 0, (7, 6), 0), (4, 4, 0, (9, 10), 0)], ids=str)
def test_layers_of_two_sides_and_those_that_cover(kernel, stride, padding, size, before):
  """Against sums over taps in float64, of the picture in zeros; `before` None is the plain call, else what lies in front of a covered picture."""
  rng, layer = np.random.default_rng(7), Conv2d(2, 3, kernel, stride, padding)
  x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 2, *size), layer.weight.shape, (3,)))
  layer.weight, layer.bias = Tensor(w), Tensor(b)
  found = (layer(Tensor(x)) if before is None else layer.covering(Tensor(x))).numpy()
  front = padding if before is None else (before, before)
  rows, columns = (side if before is None else -(-side // stride) for side in size)
  canvas = np.zeros((2, 2, 60, 60))
  canvas[:, :, front[0]:front[0] + size[0], front[1]:front[1] + size[1]] = x
  expected = np.zeros((2, 3, rows, columns)) + b[:, None, None]
  for i, j in np.ndindex(w.shape[2:]):
    expected += np.einsum("bchw,oc->bohw", canvas[:, :, i:i + stride * rows:stride, j:j + stride * columns:stride], w[:, :, i, j].astype(np.float64))
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, atol=1e-5)
