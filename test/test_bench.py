import dataclasses, importlib.util, json, math, os, re, subprocess, sys
from pathlib import Path
import pytest
from tinydet.errors import UserError

ROOT = Path(__file__).parents[1]
TINY = ["--backbone", "resnet10_quarter", "--size", "64", "--bs", "2", "--steps", "1", "--loader-images", "3", "--postprocess-size", "64"]
STEP = {"first_step_s", "captured_step_s", "step_median_s", "step_min_s", "images_per_s", "kernels", "gflop", "gflop_per_s", "peak_device_mb",
        "peak_process_mb"}


def bench(folder, *flags, **environ):
  environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "DEV": "CPU", "NO_COLOR": "1"} | environ
  return subprocess.run([sys.executable, str(ROOT / "examples" / "bench_retinanet.py"), *flags], cwd=folder, env=environ, capture_output=True,
                        text=True, stdin=subprocess.DEVNULL, check=False, timeout=600)


def program(name="bench_retinanet"):
  spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
  spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
  return module


def test_the_table_has_a_column_for_each_form_and_for_its_ratio():
  step = dict.fromkeys(STEP, 2.0)
  results = {"step": step, "loader": {}, "reading": {}, "postprocess": {}, "plain": dict.fromkeys(STEP, 8.0), "ratios": dict.fromkeys(STEP, 4.0),
             "torch": {"step_median_s": 0.5, "threads": 2, "device": "cpu"}, "torch_ratios": {"step_median_s": 4.0}}
  head, *rows = program().table(results).splitlines()
  assert head.split() == ["ours", "plain", "plain/ours", "torch", "ours/torch"] and len(rows) == len(STEP) + 1
  cells = {row[:32].strip(): [row[i:i + 12].strip() for i in range(32, len(row), 12)] for row in rows}
  assert cells["step, median, s"] == ["2", "8", "4.00", "0.5", "4.00"]
  assert cells["kernels a step"] == ["2", "8", "4.00"] and cells["threads"] == ["", "", "", "2"]
  read = {"drawn": {"ours": 6.0, "worker": 7.0, "pillow": 5.0, "ratio": 1.25, "worker_ratio": 1.5}}
  alone = program().table({"config": {"loader_size": [80, 60]}, "step": step, "loader": {"shapes:2": 5.0}, "reading": read, "postprocess": {}})
  assert [" ".join(line.split()) for line in alone.splitlines()[len(STEP):]] == [
    "loader, shapes:2, images/s 5", "read at 80x60 in process a worker Pillow ours/Pillow worker/Pillow", "drawn, images/s 6 7 5 1.25 1.5"]


@pytest.mark.by_hand
def test_what_a_backbone_costs(capsys):
  backbones = program("bench_backbones")
  backbones.main(backbones.Config(size=(64, 64), bs=2, classes=3), ("resnet10_quarter",))
  head, _, row = capsys.readouterr().out.splitlines()[-3:]
  name, parameters, training, detection = (cell.strip() for cell in row.strip("|").split("|"))
  assert name == "`resnet10_quarter`" and parameters == "0.5" and float(training) > 1 and float(detection) > 1 and head.count("|") == 5


def test_a_backbone_that_is_none_is_named():
  backbones = program("bench_backbones")
  with pytest.raises(UserError, match="nonet: no such backbone"): backbones.main(backbones.Config(), ("resnet18", "nonet"))


def test_the_table_of_growth_compares_with_its_first_row():
  growth = program("bench_growth")
  rows = {n: dict.fromkeys(growth.STEP, 1.5 * n) | {"post-processing, trained, ms": 4.0} for n in (2, 4)} | {8: None}
  head, *lines = growth.table("bs", rows).splitlines()
  assert head.split()[0] == "bs" and head.endswith("  post-processing, trained, ms")
  assert [line.split() for line in lines] == [["2", *["3", "x1.00"] * 5, "4", "x1.00"], ["4", *["6", "x2.00"] * 5, "4", "x1.00"], ["8", "failed"]]
  assert growth.table("bs", {2: None}) == "bs: all failed"
  flags = {field.name for field in dataclasses.fields(program().Config)}
  assert set(growth.SWEEPS) == set(growth.BASE) <= flags


@pytest.mark.by_hand
def test_numbers_of_a_tiny_detector(tmp_path):
  done = bench(tmp_path, *TINY, "--json", "out.json", DEBUG="2")   # tinygrad then prints a line for each kernel that it runs
  assert done.returncode == 0, done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["out.json"]       # neither a cache nor a half-written file
  results = json.loads((tmp_path / "out.json").read_text())
  step = results["step"]
  assert set(step) == STEP and set(results["loader"]) == {"shapes:2"} and set(results["postprocess"]) == {"trained", "untrained"}
  read, = results["reading"].values()
  assert set(read) == {"ours", "worker", "pillow", "ratio", "worker_ratio"}
  assert all(math.isfinite(v) and v > 0 for v in [*step.values(), *results["loader"].values(), *read.values(), *results["postprocess"].values()])
  assert (results["device"], results["config"]["size"], results["config"]["bs"]) == ("CPU", [64, 64], 2)

  second_step = re.search(r"^step 1: .*?^step 2: ", done.stdout, re.DOTALL | re.MULTILINE)
  assert step["kernels"] == len(re.findall(r"^\*\*\* ", second_step[0], re.MULTILINE))

  assert step["step_min_s"] == step["step_median_s"] < step["captured_step_s"] == step["first_step_s"]
  assert step["images_per_s"] == pytest.approx(2 / step["step_median_s"])
  assert step["gflop_per_s"] == pytest.approx(step["gflop"] / step["step_median_s"])
  # What the two heads alone need: 86 positions on five levels, four convolutions of 32 channels each, then 9 x (10 classes + 4 coordinates); a step
  # computes outputs, input gradients and weight gradients.
  heads = 3 * 2 * 2 * 86 * 9 * 32 * (2 * 4 * 32 + 9 * (10 + 4)) / 1e9
  assert heads < step["gflop"] < 5 * heads


@pytest.mark.parametrize("flags, message", [
  (["--bogus", "1"], "--bogus: no such flag"), (["--steps", "0"], "--steps 0: expected a whole number, at least 1"),
  (["--json", "nowhere/out.json"], "--json nowhere/out.json: its folder does not exist"), (["--plain", "--baseline"], "choose one of the three"),
  (["--torch", "--backbone", "resnet10_quarter"], "--backbone resnet10_quarter: torchvision has none of that name"),
  (["--data", "shapes:1"], "--data shapes:1: give a folder of files to read"),
  (["--torch", "--gpus", "2"], "--gpus 2: torchvision is measured on one device"),
  pytest.param(["--torch"], "torch and torchvision not installed: pip install torch", marks=pytest.mark.skipif(
    importlib.util.find_spec("torch") is not None, reason="torch is installed"))])
def test_what_the_user_can_mend_exits_with_2(tmp_path, flags, message):
  done = bench(tmp_path, *flags)
  assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
  assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="looks into /proc")
def test_numbers_of_a_small_part_of_openimages(tmp_path):
  flags = ["--folder", "data", "--images", "300", "--classes", "9", "--workers", "1", "--val-images", "40", "--val-detections", "20",
           "--against-pycocotools"]
  done = subprocess.run([sys.executable, str(ROOT / "examples" / "bench_scale.py"), *flags], cwd=tmp_path, capture_output=True, text=True,
                        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}, check=False, timeout=300)
  assert done.returncode == 0, done.stderr
  boxes = len(json.loads((tmp_path / "data" / "annotations" / "instances_train.json").read_text())["annotations"])
  assert all(f"{what} open: 300 pictures, {boxes:,} boxes" in done.stdout for what in ("first", "second"))
  numbers = re.search(r"each holds, MB: Private_Dirty (\d+), Pss (\d+), Rss (\d+)\n800 detections on 40 pictures, 9 classes", done.stdout)
  assert numbers and 0 < int(numbers[1]) <= int(numbers[2]) <= int(numbers[3])
  assert 0 < float(re.search(r"mAP (\S+)", done.stdout)[1]) < 1
  assert re.search(r"pycocotools, .* peak \d+ MB, of which \d+ MB before\nidentical: precision, recall, the 12 numbers\n$", done.stdout)
