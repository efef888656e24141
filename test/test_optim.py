"""Optimisers, clipping, moving average and schedules against torch's rules in float64 numpy."""
import math
import numpy as np, pytest
from tinygrad import Tensor
from tinydet.errors import UserError
from tinydet.runtime.graphs import jit
from tinydet.training.optim import Optimizer, ramp, schedule, total_norm
from tinydet.training.trainer import TrainerConfig, make_optimizer, settle_batch

SHAPES, UPDATES, LR = {"weight": (3, 4), "bias": (4,)}, 5, 0.05
RNG = np.random.default_rng(0)
START = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
# of very different sizes, so that clipping cuts some and not others
GRADIENTS = [{name: (RNG.standard_normal(shape) * size).astype(np.float32) for name, shape in SHAPES.items()} for size in (1, 0.1, 5, 0.01, 1)]


def torchs(kind, rates, decay, clip_norm=0.0, ema_decay=0.0, momentum=0.9, betas=(0.9, 0.999), eps=1e-8):
  """Weights and their average after each update: torch.optim's documented algorithms, `clip_grad_norm_`, and an average that starts short."""
  p, first = {k: v.astype(np.float64) for k, v in START.items()}, dict.fromkeys(SHAPES, 0.0)
  second, average, history = dict.fromkeys(SHAPES, 0.0), dict(p), []
  for t, (gradients, lr) in enumerate(zip(GRADIENTS, rates), 1):
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    scale = min(1, clip_norm / (norm + 1e-6)) if clip_norm else 1
    for k in SHAPES:
      g = gradients[k].astype(np.float64) * scale
      if kind != "adamw": g = g + decay[k] * p[k]
      if kind == "sgd":
        first[k] = g if t == 1 else momentum * first[k] + g
        p[k] = p[k] - lr * first[k]
      else:
        if kind == "adamw": p[k] = p[k] * (1 - lr * decay[k])
        first[k], second[k] = betas[0] * first[k] + (1 - betas[0]) * g, betas[1] * second[k] + (1 - betas[1]) * g * g
        p[k] = p[k] - lr / (1 - betas[0] ** t) * first[k] / (np.sqrt(second[k] / (1 - betas[1] ** t)) + eps)
      d = min(ema_decay, t / (t + 9))
      average[k] = d * average[k] + (1 - d) * p[k]
    history.append((dict(p), dict(average), norm))
  return history


def run(optimizer):
  """Feed GRADIENTS to a captured update; yields the logged scalars after each."""
  Tensor.realize(*optimizer.params.values(), *optimizer.state().values())

  @jit
  def update(*gradients):
    changed, logs = optimizer.update(list(gradients))
    Tensor.realize(*changed, *(out := [log.contiguous() for log in logs.values()]))
    return dict(zip(logs, out))

  for gradients in GRADIENTS: yield {name: t.item() for name, t in update(*(Tensor(g).realize() for g in gradients.values())).items()}


@pytest.mark.parametrize(("kind", "weight_decay", "norm_weight_decay", "clip_norm", "ema_decay"), [
  ("sgd", 0.1, 0.0, 0.0, 0.0), ("sgd", 0.1, 0.2, 2.0, 0.15), ("adam", 0.1, 0.0, 0.0, 0.0), ("adamw", 0.3, 0.1, 2.0, 0.9)])
def test_updates(kind, weight_decay, norm_weight_decay, clip_norm, ema_decay):
  params = {name: Tensor(value.copy()).realize() for name, value in START.items()}
  optimizer = Optimizer(params, kind, schedule("cosine", LR, 8, warmup_steps=2, warmup_factor=0.25), weight_decay=weight_decay,
                        norm_weight_decay=norm_weight_decay, clip_norm=clip_norm, ema_decay=ema_decay)
  rates = [LR * 0.5 * (1 + math.cos(math.pi * n / 8)) * min(1, 0.25 + 0.75 * n / 2) for n in range(UPDATES)]
  expected = torchs(kind, rates, {"weight": weight_decay, "bias": norm_weight_decay}, clip_norm, ema_decay)
  for n, (logs, (weights, average, norm)) in enumerate(zip(run(optimizer), expected, strict=True)):
    assert logs["lr"] == pytest.approx(rates[n], rel=1e-5)
    assert logs.keys() == {"lr", "gradient_norm", "skipped"} and logs["skipped"] == 0
    assert logs["gradient_norm"] == pytest.approx(norm, rel=1e-5), "the norm before clipping"
    for name in SHAPES:
      np.testing.assert_allclose(params[name].numpy(), weights[name], atol=1e-5)
      if ema_decay: np.testing.assert_allclose(optimizer.ema[name].numpy(), average[name], atol=1e-5)
  assert optimizer.steps.item() == UPDATES
  assert optimizer.state().keys() == {"steps", "first.weight", "first.bias"} | ({"second.weight", "second.bias"} if kind != "sgd" else set()) | (
    {"ema.weight", "ema.bias"} if ema_decay else set())


def test_nesterov_warm_up_of_momentum_and_biases_gain_and_tau():
  """torch's Nesterov in float64, with YOLOv5's warm-up: the kernels' rate from 0, the biases' from above, momentum from below, gradients times 2."""
  params = {name: Tensor(value.copy()).realize() for name, value in START.items()}
  rate, bias_rate = (schedule("linear", LR, 8, warmup_steps=3, last=0.1, first=first) for first in (0.0, 0.3))
  optimizer = Optimizer(params, "sgd", rate, momentum=ramp(0.5, 0.9, 3), weight_decay=0.1, nesterov=True, bias_rate=bias_rate, ema_decay=0.99,
                        ema_tau=4, gain=2.0, clip_norm=3.0)
  p, first = {k: v.astype(np.float64) for k, v in START.items()}, dict.fromkeys(SHAPES, 0.0)
  average = dict(p)
  for n, logs in enumerate(run(optimizer)):
    target, warm = LR * (0.1 + 0.9 * (1 - n / 8)), min(n / 3, 1)
    rates = {"weight": target * warm, "bias": 0.3 + (target - 0.3) * warm}
    m, norm = 0.5 + 0.4 * warm, 2 * math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in GRADIENTS[n].values()))
    assert logs["lr"] == pytest.approx(rates["weight"], rel=1e-5, abs=1e-9) and logs["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    for k in SHAPES:
      g = 2 * GRADIENTS[n][k].astype(np.float64) * min(1, 3 / (norm + 1e-6)) + (0.1 * p[k] if k == "weight" else 0)
      first[k] = m * first[k] + g
      p[k] = p[k] - rates[k] * (g + m * first[k])
      decay = 0.99 * (1 - math.exp(-(n + 1) / 4))
      average[k] = decay * average[k] + (1 - decay) * p[k]
      np.testing.assert_allclose(params[k].numpy(), p[k], atol=1e-5)
      np.testing.assert_allclose(optimizer.ema[k].numpy(), average[k], atol=1e-5)


def test_a_nominal_batch():
  """Four gradients of 16 pictures are added up to 64; three of 24 come to 72, with a decay that much larger."""
  for bs, accumulate, decay in ((16, 4, 0.01), (24, 3, 0.01 * 72 / 64), (128, 1, 0.02)):
    config = TrainerConfig(bs=bs, nominal_bs=64, weight_decay=0.01, epochs=10)
    settle_batch(config)
    optimizer = make_optimizer(config, {name: Tensor(value.copy()).realize() for name, value in START.items()}, 100)
    assert config.accumulate == accumulate and optimizer.gain == accumulate and optimizer.decay == {"weight": pytest.approx(decay), "bias": 0.0}
  with pytest.raises(UserError, match="--accumulate 4"): make_optimizer(TrainerConfig(bs=16, accumulate=4, epochs=1), {}, 3)


def test_the_average_comes_and_goes():
  params = {name: Tensor(value.copy()).realize() for name, value in START.items()}
  optimizer = Optimizer(params, "sgd", schedule("constant", LR, UPDATES), ema_decay=0.5)
  for _ in run(optimizer): pass
  learnt, average = ({k: t.numpy().copy() for k, t in tensors.items()} for tensors in (params, optimizer.ema))
  with pytest.raises(RuntimeError, match="midway"), optimizer.averaged():
    for name, p in params.items(): np.testing.assert_array_equal(p.numpy(), average[name])
    assert (average["weight"] != learnt["weight"]).all()
    raise RuntimeError("midway")
  for name, p in params.items():
    np.testing.assert_array_equal(p.numpy(), learnt[name])
    np.testing.assert_array_equal(optimizer.ema[name].numpy(), average[name])
  plain = Optimizer(params, "sgd", schedule("constant", LR, UPDATES))
  with plain.averaged(): np.testing.assert_array_equal(params["weight"].numpy(), learnt["weight"])


def test_schedules():
  steps = np.arange(25)
  def rates(*args, **options): return schedule(*args, **options)(Tensor(steps.astype(np.float32))).numpy()
  warm = np.minimum(1, 1e-3 + (1 - 1e-3) * steps / 4)
  np.testing.assert_allclose(rates("constant", 0.2, 20), 0.2, rtol=1e-6)
  np.testing.assert_allclose(rates("constant", 0.2, 20, warmup_steps=4), 0.2 * warm, rtol=1e-5)
  decayed = np.where(steps < 10, 1, np.where(steps < 16, 0.1, 0.01))
  np.testing.assert_allclose(rates("step", 0.2, 20, warmup_steps=4, milestones=[10, 16]), 0.2 * warm * decayed, rtol=1e-5)
  np.testing.assert_allclose(rates("linear", 0.2, 20, last=0.01), 0.2 * (0.01 + 0.99 * (1 - np.minimum(steps / 20, 1))), rtol=1e-5)
  cosine = 0.5 * (1 + np.cos(np.pi * np.minimum(steps / 20, 1)))
  np.testing.assert_allclose(rates("cosine", 0.2, 20, warmup_steps=4), 0.2 * warm * cosine, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shapes", [[(2, 3)] * 100, [(1,)], [(7, 5), (300, 1001), (3,), (1 << 19,), (2, 2, 3, 3)], [(513,)] * 130])
def test_the_norm_of_gradients(shapes):
  """Also of more than one CPU kernel takes buffers, of sizes that no vector divides, and of so many numbers that several cores take part."""
  rng = np.random.default_rng(0)
  gradients = [rng.normal(0.5, 2, shape).astype(np.float32) for shape in shapes]
  expected = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients))
  assert total_norm([Tensor(g).realize() for g in gradients]).item() == pytest.approx(expected, rel=1e-6)


def test_a_captured_update_follows_a_rate_that_falls():
  params = {name: Tensor(value.copy()).realize() for name, value in START.items()}
  optimizer = Optimizer(params, "sgd", schedule("plateau", LR, 8), slows=True, bias_rate=schedule("plateau", LR, 8))
  logged, left = [], []
  for i, logs in enumerate(run(optimizer)):
    logged.append(logs["lr"])
    if i in (1, 2): left.append(optimizer.slow(0.1, 0.05))
  np.testing.assert_allclose(logged, [LR, LR, LR * 0.1, LR * 0.05, LR * 0.05], rtol=1e-6)
  np.testing.assert_allclose(left, [0.1, 0.05], rtol=1e-6)
  expected = torchs("sgd", logged, dict.fromkeys(SHAPES, 0.0))[-1][0]
  for name in SHAPES: np.testing.assert_allclose(params[name].numpy(), expected[name], rtol=1e-5, atol=1e-6)
  assert "slowed" in optimizer.state() and "slowed" not in Optimizer(params, "sgd", schedule("constant", LR, 8)).state()
