"""The program that counts a step's kernels for a GPU that is not here: least times by hand, and the whole against a published number."""
import importlib.util, json, subprocess, sys
from pathlib import Path
import pytest
from tinydet.config import parse
from tinydet.errors import UserError

PROGRAM = Path(__file__).parents[1] / "examples" / "roofline.py"
spec = importlib.util.spec_from_file_location("program_roofline", PROGRAM)
spec.loader.exec_module(program := importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(("flop", "touched", "asked", "matrix", "seconds", "limit"), [
  (790e12, 1, 1, True, 1.0, "matrix"), (67e12, 1, 1, False, 1.0, "arithmetic"), (1, 6700e9, 1, True, 2.0, "memory"),
  (1, 1, 5500e9, False, 1.0, "cache"), (1, 1, 1, False, 1.5e-6, "launch")])
def test_what_a_kernel_waits_for(flop, touched, asked, matrix, seconds, limit):
  kernel = program.Kernel("k", flop, touched, asked, matrix, "")
  assert kernel.least(program.Config()) == (pytest.approx(seconds), limit)


@pytest.mark.parametrize(("flags", "message"), [
  (["--model", "yolov8"], "--model yolov8: no such detector; did you mean"),
  (["--json", "none/x.json"], "--json none/x.json: its folder does not exist")])
def test_bad_input_is_said_before_anything_is_made(flags, message):
  with pytest.raises(UserError, match=message): parse(program.Config, {}, flags, {})


@pytest.mark.by_hand
def test_detection_multiplies_what_is_published(tmp_path):
  """YOLOv8n does 8.7 GFLOP at 640 pixels; sides that a matrix unit's do not divide are padded."""
  flags = ["--model", "yolov8n", "--size", "640", "--bs", "1", "--classes", "80", "--detection", "--json", str(tmp_path/"kernels.json")]
  done = subprocess.run([sys.executable, PROGRAM, *flags], capture_output=True, text=True, check=False, timeout=900)
  assert done.returncode == 0, done.stderr
  kernels = json.loads((tmp_path/"kernels.json").read_text())
  flop = sum(kernel["runs"] * kernel["flop"] for kernel in kernels)
  assert 8.7e9 < flop < 11e9
  assert sum(kernel["runs"] * kernel["flop"] for kernel in kernels if kernel["matrix"]) > 0.95 * flop
  assert f"{sum(kernel['runs'] for kernel in kernels)} kernels" in done.stdout
