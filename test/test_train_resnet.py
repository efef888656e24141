"""The classifier's trainer as its user runs it: what a run leaves behind, how it goes on, what it learns, and what it says to bad input."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import center_crop_resize
from tinydet.models import resnet
from tinydet.models.preprocess import normalize
from tinydet.weights import checkpoint
from tinydet.training import classification
from tinydet.weights.weights import load_weights

ROOT = Path(__file__).parents[1]
TINY = ("--data crops:1 --size 32 --resize 36 --train-images 32 --bs 8 --epochs 2 --workers 1 --ema 0.9 --log-every 2 --pictures 2 --target 0.9 "
        "--label-smoothing 0.1 --wandb disabled --run-name tiny").split()


def trainer(folder, *flags, timeout=600):
  """Run the program in `folder` as somebody without credentials and without variables that would be taken for settings."""
  environ = {key: os.environ[key] for key in ("PATH", "HOME", "CC", "DEV", "NOOPT", "XDG_CACHE_HOME", "CACHEDB") if key in os.environ}
  return subprocess.run([sys.executable, str(ROOT / "examples" / "train_resnet.py"), *map(str, flags)], cwd=folder, stdin=subprocess.DEVNULL,
                        env=environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=timeout)


def metrics(folder): return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """A run of two epochs of four steps."""
  out = tmp_path_factory.mktemp("train")
  done = trainer(out, *TINY, "--out", out / "runs", "--wandb", "offline")
  assert done.returncode == 0, done.stderr[-3000:]
  return done, out / "runs" / "tiny"


def test_a_run_leaves_its_record(first):
  done, folder = first
  files = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
  assert {"config.json", "metrics.jsonl", "summary.json", "best.safetensors", "checkpoint-4.safetensors", "checkpoint-8.safetensors"} <= files
  assert not [name for name in files if name.endswith(".partial")] and [p.name for p in folder.parent.iterdir()] == ["tiny"]
  config = json.loads((folder / "config.json").read_text())
  assert (config["bs"], config["size"], config["data"], config["preset"]) == (8, 32, "crops:1", "demo")

  training, evaluation = ([line for line in metrics(folder) if key in line] for key in ("train/loss", "eval/top1"))
  assert [line["step"] for line in training] == [2, 4, 6, 8] and [(line["step"], line["epoch"]) for line in evaluation] == [(4, 1), (8, 2)]
  for line in training: assert {"train/accuracy", "train/lr", "train/images_per_s", "seconds"} <= line.keys() and 0 <= line["train/accuracy"] <= 1
  for line in evaluation:
    assert {"eval/top5", "eval/loss", "eval/seconds", "seconds"} <= line.keys() and line["eval/target"] == 0.9
    assert 0 <= line["eval/top1"] <= line["eval/top5"] <= 1
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["final/top1"] == evaluation[-1]["eval/top1"] and summary["best_top1"] == max(line["eval/top1"] for line in evaluation)

  pictures = sorted(name for name in files if name.startswith("pictures/val-"))
  assert len(pictures) == 4 and [p[-11:] for p in pictures] == ["0000004.jpg", "0000008.jpg"] * 2
  for words in ("resnet10_quarter: 0.31 M trainable parameters, 7 classes, 32 training and 1000 validation pictures at 32x32", "size=32 (--size)",
                "epoch 1: top-1 ", "epoch 2: top-1 ", "best top-1 ", "target 0.9000: missed", f"weights: {folder / 'best.safetensors'}",
                f"python examples/train_retinanet.py --weights {folder} --backbone resnet10_quarter --data shapes:1"): assert words in done.stdout
  assert done.stderr == ""


def test_wandb_gets_the_worst_pictures_and_the_confusion(first):
  _, folder = first
  def tables(name):
    files = (folder / "wandb").glob(f"offline-run-*/files/media/table/eval/{name}_*.table.json")
    return [json.loads(p.read_text()) for p in sorted(files, key=lambda p: int(p.name.split("_")[-2]))]
  evaluation = [line for line in metrics(folder) if "eval/top1" in line]
  for line, pictures, classes, matrix in zip(evaluation, *map(tables, ("pictures", "classes", "confusion_matrix_table")), strict=True):
    assert pictures["columns"] == ["picture", "name", "loss", "truth", "found", "chance"] and len(pictures["data"]) == 32
    losses = [row[2] for row in pictures["data"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] > line["eval/loss"], "the worst first"
    for *_, truth, found, chance in pictures["data"]: assert truth != found and 1 / 7 < chance <= 1
    right, counts = sum(row[2] for row in matrix["data"] if row[0] == row[1]), sum(row[2] for row in matrix["data"])
    assert counts == 1000 and right / counts == pytest.approx(line["eval/top1"])
    assert sum(row[1] * row[2] for row in classes["data"]) == pytest.approx(right)


def test_weights_and_checkpoints_say_what_they_are(first):
  _, folder = first
  tensors, best = checkpoint.load(folder / "best.safetensors")
  assert (best["model"], best["norm"], best["size"], best["resize"], best["num_classes"]) == ("resnet10_quarter", "batch", [32, 32], 36, 7)
  assert best["class_names"] == ["circle", "square", "triangle", "star", "cross", "ring", "background"] and best["config"]["bs"] == 8
  line = next(line for line in metrics(folder) if "eval/top1" in line and line["step"] == best["step"])
  assert best["top1"] == line["eval/top1"] == json.loads((folder / "summary.json").read_text())["best_top1"] and best["epoch"] == line["epoch"]
  assert tensors["fc.weight"].shape == (7, 128) and tensors.keys() == get_state_dict(resnet.build("resnet10_quarter", 7)).keys()
  state, about = checkpoint.load(folder / "checkpoint-8.safetensors")
  assert (about["step"], about["epoch"]) == (8, 2) and state["optimizer.steps"] == 8 and state["model.bn1.num_batches_tracked"] == 8
  assert (state["optimizer.ema.fc.weight"] != state["model.fc.weight"]).any(), "what is learnt is saved beside its average"
  then, _ = checkpoint.load(folder / f"checkpoint-{best['step']}.safetensors")
  np.testing.assert_array_equal(tensors["fc.weight"], then["optimizer.ema.fc.weight"], "the average was evaluated, so it is the one to keep")


@pytest.mark.by_hand
def test_a_run_cut_short_goes_on_to_the_same_bits(first, tmp_path):
  _, folder = first
  shutil.copytree(folder, cut := tmp_path / "cut")
  (cut / "checkpoint-8.safetensors").unlink()
  done = trainer(tmp_path, "--resume", cut)
  assert done.returncode == 0, done.stderr[-3000:]
  (tensors, about), (again, about_again) = (checkpoint.load(f / "checkpoint-8.safetensors") for f in (folder, cut))
  assert tensors.keys() == again.keys() and about_again["run_id"] == about["run_id"]
  for key in tensors: np.testing.assert_array_equal(tensors[key], again[key], key)
  (one, other) = ([line for line in metrics(f) if line["step"] == 8 and "eval/top1" in line] for f in (folder, cut))
  assert [{k: line[k] for k in ("eval/top1", "eval/top5", "eval/loss")} for line in other] == [{k: one[0][k] for k in ("eval/top1", "eval/top5",
                                                                                                                    "eval/loss")}]


COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="module")
def coloured(first, tmp_path_factory):
  """A folder of three classes that differ in colour, mostly, pictures of many sizes, and a run on it that starts from the first run's weights."""
  out, rng = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
  for split, count in (("train", 16), ("validation", 7)):
    for name, colour in COLOURS.items():
      (out / "data" / split / name).mkdir(parents=True)
      for i in range(count):
        noise = rng.normal(rng.normal(colour, 75), 30, (*rng.integers(30, 80, 2), 3))
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(out / "data" / split / name / f"{i}.{'png' if i % 2 else 'JPG'}")
  (out / "data" / "train" / "red" / "notes.txt").write_text("")
  flags = ("--size 32 --backbone resnet10_quarter --bs 12 --epochs 4 --eval-every 4 --lr 0.003 --workers 1 --photometric --gpus 2 "
           "--wandb disabled --run-name colours --log-every 2 --warmup 0.25").split()
  done = trainer(out, "--data", out / "data", *flags, "--weights", first[1])
  assert done.returncode == 0, done.stderr[-3000:]
  return done, out / "data", out / "runs" / "colours"


@pytest.mark.by_hand
def test_an_image_folder_trains(coloured):
  done, _, folder = coloured
  assert "3 classes, 48 training and 21 validation pictures at 32x32 on CPU, CPU:1" in done.stdout
  assert re.search(r"^note: .*train: 1 file left out, not named as a picture \(first: red/notes\.txt\)$", done.stdout, re.MULTILINE)
  assert re.search(r"^note: .*best\.safetensors: knows other classes, .*fc\.weight", done.stdout, re.MULTILINE), "it says that the classifier is new"
  assert json.loads((folder / "config.json").read_text())["preset"] == "folder"
  training = [line["train/loss"] for line in metrics(folder) if "train/loss" in line]
  assert len(training) == 8 and np.mean(training[-2:]) < 0.8 * training[0], "it learns"
  assert json.loads((folder / "summary.json").read_text())["final/top1"] >= 0.6


@pytest.mark.by_hand
def test_top1_is_a_count_over_the_validation_pictures(coloured):
  """Each picture is read by Pillow, they go through the network at once and without a captured graph, and numpy counts."""
  _, data, folder = coloured
  assert checkpoint.load(folder / "best.safetensors")[1]["class_names"] == sorted(COLOURS)
  images, labels = [], []
  for path in sorted((data / "validation").rglob("*.*")):
    image = np.asarray(Image.open(path))
    sample = Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 1, image.shape[:2], image.shape[:2])
    images.append(center_crop_resize(37, 32)(sample, np.random.default_rng(0)).image)   # 32 / 0.875 is 36.57
    labels.append(sorted(COLOURS).index(path.parent.name))
  model = resnet.build("resnet10_quarter", 3)
  load_weights(str(folder / "best.safetensors"), model)
  with Context(TRAINING=0): logits = model(normalize(Tensor(np.stack(images)))).numpy().astype(np.float64)
  last = metrics(folder)[-1]
  assert last["eval/top1"] == pytest.approx(np.mean(logits.argmax(1) == labels), abs=1e-9) and last["eval/top5"] == 1
  each = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
  assert last["eval/loss"] == pytest.approx(each.mean(), abs=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_float64(smoothing):
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(0, 5, (9, 6)), np.array([3, -1, 0, 5, 5, -1, 1, 2, 4], np.int32)
  logits[3] = [1000, -1000, 0, 3, 2, 1]   # exp overflows in float32
  shifted = logits - logits.max(1, keepdims=True)
  logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
  targets = (1 - smoothing) * np.eye(6)[labels] + smoothing / 6
  known = labels >= 0
  expected = -(targets * logs).sum(1)[known].mean()
  slope = np.where(known[:, None], np.exp(logs) - targets, 0) / known.sum()
  tensor = Tensor(logits.astype(np.float32))
  loss = classification.cross_entropy(tensor, Tensor(labels), smoothing)
  gradient, = loss.gradient(tensor)
  assert loss.item() == pytest.approx(expected, rel=1e-5)
  np.testing.assert_allclose(gradient.numpy(), slope, atol=1e-6)
  assert classification.cross_entropy(tensor, Tensor(np.full(9, -1, np.int32)), smoothing).item() == 0


def test_ranks_and_losses_are_numpys():
  rng = np.random.default_rng(1)
  logits, labels = rng.normal(0, 3, (200, 11)).astype(np.float32), rng.integers(0, 11, 200)
  losses, ranks = classification.losses_and_ranks(logits, labels)
  order = np.argsort(-logits, 1)
  np.testing.assert_array_equal(ranks, np.argmax(order == labels[:, None], 1) + 1)
  wide = logits.astype(np.float64)
  np.testing.assert_allclose(losses, -np.log(np.exp(wide)[np.arange(200), labels] / np.exp(wide).sum(1)), rtol=1e-9)
  for worthless in (np.zeros((2, 11), np.float32), np.full((2, 11), np.nan, np.float32)):
    assert (classification.losses_and_ranks(worthless, np.array([0, 7]))[1] == 11).all(), "knowing nothing is no success"


@pytest.mark.parametrize(("flags", "words"), [
  (["--epoch", "3"], ["--epoch", "did you mean --epochs?"]), (["--data", "nowhere"], ["nowhere: is neither a folder", "crops:1"]),
  (["--data", "crops:7"], ["crops:7"]), (["--weights", "nowhere.safetensors"], ["nowhere.safetensors"]), (["--resume", "runs/gone"], ["runs/gone"]),
  (["--bs", "9", "--gpus", "2"], ["--bs 9", "--gpus 2"]), (["--resize", "31"], ["--resize 31", "--size 32"]),
  (["--backbone", "resnet19"], ["--backbone resnet19", "resnet18"]), (["--bs", "64"], ["crops:1", "do not fill one batch of 64"])])
def test_bad_input_is_one_line(flags, words, tmp_path):
  done = trainer(tmp_path, *TINY, "--out", tmp_path / "runs", *flags, timeout=120)
  assert done.returncode == 2
  message = done.stderr.splitlines()
  assert len(message) == 1 and message[0].startswith("error: ") and all(word in message[0] for word in words), done.stderr
  assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_one_class_and_differing_classes_are_named(tmp_path):
  for split in ("train", "val"):
    (tmp_path / split / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / split / "cat" / "1.png")
  done = trainer(tmp_path, "--data", tmp_path, "--wandb", "disabled", timeout=120)
  assert done.returncode == 2 and "has one class, cat" in done.stderr and done.stderr.count("\n") == 1
  (tmp_path / "val" / "dog").mkdir()
  done = trainer(tmp_path, "--data", tmp_path, "--wandb", "disabled", timeout=120)
  assert done.returncode == 2 and f"dog in {tmp_path / 'val'} only" in done.stderr and done.stderr.count("\n") == 1
  assert not (tmp_path / "runs").exists()
