"""Faults of data sets that people met with this and other tools: what was silent is now refused, or mended and said."""
import json, struct, subprocess, sys, zlib
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from test_layouts import COUNT, HEIGHT, WIDTH, boxes_of, coco_content, picture, read_back, save, voc, write, xml, yolo
from tinydet.datasets import check, files, open_dataset
from tinydet.datasets.image import read_image
from tinydet.datasets.voc import Voc
from tinydet.errors import UserError


def coco(d: Path, spoil=lambda content: None, spoil_val: bool = True) -> Path:
  for name in ("train", "val"):
    save(d / name)
    content = coco_content(range(COUNT))
    if name == "train" or spoil_val: spoil(content)
    write(d / f"annotations/instances_{name}.json", content)
  return d


def refused(d: Path, says: str) -> None:
  with pytest.raises(UserError, match=says): check.main([str(d), "--fast"])


def said(dataset, what: str) -> bool: return any(what in line for line in dataset.warnings)


def test_nothing_to_learn_is_refused_and_nothing_to_score_said(tmp_path, capsys):
  coco(tmp_path / "crowd", lambda c: [a.update(iscrowd=1) for a in c["annotations"]] and None)
  refused(tmp_path / "crowd", "nothing is left to learn: all 18 boxes are crowd regions")
  voc("Annotations", "JPEGImages")(tmp_path / "difficult")
  for file in (tmp_path / "difficult/Annotations").iterdir():
    file.write_text(file.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
  refused(tmp_path / "difficult", "nothing is left to learn: all .* boxes are crowd regions .* or difficult")
  coco(tmp_path / "none", lambda c: c["annotations"].clear())
  refused(tmp_path / "none", "nothing is left to learn: no picture has a box")
  yolo("{}/images", "{}/labels", "train: train/images\nval: val/images\nnames: [cat, dog]\n")(tmp_path / "yolo")
  for file in (tmp_path / "yolo/train/labels").iterdir(): file.write_text("")
  refused(tmp_path / "yolo", "nothing is left to learn: no picture has a box")
  write(coco(tmp_path / "noval") / "annotations/instances_val.json", coco_content(range(COUNT)) | {"annotations": []})
  capsys.readouterr()
  check.main([str(tmp_path / "noval"), "--fast"])
  assert "no picture of the split 'val' has an object: there will be no score" in capsys.readouterr().out


def test_a_turned_box_of_cvat_is_the_box_around_it(tmp_path):
  """40x8 turned by 90 degrees about (40, 32); by 45 it is sqrt(1/2) (40 + 8) = 33.94 both ways. By 180, or with its own polygon, it stays."""
  def turn(c):
    for a, degrees in zip(c["annotations"], (90.0, 45, 180, 0.0)): a.update(bbox=[20, 28, 40, 8], area=320, attributes={"rotation": degrees})
    c["annotations"][4].update(bbox=[36, 12, 8, 40], area=320, attributes={"rotation": 90}, segmentation=[[36, 12, 44, 12, 44, 52, 36, 52]])
  dataset = open_dataset(coco(tmp_path / "coco", turn), "train")
  around = 48 * np.sqrt(0.5)
  wanted = [[36, 12, 44, 52], [40 - around / 2, 32 - around / 2, 40 + around / 2, 32 + around / 2], *[[20, 28, 60, 36]] * 2, [36, 12, 44, 52]]
  np.testing.assert_allclose(np.concatenate([dataset[i].boxes for i in range(3)])[:5], wanted, atol=1e-4)
  assert said(dataset, "attributes.rotation, taken as the upright box around the turned one (2): annotation id 1, annotation id 2")
  with pytest.raises(UserError, match="rotation"): open_dataset(tmp_path / "coco", "train", strict=True)

  voc("Annotations", "JPEGImages")(tmp_path / "voc")
  box = "<bndbox><xmin>21</xmin><ymin>29</ymin><xmax>60</xmax><ymax>36</ymax></bndbox>"
  attributes = "<attributes><attribute><name>rotation</name><value>90.0</value></attribute></attributes>"
  turned = "<robndbox><cx>40</cx><cy>32</cy><w>40</w><h>8</h><angle>1.5707963</angle></robndbox>"
  objects = f"<object><name>cat</name>{box}{attributes}</object><object><name>cat</name>{turned}</object>"
  for i in range(COUNT): write(tmp_path / f"voc/Annotations/p{i}.xml", xml(COUNT - 1).replace("</annotation>", f"{objects}</annotation>"))
  dataset = open_dataset(tmp_path / "voc", "train")
  np.testing.assert_allclose(dataset[0].boxes, [[36, 12, 44, 52]] * 2, atol=1e-4)
  assert said(dataset, "<attribute> rotation") and said(dataset, "<robndbox>")


def corners(c):
  for a in c["annotations"]: a["bbox"] = [*a["bbox"][:2], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]


def polygon(a): x, y, w, h = a["bbox"]; return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def corners_with_polygons(c):
  for a in c["annotations"]: a.update(segmentation=polygon(a), area=None)
  corners(c)
  for a in c["annotations"]: a["area"] = a["bbox"][2] * a["bbox"][3]


def centres(c):
  for a in c["annotations"]:
    a["segmentation"], (x, y, w, h) = polygon(a), a["bbox"]
    a["bbox"] = [x + w / 2, y + h / 2, w, h]


def scaled(factor):
  def spoil(c):
    for a in c["annotations"]: a["bbox"] = [factor * n for n in a["bbox"]]
  return spoil


@pytest.mark.parametrize(("spoil", "says"), [
  (corners, "whose area is that of corners"), (corners_with_polygons, "apart from its segmentation"), (centres, "apart from its segmentation"),
  (scaled(10), "outside their pictures, more than half of all"), (scaled(0.5), "smaller than its area")])
def test_boxes_that_are_none_are_refused(tmp_path, spoil, says):
  refused(coco(tmp_path, spoil), says)


def test_one_box_apart_from_its_polygon_is_said(tmp_path):
  def spoil(c):
    for a in c["annotations"]: a["segmentation"] = polygon(a)
    c["annotations"][2]["bbox"] = [60, 40, 10, 10]
  assert said(open_dataset(coco(tmp_path, spoil), "train"), "apart from its segmentation, kept (1): annotation id 3")


def lists(d: Path, **names: str) -> Path:
  voc("Annotations", "JPEGImages")(d)
  for name, text in names.items(): write(d / f"ImageSets/Main/{name}.txt", text)
  return d


def names(dataset) -> list[str]: return sorted(Path(dataset.image_name(i)).stem for i in range(len(dataset)))


def test_lists_of_voc_as_tools_write_them(tmp_path):
  train, val, test = "p0\np1\np2\n", "p3\n", "p4\np5\n"
  for k, (given, wanted) in enumerate([
      ({"train": train, "val": val, "test": test}, [["p0", "p1", "p2"], ["p3"]]),
      ({"train": train, "test": test}, [["p0", "p1", "p2"], ["p4", "p5"]]),
      ({"trainval": train, "test": test, "train": "p0\n", "val": "p1\n"}, [["p0", "p1", "p2"], ["p4", "p5"]]),
      ({"train": "p0 -1\np1  1\n", "val": "p2.png\n"}, [["p0", "p1"], ["p2"]]), ({"train": "data/obj/p0\n", "valid": "p1\n"}, [["p0"], ["p1"]])]):
    assert [names(open_dataset(lists(tmp_path / str(k), **given), part)) for part in ("train", "val")] == wanted
  parts = [names(open_dataset(lists(tmp_path / "default", default="p0\np1\np2\np3\np4\n"), part)) for part in ("train", "val")]
  assert len(parts[0]) == 4 and sorted(parts[0] + parts[1]) == [f"p{i}" for i in range(5)]
  with pytest.raises(UserError, match=r"has no train\.txt and val\.txt; found one\.txt, two\.txt"):
    open_dataset(lists(tmp_path / "other", one="p0\n", two="p1\n"), "train")


def test_voc_in_subfolders_and_counted_from_0(tmp_path):
  voc("Annotations/cam1", "JPEGImages/cam1", range(5))(tmp_path / "sub")
  voc("Annotations/cam2", "JPEGImages/cam2", range(5))(tmp_path / "sub")
  write(tmp_path / "sub/ImageSets/Main/train.txt", "".join(f"cam1/p{i}\n" for i in range(5)))
  write(tmp_path / "sub/ImageSets/Main/val.txt", "".join(f"cam2/p{i}\n" for i in range(5)))
  dataset = open_dataset(tmp_path / "sub", "val")
  assert dataset.image_name(0).endswith("JPEGImages/cam2/p0.png") and len(read_back(dataset)) == 5
  save(tmp_path / "zero/JPEGImages")
  for i in range(COUNT):
    objects = "".join(f"<object><name>{name}</name><bndbox><xmin>{x0 + .25}</xmin><ymin>{y0 + .25}</ymin><xmax>{x1 + .25}</xmax>"
                      f"<ymax>{y1 + .25}</ymax></bndbox></object>" for name, x0, y0, x1, y1 in boxes_of(i))
    write(tmp_path / f"zero/Annotations/p{i}.xml", xml(COUNT - 1).replace("</annotation>", f"{objects}</annotation>"))
  dataset = Voc(tmp_path / "zero", None)
  assert said(dataset, "corners counted from 0") and dataset[0].boxes[0].tolist() == [x + 0.25 for x in boxes_of(0)[0][1:]]


def test_dark_and_transparent_pictures_are_said(tmp_path):
  """12 bits in 16 are as dark as they were written, and that is said; a picture that is transparent everywhere shows its colours."""
  def spoil(c): c["images"][0]["file_name"], c["images"][1]["file_name"] = "dark.png", "clear.png"
  folder = coco(tmp_path, spoil)
  grey = np.asarray(picture(0).convert("L")).astype(np.uint16)
  for part in ("train", "val"):
    Image.fromarray(grey * 16).save(folder / part / "dark.png")
    clear = picture(1).convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / part / "clear.png")
  dataset = open_dataset(folder, "train")
  assert said(dataset, f"come out dark; multiply their values to fill the range (1): dark.png has {int(grey.max()) * 16:,} of 65,535")
  assert said(dataset, "transparent everywhere, their transparency passed over (1): clear.png")
  np.testing.assert_array_equal(dataset[1].image, np.asarray(picture(1)))
  np.testing.assert_array_equal(read_image(folder / "train/clear.png", None, ""), np.asarray(picture(1)))
  with pytest.raises(UserError, match="come out dark"): open_dataset(folder, "train", strict=True)
  Image.fromarray(grey * 257).save(folder / "train/dark.png")   # the whole range
  assert not said(open_dataset(folder, "train"), "come out dark")


def png_of_16_bits(path, values):
  """Write u16 [H,W,3 or 4] as the PNG specification says, which Pillow reads and cannot write."""
  def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  height, width, channels = values.shape
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("alpha", [False, True])
def test_coloured_pictures_of_16_bits(tmp_path, alpha):
  """Scaled to 8 bits, to within a level; those of 12 bits are said to be dark."""
  def spoil(c): c["images"][0]["file_name"] = "deep.png"
  folder, colours = coco(tmp_path, spoil), np.asarray(picture(0)).astype(np.int64)
  noise = np.random.default_rng(0).integers(0, 65536, colours.shape)
  opaque = np.full((*colours.shape[:2], 1), 65535)
  for values, dark in ((colours * 16, True), (colours * 257, False), (noise, False)):
    for part in ("train", "val"):
      png_of_16_bits(folder / part / "deep.png", np.concatenate([values, opaque], 2) if alpha else values)
    dataset = open_dataset(folder, "train")
    assert np.abs(dataset[0].image - values / 257).max() <= 1
    assert said(dataset, "come out dark") == dark


def test_a_photograph_that_its_camera_turned_is_read_upright_where_no_size_is_annotated(tmp_path):
  yolo("{}/images", "{}/labels", "train: train/images\nval: val/images\nnames: [cat, dog]\n")(tmp_path)
  for i, (turn, back) in enumerate(((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270))):
    exif = Image.Exif()
    exif[0x0112] = turn
    picture(i).transpose(back).save(tmp_path / f"train/images/p{i}.png", exif=exif)
  dataset = open_dataset(tmp_path, "train")
  assert len(read_back(dataset)) == 6 and said(dataset, "no annotated size that tells how their boxes were drawn") and said(dataset, "(3): ")
  assert dataset.sizes == [(HEIGHT, WIDTH)] * 6


PRINTS = """
import pathlib, sys
from tinydet.errors import exit_on_user_error
with exit_on_user_error():
  for i in range(20_000): print("кошка", i)
  sys.stdout.flush()
  pathlib.Path(sys.argv[1]).write_text("done")
"""


@pytest.mark.parametrize("closed", [False, True])
def test_neither_an_encoding_nor_a_closed_pipe_ends_a_program(tmp_path, closed):
  program = subprocess.Popen([sys.executable, "-c", PRINTS, str(tmp_path / "kept")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={"PYTHONIOENCODING": "latin-1", "PATH": ""})
  if closed: program.stdout.close()
  else: assert program.stdout.read().startswith(rb"\u043a")
  assert program.wait(60) == 0 and (tmp_path / "kept").read_text() == "done" and program.stderr.read() == b""


def test_files_of_a_folder_that_are_not_looked_at_are_counted(tmp_path):
  for name in ("a.jpg", "b.avif", "c.jp2", "d.jfif", "e.ppm", "f.HEIC", "notes.txt", "g/h.heic", ".hidden"): write(tmp_path / name, "")
  assert {p.name for p in files.expand((str(tmp_path),))[0]} == {"a.jpg", "b.avif", "c.jp2", "d.jfif", "e.ppm"}
  assert files.left_unread((str(tmp_path),)) == [
    f"{tmp_path}: files that are not looked at (3): 2 .heic, 1 .txt; convert .heic to JPEG or PNG"]
  assert json.dumps(files.left_unread((str(tmp_path / "a.jpg"),))) == "[]"
