"""Layers against float64 numpy, and what a seed promises about first values."""
import gc, math, weakref, zlib
import numpy as np, pytest
from tinygrad import Context, Device, GlobalCounters, Tensor, dtypes
from tinygrad.nn.state import get_state_dict
from tinygrad.uop.ops import Ops
from tinydet.nn import init, layers
from tinydet.nn.conv import conv2d
from tinydet.nn.layers import NORMS, BatchNorm, Conv2d, FrozenBatchNorm, GroupNorm, LayerNorm, Linear
from tinydet.nn.pool import max_pool, max_pool_same

SHAPE = (3, 8, 5, 4)
RNG = np.random.default_rng(0)
X = (RNG.standard_normal(SHAPE) * np.linspace(0.5, 2, 8)[:, None, None] + np.linspace(-30, 30, 8)[:, None, None]).astype(np.float32)
R = RNG.standard_normal(SHAPE).astype(np.float32)   # the gradient that comes from above
VALUES = {"weight": RNG.uniform(0.5, 1.5, 8), "bias": RNG.standard_normal(8), "running_mean": RNG.standard_normal(8),
          "running_var": RNG.uniform(0.5, 2, 8)}


def made(norm):
  for key, t in get_state_dict(norm).items(): init.set_values(t, np.array(7) if key == "num_batches_tracked" else VALUES[key])
  return norm


def applied(norm, training, dtype=dtypes.float32):
  """Output, gradients of input and of what is learnt, and everything stored, after one call."""
  x = Tensor(X).cast(dtype)
  state = get_state_dict(norm)
  targets = {"x": x} | {key: t for key, t in state.items() if t.is_param}
  with Context(TRAINING=training):
    y = norm(x)
    gradients = dict(zip(targets, (y * Tensor(R)).sum().gradient(*targets.values())))
    Tensor.realize(y, *gradients.values(), *state.values())
  return y.numpy(), {key: g.numpy() for key, g in gradients.items()}, {key: t.numpy() for key, t in state.items()}


def channel(a): return np.asarray(a, np.float64)[:, None, None]


def normalised(x, axes, eps=1e-5):
  """(x less its mean) over its deviation, in float64, and the function that carries a gradient back through it."""
  inverse = 1 / np.sqrt(x.var(axes, keepdims=True) + eps)
  normal = (x - x.mean(axes, keepdims=True)) * inverse
  return normal, lambda g: inverse * (g - g.mean(axes, keepdims=True) - normal * (g * normal).mean(axes, keepdims=True))


@pytest.mark.parametrize("training", [0, 1])
def test_frozen_batch_norm_uses_stored_statistics_and_keeps_them(training):
  y, gradients, state = applied(made(FrozenBatchNorm(8)), training)
  scale = VALUES["weight"] / np.sqrt(VALUES["running_var"] + 1e-5)
  np.testing.assert_allclose(y, X * channel(scale) + channel(VALUES["bias"] - VALUES["running_mean"] * scale), atol=1e-5)
  assert gradients.keys() == {"x"}, "nothing in it is learnt"
  np.testing.assert_allclose(gradients["x"], R * channel(scale), atol=1e-5)
  for key, value in state.items(): np.testing.assert_array_equal(value, VALUES[key].astype(np.float32))


@pytest.mark.parametrize("kind", ["frozen", "batch"])
def test_a_norm_on_stored_statistics_is_one_multiply_add(kind):
  norm, x = made(NORMS[kind](8)), Tensor.empty(8, 8, 16, 16).realize()
  GlobalCounters.reset()
  norm(x).realize()
  assert GlobalCounters.global_ops <= 2 * x.numel() + 100 * 8


def test_batch_norm_in_evaluation():
  y, gradients, state = applied(made(BatchNorm(8)), training=0)
  scale = VALUES["weight"] / np.sqrt(VALUES["running_var"] + 1e-5)
  normal = (X - channel(VALUES["running_mean"])) / channel(np.sqrt(VALUES["running_var"] + 1e-5))
  np.testing.assert_allclose(y, normal * channel(VALUES["weight"]) + channel(VALUES["bias"]), atol=1e-4)
  np.testing.assert_allclose(gradients["x"], R * channel(scale), atol=1e-5)
  np.testing.assert_allclose(gradients["weight"], (R * normal).sum((0, 2, 3)), rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(gradients["bias"], R.sum((0, 2, 3)), atol=1e-4)
  assert state["num_batches_tracked"] == 7
  for key, value in VALUES.items(): np.testing.assert_array_equal(state[key], value.astype(np.float32))


def test_batch_norm_in_training():
  y, gradients, state = applied(made(BatchNorm(8)), training=1)
  normal, back = normalised(X.astype(np.float64), (0, 2, 3))
  np.testing.assert_allclose(y, normal * channel(VALUES["weight"]) + channel(VALUES["bias"]), atol=1e-4)
  np.testing.assert_allclose(gradients["x"], back(R * channel(VALUES["weight"])), atol=1e-4)
  np.testing.assert_allclose(gradients["weight"], (R * normal).sum((0, 2, 3)), atol=1e-3)
  np.testing.assert_allclose(gradients["bias"], R.sum((0, 2, 3)), atol=1e-4)
  mean, variance = X.mean((0, 2, 3), dtype=np.float64), X.var((0, 2, 3), dtype=np.float64, ddof=1)   # torch keeps the unbiased variance
  np.testing.assert_allclose(state["running_mean"], 0.9 * VALUES["running_mean"] + 0.1 * mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state["running_var"], 0.9 * VALUES["running_var"] + 0.1 * variance, rtol=1e-5)
  assert state["num_batches_tracked"] == 8
  for key in ("weight", "bias"): np.testing.assert_array_equal(state[key], VALUES[key].astype(np.float32))


def test_group_norm():
  norm = GroupNorm(4, 8)
  y, gradients, state = applied(made(norm), training=1)
  normal, back = normalised(X.astype(np.float64).reshape(3, 4, -1), -1)
  normal = normal.reshape(SHAPE)
  np.testing.assert_allclose(y, normal * channel(VALUES["weight"]) + channel(VALUES["bias"]), atol=1e-4)
  np.testing.assert_allclose(gradients["x"], back((R * channel(VALUES["weight"])).reshape(3, 4, -1)).reshape(SHAPE), atol=1e-4)
  np.testing.assert_allclose(gradients["weight"], (R * normal).sum((0, 2, 3)), atol=1e-3)
  np.testing.assert_allclose(gradients["bias"], R.sum((0, 2, 3)), atol=1e-4)
  assert state.keys() == {"weight", "bias"} == gradients.keys() - {"x"}
  assert [NORMS["group"](channels).groups for channels in (16, 64, 128, 256, 2048)] == [4, 16, 32, 32, 32]


def test_layer_norm_is_over_each_pixels_channels():
  y, gradients, _ = applied(made(LayerNorm(8, eps=1e-6)), 1)
  normal, back = normalised(X.astype(np.float64), 1, 1e-6)
  np.testing.assert_allclose(y, normal * channel(VALUES["weight"]) + channel(VALUES["bias"]), atol=1e-4)
  np.testing.assert_allclose(gradients["x"], back(R * channel(VALUES["weight"]).astype(np.float64)), atol=1e-5)
  np.testing.assert_allclose(gradients["weight"], (R * normal).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(gradients["bias"], R.astype(np.float64).sum((0, 2, 3)), rtol=1e-4, atol=1e-5)


def _gelu(x): return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize(("name", "formula"), [
  ("relu6", lambda x: x.clip(0, 6)), ("hard_sigmoid", lambda x: (x / 6 + 0.5).clip(0, 1)), ("hard_swish", lambda x: x * (x / 6 + 0.5).clip(0, 1)),
  ("gelu", _gelu), ("silu", lambda x: x / (1 + np.exp(-x))), ("mish", lambda x: x * np.tanh(np.log1p(np.exp(x))))])
def test_activations_and_their_slopes(name, formula):
  # far out, near 0, and on both sides of each corner, none nearer than the difference's step
  x = np.concatenate([np.linspace(-80, 80, 23), np.linspace(-7, 7, 57) + 0.01]).astype(np.float32)
  given, step = Tensor(x), 1e-5
  y = getattr(layers, name)(given)
  slope = y.sum().gradient(given)[0]
  wide = x.astype(np.float64)
  np.testing.assert_allclose(y.numpy(), formula(wide), rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(slope.numpy(), (formula(wide + step) - formula(wide - step)) / (2 * step), atol=1e-5)


def test_linear_and_the_type_of_what_is_given():
  linear, conv = Linear(5, 3), Conv2d(2, 4, 3, 2, 1)
  rng = np.random.default_rng(1)
  for layer in (linear, conv): init.initialize(layer, lambda key, shape: init.normal(1.0))
  x = rng.standard_normal((2, 5)).astype(np.float32)
  state = {key: t.numpy().astype(np.float64) for key, t in get_state_dict(linear).items()}
  np.testing.assert_allclose(linear(Tensor(x)).numpy(), x @ state["weight"].T + state["bias"], atol=1e-5)
  half = Tensor.empty(1, 2, 5, 5, dtype=dtypes.bfloat16)
  assert linear(Tensor.empty(2, 5, dtype=dtypes.bfloat16)).dtype == conv(half).dtype == dtypes.bfloat16 and conv(half).shape == (1, 4, 3, 3)
  assert all(norm(2 if kind != "group" else 4)(Tensor.empty(1, 2 if kind != "group" else 4, 3, 3, dtype=dtypes.bfloat16)).dtype == dtypes.bfloat16
             for kind, norm in NORMS.items())
  assert conv.weight.dtype == linear.bias.dtype == dtypes.float32


class Small:
  def __init__(self): self.first, self.second = Conv2d(3, 4, 3), Conv2d(3, 4, 3)


class Larger(Small):
  def __init__(self):
    self.before = Conv2d(5, 5, 1)
    super().__init__()
    self.after = Linear(2, 2)


def values(model, seed=0):
  init.initialize(model, lambda key, shape: init.normal(0.5) if len(shape) > 1 else init.constant(0.25), seed)
  return {key: t.numpy() for key, t in get_state_dict(model).items()}


def test_weights_are_what_one_generator_a_tensor_draws_whoever_draws_it():
  names, found = [f"{layer}.{part}" for layer in ("first", "second") for part in ("weight", "bias")], values(Small(), seed=3)
  assert list(found) == names
  for name in names:
    rng = np.random.default_rng((3, zlib.crc32(name.encode())))
    expected = rng.standard_normal((4, 3, 3, 3)) * 0.5 if name.endswith("weight") else np.full(4, 0.25)
    np.testing.assert_array_equal(found[name], expected.astype(np.float32))


def test_a_few_are_drawn_ahead():
  """In order, and no more at a time than a few; what one of them raises comes out."""
  begun = []
  ahead = init._ahead(lambda i: begun.append(i) or 100 // (7 - i), range(50))
  found = [next(ahead) for _ in range(4)]
  assert found == [14, 16, 20, 25] and len(begun) <= 4 + 2 * init.THREADS + 1
  with pytest.raises(ZeroDivisionError): list(ahead)
  assert list(init._ahead(str, range(20))) == list(map(str, range(20))) and list(init._ahead(str, [])) == []


@pytest.mark.parametrize("layer", [
  lambda x: conv2d(x, Tensor.ones(4, 4, 3, 3), Tensor.zeros(4), stride=2, padding=1, silu=True), max_pool, lambda x: max_pool_same(x, 5),
  lambda x: BatchNorm(4)(x, "silu")], ids=["conv2d", "max_pool", "max_pool_same", "BatchNorm"])
def test_what_is_dropped_is_gone(layer):
  """tinygrad keeps a function as long as what its gradient refers to: if that comes from the function, for ever."""
  with Context(TRAINING=1):
    x = Tensor.ones(2, 4, 8, 8).contiguous()
    out = layer(x)
    gradient, = out.square().sum().gradient(x)
  watched = [weakref.ref(u) for u in gradient.uop.toposort() if u.op is Ops.FUNCTION]
  del out, gradient, x
  gc.collect()
  if not watched and Device.DEFAULT != "CPU": pytest.skip("it is no function on this device")
  assert watched and not any(ref() for ref in watched)


def test_first_values_belong_to_seed_and_key():
  small, again, larger, other = values(Small()), values(Small()), values(Larger()), values(Small(), seed=1)
  assert len(larger) == len(small) + 4
  for key in small:
    np.testing.assert_array_equal(small[key], again[key])
    np.testing.assert_array_equal(small[key], larger[key])
  assert (small["first.weight"] != small["second.weight"]).all() and (small["first.weight"] != other["first.weight"]).all()
  assert (small["first.bias"] == 0.25).all()


def test_draws():
  shape = (128, 64, 3, 3)
  w = init.kaiming_normal_fan_out(np.random.default_rng(0), shape)
  assert w.std() == pytest.approx(np.sqrt(2 / (128 * 9)), rel=0.01) and abs(w.mean()) < 1e-3 and abs(w).max() > 3.5 * w.std()
  for draw, bound in ((init.kaiming_uniform, np.sqrt(3 / (64 * 9))), (init.uniform(0.3), 0.3)):
    w = draw(np.random.default_rng(0), shape)
    assert 0.999 * bound < abs(w).max() <= bound and w.std() == pytest.approx(bound / np.sqrt(3), rel=0.01) and abs(w.mean()) < 0.01 * bound
  assert init.normal(0.01)(np.random.default_rng(0), shape).std() == pytest.approx(0.01, rel=0.01)


def test_assign_keeps_what_a_tensor_is():
  learnt, fixed, whole = Tensor.empty(2, 2), Tensor.empty(2).is_param_(False), Tensor.empty(dtype=dtypes.int64).is_param_(False)
  init.set_values(learnt, np.arange(4.0).reshape(2, 2).T)
  init.set_values(fixed, np.array([1, 2]))
  init.set_values(whole, np.array(3))
  assert (learnt.is_param, fixed.is_param, whole.is_param) == (Tensor.empty(1).is_param, False, False)
  assert (learnt.dtype, fixed.dtype, whole.dtype) == (dtypes.float32, dtypes.float32, dtypes.int64)
  assert learnt.tolist() == [[0, 2], [1, 3]] and fixed.tolist() == [1, 2] and whole.item() == 3
