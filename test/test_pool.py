"""Max pooling with its own gradient: against a float64 loop over windows, and finite differences."""
from functools import partial
import numpy as np, pytest
from tinygrad import Tensor
from tinydet.nn.pool import max_pool, max_pool_2x2, max_pool_covering, mean_pool_half, mean_pool_same, mean_pool_to


def oracle(x, r):
  """Output, and the gradient of `r` times it."""
  padded, gradient = (np.pad(a, ((0, 0), (0, 0), (1, 2), (1, 2)), constant_values=v) for a, v in ((x.astype(np.float64), -np.inf), (0.0 * x, 0)))
  out = np.zeros(r.shape)
  for b, c, i, j in np.ndindex(r.shape):
    at = b, c, slice(2 * i, 2 * i + 3), slice(2 * j, 2 * j + 3)
    out[b, c, i, j] = padded[at].max()
    largest = padded[at] == padded[at].max()
    gradient[at] += r[b, c, i, j] * largest / largest.sum()
  return out, gradient[:, :, 1:1 + x.shape[2], 1:1 + x.shape[3]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [(8, 6), (7, 6), (5, 9), (1, 2)], ids=str)
def test_output_and_gradient(size, ties):
  rng = np.random.default_rng(0)
  x = (rng.integers(-2, 3, (2, 3, *size)) if ties else rng.standard_normal((2, 3, *size))).astype(np.float32)
  r = rng.standard_normal((2, 3, (size[0] + 1) // 2, (size[1] + 1) // 2)).astype(np.float32)
  tensor = Tensor(x)
  y = max_pool(tensor)
  gradient, = (y * Tensor(r)).sum().gradient(tensor)
  Tensor.realize(y, gradient)
  for found, expected in zip((y, gradient), oracle(x, r)): np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_the_oracle_against_finite_differences():
  rng = np.random.default_rng(1)
  x, r = rng.standard_normal((1, 2, 5, 6)), rng.standard_normal((1, 2, 3, 3))
  _, gradient = oracle(x, r)
  for index in np.ndindex(x.shape):
    step = np.zeros(x.shape)
    step[index] = 1e-5
    numeric = ((oracle(x + step, r)[0] - oracle(x - step, r)[0]) * r).sum() / 2e-5
    assert numeric == pytest.approx(gradient[index], abs=1e-8)


def windows_of(x, kernel, stride, rows, columns, before, fill):
  """Each window's numbers [B,C,rows,columns,kernel,kernel] of x in float64, `before` pixels of `fill` in front and as many as it takes behind."""
  padded = np.full((*x.shape[:2], before + rows * stride + kernel + x.shape[2], before + columns * stride + kernel + x.shape[3]), fill, np.float64)
  padded[:, :, before:before + x.shape[2], before:before + x.shape[3]] = x
  return np.stack([np.stack([padded[:, :, i * stride:i * stride + kernel, j * stride:j * stride + kernel] for j in range(columns)], 2)
                   for i in range(rows)], 2)


@pytest.mark.parametrize("size", [(9, 6), (8, 7), (3, 4)], ids=str)
@pytest.mark.parametrize("kind", ["floor", "ceil", "cover"])
def test_max_pool_from_the_first_pixel(kind, size):
  """Outputs are numpy's, and the gradient that of central differences in float64; ties do not occur."""
  rng = np.random.default_rng(3)
  x = rng.permutation(2 * 3 * size[0] * size[1]).reshape(2, 3, *size).astype(np.float32)
  rows, columns = ((side + 1) // 2 if kind == "cover" else (side - 1 + (kind == "ceil")) // 2 for side in size)
  def expected(x): return windows_of(x, 3, 2, rows, columns, 0, -np.inf).max((4, 5))
  r = rng.standard_normal((2, 3, rows, columns)).astype(np.float32)
  tensor = Tensor(x)
  y = max_pool_covering(tensor) if kind == "cover" else max_pool(tensor, padding=0, ceil=kind == "ceil")
  gradient, = (y * Tensor(r)).sum().gradient(tensor)
  Tensor.realize(y, gradient)
  np.testing.assert_array_equal(y.numpy(), expected(x))
  numeric = np.zeros(x.shape)
  for at in np.ndindex(x.shape):
    step = np.zeros(x.shape)
    step[at] = 0.25
    numeric[at] = ((expected(x + step) - expected(x - step)) * r).sum() / 0.5
  np.testing.assert_allclose(gradient.numpy(), numeric, atol=1e-5)


def test_means_are_torchs():
  x = np.random.default_rng(4).standard_normal((2, 3, 7, 9)).astype(np.float32)
  def close(found, expected): np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
  close(mean_pool_half(Tensor(x)), windows_of(x, 2, 2, 3, 4, 0, 0).mean((4, 5)))
  close(mean_pool_half(Tensor(x), ceil=True), np.nanmean(windows_of(x, 2, 2, 4, 5, 0, np.nan), (4, 5)))
  close(mean_pool_same(Tensor(x)), windows_of(x, 3, 1, 7, 9, 1, 0).mean((4, 5)))
  for size in (1, 2, 4, 7, 11):   # of torch's adaptive pools
    def ends(i, side, size=size): return slice(i * side // size, -(-(i + 1) * side // size))
    rows = [np.stack([x[:, :, ends(i, 7), ends(j, 9)].mean((2, 3), dtype=np.float64) for j in range(size)], -1) for i in range(size)]
    close(mean_pool_to(Tensor(x), size), np.stack(rows, -2))


@pytest.mark.parametrize("pool", [mean_pool_half, partial(mean_pool_half, ceil=True), mean_pool_same, partial(mean_pool_to, size=4),
                                  partial(mean_pool_to, size=11)], ids=["floor", "ceil", "same", "to less", "to more"])
def test_a_means_gradient_is_its_transpose(pool):
  rng = np.random.default_rng(5)   # of a linear map A: (A^T r) . v = r . (A v), for any r and v
  x, v = (Tensor(rng.standard_normal((2, 3, 7, 9)).astype(np.float32)) for _ in range(2))
  r = rng.standard_normal((out := pool(x)).shape).astype(np.float32)
  back = (out * Tensor(r)).sum().gradient(x)[0].numpy().astype(np.float64)
  np.testing.assert_allclose((back * v.numpy()).sum(), (r.astype(np.float64) * pool(v).numpy()).sum(), rtol=1e-5)


@pytest.mark.parametrize("ceil", [False, True])
def test_max_of_2x2_of_odd_sides(ceil):
  x = np.random.default_rng(5).standard_normal((1, 2, 5, 7)).astype(np.float32)
  expected = windows_of(x, 2, 2, 2 + ceil, 3 + ceil, 0, -np.inf).max((4, 5))
  np.testing.assert_array_equal(max_pool_2x2(Tensor(x), ceil=ceil).numpy(), expected.astype(np.float32))
