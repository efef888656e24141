"""Installed, as a wheel or editable, the package is `tinydet`, and tinygrad's own top-level folder `extra` on the path disturbs neither."""
import os, shutil, subprocess, sys, sysconfig
from pathlib import Path
import pytest
from by_hand import by_hand

ROOT = Path(__file__).parents[1]
CODE = """
from extra.models.resnet import ResNet50   # tinygrad's
import numpy as np, tinydet
from tinydet import detect
assert "tinygrad_checkout" in __import__("extra").__file__
toy = tinydet.detectors.build("retinanet_resnet10_quarter_fpn", num_classes=3)
assert toy.network.num_classes == 3 and callable(toy.predict) and callable(detect)
print("found", len(detect(np.zeros((64, 64, 3), np.uint8), weights="shapes", score_threshold=0.0, max_detections=4)[0].scores), tinydet.__file__)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A copy of what is installed, and a stub of a tinygrad checkout."""
  folder = tmp_path_factory.mktemp("install")
  for part in ("extra", "examples"): shutil.copytree(ROOT / part, folder / "source" / part, ignore=shutil.ignore_patterns("__pycache__", "runs"))
  for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / part, folder / "source" / part)
  (folder / "tinygrad_checkout" / "extra" / "models").mkdir(parents=True)
  for part in ("extra", "extra/models"): (folder / "tinygrad_checkout" / part / "__init__.py").touch()
  (folder / "tinygrad_checkout" / "extra" / "models" / "resnet.py").write_text("ResNet50 = 'of tinygrad'\n")
  return folder


@pytest.mark.parametrize("kind", by_hand(["wheel", "editable"], "editable"))
def test_installed_beside_a_checkout_of_tinygrad(source, tmp_path, kind):
  subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
  python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
  site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout
  # what this environment has installed is there too, but for its own copy of the package: a path in a .pth file is not searched for .pth files
  (Path(site.strip()) / "others.pth").write_text("\n".join(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])))
  what = ["-e", str(source / "source")] if kind == "editable" else [str(source / "source")]
  subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *what], check=True, capture_output=True, timeout=300)
  environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(source / "tinygrad_checkout")}
  def run(*words):
    done = subprocess.run([str(word) for word in words], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
  out = run(python, "-c", CODE)
  assert "found 4" in out and ("source/extra" in out) == (kind == "editable") and (str(tmp_path / "venv") in out) == (kind == "wheel")
  command = python.parent / "tinydet"
  if kind == "editable": return
  assert "2 pictures" in run(command, "detect", "--weights", "shapes", "--data", "shapes:1", "--images", "2", "--out", tmp_path / "out")
  assert "--backbone" in run(command, "train", "--help") and "|detect|evaluate|explain|export|check|report" in run(command, "--help")
  assert "shapes" in run(command, "check", "shapes:1")
  done = subprocess.run([command, "fly"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and done.stderr.startswith("error: tinydet fly: no such command")
