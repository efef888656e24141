import contextlib, io, json, re
from pathlib import Path
import numpy as np, pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from tinydet.datasets import open_dataset
from tinydet.datasets.coco import Coco
from tinydet.datasets.shapes import COUNT_SHARES, MIN_VISIBLE, Shapes, _render
from tinydet.datasets.transforms import resize
from tinydet.datasets.voc import Voc
from tinydet.errors import UserError


def pycocotools_index(ground_truth: dict) -> COCO:
  with contextlib.redirect_stdout(io.StringIO()):
    index = COCO()
    index.dataset = ground_truth
    index.createIndex()
  return index


def assert_ground_truth_agrees(dataset) -> None:
  """What pycocotools reads from `ground_truth` is what the samples say, crowds and difficult objects aside."""
  index = pycocotools_index(json.loads(json.dumps(dataset.ground_truth())))
  assert [c["name"] for c in index.loadCats(sorted(index.getCatIds()))] == dataset.class_names
  assert len(index.getImgIds()) == len(dataset)
  for i in range(len(dataset)):
    sample = dataset[i]
    found = [a for a in index.loadAnns(index.getAnnIds(imgIds=sample.image_id, iscrowd=False)) if not a.get("difficult")]
    boxes = np.array([a["bbox"] for a in found]).reshape(-1, 4)
    np.testing.assert_allclose(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), sample.boxes, atol=1e-4)
    assert [a["category_id"] for a in found] == [dataset.category_ids[k] for k in sample.labels]
    assert (index.imgs[sample.image_id]["height"], index.imgs[sample.image_id]["width"]) == sample.original_size == sample.image.shape[:2]
    assert sample.content_size == sample.original_size and sample.image.dtype == np.uint8
    assert sample.boxes.dtype == np.float32 and sample.labels.dtype == np.int32
  assert dataset.max_boxes >= max(len(dataset[i].boxes) for i in range(len(dataset)))


# shapes

def same(one, other) -> bool:
  return one.image.shape == other.image.shape and (one.image == other.image).all() and np.array_equal(one.boxes, other.boxes)


def test_shapes_depend_on_seed_family_split_and_index_only():
  first = Shapes("train", 1, count=40)
  forwards = [first[i] for i in range(40)]
  again = Shapes("train", 1, count=20)
  assert all(same(again[i], forwards[i]) for i in reversed(range(20)))
  others = [Shapes("val", 1, count=40), Shapes("train", 2, count=40), Shapes("train", 1, count=40, seed=1)]
  pictures = [s.image.tobytes() for s in forwards] + [d[i].image.tobytes() for d in others for i in range(40)]
  assert len(set(pictures)) == 160
  with pytest.raises(IndexError): first[40]


@pytest.mark.parametrize("family", [1, 2])
def test_shapes_sizes_counts_and_classes(family):
  dataset = Shapes("train", family, count=1500)
  scenes = [dataset.shapes(i) for i in range(1500)]
  corners = np.array([s.mask.getbbox() for scene in scenes for s in scene])
  longer = (corners[:, 2:] - corners[:, :2]).max(1) / 256
  assert 0.07 < longer.min() < 0.12 and 0.6 < longer.max() < 0.65
  quantile = np.sort(((longer.clip(0.08, 0.64) - 0.08) / 0.56) ** 2)  # uniform, but for large shapes that found no place
  assert np.abs(quantile - np.linspace(0, 1, len(quantile))).max() < 0.06
  assert np.histogram(longer, [0.07, 0.16, 0.32, 0.65])[0].min() > 30  # all three octaves
  counts = np.bincount([len(scene) for scene in scenes], minlength=7) / 1500
  assert abs(counts[0] - COUNT_SHARES[0]) < 0.025 and counts[1:5].sum() > 0.8 and len(counts) - 1 == dataset.max_boxes
  assert np.bincount([s.label for scene in scenes for s in scene]).min() > 400
  assert dataset.category_ids == ([1, 2, 3, 4, 5, 6] if family == 1 else [7, 8, 9, 10, 11, 12])
  assert not set(Shapes("val", 1).class_names) & set(Shapes("val", 2).class_names)


@pytest.mark.parametrize("family", [1, 2])
def test_shapes_boxes_are_the_extents_of_the_masks(family):
  """Against the mask's own pixels, exactly, and against the float64 polygon, within the half pixel that a mask resolves."""
  dataset = Shapes("train", family, count=200)
  for i in range(200):
    sample, shapes = dataset[i], dataset.shapes(i)
    owner = np.full((256, 256), -1)
    areas = []
    for k, shape in enumerate(shapes):
      inside = np.asarray(shape.mask) > 0
      rows, columns = np.nonzero(inside)
      corners = np.array([columns.min() + shape.left, rows.min() + shape.top, columns.max() + 1 + shape.left, rows.max() + 1 + shape.top])
      np.testing.assert_array_equal(sample.boxes[k], (corners / 2).clip(0, 128))
      polygon = (shape.polygons[0] + [shape.left, shape.top]) / 2
      np.testing.assert_allclose(sample.boxes[k], np.concatenate([polygon.min(0), polygon.max(0)]).clip(0, 128), atol=0.75)
      rows, columns = rows + shape.top, columns + shape.left
      seen = (rows >= 0) & (rows < 256) & (columns >= 0) & (columns < 256)
      owner[rows[seen], columns[seen]] = k
      areas.append(inside.sum())
    assert all((owner == k).sum() >= MIN_VISIBLE * area for k, area in enumerate(areas))
    assert (sample.boxes[:, 2:] - sample.boxes[:, :2] > 3).all()


@pytest.mark.parametrize("family", [1, 2])
def test_shapes_are_drawn_where_the_boxes_are(family):
  """The picture with one shape differs from its background alone, beyond the grain of +-8, in the box and nowhere else: no shape is invisible."""
  dataset = Shapes("train", family, count=250)
  checked = 0
  for i in range(250):
    shapes = dataset.shapes(i)
    if len(shapes) != 1: continue
    drawn, bare = (_render(s, 128, np.random.default_rng(i)).astype(int) for s in (shapes, []))
    rows, columns = np.nonzero(np.abs(drawn - bare).max(2) > 18)
    extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    np.testing.assert_allclose(extent, shapes[0].box(128), atol=4)  # thin tips fade into the ground
    checked += 1
  assert checked > 40


def test_shapes_ground_truth():
  assert_ground_truth_agrees(Shapes("val", 2, count=30, size=96))


# COCO

def write_picture(path: Path, width: int, height: int, seed: int = 0, **options) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, **options)


def coco_content() -> dict:
  """Gapped and unsorted category ids, a crowd, an image without objects, boxes without area and over the border, an id out of order."""
  return {
    "images": [{"id": 90, "file_name": "a.png", "width": 40, "height": 30}, {"id": 7, "file_name": "empty.png", "width": 20, "height": 25},
               {"id": 35, "file_name": "deep/c.png", "width": 33, "height": 22}],
    "categories": [{"id": 44, "name": "zebra"}, {"id": 3, "name": "apple"}, {"id": 17, "name": "cat"}],
    "annotations": [
      {"id": 5, "image_id": 35, "category_id": 17, "bbox": [1.5, 2.25, 10, 12.5], "area": 80.5, "iscrowd": 0},
      {"id": 1, "image_id": 90, "category_id": 3, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1},
      {"id": 9, "image_id": 90, "category_id": 44, "bbox": [5, 6, 7, 8], "area": 50, "iscrowd": 0},
      {"id": 2, "image_id": 90, "category_id": 3, "bbox": [12, 13, 0, 8], "area": 0, "iscrowd": 0},
      {"id": 3, "image_id": 90, "category_id": 3, "bbox": [30, 20, 15, 5], "area": 75, "iscrowd": 0},
      {"id": 4, "image_id": 35, "category_id": 3, "bbox": [33, 1, 4, 4], "area": 16, "iscrowd": 0},
    ],
  }


def write_coco(folder: Path, content: dict | None = None) -> tuple[Path, Path]:
  content = content or coco_content()
  for i, entry in enumerate(coco_content()["images"]): write_picture(folder / "images" / entry["file_name"], entry["width"], entry["height"], i)
  (folder / "instances.json").write_text(json.dumps(content))
  return folder / "instances.json", folder / "images"


def test_coco_reads_what_pycocotools_reads(tmp_path):
  file, folder = write_coco(tmp_path)
  dataset = Coco(file, folder)
  with contextlib.redirect_stdout(io.StringIO()): reference = COCO(str(file))
  assert dataset.class_names == ["apple", "cat", "zebra"] and dataset.category_ids == [3, 17, 44] == sorted(reference.getCatIds())
  assert len(dataset) == 3 and dataset.max_boxes == 2
  for i in range(3):
    sample = dataset[i]
    entry = reference.imgs[sample.image_id]
    found = [a for a in reference.loadAnns(reference.getAnnIds(imgIds=sample.image_id, iscrowd=False)) if a["id"] not in (2, 4)]
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in found)]).reshape(-1, 4)
    np.testing.assert_allclose(sample.boxes, np.minimum(boxes, [entry["width"], entry["height"]] * 2), rtol=1e-6)
    assert [dataset.category_ids[k] for k in sample.labels] == [a["category_id"] for a in found]
    np.testing.assert_array_equal(sample.image, np.asarray(Image.open(folder / entry["file_name"])))
    assert dataset.image_name(i) == str(folder / entry["file_name"]) and sample.original_size == (entry["height"], entry["width"])
  assert len(dataset[1].boxes) == 0
  assert dataset.warnings[0].endswith("boxes without area inside their image, dropped (2): annotation id 2, annotation id 4")
  assert dataset.warnings[1].endswith("boxes more than 1 pixel over the border of their image, clipped (1): annotation id 3")
  assert dataset.warnings[2].endswith("images without objects, which are background (1): empty.png") and len(dataset.warnings) == 3


def test_coco_ground_truth_is_the_file_less_boxes_without_area(tmp_path):
  file, folder = write_coco(tmp_path)
  ours, reference = pycocotools_index(Coco(file, folder).ground_truth()), coco_content()
  for annotation in reference["annotations"]:
    if annotation["id"] in (2, 4): assert annotation["id"] not in ours.anns
    else: assert ours.anns[annotation["id"]] == annotation
  assert [ours.imgs[entry["id"]] for entry in reference["images"]] == reference["images"]
  assert {c["id"]: c["name"] for c in ours.cats.values()} == {c["id"]: c["name"] for c in reference["categories"]}


@pytest.mark.parametrize("spoil, message", [
  (lambda c: c.pop("images"), "no list 'images'"),
  (lambda c: c["annotations"][2].pop("bbox"), r"annotations\[\]\.bbox missing \(1\): annotations\[2\]"),
  (lambda c: c["annotations"][1].update(image_id=8), r"annotations\[\]\.image_id not in the file's lists \(1\): annotations\[1\] says 8"),
  (lambda c: c["annotations"][3].update(category_id=4), r"annotations\[\]\.category_id not .* annotations\[3\] says 4"),
  (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"bbox is not four numbers .*: annotations\[0\] \[1, 2, 3\]"),
  (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), r"bbox is not four numbers .*: annotations\[0\] \[1, 2, nan, 4\]"),
  (lambda c: c["annotations"][0].update(bbox=[1, 2, "3", None]), r"bbox is not four numbers .*: annotations\[0\]"),
  (lambda c: c["annotations"][0].update(area="big"), r"annotations\[\].area is not a number \(1\): annotation id 5"),
  (lambda c: c["images"][0].update(id="x"), r"images\[\].id is not a whole number .*: images\[0\] 'x'"),
  (lambda c: c["images"][1].update(width=0), r"images\[\].width is not a positive whole number \(1\): images\[1\] 0"),
  (lambda c: c["images"][2].update(file_name="gone.png"), r"images\[\].file_name missing in .*images \(1\): gone.png"),
  (lambda c: c["images"][2].update(file_name="nowhere/gone.png"), "nowhere"),
  (lambda c: c.update(categories=[]), "'categories' is empty"),
])
def test_coco_names_what_is_wrong(tmp_path, spoil, message):
  content = coco_content()
  spoil(content)
  file, folder = write_coco(tmp_path, content)
  with pytest.raises(UserError, match=message) as error: Coco(file, folder)
  assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_coco_names_a_file_that_is_not_json(tmp_path):
  file, folder = write_coco(tmp_path)
  file.write_text("{")
  with pytest.raises(UserError, match=r"instances\.json: is not a JSON file that can be read"): Coco(file, folder)
  with pytest.raises(UserError, match=r"gone\.json: cannot be opened"): Coco(tmp_path / "gone.json", folder)


# pictures

def one_picture(folder: Path, name: str, width: int, height: int) -> Coco:
  content = {"images": [{"id": 1, "file_name": name, "width": width, "height": height}], "categories": [{"id": 1, "name": "x"}], "annotations": []}
  (folder / "a.json").write_text(json.dumps(content))
  return Coco(folder / "a.json", folder)


@pytest.mark.parametrize("declared", [(30, 20), (20, 30)])
def test_exif_orientation_applies_only_when_the_declared_size_says_so(tmp_path, declared):
  stored = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees clockwise
  Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
  image = one_picture(tmp_path, "a.png", *declared)[0].image
  np.testing.assert_array_equal(image, stored if declared == (30, 20) else np.rot90(stored, -1))


@pytest.mark.parametrize("proof", [None, "turned", "stored"])
@pytest.mark.parametrize(("turn", "size"), [(3, (30, 20)), (2, (30, 20)), (4, (30, 20)), (6, (24, 24)), (8, (24, 24)), (5, (24, 24))])
def test_one_rule_for_all_orientations_of_a_data_set(tmp_path, proof, turn, size):
  """What half a turn, a mirror image or a square cannot tell, the other pictures prove; where none does, they are shown as `detect` shows them."""
  rng, exif = np.random.default_rng(0), Image.Exif()
  def save(name, size, turn):
    exif[0x0112] = turn
    stored = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(stored).save(tmp_path / name, exif=exif)
    return stored
  stored, images = save("a.png", size, turn), [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}]
  if proof:
    save("b.png", (30, 20), 6)
    width, height = (20, 30) if proof == "turned" else (30, 20)
    images.append({"id": 2, "file_name": "b.png", "width": width, "height": height})
  (tmp_path / "a.json").write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "x"}], "annotations": []}))
  dataset = Coco(tmp_path / "a.json", tmp_path)
  assert dataset.upright == {None: None, "turned": True, "stored": False}[proof]
  with Image.open(tmp_path / "a.png") as picture: upright = np.asarray(ImageOps.exif_transpose(picture))
  np.testing.assert_array_equal(dataset[0].image, stored if proof == "stored" else upright)
  assert any("they may lie elsewhere" in line for line in dataset.warnings) == (proof is None)
  assert dataset.resized(0, (10, 12)).image.shape == (10, 12, 3)


def test_pictures_of_other_modes_become_rgb(tmp_path):
  rng = np.random.default_rng(0)
  grey, rgb, alpha = (rng.integers(0, 256, (20, 30, *c), dtype=np.uint8) for c in ((), (3,), (1,)))
  deep = rng.integers(0, 65536, (20, 30), dtype=np.uint16)
  on_white = rgb * (alpha / 255) + 255 * (1 - alpha / 255)
  palette = Image.fromarray(rgb).quantize(16)
  cmyk = Image.fromarray(np.concatenate([rgb, np.zeros_like(alpha)], 2), "CMYK")
  cases = [("grey.png", Image.fromarray(grey), np.repeat(grey[..., None], 3, 2), 0), ("deep.png", Image.fromarray(deep), deep[..., None] / 257, 0.51),
           ("alpha.png", Image.fromarray(np.concatenate([rgb, alpha], 2)), on_white, 1.01),
           ("palette.png", palette, np.asarray(palette.convert("RGB")), 0),
           ("cmyk.tif", cmyk, 255.0 - rgb, 1.01), ("bits.png", Image.fromarray(grey > 127), np.repeat((grey > 127)[..., None] * 255, 3, 2), 0)]
  for name, picture, expected, tolerance in cases:
    picture.save(tmp_path / name)
    image = one_picture(tmp_path, name, 30, 20)[0].image
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8, name
    assert np.abs(image - expected.astype(float)).max() <= tolerance, name


def annotated_picture(folder: Path, name: str, picture: Image.Image, declared: tuple[int, int] | None = None, **options) -> Coco:
  picture.save(folder / name, **options)
  width, height = declared or picture.size
  content = {"images": [{"id": 4, "file_name": name, "width": width, "height": height}], "categories": [{"id": 1, "name": "x"}],
             "annotations": [{"id": 1, "image_id": 4, "category_id": 1, "bbox": [3, 5, 17, 11], "area": 187, "iscrowd": 0}]}
  (folder / "a.json").write_text(json.dumps(content))
  return Coco(folder / "a.json", folder)


@pytest.mark.parametrize("size", [(640, 480), (641, 427)])
@pytest.mark.parametrize("part", [2, 3, 4, 9])
def test_a_jpeg_decoded_at_a_lower_resolution_is_the_resized_picture(tmp_path, size, part):
  """Against Pillow's full decoding and antialiased resizing: a little sharper, in the same place, of the same brightness."""
  for seed in range(3):
    picture = Image.fromarray(Shapes("train", 2, size=700, count=9)[seed].image).crop((0, 0, *size))
    dataset = annotated_picture(tmp_path, "a.jpg", picture, quality=90)
    target = (size[1] // part, size[0] // part)
    expected = resize(*target)(dataset[0], np.random.default_rng(0))
    found = dataset.resized(0, target)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert (found.image.shape, found.content_size, found.original_size, found.image_id) == ((*target, 3), target, size[::-1], 4)
    ours, theirs = found.image.astype(int), expected.image.astype(int)
    assert (ours != theirs).any(), "else nothing was decoded at a lower resolution"
    assert (error := np.abs(ours - theirs).mean()) < 3.5 and abs((ours - theirs).mean()) < 0.3
    assert min(np.abs(ours[1:] - theirs[:-1]).mean(), np.abs(ours[:, 1:] - theirs[:, :-1]).mean()) > 1.8 * error, "a pixel further is worse"


@pytest.mark.parametrize("name, target", [("a.jpg", (51, 60)), ("a.jpg", (200, 40)), ("a.jpg", (100, 120)), ("a.png", (40, 40)),
                                          ("turned.jpg", (40, 40))])
def test_other_pictures_are_read_whole_and_resized(tmp_path, name, target):
  picture = Image.fromarray(Shapes("train", 2, size=120, count=9)[0].image[:100])
  exif = Image.Exif()
  if name == "turned.jpg": exif[0x0112] = 6
  dataset = annotated_picture(tmp_path, name, picture, (100, 120) if name == "turned.jpg" else None, exif=exif)
  expected, found = resize(*target)(dataset[0], np.random.default_rng(0)), dataset.resized(0, target)
  np.testing.assert_array_equal(found.image, expected.image)
  np.testing.assert_array_equal(found.boxes, expected.boxes)
  assert (found.content_size, found.original_size) == (expected.content_size, expected.original_size)


def test_pictures_that_do_not_fit_or_cannot_be_read_are_named(tmp_path):
  write_picture(tmp_path / "a.png", 30, 20)
  with pytest.raises(UserError, match=r"pictures of another size than annotated \(1\): a\.png is 30x20, not 31x20"):
    one_picture(tmp_path, "a.png", 31, 20)
  dataset, whole = one_picture(tmp_path, "a.png", 30, 20), (tmp_path / "a.png").read_bytes()
  for broken in (whole[:len(whole) // 2], b"", b"not a picture"):
    (tmp_path / "a.png").write_bytes(broken)
    with pytest.raises(UserError, match=r"a\.png: cannot be read as an image"): dataset[0]
  write_picture(tmp_path / "a.png", 31, 20)
  with pytest.raises(UserError, match=r"a\.png: the picture is 31x20 .*a\.json: images\[\].width/height of id 1 says 30x20"): dataset[0]


# VOC

def write_voc(folder: Path, objects: dict[str, list[tuple]], splits: dict[str, list[str]] | None = None, size=(40, 30)) -> None:
  (folder / "Annotations").mkdir(parents=True)
  for i, (name, items) in enumerate(objects.items()):
    write_picture(folder / "JPEGImages" / f"{name}.png", *size, seed=i)
    body = "".join(f"<object><name>{kind}</name><part><name>part-of-{kind}</name></part><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin>"
                   f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>" for kind, x0, y0, x1, y1, difficult in items)
    (folder / "Annotations" / f"{name}.xml").write_text(
      f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{body}</annotation>")
  for split, names in (splits or {}).items():
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")


VOC_OBJECTS = {"one": [("dog", 3, 4, 10, 12, 0), ("cat", 1, 1, 40, 30, 0), ("dog", 7, 7, 7, 7, 0), ("cat", 2, 2, 9, 9, 1)],
               "two": [], "three": [("ant", 30, 20, 44.5, 35, 0)]}


def test_voc_boxes_classes_and_oddities(tmp_path):
  write_voc(tmp_path / "d", VOC_OBJECTS, {"train": ["one", "two"], "val": ["three"]})
  train, val = Voc(tmp_path / "d", "train"), Voc(tmp_path / "d", "val")
  assert train.class_names == val.class_names == ["ant", "cat", "dog"] and train.category_ids == [1, 2, 3]
  np.testing.assert_array_equal(train[0].boxes, [[2, 3, 10, 12], [0, 0, 40, 30]])  # pixels 3..10 and 4..12, counted from 1
  np.testing.assert_array_equal(train[0].labels, [2, 1])
  assert len(train[1].boxes) == 0 and train.max_boxes == 2 and train.image_name(1).endswith("two.png")
  np.testing.assert_array_equal(val[0].boxes, [[29, 19, 40, 30]])
  assert train.warnings[0].endswith("boxes without area inside their image, dropped (1): one.xml")
  assert val.warnings[0].endswith("boxes more than 1 pixel over the border of their image, clipped (1): three.xml")
  crowd = [a for a in train.ground_truth()["annotations"] if a["difficult"]]
  assert [(a["bbox"], a["category_id"]) for a in crowd] == [([1, 1, 8, 8], 2)]
  assert_ground_truth_agrees(train)
  assert_ground_truth_agrees(val)


def test_voc_without_image_sets_is_split_by_name(tmp_path):
  names = [f"p{i}" for i in range(80)]
  write_voc(tmp_path, {n: [("x", 1, 1, 2, 2, 0)] for n in names}, size=(4, 3))
  train, val = open_dataset(tmp_path, "train"), open_dataset(tmp_path, "val")
  parts = [{d.image_name(i) for i in range(len(d))} for d in (train, val)]
  assert len(train) == 64 and len(val) == 16 and len(parts[0] | parts[1]) == 80
  assert any("64 train, 16 val" in line for line in train.warnings)


@pytest.mark.parametrize("spoil, message", [
  (lambda d: (d / "JPEGImages" / "one.png").unlink(), r"the file is missing in JPEGImages \(1\): one\.jpg"),
  (lambda d: (d / "Annotations" / "one.xml").write_text("<annotation>"), r"annotations that cannot be read \(1\): one\.xml \(is not XML"),
  (lambda d: (d / "Annotations" / "one.xml").write_text("<annotation><size><width>40</width><height>-3</height></size></annotation>"),
   r"<size> of an annotation is not of positive whole numbers \(1\): one\.xml 40x-3"),
  (lambda d: (d / "Annotations" / "one.xml").write_text((d / "Annotations" / "one.xml").read_text().replace("<xmin>3<", "<xmin>three<")),
   r"<bndbox/xmin> is no number of at most a million \(1\): one\.xml three"),
  (lambda d: (d / "ImageSets" / "Main" / "train.txt").unlink(), r"train\.txt: cannot be opened"),
  (lambda d: (d / "ImageSets" / "Main" / "train.txt").write_text("\n"), "the split 'train' has no image"),
])
def test_voc_names_what_is_wrong(tmp_path, spoil, message):
  write_voc(tmp_path / "d", VOC_OBJECTS, {"train": ["one", "two"]})
  spoil(tmp_path / "d")
  with pytest.raises(UserError, match=message): Voc(tmp_path / "d", "train")


@pytest.mark.parametrize("size", ["", "<size/>", "<size><width>0</width><height>0</height></size>",
                                  "<size><width>40</width><height>0.0</height></size>"])
def test_voc_without_a_size_has_the_pictures(tmp_path, size):
  write_voc(tmp_path / "d", VOC_OBJECTS, {"train": ["one", "two"]})
  whole, file = Voc(tmp_path / "d", "train"), tmp_path / "d" / "Annotations" / "one.xml"
  file.write_text(re.sub("<size>.*</size>", size, file.read_text()))
  dataset = Voc(tmp_path / "d", "train")
  assert dataset.sizes == whole.sizes and dataset.ground_truth() == whole.ground_truth()
  assert any("without a <size>, or of 0 pixels, which is taken from the picture (1): one.xml" in line for line in dataset.warnings)
  with pytest.raises(UserError, match="without a <size>"): Voc(tmp_path / "d", "train", strict=True)


def test_classes_that_differ_in_case_are_told_of(tmp_path):
  write_voc(tmp_path / "d", {"one": [("cat", 1, 1, 9, 9, 0), ("Cat", 5, 5, 20, 20, 0)], "two": [("dog", 1, 1, 9, 9, 0)]}, {"train": ["one", "two"]})
  dataset = Voc(tmp_path / "d", "train")
  assert dataset.class_names == ["Cat", "cat", "dog"]
  assert any("differ in case or blanks alone" in line and "Cat, cat" in line for line in dataset.warnings)
  with pytest.raises(UserError, match="Cat, cat"): Voc(tmp_path / "d", "train", strict=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_voc_refuses_entities(tmp_path, encoding):
  write_voc(tmp_path / "d", VOC_OBJECTS, {"train": ["one"]})
  (tmp_path / "secret").write_text("secret")
  declarations = f'<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;"><!ENTITY file SYSTEM "{tmp_path / "secret"}">'
  text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE x [{declarations}]><annotation><object><name>&b;</name></object></annotation>'
  (tmp_path / "d" / "Annotations" / "one.xml").write_bytes(text.encode(encoding))
  with pytest.raises(UserError, match=r"one\.xml \(a DOCTYPE declaration is refused"): Voc(tmp_path / "d", "train")


# open_dataset

def test_open_dataset_recognises_the_embedded_families():
  assert [open_dataset(s, "val").name for s in ("shapes", "shapes:1", "shapes:2")] == ["shapes:1", "shapes:1", "shapes:2"]
  small = open_dataset("shapes:2", "train", size=64, count=5, seed=3)
  assert len(small) == 5 and same(small[1], Shapes("train", 2, 64, 5, 3)[1])
  for spec in ("shapes:3", "shapes:x", "shape"):
    with pytest.raises(UserError, match=f"{spec[-1]}.*1.*2"): open_dataset(spec, "train")
  with pytest.raises(UserError, match="'test' is unknown"): open_dataset("shapes", "test")


def test_open_dataset_recognises_voc(tmp_path):
  write_voc(tmp_path / "a", VOC_OBJECTS, {"train": ["one"], "val": ["two"], "trainval": ["one", "two"], "test": ["three"]})
  write_voc(tmp_path / "b", VOC_OBJECTS, {"train": ["one"], "val": ["two"]})
  assert [open_dataset(tmp_path / d, s).names for d in "ab" for s in ("train", "val")] == [["one", "two"], ["three"], ["one"], ["two"]]


@pytest.mark.parametrize("annotations, images", [
  ("annotations/instances_{}2017.json", "{}2017"), ("annotations/instances_{}.json", "images"),
  ("annotations/instances_{}2014.json", "images/{}2014"), ("{}.json", "images/{}"), ("{}.json", "{}"), ("{}/_annotations.coco.json", "{}")])
def test_open_dataset_recognises_coco(tmp_path, annotations, images):
  for i, split in enumerate(("train", "val")):
    content = {"images": [{"id": i, "file_name": f"{split}.png", "width": 8, "height": 8}], "categories": [{"id": 1, "name": "x"}], "annotations": []}
    write_picture(tmp_path / images.format(split) / f"{split}.png", 8, 8)
    (tmp_path / annotations.format(split)).parent.mkdir(exist_ok=True)
    (tmp_path / annotations.format(split)).write_text(json.dumps(content))
  for split in ("train", "val"):
    dataset = open_dataset(str(tmp_path), split)
    assert dataset.image_name(0).endswith(f"{split}.png") and dataset[0].image.shape == (8, 8, 3)


def test_open_dataset_says_what_it_looked_for_and_found(tmp_path):
  (tmp_path / "holiday.jpg").touch()
  (tmp_path / "annotations").mkdir()
  looked_for = r"instances_val\*\.json.*JPEGImages.*data\.yaml.*labelme.*found annotations/, holiday\.jpg"
  with pytest.raises(UserError, match=looked_for): open_dataset(tmp_path, "val")
  for year in (2014, 2017): (tmp_path / "annotations" / f"instances_val{year}.json").write_text("{}")
  with pytest.raises(UserError, match=r"instances_val2014\.json and annotations/instances_val2017\.json"): open_dataset(tmp_path, "val")
  (tmp_path / "annotations" / "instances_val2014.json").unlink()
  (tmp_path / "holiday.jpg").unlink()
  with pytest.raises(UserError, match="no folder with its images; looked for val2017/, val/"): open_dataset(tmp_path, "val")
