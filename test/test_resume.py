"""What a run that goes on takes from its record and what it refuses: settings, presets, classes, epochs; and variables of other programs."""
import json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinygrad import Tensor
from tinydet.config import parse, variable
from tinydet.errors import UserError
from tinydet.training import optim
from tinydet.training.detection import DetectionConfig
from tinydet.training.run import Run
from tinydet.training.trainer import TrainerConfig, make_optimizer
from tinydet.weights import checkpoint

ROOT = Path(__file__).parents[1]
TINY = ("--backbone resnet10_quarter --size 64 --bs 4 --epochs 1 --workers 0 --wandb disabled --pictures 0 --run-name r "
        "--trainable-layers 0 --norm frozen --optimizer sgd").split()   # few different kernels


def write_data(folder, names=("cat", "dog"), ids=(1, 2), pictures=8):
  """Pictures with a bright box of each class in turn."""
  for split in ("train", "val"):
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(pictures):
      image = np.random.default_rng(i).integers(0, 60, (64, 64, 3), np.uint8)
      image[10:40, 8:50] = 200
      Image.fromarray(image).save(folder / split / f"{i}.png")
      images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
      annotations.append({"id": i + 1, "image_id": i, "category_id": ids[i % len(ids)], "bbox": [8, 10, 42, 30], "area": 1260, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in zip(ids, names)]
    (folder / "annotations" / f"instances_{split}.json").write_text(
      json.dumps({"images": images, "annotations": annotations, "categories": categories}))
  return folder


def trainer(folder, *flags, **variables):
  environ = {key: os.environ[key] for key in ("PATH", "HOME", "CC", "DEV", "NOOPT", "XDG_CACHE_HOME", "CACHEDB") if key in os.environ}
  return subprocess.run([sys.executable, str(ROOT / "examples" / "train_retinanet.py"), *map(str, flags)], cwd=folder, stdin=subprocess.DEVNULL,
                        env=environ | {"PYTHONPATH": str(ROOT)} | variables, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """A run of an epoch of two steps, begun with a preset named by the variable."""
  folder = tmp_path_factory.mktemp("resume")
  write_data(folder / "data")
  done = trainer(folder, "--data", "data", *TINY, TINYDET_PRESET="folder")
  assert done.returncode == 0, done.stderr
  return folder


@pytest.fixture
def copy(first, tmp_path):
  shutil.copytree(first, tmp_path / "copy")
  return tmp_path / "copy"


def steps(folder): return sorted(int(p.stem.split("-")[1]) for p in (folder / "runs" / "r").glob("checkpoint-*.safetensors"))


def one_line(done, *words):
  assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
  assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.by_hand
@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_same_command_goes_on_with_its_preset(copy, how):
  """As Slurm starts a job again: with the very same line."""
  preset, variables = (["--preset", "folder"], {}) if how == "flag" else ([], {"TINYDET_PRESET": "folder"})
  done = trainer(copy, "--data", "data", *TINY, *preset, "--resume", "auto", "--epochs", "2", **variables)
  assert done.returncode == 0 and steps(copy) == [2, 4], done.stderr
  config = json.loads((copy / "runs" / "r" / "config.json").read_text())
  assert config["preset"] == "folder" and config["epochs"] == 2 and "resumed with other settings: epochs=2 (was 1)" in done.stdout


@pytest.mark.by_hand
def test_a_fallen_rate_stays_so(tmp_path):
  """A run that goes on after its rate fell is, to the last bit, the one that was never interrupted. At this rate nothing learns, so it falls."""
  write_data(tmp_path / "data")
  flags = ["--data", "data", *TINY, "--schedule", "plateau", "--plateau", "1", "--lr", "1e-6", "--warmup", "0", "--epochs", "4", "--keep", "4"]
  whole = trainer(tmp_path, *flags, "--weights", "none")
  runs = tmp_path / "runs"
  shutil.copytree(runs / "r", runs / "part")
  (runs / "part" / "checkpoint-8.safetensors").unlink()   # as if it had been killed in the last epoch
  done = trainer(tmp_path, *flags, "--resume", "runs/part")
  assert whole.returncode == done.returncode == 0 and "the learning rate is now 1e-07" in whole.stdout, whole.stderr + done.stderr
  (a, _), (b, about) = (checkpoint.load(runs / name / "checkpoint-8.safetensors") for name in ("r", "part"))
  assert a.keys() == b.keys() and about["slowed_epoch"] >= 3 and a["optimizer.slowed"][0] < 0.02
  for key in a: np.testing.assert_array_equal(a[key], b[key], key)


def test_another_preset_is_refused(copy):
  one_line(trainer(copy, "--data", "data", *TINY, "--preset", "coco", "--resume", "auto"), "--preset coco", "begun with --preset folder")


def test_a_finished_run_keeps_its_settings(copy):
  before = (copy / "runs" / "r" / "config.json").read_bytes()
  done = trainer(copy, "--data", "data", *TINY, "--resume", "auto", "--lr", "0.5")
  assert done.returncode == 0 and "is finished, so nothing is trained" in done.stdout and "--epochs 2" in done.stdout, done.stderr
  assert (copy / "runs" / "r" / "config.json").read_bytes() == before and steps(copy) == [2]


@pytest.mark.parametrize(("data", "flags", "words"), [
  ({"names": ("dog", "cat")}, [], ["learnt cat, dog", "names dog, cat"]),
  ({"names": ("cat", "dog", "cow"), "ids": (1, 2, 3)}, [], ["learnt cat, dog", "names cat, dog, cow"]),
  ({"names": ("cat", "dog"), "ids": (3, 7)}, [], ["ids 3, 7, not 1, 2"]),
  ({"pictures": 12}, [], ["2 steps", "has 3", "--bs 4"]), ({}, ["--bs", "2"], ["2 steps", "has 4", "--bs 2"])])
def test_other_data_is_refused_before_anything_is_written(copy, data, flags, words):
  shutil.rmtree(copy / "data")
  write_data(copy / "data", **data)
  before = {p: p.read_bytes() for p in (copy / "runs").rglob("*") if p.is_file()}
  one_line(trainer(copy, "--resume", "runs/r", "--epochs", "2", *flags), "--resume runs/r", *words)
  assert {p: p.read_bytes() for p in (copy / "runs").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("text", "words"), [
  ("{", ["config.json", "cannot be read"]), ("[]", ["config.json", "no JSON object"]), ('{"bs": "many"}', ["config.json", "bs", "'many'"]),
  ('{"bs": -1}', ["config.json", "bs"]), ('{"size": ["a", 3]}', ["config.json", "size"]), ('{"backbone": "vgg"}', ["config.json", "backbone"]),
  ('{"bs": true}', ["config.json", "bs"]), ('{"lr": null}', ["config.json", "lr"])])
def test_a_hand_edited_record_is_one_line(copy, text, words):
  (copy / "runs" / "r" / "config.json").write_text(text)
  one_line(trainer(copy, "--resume", "runs/r"), *words)


# ---- variables of other programs


def test_everyday_variables_are_not_settings():
  everyday = ("DATA TARGET OUT PROJECT SOURCE SIZE NORM SPLIT JSON PRESET WEIGHTS RESUME STRICT WORKERS FLIP GROUP TAGS KEEP SCHEDULE OPTIMIZER "
              "MOMENTUM DTYPE WIRE BACKBONE VARIANT PICTURES IMAGES CLASSES METHOD LAYER CHECK HALF STEPS").split()
  config = parse(DetectionConfig, {}, [], dict.fromkeys(everyday, "x86_64-linux"))
  assert set(config.sources.values()) == {"default"}
  bare = {field.name: variable(field) for field in DetectionConfig.__dataclass_fields__.values() if not variable(field).startswith("TINYDET_")}
  assert bare == {"bs": "BS", "epochs": "EPOCHS", "lr": "LR", "seed": "SEED", "gpus": "GPUS", "wandb": "WANDB", "group": "WANDB_RUN_GROUP",
                  "tags": "WANDB_TAGS"}
  assert parse(TrainerConfig, {}, [], {"WANDB": "1"}).wandb == "online" and parse(TrainerConfig, {}, [], {"WANDB": "0"}).wandb == "disabled"


@pytest.mark.parametrize(("variables", "words"), [
  ({"TINYDET_DATA": "nowhere"}, ["nowhere: is neither a folder", "TINYDET_DATA"]), ({"BS": "9", "GPUS": "2"}, ["--bs 9", "BS", "GPUS"]),
  ({"TINYDET_WEIGHTS": "gone.pth"}, ["gone.pth", "TINYDET_WEIGHTS"]), ({"TINYDET_TARGET": "x"}, ["TINYDET_TARGET=x"])])
def test_a_message_names_the_variable_that_a_value_came_from(tmp_path, variables, words):
  one_line(trainer(tmp_path, "--wandb", "disabled", **variables), *words)
  assert not list(tmp_path.iterdir())


# ---- accumulation


@pytest.mark.parametrize(("per_epoch", "accumulate"), [(10, 4), (10, 6), (10, 1), (7, 3), (2, 5)])
def test_the_schedule_counts_updates_over_the_run(per_epoch, accumulate):
  config = TrainerConfig(accumulate=accumulate, epochs=5, lr=1.0, schedule="cosine", warmup=0.0)
  optimizer = make_optimizer(config, {"w": Tensor([1.0]).realize()}, per_epoch)
  updates = per_epoch * 5 // accumulate
  rates = [optimizer.rate(Tensor([float(i)])).item() for i in range(updates)]
  np.testing.assert_allclose(rates, [0.5 * (1 + np.cos(np.pi * i / updates)) for i in range(updates)], atol=1e-6)
  config = TrainerConfig(accumulate=accumulate, epochs=5, lr=1.0, schedule="step", milestones=(4,), warmup=1.0)
  rates = [make_optimizer(config, {"w": Tensor([1.0]).realize()}, per_epoch).rate(Tensor([float(i)])).item() for i in range(updates)]
  drop = round(4 * per_epoch / accumulate)
  assert all(rate <= 0.1001 for rate in rates[drop:]) and all(rate > 0.11 for rate in rates[max(round(per_epoch / accumulate), 1):drop])


def test_too_few_steps_for_one_update_is_refused():
  with pytest.raises(UserError, match="--accumulate 50: the run has 20 steps"): make_optimizer(TrainerConfig(accumulate=50, epochs=2), {}, 10)


def test_an_update_whose_rate_is_not_finite_changes_nothing():
  weights = {"w": Tensor(np.float32([1, 2])).realize()}
  optimizer = optim.Optimizer(weights, "sgd", lambda step: step / 0)
  changed, logs = optimizer.update([Tensor(np.float32([1, 1])).realize()])
  Tensor.realize(*changed, skipped := logs["skipped"])
  assert skipped.item() == 1 and weights["w"].tolist() == [1, 2]


def test_weights_that_are_not_finite_are_never_the_best(capsys):
  run = Run.__new__(Run)
  kept = []
  run.score, run.about, run.config = "mAP", {"best_mAP": 0.1}, TrainerConfig()
  run.checkpoints = type("C", (), {"keep_best": lambda self, *args: kept.append(args)})()
  run.tracker = type("T", (), {"improved": lambda self: None})()
  run.keep_if_best(0.5, 1, 10, {"w": np.float32([1, np.nan])})
  assert not kept and run.best == 0.1 and "w is not finite" in capsys.readouterr().err
  for value in (np.nan, 0.1): run.keep_if_best(value, 1, 10, {"w": np.float32([1])})
  assert not kept
  run.keep_if_best(0.5, 2, 20, {"w": np.float32([1])})
  assert len(kept) == 1 and run.best == 0.5


def test_the_rate_falls_where_the_score_does_not_rise(capsys):
  run = Run.__new__(Run)
  run.score, run.about, run.config = "mAP", {"best_mAP": 0.5, "best_epoch": 2}, TrainerConfig(schedule="plateau", plateau=3, last_lr=0.05)
  optimizer = run._optimizer = optim.Optimizer({}, "sgd", optim.schedule("plateau", 1.0, 1), slows=True)
  found = []
  for epoch in range(3, 13):
    run.keep_if_best(0.5, epoch, epoch)
    found.append(round(float(optimizer.slowed.numpy()[0]), 6))
  assert found == [1, 1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05] and run.about["slowed_epoch"] == 11
  assert "no better mAP for 3 epochs (--plateau 3): the learning rate is now" in capsys.readouterr().out


# ---- classes


@pytest.mark.parametrize(("names", "kept", "words"), [
  (("cat", "dog"), (0, 1), None), (("dog", "cat"), (1, 0), "in another order"),
  (("Dog", "cow"), (1, None), "knows Dog; the class logits of cow start anew"),
  (("bird", "cow"), (None, None), "start anew"), (("cow", "cat", "dog"), (None, 0, 1), "knows cat, dog; the class logits of cow start anew")])
def test_classes_are_compared_by_name(first, names, kept, words):
  from tinydet import detectors
  detector = detectors.build("retinanet_resnet10_quarter_fpn", len(names), norm="batch", seed=9)
  own, stored = detector.network.head.classification_head.cls_logits.bias.numpy() + 0, checkpoint.load(first / "runs/r/checkpoint-2.safetensors")[0]
  notes = detectors.start(detector, str(first / "runs/r/checkpoint-2.safetensors"), names)
  assert (notes == []) == (words is None) and (words is None or words in notes[0])
  known = stored["model.head.classification_head.cls_logits.bias"].reshape(9, 2)
  found = detector.network.head.classification_head.cls_logits.bias.numpy().reshape(9, len(names))
  for i, label in enumerate(kept): np.testing.assert_array_equal(found[:, i], known[:, label] if label is not None else own.reshape(9, -1)[:, i])
