"""Data sets in the form of COCO: one `instances_*.json` and a folder of images (https://cocodataset.org/#format-data)."""
import gc, math, os, reprlib, sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
import numpy as np
from tinydet.cache import cache_folder
from tinydet.datasets import index
from tinydet.datasets.find_pictures import find_pictures, is_picture
from tinydet.datasets.image import check_headers, read_image
from tinydet.datasets.json_rows import read_portions, read_whole
from tinydet.datasets.outlines import around_points, around_turned, iou
from tinydet.datasets.problems import Problems, check_boxes, check_class_names, reason, shown
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import resized_boxes
from tinydet.errors import UserError

FARTHEST = 1e6   # pixels; no coordinate of a real box is larger
INT32, INT64 = 2 ** 31 - 1, 2 ** 63 - 1
NO_ID = -INT64 - 1
STAND_IN = [0, 0, 1, 1]   # for a box that was reported, so that the others can be judged
KNOWN_FIELDS = {
  "images": {"id", "width", "height", "file_name", "license", "flickr_url", "coco_url", "date_captured",
             "neg_category_ids", "not_exhaustive_category_ids"},   # LVIS
  "annotations": {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints", "num_keypoints"},
  "categories": {"id", "name", "supercategory", "keypoints", "skeleton",
                 "synset", "synonyms", "def", "image_count", "instance_count", "frequency"}}   # LVIS
LARGE = 2 ** 26   # bytes: a larger annotation file is read in portions, and what was read is kept
OUTLINES = 2_000  # of a portion of annotations: so many polygons are held against their boxes
AGREE = 0.5       # IoU of a box with that around its polygon, below which they are of two things
VERSION = 3       # of the arrays and the checks behind them: to be raised where either changes

Arrays = dict[str, np.ndarray]


class Coco:
  """The images of one annotation file; all of them, also those without objects. Labels follow the order of the category ids, gaps or not.

  Crowd regions are kept out of the samples and in `ground_truth`. Boxes of the samples are clipped to the image; `ground_truth` keeps them as they
  are in the file, so that a score is the one of the official evaluation. Boxes without area are in neither. `warnings` counts such oddities.
  Raises UserError with all that cannot be mended, and with `strict` all oddities too.

  What came of an annotation file larger than LARGE, once checked, is kept in the user's cache folder: the next process, and each loader worker, maps
  it into memory. It serves as long as size and times of the file, and times of the image folders, in which files come and go, are what they were.
  """
  # I images, N boxes, those of one image together:
  image_ids: np.ndarray        # i64 [I]
  sizes: np.ndarray            # i32 [I,2] (height, width)
  names: np.ndarray            # u8, the file names as UTF-8
  name_offsets: np.ndarray     # i64 [I+1], where each begins
  offsets: np.ndarray          # i64 [I+1], where the boxes of each image begin
  boxes: np.ndarray            # f64 [N,4] xywh pixels
  labels: np.ndarray           # i32 [N]
  crowd: np.ndarray            # bool [N]
  areas: np.ndarray            # f64 [N] square pixels
  annotation_ids: np.ndarray   # i64 [N]
  category_ids: list[int]
  class_names: list[str]
  max_boxes: int
  upright: bool | None         # whether boxes are of upright pictures (see `check_headers`)
  warnings: list[str]

  def __init__(self, annotation_file: str | Path, image_folder: str | Path, strict: bool = False, roots: Sequence[str | Path] = (),
               split: str = ""):
    """Pictures that are not in `image_folder` are looked for in it and below `roots`, and not among those of other splits (see `find_pictures`)."""
    self.file, self.folder = Path(annotation_file), Path(image_folder)
    self.split, self.roots = split, [self.folder, *map(Path, roots)]
    self.name = self.file.stem
    self._kept: tuple[Path, str] | None = None   # file of the cache that the arrays lie in, and its digest
    try: large = os.path.getsize(self.file) > LARGE
    except (OSError, ValueError): large = False  # _read says what is wrong
    arrays, about = self._recall_or_read(strict) if large else self._read(read_whole, strict)
    vars(self).update(arrays | about | {"warnings": [f"{self.file}: {line}" for line in about["warnings"]]})

  def __len__(self) -> int: return len(self.image_ids)

  def file_name(self, index: int) -> str: return self.names[slice(*self.name_offsets[index:index + 2])].tobytes().decode("utf-8", "surrogatepass")

  def image_name(self, index: int) -> str: return os.path.join(self.folder, self.file_name(index))

  def object_counts(self) -> np.ndarray:
    """i64 [I]: how many objects each picture has that are to be learnt."""
    return np.diff(np.concatenate([[0], np.cumsum(~self.crowd)])[self.offsets])

  def __getitem__(self, index: int) -> Sample: return self._sample(index, None)

  def resized(self, index: int, size: tuple[int, int]) -> Sample:
    """As `transforms.resize(*size)` makes of `self[index]`, but for what `read_image` says of large JPEGs."""
    return self._sample(index, size)

  def _sample(self, index: int, resized: tuple[int, int] | None) -> Sample:
    height, width = (int(x) for x in self.sizes[index])
    mine = slice(*self.offsets[index:index + 2])
    objects = ~self.crowd[mine]
    image = read_image(self.image_name(index), (height, width), f"{self.file}: images[].width/height of id {self.image_ids[index]}",
                       resized, self.upright is not False)
    corners = np.concatenate([self.boxes[mine, :2], self.boxes[mine, :2] + self.boxes[mine, 2:]], 1)[objects]
    boxes = corners.clip(0, [width, height] * 2).astype(np.float32)
    if resized: boxes = resized_boxes(boxes, (height, width), resized)
    return Sample(image, boxes, self.labels[mine][objects], int(self.image_ids[index]), (height, width), resized or (height, width))

  def __getstate__(self) -> dict[str, Any]:
    """Without the arrays where they can be mapped by others, too."""
    if self._kept is None: return self.__dict__
    path, digest = self._kept
    arrays = {key: value for key, value in self.__dict__.items() if isinstance(value, np.ndarray)}
    if index.read(path, digest) is None:   # another process has removed or replaced the file since
      path = path.with_name(f"{digest[:24]}.index")
      try: digest = index.write(path, arrays, {})
      except OSError: return self.__dict__ | {"_kept": None}
    return {key: value for key, value in self.__dict__.items() if key not in arrays} | {"_kept": (path, digest)}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__ = state
    if self._kept is None: return
    if (found := index.read(*self._kept)) is None: raise UserError(f"{self._kept[0]}: is gone, with what was read from {self.file}; start again")
    vars(self).update(found[0])

  def ground_truth(self) -> dict[str, Any]:
    """The annotations in the form of a COCO instances file: boxes as in the file, crowds with iscrowd 1, no segmentations."""
    images = [{"id": i, "file_name": self.file_name(row), "height": h, "width": w}
              for row, (i, (h, w)) in enumerate(zip(self.image_ids.tolist(), self.sizes.tolist()))]
    owners = np.repeat(self.image_ids, np.diff(self.offsets)).tolist()
    ids = np.array(self.category_ids)[self.labels].tolist()
    columns = zip(self.annotation_ids.tolist(), owners, ids, self.boxes.tolist(), self.areas.tolist(), self.crowd.tolist())
    annotations = [{"id": a, "image_id": i, "category_id": c, "bbox": b, "area": s, "iscrowd": int(crowd)} for a, i, c, b, s, crowd in columns]
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names)]}

  def _recall_or_read(self, strict: bool) -> tuple[Arrays, dict[str, Any]]:
    """What `_read` returns: from the cache if it is there, else it is read and kept."""
    try: folder = cache_folder("annotations")
    except RuntimeError as e: return self._not_kept(*self._read(read_portions, strict), e)   # a user without a home
    def now() -> list[int]: return [(about := os.stat(self.file)).st_size, about.st_mtime_ns, about.st_ctime_ns]
    before = now()
    path = folder/f"{index.digest_of(VERSION, os.path.realpath(self.file), os.path.realpath(self.folder), before, strict)}.index"
    def recall() -> tuple[Arrays, dict[str, Any]] | None:
      if (found := index.read(path)) is None or any(self._changed(sub) != time for sub, time in found[1]["_folders"].items()): return None
      self._kept = path, found[2]
      return found[:2]
    if (found := recall()) is not None: return found
    with index.one_at_a_time(path):
      if (found := recall()) is not None: return found   # another process was faster
      print(f"reading {self.file}, {before[0] / 1e9:.1f} GB; what comes of it is kept in {folder}", file=sys.stderr)
      arrays, about = self._read(read_portions, strict)
      if now() == before:
        try: index.write(path, arrays, about)
        except OSError as e: return self._not_kept(arrays, about, e)
      return recall() or (arrays, about)

  def _not_kept(self, arrays: Arrays, about: dict[str, Any], error: Exception) -> tuple[Arrays, dict[str, Any]]:
    line = f"what was read cannot be kept ({reason(error)}): each start reads the file anew, and each worker has a copy in memory"
    return arrays, about | {"warnings": [*about["warnings"], line]}

  def _changed(self, folder: str) -> int | None:
    """When a file last came into or went from a folder of pictures."""
    try: return os.stat(self.folder/folder).st_mtime_ns
    except OSError: return None

  def _read(self, rows_of: Callable, strict: bool) -> tuple[Arrays, dict[str, Any]]:
    """Read and check everything: arrays, and the other attributes as JSON values."""
    problems, columns = Problems(self.file, strict), {table: Problems(self.file, strict) for table in KNOWN_FIELDS}
    portions: dict[str, list[dict[str, Any]]] = {}
    unknown: dict[str, set[str]] = {table: set() for table in KNOWN_FIELDS}
    collecting, first = gc.isenabled(), dict.fromkeys(KNOWN_FIELDS, 0)
    gc.disable()   # looking for garbage among millions of new objects takes a third of the time
    try:
      for table, rows in rows_of(self.file, list(COLUMNS)):
        if not isinstance(rows, list): continue
        at = next((i for i, row in enumerate(rows, first[table]) if type(row) is not dict), None)
        if at is not None: raise UserError(f"{self.file}: {table}[{at}] is {_repr(rows[at - first[table]])}, not an object with fields")
        unknown[table].update(set().union(*rows) - KNOWN_FIELDS[table])
        portions.setdefault(table, []).append(COLUMNS[table](columns[table], rows, first[table]))
        first[table] += len(rows)
    except OSError as e: raise UserError(f"{self.file}: cannot be opened ({e.strerror})") from e
    except (ValueError, RecursionError) as e: raise UserError(f"{self.file}: is not a JSON file that can be read ({reason(e)})") from e
    finally:
      if collecting: gc.enable()
    for table in KNOWN_FIELDS:
      if table not in portions: raise UserError(f"{self.file}: has no list '{table}'; a COCO instances file has images, annotations and categories")
    for table in ("images", "categories"):
      if not first[table]: raise UserError(f"{self.file}: the list '{table}' is empty")
    for table, keys in unknown.items():
      problems.odd("fields that COCO does not have, passed over", [f"{table}[].{key}" for key in sorted(keys)], shown)

    tables = {table: {key: np.concatenate([portion[key] for portion in parts]) for key in parts[0]} for table, parts in portions.items()}
    del portions
    names, ids = tables["categories"]["name"].tolist(), tables["categories"]["id"]
    problems.take(columns["categories"])
    problems.error("categories[].id used more than once", _repeated_ids(ids))
    check_class_names(problems, names)
    problems.error("class names used more than once", _repeated(names), shown)
    about = {"category_ids": np.sort(ids).tolist(), "class_names": [names[i] for i in np.argsort(ids)]}
    problems.take(columns["images"])
    images, file_names = self._check_images(problems, about, **tables.pop("images"))
    arrays = images | self._check_annotations(problems, columns["annotations"], about, images["image_ids"], images["sizes"], file_names,
                                              **tables.pop("annotations"))
    prefix = f"{self.file}: "
    return arrays, about | {"warnings": [line.removeprefix(prefix) for line in problems.finish()]}

  def _check_images(self, problems: Problems, about: dict[str, Any], id: np.ndarray, height: np.ndarray, width: np.ndarray,
                    file_name: np.ndarray) -> tuple[Arrays, list[str | None]]:
    problems.error("images[].id used more than once", _repeated_ids(id))
    sizes, names = np.stack([height, width], 1), file_name.tolist()
    try: found, unused = find_pictures(problems, self.folder, names, self.roots, "images[].file_name", self.split)
    except OSError as e: raise UserError(f"{self.folder}: the image folder of {self.file} cannot be opened ({e.strerror})") from e
    known = [i for i, file in enumerate(found) if file is not None]
    about["_folders"] = {sub: self._changed(sub) for sub in sorted({"", *(os.path.dirname(found[i]) for i in known)})}
    problems.error("files that images[].file_name names more than once", _repeated([os.path.normpath(found[i]) for i in known]), shown)
    problems.note("pictures in the image folder that images[] does not list", [n for n in unused if is_picture(n)], shown)
    names = [file or name for file, name in zip(found, names)]
    there = [i for i in known if sizes[i].max() < INT32]
    about["upright"] = check_headers(problems, self.folder, [names[i] for i in there], sizes[there].tolist())
    encoded = [str(name).encode("utf-8", "surrogatepass") for name in names]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {"image_ids": id, "sizes": sizes, "names": np.frombuffer(b"".join(encoded), np.uint8), "name_offsets": offsets}, names

  def _check_annotations(self, problems: Problems, columns: Problems, about: dict[str, Any], image_ids: np.ndarray, sizes: np.ndarray,
                         file_names: list[str | None], id: np.ndarray, image_id: np.ndarray, category_id: np.ndarray, bbox: np.ndarray,
                         area: np.ndarray, iscrowd: np.ndarray, outline: np.ndarray) -> Arrays:
    def name(i: int) -> str: return f"annotation id {id[i]}"
    table, ids = "annotations[]", id
    if len(again := _repeated_ids(ids)):
      problems.odd(f"{table}.id used more than once, all renumbered", again)
      ids = np.arange(1, len(ids) + 1)
    owners = {}
    for key, values, known in (("image_id", image_id, image_ids), ("category_id", category_id, np.array(about["category_ids"]))):
      unknown = ~np.isin(values, known)
      if (known >= 0).all():   # else ids in the lists were reported themselves
        problems.error(f"{table}.{key} not in the file's lists", np.flatnonzero(unknown & (values != NO_ID)),
                       lambda i, v=values: f"annotations[{i}] says {v[i]}")
      owners[key] = np.where(unknown, known[0], values)
    problems.take(columns)
    row_of = np.argsort(image_ids)
    images = row_of[np.searchsorted(image_ids, owners["image_id"], sorter=row_of)]
    labels = np.searchsorted(about["category_ids"], owners["category_id"]).astype(np.int32)

    corners = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], 1)
    over = (corners[:, 2:] > sizes[images][:, ::-1] + 1).any(1)
    if len(bbox) and corners.max() <= 1 and (bbox % 1).any():
      problems.error(f"{table}.bbox all between 0 and 1; boxes are [x, y, width, height] in pixels", np.arange(len(bbox)), name)
    if len(bbox) >= 10 and over.mean() >= 0.5 and (bbox[:, 2:] > bbox[:, :2]).all():
      problems.error(f"{table}.bbox over the border as if they were corners; boxes are [x, y, width, height] in pixels", np.flatnonzero(over), name)
    _judge_boxes(problems, corners, area, outline, name)
    keep = np.flatnonzero(check_boxes(problems, corners, labels, images, sizes, (bbox[:, 2:] == 0).any(1), lambda i: shown(file_names[i]), name))

    keep = keep[np.argsort(images[keep], kind="stable")]
    images, labels = images[keep], labels[keep]
    about["max_boxes"] = int(np.bincount(images[~iscrowd[keep]], minlength=1).max())
    unused = np.flatnonzero(np.bincount(labels, minlength=len(about["class_names"])) == 0)
    problems.note("classes without a box", unused, lambda k: shown(about["class_names"][k]))
    return {"annotation_ids": ids[keep], "boxes": bbox[keep], "labels": labels, "crowd": iscrowd[keep], "areas": area[keep],
            "offsets": np.searchsorted(images, np.arange(len(image_ids) + 1))}


# What is read of the rows of each table: the columns of a portion that begins with row number `first`, as arrays.

def _category_columns(problems: Problems, rows: list[dict[str, Any]], first: int) -> Arrays:
  names = _column(problems, rows, first, "categories", "name", {str}, "a text", lambda i: f"category {i}")
  return {"name": np.array(names, object), "id": _ids(problems, rows, first, "categories", 0)}


def _image_columns(problems: Problems, rows: list[dict[str, Any]], first: int) -> Arrays:
  column = partial(_column, problems, rows, first, "images")
  return {"id": _ids(problems, rows, first, "images", 0),   # -1 stands for padding in a batch
          **{key: np.array(column(key, {int}, "a positive whole number", lambda _: INT32, 1, INT32 - 1), np.int32) for key in ("height", "width")},
          "file_name": np.array(_column(problems, _named(rows), first, "images", "file_name", {str}, "a text", lambda _: None), object)}


def _named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Images with a file_name: of LVIS, which has none, it is the end of `coco_url`, as train2017/000000000030.jpg."""
  return [row if "file_name" in row or type(row.get("coco_url")) is not str else row | {"file_name": "/".join(row["coco_url"].split("/")[-2:])}
          for row in rows]


def _annotation_columns(problems: Problems, rows: list[dict[str, Any]], first: int) -> Arrays:
  def name(i: int) -> str: return f"annotation id {rows[i].get('id')}"
  owners = {key: np.array(_column(problems, rows, first, "annotations", key, {int}, "a whole number", lambda _: NO_ID, -INT64, INT64), np.int64)
            for key in ("image_id", "category_id")}
  boxes = _boxes(problems, rows, first)
  negative = (boxes[:, 2:] < 0).any(1)
  problems.error("annotations[].bbox of negative width or height", np.flatnonzero(negative),
                 lambda i: f"annotations[{first + i}] {_repr(rows[i]['bbox'])}")
  boxes[negative] = STAND_IN
  outline = _outlines(rows)
  _turn_boxes(problems, rows, boxes, outline, name)
  return {"id": _ids(problems, rows, first, "annotations", -INT64), **owners, "bbox": boxes, "iscrowd": _crowd(problems, rows, name),
          "outline": outline, "area": _areas(problems, rows, boxes, name)}


COLUMNS = {"images": _image_columns, "annotations": _annotation_columns, "categories": _category_columns}


def _outlines(rows: list[dict[str, Any]]) -> np.ndarray:
  """xyxy around the polygons of some annotations, f64 [N,4]; NaN where there is none, or it was not looked at."""
  outlines, step = np.full((len(rows), 4), np.nan), max(1, len(rows) // OUTLINES)
  for i, row in enumerate(rows):
    if i % step and "attributes" not in row: continue
    if isinstance(polygons := row.get("segmentation"), list) and polygons and all(isinstance(p, list) and len(p) >= 6 for p in polygons):
      points = [n for polygon in polygons for n in polygon[:len(polygon) // 2 * 2]]
      if all(type(n) in (int, float) and abs(n) <= FARTHEST for n in points): outlines[i] = around_points(points)
  return outlines


def _turn_boxes(problems: Problems, rows: list[dict[str, Any]], boxes: np.ndarray, outline: np.ndarray, name: Callable[[int], str]) -> None:
  """Make of boxes that CVAT says are turned about their middle, the upright boxes around them, unless they are already those of their polygons."""
  turned = []
  for i, row in enumerate(rows):
    about = row.get("attributes")
    if not isinstance(about, dict) or type(degrees := about.get("rotation")) not in (int, float): continue
    if not math.isfinite(degrees) or not degrees % 180: continue
    x, y, width, height = boxes[i].tolist()
    if iou(np.array([[x, y, x + width, y + height]]), outline[i:i + 1])[0] > 0.9: continue   # NaN is not
    x0, y0, x1, y1 = around_turned(x + width / 2, y + height / 2, width, height, math.radians(degrees))
    boxes[i] = [x0, y0, x1 - x0, y1 - y0]
    turned.append(i)
  problems.odd("annotations[].attributes.rotation, taken as the upright box around the turned one", turned, name)


def _judge_boxes(problems: Problems, corners: np.ndarray, area: np.ndarray, outline: np.ndarray, name: Callable[[int], str]) -> None:
  """Report boxes that their own areas and polygons show to be something else than [x, y, width, height]. `corners` is xyxy of what was read so."""
  if not len(corners): return
  size = corners[:, 2:] - corners[:, :2]
  as_corners = size - corners[:, :2]   # were the last two numbers a corner, and no size
  own, other = np.abs(size.prod(1) - area), np.abs(as_corners.prod(1) - area)
  wrong = (as_corners > 0).all(1) & (other <= 0.01 * area + 0.01) & (own > 0.02 * area + 0.02)
  if wrong.sum() > len(wrong) / 2:
    return problems.error("annotations[].bbox whose area is that of corners; boxes are [x, y, width, height] in pixels", np.flatnonzero(wrong), name)
  judged = np.flatnonzero((outline[:, 2:] - outline[:, :2] > 4).all(1))   # NaN is not
  apart = judged[iou(corners[judged], outline[judged]) < AGREE]
  if len(apart) > len(judged) / 2:
    return problems.error("annotations[].bbox apart from its segmentation; boxes are [x, y, width, height] in pixels", apart, name)
  problems.odd("annotations[].bbox apart from its segmentation, kept", apart, name)
  larger = np.flatnonzero(area > 1.1 * size.prod(1) + 4)
  if len(larger) > len(area) / 2:
    problems.error("annotations[].bbox smaller than its area; boxes are [x, y, width, height] in pixels of the picture", larger, name)


def _crowd(problems: Problems, rows: list[dict[str, Any]], name: Callable[[int], str]) -> np.ndarray:
  flags = [row.get("iscrowd", 0) for row in rows]
  if not set(map(type, flags)) <= {int} or not set(flags) <= {0, 1}:
    read = {int, bool, type(None)}
    problems.error("annotations[].iscrowd is neither 0 nor 1", [i for i, flag in enumerate(flags) if type(flag) not in read], name)
    odd = [i for i, flag in enumerate(flags) if type(flag) in read and (type(flag) is not int or flag not in (0, 1))]
    problems.odd("annotations[].iscrowd is neither 0 nor 1, taken as 1 unless false, null or 0", odd, name)
  return np.array(list(map(bool, flags)), bool)


def _areas(problems: Problems, rows: list[dict[str, Any]], boxes: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
  given = [row.get("area") for row in rows]
  problems.error("annotations[].area is not a number", [i for i, a in enumerate(given) if type(a) not in (int, float, type(None))], name)
  areas = np.array([float(a) if type(a) in (int, float) and abs(a) <= FARTHEST ** 2 else np.nan for a in given], np.float64)
  unknown = ~(areas >= 0)
  problems.odd("annotations[].area missing, negative or not finite, taken as the box's", np.flatnonzero(unknown), name)
  return np.where(unknown, boxes[:, 2] * boxes[:, 3], areas)


def _column(problems: Problems, rows: list[dict[str, Any]], first: int, table: str, key: str, kinds: set[type], expected: str,
            stand_in: Callable[[int], Any], low: int | None = None, high: int | None = None) -> list[Any]:
  """`key` of every row. What is missing, of another type than `kinds`, or not in [low, high] is reported, and `stand_in` of its number taken."""
  column = [row.get(key) for row in rows]
  if set(map(type, column)) <= kinds and (low is None or not column or (low <= min(column) and max(column) <= high)): return column
  bad = {i for i, value in enumerate(column) if type(value) not in kinds or (low is not None and not low <= value <= high)}
  problems.error(f"{table}[].{key} missing", missing := [i for i in sorted(bad) if key not in rows[i]], lambda i: f"{table}[{first + i}]")
  problems.error(f"{table}[].{key} is not {expected}", sorted(bad.difference(missing)), lambda i: f"{table}[{first + i}] {_repr(column[i])}")
  return [stand_in(first + i) if i in bad else value for i, value in enumerate(column)]


def _ids(problems: Problems, rows: list[dict[str, Any]], first: int, table: str, low: int) -> np.ndarray:
  """`id` of every row, i64."""
  expected = "a whole number" if low else "a whole number from 0"
  return np.array(_column(problems, rows, first, table, "id", {int}, expected, lambda i: -1 - i, low, INT64), np.int64)


def _boxes(problems: Problems, rows: list[dict[str, Any]], first: int) -> np.ndarray:
  """`bbox` of every annotation, f64 [N,4]; a small box stands in for what is none."""
  column = _column(problems, rows, first, "annotations", "bbox", {list}, "a list", lambda _: STAND_IN)
  if set(map(len, column)) <= {4} and set(map(type, chain.from_iterable(column))) <= {int, float}:
    try: boxes = np.array(column, np.float64).reshape(-1, 4)
    except OverflowError: boxes = np.array([[np.inf] * 4])
    if (np.abs(boxes) <= FARTHEST).all(): return boxes
  bad = {i for i, box in enumerate(column) if len(box) != 4 or not all(type(x) in (int, float) and abs(x) <= FARTHEST for x in box)}
  problems.error("annotations[].bbox is not four numbers [x, y, width, height] of at most a million pixels", sorted(bad),
                 lambda i: f"annotations[{first + i}] {_repr(column[i])}")
  return np.array([STAND_IN if i in bad else box for i, box in enumerate(column)], np.float64)


def _repeated_ids(ids: np.ndarray) -> np.ndarray:
  ordered = np.sort(ids)
  return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _repeated(names: list[str]) -> list[str]:
  if len(set(names)) == len(names): return []
  seen: set[str] = set()
  return sorted({name for name in names if name in seen or seen.add(name)})


def _repr(value: Any) -> str: return shown(reprlib.repr(value), 60)
