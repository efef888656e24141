"""MLPerf's subset of Open Images V6, fetched and converted into a folder that `Coco` reads.

The choice and the conversion are those of mlcommons/training's single_stage_detector/scripts (fiftyone_openimages.py, and FiftyOne under it): a
picture counts if it has a box of one of the classes, with their boxes alone; depictions and occluded or truncated objects count as any; boxes are
fractions of the stored pixels; the category id is the position of the name in the list; `IsGroupOf` (yes or unknown) becomes `iscrowd`; the area is
the box's. Image ids are the position in the order of the pictures' names, from 1. Coordinates are written to a thousandth of a pixel."""
import contextlib, csv, json, os, tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
import numpy as np
from tinydet.class_names import MLPERF
from tinydet.datasets.image import jpeg_size
from tinydet.datasets.problems import reason
from tinydet.datasets.subset import subset_of
from tinydet.download import alone, fetch, fetch_many, free_bytes, progress, size_text, write_whole
from tinydet.errors import UserError

TABLES = "https://storage.googleapis.com/openimages/"
BUCKET = "https://open-images-dataset.s3.amazonaws.com/"
CLASSES = "class-descriptions-boxable.csv"   # in v5/; no checksum of it is published: all 264 names must be in it
PICTURE = 316_000   # bytes on average: 352 GiB for 1,195,082 pictures (mlcommons/training, single_stage_detector/ssd/README.md)
COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
BOX = np.dtype([("image", "u8"), ("label", "u2"), ("group", "?"), ("corners", "f8", 4)])   # corners x0, x1, y0, y1 in [0,1]
PORTION = 100_000   # boxes or pictures at once
GONE = ("HTTP 403", "HTTP 404", "HTTP 410")   # how the bucket says that it has no such picture


@dataclass(frozen=True)
class Split:
  """A published table of boxes, and what there should be of the subset. Its MD5 are stated by two public repositories each, its size by several."""
  source: str     # its name in Open Images
  table: str      # below `TABLES`
  checksum: str   # as `fetch` takes it
  size: int       # bytes
  pictures: int   # with a box of the 264 classes, from the README mentioned


SPLITS = {"train": Split("train", "v6/oidv6-train-annotations-bbox.csv", "md5:3c3e70cfaba5757ea5c2604b19cac3b2", 2_258_447_590, 1_170_301),
          "val": Split("validation", "v5/validation-annotations-bbox.csv", "md5:c5e8200df129ea6867e913e8b21fcab9", 25_105_048, 24_781)}


def get_openimages(folder: Path, splits: Sequence[str] = ("train", "val"), subset: int = 0, workers: int = 32) -> None:
  """Complete `folder` to the `splits` of the subset: `annotations/instances_{train,val}.json`, `train/`, `val/`; tables stay in `downloads`.

  `subset` takes the first so many pictures of each in the order of their names; `workers` threads fetch. A split whose annotations are there is
  complete. Pictures that the bucket has no more are left out, said, and listed in `missing-<split>.txt`; UserError where they are more than one in a
  hundred, where others did not come, or there is too little room. What came stays, and the next call goes on from there."""
  def wanted() -> list[str]:
    have = {s: subset_of(folder/"annotations"/f"instances_{s}.json") for s in sorted(splits, key=lambda s: SPLITS[s].pictures)}
    return [s for s, count in have.items() if count is None or (0 < count and not 0 < subset <= count)]
  if not wanted(): return
  with alone(folder, "openimages-mlperf"):
    _check_room(folder, wanted(), subset)
    for split in wanted(): _get_split(folder, split, subset, workers)


def _get_split(folder: Path, split: str, subset: int, workers: int) -> None:
  about, downloads, pictures = SPLITS[split], folder/"downloads", folder/split
  table = fetch(TABLES + about.table, about.checksum, downloads)
  labels = _classes(downloads)
  try:
    for part in (pictures, folder/"annotations"): part.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=downloads) as boxes:
      images = read_boxes(table, labels, boxes)
      if len(images) != about.pictures:
        print(f"note: {table} has boxes of MLPerf's classes on {len(images):,} pictures; MLPerf's reference counts {about.pictures:,}", flush=True)
      images = images[:subset or None]
      sizes = _read_sizes(pictures, images, workers)
      missing = _get_pictures(folder, split, images, sizes, workers)
      if hasattr(os, "sync"): os.sync()   # where there are annotations, the pictures are on the disk
      info = {"subset": subset, "description": f"Open Images V6, {about.source}, MLPerf's 264 classes", "missing": missing}
      count = write_instances(folder/"annotations"/f"instances_{split}.json", info, images, sizes, boxes)
  except OSError as e: raise UserError(f"cannot write into {folder}: {e.strerror or e}; mend that and run it again, what came is kept") from e
  print(f"openimages-mlperf, {split}: {len(images) - missing:,} pictures, {count:,} boxes of {len(labels)} classes", flush=True)


def _check_room(folder: Path, splits: list[str], subset: int) -> None:
  """Say what is ahead; UserError where the disk has no room for it."""
  count = tables = room = 0
  for about, name in ((SPLITS[s], s) for s in splits):
    count += max(0, (min(subset, about.pictures) if subset else about.pictures) - len(_present(folder/name)))
    here = sum(p.stat().st_size for p in (folder/"downloads").glob(f"{Path(about.table).name}*"))
    tables += max(0, about.size - here)
    room += about.size   # boxes on their way, and the annotations
  room += count * PICTURE + tables
  need = f"{count:,} pictures (about {size_text(count * PICTURE)}) and {size_text(tables)} of tables to download into {folder}"
  if room > (free := free_bytes(folder)):
    raise UserError(f"openimages-mlperf: {need}, {size_text(room)} with the annotations, where {size_text(free)} are free: make room there, or "
                    "choose another folder")
  print(f"openimages-mlperf: {need}; {size_text(free)} are free", flush=True)


def _classes(downloads: Path) -> dict[str, int]:
  path = downloads/CLASSES
  if not path.exists() and (failures := fetch_many(CLASSES, f"{TABLES}v5/", [(CLASSES, path)], 1, 1, lambda _, data: read_classes(data))):
    raise UserError(f"{CLASSES} cannot be downloaded, {' '.join(failures[0])}: fetch it elsewhere and put it into {downloads}{os.sep}, or name a "
                    "mirror in TINYDET_MIRROR")
  try: return read_classes(path.read_bytes())
  except ValueError as e: raise UserError(f"{path}: {e}; remove it to have it fetched again") from e


def read_classes(data: bytes) -> dict[str, int]:
  """Open Images' name of each of the 264 classes, such as /m/011k07 -> its label, from the table of (name, name in English); ValueError."""
  rows = [row for row in csv.reader(data.decode("utf-8-sig").splitlines()) if len(row) == 2]
  label = {name: i for i, name in enumerate(MLPERF)}
  found = {row[0]: label[row[1]] for row in rows if row[1] in label}
  if sorted(found.values()) != list(label.values()):
    lacking = [name for name in MLPERF if label[name] not in found.values()]
    raise ValueError(f"has {len(found)} of MLPerf's {len(MLPERF)} classes" + f", not {', '.join(lacking[:3])}" * bool(lacking))
  return found


def read_boxes(table: Path, labels: dict[str, int], boxes: BinaryIO) -> np.ndarray:
  """The boxes in a table that are of `labels`, written to `boxes` as `BOX` in the order of their images; returns the images, u8 [N], sorted.

  The table is read in portions, so that its size does not matter. UserError names the line that is none."""
  kept, images, ordered, last = [], [np.zeros(0, np.uint64)], True, 0

  def flush() -> None:
    nonlocal ordered, last
    portion = np.array(kept, BOX)
    x0, x1, y0, y1 = portion["corners"].T
    if not ((x0 >= 0) & (x0 <= x1) & (x1 <= 1) & (y0 >= 0) & (y0 <= y1) & (y1 <= 1)).all(): raise ValueError("a box is not within 0 and 1")
    ordered = ordered and portion["image"][0] >= last and bool((portion["image"][1:] >= portion["image"][:-1]).all())
    last = portion["image"][-1]
    images.append(np.unique(portion["image"]))
    portion.tofile(boxes)
    kept.clear()
    show(file.buffer.tell())

  with open(table, newline="", encoding="utf-8") as file, progress(f"reading {table.name}", 0, table.stat().st_size) as show:
    reader = csv.reader(file)
    try:
      image, label, x0, x1, y0, y1, group = map(next(reader, []).index, COLUMNS)
      for row in reader:
        if (number := labels.get(row[label])) is None: continue
        kept.append((int(row[image], 16), number, row[group] != "0", (float(row[x0]), float(row[x1]), float(row[y0]), float(row[y1]))))
        if len(kept) == PORTION: flush()
      if kept: flush()
    except (ValueError, IndexError, OverflowError, csv.Error) as e:
      raise UserError(f"{table}: is no table of boxes ({reason(e)}, at line {reader.line_num:,} or before)") from e
  if not ordered: _sort(boxes)
  return np.unique(np.concatenate(images))


def _sort(boxes: BinaryIO) -> None:
  """Bring boxes into the order of their images, those of one image as they were; in memory, for the large table is sorted as it comes."""
  boxes.seek(0)
  rows = np.fromfile(boxes, BOX)
  boxes.seek(0)
  rows[np.argsort(rows["image"], kind="stable")].tofile(boxes)


def _portions(count: int) -> Iterator[slice]:
  return (slice(i, i + PORTION) for i in range(0, count, PORTION))


def _present(pictures: Path) -> np.ndarray:
  """The pictures that are in a folder, u8 [N], sorted; what a killed process left half-written is removed."""
  def numbers() -> Iterator[int]:
    for entry in os.scandir(pictures):
      stem, suffix = os.path.splitext(entry.name)
      if suffix == ".partial": os.unlink(entry.path)
      with contextlib.suppress(ValueError):
        if suffix == ".jpg" and len(stem) == 16: yield int(stem, 16)
  try: return np.sort(np.fromiter(numbers(), np.uint64))
  except FileNotFoundError: return np.zeros(0, np.uint64)


def _read_sizes(pictures: Path, images: np.ndarray, workers: int) -> np.ndarray:
  """(height, width) of the pictures, i4 [N,2]; 0 for one that is not there or is broken."""
  sizes = np.zeros((len(images), 2), np.int32)
  def read(image: int) -> tuple[int, int]:
    try: return jpeg_size(pictures/_file_name(image))
    except ValueError: return 0, 0
  here = np.flatnonzero(np.isin(images, _present(pictures)))
  with ThreadPoolExecutor(min(workers, 8)) as pool:
    for part in _portions(len(here)): sizes[here[part]] = list(pool.map(read, images[here[part]].tolist()))
  return sizes


def _get_pictures(folder: Path, split: str, images: np.ndarray, sizes: np.ndarray, workers: int) -> int:
  """Fetch the pictures whose size is 0, and fill that in; how many the bucket does not have."""
  source, wanted = SPLITS[split].source, np.flatnonzero(sizes[:, 0] == 0)
  if not len(wanted): return 0
  jobs = ((f"{source}/{_file_name(i)}", folder/split/_file_name(i)) for i in map(int, images[wanted]))
  def accept(path: Path, data: bytes) -> None: sizes[np.searchsorted(images, np.uint64(int(path.stem, 16)))] = jpeg_size(data)
  failures = fetch_many(f"{split} pictures", BUCKET, jobs, len(wanted), workers, accept)
  listed = folder/f"missing-{split}.txt"
  listed.unlink(missing_ok=True)
  if failures: write_whole(listed, "".join(f"{url} {why}\n" for url, why in failures).encode())
  gone = sum(why.startswith(GONE) for _, why in failures)
  if failures:
    text = f"{len(failures):,} of {len(images):,} {split} pictures cannot be downloaded, all listed in {listed}, the first {' '.join(failures[0])}"
    if gone < len(failures) or gone * 100 > len(images): raise UserError(f"openimages-mlperf: {text}: run it again, what came is kept")
    print(f"note: {text}; they are left out", flush=True)
  return gone


def write_instances(path: Path, info: dict, images: np.ndarray, sizes: np.ndarray, boxes: BinaryIO) -> int:
  """Write a COCO instances file of `images` (u8 [N], sorted; `sizes` i4 [N,2] height, width, 0: left out) and their `boxes`; how many these are.

  `boxes` are `BOX`es in the order of their images. The file appears whole, and nothing larger than a portion of it is held in memory."""
  partial, number = path.with_name(f".{path.name}.partial"), 0
  categories = [{"id": i, "name": name} for i, name in enumerate(MLPERF)]
  try:
    with open(partial, "w", encoding="utf-8") as f:
      f.write(f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n"images": [')
      ids, between = np.flatnonzero(sizes[:, 0]), "\n"
      for part in _portions(len(ids)):
        rows = zip((ids[part] + 1).tolist(), images[ids[part]].tolist(), *sizes[ids[part]].T.tolist())
        f.write(between + ",\n".join([f'{{"id": {i}, "file_name": "{_file_name(n)}", "height": {h}, "width": {w}}}' for i, n, h, w in rows]))
        between = ",\n"
      f.write('],\n"annotations": [')
      boxes.seek(0)
      between = "\n"
      while len(rows := np.frombuffer(boxes.read(PORTION * BOX.itemsize), BOX)):
        at = np.searchsorted(images, rows["image"])
        if at[0] == len(images): break   # a subset ends here
        at = at.clip(max=len(images) - 1)
        kept = (images[at] == rows["image"]) & (sizes[at, 0] > 0)
        rows, at = rows[kept], at[kept]
        if not len(rows): continue
        x0, x1, y0, y1 = rows["corners"].T
        height, width = sizes[at].T
        box = np.stack([x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height])
        columns = np.arange(number + 1, number + len(rows) + 1), at + 1, rows["label"], *box, box[2] * box[3], rows["group"].view("u1")
        f.write(between + ",\n".join([f'{{"id": {n}, "image_id": {i}, "category_id": {k}, "bbox": [{x:.3f}, {y:.3f}, {w:.3f}, {h:.3f}], '
                                      f'"area": {area:.3f}, "iscrowd": {group}}}'
                                      for n, i, k, x, y, w, h, area, group in zip(*(column.tolist() for column in columns))]))
        between, number = ",\n", number + len(rows)
      f.write("]}\n")
    os.replace(partial, path)
  finally: partial.unlink(missing_ok=True)
  return number


def _file_name(image: int) -> str: return f"{image:016x}.jpg"
