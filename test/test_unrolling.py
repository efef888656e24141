"""Loops of tinygrad's kernels on the processor: the numbers, against numpy in float64, and which of them are unrolled."""
import numpy as np
import pytest
from tinygrad import Context, Tensor
from tinygrad.codegen import to_program_cache
from tinygrad.codegen.opt import OptOps, heuristic
from tinydet.runtime import unrolling

RNG = np.random.default_rng(0)


def made(function, *shapes, monkeypatch) -> tuple[np.ndarray, np.ndarray, list[list]]:
  """What tinygrad and numpy make of numbers drawn anew, and what was done to the loops of each kernel."""
  done = []
  ours = heuristic.hand_coded_optimizations
  def noted(kernel):
    done.append((result := ours(kernel)).applied_opts)
    return result
  arrays = [RNG.uniform(0.5, 1.5, shape) for shape in shapes]
  tensors = [Tensor(array.astype(np.float32)).realize() for array in arrays]
  to_program_cache.clear()
  with monkeypatch.context() as patch, Context(PARALLEL=0, NOOPT=0):
    patch.setattr(heuristic, "hand_coded_optimizations", noted)
    result = function(*tensors).numpy()
  return result, function(*arrays), done


def unrolled(done) -> list: return [(opt.op, opt.arg) for opt in done if opt.op is not OptOps.THREAD]


@pytest.mark.parametrize("function, shapes", [
  (lambda x: (x * x).sum(1), [(12, 3001)]), (lambda x: x.sum(1), [(8, 64)]), (lambda x: x.sum((0, 2)), [(2, 64, 900)]),
  (lambda x: x.max(1), [(1024, 300)]), (lambda x, y: (x * y).sum((0, 2)), [(3, 20, 129), (3, 20, 129)]), (lambda x: x.sum(0), [(700, 40)])])
def test_long_sums_are_taken_side_by_side(function, shapes, monkeypatch):
  found, expected, done = made(function, *shapes, monkeypatch=monkeypatch)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert unrolled(done[0]) == [(OptOps.UPCAST, 4)]


@pytest.mark.parametrize("function, shapes", [
  (lambda x, y: x @ y, [(40, 128), (128, 36)]),                # a matrix, whose products share what they read
  (lambda x: x.sum(1), [(7, 200)]), (lambda x: x.sum(1), [(64, 40)]), (lambda x: x.sum(), [(5003,)]), (lambda x: x.sum(0), [(130, 1)])])
def test_other_sums_are_tinygrads(function, shapes, monkeypatch):
  found, expected, done = made(function, *shapes, monkeypatch=monkeypatch)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  monkeypatch.setattr(unrolling, "_unrolled", lambda kernel: None)
  assert done and done == made(function, *shapes, monkeypatch=monkeypatch)[2]


def roll(x): return x[:, 5:].cat(x[:, :5], dim=1) if isinstance(x, Tensor) else np.concatenate([x[:, 5:], x[:, :5]], 1)


@pytest.mark.parametrize("function, shapes", [
  (lambda x, y: x * 2 + y, [(33, 65), (33, 65)]), (lambda x, y: x / y + 1, [(512, 600), (1, 600)]), (lambda x: x.T * 3, [(70, 90)]),
  (roll, [(300, 1024)]), (lambda x: x.reshape(9, 4, 25)[:, ::2] * 2, [(900,)])])
def test_loops_of_single_numbers_are_plain(function, shapes, monkeypatch):
  found, expected, done = made(function, *shapes, monkeypatch=monkeypatch)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert not any(map(unrolled, done))


def test_many_conditions_on_many_numbers_are_tinygrads(monkeypatch):
  def pieces(x):
    cut = [x[:, i:i + 7] * (i + 1) for i in range(0, 70, 7)]   # each has its own condition
    return cut[0].cat(*cut[1:], dim=1) if isinstance(x, Tensor) else np.concatenate(cut, 1)
  left, ours = [], unrolling._unrolled
  def noted(kernel):
    left.append((result := ours(kernel)) is None)
    return result
  monkeypatch.setattr(unrolling, "_unrolled", noted)
  for rows in (100, 1600):
    found, expected, _ = made(pieces, (rows, 70), monkeypatch=monkeypatch)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert left == [False, True]
