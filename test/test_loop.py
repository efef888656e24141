"""The step and the loop: one result however the batch is divided, whatever is saved and loaded in between, and a log that says what happened."""
from types import SimpleNamespace
import numpy as np, pytest
from tinygrad import Device, Tensor
from tinygrad.nn.state import get_state_dict
from extra.detection.losses import detection_losses
from extra.detection.matcher import match
from extra.errors import UserError
from extra.nn import init
from extra.nn.layers import NORMS, Conv2d
from extra.training import parallel
from extra.training.loop import make_step, train
from extra.training.optim import Optimizer, schedule
from extra.training.parallel import devices, replicate, to_devices
from extra.training.weights import load_run, load_weights, save_run, save_weights

SIDE, BATCH, CLASSES = 16, 4, 3
corners = np.random.default_rng(0).uniform(0, 8, (4 * 4 * 9, 2))
ANCHORS = np.concatenate([corners, corners + 6], 1).astype(np.float32)


class Detector:
  """As small as a detector gets: a stem with a norm, two convolutions of one shape, and one for each head."""
  def __init__(self, norm):
    self.stem, self.norm = Conv2d(3, 16, 3, 2, 1, bias=False), NORMS[norm](16)
    self.conv = [Conv2d(16, 16, 3, 1, 1), Conv2d(16, 16, 3, 1, 1)]
    self.cls_logits, self.bbox_reg = Conv2d(16, 9 * CLASSES, 3, 2, 1), Conv2d(16, 9 * 4, 3, 2, 1)

  def __call__(self, x):
    x = self.norm(self.stem(x)).relu().contiguous()
    for conv in self.conv: x = conv(x).relu().contiguous()
    return [head(x).contiguous().permute(0, 2, 3, 1).reshape(x.shape[0], -1, n) for head, n in ((self.cls_logits, CLASSES), (self.bbox_reg, 4))]


def batches(count):
  for i in range(count):
    rng = np.random.default_rng((1, i))
    corner = rng.uniform(0, 8, (BATCH, 5, 2))
    boxes = np.concatenate([corner, corner + 6], -1).astype(np.float32)
    yield rng.standard_normal((BATCH, 3, SIDE, SIDE)).astype(np.float32), boxes, rng.integers(-1, CLASSES, (BATCH, 5)).astype(np.int32)


class Run:
  """A detector in training. `continue_from` is a file of `save_run`."""
  def __init__(self, norm="batch", *, names=(Device.DEFAULT,), accumulate=1, seed=0, continue_from=None):
    self.model, self.names = Detector(norm), tuple(Device.canonicalize(name) for name in names)
    init.initialize(self.model, lambda key, shape: init.normal(0.1) if len(shape) == 4 else init.normalization(key), seed)
    tensors = get_state_dict(self.model)
    params, buffers = {k: t for k, t in tensors.items() if t.is_param}, [t for t in tensors.values() if not t.is_param]
    self.optimizer = Optimizer(params, "adam", schedule("step", 2e-3, 100, milestones=[2]), clip_norm=1.0, ema_decay=0.9)
    self.metadata = None if continue_from is None else load_run(continue_from, self.model, self.optimizer)
    anchors = Tensor(ANCHORS)
    replicate([*tensors.values(), *self.optimizer.state().values(), anchors], self.names)

    def losses(images, boxes, labels):
      classification, regression = detection_losses(*self.model(images), anchors, *match(anchors, boxes, labels))
      return {"loss": classification + regression, "classification": classification, "bbox_regression": regression}
    self.step = make_step(losses, self.optimizer, buffers, accumulate)

  def __call__(self, arrays): return self.step(*(to_devices(a, self.names) for a in arrays))()

  def state(self): return {k: t.numpy().copy() for k, t in (get_state_dict(self.model) | self.optimizer.state()).items()}


@pytest.fixture(scope="module")
def six_steps():
  """What six steps on one device log, and the state after the third and the last."""
  run, logs, states = Run(), [], {}
  for i, batch in enumerate(batches(6), 1):
    logs.append(run(batch))
    states[i] = run.state()
  return logs, states


def assert_same_state(found, expected):
  assert found.keys() == expected.keys()
  for key, value in expected.items(): np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_a_step_learns_and_logs(six_steps):
  logs, states = six_steps
  for log in logs:
    assert log.keys() == {"loss", "classification", "bbox_regression", "lr", "gradient_norm"}
    assert log["loss"] == pytest.approx(log["classification"] + log["bbox_regression"], rel=1e-6) and log["gradient_norm"] > 0
  assert [round(log["lr"], 9) for log in logs] == [2e-3, 2e-3] + [2e-4] * 4
  assert states[6]["norm.num_batches_tracked"] == 6 and states[6]["steps"] == 6
  assert all((states[1][key] != states[6][key]).any() for key in states[1] if key != "steps")


def test_one_seed_gives_one_run_and_a_saved_run_goes_on_exactly(six_steps, tmp_path):
  logs, states = six_steps
  before = Run()
  assert [before(batch) for batch in list(batches(3))] == logs[:3], "bit for bit"
  assert_same_state(before.state(), states[3])
  save_run(tmp_path / "checkpoint-3.safetensors", before.model, before.optimizer, {"epoch": 1, "best_mAP": 0.25})

  after = Run(seed=5, continue_from=tmp_path / "checkpoint-3.safetensors")
  assert after.metadata == {"epoch": 1, "best_mAP": 0.25}
  assert_same_state(after.state(), states[3])
  assert [after(batch) for batch in list(batches(6))[3:]] == logs[3:]
  assert_same_state(after.state(), states[6])


def test_two_devices_equal_one(six_steps):
  """Batch norm included: its statistics are those of the whole batch."""
  logs, states = six_steps
  run = Run(names=("CPU", "CPU:1"))
  for batch, expected in zip(batches(4), logs): assert run(batch) == pytest.approx(expected, rel=1e-5, abs=1e-6)
  for key, value in run.state().items(): np.testing.assert_allclose(value, states[4][key], rtol=1e-4, atol=1e-5, err_msg=key)
  np.testing.assert_allclose(run.state()["norm.running_var"], states[4]["norm.running_var"], rtol=1e-6)


def test_accumulated_halves_equal_the_whole():
  whole, halves = Run("frozen"), Run("frozen", accumulate=2)
  for images, boxes, labels in batches(3):
    expected = whole((images, boxes, labels))
    first, second = (halves((images[half], boxes[half], labels[half])) for half in (slice(0, 2), slice(2, 4)))
    assert first.keys() == {"loss", "classification", "bbox_regression"} and second.keys() == expected.keys()
    for key in first: assert (first[key] + second[key]) / 2 == pytest.approx(expected[key], rel=1e-5)
    for key in ("lr", "gradient_norm"): assert second[key] == pytest.approx(expected[key], rel=1e-5)
  for key, value in whole.state().items(): np.testing.assert_allclose(halves.state()[key], value, atol=1e-6, err_msg=key)


# ------------------------------------------------------------------------------------------------------------------------------ the loop


class Fake:
  """A loader, a tracker and a step that keep account of what they were asked."""
  batch_size = 2

  def __init__(self, losses=lambda step: 1.0 / step): self.losses, self.steps, self.lines, self.asked, self.seen = losses, 0, [], [], []
  def __len__(self): return 5

  def epoch(self, e, start=0):
    self.asked.append((e, start))
    return (SimpleNamespace(image_ids=np.array([10 * e + i, 99])) for i in range(start, 5))

  def log(self, metrics, step, epoch): self.lines.append((step, epoch, metrics))

  def step(self, *tensors):
    self.steps, self.seen = self.steps + 1, [*self.seen, tensors[0]]
    scalars = {"loss": self.losses(self.steps)} | ({"lr": 0.5} if self.steps % 2 == 0 else {})
    return lambda: scalars

  def train(self, **options): return train(self.step, self, lambda batch: (int(batch.image_ids[0]),), self, **options)


def test_train_logs_means_over_windows():
  fake, ends = Fake(), []
  assert fake.train(epochs=2, log_every=3, after_epoch=lambda epoch, done: ends.append((epoch, done))) == 10
  assert fake.seen == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14] and fake.asked == [(0, 0), (1, 0)] and ends == [(1, 5), (2, 10)]
  assert [(step, epoch) for step, epoch, _ in fake.lines] == [(3, 0.6), (5, 1.0), (8, 1.6), (10, 2.0)]   # an epoch's end closes the window
  for (_, _, metrics), steps in zip(fake.lines, ((1, 2, 3), (4, 5), (6, 7, 8), (9, 10))):
    assert metrics["train/loss"] == pytest.approx(np.mean([1 / s for s in steps])) and metrics["train/lr"] == 0.5
    assert metrics["train/images_per_s"] > 0 and "train/memory" in metrics


def test_train_starts_in_the_midst_and_ends_when_told():
  fake = Fake()
  assert fake.train(epochs=9, start=7, after_epoch=lambda epoch, done: epoch == 3) == 15
  assert fake.asked == [(1, 2), (2, 0)] and fake.seen == [12, 13, 14, 20, 21, 22, 23, 24]
  assert Fake().train(epochs=2, start=10) == 10, "nothing is left to do"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_train_ends_where_the_loss_is_no_number(value):
  fake = Fake(lambda step: value if step == 2 else 1.0)
  with pytest.raises(UserError, match=r"the loss is (nan|inf) at step 7 \(image ids \[11, 99\]\): lower --lr") as e: fake.train(epochs=2, start=5)
  assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------------------------------------ weights


def test_weights_of_a_run_are_its_average(tmp_path):
  run = Run()
  state = get_state_dict(run.model)
  for t in run.optimizer.ema.values(): init.assign(t, np.full(t.shape, 0.5))
  init.assign(state["norm.running_mean"], np.full(16, 0.25))
  save_run(tmp_path / "checkpoint-0.safetensors", run.model, run.optimizer, {})
  other = Detector("batch")
  init.initialize(other, lambda key, shape: init.constant(0.0))
  assert load_weights(str(tmp_path / "checkpoint-0.safetensors"), other) == []
  expected = {"norm.running_mean": 0.25, "norm.running_var": 1.0, "norm.num_batches_tracked": 0.0}
  for key, t in get_state_dict(other).items(): assert (t.numpy() == expected.get(key, 0.5)).all(), key


def test_runs_of_another_network(tmp_path):
  run = Run()
  save_weights(tmp_path / "weights.safetensors", get_state_dict(run.model), {})
  with pytest.raises(UserError, match="of another network or optimiser"): load_run(tmp_path / "weights.safetensors", run.model, run.optimizer)
  save_run(tmp_path / "run.safetensors", run.model, run.optimizer, {})
  wider = Run()
  wider.model.cls_logits.bias = Tensor.zeros(5).contiguous()
  before = wider.model.stem.weight.numpy()
  with pytest.raises(UserError, match=r"model\.cls_logits\.bias has shape \(27,\), this run needs \(5,\)"):
    load_run(tmp_path / "run.safetensors", wider.model, wider.optimizer)
  np.testing.assert_array_equal(wider.model.stem.weight.numpy(), before)


# ------------------------------------------------------------------------------------------------------------------------------ devices


class Absent:
  DEFAULT = "ABSENT"
  def __getitem__(self, name): raise RuntimeError("no driver\nand a long story")


def test_devices(monkeypatch):
  one, two = devices(1), devices(2)
  assert one == two[:1] == (Device.canonicalize(Device.DEFAULT),) and two[1] == f"{one[0].split(':')[0]}:1"
  monkeypatch.setattr(parallel, "Device", Absent())
  with pytest.raises(UserError) as e: devices(2)
  assert str(e.value) == "--gpus 2: device ABSENT cannot be opened (no driver)"
