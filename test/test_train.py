"""The trainer as its user runs it: what a run leaves behind, how it goes on, and what it says to bad input."""
import json, os, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinydet.weights import checkpoint

ROOT = Path(__file__).parents[1]
TINY = ("--data shapes:1 --weights none --norm batch --size 64 --train-images 32 --bs 8 --epochs 2 --eval-every 1 --workers 1 --ema 0.9 "
        "--log-every 2 --pictures 2 --target 0.9 --wandb offline --run-name tiny").split()


def trainer(folder, *flags, timeout=600):
  """Run the program in `folder` as somebody without credentials and without variables that would be taken for settings."""
  environ = {key: os.environ[key] for key in ("PATH", "HOME", "CC", "DEV", "NOOPT", "XDG_CACHE_HOME", "CACHEDB") if key in os.environ}
  return subprocess.run([sys.executable, str(ROOT / "examples" / "train_retinanet.py"), *map(str, flags)], cwd=folder, stdin=subprocess.DEVNULL,
                        env=environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=timeout)


def metrics(folder): return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """A run of two epochs of four steps."""
  out = tmp_path_factory.mktemp("train")
  done = trainer(out, *TINY, "--out", out / "runs")
  assert done.returncode == 0, done.stderr[-3000:]
  return done, out / "runs" / "tiny"


@pytest.fixture(scope="module")
def state_after_first(first):
  """Files of the first run, before another test goes on with it."""
  return {p.relative_to(first[1]).as_posix() for p in first[1].rglob("*")}, metrics(first[1])


def test_a_run_leaves_its_record(first, state_after_first):
  (_, folder), (files, lines) = first, state_after_first
  assert {"config.json", "metrics.jsonl", "summary.json", "report.html", "best.safetensors"} <= files
  assert {"checkpoint-4.safetensors", "checkpoint-8.safetensors"} <= files
  assert not [name for name in files if name.endswith(".partial")]
  assert [p.name for p in folder.parent.iterdir()] == ["tiny"]
  config = json.loads((folder / "config.json").read_text())
  assert config["bs"] == 8 and config["size"] == [64, 64] and config["data"] == "shapes:1"

  training, evaluation = ([line for line in lines if key in line] for key in ("train/loss", "eval/mAP"))
  assert [line["step"] for line in training] == [2, 4, 6, 8] and [line["step"] for line in evaluation] == [4, 8]
  assert [line["epoch"] for line in evaluation] == [1, 2]
  for line in training:
    assert {"train/classification", "train/bbox_regression", "train/lr", "train/images_per_s", "step", "epoch", "seconds"} <= line.keys()
    assert line["train/loss"] == pytest.approx(line["train/classification"] + line["train/bbox_regression"], rel=1e-4)
  for line in evaluation:
    assert {"eval/mAP", "eval/mAP50", "eval/mAP75", "eval/AR100", "eval/target", "eval/AP/circle", "step", "epoch", "seconds"} <= line.keys()
    assert 0 <= line["eval/mAP"] <= 1 and line["eval/target"] == 0.9
  assert training[-1]["train/loss"] < training[0]["train/loss"], "it learns"
  assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
  assert json.loads((folder / "summary.json").read_text())["final/mAP"] == evaluation[-1]["eval/mAP"]

  for name in ("pictures", "classes", "errors", "precision_recall_table", "confusion_matrix_table", "score_and_target_table"):
    assert len([file for file in files if re.search(rf"/media/table/eval/{name}_\d+_", file)]) == 2, "a table of each evaluation for wandb"
  assert sorted(file.partition("-")[2] for file in (Path(f).name for f in files if "/artifacts/" in f) if file.endswith(".safetensors")) == [
    "best.safetensors", "checkpoint-8.safetensors"]
  pictures = sorted(name for name in files if name.startswith("pictures/val-"))
  assert len(pictures) == 4 and [p[-11:] for p in pictures] == ["0000004.jpg", "0000008.jpg"] * 2
  assert np.asarray(Image.open(folder / pictures[0])).std() > 0


def test_a_run_says_what_it_did(first):
  done, folder = first
  table = [line for line in done.stdout.splitlines() if re.match(r" Average (Precision|Recall) +\(A[PR]\) @\[ IoU=", line)]
  assert len(table) == 12
  for words in ("retinanet_resnet10_quarter_fpn: 0.46 M trainable parameters, 6 classes, 32 training and 256 validation pictures at 64x64",
                "size=64 (--size)", "epoch 1: mAP ", "epoch 2: mAP ", "target 0.9000: missed", f"weights: {folder / 'best.safetensors'}"):
    assert words in done.stdout
  assert re.search(rf"^upload this run: wandb sync '?{re.escape(str(folder / 'wandb'))}/\S*offline-run-", done.stdout, re.MULTILINE)
  assert "Traceback" not in done.stderr


def test_weights_and_checkpoints_say_what_they_are(first, state_after_first):
  _, folder = first
  tensors, best = checkpoint.load(folder / "best.safetensors")
  assert best["model"] == "retinanet_resnet10_quarter_fpn" and best["class_names"][0] == "circle" and best["size"] == [64, 64]
  assert tensors["head.classification_head.cls_logits.weight"].shape[0] == 54 and "backbone.body.layer1.0.conv1.weight" in tensors
  state, about = checkpoint.load(folder / "checkpoint-8.safetensors")
  assert (about["step"], about["epoch"]) == (8, 2) and state["optimizer.steps"] == 8
  assert state["model.backbone.body.bn1.num_batches_tracked"] == 8
  key = "backbone.fpn.inner_blocks.0.0.weight"
  assert (state[f"optimizer.ema.{key}"] != state[f"model.{key}"]).any(), "what is learnt is saved beside its average"
  then, _ = checkpoint.load(folder / f"checkpoint-{best['step']}.safetensors")
  np.testing.assert_array_equal(tensors[key], then[f"optimizer.ema.{key}"])


@pytest.mark.by_hand
def test_a_run_goes_on(first, state_after_first):
  (_, folder), (_, before) = first, state_after_first
  weights, about = checkpoint.load(folder / "checkpoint-8.safetensors")
  done = trainer(folder.parent, "--resume", folder, "--epochs", "3", "--score-in-background")
  assert done.returncode == 0, done.stderr[-3000:]
  lines = metrics(folder)
  assert lines[:len(before)] == before, "the record is continued, not begun anew"
  added = lines[len(before):]
  assert [line["step"] for line in added if "train/loss" in line] == [10, 12] and [line["epoch"] for line in added if "eval/mAP" in line] == [3]
  assert added[0]["seconds"] > before[-1]["seconds"]
  assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-12.safetensors", "checkpoint-8.safetensors"], "the two newest are kept"
  state, after = checkpoint.load(folder / "checkpoint-12.safetensors")
  assert (after["step"], after["epoch"], after["run_id"]) == (12, 3, about["run_id"]) and after["best_mAP"] >= about["best_mAP"]
  assert state["optimizer.steps"] == 12 and (state["optimizer.steps"] - weights["optimizer.steps"]) == 4
  assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(("flags", "words"), [
  (["--epoch", "3"], ["--epoch", "did you mean --epochs?"]), (["--bs", "0"], ["--bs 0", "1 or more"]),
  (["--data", "nowhere"], ["nowhere: is neither a folder"]), (["--weights", "nowhere.safetensors"], ["nowhere.safetensors"]),
  (["--bs", "9", "--gpus", "2"], ["--bs 9", "--gpus 2"]), (["--resume", "runs/gone"], ["runs/gone"])])
def test_bad_input_is_one_line(flags, words, tmp_path):
  done = trainer(tmp_path, *TINY, "--out", tmp_path / "runs", *flags, timeout=120)
  assert done.returncode == 2
  message = done.stderr.splitlines()
  assert len(message) == 1 and message[0].startswith("error: ") and all(word in message[0] for word in words), done.stderr
  assert not list(tmp_path.iterdir()), "nothing is left behind"
