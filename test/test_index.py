"""Large annotation files: read in portions as they would be in one go, kept, and never used when they are not what they were."""
import json, os, pickle, random, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinydet.datasets import coco, index, json_rows, open_dataset
from tinydet.datasets.coco import Coco
from tinydet.datasets.loader import Loader
from tinydet.datasets.transforms import resize
from tinydet.errors import UserError

ROOT = Path(__file__).parents[1]
KEYS = ["images", "annotations", "categories", "more"]
ARRAYS = [key for key, kind in Coco.__annotations__.items() if kind is np.ndarray]


# ------------------------------------------------------------------------------------------------------------------------- JSON in portions


def document() -> dict:
  """Objects in objects, brackets in texts, numbers and characters of all kinds, in lists of which some are not of objects."""
  return {"info": {"é": "x\ud83d\ude00", "d": {"e": [{}]}},
          "images": [{"id": i, "name": "ab\"é\\" * i, "n": [1.5, -2e-7, float("nan"), float("-inf"), 10 ** 30]} for i in range(9)],
          "annotations": [{"id": i, "parts": [{"x": {"a": 1}}, {"y": "}, {"}, {}]} for i in range(9)], "more": [{}, {"z": []}], "n": 12345,
          "categories": [[1], 2, "x", None, True], "m": -1}


def outcome(read, path) -> dict | str:
  """What the reader gives, or "broken"."""
  found: dict = {}
  try:
    for key, value in read(path, KEYS): found[key] = found.get(key, []) + value if isinstance(value, list) else value
  except (ValueError, RecursionError): return "broken"
  return found


@pytest.mark.parametrize(("block", "portion", "tail"), [(1, 1, 3), (17, 4, 40), (90, 2, 300), (400, 1, 60), (2 ** 20, 3, 2 ** 16)])
def test_portions_are_the_whole(block, portion, tail, tmp_path, monkeypatch):
  """Against json.loads, on a document and on the same with a character changed, left out, or all after it cut off."""
  for name, value in (("BLOCK", block), ("PORTION", portion), ("TAIL", tail)): monkeypatch.setattr(json_rows, name, value)
  rng, broken = random.Random(block), 0
  for indent in (None, 1):
    text = json.dumps(document(), indent=indent)
    for raw in (text.encode(), json.dumps(document(), indent=indent, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16").encode()):
      for trial in range(150):
        spoilt, at = bytearray(raw), rng.randrange(len(raw))
        if trial == 1: spoilt[:0] = b"\xef\xbb\xbf"
        elif trial % 3 == 1: spoilt[at] = rng.choice(b'{}[],:"\\ 0-ex')
        elif trial % 3 == 2: del spoilt[at]
        elif trial: del spoilt[at:]
        (path := tmp_path / "a.json").write_bytes(spoilt)
        whole, portions = outcome(json_rows.read_whole, path), outcome(json_rows.read_portions, path)
        if whole == {}: assert portions == "broken", "no object at all"
        elif whole == "broken" or portions == "broken": assert whole == portions, bytes(spoilt)
        else: assert repr(sorted(whole.items())) == repr(sorted(portions.items())), bytes(spoilt)
        broken += whole == "broken"
  assert 200 < broken < 550


def test_what_is_wrong_is_said_with_its_place(tmp_path, monkeypatch):
  monkeypatch.setattr(json_rows, "BLOCK", 64)
  good = json.dumps({"images": [{"id": i} for i in range(50)]})
  for bad, message in ((good.replace('"id": 31', '"id" 31'), f"Expecting ':' delimiter: character {good.index('31') - 1}"),
                       (good + "x", "Extra data: character"), (good[:-1] + ', "images": []}', "two fields of one name"),
                       (good[:-2] + ",]}", "Expecting value")):
    (tmp_path / "a.json").write_text(bad)
    with pytest.raises(ValueError) as error: list(json_rows.read_portions(tmp_path / "a.json", KEYS))
    assert message in str(error.value)
  raw = good.encode().replace(b'"id": 40', b'"id": "\xff"')
  (tmp_path / "a.json").write_bytes(raw)
  with pytest.raises(UnicodeDecodeError) as error: list(json_rows.read_portions(tmp_path / "a.json", KEYS))
  assert error.value.start == raw.index(b"\xff")


# ------------------------------------------------------------------------------------------------------------------------- data sets


def write(folder: Path, images: int = 20) -> tuple[Path, Path]:
  """A data set with oddities: names that are not ASCII, subfolders, a suffix in another case, crowds, boxes to clip and to drop, ids that repeat."""
  rng, rows, annotations = np.random.default_rng(0), [], []
  for i in range(images):
    name = ("", "deep/", "ünï/")[i % 3] + f"{i}.png"
    (path := folder / "pictures" / (name.replace(".png", ".PNG") if i == 4 else name)).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    rows.append({"id": 1000 - 7 * i, "file_name": name, "height": 30, "width": 40, "what": 1})
    for _ in range(i % 4):
      annotations.append({"id": len(annotations) or 9, "image_id": 1000 - 7 * i, "category_id": int(rng.choice([5, 2, 9])),
                          "bbox": [*rng.uniform(0, 38, 2).tolist(), *rng.uniform(0, 8, 2).round(0).tolist()], "area": rng.choice([3.5, -1]),
                          "iscrowd": int(rng.random() < 0.2)})
  content = {"images": rows, "annotations": annotations, "categories": [{"id": c, "name": f"class é {c}"} for c in (5, 2, 9)]}
  (folder / "instances.json").write_text(json.dumps(content))
  return folder / "instances.json", folder / "pictures"


@pytest.fixture
def large(monkeypatch, tmp_path):
  """Every annotation file is large now, and the cache a new one."""
  monkeypatch.setattr(coco, "LARGE", -1)
  monkeypatch.setattr(json_rows, "PORTION", 7)
  monkeypatch.setattr(json_rows, "BLOCK", 100)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "tinydet" / "annotations"


def assert_same(one: Coco, other: Coco) -> None:
  for key in ARRAYS:
    np.testing.assert_array_equal(getattr(one, key), getattr(other, key), err_msg=key)
    assert getattr(one, key).dtype == getattr(other, key).dtype, key
  assert {*vars(one)} == {*vars(other)} and len(one) == len(other)
  for key in ("category_ids", "class_names", "max_boxes", "file", "folder", "name", "warnings"): assert getattr(one, key) == getattr(other, key), key
  assert one.ground_truth() == other.ground_truth()
  for i in range(len(one)):
    (a, b) = (vars(d[i]) for d in (one, other))
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a) and one.image_name(i) == other.image_name(i)


def reads(monkeypatch) -> list:
  """Account of the files that are read."""
  calls, read = [], json_rows.read_portions
  monkeypatch.setattr(coco, "read_portions", lambda path, keys: (calls.append(path), read(path, keys))[1])
  return calls


def test_small_and_large_are_one(tmp_path, large, monkeypatch):
  place = write(tmp_path)
  with monkeypatch.context() as small:
    small.setattr(coco, "LARGE", 2 ** 26)
    expected = Coco(*place)
    assert not large.exists() and pickle.loads(pickle.dumps(expected)).ground_truth() == expected.ground_truth()
  kinds = ("fields that COCO does not have", "found in another spelling", "used more than once", "without area", "over the border", "area missing")
  assert all(any(kind in line for line in expected.warnings) for kind in kinds), expected.warnings
  calls = reads(monkeypatch)
  first, second = Coco(*place), Coco(*place)
  assert calls == [place[0]] and len(list(large.glob("*.index"))) == 1
  for dataset in (first, second, pickle.loads(pickle.dumps(second))): assert_same(dataset, expected)
  with pytest.raises(ValueError): second.boxes[0] = 0   # nobody writes into what others see
  with pytest.raises(UserError, match="without area"): Coco(*place, strict=True)


def test_a_worker_gets_no_copy(tmp_path, large):
  place = write(tmp_path)
  dataset = Coco(*place)
  assert dataset.__getstate__().keys().isdisjoint(ARRAYS) and len(pickle.dumps(dataset)) < 3000
  loaders = [Loader(dataset, 4, resize(16, 16), shuffle=True, workers=workers) for workers in (0, 2)]
  for one, other in zip(*(loader.epoch(0) for loader in loaders), strict=True):
    for key, values in vars(one).items(): np.testing.assert_array_equal(values, getattr(other, key), err_msg=key)
  loaders[1].close()


def other_text(file, pictures):
  """As long, and as old."""
  about = file.stat()
  file.write_text(file.read_text().replace('"width": 40', '"width": 39'))
  os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize(("change", "message"), [
  (other_text, "pictures of another size than annotated"), (lambda file, pictures: (pictures / "deep" / "7.png").unlink(), r"missing in .*7\.png"),
  (lambda file, pictures: (pictures / "0.png").rename(pictures / "zero.png"), r"missing in .*0\.png"),
  (lambda file, pictures: file.write_text("{"), "is not a JSON file")])
def test_what_has_changed_is_read_again(change, message, tmp_path, large):
  place = write(tmp_path)
  Coco(*place)
  change(*place)
  with pytest.raises(UserError, match=message): Coco(*place)


def test_a_new_picture_is_noticed(tmp_path, large):
  place = write(tmp_path)
  assert not any("does not list" in line for line in Coco(*place).warnings)
  (place[1] / "deep" / "new.png").write_bytes(b"")
  assert any("does not list (1): deep/new.png" in line for line in Coco(*place).warnings)


def test_what_is_kept_is_whole_or_not_used(tmp_path, large, monkeypatch):
  place = write(tmp_path)
  expected, calls = Coco(*place), reads(monkeypatch)
  (file,) = large.glob("*.index")
  whole, rng = file.read_bytes(), random.Random(0)
  spoilt = [whole[:n] for n in (0, 1, 40, 200, len(whole) - 1)] + [whole + b"\0", b"x" * len(whole)]
  for at in [3, 20, 43, 44, *(rng.randrange(len(whole)) for _ in range(20)), len(whole) - 1]:
    spoilt.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
  for i, content in enumerate(spoilt, 1):
    file.unlink()   # another file: what is mapped must not be cut
    file.write_bytes(content)
    dataset = Coco(*place)
    assert len(calls) == i and file.read_bytes() == whole, "read again, and mended"
    if i % 8 == 0: assert_same(dataset, expected)
  assert not [p.name for p in large.iterdir() if p.suffix not in (".index", ".lock")], "nothing half-written"


def test_a_cache_that_cannot_be_written(tmp_path, large, monkeypatch):
  place = write(tmp_path)
  expected = Coco(*place)
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  dataset = Coco(*place)
  assert "cannot be kept (Not a directory)" in dataset.warnings[-1] and dataset.warnings[:-1] == expected.warnings
  assert pickle.loads(pickle.dumps(dataset)).ground_truth() == expected.ground_truth()


def test_workers_that_start_later_find_what_has_gone(tmp_path, large):
  place = write(tmp_path)
  dataset, other = Coco(*place), write(tmp_path / "other", images=5)
  before = pickle.dumps(dataset)
  for file in large.iterdir(): file.unlink()
  with pytest.raises(UserError, match=r"\.index: is gone"): pickle.loads(before)
  assert_same(dataset, pickle.loads(pickle.dumps(dataset)))
  (kept,) = large.glob("*.index")
  kept.unlink()
  kept.write_bytes(Coco(*other)._kept[0].read_bytes())
  assert_same(dataset, pickle.loads(pickle.dumps(dataset)))


def test_what_nobody_opens_is_removed(tmp_path, large):
  place = write(tmp_path)
  Coco(*place)
  (old,) = large.glob("*.index")
  for age, left in ((0.9, True), (1.1, False)):
    os.utime(old, (time.time() - age * index.UNUSED,) * 2)
    os.utime(place[0])   # another file, as far as can be told
    Coco(*place)
    assert old.exists() == left
  assert len(list(large.glob("*.index"))) == 2


def test_two_processes_at_once(tmp_path, large):
  place = write(tmp_path)
  program = ("import sys, hashlib; from tinydet.datasets import coco; coco.LARGE = -1; d = coco.Coco(*sys.argv[1:]);"
             "print(hashlib.sha256(d.boxes.tobytes() + d.names.tobytes()).hexdigest(), d._kept[1])")
  started = [subprocess.Popen([sys.executable, "-c", program, *map(str, place)], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
  outputs = [p.communicate(timeout=120) for p in started]
  assert len({out for out, _ in outputs}) == 1 and outputs[0][0], outputs
  assert sum(err.count("reading ") for _, err in outputs) == 1, "the others wait, or come later"
  assert len(list(large.glob("*.index"))) == 1


def test_a_folder_as_a_user_names_it(tmp_path, large, monkeypatch):
  """Messages name the folder as this user does, whoever read it first."""
  place = write(tmp_path / "data")
  (tmp_path / "data" / "annotations").mkdir()
  place[0].rename(tmp_path / "data" / "annotations" / "instances_train.json")
  place[1].rename(tmp_path / "data" / "train")
  open_dataset(tmp_path / "data", "train")
  calls = reads(monkeypatch)
  monkeypatch.chdir(tmp_path)
  dataset = open_dataset("data", "train")
  assert calls == [] and all(line.startswith("data/annotations/instances_train.json: ") for line in dataset.warnings) and dataset.warnings
  assert dataset.image_name(0) == "data/train/0.png"
