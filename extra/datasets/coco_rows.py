"""The rows of a COCO annotation file as checked arrays, and what the boxes' own areas and polygons say of them."""
import math, reprlib
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any
import numpy as np
from tinydet.datasets.outlines import around_points, around_turned, iou
from tinydet.datasets.problems import Problems, shown

FARTHEST = 1e6   # pixels; no coordinate of a real box is larger
INT32, INT64 = 2 ** 31 - 1, 2 ** 63 - 1
NO_ID = -INT64 - 1
STAND_IN = [0, 0, 1, 1]   # for a box that was reported, so that the others can be judged
OUTLINES = 2_000  # of a portion of annotations: so many polygons are held against their boxes
AGREE = 0.5       # IoU of a box with that around its polygon, below which they are of two things

Arrays = dict[str, np.ndarray]


# Columns of a portion of a table whose rows begin with number `first`.

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
                 lambda i: f"annotations[{first + i}] {brief(rows[i]['bbox'])}")
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


def judge_boxes(problems: Problems, corners: np.ndarray, area: np.ndarray, outline: np.ndarray, name: Callable[[int], str]) -> None:
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
  problems.error(f"{table}[].{key} is not {expected}", sorted(bad.difference(missing)), lambda i: f"{table}[{first + i}] {brief(column[i])}")
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
                 lambda i: f"annotations[{first + i}] {brief(column[i])}")
  return np.array([STAND_IN if i in bad else box for i, box in enumerate(column)], np.float64)


def repeated_ids(ids: np.ndarray) -> np.ndarray:
  """Those used more than once, in order."""
  ordered = np.sort(ids)
  return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def repeated(names: list[str]) -> list[str]:
  """Those used more than once, in order."""
  if len(set(names)) == len(names): return []
  seen: set[str] = set()
  return sorted({name for name in names if name in seen or seen.add(name)})


def brief(value: Any) -> str:
  """A value of a file as a message shows it."""
  return shown(reprlib.repr(value), 60)
