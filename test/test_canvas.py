"""Levels on one picture: none touches another, and a convolution there is the convolution of each level."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinygrad import Tensor
from tinydet.detection.anchors import feature_sizes
from tinydet.nn import canvas


def sizes_of(height: int, width: int) -> list[tuple[int, int]]: return [tuple(size) for size in feature_sizes(height, width)]


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_levels_lie_apart(height, width):
  sizes = sizes_of(height, width)
  (rows, columns), corners = canvas.layout(sizes)
  taken = np.zeros((rows + 2, columns + 2), int)
  for (row, column), (h, w) in zip(corners, sizes):
    assert row >= 0 and column >= 0 and row + h <= rows and column + w <= columns
    assert not taken[row:row + h + 2, column:column + w + 2].any(), "a level touches another"
    taken[row + 1:row + h + 1, column + 1:column + w + 1] = 1


@pytest.mark.parametrize("size, waste", [((800, 800), 0.135), ((800, 1344), 0.135), ((1344, 800), 0.135), ((128, 128), 0.175), ((320, 320), 0.15)])
def test_little_is_wasted(size, waste):
  sizes = sizes_of(*size)
  (rows, columns), _ = canvas.layout(sizes)
  assert rows * columns <= (1 + waste) * sum(h * w for h, w in sizes)


@pytest.mark.parametrize("sizes", [sizes_of(128, 192), sizes_of(40, 24)])
def test_a_convolution_on_the_canvas_is_that_of_each_level(sizes):
  rng = np.random.default_rng(0)
  levels, weight = [rng.standard_normal((2, 3, *size)).astype(np.float32) for size in sizes], rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
  inputs = [Tensor(level) for level in levels]
  packed = canvas.pack(inputs)
  on_canvas = packed.conv2d(Tensor(weight), padding=1)
  for got, level in zip(canvas.unpack(on_canvas, sizes), levels):
    padded, (h, w) = np.pad(level.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1))), level.shape[2:]
    expected = sum(np.einsum("bihw,oi->bohw", padded[:, :, p:p + h, q:q + w], weight[:, :, p, q]) for p in range(3) for q in range(3))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)
  for got, level in zip(canvas.unpack(packed, sizes), levels): assert (got.numpy() == level).all()
  mask = canvas.mask(sizes, packed.device).numpy()
  assert mask.sum() == sum(h * w for h, w in sizes) and (packed.numpy() * (1 - mask) == 0).all()
