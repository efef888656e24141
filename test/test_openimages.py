import csv, hashlib, io, json, os, random, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from tinydet import download
from tinydet.class_names import MLPERF
from tinydet.datasets import open_dataset, openimages
from tinydet.datasets.download import main
from tinydet.datasets.openimages import get_openimages
from tinydet.datasets.subset import subset_of
from tinydet.errors import UserError, exit_on_user_error
from file_server import FileServer, jpeg

ROOT = Path(__file__).parent.parent
OTHERS = ("Person", "Clothing", "Human eye, closed")   # classes of Open Images that MLPerf leaves out
IDS = {name: f"/m/0{i:x}_q" for i, name in enumerate([*MLPERF, *OTHERS])}
HEADER = ["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction",
          "IsInside"]
CLICKS = [f"XClick{i}{axis}" for axis in "XY" for i in range(1, 5)]   # the table for training alone has them
COUNTS = {"train": 9, "val": 5}   # pictures with a box of MLPerf's classes
SIZES = [(48, 32), (31, 47), (64, 20)]   # width, height


def text(rows, header=()):
  file = io.StringIO()
  csv.writer(file, lineterminator="\n").writerows([header, *rows] if header else rows)
  return file.getvalue().encode()


def split_files(split, count, decimals):
  """`(table rows, pictures)`: `count` pictures with a box of MLPerf's classes and three without."""
  rng = random.Random(split)
  names = sorted(f"{rng.getrandbits(64):016x}" for _ in range(count + 3))
  names[0] = "00000000000000ff"
  rows, without = [], set(names[2:5])
  for name in names:
    chosen = rng.sample(OTHERS, 2) if name in without else [*rng.sample(MLPERF, rng.randint(1, 3)), rng.choice(OTHERS), "Zebra"]
    for kind in chosen:
      (x0, x1), (y0, y1) = (sorted(round(rng.random(), decimals) for _ in range(2)) for _ in range(2))
      group = rng.choice(["0", "0", "1", "-1"])
      rows.append([name, rng.choice(["xclick", "activemil"]), IDS[kind], "1", *(f"{v:.{decimals}f}" for v in (x0, x1, y0, y1)),
                   rng.choice("01"), rng.choice("01"), group, rng.choice("01"), "0"])
  pictures = {name: jpeg(i, *SIZES[i % 3]) for i, name in enumerate(names) if name not in without}
  return rows, pictures


@pytest.fixture
def server(monkeypatch, tmp_path):
  s = FileServer()
  s.rows, s.pictures = {}, {}
  for split, source, decimals in (("train", "train", 6), ("val", "validation", 8)):
    s.rows[split], s.pictures[split] = split_files(split, COUNTS[split], decimals)
    s.files |= {f"{source}/{name}.jpg": data for name, data in s.pictures[split].items()}
  s.files["v5/class-descriptions-boxable.csv"] = text([(i, name) for name, i in sorted(IDS.items(), key=lambda item: item[1])])
  monkeypatch.setattr(openimages, "TABLES", s.base)
  monkeypatch.setattr(openimages, "BUCKET", s.base)
  s.publish = lambda: [publish(s, monkeypatch, split) for split in COUNTS]
  s.publish()
  monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))
  monkeypatch.setenv("no_proxy", "*")
  for name in ("TINYDET_MIRROR", "TINYDET_DATA_DIR"): monkeypatch.delenv(name, raising=False)
  yield s
  s.close()


def publish(server, monkeypatch, split):
  """Write the table of a split as it is published, and its checksum into the program."""
  rows = server.rows[split]
  data = text([row + ["0.5"] * 8 for row in rows], HEADER + CLICKS) if split == "train" else text(rows, HEADER)
  about = openimages.SPLITS[split]
  server.files[about.table] = data
  checksum = "md5:" + hashlib.md5(data).hexdigest()
  monkeypatch.setitem(openimages.SPLITS, split, replace(about, checksum=checksum, size=len(data), pictures=COUNTS[split]))


@pytest.fixture
def folder(tmp_path): return tmp_path/"oi"


def read(folder, split): return json.loads((folder/"annotations"/f"instances_{split}.json").read_text())


def reference(server, split, only=None):
  """The conversion of mlcommons/training once more, row by row: `(images, annotations, categories)`."""
  kind_of = {row[0]: row[1] for row in csv.reader(server.files["v5/class-descriptions-boxable.csv"].decode().splitlines())}
  table = [row for row in csv.DictReader(server.files[openimages.SPLITS[split].table].decode().splitlines()) if kind_of[row["LabelName"]] in MLPERF]
  names = sorted({row["ImageID"] for row in table})
  images, annotations = [], []
  for number, name in enumerate(names, 1):
    if only is not None and name not in only: continue
    width, height = Image.open(io.BytesIO(server.pictures[split][name])).size
    images.append({"id": number, "file_name": f"{name}.jpg", "height": height, "width": width})
    for row in (row for row in table if row["ImageID"] == name):
      x, y = float(row["XMin"]) * width, float(row["YMin"]) * height
      w, h = (float(row["XMax"]) - float(row["XMin"])) * width, (float(row["YMax"]) - float(row["YMin"])) * height
      annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": MLPERF.index(kind_of[row["LabelName"]]),
                          "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(bool(int(row["IsGroupOf"])))})
  return images, annotations, [{"id": i, "name": name} for i, name in enumerate(MLPERF)]


def assert_converted(server, folder, split, only=None):
  found, (images, annotations, categories) = read(folder, split), reference(server, split, only)
  assert found["images"] == images and found["categories"] == categories and len(found["annotations"]) == len(annotations) > 0
  for a, b in zip(found["annotations"], annotations):
    assert a | {"bbox": 0, "area": 0} == b | {"bbox": 0, "area": 0}
    assert np.allclose([*a["bbox"], a["area"]], [*b["bbox"], b["area"]], rtol=0, atol=5.01e-4)
  for image in images: assert (folder/split/image["file_name"]).read_bytes() == server.pictures[split][image["file_name"][:16]]


def names(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def exits(capfd, *argv):
  """The one line that the program ends with."""
  capfd.readouterr()
  with pytest.raises(SystemExit) as end, exit_on_user_error(): main(["openimages-mlperf", *map(str, argv)])
  errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
  assert end.value.code == 2 and len(errors) == 1
  return errors[0]


def test_a_whole_download_is_mlperfs_conversion_and_opens_as_any_coco_folder(server, folder, capfd):
  main(["openimages-mlperf", str(folder), "--workers", "3"])
  out = capfd.readouterr().out
  assert out.startswith(f"openimages-mlperf: {sum(COUNTS.values())} pictures (about ") and "note" not in out and "missing" not in out
  for split, count in COUNTS.items():
    assert_converted(server, folder, split)
    data = open_dataset(folder, split)
    assert len(data) == count and data.class_names == list(MLPERF) and data.category_ids == list(range(264))
    assert sorted(os.listdir(folder/split)) == sorted(f"{name}.jpg" for name in server.pictures[split])
    for i in range(count):
      row = [a for a in reference(server, split)[1] if a["image_id"] == data.image_ids[i] and not a["iscrowd"]]
      assert data[i].labels.tolist() == [a["category_id"] for a in row]
      corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in row)]
      assert np.allclose(data[i].boxes, np.reshape(corners, (-1, 4)), atol=2e-3)
  assert max(server.asked().values()) == 1
  get_openimages(folder)
  assert max(server.asked().values()) == 1 and f"--data {folder}" in out.splitlines()[-1]


def test_portions_change_nothing(server, folder, tmp_path, monkeypatch):
  get_openimages(folder)
  monkeypatch.setattr(openimages, "PORTION", 2)
  get_openimages(tmp_path/"small")
  for split in COUNTS:
    file = f"annotations/instances_{split}.json"
    assert (tmp_path/"small"/file).read_bytes() == (folder/file).read_bytes()


def test_a_table_in_no_order(server, folder):
  random.Random(0).shuffle(server.rows["val"])
  server.publish()
  get_openimages(folder, ("val",))
  assert_converted(server, folder, "val")


def test_only_what_is_missing_is_fetched(server, folder):
  get_openimages(folder, ("val",))
  broken, lost, *kept = sorted((folder/"val").iterdir())
  (folder/"annotations"/"instances_val.json").unlink()
  broken.write_bytes(broken.read_bytes()[:10])   # as a loss of power may leave it
  lost.rename(folder/"val"/f".{lost.name}.partial")
  (folder/"val"/"notes.txt").write_text("mine")
  server.requests.clear()
  get_openimages(folder)
  assert {path for path in server.asked() if path.startswith("validation/")} == {f"validation/{broken.name}", f"validation/{lost.name}"}
  for split in COUNTS: assert_converted(server, folder, split)
  assert names(folder/"val") == sorted(["notes.txt", *(p.name for p in (broken, lost, *kept))])


def test_a_subset_is_the_first_pictures_and_grows(server, folder):
  get_openimages(folder, subset=2)
  for split in COUNTS:
    assert_converted(server, folder, split, sorted(server.pictures[split])[:2])
    assert subset_of(folder/"annotations"/f"instances_{split}.json") == 2 and len(open_dataset(folder, split)) == 2
  server.requests.clear()
  get_openimages(folder, subset=1)
  assert not server.requests
  get_openimages(folder, subset=4)
  assert len(server.requests) == 4 and len(open_dataset(folder, "train")) == 4
  get_openimages(folder)
  for split in COUNTS: assert_converted(server, folder, split)
  assert len(server.requests) == sum(COUNTS.values()) - 4 and max(server.asked().values()) == 1


def test_another_count_than_published_is_said(server, folder, monkeypatch, capfd):
  monkeypatch.setitem(openimages.SPLITS, "val", replace(openimages.SPLITS["val"], pictures=24_781))
  get_openimages(folder)
  notes = [line for line in capfd.readouterr().out.splitlines() if line.startswith("note: ")]
  assert len(notes) == 1 and notes[0].endswith("boxes of MLPerf's classes on 5 pictures; MLPerf's reference counts 24,781")


def test_pictures_that_the_bucket_no_longer_has(server, folder, monkeypatch, capfd):
  server.rows["val"], server.pictures["val"] = split_files("many", 120, 6)
  server.files |= {f"validation/{name}.jpg": data for name, data in server.pictures["val"].items()}
  server.publish()
  gone, also = sorted(server.pictures["val"])[3:5]
  server.statuses |= {f"validation/{gone}.jpg": 404, f"validation/{also}.jpg": 403}
  line = exits(capfd, folder)   # 2 of 120 are more than one in a hundred
  listed = (folder/"missing-val.txt").read_text().splitlines()
  assert f"2 of 120 val pictures cannot be downloaded, all listed in {folder}/missing-val.txt" in line and "HTTP 404" in line
  assert listed == [f"{server.base}validation/{gone}.jpg HTTP 404 Not Found", f"{server.base}validation/{also}.jpg HTTP 403 Forbidden"]
  assert not (folder/"annotations"/"instances_val.json").exists() and len(os.listdir(folder/"val")) == 118
  del server.statuses[f"validation/{also}.jpg"]
  server.requests.clear()
  get_openimages(folder, ("val",))
  assert "note: 1 of 120 val pictures cannot be downloaded" in (out := capfd.readouterr().out) and out.strip().splitlines()[-1].startswith(
    "openimages-mlperf, val: 119 pictures, ")
  assert_converted(server, folder, "val", set(server.pictures["val"]) - {gone})
  assert read(folder, "val")["info"]["missing"] == 1 and len(open_dataset(folder, "val")) == 119
  assert {path for path in server.asked() if path.startswith("validation/")} == {f"validation/{gone}.jpg", f"validation/{also}.jpg"}


@pytest.mark.parametrize("trouble, words", [("status", "HTTP 503"), ("etag", "its MD5 is not 0000"), ("cut", "the connection broke off"),
                                            ("html", "it is no JPEG")])
def test_pictures_that_do_not_come_whole_are_none(server, folder, capfd, trouble, words):
  bad = f"{sorted(server.pictures['val'])[0]}"
  path, data = f"validation/{bad}.jpg", server.pictures["val"][bad]
  if trouble == "status": server.statuses[path] = 503
  if trouble == "etag": server.etags[path] = '"' + "0" * 32 + '"'
  if trouble == "cut": server.cuts[path] = [100] * 4
  if trouble == "html": server.files[path] = b"<html>Log in to this network</html>"
  line = exits(capfd, folder)
  assert "1 of 5 val pictures cannot be downloaded" in line and words in line and bad in line
  assert not list((folder/"annotations").iterdir()) and not (folder/"val"/f"{bad}.jpg").exists() and not list((folder/"val").glob(".*"))
  assert server.asked()[path] == (1 if trouble == "html" else 4)
  server.statuses, server.etags, server.files[path] = {}, {}, data
  get_openimages(folder)
  assert_converted(server, folder, "val")
  assert not (folder/"missing-val.txt").exists()


def test_a_picture_that_breaks_off_once_is_tried_again(server, folder):
  path = f"validation/{sorted(server.pictures['val'])[0]}.jpg"
  server.cuts[path] = [100]
  get_openimages(folder, ("val",))
  assert server.asked()[path] == 2
  assert_converted(server, folder, "val")


def test_a_bucket_out_of_reach_is_given_up_soon(server, folder, monkeypatch, capfd):
  monkeypatch.setattr(openimages, "BUCKET", "http://127.0.0.1:1/")
  server.rows["val"], server.pictures["val"] = split_files("many", 50, 6)
  server.publish()
  line = exits(capfd, folder, "--workers", "2")
  assert "8 files in a row cannot be downloaded" in line and "Connection refused" in line
  assert names(folder) == ["downloads/class-descriptions-boxable.csv", "downloads/validation-annotations-bbox.csv"]


@pytest.mark.parametrize("form", ["http", "folder"])
def test_mirrors(server, folder, tmp_path, monkeypatch, form):
  for name, data in server.files.items():
    file = tmp_path/"mirror"/(name.rpartition("/")[2] if name.endswith(".csv") else name)   # tables lie there by their names, pictures in folders
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    server.files = server.files | {str(file.relative_to(tmp_path/"mirror")): data}
  monkeypatch.setattr(openimages, "BUCKET", "http://127.0.0.1:1/")
  monkeypatch.setattr(openimages, "TABLES", "http://127.0.0.1:1/")
  monkeypatch.setenv("TINYDET_MIRROR", server.base if form == "http" else str(tmp_path/"mirror"))
  get_openimages(folder)
  for split in COUNTS: assert_converted(server, folder, split)
  assert bool(server.requests) == (form == "http")


def test_another_table_than_published(server, folder, capfd):
  server.files[openimages.SPLITS["val"].table] += b"\n"
  assert "its checksum is md5:" in exits(capfd, folder) and not folder.exists()


@pytest.mark.parametrize("change, words", [
  (lambda rows: rows[3].__setitem__(4, "left"), "could not convert string to float: 'left', at line 5"),
  (lambda rows: rows[3].__setitem__(0, "no-number"), "at line 5"),
  (lambda rows: rows[3].__setitem__(5, "1.5"), "a box is not within 0 and 1, at line"),
  (lambda rows: rows.__setitem__(3, rows[3][:5]), "at line 5")])
def test_a_table_with_a_row_that_is_none(server, folder, capfd, change, words):
  row = server.rows["val"][3]
  row[2] = IDS["Zebra"]
  change(server.rows["val"])
  server.publish()
  line = exits(capfd, folder)
  assert "validation-annotations-bbox.csv: is no table of boxes (" in line and words in line
  assert not (folder/"annotations"/"instances_val.json").exists()


def test_a_table_without_its_columns(server, folder, capfd):
  server.rows["val"] = []
  HEADER.remove("IsGroupOf")
  try: server.publish()
  finally: HEADER.insert(10, "IsGroupOf")
  assert "is no table of boxes ('IsGroupOf' is not in list" in exits(capfd, folder)


def test_a_table_of_classes_that_lacks_some(server, folder, capfd):
  server.files["v5/class-descriptions-boxable.csv"] = text([(i, name) for name, i in IDS.items() if name != "Zebra"])
  assert "has 263 of MLPerf's 264 classes, not Zebra" in exits(capfd, folder)
  assert names(folder) == ["downloads/validation-annotations-bbox.csv"]
  del server.files["v5/class-descriptions-boxable.csv"]
  assert "HTTP 404" in (line := exits(capfd, folder)) and f"put it into {folder}/downloads/" in line


def test_too_little_room_is_said_before_anything_starts(server, folder, monkeypatch, capfd):
  need = sum(COUNTS.values()) * openimages.PICTURE + 2 * sum(about.size for about in openimages.SPLITS.values())
  monkeypatch.setattr(openimages, "free_bytes", lambda folder: need - 1)
  assert download.size_text(need) in exits(capfd, folder) and not server.requests and not folder.exists()
  monkeypatch.setattr(openimages, "free_bytes", lambda folder: need)
  get_openimages(folder)


CHILD = """import resource, sys
from pathlib import Path
from tinydet.datasets import openimages
from tinydet.datasets.download import main
from tinydet.datasets.openimages import Split
from tinydet.errors import exit_on_user_error
openimages.TABLES = openimages.BUCKET = sys.argv[2]
openimages.SPLITS = eval(sys.argv[3])
{}
with exit_on_user_error(): main(["openimages-mlperf", sys.argv[1], "--workers", "2"])"""


def child(server, folder, extra):
  return subprocess.run([sys.executable, "-c", CHILD.format(extra), str(folder), server.base, repr(openimages.SPLITS)], cwd=ROOT, check=False,
                        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("what", ["picture", "annotations"])
def test_a_disk_that_fills_up(server, folder, tmp_path, what):
  name = sorted(server.pictures["val"])[2]
  if what == "picture":
    server.pictures["val"][name] = server.files[f"validation/{name}.jpg"] = jpeg(1, 300, 300)   # all else takes less
    limit = len(server.files[f"validation/{name}.jpg"]) - 1
    assert limit > max(len(data) for path, data in server.files.items() if name not in path)
  else:
    get_openimages(tmp_path/"other")
    limit = (tmp_path/"other"/"annotations"/"instances_val.json").stat().st_size - 1
  process = child(server, folder, f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)")
  errors = process.stderr.splitlines()
  assert process.returncode == 2 and "File too large" in errors[-1] and sum("error:" in line for line in errors) == 1
  assert not list((folder/"annotations").iterdir()) and not list((folder/"val").glob(".*"))
  assert (folder/"val"/f"{name}.jpg").exists() == (what == "annotations")
  get_openimages(folder)
  for split in COUNTS: assert_converted(server, folder, split)


@pytest.mark.parametrize("kept", [0, 3, 9])
def test_a_killed_process_leaves_what_the_next_goes_on_from(server, folder, kept):
  process = child(server, folder, f"""import os, signal, threading
replace, left, lock = os.replace, {kept}, threading.Lock()
def counted(source, target):
  global left
  with lock:
    if ".jpg" in str(target):
      if not left: os.kill(os.getpid(), signal.SIGKILL)
      left -= 1
    replace(source, target)
os.replace = counted""")
  assert process.returncode == -9
  there = {f"{source}/{p.name}" for split, source in (("train", "train"), ("val", "validation")) for p in (folder/split).glob("[0-9a-f]*.jpg")}
  assert len(there) == kept and list(folder.glob("*/.*.partial"))
  server.requests.clear()
  get_openimages(folder)
  for split in COUNTS: assert_converted(server, folder, split)
  assert not there & set(server.asked()) and not list(folder.glob("*/.*.partial"))


def test_a_folder_is_completed_by_one_process_at_a_time(server, folder):
  with download.alone(folder, "openimages-mlperf"):
    waiting = subprocess.Popen([sys.executable, "-c", CHILD.format(""), str(folder), server.base, repr(openimages.SPLITS)], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert waiting.stderr.readline() == "waiting for another process that downloads openimages-mlperf\n"
    for split in COUNTS: openimages._get_split(folder, split, 0, 2)
    server.requests.clear()
  assert waiting.wait(60) == 0 and not server.requests
  waiting.stderr.close()


def test_errors_of_our_own_are_not_hidden(server, folder, monkeypatch):
  def broken(data): raise TypeError("ours")
  monkeypatch.setattr(openimages, "jpeg_size", broken)
  with pytest.raises(TypeError, match="ours"): get_openimages(folder)


def test_what_a_run_says_of_it(server, folder):
  get_openimages(folder)
  assert open_dataset(folder.parent, "val").layout.startswith(f"COCO: in {folder.name}/")
  with pytest.raises(UserError, match="no data set with a split 'train'"): open_dataset(folder/"val", "train")
  assert open_dataset(folder, "val").max_boxes == max(np.bincount([a["image_id"] for a in reference(server, "val")[1] if not a["iscrowd"]]))
