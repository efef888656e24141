"""Canvases for pictures of many shapes: the choice against all choices, the order of an epoch, the step and the programs on more than one."""
import itertools, json, math, os, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from tinygrad import GlobalCounters, Tensor
from tinydet.datasets import open_dataset
from tinydet.datasets.buckets import Buckets, choose_buckets, one_bucket
from tinydet.datasets.fit import Fit
from tinydet.datasets.loader import Loader
from tinydet.datasets.sample import Sample
from tinydet.datasets.shapes import Shapes
from tinydet.datasets.subset import Subset
from tinydet.datasets.transforms import compose, horizontal_flip, pad_to, photometric_jitter, resize_shorter
from tinydet.predict import predictor
from tinydet.runtime.graphs import jit
from tinydet.training.loop import make_step
from tinydet.training.optim import Optimizer, schedule

ROOT = Path(__file__).parents[1]
SIZES = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=9)


def resized(sizes, shorter, maximum):
  """(height, width) that pictures have after the transform, from pictures without pixels."""
  return [resize_shorter(shorter, maximum)(sample(size), None).content_size for size in sizes]


def sample(size):
  return Sample(np.zeros((*size, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 1, size, size)


def up(side): return math.ceil(side / 32) * 32

# ---- which canvases


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 4), st.integers(1, 4), st.sampled_from([(100, 200), (64, 96), (150, 150), (200, 120)]))
def test_no_division_into_ranges_of_aspect_ratios_pads_less(sizes, count, batch, bounds):
  buckets = choose_buckets(sizes, *bounds, count, batch)
  contents = resized(sizes, *bounds)
  flattest_first = sorted(contents, key=lambda s: (up(s[0]), -up(s[1])))
  n, best = len(sizes), math.inf
  for k in range(1, count + 1):
    for cuts in itertools.combinations(range(1, n), k - 1):
      runs = [flattest_first[a:b] for a, b in itertools.pairwise([0, *cuts, n])]
      if min(map(len, runs)) < min(batch, n): continue
      best = min(best, sum(len(run) * up(max(h for h, _ in run)) * up(max(w for _, w in run)) for run in runs))
  canvases = [buckets.canvases[c] for c in buckets.of]
  assert sum(h * w for h, w in canvases) == best and len(buckets.canvases) <= count
  assert all(h <= H and w <= W for (h, w), (H, W) in zip(contents, canvases))
  assert all(side % 32 == 0 for canvas in buckets.canvases for side in canvas) and len(set(buckets.canvases)) == len(buckets.canvases)
  assert [h * w for h, w in buckets.canvases] == sorted(h * w for h, w in buckets.canvases)
  assert np.bincount(buckets.of).min() >= min(batch, n), "each canvas fills a batch"
  content = sum(h * w for h, w in contents)
  assert buckets.padding == pytest.approx(1 - content / best)
  assert buckets.square_padding == pytest.approx(1 - content / (n * up(bounds[1]) ** 2))


def test_canvases_of_a_set_that_is_easy_to_divide():
  """At 800 to 1333: 480x640 becomes 1066x800, 427x640 1199x800, portraits likewise, and 640x320 1333x666."""
  sizes = [(480, 640)] * 60 + [(427, 640)] * 20 + [(640, 480)] * 30 + [(320, 640)] * 4
  assert choose_buckets(sizes, 800, 1333, 3, 8).canvases == ((800, 1088), (1088, 800), (800, 1344))
  four = choose_buckets(sizes, 800, 1333, 4, 4)
  assert four.canvases == ((800, 1088), (1088, 800), (672, 1344), (800, 1216)) and np.bincount(four.of).tolist() == [60, 30, 4, 20]
  assert str(choose_buckets(sizes[:1], 800, 1333, 4, 8)) == \
    f"1 canvas: 1088x800; {1 - 1066 / 1088:.1%} of the pixels are padding; one square canvas would be {1 - 1066 * 800 / 1344 ** 2:.1%}"
  few = choose_buckets([(480, 640)] * 100 + [(640, 480)] * 3, 800, 1333, 5, 8)
  assert few.canvases == ((800, 1088), (1088, 1088)) and np.bincount(few.of).tolist() == [95, 8], "three portraits take five others along, not all"


def test_without_a_largest_side_there_is_one_canvas():
  buckets = Fit((64, 32)).buckets([(50, 80), (80, 50)], 5, 1)
  assert buckets.canvases == ((32, 64),) == (Fit((64, 32)).canvas(),) == Fit((64, 32)).canvases() and buckets.of.tolist() == [0, 0]
  assert Fit((800, 800), 1333).canvases() == ((800, 1344), (1344, 800)) and Fit((800, 800), 1333).canvas() == (1344, 1344)


def test_data_sets_know_their_sizes_without_decoding(tmp_path):
  folder = write_coco(tmp_path / "d", 6)
  for dataset in (open_dataset(folder, "train"), Shapes("val", size=40, count=5), Subset(open_dataset(folder, "val"), 3), Subset(Shapes(size=32), 4)):
    assert [tuple(map(int, size)) for size in dataset.sizes] == [dataset[i].original_size for i in range(len(dataset))]

# ---- the order of an epoch


CANVASES = ((32, 64), (64, 32), (64, 64), (32, 160), (64, 160))
orders = st.integers(1, 60).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.lists(st.integers(0, 4), min_size=n, max_size=n)))


@settings(deadline=None)
@given(orders, st.integers(1, 7), st.integers(1, 5), st.integers(0, 99))
def test_an_epoch_takes_each_picture_once_and_each_batch_has_one_canvas(drawn, batch_size, count, seed):
  order, of = np.array(drawn[0]), np.array(drawn[1]) % count
  buckets = Buckets(CANVASES[:count], of, 0, 0)
  whole, full = buckets.batches(order, batch_size, False), buckets.batches(order, batch_size, True)
  assert sorted(np.concatenate([pictures for _, pictures in whole]).tolist()) == list(range(len(of)))
  taken = [i for _, pictures in full for i in pictures.tolist()]
  assert len(set(taken)) == len(taken) and {len(pictures) for _, pictures in full} <= {batch_size}
  for canvas, pictures in whole + full:
    assert all(np.less_equal(CANVASES[c], canvas).all() for c in of[pictures]), "its canvas holds all of a batch"
  canvases = CANVASES[:count]
  largest = [c for c in canvases if not any(d != c and np.less_equal(c, d).all() for d in canvases)]
  assert len(of) - len(taken) <= len(largest) * (batch_size - 1)
  assert sum(len(pictures) < batch_size for _, pictures in whole) <= len(largest)
  if any(canvas == canvases[-1] for canvas, _ in full): assert full[0][0] == canvases[-1], "memory that suffices for the first suffices for all"
  other = buckets.batches(np.random.default_rng(seed).permutation(len(of)), batch_size, True)
  assert sorted(c for c, _ in other) == sorted(c for c, _ in full), "an epoch's length does not depend on its order"


def test_canvases_are_mixed_and_nothing_is_always_left_out():
  buckets = Buckets(((32, 64), (64, 32)), (np.arange(100) >= 45).astype(int), 0, 0)
  seen, runs, mates = np.zeros(100, int), [], set()
  for epoch in range(40):
    batches = buckets.batches(np.random.default_rng(epoch).permutation(100), 8, True)
    assert len(batches) == 45 // 8 + 55 // 8
    for _, pictures in batches:
      seen[pictures] += 1
      mates.add(tuple(sorted(pictures.tolist())))
    runs.append([canvas for canvas, _ in batches])
  assert len({tuple(run) for run in runs}) > 20 and seen.min() >= 25 and len(mates) == 40 * 11, "no batch twice"


def test_one_bucket_is_the_order_without_buckets():
  dataset, options = Shapes("train", count=22, size=48), {"seed": 3, "shuffle": True}
  for drop_last in (True, False):
    plain, bucket = (Loader(dataset, 4, compose(), drop_last=drop_last, buckets=b, **options) for b in (None, one_bucket(22, (48, 48))))
    assert len(plain) == len(bucket)
    for a, b in zip(plain.epoch(2), bucket.epoch(2), strict=True): assert same(a, b)


def same(one, other) -> bool:
  return all(a.dtype == b.dtype and a.shape == b.shape and (a == b).all() for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def write_coco(folder: Path, count: int, shapes=((64, 96), (96, 64), (60, 80), (62, 93), (93, 62), (90, 66))) -> Path:
  """`count` pictures each for training and validation, of sizes taken in turn, a bright rectangle on each."""
  (folder / "annotations").mkdir(parents=True)
  for split in ("train", "val"):
    (folder / split).mkdir()
    rng, images, annotations = np.random.default_rng(len(split)), [], []
    for i in range(count):
      h, w = shapes[i % len(shapes)]
      x, y, width, height = (int(v) for v in (rng.integers(2, w // 3), rng.integers(2, h // 3), rng.integers(20, w // 2), rng.integers(20, h // 2)))
      pixels = rng.integers(0, 60, (h, w, 3), np.uint8)
      pixels[y:y + height, x:x + width] = (220, 180, 40)
      Image.fromarray(pixels).save(folder / split / f"{i:03}.png")
      images.append({"id": i + 1, "file_name": f"{i:03}.png", "height": h, "width": w})
      annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "patch"}]}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
  return folder


def test_a_loader_pads_each_batch_to_its_canvas_whatever_loads_it(tmp_path):
  dataset = open_dataset(write_coco(tmp_path / "d", 40, shapes=((64, 96), (96, 64), (60, 80), (60, 60))), "train")
  fit = compose(resize_shorter(64, 96), photometric_jitter(), horizontal_flip())
  buckets = choose_buckets(dataset.sizes, 64, 96, 3, 4)
  assert len(buckets.canvases) == 3
  options = {"seed": 4, "shuffle": True, "drop_last": True, "buckets": buckets}
  plain = Loader(dataset, 4, fit, **options)
  expected = {epoch: list(plain.epoch(epoch)) for epoch in (0, 1)}
  assert len(expected[0]) == len(expected[1]) == len(plain) and {b.images.shape[1:3] for b in expected[0]} == set(buckets.canvases)
  assert [b.image_ids.tolist() for b in expected[0]] != [b.image_ids.tolist() for b in expected[1]]
  for at, batch in enumerate(expected[1]):
    canvas = batch.images.shape[1:3]
    assert plain.names(1, at) == [dataset.image_name(i - 1) for i in batch.image_ids]
    for row, image_id in enumerate(batch.image_ids.tolist()):
      alone = pad_to(*canvas)(fit(dataset[image_id - 1], np.random.default_rng((4, 1, image_id - 1))), None)
      np.testing.assert_array_equal(batch.images[row], alone.image)
      assert tuple(batch.sizes[row]) == alone.content_size and (batch.boxes[row, :len(alone.boxes)] == alone.boxes).all()
  assert all(same(a, b) for a, b in zip(plain.epoch(1, start=3), expected[1][3:], strict=True))
  loader = Loader(dataset, 4, fit, workers=2, **options)
  for epoch in (0, 1):
    assert all(same(a, b) for a, b in zip(list(loader.epoch(epoch)), expected[epoch], strict=True)), "kept, so that a slot used twice would show"
  assert all(same(a, b) for a, b in zip(loader.epoch(1, start=5), expected[1][5:], strict=True))
  loader.close()

  whole = Loader(dataset, 7, resize_shorter(64, 96), buckets=choose_buckets(dataset.sizes, 64, 96, 3, 7))
  found = list(whole.epoch(0))
  assert sorted(i for b in found for i in b.image_ids.tolist() if i >= 0) == list(range(1, 41)) and len(found) == len(whole)
  for batch in found:
    blank = batch.image_ids < 0
    assert (batch.sizes[blank] == batch.images.shape[1:3]).all() and not batch.images[blank].any() and (batch.labels[blank] == -1).all()

# ---- the graphs


def small_step(accumulate):
  """A step of two convolutions, another of the same weights and optimiser, and their state."""
  rng = np.random.default_rng(0)
  weights = {name: Tensor(rng.normal(0, 0.3, shape).astype(np.float32)) for name, shape in (("a", (4, 3, 3, 3)), ("b", (2, 4, 3, 3)))}
  optimizer = Optimizer(weights, "adam", schedule("constant", 1e-2, 100), accumulate=accumulate)
  state = {**weights, **optimizer.state()}
  Tensor.realize(*state.values())

  def losses(images, targets):
    found = images.conv2d(weights["a"], stride=2).relu().conv2d(weights["b"]).mean((2, 3))
    return {"loss": (found - targets).square().mean(), "found": found.mean()}
  return [make_step(losses, optimizer, [], accumulate) for _ in range(2)], state


def step_batches():
  rng = np.random.default_rng(5)
  for shape in ((16, 24), (24, 16), (24, 16), (16, 24), (24, 16), (16, 24)):
    yield shape, tuple(Tensor(rng.standard_normal(s).astype(np.float32)).realize() for s in ((2, 3, *shape), (2, 2)))


def test_a_step_on_two_canvases_is_one_step():
  """Weights and optimiser are the same to all graphs: a step of its own for each canvas on shared state gives the same numbers."""
  (one, _), state = small_step(1)
  logs = [one(*tensors)() for _, tensors in step_batches()]
  (flat, upright), reference = small_step(1)
  for (shape, tensors), log in zip(step_batches(), logs, strict=True): assert (flat if shape == (16, 24) else upright)(*tensors)() == log
  for key, tensor in state.items(): np.testing.assert_array_equal(tensor.numpy(), reference[key].numpy())
  assert len({log["loss"] for log in logs}) == 6


def test_gradients_of_two_canvases_are_averaged():
  (one, _), state = small_step(2)
  (two, _), reference = small_step(2)
  for _, tensors in step_batches(): one(*tensors)()
  batches = [tensors for _, tensors in step_batches()]
  for i in (1, 0, 3, 2, 5, 4): two(*batches[i])()   # each pair the other way around: the same mean
  assert int(state["steps"].item()) == 3
  for key, tensor in state.items(): np.testing.assert_allclose(tensor.numpy(), reference[key].numpy(), rtol=1e-4, atol=1e-6)


def test_graphs_of_one_function_share_their_memory():
  weight = Tensor(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)).realize()
  @jit
  def f(x):
    y = x
    for _ in range(3): y = (y @ weight).relu().contiguous()
    return y.sum(1).contiguous()
  inputs = [Tensor(np.random.default_rng(n).normal(size=(n, 8)).astype(np.float32)).realize() for n in (8192, 6144, 4096)]
  before, used, results = GlobalCounters.mem_used, [], []
  for _ in range(2):
    for x in inputs:
      results.append(f(x).numpy())
      used.append(GlobalCounters.mem_used - before)
  assert used[0] > 2 * 8192 * 8 * 4, "the largest comes first and needs two steps' results at a time"
  assert used[-1] - used[0] <= 2 * (6144 + 4096) * 4, "the others add no more than what they return"
  y = [x.numpy() for x in inputs]
  for _ in range(3): y = [np.maximum(a @ weight.numpy(), 0) for a in y]
  for found, expected in zip(results, [a.sum(1) for a in y] * 2, strict=True): np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)

# ---- the programs


def program(name, *flags):
  environ = {key: os.environ[key] for key in ("PATH", "HOME", "CC", "DEV", "NOOPT", "XDG_CACHE_HOME", "CACHEDB") if key in os.environ}
  done = subprocess.run([sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, flags)], stdin=subprocess.DEVNULL, text=True, check=False,
                        env=environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.mark.by_hand
def test_programs_train_score_and_detect_on_two_canvases(tmp_path):
  folder, run = write_coco(tmp_path / "d", 12), tmp_path / "runs" / "two"
  out = program("train_retinanet", "--data", folder, "--size", 64, "--max-size", 96, "--buckets", 2, "--backbone", "resnet10_quarter", "--bs", 3,
                "--weights", "shapes", "--trainable-layers", 0, "--optimizer", "sgd", "--epochs", 1, "--workers", 1, "--log-every", 1,
                "--pictures", 2, "--wandb", "disabled", "--out", run.parent, "--run-name", run.name)
  assert "at 64 to 96 pixels" in out and re.search(r"training on 2 canvases: (96x64, 64x96|64x96, 96x64); \d+\.\d% of the pixels are padding", out)
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  training = [line for line in lines if "train/loss" in line]
  assert [line["step"] for line in training] == [1, 2, 3, 4]
  assert all(math.isfinite(line["train/loss"]) for line in training)

  found = tmp_path / "found.json"
  scored = program("evaluate", "--weights", run, "--data", folder, "--bs", 3, "--buckets", 2, "--workers", 0, "--to-json", found,
                   "--score-threshold", 0.005)
  assert "2 canvases: " in scored
  detections = json.loads(found.read_text())
  assert len({d["image_id"] for d in detections}) == 12, "pictures of both canvases have detections"
  by_picture = {i: [d for d in detections if d["image_id"] == i] for i in range(1, 13)}
  def load(i): return np.asarray(Image.open(folder / "val" / f"{i:03}.png"))
  for i, (item, _, result) in enumerate(predictor(run, batch_size=3).stream(range(12), load, score_threshold=0.005)):
    assert item == i, "in order, though each batch has one canvas"
    expected = by_picture[i + 1]
    assert len(expected) == len(result.scores)
    np.testing.assert_allclose(result.scores, [d["score"] for d in expected], atol=1e-5)
    x, y, width, height = np.array([d["bbox"] for d in expected]).T
    np.testing.assert_allclose(result.boxes, np.stack([x, y, x + width, y + height], 1), atol=1e-2)

  taken = []
  def upright_first():
    for i in (1, *[0] * 40):
      taken.append(i)
      yield i
  next(predictor(run, batch_size=3).stream(upright_first(), load))
  assert len(taken) < 20, "a picture of a rare canvas does not wait for a whole batch of its like"
