"""The cache of captured graphs: what comes from it equals what was captured, in another process too, and nothing stale ever does."""
import hashlib, os, pickle, sqlite3, subprocess, sys, threading, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from tinygrad import Context, Device, Tensor, UOp, dtypes
from tinygrad.helpers import NOOPT
from tinygrad.uop.ops import Ops
from tinydet.cache import cache_folder
from tinydet.nn.conv import conv2d
from tinydet.nn.init import set_values
from tinydet import parts
from tinydet.runtime import compiling, graph_file, graph_key, graphs, workspace
from tinydet.runtime.graphs import jit, lock


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def files() -> list: return sorted(cache_folder("graphs").glob("*.graph"))


@pytest.fixture
def made(monkeypatch) -> list:
  """One entry for each graph that was not in the cache."""
  calls, make = [], compiling.make
  monkeypatch.setattr(compiling, "make", lambda *args: calls.append(1) or make(*args))
  return calls


def trainer(scale: float = 0.1, hold: bool = False):
  """A small layer that learns, and what it has learnt."""
  weight, steps = (Tensor(np.random.default_rng(i).standard_normal((8, 8)).astype(np.float32)).realize() for i in range(2))
  held = []
  @jit
  def step(x: Tensor) -> Tensor:
    hidden = (x @ weight).tanh().contiguous()
    if hold: held.append(hidden)
    loss = (hidden - 0.5).square().mean()
    gradient = loss.gradient(weight)[0]
    Tensor.realize(loss, weight.assign(weight - scale * gradient), steps.assign(steps + 1))
    return loss
  return step, weight, steps, held


def run(step, count: int = 3) -> list[float]:
  return [step(Tensor(np.random.default_rng(10 + i).standard_normal((4, 8)).astype(np.float32)).realize()).item() for i in range(count)]


def test_a_second_graph_of_the_same_kind_comes_from_the_cache(made):
  step, weight, steps, _ = trainer()
  first = run(step)
  again, other_weight, other_steps, _ = trainer()
  assert run(again) == first and len(made) == len(files()) == 1
  assert (weight.numpy() == other_weight.numpy()).all() and (steps.numpy() == other_steps.numpy()).all()
  assert run(step) == run(again), "the two share their state"
  first_weight = weight.numpy()
  run(again)
  assert (weight.numpy() == first_weight).all()


def test_the_cached_graph_learns_as_numpy_does():
  run(trainer()[0], 1)
  step, weight, _, _ = trainer()
  expected = weight.numpy().astype(np.float64)
  for i in range(3):
    x = np.random.default_rng(10 + i).standard_normal((4, 8)).astype(np.float32).astype(np.float64)
    hidden = np.tanh(x @ expected)
    expected -= 0.1 * x.T @ (2 * (hidden - 0.5) / hidden.size * (1 - hidden ** 2))
  run(step, 3)
  np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_another_constant_shape_setting_or_held_tensor_is_another_graph(made):
  def count(step, **variables) -> int:
    before = len(made)
    with Context(**variables): run(step, 1)
    return len(made) - before
  assert count(trainer()[0]) == 1 and count(trainer()[0]) == 0
  assert count(trainer(scale=0.2)[0]) == 1
  assert count(trainer()[0], NOOPT=1 - NOOPT.value) == 1
  assert count(trainer(hold=True)[0]) == 1
  step, _, _, _ = trainer()
  step(Tensor.ones(6, 8).contiguous().realize())
  assert len(made) == 5


def test_sharded_tensors(made):
  devices = (Device.DEFAULT, f"{Device.DEFAULT}:1")
  def once() -> tuple[list[float], np.ndarray]:
    weight = Tensor(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)).shard(devices).realize()
    @jit
    def step(x: Tensor) -> Tensor:
      loss = ((x @ weight).tanh().contiguous() - 0.5).square().mean()
      Tensor.realize(loss, weight.assign(weight - 0.1 * loss.gradient(weight)[0]))
      return loss
    inputs = [np.random.default_rng(10 + i).standard_normal((4, 8)).astype(np.float32) for i in range(3)]
    return [step(Tensor(x).shard(devices, axis=0).realize()).item() for x in inputs], weight.numpy()
  losses, weight = once()
  again, same = once()
  assert len(made) == 1 and again == losses and (same == weight).all()
  alone, alone_weight, _, _ = trainer()
  np.testing.assert_allclose(run(alone), losses, rtol=1e-5)
  np.testing.assert_allclose(alone_weight.numpy(), weight, rtol=1e-5, atol=1e-6)


def test_a_tensor_that_is_held_has_its_value(made):
  run(trainer()[0], 1)   # does not hold it
  step, weight, _, held = trainer(hold=True)
  x = np.random.default_rng(10).standard_normal((4, 8)).astype(np.float32)
  expected = np.tanh(x @ weight.numpy())
  run(step, 1)
  np.testing.assert_allclose(held[0].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spoil", [lambda content: content[:100], lambda content: b"", lambda content: content[:-1] + bytes([content[-1] ^ 1])])
def test_a_spoilt_file_is_made_anew(made, spoil):
  first = run(trainer()[0])
  file, = files()
  whole = file.read_bytes()
  file.write_bytes(spoil(whole))
  assert run(trainer()[0]) == first and len(made) == 2
  assert run(trainer()[0]) == first and len(made) == 2


def test_no_cache_where_tinygrad_is_told_to_have_none(made):
  with Context(CACHELEVEL=0): run(trainer()[0], 1)
  assert made and not files()


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert len(run(trainer()[0])) == 3


def test_what_was_not_used_for_longest_goes(monkeypatch):
  run(trainer()[0], 1)
  oldest, = files()
  os.utime(oldest, (1, 1))
  monkeypatch.setattr(graph_file, "MOST_BYTES", oldest.stat().st_size * 3 // 2)
  run(trainer(scale=0.3)[0], 1)
  assert oldest not in files() and len(files()) == 1


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from test_graphs import compiling, run, trainer
make = compiling.make
compiling.make = lambda *args: print("made") or make(*args)
step, weight, _, _ = trainer()
print(run(step), weight.numpy().tobytes().hex())
"""


def test_another_process_starts_from_it():
  def process(**environment: str) -> list[str]:
    program = PROGRAM.format(folder=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
  made, result = process()
  assert made == "made" and process() == [result], "the second one found the graph of the first"
  assert process(PYTHONHASHSEED="7", DEV=Device.DEFAULT, DEBUG="0") == [result]
  assert process(NOLOCALS="1")[0] == "made", "another setting of tinygrad's compiler"


def test_another_dtype_or_training_is_another_graph():
  weight = Tensor([2.0, 3.0]).realize()
  @jit
  def double(x: Tensor) -> Tensor: return ((x + x) * weight.cast(x.dtype)).dropout(0.5).contiguous()
  def values(dtype) -> list: return double(Tensor([1, 2], dtype=dtype).contiguous().realize()).tolist()
  assert values(dtypes.float32) == [4, 12] and values(dtypes.int32) == [4, 12] and values(dtypes.half) == [4, 12]
  with Context(TRAINING=1): assert set(values(dtypes.float32)) <= {0, 8, 24}, "what is kept is doubled"
  assert values(dtypes.float32) == [4, 12]


def test_weights_replaced_after_a_capture_are_used():
  layer, other = SimpleNamespace(weight=Tensor([1.0, 2.0]).realize()), Tensor([5.0]).realize()
  @jit
  def product(x: Tensor) -> Tensor: return (x * layer.weight * other).contiguous()
  def values() -> list: return product(Tensor([1.0, 1.0]).contiguous().realize()).tolist()
  assert values() == [5, 10]
  layer.weight.assign(Tensor([3.0, 4.0]))
  assert values() == [15, 20], "assigned, and not realised"
  layer.weight.assign(Tensor([4.0, 4.0])).realize()
  assert values() == [20, 20]
  set_values(layer.weight, np.array([7.0, 8.0]))
  assert values() == [35, 40], "replaced"
  layer.weight = Tensor([9.0, 9.0]).realize()
  assert values() == [45, 45], "another tensor"
  assert values() == [45, 45]


def test_threads_take_turns():
  """Each call's result is in memory that the next call writes to."""
  step = jit(lambda x: ((x @ x).tanh() @ x).contiguous())
  inputs = [np.random.default_rng(i).standard_normal((32, 32)).astype(np.float32) for i in range(8)]
  def result(i: int) -> bytes:
    with lock: return step(Tensor(inputs[i % 8]).realize()).numpy().tobytes()
  serial = [result(i) for i in range(8)]
  with ThreadPoolExecutor(4) as pool: assert list(pool.map(result, range(200))) == serial * 25


def test_what_another_thread_computes_during_a_capture_is_not_captured():
  begun, done = threading.Event(), threading.Event()
  @jit
  def slow(x: Tensor) -> Tensor:
    y = (x + 1).contiguous().realize()
    begun.set()
    assert not done.wait(0.5), "the other thread waits"
    return (y * 2).contiguous()
  def other() -> list:
    begun.wait(10)
    result = (Tensor([1.0, 2.0, 3.0]).realize() * 3).contiguous().tolist()
    done.set()
    return result
  with ThreadPoolExecutor(1) as pool:
    future = pool.submit(other)
    assert slow(Tensor([1.0, 2.0]).realize()).tolist() == [4, 6] and future.result() == [3, 6, 9]
  assert slow(Tensor([2.0, 3.0]).realize()).tolist() == [6, 8]


@pytest.mark.parametrize("imports", ["import tinydet, tinygrad", "import tinygrad, tinydet"])
def test_any_thread_computes_whichever_is_imported_first(imports):
  program = f"""{imports}
from concurrent.futures import ThreadPoolExecutor
from tinygrad import Tensor
def compute(x): return (Tensor([x, 2.0]) * 3.25).tolist()
print(compute(1.0), ThreadPoolExecutor(1).submit(lambda: (Tensor([1.0, 2.0, 3.0]) * 4.75).tolist()).result())"""
  done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
  assert done.stdout.split("\n")[0] == "[3.25, 6.5] [4.75, 9.5, 14.25]", done.stderr


@pytest.mark.parametrize("content", [b"no pickle", pickle.dumps(3), pickle.dumps(("KEY", UOp.const(1, dtypes.int), [])),
                                     pickle.dumps(("another", UOp(Ops.LINEAR), []))])
def test_a_whole_file_of_other_content_is_made_anew(made, content):
  first = run(trainer()[0])
  file, = files()
  if b"KEY" in content: content = pickle.dumps((file.stem, *pickle.loads(content)[1:]))
  body = zlib.compress(content)
  file.write_bytes(hashlib.sha256(body).digest() + body)
  assert run(trainer()[0]) == first and len(made) == 2


@pytest.mark.parametrize("mode", ["folder", "file", "owner"])
def test_what_others_may_have_written_is_not_run(made, mode, monkeypatch, capfd):
  first = run(trainer()[0])
  file, = files()
  assert file.stat().st_mode & 0o077 == 0 and file.parent.stat().st_mode & 0o077 == 0
  if mode == "owner": monkeypatch.setattr(os, "getuid", lambda: 12345)
  else: (file.parent if mode == "folder" else file).chmod(0o777)
  parts.noted.clear()
  assert run(trainer()[0]) == first and run(trainer()[0]) == first
  assert len(made) == (2 if mode == "file" else 3), "a file is replaced by one's own"
  assert capfd.readouterr().err.count("can be written by others") == 1


def test_our_own_sources_are_in_the_key(made, monkeypatch):
  run(trainer()[0], 1)
  graph_key._compiler.cache_clear()
  read = Path.read_bytes
  monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"# changed" * (path.name == "conv_cpu.py"))
  try: run(trainer()[0], 1)
  finally: graph_key._compiler.cache_clear()
  assert len(made) == 2


def test_kernels_in_c_are_compiled_while_the_rest_is_scheduled(made, monkeypatch):
  """Those that a graph names before it is scheduled are those that it has afterwards."""
  weight = Tensor(np.random.default_rng(0).standard_normal((9, 3, 3, 3)).astype(np.float32)).realize()
  started, start = [], compiling._start
  def noted(kernels, compiling_now):
    start(kernels, compiling_now)
    started.append({key for keys in compiling_now.values() for key in keys})
  monkeypatch.setattr(compiling, "_start", noted)
  x = np.random.default_rng(1).standard_normal((2, 3, 13, 11)).astype(np.float32)
  with Context(PARALLEL=1):
    step = jit(lambda x: conv2d(x, weight, None, 1, 1).relu().contiguous() + 1)
    compiling._cache.clear()
    step(Tensor(x).realize())
  first, *rest = started
  assert len(made) == 1 and first and all(first < keys for keys in rest)
  assert first == {key for key in rest[-1] if compiling._cache[key].arg.name.startswith("conv")}


@pytest.fixture
def noted(monkeypatch) -> dict:
  """What graphs took, by their kind, and no graph too small to have its memory made ready."""
  sizes: dict = {}
  monkeypatch.setattr(workspace, "_parts", (lambda table, kind: sizes.get(kind), lambda table, kind, size: sizes.__setitem__(kind, size)))
  monkeypatch.setattr(workspace, "LEAST", 1)
  monkeypatch.setattr(workspace, "PAGE", 1)
  return sizes


@pytest.fixture
def touched(monkeypatch) -> list:
  buffers, touch = [], workspace._touch
  monkeypatch.setattr(workspace, "_touch", lambda buffer: buffers.append(buffer) or touch(buffer))
  return buffers


def workspaces(step) -> dict:
  """The memory that the graphs of a `jit` share."""
  return next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, dict)
              and any(isinstance(key[0], str) for key in cell.cell_contents))


def test_memory_is_made_ready_while_a_graph_is_traced(noted, touched):
  first = run(trainer()[0])
  (kind, size), = noted.items()
  assert not touched and size > 0
  step, *_ = trainer()
  assert run(step) == first and workspaces(step)["CPU", 1] is touched[0] and touched[0].max_numel() == size and len(touched) == 1
  for hint, fits in ((size - 1, False), (size + size // 4, True), (size * 2, False)):
    touched.clear()
    noted[kind] = hint
    step, *_ = trainer()
    assert run(step) == first and (workspaces(step)["CPU", 1] is touched[0]) == fits and noted[kind] == size
  touched.clear()
  with Context(CACHELEVEL=0): assert run(trainer()[0]) == first


def test_what_fails_while_it_is_traced_leaves_no_memory_in_use(noted, touched):
  run(trainer()[0])
  begun = threading.Event()
  def fails(x: Tensor) -> Tensor:
    begun.set()
    raise ValueError("as it is traced")
  fails.__module__, fails.__qualname__ = __name__, "trainer.<locals>.step"
  step, *_ = trainer()
  x = Tensor(np.ones((4, 8), np.float32)).realize()
  with pytest.raises(ValueError, match="as it is traced"): jit(fails)(x)
  assert begun.is_set()
  for thread in threading.enumerate():
    if thread.name == "touching memory": thread.join(5)
  assert len(run(step)) == 3 and all(np.isfinite(run(step)))


def test_memory_that_cannot_be_had_is_asked_for_again(noted, monkeypatch):
  first = run(trainer()[0])
  def refuse(self): raise MemoryError
  buffers = []
  def touch(buffer):
    buffers.append(buffer)
    with monkeypatch.context() as m:
      m.setattr(type(buffer.buffer), "ensure_allocated", refuse)
      _touch(buffer)
  _touch = workspace._touch
  monkeypatch.setattr(workspace, "_touch", touch)
  assert run(trainer()[0]) == first and len(buffers) == 1


def test_compiling_processes_begin_with_a_graph_of_a_new_kind(noted, monkeypatch):
  """A graph that comes from the cache needs none."""
  asked: list = []
  monkeypatch.setattr(graphs, "workers", lambda: asked.append(1))
  run(trainer()[0])
  assert len(asked) == 1
  run(trainer()[0])
  assert len(asked) == 1
  noted.clear()
  run(trainer()[0])
  assert len(asked) == 2


def test_a_kept_graph_needs_no_cache_of_kernels(monkeypatch, made):
  """One that is broken, or may not be written: nothing is compiled, and what the graph took is not noted."""
  first = run(trainer()[0])
  def broken(*_): raise sqlite3.DatabaseError("file is not a database")
  monkeypatch.setattr(workspace, "_parts", (broken, broken))
  assert run(trainer()[0]) == first and len(made) == 1
