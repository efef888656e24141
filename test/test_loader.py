import gc, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinydet.datasets.loader import Loader
from tinydet.datasets.shapes import Shapes
from tinydet.datasets.subset import Subset
from tinydet.datasets.transforms import compose, horizontal_flip, pad_to, photometric_jitter, resize, resize_shorter, scale_jitter
from tinydet.datasets.voc import Voc
from tinydet.errors import UserError

TRANSFORM = compose(scale_jitter(0.5, 1.5, 48, 64), photometric_jitter(), horizontal_flip())


def arrays(batch) -> list[np.ndarray]:
  return [batch.images, batch.boxes, batch.labels, batch.sizes, batch.original_sizes, batch.image_ids]


def same(one, other) -> bool:
  return all(a.dtype == b.dtype and a.shape == b.shape and (a == b).all() for a, b in zip(arrays(one), arrays(other)))


def shared_memory_in_use() -> bool:
  gc.collect()
  return "memfd:batches" in Path("/proc/self/maps").read_text()


def gone(pid: int) -> bool:
  """Ended, be it unreaped."""
  try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
  except OSError: return True


def wait_until(condition, seconds: float = 15.0) -> bool:
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end: time.sleep(0.05)
  return condition()


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")


def test_batches_hold_the_transformed_samples():
  dataset = Shapes("train", count=22, size=64)
  loader = Loader(dataset, 8, TRANSFORM, seed=5, shuffle=True)
  batches = list(loader.epoch(3))
  assert len(batches) == len(loader) == 3 and loader.max_boxes == 8
  order = np.random.default_rng((5, 3)).permutation(22)
  for i, index in enumerate(order.tolist()):
    batch, row = batches[i // 8], i % 8
    sample = TRANSFORM(dataset[index], np.random.default_rng((5, 3, index)))
    n = len(sample.boxes)
    np.testing.assert_array_equal(batch.images[row], sample.image)
    np.testing.assert_array_equal(batch.boxes[row], np.concatenate([sample.boxes, np.zeros((8 - n, 4))]))
    np.testing.assert_array_equal(batch.labels[row], [*sample.labels, *[-1] * (8 - n)])
    assert (*batch.sizes[row], *batch.original_sizes[row], batch.image_ids[row]) == (*sample.content_size, 64, 64, index + 1)
  last = batches[-1]
  assert not last.images[6:].any() and not last.boxes[6:].any() and (last.labels[6:] == -1).all() and last.image_ids[6:].tolist() == [-1, -1]
  assert last.sizes[6:].tolist() == [[48, 64]] * 2
  assert [a.dtype for a in arrays(last)] == [np.uint8, np.float32, np.int32, np.int32, np.int32, np.int64]


def test_epochs_differ_and_repeat():
  loader = Loader(Shapes("train", count=20, size=64), 10, TRANSFORM, shuffle=True)
  first, second, again = (next(loader.epoch(e)) for e in (0, 1, 0))
  assert same(first, again) and not same(first, second)
  assert not same(first, next(Loader(loader.dataset, 10, TRANSFORM, shuffle=True, seed=1).epoch(0)))
  assert next(Loader(loader.dataset, 10, TRANSFORM).epoch(0)).image_ids.tolist() == list(range(1, 11))


def test_any_number_of_workers_yields_the_same():
  dataset = Shapes("train", count=22, size=64)
  options = dict(seed=1, shuffle=True)
  plain = Loader(dataset, 4, TRANSFORM, **options)
  expected = {epoch: list(plain.epoch(epoch)) for epoch in (0, 1)}
  assert all(same(a, b) for a, b in zip(plain.epoch(1, start=2), expected[1][2:]))
  for workers in (1, 4):
    loader = Loader(dataset, 4, TRANSFORM, workers=workers, **options)
    for epoch in (0, 1):
      found = list(loader.epoch(epoch))  # kept, so that a slot used twice would show
      assert len(found) == 6 and all(same(a, b) for a, b in zip(found, expected[epoch]))
    resumed = list(loader.epoch(1, start=4))
    assert len(resumed) == 2 and all(same(a, b) for a, b in zip(resumed, expected[1][4:]))
    processes = loader._pool.processes
    assert len(processes) == workers and all(p.poll() is None for p in processes)
    loader.close()
    assert all(p.poll() is not None for p in processes)


def test_an_abandoned_epoch_leaves_nothing_in_the_next():
  loader = Loader(Shapes("train", count=40, size=64), 4, TRANSFORM, workers=2)
  expected = list(Loader(loader.dataset, 4, TRANSFORM).epoch(1))
  abandoned = loader.epoch(0)
  next(abandoned)
  assert all(same(a, b) for a, b in zip(loader.epoch(1), expected))
  with pytest.raises(RuntimeError, match="another one began"): next(abandoned)
  for _ in zip(range(2), loader.epoch(0)): pass
  assert same(next(loader.epoch(1)), expected[0])
  loader.close()
  assert same(next(loader.epoch(1)), expected[0])  # workers start again
  loader.close()


class Resized(Shapes):
  """Reads at any size, and notes which were asked for."""
  asked: set

  def resized(self, index, size):
    self.asked.add(size)
    return resize(*size)(self[index], np.random.default_rng(0))


@pytest.mark.parametrize("transform, size", [
  (resize(32, 24), (32, 24)), (compose(compose(resize(32, 24)), horizontal_flip()), (32, 24)),
  (compose(resize_shorter(40, 60), pad_to(60, 60)), (40, 40)), (compose(horizontal_flip(), resize(32, 24)), None), (TRANSFORM, None),
  (compose(), None), (lambda sample, rng: sample, None)])
def test_a_reduced_loader_asks_for_the_size_that_comes_first(transform, size):
  dataset = Resized("train", count=5, size=64)
  dataset.asked = set()
  whole = list(Loader(dataset, 3, transform).epoch(0))
  assert not dataset.asked
  assert all(same(a, b) for a, b in zip(Loader(Subset(dataset, 5), 3, transform, reduced=True).epoch(0), whole))
  assert dataset.asked == ({size} if size else set())
  assert all(same(a, b) for a, b in zip(Loader(Shapes("train", count=5, size=64), 3, transform, reduced=True).epoch(0), whole))


def test_drop_last_and_batches_that_cannot_be_filled():
  dataset = Shapes("train", count=10, size=64)
  loader = Loader(dataset, 4, compose(), drop_last=True)
  assert len(loader) == 2 and [b.image_ids.tolist() for b in loader.epoch(0)] == [[1, 2, 3, 4], [5, 6, 7, 8]]
  with pytest.raises(UserError, match="10 images do not fill one batch of 11"): Loader(dataset, 11, compose(), drop_last=True)
  assert next(Loader(dataset, 11, compose()).epoch(0)).image_ids.tolist() == [*range(1, 11), -1]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_boxes_or_varying_sizes_name_the_image(workers):
  dataset = Shapes("train", count=40, size=64)
  most = max(range(40), key=lambda i: len(dataset[i].boxes))
  with pytest.raises(UserError, match=rf"shapes:1/train/\d+ has \d boxes, but max_boxes is {len(dataset[most].boxes) - 1}"):
    list(Loader(dataset, 8, compose(), max_boxes=len(dataset[most].boxes) - 1, workers=workers).epoch(0))
  with pytest.raises((ValueError, RuntimeError), match=r"shapes:1/train/2 .*one fixed size"):
    list(Loader(Sizes("train", count=8, size=64), 2, compose(), workers=workers).epoch(0))


class Sizes(Shapes):
  """The third image is smaller."""
  def __getitem__(self, index):
    return resize_shorter(32, 64)(super().__getitem__(index), np.random.default_rng(0)) if index == 2 else super().__getitem__(index)


def write_voc(folder: Path, count: int) -> Path:
  (folder / "Annotations").mkdir(parents=True)
  (folder / "JPEGImages").mkdir()
  for i in range(count):
    size = (20 + i, 30)
    Image.fromarray(np.full((*size, 3), i, np.uint8)).save(folder / "JPEGImages" / f"p{i:02}.png")
    (folder / "Annotations" / f"p{i:02}.xml").write_text(
      f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size><object><name>x</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
      "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>")
  return folder


@linux
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_and_nothing_is_left(tmp_path, workers):
  dataset = Voc(write_voc(tmp_path / "d", 20), None)
  broken = Path(dataset.image_name(len(dataset) - 2))
  transform = compose(resize_shorter(32, 48), pad_to(48, 48))
  loader = Loader(dataset, 4, transform, workers=workers)
  assert sum((b.image_ids > 0).sum() for b in loader.epoch(0)) == len(dataset)
  broken.write_bytes(broken.read_bytes()[:60])
  processes = loader._pool.processes if workers else []
  with pytest.raises(UserError, match=f"{broken.name}: cannot be read as an image"): list(loader.epoch(1))
  assert all(p.poll() is not None for p in processes) and not shared_memory_in_use()


@linux
def test_a_killed_worker_ends_the_epoch_with_an_error_and_nothing_is_left():
  loader = Loader(Shapes("train", count=4000), 8, compose(), workers=2)
  iterator = loader.epoch(0)
  next(iterator)
  processes = loader._pool.processes
  assert shared_memory_in_use()
  started = time.monotonic()
  os.kill(processes[0].pid, signal.SIGKILL)
  with pytest.raises(UserError, match=r"worker 0 died (on shapes:1/train/\d+|while idle) \(killed by SIGKILL\)"):
    for _ in iterator: pass
  assert time.monotonic() - started < 10
  assert all(p.poll() is not None for p in processes)
  del iterator
  assert not shared_memory_in_use()


@linux
def test_workers_end_with_the_loader():
  loader = Loader(Shapes("train", count=40, size=64), 4, resize(32, 32), workers=2)
  next(loader.epoch(0))
  processes = loader._pool.processes
  assert shared_memory_in_use()
  del loader
  assert not shared_memory_in_use()
  assert all(p.poll() is not None for p in processes)


PROGRAM = """
import signal, sys
from tinydet.datasets.loader import Loader
from tinydet.datasets.shapes import Shapes
from tinydet.datasets.transforms import compose
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would we
loader = Loader(Shapes("train", count=100000), 8, compose(), workers=2)
for i, batch in enumerate(loader.epoch(0)):
  if i == 1: print(*(p.pid for p in loader._pool.processes), flush=True)
"""


@linux
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_program_however_it_ends(sent):
  program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                             cwd=Path(__file__).parent.parent)
  workers = [int(pid) for pid in program.stdout.readline().split()]
  assert len(workers) == 2 and not any(map(gone, workers))
  os.killpg(program.pid, sent)  # as a terminal does on Ctrl-C
  _, errors = program.communicate(timeout=15)
  assert program.returncode == -sent
  assert wait_until(lambda: all(map(gone, workers)))
  assert errors.count("Traceback") == (sent == signal.SIGINT) and errors.count("KeyboardInterrupt") == (sent == signal.SIGINT)


@linux
def test_a_data_set_of_the_main_program_gets_a_clear_error():
  program = PROGRAM.replace("loader = Loader(Shapes(", "class Mine(Shapes): pass\nloader = Loader(Mine(")
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent.parent, check=False)
  assert done.returncode == 1 and "define them in a module" in done.stderr.splitlines()[-1]
