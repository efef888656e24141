"""Data sets in the form of COCO: one `instances_*.json` and a folder of images (https://cocodataset.org/#format-data)."""
import json, os
from pathlib import Path
from typing import Any
import numpy as np
from extra.datasets.image import read_image
from extra.datasets.sample import Sample
from extra.errors import UserError


class Coco:
  """The images of one annotation file; all of them, also those without objects. Labels follow the order of the category ids, gaps or not.

  Crowd regions are kept out of the samples and in `ground_truth`. Boxes of the samples are clipped to the image; `ground_truth` keeps them as they
  are in the file, so that a score is the one of the official evaluation. Boxes without area are in neither. `warnings` counts both.
  Raises UserError, naming file and field, for what cannot be mended: missing fields, unknown ids, missing images.
  """

  def __init__(self, annotation_file: str | Path, image_folder: str | Path):
    self.file, self.folder = Path(annotation_file), Path(image_folder)
    self.name = self.file.stem
    self.warnings: list[str] = []
    content = self._read_json()
    self._read_categories(content["categories"])
    self._read_images(content["images"])
    self._read_annotations(content["annotations"])

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
    try: content = json.loads(self.file.read_bytes())
    except OSError as e: raise UserError(f"{self.file}: cannot be opened ({e.strerror})") from e
    except ValueError as e: raise UserError(f"{self.file}: is not JSON ({e})") from e
    for key in ("images", "annotations", "categories"):
      if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f"{self.file}: has no list '{key}'; a COCO instances file has images, annotations and categories")
    return content

  def _column(self, rows: list[dict[str, Any]], table: str, key: str, kind: type | tuple[type, ...]) -> list[Any]:
    try: column = [row[key] for row in rows]
    except (KeyError, TypeError):
      at = next(i for i, row in enumerate(rows) if not isinstance(row, dict) or key not in row)
      raise UserError(f"{self.file}: {table}[{at}] has no field '{key}'") from None
    for at, value in enumerate(column):
      if not isinstance(value, kind): raise UserError(f"{self.file}: {table}[{at}].{key} is {json.dumps(value)[:60]}, which is of the wrong type")
    return column

  def _unique_ids(self, rows: list[dict[str, Any]], table: str) -> np.ndarray:
    ids = np.array(self._column(rows, table, "id", int), np.int64)
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any(): raise UserError(f"{self.file}: {table}[].id {values[counts > 1][0]} occurs more than once")
    return ids

  def _read_categories(self, rows: list[dict[str, Any]]) -> None:
    if not rows: raise UserError(f"{self.file}: the list 'categories' is empty")
    names = self._column(rows, "categories", "name", str)
    ids = self._unique_ids(rows, "categories")
    self.category_ids = np.sort(ids).tolist()
    self.class_names = [names[i] for i in np.argsort(ids)]

  def _read_images(self, rows: list[dict[str, Any]]) -> None:
    if not rows: raise UserError(f"{self.file}: the list 'images' is empty")
    self.image_ids = self._unique_ids(rows, "images")
    self.sizes = np.array([self._column(rows, "images", key, int) for key in ("height", "width")], np.int32).T
    if (self.sizes <= 0).any():
      raise UserError(f"{self.file}: images[{np.argmax((self.sizes <= 0).any(1))}].height and .width must be positive")
    self.file_names = np.array(self._column(rows, "images", "file_name", str))
    folders = {os.path.dirname(name) for name in self.file_names.tolist()}
    try: present = {os.path.join(folder, entry.name) for folder in folders for entry in os.scandir(self.folder / folder)}
    except OSError as e: raise UserError(f"{e.filename}: the image folder of {self.file} cannot be opened ({e.strerror})") from e
    missing = [name for name in self.file_names.tolist() if name not in present]
    if missing:
      raise UserError(f"{self.folder / missing[0]}: file missing ({len(missing)} of {len(rows)} images[].file_name of {self.file} are); "
                      "complete the folder or shorten the list")

  def _read_annotations(self, rows: list[dict[str, Any]]) -> None:
    ids = self._unique_ids(rows, "annotations")
    image_ids = np.array(self._column(rows, "annotations", "image_id", int), np.int64)
    category_ids = np.array(self._column(rows, "annotations", "category_id", int), np.int64)
    for key, values, known in (("image_id", image_ids, self.image_ids), ("category_id", category_ids, self.category_ids)):
      unknown = np.flatnonzero(~np.isin(values, known))
      if len(unknown): raise UserError(f"{self.file}: annotations[{unknown[0]}].{key} {values[unknown[0]]} is not in the file's lists")
    try: boxes = np.array(self._column(rows, "annotations", "bbox", list), np.float64).reshape(len(rows), 4)
    except (ValueError, TypeError): boxes = None
    if boxes is None or not np.isfinite(boxes).all():
      bad = next(i for i, r in enumerate(rows) if len(r["bbox"]) != 4 or not all(isinstance(x, (int, float)) and np.isfinite(x) for x in r["bbox"]))
      raise UserError(f"{self.file}: annotations[{bad}].bbox is {json.dumps(rows[bad]['bbox'])[:60]}, not four numbers [x, y, width, height]")

    row_of = np.argsort(self.image_ids)
    images = row_of[np.searchsorted(self.image_ids, image_ids, sorter=row_of)]
    limits = self.sizes[images][:, ::-1]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    clipped = corners.clip(0, np.concatenate([limits, limits], 1)).astype(np.float32)
    empty = (clipped[:, 2:] <= clipped[:, :2]).any(1)
    outside = ~empty & (np.abs(clipped - corners).max(1, initial=0) > 1)
    for which, what in ((empty, "without area inside their image dropped"), (outside, "more than 1 pixel over the border of their image clipped")):
      n = int(which.sum())
      if n: self.warnings.append(f"{self.file}: {n} box{'es' * (n > 1)} {what} (first: annotation id {ids[np.argmax(which)]})")

    keep = np.flatnonzero(~empty)
    keep = keep[np.argsort(images[keep], kind="stable")]
    self.annotation_ids, self.boxes = ids[keep], boxes[keep]
    self.labels = np.searchsorted(self.category_ids, category_ids[keep]).astype(np.int32)
    self.crowd = np.array([bool(row.get("iscrowd", 0)) for row in rows], bool)[keep]
    areas = [row.get("area", row["bbox"][2] * row["bbox"][3]) for row in rows]
    self.areas = np.array(self._column([{"area": area} for area in areas], "annotations", "area", (int, float)), np.float64)[keep]
    self.offsets = np.searchsorted(images[keep], np.arange(len(self.image_ids) + 1))
    self.max_boxes = int(np.bincount(images[keep][~self.crowd], minlength=1).max())
