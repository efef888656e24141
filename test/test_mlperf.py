"""The MLPerf log against MLCommons' own checkers, and the preset against their reference's settings.

The compliance checker looks at names, order and some values of the lines, not at what was trained: it passes a run of the program on drawn shapes."""
import dataclasses, importlib, json, logging, os, subprocess, sys
from importlib.resources import files
from pathlib import Path
import numpy as np, pytest
from tinygrad import Tensor
from mlperf_logging.compliance_checker.mlp_compliance import make_checker
from mlperf_logging.rcp_checker.rcp_checker import read_submission_file
from tinydet.errors import UserError
from tinydet.reporting import mlperf
from tinydet.reporting.mlperf import MLPerfLog
from tinydet.reporting.forecast import LOADING, CONVERGENCE
from tinydet.training.optim import WARMUP_FACTOR, schedule

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
Config, PRESETS = (getattr(importlib.import_module("train_retinanet"), name) for name in ("Config", "PRESETS"))
CLOSED = (264, 1_170_301, 24_781)
REACHED = (0.2284, 0.2908, 0.3312, 0.3421)   # by epoch: NVIDIA's DGX A100, MLPerf Training 2.0, result_0


def config(**changes): return Config(**PRESETS["mlperf"] | changes)


def events(path):
  lines = path.read_text().splitlines()
  assert all(line.startswith(":::MLLOG {") for line in lines)
  return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


def passes(path, ruleset="5.1.0"):
  """The verdict of MLCommons' checker, warnings counted as errors."""
  return make_checker("training", ruleset, quiet=False, werror=True).check_file(str(path), f"training_{ruleset}/common.yaml")


def log(folder, scores, counts=CLOSED, **changes):
  """mlperf.log of a run with these scores after its evaluations."""
  folder.mkdir(exist_ok=True)
  settings = config(**changes)
  run = MLPerfLog(settings, config(), WARMUP_FACTOR, True)
  run.open(folder, *counts, resumed=False)
  for i, score in enumerate(scores, 1):
    run.start_evaluation(i * settings.eval_every)
    run.evaluated(i * settings.eval_every, score)
  run.close()
  return folder / "mlperf.log"


@pytest.mark.by_hand
def test_a_short_run_of_the_program_passes(tmp_path):
  """The shipped detector, a few steps further, on the shapes that it knows: a run that reaches the target in earnest."""
  flags = ("--preset mlperf --data shapes:1 --size 128 --backbone resnet10_quarter --weights shapes --dtype float32 --bs 8 --train-images 16 "
           "--workers 1 --log-every 1 --pictures 0 --wandb disabled --run-name tiny").split()
  environ = {key: os.environ[key] for key in ("PATH", "HOME", "CC", "DEV", "NOOPT", "XDG_CACHE_HOME", "CACHEDB") if key in os.environ}
  done = subprocess.run([sys.executable, str(ROOT / "examples" / "train_retinanet.py"), *flags, "--out", str(tmp_path)], capture_output=True,
                        text=True, env=environ | {"PYTHONPATH": str(ROOT), "MLPERF_SUBMISSION_ORG": "us"}, check=False, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  path = tmp_path / "tiny" / "mlperf.log"
  assert "open division (other than the reference's: data, size, train_images, weights, backbone)" in done.stdout
  done = subprocess.run([sys.executable, *"-m mlperf_logging.compliance_checker --usage training --ruleset 5.1.0 --werror".split(), str(path)],
                        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
  assert done.returncode == 0 and "SUCCESS" in done.stderr, done.stderr
  assert passes(path, "5.0.0")
  found = events(path)
  said = {event["key"]: event["value"] for event in found}
  assert (said["submission_org"], said["submission_division"]) == ("us", "open") and (said["train_samples"], said["eval_samples"]) == (16, 256)
  evaluation = next(line for line in map(json.loads, open(tmp_path / "tiny" / "metrics.jsonl")) if "eval/mAP" in line)
  assert said["eval_accuracy"] == evaluation["eval/mAP"] >= 0.34 and evaluation["step"] == 2, "it stopped at the target"
  keys = [event["key"] for event in found]
  assert keys[-5:] == ["epoch_stop", "eval_start", "eval_accuracy", "eval_stop", "run_stop"] and found[-1]["metadata"]["status"] == "success"
  times = [event["time_ms"] for event in found]
  assert times == sorted(times) and times[-1] > times[keys.index("run_start")]
  assert "h to mAP" not in done.stdout, "nobody published how fast this one learns"
  # Were it a closed run: all that the stricter rules ask for is there.
  (strict := tmp_path / "closed.log").write_text(path.read_text().replace('"value": "open"', '"value": "closed"'))
  assert passes(strict)


@pytest.mark.parametrize("ruleset", ["5.0.0", "5.1.0"])
def test_a_closed_run_passes(tmp_path, ruleset, capsys):
  path = log(tmp_path, REACHED, seed=7, accumulate=2, bs=128)
  assert passes(path, ruleset)
  assert "closed division" in capsys.readouterr().out
  found = events(path)
  said = {event["key"]: event["value"] for event in found}
  assert said["submission_division"] == "closed" and (said["train_samples"], said["eval_samples"]) == CLOSED[1:]
  assert (said["global_batch_size"], said["gradient_accumulation_steps"], said["seed"], said["opt_name"]) == (256, 2, 7, "adam")
  epochs = [(event["key"], event["metadata"]["epoch_num"]) for event in found if "epoch_num" in event["metadata"]]
  assert epochs == [(key, n) for n in (1, 2, 3, 4) for key in ("epoch_start", "epoch_stop", "eval_start", "eval_accuracy", "eval_stop")]
  assert {event["event_type"] for event in found if event["key"].endswith("_start")} == {"INTERVAL_START"}
  assert all(event["metadata"]["file"] == "extra/reporting/mlperf.py" for event in found), "no path of this machine"
  assert read_submission_file(str(path), "5.1.0", False) == (0, 4, 256, "retinanet"), "four epochs to converge, as its reference convergence point"


def test_a_run_that_misses_the_target(tmp_path, caplog):
  """It is aborted; the checker refuses it for its scores and not for its status, and the convergence checker counts it as never converged."""
  path = log(tmp_path, REACHED[:3], epochs=3)
  assert events(path)[-1]["key"] == "run_stop" and events(path)[-1]["metadata"]["status"] == "aborted"
  assert not passes(path)
  assert "Failed checks for eval_accuracy : v['value'] >= 0.340" in caplog.text and caplog.text.count("ailed") == 1
  assert read_submission_file(str(path), "5.1.0", False)[0] == 1
  easy = log(tmp_path / "easy", REACHED[:3], epochs=3, target=0.3)   # a target of its own
  assert events(easy)[-1]["metadata"]["status"] == "success" and passes(easy)
  assert {event["key"]: event["value"] for event in events(easy)}["submission_division"] == "open"


def test_a_run_is_over_at_its_target(tmp_path):
  assert events(log(tmp_path, [*REACHED, 0.36]))[-1]["key"] == "run_stop", "nothing is written after it"
  assert [event["key"] for event in events(log(tmp_path, REACHED))].count("run_stop") == 1


def test_epochs_between_evaluations_are_a_block(tmp_path):
  path = log(tmp_path, REACHED[2:], eval_every=2, epochs=5)
  starts = [event["metadata"] for event in events(path) if event["key"] == "block_start"]
  assert [(m["first_epoch_num"], m["epoch_count"]) for m in starts] == [(1, 2), (3, 2)]
  assert passes(path)


@pytest.mark.parametrize(("changes", "counts", "words"), [
  ({"flip": 0.0}, CLOSED, "flip"), ({"clip_norm": 1.0, "momentum": 0.5}, CLOSED, "momentum, clip_norm"), ({}, (80, 118_287, 5_000), "data"),
  ({"target": 0.3}, CLOSED, "target"), ({"norm": "batch", "trainable_layers": 5}, CLOSED, "trainable_layers, norm")])
def test_what_makes_a_run_open(tmp_path, capsys, changes, counts, words):
  log(tmp_path, [], counts, **changes)
  assert f"open division (other than the reference's: {words})" in capsys.readouterr().out


def test_the_preset_is_the_reference():
  """Against the settings of the reference's own runs, as the package has them, and its warm-up, a formula of torchvision's."""
  with (files("mlperf_logging") / "rcp_checker" / "training_5.1.0" / "rcps_retinanet.json").open() as f: points = json.load(f)
  preset, point = config(), points["retinanet_ref_256"]
  assert point["BS"] == preset.bs * preset.accumulate
  assert point["Hyperparams"] == {"opt_base_learning_rate": preset.lr, "opt_learning_rate_warmup_factor": WARMUP_FACTOR,
                                  "opt_learning_rate_warmup_epochs": preset.warmup, "opt_weight_decay": preset.weight_decay}
  steps_per_epoch = CLOSED[1] // preset.bs
  rate = schedule(preset.schedule, preset.lr, steps_per_epoch * preset.epochs, warmup_steps=round(preset.warmup * steps_per_epoch))
  steps = np.array([0, 1, 2285, 4570, 4571, 9000, 40_000])
  progress = np.minimum(steps / steps_per_epoch, 1)
  np.testing.assert_allclose(rate(Tensor(steps.astype(np.float32))).numpy(), 1e-4 * (1e-3 * (1 - progress) + progress), rtol=1e-5)
  assert (preset.size, preset.max_size, preset.flip, preset.norm, preset.trainable_layers, preset.eval_every) == ((800, 800), 0, 0.5, "frozen", 3, 1)
  assert preset.target == 0.34 and preset.stop_at_target and preset.mlperf_log


def test_a_resumed_run_adds_nothing(tmp_path, capsys):
  before = log(tmp_path, REACHED[:2]).read_text()
  run = MLPerfLog(config(), config(), WARMUP_FACTOR, True)
  run.open(tmp_path, *CLOSED, resumed=True)
  run.start_evaluation(3)
  run.evaluated(3, 0.5)
  run.close()
  assert (tmp_path / "mlperf.log").read_text() == before and "cannot count for MLPerf" in capsys.readouterr().out


def test_without_the_flag_or_the_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "mlperf_logging.mllog.mllog", None)
  monkeypatch.setitem(sys.modules, "mlperf_logging.mllog", None)
  with pytest.raises(UserError, match=r"^--mlperf-log: .*pip install 'mlperf-logging>=4\.1\.68'.*--no-mlperf-log$"):
    MLPerfLog(config(), config(), WARMUP_FACTOR, True)
  off = MLPerfLog(config(), config(), WARMUP_FACTOR, False)
  off.open(tmp_path, *CLOSED, resumed=False)
  off.start_evaluation(1)
  off.evaluated(1, 0.5)
  off.close()
  assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_costs_lines(tmp_path, monkeypatch, capsys):
  def full(self, record): raise OSError(28, "No space left on device")
  monkeypatch.setattr(logging.StreamHandler, "flush", lambda self: full(self, None))
  run = MLPerfLog(config(), config(), WARMUP_FACTOR, True)
  run.open(tmp_path, *CLOSED, resumed=False)
  assert "mlperf.log cannot be written" in capsys.readouterr().err
  run.open(tmp_path / "gone", *CLOSED, resumed=False)
  assert "mlperf.log cannot be written" in capsys.readouterr().err


def test_caches(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(mlperf, "CACHES", tmp_path / "drop_caches")
  monkeypatch.setattr(os, "sync", lambda: None)
  assert not mlperf.clear_caches() and not (tmp_path / "drop_caches").exists(), "only where asked for"
  monkeypatch.setenv("MLPERF_CLEAR_CACHE", "1")
  assert mlperf.clear_caches() and (tmp_path / "drop_caches").read_text() == "3\n"
  monkeypatch.setattr(mlperf, "CACHES", tmp_path / "none" / "drop_caches")
  assert not mlperf.clear_caches() and "run as root" in capsys.readouterr().err
  assert [e["value"] for e in events(log(tmp_path / "run", [])) if e["key"] == "cache_clear"] == [False]


def test_the_recipe_covers_every_setting():
  """A setting of a new name counts against the Closed division until somebody says that it does not matter."""
  groups = {field.name: field.metadata["group"] for field in dataclasses.fields(Config)}
  assert set(groups.values()) == {"data", "model", "training", "run"}
  known = CONVERGENCE["mlperf"].free | LOADING | {"target", "eval_every"}
  assert known <= groups.keys()
