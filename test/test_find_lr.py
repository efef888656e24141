"""The learning-rate range test against a float64 sweep of least squares, whose largest stable rate is known, and on curves with noise."""
import json, math, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinygrad import Tensor
from tinydet.errors import UserError
from tinydet.training.find_lr import HIGH, LOW, diverged, find_lr, smooth, suggest
from tinydet.training.loop import make_step
from tinydet.training.optim import Optimizer, exponential, schedule
from by_hand import by_hand

ROOT = Path(__file__).parents[1]
STEPS, TRUE = 80, np.array([1.0, -2.0, 0.5, 3.0])
SCALES = np.array([1.0, 0.7, 0.5, 0.3])   # of the inputs: the largest eigenvalue of the loss is near 2, so SGD is stable below a rate near 1


class Pairs:
  """Five batches an epoch of 32 pairs of x [4] and y = TRUE x plus noise."""
  batch_size = 32

  def epoch(self, epoch):
    for i in range(5):
      rng = np.random.default_rng((epoch, i))
      x = rng.standard_normal((32, 4)) * SCALES
      yield x.astype(np.float32), (x @ TRUE + 0.3 * rng.standard_normal(32)).astype(np.float32)


def sweep(accumulate):
  """Rates and losses of the sweep in float64."""
  w, losses = np.zeros(4), []
  rates = np.geomspace(LOW, HIGH, STEPS)
  batches = (batch for epoch in range(1000) for batch in Pairs().epoch(epoch))
  for rate in rates:
    gradient, loss = 0, 0
    for x, y in (next(batches) for _ in range(accumulate)):
      error = x.astype(np.float64) @ w - y
      loss, gradient = loss + (error ** 2).mean() / accumulate, gradient + 2 * x.T @ error / len(x) / accumulate
    losses.append(loss)
    if diverged(losses): break
    w = w - rate * gradient
  return rates[:len(losses)].tolist(), losses


@pytest.mark.parametrize("accumulate", by_hand([1, 2], 1))
def test_least_squares(accumulate, tmp_path, capsys):
  w, traced = Tensor(np.zeros(4, np.float32)).realize(), []
  optimizer = Optimizer({"w": w}, "sgd", schedule("cosine", 0.1, 10, warmup_steps=5), momentum=0.0, accumulate=accumulate)

  def losses(x, y):
    traced.append(1)
    return {"loss": ((x * w).sum(1) - y).square().mean()}
  step = make_step(losses, optimizer, [], accumulate)
  found = find_lr(tmp_path/"toy", STEPS, optimizer, step, Pairs(), lambda batch: tuple(Tensor(a).realize() for a in batch), {"bs": 32})
  assert len(traced) == 1, "one graph for all rates"
  rates, expected = sweep(accumulate)
  assert 20 < len(rates) < STEPS, "it ends where the loss diverges"
  np.testing.assert_allclose(found["rates"], rates, rtol=1e-4)
  np.testing.assert_allclose(found["losses"], expected, rtol=1e-2)   # past the stable rate errors grow with the loss
  assert found["suggestion"] == pytest.approx(suggest(rates, expected)["suggestion"], rel=0.05)
  limit = 2 / np.linalg.eigvalsh(np.diag(2 * SCALES ** 2)).max()
  assert limit / 50 < found["suggestion"] < limit / 2

  assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["find_lr.json", "find_lr.png"]
  folder = tmp_path/"toy-find-lr"
  assert json.loads((folder/"find_lr.json").read_text()) == found and found["config"] == {"bs": 32} and "not kept" in found["what"]
  assert Image.open(folder/"find_lr.png").size[0] > 600
  assert f"use --lr {found['suggestion']:g}\n" in capsys.readouterr().out


def curve(seed, noise=0.0, edge=1e-2, steps=100):
  """Losses of a sweep that fall from 1 to 0.4 over two decades and rise steeply from `edge`."""
  rates = np.geomspace(LOW, HIGH, steps)
  x = np.log10(rates)
  losses = 1 - 0.6 / (1 + np.exp(-4 * (x - math.log10(edge) + 2))) + (rates / edge / 3) ** 2
  losses += noise * np.random.default_rng(seed).standard_normal(steps)
  end = next((i for i in range(1, steps) if diverged(losses[:i].tolist())), steps)
  return rates[:end].tolist(), losses[:end].tolist()


@pytest.mark.parametrize("edge", [1e-3, 1e-2, 1e-1])
def test_noise_hardly_moves_the_suggestion(edge):
  clean = suggest(*curve(0, edge=edge))["suggestion"]
  assert edge / 20 < clean < edge / 5
  for seed in range(40): assert clean / 3 < suggest(*curve(seed, 0.1, edge))["suggestion"] < clean * 3


def test_nothing_to_suggest():
  rates = np.geomspace(LOW, HIGH, 100)
  for seed in range(20):
    flat = 1 + 0.1 * np.random.default_rng(seed).standard_normal(100)
    found = suggest(rates.tolist(), (flat + rates).tolist())
    assert found["suggestion"] is None and "does not fall" in found["reason"]
  assert suggest([1e-6], [1.0])["suggestion"] is None
  found = suggest(rates.tolist(), np.linspace(1, 0, 100).tolist())
  assert found["suggestion"] == 1 and "ended before the loss rose" in found["reason"]


def test_smoothing_and_divergence():
  assert smooth([3.0] * 50) == pytest.approx(3.0) and smooth([2.0]) == pytest.approx(2.0)
  np.testing.assert_allclose(smooth(np.arange(100.0))[20:80], np.arange(20, 80), atol=1e-6)   # a line is where it was
  assert not diverged([1.0]) and not diverged([1, 0.5, 0.1, 0.4, 0.5]) and diverged([1, 0.5, 0.4, 0.4, 9, 50, 99])


def test_no_finite_update(tmp_path):
  def step(*_): return lambda: {"loss": math.nan, "lr": LOW, "skipped": 1.0}
  optimizer = Optimizer({"w": Tensor(np.zeros(1, np.float32)).realize()}, "sgd", schedule("constant", 0.1, 10))
  with pytest.raises(UserError, match="--find-lr"): find_lr(tmp_path/"toy", 5, optimizer, step, Pairs(), lambda batch: (), {})
  assert not list(tmp_path.iterdir())


def test_the_schedule():
  found = exponential(LOW, HIGH, 100)(Tensor(np.arange(100, dtype=np.float32))).numpy()
  np.testing.assert_allclose(found, np.geomspace(LOW, HIGH, 100), rtol=2e-5)


@pytest.mark.by_hand
def test_the_trainer_sweeps(tmp_path):
  environ = {key: os.environ[key] for key in ("PATH", "HOME", "CC", "DEV", "NOOPT", "XDG_CACHE_HOME", "CACHEDB") if key in os.environ}
  flags = "--data shapes:1 --weights none --norm batch --size 64 --train-images 16 --bs 8 --workers 0 --find-lr 8 --run-name tiny".split()
  def trainer(*more):
    return subprocess.run([sys.executable, str(ROOT/"examples"/"train_retinanet.py"), *flags, "--out", str(tmp_path/"runs"), *more], cwd=tmp_path,
                          env=environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600)
  done = trainer()
  assert done.returncode == 0, done.stderr[-3000:]
  assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
    f"runs/tiny-find-lr/find_lr.{kind}" for kind in ("json", "png")], "neither checkpoint nor record of a run"
  found = json.loads((tmp_path/"runs/tiny-find-lr/find_lr.json").read_text())
  assert len(found["rates"]) == len(found["losses"]) and found["config"]["bs"] == 8 and all(map(math.isfinite, found["losses"]))
  np.testing.assert_allclose(found["rates"], np.geomspace(LOW, HIGH, 8)[:len(found["rates"])], rtol=1e-4)
  words = "no suggestion: " if found["suggestion"] is None else f"use --lr {found['suggestion']:g}"
  assert words in done.stdout and "find_lr.json" in done.stdout
  refused = trainer("--resume", str(tmp_path))
  assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--find-lr" in refused.stderr
