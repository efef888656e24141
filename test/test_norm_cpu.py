"""Batch norm with an activation and the optimiser's update, in C: against float64 numpy and against tinygrad's own kernels."""
import numpy as np, pytest
from tinygrad import Context, Tensor
from tinydet.nn import kernel_cpu, layers, norm_cpu
from tinydet.training import optim

# numbers of a picture's channel that vectors of 1 to 16 divide, overlap, or are too long for
CASES = [((1, 1), "silu"), ((1, 3), ""), ((3, 5), "silu"), ((4, 4), "relu"), ((7, 19), "silu")]
ACT = {"": (lambda z: z, np.ones_like), "relu": (lambda z: z.clip(0), lambda z: (z > 0) * 1.0),
       "silu": (lambda z: z / (1 + np.exp(-z)), lambda z: (s := 1 / (1 + np.exp(-z))) * (1 + z * (1 - s)))}


@pytest.mark.parametrize(("side", "activation"), CASES)
def test_batch_norm_of_any_size(side, activation):
  rng = np.random.default_rng(side)
  shape = (3, 5, *side)
  x = (rng.standard_normal(shape) * 3 + np.array([0, 100, -30, 1, 5])[:, None, None]).astype(np.float32)
  weight, bias, above = (v.astype(np.float32) for v in (rng.uniform(-2, 2, 5), rng.standard_normal(5), rng.standard_normal(shape)))
  tensors = [Tensor(t) for t in (x, weight, bias)]
  assert kernel_cpu.fits(*tensors)
  out, mean, variance = norm_cpu.batch_norm(*tensors, 1e-3, activation)
  gradients = (out * Tensor(above)).sum().gradient(*tensors)
  Tensor.realize(out, mean, variance, *gradients)
  x, w, b = x.astype(np.float64), weight.astype(np.float64)[:, None, None], bias.astype(np.float64)[:, None, None]
  np.testing.assert_allclose(mean.numpy(), x.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(variance.numpy(), x.var((0, 2, 3)), rtol=1e-5)
  inverse = 1 / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-3)
  normal = (x - x.mean((0, 2, 3), keepdims=True)) * inverse
  act, slope = ACT[activation]
  d = above * slope(normal * w + b)
  np.testing.assert_allclose(out.numpy(), act(normal * w + b), atol=1e-4)
  back = w * inverse * (d - d.mean((0, 2, 3), keepdims=True) - normal * (d * normal).mean((0, 2, 3), keepdims=True))
  for found, expected in zip(gradients, (back, (d * normal).sum((0, 2, 3)), d.sum((0, 2, 3)))):
    np.testing.assert_allclose(found.numpy(), expected, atol=5e-4)


def test_wild_numbers_leave_what_is_stored():
  norm = layers.BatchNorm(3)
  for key, values in {"weight": [1, 1, 1], "bias": [0, 0, 0], "running_mean": [1, 2, 3], "running_var": [4, 5, 6]}.items():
    getattr(norm, key).assign(Tensor(np.float32(values))).realize()
  norm.num_batches_tracked = Tensor(np.array(4))
  x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
  x[0, 1, 2, 2], x[1, 2, 0, 0] = np.inf, 1e30   # a mean, and a variance, that is not finite
  with Context(TRAINING=1): Tensor.realize(norm(Tensor(x), "silu"), norm.running_mean, norm.running_var, norm.num_batches_tracked)
  mean, var = norm.running_mean.numpy(), norm.running_var.numpy()
  assert mean[1] == 2 and var[1] == 5 and var[2] == 6 and norm.num_batches_tracked.item() == 5
  assert mean[0] == pytest.approx(0.9 + 0.1 * x[:, 0].mean(), rel=1e-5) and var[0] == pytest.approx(3.6 + 0.1 * x[:, 0].var(ddof=1), rel=1e-5)


@pytest.mark.parametrize("options", [
  {"kind": "sgd", "nesterov": True, "momentum": optim.ramp(0.5, 0.9, 3), "bias_rate": optim.schedule("constant", 0.3, 9)},
  pytest.param({"kind": "sgd", "clip_norm": 0.5, "gain": 4.0}, marks=pytest.mark.by_hand),
  pytest.param({"kind": "adam", "loss_scale": 8.0}, marks=pytest.mark.by_hand),
  {"kind": "adamw", "ema_decay": 0.9, "ema_tau": 3.0, "clip_norm": 1.0}])
def test_an_update_in_c_is_tinygrads_own(options, monkeypatch):
  """Thirteen tensors, of which kernels take twelve to twenty; the second update is of a gradient that is not finite."""
  rng = np.random.default_rng(1)
  shapes = {f"{i}.{'bias' if i % 3 == 0 else 'weight'}": ((7,), (5, 3, 2), (64, 3, 11))[i % 3] for i in range(13)}
  values = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
  steps = [[rng.standard_normal(shape).astype(np.float32) for shape in shapes.values()] for _ in range(2)]
  steps[1][4][0, 0, 0] = np.nan
  found = []
  for in_c in (True, False):
    monkeypatch.setattr(optim, "fits", lambda *tensors, in_c=in_c: in_c)
    params = {key: Tensor(value).realize() for key, value in values.items()}
    optimizer = optim.Optimizer(params, options["kind"], optim.schedule("cosine", 0.1, 10), weight_decay=0.05, norm_weight_decay=0.01,
                                **{key: value for key, value in options.items() if key != "kind"})
    skipped = []
    for gradients in steps:
      changed, logs = optimizer.update([Tensor(g).realize() for g in gradients])
      Tensor.realize(*changed, logs["skipped"])
      skipped.append(logs["skipped"].item())
    assert skipped == [0, 1]
    found.append({key: t.numpy() for key, t in (params | optimizer.state()).items()})
  assert found[0].keys() == found[1].keys() and len(found[0]) > 26
  for key, value in found[0].items(): np.testing.assert_allclose(value, found[1][key], rtol=2e-5, atol=2e-6, err_msg=key)
  assert all(np.abs(found[0][key] - values[key]).max() > 1e-3 for key in values)
