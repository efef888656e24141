"""The step and the loop: one result however the batch is divided, whatever is saved and loaded in between, and a log that says what happened."""
import contextlib, math, signal
from types import SimpleNamespace
import numpy as np, pytest
from tinygrad import Device, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.detection.losses import detection_losses
from tinydet.detection.matcher import match
from tinydet.errors import UserError
from tinydet.nn import init
from tinydet.nn.layers import NORMS, Conv2d
from tinydet.training import optim
from tinydet.runtime import devices as parallel
from tinydet.training.loop import make_step, train
from tinydet.training.optim import Optimizer, schedule
from tinydet.runtime.devices import devices, replicate, to_devices
from tinydet.training.resume import Checkpoints, load_newest, open_run, restore, run_name
from tinydet.runtime.signals import Signals, Stopped
from tinydet.weights.weights import load_weights

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
  """A detector in training. `folder` is that of a run to go on with."""
  def __init__(self, norm="batch", *, names=(Device.DEFAULT,), accumulate=1, seed=0, folder=None, loss_scale=None, poison=lambda image: 0):
    self.model, self.names = Detector(norm), tuple(Device.canonicalize(name) for name in names)
    init.initialize(self.model, lambda key, shape: init.normal(0.1) if len(shape) == 4 else init.normalization(key), seed)
    tensors = get_state_dict(self.model)
    params, buffers = {k: t for k, t in tensors.items() if t.is_param}, [t for t in tensors.values() if not t.is_param]
    self.optimizer = Optimizer(params, "adam", schedule("step", 2e-3, 100, milestones=[2]), clip_norm=1.0, ema_decay=0.9,
                               accumulate=accumulate, loss_scale=loss_scale)
    self.metadata = {"step": 0}
    if folder is not None:
      state, self.metadata = load_newest(folder)
      restore(self.model, self.optimizer, state, "run")
    anchors = Tensor(ANCHORS)
    replicate([*tensors.values(), *self.optimizer.state().values(), anchors], self.names)

    def losses(images, boxes, labels):
      classification, regression = detection_losses(*self.model(images), anchors, *match(anchors, boxes, labels))
      classification = classification + poison(images)
      return {"loss": classification + regression, "classification": classification, "bbox_regression": regression}
    self.losses, self.step = losses, make_step(losses, self.optimizer, buffers, accumulate, self.metadata["step"])

  def __call__(self, arrays): return self.step(*(to_devices(a, self.names) for a in arrays))()

  def save(self, folder, step, **progress):
    checkpoints = Checkpoints(folder, self.model, self.optimizer, {"of": "a test"})
    checkpoints.save(step, {"evaluated": 0} | progress)
    checkpoints.finish()

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
    assert log.keys() == {"loss", "classification", "bbox_regression", "lr", "gradient_norm", "skipped"} and log["skipped"] == 0
    assert log["loss"] == pytest.approx(log["classification"] + log["bbox_regression"], rel=1e-6) and log["gradient_norm"] > 0
  assert [round(log["lr"], 9) for log in logs] == [2e-3, 2e-3] + [2e-4] * 4
  assert states[6]["norm.num_batches_tracked"] == 6 and states[6]["steps"] == 6
  assert all((states[1][key] != states[6][key]).any() for key in states[1] if key != "steps")


def test_one_seed_gives_one_run_and_a_saved_run_goes_on_exactly(six_steps, tmp_path):
  logs, states = six_steps
  before = Run()
  assert [before(batch) for batch in list(batches(3))] == logs[:3], "bit for bit"
  assert_same_state(before.state(), states[3])
  before.save(tmp_path, 3, window=[{"loss": 0.1}, {"loss": math.inf}])

  after = Run(seed=5, folder=tmp_path)
  assert after.metadata == {"of": "a test", "step": 3, "evaluated": 0, "window": [{"loss": 0.1}, {"loss": math.inf}]}
  assert_same_state(after.state(), states[3])
  assert [after(batch) for batch in list(batches(6))[3:]] == logs[3:]
  assert_same_state(after.state(), states[6])


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.by_hand)])
def test_devices_equal_one(count, six_steps):
  """Batch norm included: its statistics are those of the whole batch."""
  logs, states = six_steps
  run = Run(names=(Device.DEFAULT, *(f"{Device.DEFAULT}:{i}" for i in range(1, count))))
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
    for key in ("lr", "gradient_norm", "skipped"): assert second[key] == pytest.approx(expected[key], rel=1e-5)
  for key, value in whole.state().items(): np.testing.assert_allclose(halves.state()[key], value, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("form", ["in C", "plain", "accumulated"])
def test_what_the_loss_does_not_depend_on_stays(kind, form, monkeypatch):
  """As torch leaves a parameter that has no gradient: no decay, no moments; the others learn."""
  if form == "plain": monkeypatch.setattr("tinydet.training.optim.fits", lambda *tensors: False)
  rng = np.random.default_rng(0)
  values = {name: rng.standard_normal((6, 4)).astype(np.float32) for name in ("used", "idle", "other")}
  params = {name: Tensor(value.copy()).contiguous().realize().is_param_() for name, value in values.items()}
  count = 2 if form == "accumulated" else 1
  optimizer = Optimizer(params, kind, schedule("constant", 0.1, 9), weight_decay=0.3, ema_decay=0.9, accumulate=count)
  step = make_step(lambda x: {"loss": (x @ params["used"] * params["other"].sum()).square().mean()}, optimizer, [], count)
  for _ in range(3 * count): log = step(Tensor(rng.standard_normal((5, 6)).astype(np.float32)).realize())()
  assert math.isfinite(log["gradient_norm"]) and log["gradient_norm"] > 0 and optimizer.idle == {"idle"}
  np.testing.assert_array_equal(params["idle"].numpy(), values["idle"])
  np.testing.assert_array_equal(optimizer.ema["idle"].numpy(), values["idle"])
  assert not optimizer.first["idle"].numpy().any()
  assert all((params[name].numpy() != values[name]).all() for name in ("used", "other"))


def test_an_update_that_is_not_finite_changes_nothing():
  """Weights, statistics, moments, average and count stay as they were; the next step is the one that would have been."""
  run, clean = Run(poison=lambda images: (images.max() > 90).where(math.nan, 0.0)), Run()
  (first, second), bad = list(batches(2)), next(batches(1))
  bad[0][0, 0, 0, 0] = 99.0   # poisons the loss alone: activations and running statistics are finite
  assert run(first)["loss"] == clean(first)["loss"]
  before = run.state()
  log = run(bad)
  assert math.isnan(log["loss"]) and log["skipped"] == 1
  after = run.state()
  for key in before:
    if "running" not in key and "tracked" not in key: np.testing.assert_array_equal(after[key], before[key], err_msg=key)
  bad[0][0, 0, 0, 0] = math.inf
  assert run(bad)["skipped"] == 1
  assert all(np.isfinite(value).all() for value in run.state().values())
  assert run(second)["skipped"] == 0 and run.state()["steps"] == 2


def test_sums_that_are_not_finite_change_nothing():
  """A loss that is not finite though its gradient is, in the first of two steps whose gradients are added up."""
  run = Run("frozen", accumulate=2, poison=lambda images: (images.max() > 90).where(math.nan, 0.0))
  bad, good = list(batches(2))
  bad[0][0, 0, 0, 0] = 99.0
  before = run.state()
  assert math.isnan(run(bad)["loss"]) and run(good)["skipped"] == 1
  after = run.state()
  for key in before: np.testing.assert_array_equal(after[key], before[key], err_msg=key)


def test_the_loss_scale_changes_no_update_and_adapts(monkeypatch):
  """Powers of two in float32 are exact, so that a scaled run equals the plain one."""
  monkeypatch.setattr(optim, "SCALE_STEPS", 3)
  plain, scaled = Run("frozen"), Run("frozen", loss_scale=2.0 ** 10, poison=lambda images: (images.max() > 90).where(math.inf, 0.0))
  for batch in batches(2):
    expected, log = plain(batch), scaled(batch)
    assert log["loss_scale"] == 1024 and log["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-5)
  for key, value in plain.state().items(): np.testing.assert_allclose(scaled.state()[key], value, rtol=1e-5, atol=1e-7, err_msg=key)
  bad = next(batches(1))
  bad[0][0, 0, 0, 0] = 99.0
  assert scaled(bad)["skipped"] == 1 and scaled.state()["loss_scale"].tolist() == [512, 0]
  scales = []
  for batch in batches(4):
    scaled(batch)
    scales.append(scaled.state()["loss_scale"].tolist())
  assert scales == [[512, 1], [512, 2], [1024, 0], [1024, 1]]


# ------------------------------------------------------------------------------------------------------------------------------ the loop


class Fake:
  """A loader, a tracker, checkpoints and a step that keep account of what they were asked."""
  batch_size = 2

  def __init__(self, losses=lambda step: 1.0 / step, due=lambda step: False, fails_at=None):
    self.losses, self.due, self.fails_at, self.steps, self.signals = losses, due, fails_at, 0, Signals()
    self.lines, self.asked, self.seen, self.saved = [], [], [], []

  def __len__(self): return 5

  def epoch(self, e, start=0):
    self.asked.append((e, start))
    for i in range(start, 5):
      if self.fails_at == 10 * e + i: raise UserError("picture 7 is gone")
      yield SimpleNamespace(image_ids=np.array([10 * e + i, 99]))

  def names(self, epoch, batch): return [f"{epoch}/{batch}/a.jpg", f"{epoch}/{batch}/b.jpg"]

  def log(self, metrics, step, epoch): self.lines.append((step, epoch, metrics))

  def save(self, step, progress): self.saved.append((step, progress["evaluated"], [s["loss"] for s in progress["window"]]))

  def step(self, *tensors):
    self.steps, self.seen = self.steps + 1, [*self.seen, tensors[0]]
    scalars = {"loss": self.losses(self.steps)} | ({"lr": 0.5} if self.steps % 2 == 0 else {})
    return lambda: scalars

  def train(self, **options):
    return train(self.step, self, lambda batch: (int(batch.image_ids[0]),), self, self, self.signals, **options)


def at(step, **more): return {"step": step, "evaluated": step // 5, "window": [], "skipped": 0} | more


def test_train_logs_means_over_windows():
  fake, ends = Fake(), []
  assert fake.train(epochs=2, log_every=3, after_epoch=lambda epoch, done: ends.append((epoch, done))) == 10
  assert fake.seen == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14] and fake.asked == [(0, 0), (1, 0)] and ends == [(1, 5), (2, 10)]
  assert [(step, epoch) for step, epoch, _ in fake.lines] == [(3, 0.6), (5, 1.0), (8, 1.6), (10, 2.0)]   # an epoch's end closes the window
  for (_, _, metrics), steps in zip(fake.lines, ((1, 2, 3), (4, 5), (6, 7, 8), (9, 10))):
    assert metrics["train/loss"] == pytest.approx(np.mean([1 / s for s in steps])) and metrics["train/lr"] == 0.5
    assert metrics["train/images_per_s"] > 0 and "train/memory" in metrics
  assert fake.saved == [], "nothing was due, and after_epoch had nothing to do"


def test_a_forecast_is_made_of_each_speed(capsys):
  asked = []
  def forecast(done, speed):
    asked.append((done, speed))
    return {"train/hours_to_target": 1 / done}, "about an hour" if len(asked) == 1 else ""
  fake = Fake()
  fake.train(epochs=2, log_every=3, forecast=forecast)
  assert [done for done, _ in asked] == [line[1] for line in fake.lines if "train/images_per_s" in line[2]] and len(asked) > 1
  for (done, speed), (*_, metrics) in zip(asked, fake.lines, strict=True):
    assert metrics["train/images_per_s"] == speed and metrics["train/hours_to_target"] == 1 / done
  assert capsys.readouterr().out.count("about an hour\n") == 1


def test_train_starts_in_the_midst_and_ends_when_told():
  fake = Fake()
  assert fake.train(epochs=9, start=at(7), after_epoch=lambda epoch, done: epoch == 3) == 15
  assert fake.asked == [(1, 2), (2, 0)] and fake.seen == [12, 13, 14, 20, 21, 22, 23, 24]
  assert fake.saved == [(10, 2, []), (15, 3, [])]
  assert Fake().train(epochs=2, start=at(10)) == 10, "nothing is left to do"


def test_a_window_of_the_log_outlasts_an_interruption():
  fake = Fake(due=lambda step: step == 7)
  fake.train(epochs=2, log_every=5)
  assert fake.saved == [(7, 1, [1 / 6, 1 / 7])]
  again = Fake(lambda step: 1 / (step + 7))
  again.train(epochs=2, log_every=5, start=at(7, window=[{"loss": 1 / 6}, {"loss": 1 / 7, "lr": 0.5}]))
  assert again.lines[0][:2] == fake.lines[1][:2] == (10, 2.0)
  assert again.lines[0][2]["train/loss"] == fake.lines[1][2]["train/loss"]


def test_an_evaluation_that_is_due_is_made_up_for():
  ends = []
  fake = Fake()
  fake.train(epochs=2, start=at(5, evaluated=0), after_epoch=lambda epoch, done: bool(ends.append((epoch, done))))
  assert ends == [(1, 5), (2, 10)] and fake.saved == [(5, 1, []), (10, 2, [])]


class Later:
  """An evaluation that is done once the step `at` is, or is waited for."""
  def __init__(self, fake, name, at, ends=False): self.fake, self.name, self.at, self.ends = fake, name, at, ends

  def ready(self): return self.fake.steps >= self.at

  def finish(self):
    self.fake.finished.append((self.name, self.fake.steps))
    return self.ends


def later(fake, *at, ends=()):
  """An `after_epoch` whose evaluations are done at these steps."""
  fake.finished = []
  return lambda epoch, done: Later(fake, epoch, at[epoch - 1], epoch in ends)


def test_an_evaluation_may_go_on_during_the_next_epoch():
  fake = Fake(due=lambda step: True)
  assert fake.train(epochs=3, after_epoch=later(fake, 8, 99, 99)) == 15
  assert fake.finished == [(1, 8), (2, 15), (3, 15)], "when it is ready, before the next evaluation, or at the end"
  # until it is finished the checkpoint of its weights, which says that it is to be done, stays the last
  assert [saved[:2] for saved in fake.saved] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (5, 0), (8, 1), (9, 1), (10, 1), (10, 1), (15, 2), (15, 3)]


@pytest.mark.parametrize(("at", "ended"), [((7, 99), 7), ((99, 99), 10), ((99, 8), 10)])
def test_a_target_that_is_reached_later_ends_the_run(at, ended):
  fake = Fake()
  assert fake.train(epochs=3, after_epoch=later(fake, *at, 99, ends=(1,))) == ended == fake.finished[0][1] == fake.steps
  assert fake.saved[-1][:2] == (ended, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_checkpoint_that_is_asked_for_waits_for_the_evaluation(number):
  fake = Fake()
  def losses(step):
    if step == 7: signal.raise_signal(number)
    return 1 / step
  fake.losses = losses
  with fake.signals, contextlib.suppress(Stopped): fake.train(epochs=2, after_epoch=later(fake, 99, 99))
  assert fake.finished[0] == (1, 7) and [saved[:2] for saved in fake.saved[:2]] == [(5, 0), (7, 1)]
  assert fake.steps == (7 if number == signal.SIGTERM else 10)


def test_an_evaluation_that_was_under_way_is_repeated():
  fake, ends = Fake(fails_at=13), []
  with pytest.raises(UserError): fake.train(epochs=2, after_epoch=later(fake, 99, 99))
  assert fake.finished == [(1, 8)] and fake.saved[-1][:2] == (8, 1), "data that fails costs no evaluation"
  Fake().train(epochs=2, start=at(5, evaluated=fake.saved[0][1]), after_epoch=lambda epoch, done: ends.append((epoch, done)))
  assert ends == [(1, 5), (2, 10)], "from the checkpoint that was written before"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_between_two_steps(number):
  fake = Fake()
  def losses(step):
    if step == 3: signal.raise_signal(number)
    return 1 / step
  fake.losses = losses
  with fake.signals, pytest.raises(Stopped) as e: fake.train(epochs=2)
  assert e.value.code == 128 + number and fake.steps == 3 and fake.saved == [(3, 0, [1, 1 / 2, 1 / 3])]


def test_a_signal_within_an_evaluation():
  fake = Fake()
  def after_epoch(epoch, done):
    signal.raise_signal(signal.SIGTERM)
    fake.signals.raise_if_stopped()
  with fake.signals, pytest.raises(Stopped): fake.train(epochs=2, after_epoch=after_epoch)
  assert fake.saved == [(5, 0, [])], "the evaluation is still to be done"


def test_an_evaluation_that_fails_costs_no_step():
  fake = Fake()
  def after_epoch(epoch, done): raise UserError("no such picture")
  with pytest.raises(UserError, match="no such picture"): fake.train(epochs=2, after_epoch=after_epoch)
  assert [step for step, *_ in fake.saved] == [5]
  ends = []
  Fake().train(epochs=2, start=at(5, evaluated=fake.saved[0][1]), after_epoch=lambda epoch, done: bool(ends.append((epoch, done))))
  assert ends == [(1, 5), (2, 10)], "the evaluation is made up for"


def test_sigusr1_saves_and_goes_on():
  fake = Fake()
  def losses(step):
    if step == 2: signal.raise_signal(signal.SIGUSR1)
    return 1 / step
  fake.losses = losses
  with fake.signals: assert fake.train(epochs=1) == 5
  assert fake.saved == [(2, 0, [1, 1 / 2])]


def test_data_that_fails_costs_no_step():
  fake = Fake(fails_at=13)
  with pytest.raises(UserError, match="picture 7 is gone"): fake.train(epochs=2)
  assert fake.steps == 8 and fake.saved == [(8, 1, [1 / 6, 1 / 7, 1 / 8])] and [line[0] for line in fake.lines] == [5]
  fake = Fake(fails_at=0)
  with pytest.raises(UserError, match="picture 7 is gone"): fake.train(epochs=2)
  assert fake.saved == []


@pytest.mark.parametrize("error", [MemoryError("Tried to allocate 9.0 GB"), RuntimeError("CUDA Error 2, out of memory")])
def test_memory_that_runs_out_is_one_line(error):
  fake = Fake()
  def losses(step): raise error
  fake.losses = losses
  line = r"^memory ran out at --bs 2, with \d+\.\d GB in use on the device: --bs 1 with --accumulate 2 learns the same$"
  with pytest.raises(UserError, match=line):
    fake.train(epochs=1)
  def other(step): raise RuntimeError("a bug")
  fake.losses = other
  with pytest.raises(RuntimeError, match="a bug"): fake.train(epochs=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_steps_that_are_not_finite(value, capsys):
  fake = Fake(lambda step: value if step in (2, 3) else 1.0)
  assert fake.train(epochs=1, max_skipped=3, log_every=3) == 5
  assert [line[2]["train/loss"] for line in fake.lines] == [1.0, 1.0], "the mean of what is finite"
  assert f"step 2: loss {value}: its update is skipped" in capsys.readouterr().err
  fake = Fake(lambda step: value if step > 2 else 1.0)
  with pytest.raises(UserError, match=rf"^3 steps in a row were not finite; the last, 10, had loss {value}: layer4 broke "
                                      r"\(pictures: 1/4/a.jpg, 1/4/b.jpg\); lower --lr") as e:
    fake.train(epochs=2, start=at(5), max_skipped=3, explain=lambda *tensors: "layer4 broke" if tensors == (14,) else "other tensors")
  assert "\n" not in str(e.value) and fake.saved == []


# ------------------------------------------------------------------------------------------------------------------------------ weights


def test_weights_of_a_run_are_its_average(tmp_path):
  run = Run()
  state = get_state_dict(run.model)
  for t in run.optimizer.ema.values(): init.set_values(t, np.full(t.shape, 0.5))
  init.set_values(state["norm.running_mean"], np.full(16, 0.25))
  run.save(tmp_path, 0)
  other = Detector("batch")
  init.initialize(other, lambda key, shape: init.constant(0.0))
  assert load_weights(str(tmp_path / "checkpoint-0.safetensors"), other) == []
  expected = {"norm.running_mean": 0.25, "norm.running_var": 1.0, "norm.num_batches_tracked": 0.0}
  for key, t in get_state_dict(other).items(): assert (t.numpy() == expected.get(key, 0.5)).all(), key


def test_runs_of_another_network(tmp_path):
  run = Run()
  with pytest.raises(UserError, match=r"the run: is of another network or optimiser; 1 tensors differ, model\.odd for example"):
    restore(run.model, run.optimizer, {f"model.{k}": t.numpy() for k, t in get_state_dict(run.model).items()} |
            {f"optimizer.{k}": t.numpy() for k, t in run.optimizer.state().items()} | {"model.odd": np.zeros(1)}, "the run")
  run.save(tmp_path, 0)
  wider = Run()
  wider.model.cls_logits.bias = Tensor.zeros(5).contiguous()
  before = wider.model.stem.weight.numpy()
  with pytest.raises(UserError, match=r"model\.cls_logits\.bias has shape \(27,\), this run needs \(5,\)"):
    restore(wider.model, wider.optimizer, load_newest(tmp_path)[0], "the run")
  np.testing.assert_array_equal(wider.model.stem.weight.numpy(), before)


def test_checkpoints(tmp_path, capsys):
  """What was saved is what was there, whatever the next step does while it is written; the last ones stay; damage costs one checkpoint."""
  run, states = Run(), {}
  checkpoints = Checkpoints(tmp_path, run.model, run.optimizer, {}, keep=2, every_steps=2)
  assert [checkpoints.due(step) for step in range(1, 5)] == [False, True, False, True]
  for step, batch in enumerate(batches(4), 1):
    run(batch)
    states[step] = run.state()
    checkpoints.save(step, {"evaluated": 0})
    checkpoints.save(step, {"evaluated": 0})
  checkpoints.finish()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3.safetensors", "checkpoint-4.safetensors"]

  (tmp_path / ".checkpoint-9.safetensors.abc.partial").write_bytes(b"half")
  newest = tmp_path / "checkpoint-4.safetensors"
  content = bytearray(newest.read_bytes())
  content[len(content) // 2] ^= 4
  newest.write_bytes(content)
  tensors, metadata = load_newest(tmp_path)
  assert metadata["step"] == 3 and sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3.safetensors", "checkpoint-4.safetensors"], "and stays"
  warning = capsys.readouterr().err
  assert warning.count("\n") == 1
  for words in ("checkpoint-4.safetensors", "checksum", "the checkpoint before it is used"): assert words in warning
  for key, value in states[3].items():
    np.testing.assert_array_equal(tensors[f"optimizer.{key}" if key in run.optimizer.state() else f"model.{key}"], value, err_msg=key)


def test_names_and_places_of_runs(tmp_path):
  assert [run_name(None, data, "resnet18") for data in ("shapes:2", "/x/my pictures/", ".hidden")] == \
    ["shapes-2-resnet18", "my-pictures-resnet18", "hidden-resnet18"]
  assert run_name("mine", "x", "y") == "mine"
  for name in ("../up", "", "a/b", ".hidden"):
    with pytest.raises(UserError, match="run name"): open_run(None, str(tmp_path), name)
  assert open_run(None, str(tmp_path), "a") == open_run("auto", str(tmp_path), "a") == (tmp_path/"a", None, {}, None) and not list(tmp_path.iterdir())
  with pytest.raises(UserError, match="is no folder"): open_run(str(tmp_path/"a"), "runs", "a")
  (tmp_path/"a").mkdir()
  with pytest.raises(UserError, match="no whole checkpoint"): open_run(str(tmp_path/"a"), "runs", "b")
  folder, lock, tensors, metadata = open_run("auto", str(tmp_path), "a")
  assert (folder, tensors, metadata) == (tmp_path/"a", {}, {})
  with pytest.raises(UserError, match="another process is running there"): open_run("auto", str(tmp_path), "a")
  lock.close()


def test_a_checkpoint_that_cannot_be_written_costs_the_run_nothing(tmp_path, capsys, monkeypatch):
  run = Run()
  checkpoints = Checkpoints(tmp_path / "file", run.model, run.optimizer, {})
  (tmp_path / "file").write_text("not a folder")
  checkpoints.save(1, {"evaluated": 0})
  with pytest.raises(UserError, match=r"the last checkpoint is missing: cannot write .*checkpoint-1\.safetensors"): checkpoints.finish()
  assert "the run goes on, the checkpoint before stays" in capsys.readouterr().err
  checkpoints.folder = tmp_path
  checkpoints.save(2, {"evaluated": 0})
  checkpoints.finish()
  assert load_newest(tmp_path)[1]["step"] == 2


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
