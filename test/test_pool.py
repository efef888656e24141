"""Max pooling with its own gradient: against a float64 loop over windows, and finite differences."""
import numpy as np, pytest
from tinygrad import Tensor
from tinydet.nn.pool import max_pool


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
