"""train_yolo.py as its user runs it, on a network of two layers a level: it learns, goes on to the bit, and says what is wrong in a line."""
import functools, importlib.util, json
from pathlib import Path
import numpy as np, pytest
from tinydet.config import parse
from tinydet.errors import UserError
from tinydet.models import yolo, yolo_lists
from tinydet.models.layer_list import layer
from tinydet.models.yolo_blocks import Conv
from tinydet.runtime.mpi import ALONE
from tinydet.training.run import Run
from tinydet.weights import checkpoint

spec = importlib.util.spec_from_file_location("yolo_program", Path(__file__).parents[1] / "examples" / "train_yolo.py")
spec.loader.exec_module(program := importlib.util.module_from_spec(spec))

TINY = ("--data shapes:1 --weights none --size 64 --train-images 32 --bs 8 --epochs 2 --workers 0 --wandb disabled --run-name tiny --log-every 1 "
        "--lr 0.01 --warmup 0.1 --pictures 0 --keep 9 --eval-every 2").split()
SGD = ("--optimizer sgd --nesterov --momentum 0.9 --warmup-momentum 0.5 --warmup-bias-lr 0.1 --warmup 1 --schedule linear --last-lr 0.01 --ema 0.99 "
       "--ema-tau 5 --nominal-bs 16 --mosaic 1 --close-mosaic 1 --zoom 0.3 --shift 0.1 --hsv --mixup 0.5").split()


def tiny(num_classes):
  """Five strided convolutions and a head: as little as has three levels."""
  return [layer(Conv, 8, 3, 2), layer(Conv, 8, 3, 2), layer(Conv, 16, 3, 2), layer(Conv, 16, 3, 2), layer(Conv, 16, 3, 2),
          yolo_lists._head(2, 3, 4)(num_classes)]


@pytest.fixture(scope="module", autouse=True)
def small():
  """`yolov8t` is that network here."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(yolo_lists.NETWORKS, "yolov8t", tiny)
    patch.setattr(yolo, "facts", lambda name, real=yolo.facts: real(name)._replace(backbone=5) if name == "yolov8t" else real(name))
    yolo.shapes_of.cache_clear()
    yield
    yolo.shapes_of.cache_clear()


def run(folder, *flags):
  config = parse(program.Config, program.PRESETS, [*TINY, "--model", "yolov8t", "--out", str(folder), *flags], {})
  run = Run(config, ALONE, config.model, 0.0)
  try: program.main(config, run)
  finally: run.close()
  return folder / "tiny"


@pytest.fixture(scope="module", params=[pytest.param((), marks=pytest.mark.by_hand), SGD], ids=["adamw", "recipe"])
def first(request, tmp_path_factory):
  return run(tmp_path_factory.mktemp("yolo"), *request.param), request.param


def test_it_learns_and_its_file_says_what_it_is(first):
  folder, flags = first
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  losses = [line["train/loss"] for line in lines if "train/loss" in line]
  assert len(losses) == 8 and np.mean(losses[-2:]) < losses[0]
  for line in lines:
    if "train/loss" not in line: continue
    assert line["train/loss"] == pytest.approx(8 * sum(line[f"train/{part}"] for part in ("box", "classes", "sides")), rel=1e-4)
  assert {"report.html", "best.safetensors"} <= {path.name for path in folder.iterdir()}
  _, about = checkpoint.load(folder / "best.safetensors")
  assert (about["model"], about["num_classes"], about["size"], about["input"]["letterbox"]) == ("yolov8t", 6, [64, 64], True)
  state, _ = checkpoint.load(folder / "checkpoint-8.safetensors")
  assert state["optimizer.steps"] == (4 if flags else 8) and ("optimizer.ema.model.0.conv.weight" in state) == bool(flags)


def test_a_resumed_run_is_the_same_to_the_bit(first, tmp_path):
  whole, flags = first
  run(tmp_path, *flags, "--save-steps", "3")
  for part in (tmp_path / "tiny").glob("checkpoint-[4-9]*"): part.unlink()   # it goes on from 3, in the middle of an epoch and of an update
  run(tmp_path, *flags, "--resume", "auto")
  a, b = (checkpoint.load(folder / "checkpoint-8.safetensors")[0] for folder in (whole, tmp_path / "tiny"))
  assert a.keys() == b.keys()
  for key, values in a.items(): np.testing.assert_array_equal(values, b[key], err_msg=key)


@pytest.mark.parametrize(("flags", "words"), [
  (["--model", "yolov9"], "--model yolov9"), (["--size", "70"], "--size 70x70: yolov8t needs sides that are multiples of 32, such as 64"),
  (["--mosaic", "1", "--scale-jitter"], "--scale-jitter: does what --zoom does")])
def test_bad_input_is_one_line(flags, words, tmp_path):
  with pytest.raises(UserError) as error: run(tmp_path, *flags)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_presets_are_what_is_published():
  coco = program.PRESETS["coco"]
  published = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.937, "weight_decay": 5e-4, "warmup": 3.0, "warmup_momentum": 0.8, "warmup_bias_lr": 0.1,
               "schedule": "linear", "last_lr": 0.01, "nominal_bs": 64, "mosaic": 1.0, "zoom": 0.5, "shift": 0.1, "ema": 0.9999, "ema_tau": 2000.0}
  assert published.items() <= coco.items() and program.Config(**coco).close_mosaic == 10
  for preset in program.PRESETS.values(): program.Config(**preset)
  # 500,200 batches of 64 of COCO's 118,287 pictures, the rate divided by 10 at 400,000 and 450,000 (darknet's cfg files)
  v3 = program.PRESETS["coco-v3"]
  batches = 118287 / 64
  assert v3["bs"] * v3["accumulate"] == 64 and [round(n / batches) for n in (400_000, 450_000, 500_200)] == [*v3["milestones"], v3["epochs"]]
  assert {name.removeprefix("coco-"): preset["epochs"] for name, preset in program.PRESETS.items() if name.startswith("coco-")} == {
    "v3": 271, "v4": 271, "v5": 300, "v6": 300, "v7": 300, "v9": 500, "v10": 500, "12": 600, "26": 500}


def test_every_family_is_offered():
  families = {"yolov5n", "yolov6l", "yolov8t", "yolov9c", "yolov10x", "yolo11n", "yolo12s", "yolo26n", "yolov3", "yolov4-tiny", "yolov7"}
  assert families | {"yolov5n-classic"} <= set(program.yolo.NAMES)


def test_shares_of_yolo26s_heads_change(monkeypatch):
  seen = []
  detector = program.detectors.build("yolo26n", 2)
  monkeypatch.setattr(program.yolo, "side_losses", lambda *args: {"box": 1.0 if args[-1].last_topk else 0.0})
  for progress in (0.0, 0.5, 1.0):
    detector.progress = functools.partial(float, progress)
    seen.append(detector.losses((0,) * 4, np.zeros((1, 1, 4)), None, (32, 32))["loss"])
  assert seen == pytest.approx([0.2, 0.55, 0.9])
