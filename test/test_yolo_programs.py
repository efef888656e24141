"""The programs with files of YOLO weights in their authors' formats: the numbers are those of the official programs (golden/yolo/README.md)."""
import csv, importlib.util, json
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinydet import detect, detectors
from tinydet.class_names import COCO80
from tinydet.config import parse
from tinydet.errors import UserError
from tinydet.models import yolo
from official_files import Models
from test_yolo_networks import matched
from test_yolo_weights import AUTHORS, NAMES, state
from yolo_golden import GOLDEN, darknet_stream
from by_hand import by_hand

ROOT = Path(__file__).parents[1]


def program(name):
  spec = importlib.util.spec_from_file_location(f"program_{name}", ROOT / "examples" / f"{name}.py")
  spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
  return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Weights as their authors write them, with golden values, and the golden pictures."""
  folder = tmp_path_factory.mktemp("yolo")
  for name in ("yolov8n", "yolov10n"): Models(*AUTHORS[name]).write(folder / f"{name}.pt", state(name), NAMES, half=False)
  (folder / "some.weights").write_bytes(np.array([0, 2, 5, 0, 0], "<i4").tobytes() + darknet_stream(yolo.build("yolov4-tiny"))[0].tobytes())
  for name in ("yolov8n", "yolov10n", "yolov4-tiny"):
    (folder / f"{name}-pictures").mkdir()
    for i, image in enumerate(np.load(GOLDEN / f"{name}.npz")["images"]): Image.fromarray(image).save(folder / f"{name}-pictures" / f"{i}.png")
  return folder


def rows_of(out, names, i):
  """x1, y1, x2, y2, score, class of what `detect.py` found on a picture."""
  found = [row for row in csv.DictReader(open(out / "detections.csv", encoding="utf-8")) if Path(row["file"]).stem == str(i)]
  entries = [e for e in json.loads((out / "detections.json").read_text()) if e["image_id"] == i + 1]
  assert len(found) == len(entries)
  return np.array([[*e["bbox"][:2], e["bbox"][0] + e["bbox"][2], e["bbox"][1] + e["bbox"][3], e["score"], names.index(r["class"])]
                   for r, e in zip(found, entries)]).reshape(-1, 6)


@pytest.mark.parametrize(("name", "file", "key", "flags"), by_hand([
  ("yolov8n", "yolov8n.pt", "nms_val{}", ["--score-threshold", "0.001"]),
  ("yolov10n", "yolov10n.pt", "one2one_detections", ["--score-threshold", "0"]),
  ("yolov4-tiny", "some.weights", "nms{}", ["--score-threshold", "0.4", "--max-detections", "2000"])], "yolov8n", "yolov4-tiny"))
def test_detect_finds_what_the_official_program_finds(files, tmp_path, name, file, key, flags):
  golden, run = np.load(GOLDEN / f"{name}.npz"), program("detect")
  height, width = golden["images"].shape[1:3]
  words = ["--weights", str(files / file), "--size", f"{width}x{height}", "--bs", "1", "--out", str(tmp_path / "out"), *flags]
  config = parse(run.Config, {}, words, {})
  config.source = (str(files / f"{name}-pictures"),)
  run.main(config)
  for i in range(2):
    expected = golden[key.format(i)] if "{}" in key else golden[key][i]
    expected = np.array(expected, np.float64).reshape(-1, 6)
    if key.startswith("one2one"): expected = expected[expected[:, 4] > 0]
    found = rows_of(tmp_path / "out", NAMES if name != "yolov4-tiny" else list(COCO80), i)
    expected[:, :4] = expected[:, :4].clip(0, [width, height] * 2)   # as programs show boxes
    found[:, :4] = found[:, :4].clip(0, [width, height] * 2)
    assert len(expected) and matched(found, expected) >= 0.99


@pytest.mark.by_hand
def test_evaluate_and_explain_take_them(files, tmp_path, capsys):
  """Scores on truth that was made of the network's own best detections, by classes that it knows under other numbers."""
  picture = files / "yolov8n-pictures" / "0.png"
  size = Image.open(picture).size
  found, = detect(picture, files / "yolov8n.pt", size=size, score_threshold=0.3)
  assert set(found.names) <= set(NAMES) and len(found.names) > 1
  (tmp_path / "annotations").mkdir()
  (tmp_path / "val").mkdir()
  Image.open(picture).save(tmp_path / "val" / "a.png")
  used = sorted(set(found.names))
  boxes = [(*map(float, (x1, y1, x2 - x1, y2 - y1)), name) for (x1, y1, x2, y2), name in zip(found.boxes.clip(0, [*size] * 2), found.names)]
  truth = {"images": [{"id": 7, "file_name": "a.png", "width": size[0], "height": size[1]}],
           "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(used)],
           "annotations": [{"id": i + 1, "image_id": 7, "category_id": 10 + used.index(name), "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                           for i, (x, y, w, h, name) in enumerate(boxes) if w > 1 and h > 1]}
  (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(truth))
  run = program("evaluate")
  run.main(parse(run.Config, {}, ["--weights", str(files / "yolov8n.pt"), "--data", str(tmp_path), "--size", f"{size[0]}x{size[1]}", "--bs", "1",
                                  "--workers", "0", "--to-json", str(tmp_path / "found.json")], {}))
  out = capsys.readouterr().out
  assert "yolov8n from" in out and "never learnt" not in out
  mAP50 = float(next(line for line in out.splitlines() if "IoU=0.50 " in line).rpartition("=")[2])
  assert mAP50 > 0.9 and {e["category_id"] for e in json.loads((tmp_path / "found.json").read_text())} <= {c["id"] for c in truth["categories"]}

  run = program("explain")
  config = parse(run.Config, {}, ["--weights", str(files / "yolov8n.pt"), "--size", f"{size[0]}x{size[1]}", "--top", "1", "--threshold", "0.3",
                                  "--out", str(tmp_path / "why")], {})
  config.source = (str(picture),)
  run.main(config)
  why, = json.loads((tmp_path / "why" / "explanations.json").read_text())["pictures"][0]["detections"]
  assert why["class"] == found.names[0] and why["score"] == pytest.approx(float(found.scores[0]), abs=1e-4)
  assert list(why["shares"]) == ["C3", "C4", "C5"] and sum(why["shares"].values()) == pytest.approx(1)


@pytest.mark.by_hand
def test_letterboxed_pictures_and_tiles(files):
  """A picture of other proportions comes back in its own pixels; class names are the file's."""
  image = np.asarray(Image.open(files / "yolov8n-pictures" / "0.png"))
  wide = np.full((image.shape[0], image.shape[1] * 2, 3), 114, np.uint8)
  wide[:, image.shape[1] // 2:image.shape[1] // 2 + image.shape[1]] = image
  detector = detectors.open_detector(str(files / "yolov8n.pt"))[0]
  fit = detector.fit((64, 64))
  sample = fit.place(wide)
  assert fit.letterbox and sample.origin == (20, 0) and sample.content_size == (24, 64) and (sample.image[:20] == 114).all()
  found, = detect(wide, files / "yolov8n.pt", size=64, score_threshold=0.2, tile=48)
  assert (found.boxes >= 0).all() and (found.boxes <= [wide.shape[1], wide.shape[0]] * 2).all() and set(found.names) <= set(NAMES)
  with pytest.raises(UserError, match="--size 70x70: yolov8n needs sides that are multiples of 32, such as 64"): detect(
    image, files / "yolov8n.pt", size=70)
