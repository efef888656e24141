"""Data sets in the form of COCO: one `instances_*.json` and a folder of images (https://cocodataset.org/#format-data)."""
import gc, json, os, re, reprlib
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
import numpy as np
from extra.datasets.image import check_headers, find_files, read_image
from extra.datasets.image_folder import SUFFIXES
from extra.datasets.problems import Problems, check_boxes, check_class_names, read_bytes, reason, shown
from extra.datasets.sample import Sample
from extra.errors import UserError

FARTHEST = 1e6   # pixels; no coordinate of a real box is larger
INT32, INT64 = 2 ** 31 - 1, 2 ** 63 - 1
STAND_IN = [0, 0, 1, 1]   # for a box that was reported, so that the others can be judged
UNSAFE_PATH = re.compile(r"^$|^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)|[\0-\x1f\x7f\ud800-\udfff]")   # empty, absolute, climbing, not a name
KNOWN_FIELDS = {
  "images": {"id", "width", "height", "file_name", "license", "flickr_url", "coco_url", "date_captured"},
  "annotations": {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints", "num_keypoints"},
  "categories": {"id", "name", "supercategory", "keypoints", "skeleton"}}


class Coco:
  """The images of one annotation file; all of them, also those without objects. Labels follow the order of the category ids, gaps or not.

  Crowd regions are kept out of the samples and in `ground_truth`. Boxes of the samples are clipped to the image; `ground_truth` keeps them as they
  are in the file, so that a score is the one of the official evaluation. Boxes without area are in neither. `warnings` counts such oddities.
  Raises UserError with all that cannot be mended, and with `strict` all oddities too.
  """

  def __init__(self, annotation_file: str | Path, image_folder: str | Path, strict: bool = False):
    self.file, self.folder = Path(annotation_file), Path(image_folder)
    self.name = self.file.stem
    content, problems = self._read_json(), Problems(self.file, strict)
    for table, known in KNOWN_FIELDS.items():
      unknown = set().union(*content[table]) - known
      problems.odd("fields that COCO does not have, passed over", [f"{table}[].{key}" for key in sorted(unknown)], shown)
    self._read_categories(content["categories"], problems)
    self._read_images(content["images"], problems)
    self._read_annotations(content["annotations"], problems)
    self.warnings = problems.finish()

  def __len__(self) -> int: return len(self.image_ids)

  def image_name(self, index: int) -> str: return str(self.folder / self.file_names[index])

  def __getitem__(self, index: int) -> Sample:
    height, width = (int(x) for x in self.sizes[index])
    mine = slice(*self.offsets[index:index + 2])
    objects = ~self.crowd[mine]
    image = read_image(self.folder / self.file_names[index], (height, width), f"{self.file}: images[].width/height of id {self.image_ids[index]}")
    corners = np.concatenate([self.boxes[mine, :2], self.boxes[mine, :2] + self.boxes[mine, 2:]], 1)[objects]
    boxes = corners.clip(0, [width, height] * 2).astype(np.float32)
    return Sample(image, boxes, self.labels[mine][objects], int(self.image_ids[index]), (height, width), (height, width))

  def ground_truth(self) -> dict[str, Any]:
    """The annotations in the form of a COCO instances file: boxes as in the file, crowds with iscrowd 1, no segmentations."""
    images = [{"id": i, "file_name": str(n), "height": h, "width": w}
              for i, n, (h, w) in zip(self.image_ids.tolist(), self.file_names, self.sizes.tolist())]
    owners = np.repeat(self.image_ids, np.diff(self.offsets)).tolist()
    ids = np.array(self.category_ids)[self.labels].tolist()
    columns = zip(self.annotation_ids.tolist(), owners, ids, self.boxes.tolist(), self.areas.tolist(), self.crowd.tolist())
    annotations = [{"id": a, "image_id": i, "category_id": c, "bbox": b, "area": s, "iscrowd": int(crowd)} for a, i, c, b, s, crowd in columns]
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names)]}

  def _read_json(self) -> dict[str, Any]:
    collecting = gc.isenabled()
    gc.disable()   # looking for garbage among millions of new objects takes a third of the time
    try: content = json.loads(read_bytes(self.file).decode("utf-8-sig"), object_pairs_hook=_unique)
    except OSError as e: raise UserError(f"{self.file}: cannot be opened ({e.strerror})") from e
    except (ValueError, RecursionError) as e: raise UserError(f"{self.file}: is not a JSON file that can be read ({reason(e)})") from e
    finally:
      if collecting: gc.enable()
    for key in KNOWN_FIELDS:
      if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f"{self.file}: has no list '{key}'; a COCO instances file has images, annotations and categories")
      at = next((i for i, row in enumerate(content[key]) if type(row) is not dict), None)
      if at is not None: raise UserError(f"{self.file}: {key}[{at}] is {_repr(content[key][at])}, not an object with fields")
    for key in ("images", "categories"):
      if not content[key]: raise UserError(f"{self.file}: the list '{key}' is empty")
    return content

  def _read_categories(self, rows: list[dict[str, Any]], problems: Problems) -> None:
    names = _column(problems, rows, "categories", "name", {str}, "a text", lambda i: f"category {i}")
    ids = _ids(problems.error, "categories[].id used more than once", problems, rows, "categories", 0)
    check_class_names(problems, names)
    problems.error("class names used more than once", _repeated(names), shown)
    self.category_ids = np.sort(ids).tolist()
    self.class_names = [names[i] for i in np.argsort(ids)]

  def _read_images(self, rows: list[dict[str, Any]], problems: Problems) -> None:
    self.image_ids = _ids(problems.error, "images[].id used more than once", problems, rows, "images", 0)   # -1 stands for padding in a batch
    column = partial(_column, problems, rows, "images")
    sizes = [column(key, {int}, "a positive whole number", lambda _: INT32, 1, INT32 - 1) for key in ("height", "width")]
    self.sizes = np.array(sizes, np.int32).T
    names = column("file_name", {str}, "a text", lambda _: None)
    unsafe = {name for name in set(names) - {None} if UNSAFE_PATH.search(name)}
    problems.error("images[].file_name is no path inside the image folder", sorted(unsafe), lambda n: shown(n) or "''")
    safe = [i for i, name in enumerate(names) if name is not None and name not in unsafe]
    try: found, unused = find_files(self.folder, [names[i] for i in safe])
    except OSError as e: raise UserError(f"{self.folder}: the image folder of {self.file} cannot be opened ({e.strerror})") from e
    problems.error(f"images[].file_name missing in {self.folder}", [names[i] for i, file in zip(safe, found) if file is None], shown)
    problems.odd("images[].file_name found in another spelling", [names[i] for i, file in zip(safe, found) if file not in (None, names[i])], shown)
    files = [os.path.normpath(file or names[i]) for i, file in zip(safe, found)]
    problems.error("files that images[].file_name names more than once", _repeated(files), shown)
    problems.note("pictures in the image folder that images[] does not list", [n for n in unused if n.lower().endswith(SUFFIXES)], shown)
    for i, file in zip(safe, found): names[i] = file
    there = [i for i in safe if names[i] is not None and self.sizes[i].max() < INT32]
    check_headers(problems, self.folder, [names[i] for i in there], self.sizes[there].tolist())
    self.file_names = np.array(names, str)

  def _read_annotations(self, rows: list[dict[str, Any]], problems: Problems) -> None:
    def name(i: int) -> str: return f"annotation id {rows[i].get('id')}"
    column, table = partial(_column, problems, rows, "annotations"), "annotations[]"
    ids = _ids(problems.odd, f"{table}.id used more than once, all renumbered", problems, rows, "annotations", -INT64)
    if len(np.unique(ids)) < len(ids): ids = np.arange(1, len(ids) + 1)
    owners = {}
    for key, known in (("image_id", self.image_ids), ("category_id", np.array(self.category_ids))):
      values = np.array(column(key, {int}, "a whole number", lambda _, known=known: known[0], -INT64, INT64), np.int64)
      unknown = ~np.isin(values, known)
      if (known >= 0).all():   # else ids in the lists were reported themselves
        problems.error(f"{table}.{key} not in the file's lists", np.flatnonzero(unknown), lambda i, v=values: f"annotations[{i}] says {v[i]}")
      owners[key] = np.where(unknown, known[0], values)
    row_of = np.argsort(self.image_ids)
    images = row_of[np.searchsorted(self.image_ids, owners["image_id"], sorter=row_of)]
    labels = np.searchsorted(self.category_ids, owners["category_id"]).astype(np.int32)

    boxes = _boxes(problems, rows)
    negative = (boxes[:, 2:] < 0).any(1)
    problems.error(f"{table}.bbox of negative width or height", np.flatnonzero(negative), lambda i: f"annotations[{i}] {_repr(rows[i]['bbox'])}")
    boxes[negative] = STAND_IN
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    limits = self.sizes[images][:, ::-1]
    over = (corners[:, 2:] > limits + 1).any(1)
    if len(boxes) and corners.max() <= 1 and (boxes % 1).any():
      problems.error(f"{table}.bbox all between 0 and 1; boxes are [x, y, width, height] in pixels", np.arange(len(boxes)), name)
    if len(boxes) >= 10 and over.mean() >= 0.5 and (boxes[:, 2:] > boxes[:, :2]).all():
      problems.error(f"{table}.bbox over the border as if they were corners; boxes are [x, y, width, height] in pixels", np.flatnonzero(over), name)
    keep = np.flatnonzero(check_boxes(problems, corners, labels, images, self.sizes, (boxes[:, 2:] == 0).any(1),
                                      lambda i: shown(self.file_names[i]), name))
    crowd, areas = self._crowd(rows, problems, name), self._areas(rows, boxes, problems, name)

    keep = keep[np.argsort(images[keep], kind="stable")]
    self.annotation_ids, self.boxes, self.labels, self.crowd, self.areas = (x[keep] for x in (ids, boxes, labels, crowd, areas))
    self.offsets = np.searchsorted(images[keep], np.arange(len(self.image_ids) + 1))
    self.max_boxes = int(np.bincount(images[keep][~self.crowd], minlength=1).max())
    unused = np.flatnonzero(np.bincount(self.labels, minlength=len(self.class_names)) == 0)
    problems.note("classes without a box", unused, lambda k: shown(self.class_names[k]))

  def _crowd(self, rows: list[dict[str, Any]], problems: Problems, name: Callable[[int], str]) -> np.ndarray:
    flags = [row.get("iscrowd", 0) for row in rows]
    if not set(map(type, flags)) <= {int} or not set(flags) <= {0, 1}:
      read = {int, bool, type(None)}
      problems.error("annotations[].iscrowd is neither 0 nor 1", [i for i, flag in enumerate(flags) if type(flag) not in read], name)
      odd = [i for i, flag in enumerate(flags) if type(flag) in read and (type(flag) is not int or flag not in (0, 1))]
      problems.odd("annotations[].iscrowd is neither 0 nor 1, taken as 1 unless false, null or 0", odd, name)
    return np.array(list(map(bool, flags)), bool)

  def _areas(self, rows: list[dict[str, Any]], boxes: np.ndarray, problems: Problems, name: Callable[[int], str]) -> np.ndarray:
    given = [row.get("area") for row in rows]
    problems.error("annotations[].area is not a number", [i for i, a in enumerate(given) if type(a) not in (int, float, type(None))], name)
    areas = np.array([float(a) if type(a) in (int, float) and abs(a) <= FARTHEST ** 2 else np.nan for a in given], np.float64)
    unknown = ~(areas >= 0)
    problems.odd("annotations[].area missing, negative or not finite, taken as the box's", np.flatnonzero(unknown), name)
    return np.where(unknown, boxes[:, 2] * boxes[:, 3], areas)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(fields := dict(pairs)) != len(pairs): raise ValueError("an object in it has two fields of one name")
  return fields


def _column(problems: Problems, rows: list[dict[str, Any]], table: str, key: str, kinds: set[type], expected: str, stand_in: Callable[[int], Any],
            low: int | None = None, high: int | None = None) -> list[Any]:
  """`key` of every row. What is missing, of another type than `kinds`, or not in [low, high] is reported, and `stand_in` of its row taken."""
  column = [row.get(key) for row in rows]
  if set(map(type, column)) <= kinds and (low is None or not column or (low <= min(column) and max(column) <= high)): return column
  bad = {i for i, value in enumerate(column) if type(value) not in kinds or (low is not None and not low <= value <= high)}
  problems.error(f"{table}[].{key} missing", missing := [i for i in sorted(bad) if key not in rows[i]], lambda i: f"{table}[{i}]")
  problems.error(f"{table}[].{key} is not {expected}", sorted(bad.difference(missing)), lambda i: f"{table}[{i}] {_repr(column[i])}")
  return [stand_in(i) if i in bad else value for i, value in enumerate(column)]


def _ids(report: Callable, what: str, problems: Problems, rows: list[dict[str, Any]], table: str, low: int) -> np.ndarray:
  """`id` of every row, i64; `report`s those used more than once."""
  expected = "a whole number" if low else "a whole number from 0"
  ids = np.array(_column(problems, rows, table, "id", {int}, expected, lambda i: -1 - i, low, INT64), np.int64)
  values, counts = np.unique(ids, return_counts=True)
  report(what, values[counts > 1])
  return ids


def _boxes(problems: Problems, rows: list[dict[str, Any]]) -> np.ndarray:
  """`bbox` of every annotation, f64 [N,4]; a small box stands in for what is none."""
  column = _column(problems, rows, "annotations", "bbox", {list}, "a list", lambda _: STAND_IN)
  if set(map(len, column)) <= {4} and set(map(type, chain.from_iterable(column))) <= {int, float}:
    try: boxes = np.array(column, np.float64).reshape(-1, 4)
    except OverflowError: boxes = np.array([[np.inf] * 4])
    if (np.abs(boxes) <= FARTHEST).all(): return boxes
  bad = {i for i, box in enumerate(column) if len(box) != 4 or not all(type(x) in (int, float) and abs(x) <= FARTHEST for x in box)}
  problems.error("annotations[].bbox is not four numbers [x, y, width, height] of at most a million pixels", sorted(bad),
                 lambda i: f"annotations[{i}] {_repr(column[i])}")
  return np.array([STAND_IN if i in bad else box for i, box in enumerate(column)], np.float64)


def _repeated(names: list[str]) -> list[str]:
  if len(set(names)) == len(names): return []
  seen: set[str] = set()
  return sorted({name for name in names if name in seen or seen.add(name)})


def _repr(value: Any) -> str: return shown(reprlib.repr(value), 60)
