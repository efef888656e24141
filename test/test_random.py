"""Random numbers in captured graphs: they differ from step to step, follow the seed, and go on where a checkpoint left them."""
import os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from tinygrad import Context, Device, Tensor
from tinydet.runtime import random
from tinydet.runtime.graphs import jit

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from test_random import *
step, _ = learner()
random.seed(3)
print(repr(run(step, 4)))
"""


def learner(capture: bool = True):
  """Learns through dropout, in parts as the training step does."""
  weight = Tensor(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)).realize()
  def step(x: Tensor) -> Tensor:
    with Context(TRAINING=1):
      loss = (x @ weight).tanh().dropout(0.5).square().mean() + Tensor.rand(3).sum() / 100
      gradient, = loss.gradient(weight)
      Tensor.realize(loss)
      Tensor.realize(gradient)
      Tensor.realize(weight.assign(weight - 0.1 * gradient))
      return loss
  return (jit(step) if capture else step), weight


def run(step, count: int) -> list[float]:
  x = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
  return [step(Tensor(x).realize()).item() for _ in range(count)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_captured_step_draws_what_a_plain_one_draws():
  step, weight = learner(capture=False)
  Tensor.manual_seed(3)
  expected = run(step, 5)
  captured, same = learner()
  random.seed(3)
  assert len(set(expected)) == 5 and np.allclose(run(captured, 5), expected, rtol=1e-6) and np.allclose(weight.numpy(), same.numpy(), rtol=1e-5)
  random.seed(3)
  again, _ = learner()
  assert np.allclose(run(again, 5), expected, rtol=1e-6), "from the cache, with the seed of now"


@pytest.mark.by_hand
def test_seeding_reaches_graphs_that_are_captured_already():
  step, weight = learner()
  begin = weight.numpy()
  def of(value: int, rank: int = 0) -> list[float]:
    weight.assign(Tensor(begin)).realize()
    random.seed(value, rank)
    return run(step, 3)
  first = of(3)
  assert of(4) != first and of(3) == first and of(3, rank=1) not in (first, of(3, rank=2))
  weight.assign(Tensor(begin)).realize()
  Tensor.manual_seed(3)
  assert run(step, 3) == first, "tinygrad's own seeding too"


def test_a_restored_state_goes_on_to_the_bit():
  step, weight = learner()
  random.seed(3)
  run(step, 3)
  saved, weights = random.state(), weight.numpy()
  assert list(saved) == ["random.0"] and saved["random.0"].shape == (4,) and saved["random.0"].dtype == np.uint32
  later = run(step, 3)
  other, other_weight = learner()
  random.seed(99)
  run(other, 1)
  other_weight.assign(Tensor(weights)).realize()
  random.restore({"model.weight": weights} | saved)
  assert run(other, 3) == later
  random.seed(3, rank=1)
  mine = random.state()["random.0"]
  random.restore(saved, rank=1)
  assert (random.state()["random.0"] == [*mine[:2], *saved["random.0"][2:]]).all()


def test_another_process_draws_the_same_from_the_cache(tmp_path):
  def process() -> str:
    program = PROGRAM.format(folder=str(Path(__file__).parent))
    return subprocess.run([sys.executable, "-c", program], env=os.environ | {"DEBUG": "0"}, capture_output=True, text=True, check=True).stdout
  first = process()
  assert process() == first and len(set(eval(first))) == 4
  assert len(list((tmp_path / "cache" / "tinydet" / "graphs").iterdir())) == 1


@pytest.mark.by_hand
def test_several_devices_have_numbers_of_their_own():
  second = f"{Device.DEFAULT}:1"
  random.seed(5)
  @jit
  def drop(x: Tensor) -> Tensor:
    with Context(TRAINING=1): return x.dropout(0.5).contiguous()
  x = Tensor(np.ones((2, 64), np.float32)).shard((Device.DEFAULT, second), axis=0).realize()
  draws = [drop(x).numpy() for _ in range(3)]
  saved = random.state()
  assert {"random.0", "random.1"} <= set(saved) and len({row.tobytes() for draw in draws for row in draw}) == 6
  later = drop(x).numpy()
  random.restore(saved)
  assert (drop(x).numpy() == later).all()
