"""BEAM: which kernels are searched, what is said, and that neither numbers nor weights change."""
import re, subprocess, sys
import numpy as np, pytest
from tinygrad import Context, Tensor
from tinydet.nn.conv import conv2d
from tinydet.runtime import beam
from tinydet.runtime.graphs import jit
from by_hand import by_hand
from test_conv import draw


def trained(times=2):
  """Results of a step, called a few times, that changes its weights where they lie, and what numpy makes of it."""
  rng = np.random.default_rng(0)
  x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 16), (16, 4)))
  weight, expected = Tensor(w).realize(), w.astype(np.float64)

  @jit
  def step(x: Tensor) -> Tensor:
    out = (x @ weight).contiguous()
    Tensor.realize(out, weight.assign(weight + 1), small := (x[:2, :3] * 2).contiguous())
    return out + small.sum()

  for _ in range(times):
    found = step(Tensor(x).realize()).numpy()
    wanted = x @ expected + 2 * x[:2, :3].sum()
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    expected = expected + 1
  np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("found", "faster"), by_hand(
  [(1.0, "1 of them are faster, by 8e\\+03 ms"), (20.0, "0 of them are faster")], 20.0))
def test_what_holds_the_time_is_searched(found, faster, capfd, monkeypatch):
  """One kernel holds nine tenths of the time. What the search makes of it is taken where it is faster; weights stay as they are all the while."""
  measured, real = [], beam._seconds
  def seconds(call):
    assert 0 < real(call) < 10
    measured.append(call.src[0])
    return 9.0 if len(measured) == 1 else found if len(measured) > 4 else 0.1
  monkeypatch.setattr(beam, "_seconds", seconds)
  with Context(BEAM=1, CACHELEVEL=0, NOOPT=0): trained()
  said = capfd.readouterr().err
  assert re.search(r"BEAM=1: 1 of 4 different kernels are searched, with 9e\+03 of 9.3e\+03 ms", said), said
  assert re.search(f"BEAM=1: {faster}", said) and len(measured) == 5


def test_a_kernel_in_c_is_taken_the_way_that_was_fastest(capfd, monkeypatch):
  """The last one, says the measurement here. It is kept, and not measured again."""
  kept, measured = {}, []
  monkeypatch.setattr(beam, "_get", lambda table, key: kept.get((table, key)))
  monkeypatch.setattr(beam, "_put", lambda table, key, value: kept.setdefault((table, key), value))
  def shares(turns):
    assert all(0 < next(turn) < 10 for turn in turns)
    measured.append(len(turns))
    return [1.0, *[2.0] * (len(turns) - 2), 0.5]
  monkeypatch.setattr(beam, "_shares", shares)
  x, w, bias, _, out, _ = draw((2, 40, 64, 17, 24, 3, 1, 1, 1))
  weight = Tensor(w).realize()
  for _ in range(2):
    with Context(BEAM=1, CACHELEVEL=0): found = jit(lambda x: conv2d(x, weight, None, 1, 1, 1))(Tensor(x).realize()).numpy()
    np.testing.assert_allclose(found, out - bias[:, None, None], atol=1e-5 * out.std())
    said = capfd.readouterr().err
    assert "BEAM=1: 1 of 1 different kernels are searched" in said and "BEAM=1: 1 of them are faster" in said, said
  (way, share), = kept.values()
  assert share == 0.5 and measured == [way + 1, 2] and way > 1


@pytest.mark.by_hand
def test_nothing_is_said_without_it(capfd):
  with Context(BEAM=0, CACHELEVEL=0): trained()
  assert "BEAM" not in capfd.readouterr().err


def test_the_longest_and_the_time_left(capsys):
  assert beam._longest({"a": 1.0, "b": 5.0, "c": 3.0, "d": 0.5, "e": 0.5}) == ["b", "c", "a"] and beam._longest({}) == []
  times = iter(range(0, 1000, 12))
  assert list(beam._with_time_left(list("abcdefgh"), lambda: next(times))) == list("abcdefgh")
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith("BEAM: 1 of 8 kernels searched, some ") and 2 <= len(lines) < 7


@pytest.mark.parametrize("variable", ["BEAM=two", "DEBUG=yes", "JIT="])
def test_a_variable_that_is_no_number_is_one_line(variable):
  key, _, value = variable.partition("=")
  command = [sys.executable, "-c", "import tinydet, tinygrad"]
  done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", key: value or "x"}, capture_output=True, text=True, check=False, timeout=120)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {key}={value or 'x'}: this variable of tinygrad's")
