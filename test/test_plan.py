"""What a run decides by itself: starting weights, warm-up, and what fits a time."""
import time
from types import SimpleNamespace
import numpy as np, pytest
from tinydet import detectors
from tinydet.errors import UserError
from tinydet.runtime.mpi import ALONE
from tinydet.training import plan
from tinydet.training.run import Run


def config(**given):
  usual = {"budget": 0.0, "size": (320, 320), "epochs": 24, "bs": 8, "eval_every": 1, "close_mosaic": 10, "warmup": 0.5, "accumulate": 1,
           "patience": 0, "preset": "folder", "weights": "auto", "data": ".", "stop_at_target": False, "target": None}
  return SimpleNamespace(**usual | given, sources=dict.fromkeys(given, "--flag"))


def run(**given): return SimpleNamespace(ranks=ALONE, resumed=None, started=time.monotonic(), **given)


def test_times():
  assert [plan.seconds(text) for text in ("30m", "2h", "90s", "30", "1.5h", "10 min")] == [1800, 7200, 90, 1800, 5400, 600]
  assert all(plan.seconds(plan.show_seconds(value)) == value for value in (1800, 90, 0, 5400))
  for text in ("soon", "-3m", "m", "1d"):
    with pytest.raises(ValueError, match="such as 30m"): plan.seconds(text)


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


def test_a_warm_up_is_a_hundred_updates_or_a_tenth_of_the_run():
  for given, steps, wanted in (({}, 20, 2.4), ({}, 400, 0.5), ({"epochs": 100}, 20, 5), ({"accumulate": 2, "epochs": 100}, 20, 10)):
    settings = config(**given)
    plan.steady_start(settings, run(), steps)
    assert settings.warmup == wanted
  settings = SimpleNamespace(**vars(config()) | {"warmup": 0.1, "sources": {"warmup": "--warmup"}})
  plan.steady_start(settings, run(), 20)
  assert settings.warmup == 0.1


class Pictures:
  def __init__(self, count: int): self.sizes = np.full((count, 2), (480, 640))
  def __len__(self) -> int: return len(self.sizes)


@pytest.mark.parametrize(("minutes", "wanted", "fewest"), [(300, (640, 480), 40), (30, (320, 256), 40), (2, (128, 96), 1)])
def test_a_plan_fills_its_time(monkeypatch, capsys, minutes, wanted, fewest):
  """A step of 8 at 256x192 takes 0.4 s here, so a pixel 1 microsecond a picture; 300 pictures learn, 100 are looked at each evaluation."""
  monkeypatch.setattr(plan, "step_seconds", lambda config, run, detector, size: (8 * size[0] * size[1] * 1e-6, 1.0))
  settings = config(budget=minutes * 60)
  plan.fit_budget(settings, run(), SimpleNamespace(name="net"), (Pictures(300), Pictures(100)))
  planned = settings.epochs * settings.size[0] * settings.size[1] * 1e-6 * (300 + 50)
  assert settings.size == wanted and fewest <= settings.epochs <= 100 and planned < minutes * 60
  assert settings.epochs == 100 or planned > 0.75 * minutes * 60
  assert capsys.readouterr().out.startswith(f"plan for {minutes}m: net at {wanted[0]}x{wanted[1]} for {settings.epochs} epochs")
  settings = SimpleNamespace(**vars(config(budget=minutes * 60)) | {"size": (96, 96), "epochs": 3, "sources": {"size": "--size", "epochs": "EPOCHS"}})
  plan.fit_budget(settings, run(), SimpleNamespace(name="net"), (Pictures(300), Pictures(100)))
  assert settings.size == (96, 96) and settings.epochs == 3   # what the user said stays
  with pytest.raises(UserError, match="--budget 1s: an epoch of 300 pictures at 128x96 takes"):
    plan.fit_budget(config(budget=1.0), run(), SimpleNamespace(name="net"), (Pictures(300), Pictures(100)))


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
