"""One set of labelled pictures, written as each tool writes it, reads as the same boxes: corners in pixels, held against what was drawn."""
import csv, json, os, re, shutil
from pathlib import Path
from urllib.parse import quote
import numpy as np, pytest
from PIL import Image, ImageDraw
from tinydet.datasets import check, layouts, open_dataset, split
from tinydet.detection.anchor_fit import anchor_shapes, best_iou
from tinydet.config import parse
from tinydet.errors import UserError
from tinydet.runtime.mpi import ALONE
from tinydet.training.detection import DetectionConfig, open_splits

WIDTH, HEIGHT, COUNT = 96, 64, 10
NAMES = ("cat", "dog")


def boxes_of(i: int) -> list[tuple[str, int, int, int, int]]:
  """Class and xyxy of the rectangles on picture i; the last picture has none."""
  return [] if i == COUNT - 1 else [(NAMES[i % 2], 5 + 3 * i, 6 + 2 * i, 25 + 3 * i, 20 + 2 * i), (NAMES[1 - i % 2], 50, 30, 74, 50)]


def picture(i: int) -> Image.Image:
  image = Image.fromarray(np.random.default_rng(i).integers(20, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8))
  draw = ImageDraw.Draw(image)
  for name, x0, y0, x1, y1 in boxes_of(i): draw.rectangle([x0, y0, x1 - 1, y1 - 1], fill=(255, 0, 0) if name == "cat" else (0, 0, 255))
  return image


def save(folder: Path, numbers=range(COUNT), name="p{}.png") -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for i in numbers: picture(i).save(folder / name.format(i))


def write(file: Path, text: object) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text if isinstance(text, str) else json.dumps(text))


TRAIN, VAL = range(6), range(6, COUNT)
SPLITS = (("train", TRAIN), ("val", VAL))

# ---- YOLO


def yolo_lines(i: int, outline: bool = False) -> str:
  lines = []
  for name, x0, y0, x1, y1 in boxes_of(i):
    x0, x1, y0, y1 = x0 / WIDTH, x1 / WIDTH, y0 / HEIGHT, y1 / HEIGHT
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    numbers = [x0, y, x, y0, x1, y, x, y1] if outline else [x, y, x1 - x0, y1 - y0]
    lines.append(f"{NAMES.index(name)} {' '.join(f'{n:.8f}' for n in numbers)}")
  return "\n".join(lines) + "\n" * bool(lines)


def yolo(images: str, labels: str, yaml: str | None = "", outline: bool = False, valid: str = "val"):
  def make(d: Path) -> None:
    for name, numbers in SPLITS:
      place = valid if name == "val" else name
      save(d / images.format(place), numbers)
      for i in numbers: write(d / labels.format(place) / f"p{i}.txt", yolo_lines(i, outline))
    if yaml: write(d / "data.yaml", yaml)
    if yaml is None: write(d / "classes.txt", "cat\ndog\n")
  return make


def yolo_lists(d: Path) -> None:
  save(d / "images")
  for i in range(COUNT): write(d / "labels" / f"p{i}.txt", yolo_lines(i))
  for name, numbers in SPLITS: write(d / f"{name}.txt", "".join(f"./images/p{i}.png\n" for i in numbers))
  write(d / "data.yaml", "path: .\ntrain: train.txt\nval: val.txt\nnames: {0: cat, 1: dog}\n")


def yolo_cvat(d: Path) -> None:
  save(d / "obj_train_data")
  for i in range(COUNT): write(d / "obj_train_data" / f"p{i}.txt", yolo_lines(i))
  write(d / "train.txt", "".join(f"data/obj_train_data/p{i}.png\n" for i in range(COUNT)))
  write(d / "obj.names", "cat\ndog\n")
  write(d / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")


def yolo_label_studio(d: Path) -> None:
  save(d / "images", name="1a2b3c4d-p{}.png")
  for i in range(COUNT): write(d / "labels" / f"1a2b3c4d-p{i}.txt", yolo_lines(i))
  write(d / "classes.txt", "cat\ndog\n")
  write(d / "notes.json", {"categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}], "info": {}})


def yolo_beside(d: Path) -> None:
  save(d)
  for i in range(COUNT): write(d / f"p{i}.txt", yolo_lines(i))
  write(d / "classes.txt", "cat\ndog\n")

# ---- COCO and VOC


def coco_content(numbers, file_name="p{}.png") -> dict:
  rows = [(i, *box) for i in numbers for box in boxes_of(i)]
  return {"images": [{"id": i + 1, "file_name": file_name.format(i), "width": WIDTH, "height": HEIGHT} for i in numbers],
          "categories": [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)],
          "annotations": [{"id": n, "image_id": i + 1, "category_id": NAMES.index(name) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0,
                           "area": (x1 - x0) * (y1 - y0), "segmentation": []} for n, (i, name, x0, y0, x1, y1) in enumerate(rows, 1)]}


def coco_one(file: str, images: str, file_name: str = "p{}.png"):
  def make(d: Path) -> None:
    save(d / images)
    write(d / file, coco_content(range(COUNT), file_name))
  return make


def lvis(d: Path) -> None:
  for name, numbers in SPLITS:
    save(d / f"{name}2017", numbers)
    content = coco_content(numbers)
    for image in content["images"]:
      image["coco_url"] = f"http://images.cocodataset.org/{name}2017/{image.pop('file_name')}"
      image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    more = {"synset": "x.n.01", "frequency": "f", "synonyms": [], "def": "", "image_count": 1, "instance_count": 1}
    for category in content["categories"]: category |= more
    write(d / f"lvis_v1_{name}.json", content)


def xml(i: int) -> str:
  objects = "".join(f"<object><name>{name}</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
                    "</object>" for name, x0, y0, x1, y1 in boxes_of(i))
  return f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>{objects}</annotation>"


def voc(annotations: str, images: str, numbers=range(COUNT)):
  def make(d: Path) -> None:
    save(d / images, numbers)
    for i in numbers: write(d / annotations / f"p{i}.xml", xml(i))
  return make


def voc_roboflow(d: Path) -> None:
  voc("train", "train", TRAIN)(d)
  voc("valid", "valid", VAL)(d)

# ---- the own files of tools


def cvat_xml(subsets: bool):
  def make(d: Path) -> None:
    save(d / "images")
    images = "".join(
      f'<image id="{i}" name="p{i}.png" width="{WIDTH}" height="{HEIGHT}"{f" subset={chr(34)}{part}{chr(34)}" * subsets}>' + "".join(
        f'<box label="{name}" occluded="0" source="manual" xtl="{x0}.00" ytl="{y0}.00" xbr="{x1}.00" ybr="{y1}.00" z_order="0"></box>'
        for name, x0, y0, x1, y1 in boxes_of(i)) + "</image>" for part, numbers in (("Train", TRAIN), ("Validation", VAL)) for i in numbers)
    write(d / "annotations.xml", f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{images}</annotations>')
  return make


def labelme(d: Path) -> None:
  save(d)
  for i in range(COUNT):
    shapes = [{"label": name, "points": [[x1, y1], [x0, y0]] if i % 2 else [[x0, y0], [x1, y0], [x1, y1], [x0, y1]], "group_id": None,
               "shape_type": "rectangle" if i % 2 else "polygon", "flags": {}} for name, x0, y0, x1, y1 in boxes_of(i)]
    path = f"..\\here\\p{i}.png" if i == 3 else f"p{i}.png"
    write(d / f"p{i}.json", {"version": "5.0.1", "flags": {}, "shapes": shapes, "imagePath": path, "imageData": None, "imageHeight": HEIGHT,
                             "imageWidth": WIDTH})


def studio_value(i: int, box: tuple, kind: str = "rectanglelabels") -> dict:
  name, x0, y0, x1, y1 = box
  x, y, w, h = x0 / WIDTH * 100, y0 / HEIGHT * 100, (x1 - x0) / WIDTH * 100, (y1 - y0) / HEIGHT * 100
  place = {"x": x, "y": y, "width": w, "height": h, "rotation": 0}
  if kind == "polygonlabels": place = {"points": [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]}
  return place | {kind: [name]}


def label_studio(d: Path) -> None:
  save(d / "images", name="0f1e2d3c-p{}.png")
  tasks = []
  for i in range(COUNT):
    kind = "polygonlabels" if i == 4 else "rectanglelabels"
    result = [{"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "value": studio_value(i, box, kind), "id": f"r{k}",
               "from_name": "label", "to_name": "image", "type": kind} for k, box in enumerate(boxes_of(i))]
    tasks.append({"id": i + 1, "data": {"image": f"/data/upload/1/0f1e2d3c-p{i}.png"}, "predictions": [],
                  "annotations": [{"id": i, "was_cancelled": False, "result": result}]})
  write(d / "project-1.json", tasks)


def label_studio_min(d: Path) -> None:
  save(d)
  write(d / "min.json", [{"image": f"/data/local-files/?d=pictures/p{i}.png", "id": i, "annotator": 1, "label": [
    {"original_width": WIDTH, "original_height": HEIGHT, **studio_value(i, box)} for box in boxes_of(i)]} for i in range(COUNT)])


def via_region(box: tuple) -> dict:
  name, x0, y0, x1, y1 = box
  shape = {"name": "rect", "x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
  return {"shape_attributes": shape, "region_attributes": {"note": "", "animal": name}}


def via(project: bool, as_dict: bool = False):
  def make(d: Path) -> None:
    save(d / "images")
    rows = {f"p{i}.png123": {"filename": f"p{i}.png", "size": 123, "file_attributes": {}, "regions": [
      {**via_region(box), "region_attributes": {"animal": box[0]}} for box in boxes_of(i)]} for i in range(COUNT)}
    if as_dict:
      for row in rows.values(): row["regions"] = {str(k): region for k, region in enumerate(row["regions"])}
    write(d / "via_project.json", {"_via_settings": {}, "_via_img_metadata": rows, "_via_attributes": {}} if project else rows)
  return make


def table(file: Path, rows: list) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  with open(file, "w", newline="") as f: csv.writer(f).writerows(rows)


def via_csv(d: Path) -> None:
  save(d)
  head = ["filename", "file_size", "file_attributes", "region_count", "region_id", "region_shape_attributes", "region_attributes"]
  rows = [[f"p{i}.png", 1, "{}", len(boxes_of(i)), k, json.dumps(via_region(b)["shape_attributes"]), json.dumps({"animal": b[0]})]
          for i in range(COUNT) for k, b in enumerate(boxes_of(i))]
  table(d / "via.csv", [head, *rows, [f"p{COUNT - 1}.png", 1, "{}", 0, 0, "{}", "{}"]])


def keras_retinanet(d: Path) -> None:
  save(d / "images")
  for name, numbers in SPLITS:
    rows = [row for i in numbers for row in [(*box[1:], box[0]) for box in boxes_of(i)] or [[""] * 5]]
    names = [f"images/p{i}.png" for i in numbers for _ in boxes_of(i) or [None]]
    table(d / f"{name}.csv", [[name, *row] for name, row in zip(names, rows)])
  table(d / "classes.csv", [["cat", 0], ["dog", 1]])


def open_images(d: Path) -> None:
  head = "ImageID Source LabelName Confidence XMin XMax YMin YMax IsOccluded IsTruncated IsGroupOf IsDepiction IsInside".split()
  for name, numbers, file in (("train", TRAIN, "train"), ("validation", VAL, "validation")):
    for i in numbers:
      (d / name).mkdir(parents=True, exist_ok=True)
      picture(i).save(d / name / f"p{i}.jpg", quality=98, subsampling=0)
    rows = [[f"p{i}", "xclick", f"/m/{b[0]}", 1, b[1] / WIDTH, b[3] / WIDTH, b[2] / HEIGHT, b[4] / HEIGHT, *[0] * 5]
            for i in numbers for b in boxes_of(i)]
    table(d / f"{file}-annotations-bbox.csv", [head, *rows])
  table(d / "class-descriptions-boxable.csv", [["/m/cat", "cat"], ["/m/dog", "dog"]])


def csv_columns(d: Path) -> None:
  save(d)
  table(d / "labels.csv", [["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"],
                           *([f"p{i}.png", WIDTH, HEIGHT, *box] for i in range(COUNT) for box in boxes_of(i))])


def csv_spreadsheet(d: Path) -> None:
  csv_columns(d)
  write(d / "labels.csv", (d / "labels.csv").read_text().replace(",", ";"))


def yolo_windows(d: Path) -> None:
  yolo_label_studio(d)
  for file in [*d.rglob("p*.txt")]: write(file.with_suffix(".TXT"), "\ufeff" + file.read_text().replace("\n", "\r\n")) or file.unlink()


def csv_roboflow(d: Path) -> None:
  """A file beside the pictures of each part, where pictures of two parts have one name."""
  for part, numbers in (("train", TRAIN), ("valid", VAL)):
    save(d / part, numbers, "p{}.png")
    table(d / part / "_annotations.csv", [["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"],
                                          *([f"p{i}.png", WIDTH, HEIGHT, *box] for i in numbers for box in boxes_of(i))])


YAML = "train: ../{}\nval: ../{}\nnc: 2\nnames: ['cat', 'dog']\n"
# layout -> what writes it, the name of the layout, whether it has splits
WRITTEN = {
  "yolo ultralytics": (yolo("images/{}", "labels/{}", "path: /content/x\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"),
                       "YOLO", True),
  "yolo roboflow": (yolo("{}/images", "{}/labels", YAML.format("train/images", "valid/images"), valid="valid"), "YOLO", True),
  "yolo without settings": (yolo("images/{}", "labels/{}", None), "YOLO", True),
  "yolo outlines": (yolo("{}/images", "{}/labels", "train: train/images\nval: val/images\nnames: [cat, dog]\n", outline=True), "YOLO", True),
  "yolo lists": (yolo_lists, "YOLO", True), "yolo cvat": (yolo_cvat, "YOLO", False), "yolo label studio": (yolo_label_studio, "YOLO", False),
  "yolo beside": (yolo_beside, "YOLO", False), "yolo windows": (yolo_windows, "YOLO", False),
  "cvat xml": (cvat_xml(False), "CVAT", False), "cvat xml with subsets": (cvat_xml(True), "CVAT", True),
  "coco cvat": (coco_one("annotations/instances_default.json", "images"), "COCO", False),
  "coco cvat with folder": (coco_one("annotations/instances_default.json", "images/default"), "COCO", False),
  "coco label studio": (coco_one("result.json", "images", "images\\p{}.png"), "COCO", False),
  "coco labelme2coco": (coco_one("trainval.json", "pictures/sub", "sub/p{}.png"), "COCO", False),
  "coco beside": (coco_one("annotations.json", "."), "COCO", False), "lvis": (lvis, "COCO", True),
  "voc without lists": (voc("Annotations", "JPEGImages"), "Pascal VOC", False), "voc lower case": (voc("annotations", "images"), "Pascal VOC", False),
  "voc flat": (voc(".", "."), "Pascal VOC", False), "voc roboflow": (voc_roboflow, "Pascal VOC", True),
  "voc an archive down": (voc("VOCdevkit/VOC2007/Annotations", "VOCdevkit/VOC2007/JPEGImages"), "Pascal VOC", False),
  "labelme": (labelme, "labelme", False), "label studio": (label_studio, "Label Studio", False),
  "label studio min": (label_studio_min, "Label Studio", False),
  "via project": (via(True), "VIA", False), "via export": (via(False, as_dict=True), "VIA", False), "via csv": (via_csv, "CSV of VIA", False),
  "keras-retinanet": (keras_retinanet, "CSV of keras-retinanet", True), "open images": (open_images, "CSV of Open Images", True),
  "csv with columns": (csv_columns, "CSV", False), "csv of a spreadsheet": (csv_spreadsheet, "CSV", False),
  "csv roboflow": (csv_roboflow, "CSV", True)}


def read_back(dataset) -> dict[int, list]:
  """What a data set says of each picture, by its number: sorted (class, box), held against the pixels."""
  found = {}
  for k in range(len(dataset)):
    sample, name = dataset[k], os.path.basename(dataset.image_name(k))
    number = int(re.search(r"p(\d+)\.\w+$", name)[1])
    found[number] = sorted((dataset.class_names[label], *box) for label, box in zip(sample.labels, sample.boxes.round(3).tolist()))
    for label, (x0, y0, x1, y1) in zip(sample.labels, sample.boxes.round().astype(int)):
      assert sample.image[y0:y1, x0:x1, 2 * int(label)].mean() > 200
  return found


@pytest.mark.parametrize("name", WRITTEN)
def test_every_layout_reads_as_what_was_drawn(tmp_path, name):
  make, layout, has_splits = WRITTEN[name]
  make(tmp_path / "d")
  sets = {part: open_dataset(tmp_path / "d", part, rule=split.Rule()) for part in ("train", "val")}
  found = {part: read_back(dataset) for part, dataset in sets.items()}
  assert sets["train"].layout.startswith(f"{layout}: ") and sets["train"].class_names == sets["val"].class_names == list(NAMES)
  assert not found["train"].keys() & found["val"].keys()
  both = found["train"] | found["val"]
  drawn = {i: sorted((box[0], *map(float, box[1:])) for box in boxes_of(i)) for i in range(COUNT)}
  if layout in ("CSV", "CSV of Open Images"): drawn.pop(COUNT - 1)   # a picture without a row is not known
  assert both.keys() == drawn.keys()
  for i, boxes in both.items():
    assert [b[0] for b in boxes] == [b[0] for b in drawn[i]]
    np.testing.assert_allclose([b[1:] for b in boxes], [b[1:] for b in drawn[i]], atol=0.01)
  if has_splits: assert found["train"].keys() == set(TRAIN)
  else: assert len(found["val"]) == 2 and any("--val-share" in line for line in sets["val"].warnings)
  assert sets["train"].object_counts().sum() == sum(map(len, found["train"].values()))


def test_a_file_of_annotations_is_a_data_set_and_its_pictures_are_anywhere(tmp_path):
  for name, file in (("yolo ultralytics", "data.yaml"), ("csv with columns", "labels.csv"), ("coco label studio", "result.json"),
                     ("label studio", "project-1.json"), ("cvat xml", "annotations.xml")):
    WRITTEN[name][0](tmp_path / name)
    by_file, by_folder = open_dataset(tmp_path / name / file, "train"), open_dataset(tmp_path / name, "train")
    assert read_back(by_file) == read_back(by_folder)
  for name, file, pictures in (("csv with columns", "labels.csv", "."), ("label studio", "project-1.json", "images")):
    moved = tmp_path / f"moved {name}"
    moved.mkdir()
    shutil.move(tmp_path / name / file, moved / file)
    with pytest.raises(UserError): open_dataset(moved / file, "train")
    assert len(read_back(open_dataset(moved / file, "train", images=tmp_path / name / pictures))) >= 7
  with pytest.raises(UserError, match="--images nowhere: is no folder"): open_dataset(tmp_path / "csv with columns", "train", images="nowhere")
  write(tmp_path / "x.json", {"hello": 1})
  with pytest.raises(UserError, match=r"x\.json: is no annotation file of a known layout"): open_dataset(tmp_path / "x.json", "train")


def test_what_is_recognised_is_said_and_what_is_not_names_all_layouts(tmp_path):
  save(tmp_path / "bare")
  with pytest.raises(UserError) as error: open_dataset(tmp_path / "bare", "train")
  assert all(layout.name in str(error.value) for layout in layouts.LAYOUTS) and f"{COUNT} pictures" in str(error.value)
  yolo_beside(tmp_path / "two")
  csv_columns(tmp_path / "two")
  assert any("is also laid out as CSV" in line for line in open_dataset(tmp_path / "two", "train").warnings)
  for part in "ab": WRITTEN["coco beside"][0](tmp_path / "several" / part)
  with pytest.raises(UserError, match="has several data sets, a and b"): open_dataset(tmp_path / "several", "train")


def test_pictures_of_one_name_are_those_beside_their_file(tmp_path):
  csv_roboflow(tmp_path)
  picture(6).save(tmp_path / "train" / "p6.png")
  picture(0).save(tmp_path / "valid" / "p0.png")
  train, val = (open_dataset(tmp_path, split) for split in ("train", "val"))
  assert [image["file_name"] for image in train.ground_truth()["images"]] == [f"train/p{i}.png" for i in TRAIN]
  assert [image["file_name"] for image in val.ground_truth()["images"]] == [f"valid/p{i}.png" for i in VAL if list(boxes_of(i))]


# ---- lines of YOLO that are not as they should be: (line, what is said, whether it is an error)
LINES = [("2 0.5 0.5 0.1 0.1", "class numbers of which data.yaml has no name (1): train/labels/p0.txt line 1 2", True),
         ("cat 0.5 0.5 0.1 0.1", "lines that are not a class number", True), ("0 0.5 0.5 0.1", "lines that are not a class number", True),
         ("0 0.5 0.5 nan 0.1", "lines that are not a class number", True), ("0.5 0.5 0.5 0.1 0.1", "lines that are not a class number", True),
         ("0 48 32 20 14", "numbers that are no shares of the picture, 0 to 1 (1): train/labels/p0.txt line 1 48", True),
         ("0 0.5 0.5 -0.1 0.1", "boxes of negative width or height", True),
         ("0 .1 .1 .2 .1 .2 .2 .3", "lines with an odd number of coordinates", True),
         ("0 0.98 0.5 0.2 0.2", "boxes more than 1 pixel over the border of their image, clipped (1)", False),
         ("0 1.01 0.5 0.2 0.2", "boxes with numbers out of 0 to 1, clipped to the picture (1)", False),
         ("0 0.5 0.5 0.1 0.1 0.87", "lines with a sixth column, taken for a score and passed over (1)", False),
         ("0 0.5 0.5 0 0.1", "boxes without area inside their image, dropped (1): train/labels/p0.txt line 1", False)]


@pytest.mark.parametrize(("line", "says", "error"), LINES, ids=[line for line, *_ in LINES])
def test_odd_lines_of_yolo(tmp_path, line, says, error):
  yolo("{}/images", "{}/labels", "train: train/images\nval: val/images\nnames: [cat, dog]\n")(tmp_path)
  write(tmp_path / "train/labels/p0.txt", f"{line}\n")
  if not error: assert any(says in warning for warning in open_dataset(tmp_path, "train").warnings)
  with pytest.raises(UserError) as raised: open_dataset(tmp_path, "train", strict=not error)
  assert says in str(raised.value)


SETTINGS = [("names: [cat\n", "is not a YAML file"), ("train: nowhere\nval: nowhere\nnames: {a: cat}\n", "keys are not the class numbers"),
            ("train: train/images\nval: val/images\nnames: 3\n", "names: expected"),
            ("train: {a: 1}\nnames: [cat, dog]\n", "train: expected a folder")]


@pytest.mark.parametrize(("text", "says"), SETTINGS)
def test_bad_settings_of_yolo(tmp_path, text, says):
  yolo("{}/images", "{}/labels", text)(tmp_path)
  with pytest.raises(UserError, match=says): open_dataset(tmp_path, "train")


def test_odd_settings_of_yolo(tmp_path):
  yolo("{}/images", "{}/labels", "train: train/images\nval: val/images\nnc: 3\nnames: [no, 7]\n")(tmp_path)
  (tmp_path / "train/labels/p1.txt").unlink()
  write(tmp_path / "train/labels/gone.txt", "0 .5 .5 .1 .1\n")
  dataset = open_dataset(tmp_path, "train")
  assert dataset.class_names == ["no", "7"]   # a class may be called what YAML takes for false
  said = "\n".join(dataset.warnings)
  assert "nc of data.yaml is not the number of its names" in said
  assert "pictures without a label file, taken as background (1): train/images/p1.png" in said
  assert "label files without a picture, passed over (1): train/labels/gone.txt" in said
  (tmp_path / "data.yaml").unlink()
  dataset = open_dataset(tmp_path, "val")
  assert dataset.class_names == ["0", "1"] and any("their numbers are their names" in line for line in dataset.warnings)


def test_turned_boxes_of_label_studio_and_points(tmp_path):
  """A rectangle of 40x8 turned by 90 degrees about its first corner covers 8x40 to the left of it."""
  save(tmp_path)
  value = {"x": 50, "y": 25, "width": 40 / WIDTH * 100, "height": 8 / HEIGHT * 100, "rotation": 90, "rectanglelabels": ["cat"]}
  point = {"x": 1, "y": 1, "keypointlabels": ["cat"]}
  results = [{"original_width": WIDTH, "original_height": HEIGHT, "value": v, "type": "x"} for v in (value, point)]
  write(tmp_path / "a.json", [{"id": i, "data": {"image": f"p{i}.png"}, "annotations": [{"result": results}] * (i < 2)} for i in range(3)])
  dataset = open_dataset(tmp_path, "train")
  np.testing.assert_allclose(dataset[0].boxes, [[40, 16, 48, 56]], atol=1e-4)
  said = "\n".join(dataset.warnings)
  assert "tasks that nobody annotated, passed over (1): task 2" in said and "without an extent" in said and "rotation, taken as" in said


def test_shapes_of_cvat(tmp_path):
  """A box of 40x8 turned by a quarter about its middle, the outline of a triangle, an ellipse, a skeleton; and what has no extent."""
  save(tmp_path / "images", range(2))
  shapes = ("<tag label='cat'/><box label='cat' xtl='20' ytl='26' xbr='60' ybr='34' rotation='90.0'><attribute name='a'>b</attribute></box>"
            "<polygon label='dog' points='10,10;30,10;20,25'/><ellipse label='dog' cx='50' cy='30' rx='10' ry='5'/>"
            "<skeleton label='cat'><points label='1' points='3,4'/><points label='2' points='13,24'/></skeleton>"
            "<points label='cat' points='5,5'/><polyline label='cat' points='5,5;9,9'/><mask label='cat' rle='1,2' left='1' top='1' width='2'/>")
  def put(inside: str) -> None: write(tmp_path / "annotations.xml", f"<annotations><version>1.1</version>{inside}</annotations>")
  put(f"<image id='0' name='p0.png' width='{WIDTH}' height='{HEIGHT}'>{shapes}</image><image id='1' name='p1.png'/>")
  dataset, *_ = layouts.recognise(tmp_path)[0].splits.values()
  dataset = dataset(False)   # whole: both pictures
  np.testing.assert_allclose(dataset[0].boxes, [[36, 10, 44, 50], [10, 10, 30, 25], [40, 25, 60, 35], [3, 4, 13, 24]], atol=1e-4)
  assert [dataset.class_names[k] for k in dataset[0].labels] == ["cat", "dog", "dog", "cat"] and not len(dataset[1].boxes)
  said = "\n".join(dataset.warnings)
  assert "without an extent (points, lines, masks), passed over (3): p0.png shape 6" in said and "rotation, taken as the upright box" in said
  for inside, wrong in (("<track id='0' label='cat'><box frame='0'/></track>", "has <track>, a video's"), ("<meta/>", "has no <image>"),
                        ("<image id='0' name='p0.png'>", r"annotations\.xml: cannot be read \(is not XML: mismatched tag"),
                        ("<image id='0' name='p0.png'><box label='cat' xtl='9' ytl='1' xbr='2' ybr='3'/></image>", "negative width or height"),
                        ("<image id='0' name='p0.png'><box label='cat' xtl='nan' ytl='1' xbr='2' ybr='3'/></image>", "are no numbers"),
                        ("<image id='0' name='p0.png' width='\u00b2' height='9'/>", "sizes of pictures that are no positive whole numbers"),
                        (f"<image id='0' name='p0.png' width='9' height='{'9' * 5000}'/>", "sizes of pictures that are no positive whole numbers"),
                        ("<image id='0' name='p0.png'><polygon label='cat' points='1,2;3'/></image>", "not pairs of numbers"),
                        ("<image id='0' name='p0.png'><box xtl='1' ytl='1' xbr='2' ybr='3'/></image>", "without a label")):
    put(inside)
    with pytest.raises(UserError, match=wrong): open_dataset(tmp_path, "train")


def test_an_archive_is_to_be_unpacked(tmp_path):
  write(tmp_path / "export.zip", "PK")
  with pytest.raises(UserError, match=r"export\.zip: is an archive; unpack it"): open_dataset(tmp_path / "export.zip", "train")


# ---- how a data set without splits is divided

def test_the_split_is_by_name_exact_and_moves_little(tmp_path):
  names = [f"p{i}.png" for i in range(200)]
  val = split.val_names(names, 0.2)
  assert len(val) == 40 and val == split.val_names(names[::-1], 0.2) and len(split.val_names(names, 0.1) - val) == 0
  assert len(split.val_names([*names, "new.png"], 0.2) ^ val) <= 2
  assert val == {os.path.splitext(n)[0] + ".png" for n in split.val_names([n.replace("png", "jpg") for n in names], 0.2)}
  assert {os.path.basename(n) for n in split.val_names([f"jpg/0a1b2c3d-{n}" for n in names], 0.2)} == {f"0a1b2c3d-{n}" for n in val}
  copies = [f"q{i}_jpg.rf.{k}.jpg" for i in range(30) for k in "abc"]
  assert all(len({n in split.val_names(copies, 0.2) for n in copies if n.startswith(f"q{i}_")}) == 1 for i in range(30))
  assert [len(split.val_names(names[:n], 0.2)) for n in (2, 3, 5)] == [1, 1, 1]


def test_a_kept_split_is_used_again(tmp_path):
  WRITTEN["voc flat"][0](tmp_path / "d")
  train = open_dataset(tmp_path / "d", "train", rule=split.Rule(0.4))
  (tmp_path / "run").mkdir()
  split.save(tmp_path / "run", train, 0.4)
  save(tmp_path / "d", [0], "q{}.png")
  write(tmp_path / "d" / "q0.xml", xml(0))
  again = [open_dataset(tmp_path / "d", part, rule=split.recall(tmp_path / "run" / "best.safetensors" if k else tmp_path / "run"))
           for k, part in ((0, "train"), (0, "val"))]
  assert [len(d) for d in again] == [6, 4] and any("left out (1): q0.png" in line for line in again[0].warnings)
  assert [again[0].file_name(i) for i in range(6)] == [train.file_name(i) for i in range(6)]
  assert split.recall(tmp_path / "nowhere") == split.Rule()
  write(tmp_path / "run" / "split.json", "[]")
  with pytest.raises(UserError, match=r"split\.json: has no lists of names"): split.recall(tmp_path / "run")


def test_training_pictures_alone_are_divided_for_a_run_and_a_test_split_is_validated_on(tmp_path):
  write(tmp_path / "a/annotations/instances_train.json", coco_content(range(COUNT)))
  save(tmp_path / "a/train")
  assert len(open_dataset(tmp_path / "a", "train")) == COUNT
  parts = [open_dataset(tmp_path / "a", part, rule=split.Rule()) for part in ("train", "val")]
  assert [len(part) for part in parts] == [8, 2] and any("it has training pictures alone" in line for line in parts[0].warnings)
  yolo("{}/images", "{}/labels", None, valid="test")(tmp_path / "b")
  val = open_dataset(tmp_path / "b", "val")
  assert len(val) == len(VAL) and any("its split test is taken for it" in line for line in val.warnings)


def test_pictures_of_another_split_are_not_taken_for_missing_ones(tmp_path):
  for name in ("train", "val"):
    write(tmp_path / f"annotations/instances_{name}.json", coco_content(TRAIN))
    save(tmp_path / name, TRAIN)
  (tmp_path / "train/p0.png").unlink()
  with pytest.raises(UserError, match=r"images\[\]\.file_name missing in .*train \(1\): p0\.png"): open_dataset(tmp_path, "train")


def test_addresses_of_pictures(tmp_path):
  """What Label Studio and others write for a picture that lies in the folder."""
  for i, name in enumerate(("/data/upload/3/0f1e2d3c-p{}.png", "http://localhost:8080/data/local-files/?d=in/p{}.png", "s3://bucket/a/p{}.png",
                            "C:\\x\\p{}.png", "/content/drive/" + quote("é/p{}.png", safe="/{}"), "./p{}.png")):
    coco_one("a.json", "images", name)(tmp_path / str(i))
    dataset = open_dataset(tmp_path / str(i), "train")
    assert len(read_back(dataset)) == 8
    if i < 5: assert any("images[].file_name found elsewhere (10)" in line for line in dataset.warnings)


def test_check_says_nearly_equal_pictures_and_writes_a_page(tmp_path, capsys):
  """The same picture, saved again as JPEG, is in both splits: a leak, and no other pair is, though all are of one kind."""
  WRITTEN["yolo roboflow"][0](tmp_path / "d")
  rng = np.random.default_rng(0)
  for part, numbers in (("train", TRAIN), ("valid", VAL)):   # scenes of their own under the rectangles
    for i in numbers:
      scene = Image.fromarray(rng.integers(0, 160, (5, 7, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
      scene.save(tmp_path / "d" / part / "images" / f"p{i}.png")
  with Image.open(tmp_path / "d/train/images/p2.png") as same: same.save(tmp_path / "d/valid/images/copy.jpg", quality=80)
  check.main([str(tmp_path / "d"), "--page", str(tmp_path / "page.html")])
  out, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
  line = next(line for line in out.splitlines() if "nearly the same picture" in line)
  assert "both in train and in val" in line and "(1): " in line and "p2.png and" in line and "copy.jpg" in line and "within" not in out
  assert page.count("<figure>") == COUNT + 1 and page.count("<rect ") == 18 and "1 pairs of nearly the same picture both in train" in page
  assert "RetinaNet&#x27;s anchors" in page and "<td>cat<td>6<td>" in page and "http" not in page


def test_anchors_are_held_against_boxes():
  """RetinaNet's smallest anchors: 32 pixels at ratios 0.5, 1 and 2. A square of 32 is one of them, one of 16 is a quarter of it."""
  shapes = np.array([[32, 32], [16, 16], [64, 8], [1000, 500]], np.float64)
  found = best_iou(shapes, anchor_shapes())
  pairs = [[min(w, a) * min(h, b) / (w * h + a * b - min(w, a) * min(h, b)) for a, b in anchor_shapes()] for w, h in shapes]
  np.testing.assert_allclose(found, np.max(pairs, 1))
  assert found[0] == 1 and 0.25 <= found[1] < 0.26 and len(anchor_shapes()) == 45


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_conversion_reads_back_as_what_was_drawn(tmp_path, monkeypatch, kind):
  """Subfolders with one name twice, a difficult object, and a picture that EXIF turns, from VOC."""
  monkeypatch.chdir(tmp_path)
  voc("Annotations/a", "JPEGImages/a", TRAIN)(tmp_path / "d")
  voc("Annotations/b", "JPEGImages/b", VAL)(tmp_path / "d")
  exif = Image.Exif()
  exif[0x0112] = 6
  picture(1).transpose(Image.Transpose.ROTATE_90).save("d/JPEGImages/a/p1.png", exif=exif)
  file = tmp_path / "d/Annotations/a/p0.xml"
  file.write_text(file.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>", 1))
  check.main(["d", "--convert", kind])
  found = {}
  for part in ("train", "val"): found |= read_back(open_dataset(tmp_path / f"d-{kind}", part))
  drawn = {i: sorted((box[0], *map(float, box[1:])) for box in boxes_of(i)[i == 0:]) for i in range(COUNT)}
  assert found.keys() == drawn.keys() and all(np.allclose([b[1:] for b in found[i]], [b[1:] for b in drawn[i]], atol=0.01) for i in drawn if drawn[i])
  with pytest.raises(UserError, match=f"--out d-{kind}: is there already"): check.main(["d", "--fast", "--convert", kind])


def test_check_says_the_layout(tmp_path, capsys):
  yolo("{}/images", "{}/labels", "train: train/images\nval: val/images\nnames: [cat, dog]\n")(tmp_path)
  check.main([str(tmp_path), "--fast"])
  assert f"{tmp_path} is YOLO: data.yaml names its parts" in (out := capsys.readouterr().out) and "6 pictures, 12 boxes" in out


JUNK = [b"", b"0", b"null", b"-1", b"1e999", b"NaN", b"{}", b"[]", b'"x"', b"\xff\xfe", b"\0", b"9" * 30, b",", b'"', b"\n", b"..", b"/", b"%",
        b'{"a":1}']
TOKEN = re.compile(rb'"[^"]*"|-?\d+\.?\d*|\[[^\[\]]*\]|\{[^{}]*\}|null|true|false')


@pytest.mark.parametrize("name", WRITTEN)
def test_any_change_of_an_annotation_is_a_data_set_or_one_error(tmp_path, name):
  WRITTEN[name][0](tmp_path / "d")
  rng = np.random.default_rng(list(name.encode()))
  files = sorted(p for p in (tmp_path / "d").rglob("*") if p.is_file() and p.suffix not in (".png", ".jpg"))
  for _ in range(8):
    file = files[rng.integers(len(files))]
    content = changed = file.read_bytes()
    if tokens := list(TOKEN.finditer(content)):
      token = tokens[rng.integers(len(tokens))]
      changed = content[:token.start()] + JUNK[rng.integers(len(JUNK))] + content[token.end():]
    file.write_bytes(changed)
    try:
      for part in ("train", "val"):
        dataset = open_dataset(tmp_path / "d", part, rule=split.Rule())
        assert len(dataset[0].boxes) == len(dataset[0].labels) == dataset.object_counts()[0] and len(dataset.ground_truth()["images"]) == len(dataset)
    except UserError as e: assert str(e)
    file.write_bytes(content)


def test_a_run_keeps_its_split_and_goes_on_with_it(tmp_path, capsys):
  """As the trainers open their data: with and without a run's folder that has a split of another share."""
  WRITTEN["voc flat"][0](tmp_path / "d")
  def sizes(**options):
    config = parse(DetectionConfig, {}, ["--data", str(tmp_path / "d")], {})
    return [len(dataset) for dataset in open_splits(config, ALONE, **options)]
  assert sizes() == [8, 2] and f"data: {tmp_path / 'd'} is Pascal VOC" in capsys.readouterr().out
  (tmp_path / "run").mkdir()
  names = [f"p{i}.png" for i in range(COUNT)]
  write(tmp_path / "run/split.json", {"val_share": 0.2, "train": names[:5], "val": names[5:]})
  assert sizes(kept=tmp_path / "run") == [5, 5]


def test_a_folder_that_is_no_data_set_is_told_of_once(tmp_path):
  """Two faults are two lines."""
  (tmp_path / "notes.txt").write_text("nothing here")
  def told() -> list[str]:
    with pytest.raises(UserError) as e: open_splits(parse(DetectionConfig, {}, ["--data", str(tmp_path)], {}), ALONE)
    return str(e.value).splitlines()
  line, = told()
  assert "no data set with a split 'train'" in line and "notes.txt" in line
  for name in ("train", "val"): write(tmp_path / f"annotations/instances_{name}2017.json", {"images": name})
  first, second = told()
  assert "instances_train2017.json" in first and "instances_val2017.json" in second
