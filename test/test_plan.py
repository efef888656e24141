"""What a run decides by itself: starting weights, warm-up, and what fits a time."""
import math, time
from types import SimpleNamespace
import numpy as np, pytest
from tinydet import detectors
from tinydet.datasets.fit import Fit
from tinydet.errors import UserError
from tinydet.runtime.memory import available
from tinydet.runtime.mpi import ALONE
from tinydet.training import plan, run as training_run
from tinydet.training.run import Run


def config(**given):
  usual = {"budget": 0.0, "size": (320, 320), "epochs": 24, "bs": 8, "eval_every": 1, "close_mosaic": 10, "warmup": 0.5, "accumulate": 1,
           "patience": 0, "preset": "folder", "weights": "auto", "data": ".", "stop_at_target": False, "target": None}
  return SimpleNamespace(**{"sources": dict.fromkeys(given, "--flag")} | usual | given)


def run(**given): return SimpleNamespace(ranks=ALONE, resumed=None, started=time.monotonic(), **given)


def test_times():
  assert [plan.seconds(text) for text in ("30m", "2h", "90s", "30", "1.5h", "10 min")] == [1800, 7200, 90, 1800, 5400, 600]
  assert all(plan.seconds(plan.show_seconds(value)) == value for value in (1800, 90, 0, 5400))
  for text in ("soon", "-3m", "m", "1d"):
    with pytest.raises(ValueError, match="such as 30m"): plan.seconds(text)


NETWORKS = {"processor": {"backbone": "small", "lr": 2e-3}, "gpu": {"backbone": "large", "lr": 1e-4}}


@pytest.mark.parametrize(("device", "given", "backbone", "lr"), [
  ("CPU", {}, "small", 2e-3), ("CL", {}, "large", 1e-4), ("CUDA:1", {"lr": 0.5}, "large", 0.5),
  ("CPU", {"backbone": "mine"}, "mine", 0.1), ("CPU", {"weights": "mine.pth"}, "usual", 0.1),
  ("CPU", {"weights": "mine.pth", "budget": 60.0}, "small", 2e-3), ("CPU", {"backbone": "mine", "budget": 60.0}, "mine", 2e-3)])
def test_a_folder_gets_a_network_that_its_device_can_train(device, given, backbone, lr, monkeypatch):
  monkeypatch.setattr(training_run, "default_device", lambda: device)
  settings = config(**{"lr": 0.1, "backbone": "usual"} | given)
  settings.sources = dict.fromkeys(given, "--flag")
  said = training_run.choose_network(settings, NETWORKS, "backbone")
  assert (settings.backbone, settings.lr) == (backbone, lr)
  assert said.startswith(f"network: {backbone}, ") == ("backbone" not in given and "weights" not in given), said
  settings = config(lr=0.1, backbone="usual", preset="demo", sources={})
  assert not training_run.choose_network(settings, NETWORKS, "backbone") and settings.backbone == "usual"


def test_the_best_weights_that_can_be_had(tmp_path, monkeypatch, capsys):
  """With an empty mirror nothing that is published can be had; what ships can."""
  monkeypatch.setenv("TINYDET_MIRROR", str(tmp_path))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  assert detectors.best_start("yolov8t")[0] == "shapes-yolo" and detectors.best_start("retinanet_resnet10_quarter_fpn")[0] == "shapes"
  name, why = detectors.best_start("retinanet_resnet50_fpn")
  assert name == "none" and why.index("coco (") < why.index("imagenet (") and "TINYDET_MIRROR" in why
  monkeypatch.setattr(detectors.weights, "find", lambda name, architecture: None)
  assert detectors.best_start("retinanet_resnet50_fpn_v2") == ("coco", "a detector of this network, mAP 41.5 on its own data")
  others = [detectors.best_start(name)[0] for name in ("retinanet_resnext50_32x4d_fpn", "retinanet_resnet18_fpn", "yolo11s")]
  assert others == ["mlperf", "imagenet", "yolo11s"]
  settings = config()
  plan.choose_weights(settings, run(), "yolov8t")
  assert settings.weights == "shapes-yolo" and capsys.readouterr().out == "weights: shapes-yolo, which ship with the code and know simple shapes\n"
  settings = config(weights="mine.pth")
  plan.choose_weights(settings, run(), "yolov8t")
  assert settings.weights == "mine.pth"


def test_a_warm_up_is_a_hundred_updates_or_a_tenth_of_the_run_and_a_quarter_at_most(capsys):
  for given, steps, wanted in (({}, 20, 2.4), ({}, 400, 0.5), ({"epochs": 100}, 20, 5), ({"accumulate": 2, "epochs": 100}, 20, 10),
                               ({"warmup": 3.0, "epochs": 4, "sources": {}}, 20, 1),
                               ({"warmup": 3.0, "sources": {}}, 400, 3), ({"epochs": 1}, 400, 0.25)):
    settings = config(**given)
    plan.steady_start(settings, run(), steps)
    assert settings.warmup == wanted
  settings = SimpleNamespace(**vars(config()) | {"warmup": 0.1, "sources": {"warmup": "--warmup"}})
  plan.steady_start(settings, run(), 20)
  assert settings.warmup == 0.1 and not capsys.readouterr().out


def test_a_warm_up_that_outlasts_the_run_is_told_of(capsys):
  for given in ({"sources": {"warmup": "--warmup"}}, {"preset": "coco"}):
    settings = SimpleNamespace(**vars(config()) | {"warmup": 3.0, "epochs": 3, "lr": 0.01} | given)
    plan.steady_start(settings, run(), 20)
    said = capsys.readouterr().out
    assert settings.warmup == 3 and said == "note: --warmup 3 is not over before the run of --epochs 3 is, so the rate stays below --lr 0.01\n"


class Pictures:
  def __init__(self, count: int): self.sizes = np.full((count, 2), (480, 640))
  def __len__(self) -> int: return len(self.sizes)


@pytest.mark.parametrize(("minutes", "wanted", "fewest"), [(300, (640, 480), 40), (30, (320, 256), 40), (2, (128, 96), 1)])
def test_a_plan_fills_its_time(monkeypatch, capsys, minutes, wanted, fewest):
  """A step of 8 at 256x192 takes 0.4 s here, so a pixel 1 microsecond a picture; 300 pictures learn, 100 are looked at each evaluation."""
  monkeypatch.setattr(plan, "step_seconds", lambda config, run, detector, size, batch: (batch * size[0] * size[1] * 1e-6, 1.0, 0))
  settings = config(budget=minutes * 60)
  plan.fit_budget(settings, run(), SimpleNamespace(name="net"), (Pictures(300), Pictures(100)))
  evaluations = math.ceil(settings.epochs / settings.eval_every)
  planned = settings.epochs * settings.size[0] * settings.size[1] * 1e-6 * (300 + 50) + evaluations * plan.EACH_EVALUATION
  assert settings.size == wanted and fewest <= settings.epochs <= 100 and planned < minutes * 60
  assert settings.epochs == 100 or planned > 0.75 * minutes * 60
  assert 1 <= evaluations <= 25 and evaluations * plan.EACH_EVALUATION < 0.25 * minutes * 60, "most of the time is for training"
  assert capsys.readouterr().out.startswith(f"plan for {minutes}m: net at {wanted[0]}x{wanted[1]} for {settings.epochs} epochs")
  settings = SimpleNamespace(**vars(config(budget=minutes * 60)) | {"size": (96, 96), "epochs": 3, "sources": {"size": "--size", "epochs": "EPOCHS"}})
  plan.fit_budget(settings, run(), SimpleNamespace(name="net"), (Pictures(300), Pictures(100)))
  assert settings.size == (96, 96) and settings.epochs == 3   # what the user said stays
  with pytest.raises(UserError, match="--budget 1s: an epoch of 300 pictures at 128x96 takes"):
    plan.fit_budget(config(budget=1.0), run(), SimpleNamespace(name="net"), (Pictures(300), Pictures(100)))


def seconds_of(steps: dict[int, float], used: int = 0):
  """A machine whose steps of so many pictures take so long; of others memory runs out."""
  def step(config, run, detector, size, batch):
    if batch not in steps: raise MemoryError("out of memory")
    return steps[batch], 1.0, used * batch
  return step


@pytest.mark.parametrize(("steps", "given", "pictures", "wanted", "rate"), [
  ({8: 0.8, 16: 1.0, 32: 1.5, 64: 3.0}, {}, 1000, 32, 2e-3),                       # twice 32 take twice the time
  ({8: 0.8, 16: 1.0, 32: 1.5}, {}, 150, 16, 1e-3 * 2 ** 0.5),                      # an epoch keeps 8 steps
  ({8: 0.8, 16: 1.0}, {}, 1000, 16, 1e-3 * 2 ** 0.5),                              # 32 do not fit
  ({2: 0.3, 1: 0.2}, {}, 1000, 2, 0.5e-3),                                         # nor 8, nor 4
  ({8: 0.8, 16: 1.0}, {"optimizer": "sgd"}, 1000, 16, 2e-3),
  ({8: 0.8, 16: 1.0}, {"nominal_bs": 64}, 1000, 16, 1e-3),
  ({6: 0.8, 12: 1.0}, {"gpus": 3}, 1000, 12, 1e-3 * 1.5 ** 0.5)])                  # whole pictures for each device
def test_the_batch_that_a_machine_takes(monkeypatch, capsys, steps, given, pictures, wanted, rate):
  monkeypatch.setattr(plan, "step_seconds", seconds_of(steps))
  about = {"max_size": 0, "lr": 1e-3, "optimizer": "adamw", "nominal_bs": 0, "gpus": 1, "bs": 0} | given
  settings = SimpleNamespace(**vars(config()) | about)
  detector = SimpleNamespace(fit=Fit)
  plan.fit_batch(settings, run(meant_bs=8), detector, Pictures(pictures))
  assert settings.bs == wanted and settings.lr == pytest.approx(rate, rel=0.005)
  assert settings.accumulate == (4 if settings.nominal_bs else 1)
  assert capsys.readouterr().out.splitlines()[1].startswith(f"--bs auto: {wanted} pictures a step, learning rate {settings.lr:g}; ")
  settings = SimpleNamespace(**vars(config()) | about | {"sources": {"lr": "--lr"}})
  plan.fit_batch(settings, run(meant_bs=8), detector, Pictures(pictures))
  assert settings.bs == wanted and settings.lr == 1e-3   # what the user said stays
  again = SimpleNamespace(**vars(config()) | about)
  plan.fit_batch(again, SimpleNamespace(ranks=ALONE, resumed={"config": {"bs": 24}}, meant_bs=8), detector, Pictures(pictures))
  assert again.bs == 24 and again.lr == 1e-3


def test_a_batch_that_the_host_has_no_memory_for_is_not_tried(monkeypatch):
  monkeypatch.setattr(plan, "step_seconds", seconds_of({8: 0.8, 16: 1.0, 32: 1.0}, used=1000))
  monkeypatch.setattr(plan, "available", lambda: 40_000)
  settings = SimpleNamespace(**vars(config()) | {"max_size": 0, "lr": 1e-3, "optimizer": "adamw", "nominal_bs": 0, "gpus": 1, "bs": 0})
  plan.fit_batch(settings, run(meant_bs=8), SimpleNamespace(fit=Fit), Pictures(1000))
  assert settings.bs == 16   # 32 would take 32,000 of 40,000 bytes
  monkeypatch.setattr(plan, "step_seconds", seconds_of({}))
  settings.bs = 0
  with pytest.raises(UserError, match="--bs auto: a step of 1 at 320x320 does not fit into the memory of the device; lower --size"):
    plan.fit_batch(settings, run(meant_bs=8), SimpleNamespace(fit=Fit), Pictures(1000))


def test_pictures_a_step():
  assert [plan.pictures(text) for text in ("8", "auto", " AUTO ")] == [8, 0, 0] and plan.show_pictures(0) == "auto"
  for text in ("0", "-1", "many", "1.5"):
    with pytest.raises(ValueError, match="1 or more, or auto"): plan.pictures(text)
  assert available() > 1 << 20


def test_a_run_ends_without_patience_or_time(capsys):
  this = object.__new__(Run)
  this.config, this.about, this.score, this.started, this._epoch = config(patience=5), {"best_mAP": 0.5, "best_epoch": 3}, "mAP", time.monotonic(), 7
  assert not this.ends
  this._epoch = 8
  assert this.ends and "no better mAP for 5 epochs" in capsys.readouterr().out
  this.config = config(budget=60.0)
  assert not this.ends
  this.started -= 61
  assert this.ends and "the time of --budget is over" in capsys.readouterr().out
