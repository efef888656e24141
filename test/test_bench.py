import json, math, os, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--backbone", "resnet10_quarter", "--size", "64", "--bs", "2", "--steps", "1", "--loader-images", "3", "--postprocess-size", "64"]
STEP = {"first_step_s", "captured_step_s", "step_median_s", "step_min_s", "images_per_s", "kernels", "gflop", "gflop_per_s", "peak_device_mb",
        "peak_process_mb"}


def bench(folder, *flags, **environ):
  environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "DEV": "CPU", "NO_COLOR": "1"} | environ
  return subprocess.run([sys.executable, str(ROOT / "examples" / "bench_retinanet.py"), *flags], cwd=folder, env=environ, capture_output=True,
                        text=True, stdin=subprocess.DEVNULL, check=False, timeout=600)


def test_numbers_of_a_tiny_detector(tmp_path):
  done = bench(tmp_path, *TINY, "--json", "out.json", DEBUG="2")   # tinygrad then prints a line for each kernel that it runs
  assert done.returncode == 0, done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["out.json"]       # neither a cache nor a half-written file
  results = json.loads((tmp_path / "out.json").read_text())
  step = results["step"]
  assert set(step) == STEP and set(results["loader"]) == {"shapes:2"} and set(results["postprocess"]) == {"trained", "untrained"}
  assert all(math.isfinite(v) and v > 0 for v in [*step.values(), *results["loader"].values(), *results["postprocess"].values()])
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
  (["--json", "nowhere/out.json"], "--json nowhere/out.json: its folder does not exist"), (["--plain", "--baseline"], "choose one of them")])
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
