"""When a run should reach its target, against what MLCommons' checker makes of their reference runs and against runs that others published."""
import importlib, itertools, sys
from pathlib import Path
import pytest
from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker
from tinydet.reporting.forecast import MLPERF_EPOCHS, CONVERGENCE, Forecast, hours_to_target, mlperf_epochs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
Config, PRESETS = (getattr(importlib.import_module("train_retinanet"), name) for name in ("Config", "PRESETS"))
RECIPES = {name: Config(**PRESETS[name]) for name in CONVERGENCE}
OPENIMAGES = 1_170_301


def test_epochs_are_those_of_the_reference_runs():
  points = RCP_Checker("training", "5.1.0", "retinanet", verbose=False)
  known = {point["BS"]: point for point in points.rcp_data.values()}
  assert MLPERF_EPOCHS == pytest.approx({batch: point["RCP Mean"] for batch, point in known.items()})
  sizes = sorted(known)
  for low, high in itertools.pairwise(sizes):
    between = (low + high) // 2 + 1
    assert mlperf_epochs(between) == pytest.approx(points._create_interp_rcp(between, known[low], known[high])[1]["RCP Mean"])
  assert mlperf_epochs(96) == 4, "four of tinycorp's five runs on tinybox green, MLPerf Training 5.0; the fifth had 0.3397 by then"
  assert mlperf_epochs(8192) is None


# Seconds of the first epoch and of its evaluation, and of the whole run from run_start to run_stop, in its log
@pytest.mark.parametrize(("batch", "epoch", "evaluation", "whole"), [
  (256, 1210.984, 66.514, 5100.436),       # NVIDIA, MLPerf Training 2.0, 1 x DGX A100, ssd/result_0
  (96, 6933.656, 5300.406, 47404.145)])    # tinycorp, MLPerf Training 5.0, tinybox green, retinanet/result_0
def test_hours_of_published_runs(batch, epoch, evaluation, whole):
  """Told after their first epoch, they would have come true within 4%."""
  hours = hours_to_target(mlperf_epochs(batch), 1, OPENIMAGES, OPENIMAGES / epoch, evaluation)
  assert hours + (epoch + evaluation) / 3600 == pytest.approx(whole / 3600, rel=0.04)


def test_hours():
  assert hours_to_target(4, 0, 3600, 2) == 2 and hours_to_target(4, 3.5, 3600, 2) == 0.25 and hours_to_target(4, 5, 3600, 2, 60) == 0
  assert hours_to_target(4, 0, 3600, 2, 900) == 3 and hours_to_target(4.5, 4, 3600, 2, 900) == 0.25 + 0.25


def test_what_a_run_says():
  forecast = Forecast(RECIPES["mlperf"], RECIPES, OPENIMAGES)
  numbers, line = forecast.measured(0.01, 400.0)
  assert numbers == {"train/hours_to_target": pytest.approx(3.99 * OPENIMAGES / 400 / 3600)}
  assert line == ("about 3.24 h to mAP 0.34: 3.99 epochs of 1170301 pictures at 400 images/s, and evaluations, if it learns as fast as "
                  "MLCommons' reference runs")
  numbers, line = forecast.measured(0.5, 200.0)
  assert numbers["train/hours_to_target"] == pytest.approx(3.5 * OPENIMAGES / 200 / 3600) and line == "", "once is enough"
  assert "about 5.18 h to mAP 0.34: 3 epochs of 1170301 pictures at 200 images/s and 3 evaluations, if" in forecast.evaluated(1, 360.0, False)
  assert forecast.evaluated(4, 360.0, True) == ""
  assert forecast.evaluated(4, 360.0, False) == "mAP 0.34 was due: MLCommons' reference runs reached it after 4 epochs"
  assert forecast.measured(4.5, 200.0)[0] == {"train/hours_to_target": 0}


def test_torchvisions_recipe():
  forecast = Forecast(RECIPES["coco"], RECIPES, 117_266)
  assert forecast.measured(0.0, 100.0)[1] == ("about 8.47 h to mAP 0.364: 26 epochs of 117266 pictures at 100 images/s, and evaluations, "
                                              "if it learns as fast as torchvision")


@pytest.mark.parametrize(("preset", "changes", "pictures"), [
  ("mlperf", {"backbone": "resnet50"}, OPENIMAGES), ("mlperf", {}, 100_000), ("mlperf", {"target": 0.2}, OPENIMAGES),
  ("mlperf", {"bs": 8192}, OPENIMAGES), ("coco", {"bs": 32}, 118_287), ("coco", {"lr": 0.02}, 118_287), ("folder", {}, 118_287), ("demo", {}, 4_000)])
def test_nothing_is_said_of_other_recipes(preset, changes, pictures):
  forecast = Forecast(Config(**PRESETS[preset] | changes), RECIPES, pictures)
  assert forecast.measured(1, 100.0) == ({}, "") and forecast.evaluated(1, 1.0, False) == ""


@pytest.mark.parametrize("changes", [{"data": "elsewhere", "workers": 3, "gpus": 8, "seed": 5, "dtype": "half"}, {"bs": 64, "accumulate": 4},
                                     {"bs": 1024, "lr": 1.1e-4, "epochs": 12}])
def test_what_does_not_matter_to_the_recipe(changes):
  assert Forecast(Config(**PRESETS["mlperf"] | changes), RECIPES, OPENIMAGES - 300).measured(1, 100.0)[1]
