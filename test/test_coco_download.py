import hashlib, io, json, os, shlex, shutil, subprocess, sys, zipfile
from dataclasses import replace
from pathlib import Path
import pytest
from tinydet import download
from tinydet.datasets import check, coco2017, open_dataset
from tinydet.datasets.coco2017 import get_coco
from tinydet.datasets.download import local_folder, main
from tinydet.datasets.subset import subset_of
from tinydet.errors import UserError, exit_on_user_error
from file_server import FileServer, jpeg

ROOT = Path(__file__).parent.parent
COUNTS = {"train": 7, "val": 4}


def instances(split):
  images = [{"id": 9 + 4 * i, "file_name": f"{9 + 4 * i:012}.jpg", "height": 30, "width": 40, "license": 1} for i in range(COUNTS[split])]
  annotations = [{"id": i + 1, "image_id": image["id"], "category_id": (1, 90)[i % 2], "bbox": [1.5, 2, 10.25, 12], "area": 60.5, "iscrowd": 0,
                  "segmentation": [[1, 2, 3, 4, 5, 6]]} for i, image in enumerate(reversed(images))]
  # in no order, and with room to compress
  return {"info": {"description": "COCO 2017 Dataset", "room": " " * 200_000}, "licenses": [{"id": 1}], "images": images[::-1],
          "annotations": annotations, "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]}


def zipped(members):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
    for name, data in members.items(): z.writestr(name, data)
  return file.getvalue()


def pictures(split): return {f"{split}2017/{image['file_name']}": jpeg(image["id"]) for image in instances(split)["images"]}


@pytest.fixture(scope="module")
def archives():
  annotations = {f"annotations/{kind}_{s}2017.json": json.dumps(instances(s)) for kind in ("captions", "instances") for s in COUNTS}
  return {coco2017.ANNOTATIONS.name: zipped(annotations)} | {f"zips/{s}2017.zip": zipped({f"{s}2017/": b""} | pictures(s)) for s in COUNTS}


@pytest.fixture
def server(archives, monkeypatch, tmp_path):
  s = FileServer()
  s.files |= archives | pictures("train") | pictures("val")
  def small(archive, files):
    data = archives[archive.name]
    return replace(archive, checksum="sha256:" + hashlib.sha256(data).hexdigest(), size=len(data), files=files, unpacked=500_000)
  monkeypatch.setattr(coco2017, "BASE", s.base)
  monkeypatch.setattr(coco2017, "ANNOTATIONS", small(coco2017.ANNOTATIONS, 2))
  monkeypatch.setattr(coco2017, "PICTURES", {split: small(archive, COUNTS[split]) for split, archive in coco2017.PICTURES.items()})
  monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))
  monkeypatch.setenv("no_proxy", "*")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
  for name in ("TINYDET_MIRROR", "TINYDET_DATA_DIR"): monkeypatch.delenv(name, raising=False)
  yield s
  s.close()


@pytest.fixture
def folder(tmp_path): return tmp_path/"data"/"coco"


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def finished(splits=("train", "val")):
  wanted = {f"annotations/instances_{s}2017.json": json.dumps(instances(s)).encode() for s in COUNTS}
  for s in splits: wanted |= pictures(s)
  return wanted


def exits(capfd, *argv):
  """The one line that the program ends with."""
  capfd.readouterr()
  with pytest.raises(SystemExit) as end, exit_on_user_error(): main(list(map(str, argv)))
  errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
  assert end.value.code == 2 and len(errors) == 1
  return errors[0]


def test_a_whole_download_opens_as_any_coco_folder_and_makes_no_further_request(server, folder, capfd):
  main(["coco", str(folder)])
  assert files(folder) == finished() and not (folder/"downloads").exists()
  out = capfd.readouterr().out
  total = sum(len(server.files[name]) for name in server.asked())
  assert out.startswith(f"coco: {download.size_text(total)} to download into {folder}, ") and f"--data {folder}" in out.splitlines()[-1]
  for split, count in COUNTS.items():
    data = open_dataset(folder, split)
    assert len(data) == count and data.category_ids == [1, 90] and data[0].boxes.tolist() == [[1.5, 2, 11.75, 14]]
  requests = len(server.requests)
  get_coco(folder)
  assert requests == 3 == len(server.requests)


def test_one_split_needs_no_other(server, folder):
  get_coco(folder, ("val",))
  assert files(folder) == finished(("val",)) and "zips/train2017.zip" not in server.asked()
  get_coco(folder)
  assert files(folder) == finished() and server.asked() == {name: 1 for name in (coco2017.ANNOTATIONS.name, "zips/train2017.zip", "zips/val2017.zip")}


def test_a_connection_that_ends_is_taken_up_by_the_next_call(server, folder, capfd):
  name = "zips/train2017.zip"
  server.cuts[name] = [3000, 0, 0, 0]
  assert "run it" not in (line := exits(capfd, "coco", folder)) and "the connection broke off after 3000 bytes" in line
  assert files(folder).keys() == finished(("val",)).keys() | {"downloads/train2017.zip.partial", "downloads/train2017.zip.partial.tag"}
  get_coco(folder)
  assert files(folder) == finished() and server.requests[-1] == (name, "bytes=3000-")
  assert server.sent == sum(len(server.files[n]) for n in server.asked())


KILLED = """import os, signal, sys
from tinydet.datasets import coco2017
from tinydet.datasets.coco2017 import Archive
coco2017.BASE, coco2017.ANNOTATIONS, coco2017.PICTURES = eval(sys.argv[2])
replace, left = os.replace, 3
def counted(source, target):
  global left
  if str(target).endswith(".jpg"):
    left -= 1
    if not left: os.kill(os.getpid(), signal.SIGKILL)
  replace(source, target)
os.replace = counted
from pathlib import Path
coco2017.get_coco(Path(sys.argv[1]))"""


def test_a_killed_process_leaves_what_the_next_goes_on_from(server, folder):
  tables = repr((coco2017.BASE, coco2017.ANNOTATIONS, coco2017.PICTURES))
  process = subprocess.run([sys.executable, "-c", KILLED, str(folder), tables], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
  assert process.returncode == -9
  there = sorted((folder/"val2017").glob("0*.jpg"))
  assert len(there) == 2 and len(list((folder/"val2017").glob(".*.partial"))) == 1
  stays, spoilt = there
  spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"x")   # as a loss of power may leave it
  written = stays.stat().st_mtime_ns
  requests = len(server.requests)
  get_coco(folder)
  assert files(folder) == finished() and stays.stat().st_mtime_ns == written
  assert [path for path, _ in server.requests[requests:]] == ["zips/train2017.zip"]


def test_a_folder_unpacked_by_hand_is_taken_and_completed(server, folder):
  for name, data in finished().items():
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    (folder/name).write_bytes(data)
  get_coco(folder)
  assert not server.requests
  (folder/"val2017"/f"{9:012}.jpg").unlink()
  get_coco(folder)
  assert files(folder) == finished() and server.asked() == {"zips/val2017.zip": 1}


def test_another_archive_than_published_is_unpacked_by_nobody(server, folder, archives, capfd):
  server.files["zips/val2017.zip"] = archives["zips/train2017.zip"]
  line = exits(capfd, "coco", folder)
  assert "its checksum is sha256:" in line and coco2017.PICTURES["val"].checksum in line
  assert files(folder).keys() == {f"annotations/instances_{s}2017.json" for s in COUNTS}


def test_an_archive_without_the_files_published(server, folder, monkeypatch, capfd):
  monkeypatch.setitem(coco2017.PICTURES, "val", replace(coco2017.PICTURES["val"], files=5))
  assert r"has 4 files like val2017/\d{12}\.jpg, expected 5" in exits(capfd, "coco", folder)


def test_a_missing_archive(server, folder, capfd):
  del server.files[coco2017.ANNOTATIONS.name]
  line = exits(capfd, "coco", folder)
  assert "HTTP 404" in line and f"put it into {folder}/downloads/" in line and not folder.parent.exists()


def test_too_little_room_is_said_before_anything_starts(server, folder, monkeypatch, capfd):
  fetched = sum(archive.size for archive in (coco2017.ANNOTATIONS, *coco2017.PICTURES.values()))
  peak = 1_500_000 + coco2017.PICTURES["train"].size   # the largest archive is the last
  monkeypatch.setattr(coco2017, "free_bytes", lambda folder: peak - 1)
  line = exits(capfd, "coco", folder)
  assert f"{download.size_text(fetched)} to download" in line and f"{download.size_text(peak)} of disk" in line and not server.requests
  assert not folder.parent.exists()
  monkeypatch.setattr(coco2017, "free_bytes", lambda folder: peak)
  get_coco(folder)
  assert files(folder) == finished()


FULL = """import resource, sys
from tinydet.datasets import coco2017
from tinydet.datasets.coco2017 import Archive
from tinydet.datasets.download import main
from tinydet.errors import exit_on_user_error
coco2017.BASE, coco2017.ANNOTATIONS, coco2017.PICTURES = eval(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
with exit_on_user_error(): main(["coco", sys.argv[1]])"""


@pytest.mark.parametrize("limit, words", [(1000, "cannot write"), (100_000, "cannot unpack")])
def test_a_disk_that_fills_up(server, folder, limit, words):
  tables = repr((coco2017.BASE, coco2017.ANNOTATIONS, coco2017.PICTURES))
  process = subprocess.run([sys.executable, "-c", FULL, str(folder), tables, str(limit)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                           check=False, capture_output=True, text=True)
  assert process.returncode == 2 and "File too large" in process.stderr.splitlines()[-1] and words in process.stderr.splitlines()[-1]
  assert not (folder/"annotations").exists() or not list((folder/"annotations").iterdir())
  get_coco(folder)
  assert files(folder) == finished()


def test_a_subset_is_the_first_pictures_and_grows_to_the_whole(server, folder):
  get_coco(folder, subset=2)
  assert server.asked() == {coco2017.ANNOTATIONS.name: 1} | {f"{s}2017/{i:012}.jpg": 1 for s in COUNTS for i in (9, 13)}
  for split in COUNTS:
    data, truth = open_dataset(folder, split), instances(split)
    assert data.image_ids.tolist() == [9, 13] and subset_of(folder/"annotations"/f"instances_{split}2017.json") == 2
    assert sorted(a["id"] for a in data.ground_truth()["annotations"]) == sorted(a["id"] for a in truth["annotations"] if a["image_id"] in (9, 13))
  requests = len(server.requests)
  get_coco(folder, subset=1)
  assert len(server.requests) == requests
  get_coco(folder, subset=3)
  assert [path for path, _ in server.requests[requests:]] == ["train2017/000000000017.jpg", "val2017/000000000017.jpg"]
  get_coco(folder)
  assert files(folder) == finished() and server.asked()[coco2017.ANNOTATIONS.name] == 1


def test_a_subset_whose_pictures_do_not_come_is_none(server, folder, capfd):
  del server.files[f"val2017/{9:012}.jpg"]
  assert "1 of 2 val pictures cannot be downloaded" in (line := exits(capfd, "coco", folder, "--subset", 2)) and "HTTP 404" in line
  assert not (folder/"annotations"/"instances_val2017.json").exists()


def test_names_become_folders(server, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert local_folder("shapes:2") == "shapes:2" and local_folder("some/folder") == "some/folder" and not server.requests
  assert local_folder("coco", str(tmp_path/"sets")) == str(tmp_path/"sets"/"coco") and files(tmp_path/"sets"/"coco") == finished()
  assert local_folder("coco", None, ("val",)) == str(tmp_path/"cache"/"tinydet"/"data"/"coco")
  assert files(tmp_path/"cache"/"tinydet"/"data"/"coco") == finished(("val",))
  os.mkdir("coco")
  assert local_folder("coco") == "coco"   # a folder of that name is meant
  monkeypatch.setenv("TINYDET_DATA_DIR", str(tmp_path/"mine"))
  main(["coco"])
  assert files(tmp_path/"mine"/"coco") == finished()


def test_the_check_takes_names_and_downloads_nothing(server, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for argv, folder in (["coco"], "cache/tinydet/data/coco"), (["openimages-mlperf", "--data-dir", "my sets"], "my sets/openimages-mlperf"):
    with pytest.raises(UserError) as error: check.main(argv)
    place = str(tmp_path/folder) if argv == ["coco"] else folder
    assert str(error.value) == f"{argv[0]}: {place} is not there; python -m tinydet.datasets.download {shlex.join([argv[0], place])} downloads it"
  assert not server.requests and not list(tmp_path.iterdir())
  monkeypatch.setenv("TINYDET_DATA_DIR", "sets")
  main(["coco"])
  requests = len(server.requests)
  check.main(["coco"])
  assert "sets/coco, train\n7 pictures, 7 boxes" in (out := capsys.readouterr().out) and "sets/coco, val\n4 pictures" in out and "A run would" in out
  shutil.rmtree(tmp_path/"sets"/"coco"/"train2017")
  check.main(["coco", "--split", "val"])
  with pytest.raises(UserError, match=r"instances_train2017\.json: no folder with its images"): check.main(["coco"])
  assert len(server.requests) == requests


@pytest.mark.parametrize("program, name", [("train_retinanet", "coco"), ("train_retinanet", "openimages-mlperf"), ("evaluate", "coco"),
                                           ("detect", "coco"), ("explain", "coco")])
def test_programs_download_what_they_are_asked_to_use(tmp_path, program, name):
  settings = {"PYTHONPATH": str(ROOT), "TINYDET_MIRROR": str(tmp_path), "TINYDET_DATA_DIR": str(tmp_path/"sets")}
  command = [sys.executable, ROOT/"examples"/f"{program}.py", "--data", name]
  process = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True,
                           env=os.environ | settings)
  lines = process.stderr.strip().splitlines()
  assert process.returncode == 2 and lines[-1].startswith("error: ") and not list(tmp_path.iterdir())
  roomless = f"error: {name}: " in lines[-1] and f" to download into {tmp_path}/sets/{name}, " in lines[-1]   # on a small disk
  assert roomless or f"put it into {tmp_path}/sets/{name}/downloads/" in lines[-1]


@pytest.mark.parametrize("argv", [["imagenet"], ["coco", "x", "--subset", "0"], ["coco", "x", "--workers", "many"], []])
def test_flags_in_no_clear_form(server, argv, capfd, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as end: main(argv)
  assert end.value.code == 2 and not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be(server, tmp_path, capfd):
  (tmp_path/"taken").write_text("")
  for name, folder in (("coco", "taken"), ("coco", "taken/coco"), ("openimages-mlperf", "taken/x")):
    assert "Not a directory" in exits(capfd, name, tmp_path/folder) and not server.requests
