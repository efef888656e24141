"""ONNX files of detectors, run in onnxruntime: the numbers are the detector's own, for any number of pictures; what is not the same is not kept."""
import importlib.util, itertools, json, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinygrad import Tensor
from tinydet import detectors, export
from tinydet.config import parse
from tinydet.datasets.shapes import Shapes
from tinydet.errors import UserError
from tinydet.nn import kernel_cpu
from tinydet.nn.conv import conv2d
from tinydet.runtime import c_source, clang
from yolo_golden import fill
from by_hand import by_hand

onnxruntime = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("program_export", ROOT / "examples" / "export.py")
spec.loader.exec_module(program := importlib.util.module_from_spec(spec))
OPTIONS = {"score_threshold": 0.05, "nms_threshold": None, "max_detections": 300}


def session(path): return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path, images):
  found = session(path)
  return dict(zip([output.name for output in found.get_outputs()], found.run(None, {"images": images})))


@pytest.mark.parametrize("name", [pytest.param("yolov8t", marks=pytest.mark.by_hand), pytest.param("yolo12n", marks=pytest.mark.by_hand),
                                  "yolov4-tiny"])
def test_every_kind_of_network(name, tmp_path):
  detector = detectors.build(name, 80 if name == "yolov4-tiny" else 3)
  fill(detector.network)
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
  with export.write_onnx(tmp_path / "x.onnx", detector, (64, 96), detector.about(), outputs="decoded", **OPTIONS): pass
  ours, found = detector.predict(images), run(tmp_path / "x.onnx", images)
  size = np.abs(ours.boxes[..., 2:] - ours.boxes[..., :2]).max(-1)
  assert (np.abs(found["boxes"] - ours.boxes).max(-1) <= 1e-3 * size + 0.05).all()
  np.testing.assert_allclose(found["scores"], ours.scores, atol=2e-4)
  one = run(tmp_path / "x.onnx", images[1:2])
  np.testing.assert_allclose(one["scores"], found["scores"][1:2], atol=1e-5)
  assert (found["scores"][0] != found["scores"][1]).any()


@pytest.mark.parametrize(("outputs", "preprocess"), by_hand(
  itertools.product(["raw", "decoded", "detections"], [True, False]), ("raw", False), ("decoded", True), ("detections", False)))
def test_the_shipped_detector(outputs, preprocess, tmp_path):
  detector, about, _ = detectors.open_detector("shapes")
  images = np.stack([Shapes("val", 1, size=128, count=3)[i].image for i in range(3)])
  options = {"outputs": outputs, "preprocess": preprocess, **OPTIONS}
  with export.write_onnx(tmp_path / "x.onnx", detector, (128, 128), about, **options) as partial:
    assert export.compare(partial, detector, images[0], **options) < 1e-4
  assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]
  found = session(tmp_path / "x.onnx")
  shape = found.get_inputs()[0].shape
  assert shape == (["batch", 128, 128, 3] if preprocess else ["batch", 3, 128, 128])
  known = json.loads(found.get_modelmeta().custom_metadata_map["tinydet"])
  assert known["class_names"] == about["class_names"] and known["model"] == detector.name
  if outputs != "detections": return
  rows = run(tmp_path / "x.onnx", images if preprocess else detector.prepare(Tensor(images)).numpy())["detections"]
  own = detector.detect(detector.infer(Tensor(images).realize()), (128, 128), np.full((3, 2), 128), score_threshold=0.05, topk=100_000)
  for i in range(3):
    mine = rows[rows[:, 0] == i]
    mine = mine[np.argsort(-mine[:, 5], kind="stable")]
    n = own.counts[i]
    assert len(mine) == n
    np.testing.assert_allclose(mine[:, 5], own.scores[i, :n], atol=1e-5)
    assert sorted(mine[:, 6].astype(int)) == sorted(own.labels[i, :n].tolist())
    for row in mine: assert np.abs(row[1:5] - own.boxes[i, :n]).max(1).min() < 1e-2


@pytest.mark.by_hand
def test_a_one_to_one_head_needs_no_suppression(tmp_path):
  detector = detectors.build("yolov10n", 3)
  fill(detector.network)
  images = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
  options = {"outputs": "detections", "preprocess": True, "score_threshold": 0.1, "nms_threshold": None, "max_detections": 300}
  with export.write_onnx(tmp_path / "x.onnx", detector, (64, 96), {}, **options) as partial: export.compare(partial, detector, images[0], **options)
  rows, candidates = run(tmp_path / "x.onnx", images)["detections"], detector.predict(images)
  assert len(rows) == (candidates.scores > 0.1).sum() > 5


def test_a_file_that_computes_something_else_is_not_kept(tmp_path):
  detector, about, _ = detectors.open_detector("shapes")
  image = Shapes("val", 1, size=128, count=1)[0].image
  with pytest.raises(UserError, match=r"off by .* the file is not kept"), \
       export.write_onnx(tmp_path / "x.onnx", detector, (128, 128), about, **OPTIONS) as partial:
    head = detector.network.head.regression_head.bbox_reg
    head.bias.assign(head.bias + 1).realize()
    export.compare(partial, detector, image, outputs="decoded", preprocess=True, **OPTIONS)
  assert not list(tmp_path.iterdir())


def export_with(*flags): program.main(parse(program.Config, {}, [str(flag) for flag in flags], {}))


def test_the_program(tmp_path, capsys):
  export_with("--out", tmp_path / "a.onnx", "--size", "64x96", "--outputs", "detections")
  assert "a.onnx: retinanet_resnet10_quarter_fpn, " in capsys.readouterr().out and (tmp_path / "a.onnx").stat().st_size > 1e6
  export_with("--out", tmp_path / "a.pth", "--half")
  assert "116 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
  (["--out", "x.tflite"], r"--out .*x\.tflite: end it with \.onnx"), (["--out", "none/x.onnx"], r"cannot write .*none"),
  (["--out", "x.onnx", "--check", "gone.png"], "gone.png: cannot be read"), (["--out", "x.onnx", "--outputs", "boxes"], "one of raw, decoded")])
def test_bad_input_is_one_line(flags, message, tmp_path):
  with pytest.raises(UserError, match=message): export_with("--out", tmp_path / flags[1], *flags[2:])
  assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "onnx", None)
  with pytest.raises(UserError, match=r"needs the package onnx: pip install onnx onnxruntime"): export_with("--out", tmp_path / "x.onnx")
  assert not list(tmp_path.iterdir())


def test_kernels_of_every_kind_share_a_file(monkeypatch):
  """Whatever a kernel in C defines, it is no other's: two of each kind, and those of gradients, are one file."""
  sources, spelled = [], kernel_cpu.spelled
  monkeypatch.setattr(kernel_cpu, "spelled", lambda *args: sources.append((args[0], spelled(*args))) or sources[-1][1])
  monkeypatch.setattr(kernel_cpu, "_traced", {})
  for side in (24, 28):
    for channels, kernel, stride, groups in ((40, 3, 1, 1), (40, 1, 1, 1), (4, 3, 2, 1), (4, 1, 2, 1), (8, 3, 1, 8), (8, 5, 2, 8), (6, 3, 1, 2)):
      shapes = (2, channels, side, side), (channels, channels // groups, kernel, kernel), (channels,)
      tensors = [Tensor.empty(*shape).realize() for shape in shapes]
      conv2d(*tensors, stride, kernel // 2, groups, silu=True).sum().gradient(*tensors)
  assert len({name for name, _ in sources}) >= 3 and len(sources) > 30
  text = "\n".join(c_source._alone(source, f"k{i}") for i, (_, source) in enumerate(sources))
  command = [*clang.command(), "-x", "c", "-fsyntax-only", "-ffreestanding", "-"]
  done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
@pytest.mark.parametrize("name", ["yolov8t", pytest.param("yolov4-tiny", marks=pytest.mark.by_hand)])
def test_c_of_networks(name, tmp_path):
  detector = detectors.build(name, 80 if name == "yolov4-tiny" else 3)
  fill(detector.network)
  image = np.random.default_rng(2).integers(0, 256, (64, 96, 3), dtype=np.uint8)
  assert export.write_c(tmp_path / "x.c", detector, image) < 2e-4
  assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.c"]


@pytest.mark.by_hand
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_the_program_in_c_finds_what_the_detector_finds(tmp_path):
  detector, _, _ = detectors.open_detector("shapes")
  images = [Shapes("val", 1, size=128, count=2)[i].image for i in range(2)]
  export.write_c(tmp_path / "x.c", detector, images[0])
  subprocess.run(["gcc", "-O2", "-w", "x.c", "-o", "x", "-lm"], check=True, cwd=tmp_path)
  from tinygrad import Tensor
  for image in images:
    Image.fromarray(image).save(tmp_path / "p.ppm")
    printed = subprocess.run(["./x", "p.ppm", "x.bin", "0.3"], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    rows = np.array([line.split() for line in printed.splitlines()], float)
    own = detector.detect(detector.infer(Tensor(image[None]).realize()), (128, 128), np.full((1, 2), 128), score_threshold=0.3)
    n = own.counts[0]
    assert len(rows) == n > 0
    np.testing.assert_allclose(rows[:, 1], own.scores[0, :n], atol=1e-4)
    np.testing.assert_array_equal(rows[:, 0], own.labels[0, :n])
    np.testing.assert_allclose(rows[:, 2:].clip(0, 128), own.boxes[0, :n], atol=0.01)
  Image.fromarray(images[0][:100]).save(tmp_path / "p.ppm")
  refused = subprocess.run(["./x", "p.ppm"], check=False, cwd=tmp_path, capture_output=True, text=True)
  assert refused.returncode == 2 and "128x128" in refused.stderr


@pytest.mark.by_hand
def test_c_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
  detector, _, _ = detectors.open_detector("shapes")
  image = Shapes("val", 1, size=128, count=1)[0].image
  with pytest.raises(UserError, match="cannot write"): export.write_c(tmp_path / "none" / "x.c", detector, image)
  for taken in ("y.c", "z.bin"):
    (folder := tmp_path / taken).mkdir()
    with pytest.raises(UserError, match="is a folder"): export.write_c(folder.with_suffix(".c"), detector, image)
    assert [p.name for p in tmp_path.iterdir()] == [taken]
    folder.rmdir()
  predict = detector.predict
  monkeypatch.setattr(detector, "predict", lambda batch: type(found := predict(batch))(found.boxes + 9, found.scores))
  if shutil.which("cc"):
    with pytest.raises(UserError, match="not kept"): export.write_c(tmp_path / "x.c", detector, image)
  assert not list(tmp_path.iterdir())
