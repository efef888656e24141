"""Data sets in the form of COCO: one `instances_*.json` and a folder of images (https://cocodataset.org/#format-data)."""
import gc, os, sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
import numpy as np
from tinydet.cache import cache_folder
from tinydet.datasets import index
from tinydet.datasets.coco_rows import COLUMNS, INT32, NO_ID, Arrays, brief, judge_boxes, repeated, repeated_ids
from tinydet.datasets.find_pictures import find_pictures, is_picture
from tinydet.datasets.image import check_headers, read_image
from tinydet.datasets.json_rows import read_portions, read_whole
from tinydet.datasets.problems import Problems, check_boxes, check_class_names, reason, shown
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import resized_boxes
from tinydet.errors import UserError

KNOWN_FIELDS = {
  "images": {"id", "width", "height", "file_name", "license", "flickr_url", "coco_url", "date_captured",
             "neg_category_ids", "not_exhaustive_category_ids"},   # LVIS
  "annotations": {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints", "num_keypoints"},
  "categories": {"id", "name", "supercategory", "keypoints", "skeleton",
                 "synset", "synonyms", "def", "image_count", "instance_count", "frequency"}}   # LVIS
LARGE = 2 ** 26   # bytes: a larger annotation file is read in portions, and what was read is kept
VERSION = 3       # of the arrays and the checks behind them: to be raised where either changes


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
        if at is not None: raise UserError(f"{self.file}: {table}[{at}] is {brief(rows[at - first[table]])}, not an object with fields")
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
    problems.error("categories[].id used more than once", repeated_ids(ids))
    check_class_names(problems, names)
    problems.error("class names used more than once", repeated(names), shown)
    about = {"category_ids": np.sort(ids).tolist(), "class_names": [names[i] for i in np.argsort(ids)]}
    problems.take(columns["images"])
    images, file_names = self._check_images(problems, about, **tables.pop("images"))
    arrays = images | self._check_annotations(problems, columns["annotations"], about, images["image_ids"], images["sizes"], file_names,
                                              **tables.pop("annotations"))
    prefix = f"{self.file}: "
    return arrays, about | {"warnings": [line.removeprefix(prefix) for line in problems.finish()]}

  def _check_images(self, problems: Problems, about: dict[str, Any], id: np.ndarray, height: np.ndarray, width: np.ndarray,
                    file_name: np.ndarray) -> tuple[Arrays, list[str | None]]:
    problems.error("images[].id used more than once", repeated_ids(id))
    sizes, names = np.stack([height, width], 1), file_name.tolist()
    try: found, unused = find_pictures(problems, self.folder, names, self.roots, "images[].file_name", self.split)
    except OSError as e: raise UserError(f"{self.folder}: the image folder of {self.file} cannot be opened ({e.strerror})") from e
    known = [i for i, file in enumerate(found) if file is not None]
    about["_folders"] = {sub: self._changed(sub) for sub in sorted({"", *(os.path.dirname(found[i]) for i in known)})}
    problems.error("files that images[].file_name names more than once", repeated([os.path.normpath(found[i]) for i in known]), shown)
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
    if len(again := repeated_ids(ids)):
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
    judge_boxes(problems, corners, area, outline, name)
    keep = np.flatnonzero(check_boxes(problems, corners, labels, images, sizes, (bbox[:, 2:] == 0).any(1), lambda i: shown(file_names[i]), name))

    keep = keep[np.argsort(images[keep], kind="stable")]
    images, labels = images[keep], labels[keep]
    about["max_boxes"] = int(np.bincount(images[~iscrowd[keep]], minlength=1).max())
    unused = np.flatnonzero(np.bincount(labels, minlength=len(about["class_names"])) == 0)
    problems.note("classes without a box", unused, lambda k: shown(about["class_names"][k]))
    return {"annotation_ids": ids[keep], "boxes": bbox[keep], "labels": labels, "crowd": iscrowd[keep], "areas": area[keep],
            "offsets": np.searchsorted(images, np.arange(len(image_ids) + 1))}
