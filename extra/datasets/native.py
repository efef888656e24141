"""The own files of annotation tools: labelme (a JSON file a picture), Label Studio and VIA (one JSON file)."""
import json, math, os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from tinydet.datasets.find_pictures import is_picture, walk_files
from tinydet.datasets.listed import FARTHEST, OBJECT, Entry, Listing, listing_of
from tinydet.datasets.outlines import around_points, around_turned
from tinydet.datasets.problems import Problems, read_bytes, reason, shown
from tinydet.errors import UserError

MAX_JSON = 2 ** 30   # bytes; a labelme file may hold its picture
CLASS_ATTRIBUTES = ("class", "label", "type", "category", "name", "object", "class_name")   # of VIA's regions, the likeliest first
NO_BOX = "{} without an extent (points, lines, masks), passed over"


def kind_of(content: Any) -> str:
  """Which tool's native JSON `content` is: "labelme", "Label Studio", "VIA", "COCO", or ""."""
  if isinstance(content, list):
    rows = [row for row in content[:20] if isinstance(row, dict)]
    if rows and len(rows) == len(content[:20]) and any(_is_task(row) for row in rows): return "Label Studio"
    return ""
  if not isinstance(content, dict): return ""
  if isinstance(content.get("images"), list) and ("annotations" in content or "categories" in content): return "COCO"
  if isinstance(content.get("shapes"), list) and "imagePath" in content: return "labelme"
  if "_via_img_metadata" in content: return "VIA"
  rows = list(content.values())[:20]
  return "VIA" if rows and all(isinstance(row, dict) and "filename" in row and "regions" in row for row in rows) else ""


def read_json(file: Path) -> Any:
  try: return json.loads(read_bytes(file, MAX_JSON).decode("utf-8-sig"))
  except OSError as e: raise UserError(f"{file}: cannot be opened ({e.strerror})") from e
  except (ValueError, RecursionError) as e: raise UserError(f"{file}: is not a JSON file that can be read ({reason(e)})") from e


# ---- labelme

def read_labelme(folder: Path, roots: list[Path], problems: Problems) -> Listing:
  """The pictures of all labelme files below `folder`. Shapes of one label and group are one object, as in labelme's own conversion."""
  entries = []
  for file in walk_files(folder, (".json",)):
    try: content = read_json(folder/file)
    except UserError as e:
      problems.error("annotations that cannot be read", [f"{shown(file)} ({str(e).rsplit('(', 1)[-1].rstrip(')')})"])
      continue
    if kind_of(content) != "labelme":
      problems.note("JSON files that are not labelme's, passed over", [file], shown)
      continue
    name = content["imagePath"] if isinstance(content["imagePath"], str) else ""
    place = os.path.normpath(os.path.join(os.path.dirname(file), name.replace("\\", "/"))).replace(os.sep, "/") if name else file
    beside = next((n for n in (f"{os.path.splitext(file)[0]}{os.path.splitext(name)[1]}",) if (folder/n).is_file()), place)
    size = stated_size(content.get("imageHeight"), content.get("imageWidth"), file, problems)
    entry = Entry(place if (folder/place).is_file() else beside, size, file)
    groups: dict[Any, list[float]] = {}
    for row, shape in enumerate(content["shapes"], 1):
      where = f"{shown(file)} shape {row}"
      if not isinstance(shape, dict) or not isinstance(label := shape.get("label"), str) or not label.strip():
        problems.error("shapes without a label", [where])
        continue
      if (corners := _labelme_box(shape, where, problems)) is None: continue
      group = shape.get("group_id")
      key = (label, group) if isinstance(group, (int, str)) else (label, None, row)
      groups[key] = around_points([*groups.get(key, corners), *corners])
    entry.boxes = [(key[0], corners, number, OBJECT) for number, (key, corners) in enumerate(groups.items(), 1)]
    entries.append(entry)
  if not entries: raise UserError(f"{folder}: no file of labelme is there")
  return listing_of(entries, folder, roots, problems, "imagePath", row_word="object")


def _labelme_box(shape: dict[str, Any], where: str, problems: Problems) -> list[float] | None:
  points, kind = shape.get("points"), shape.get("shape_type") or "polygon"
  if not isinstance(points, list) or not points or not all(isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in points):
    return problems.error("shapes whose points are not pairs of numbers", [where])
  flat = [float(n) for point in points for n in point]
  if kind == "circle" and len(points) == 2:
    radius = math.dist(*points)
    return [flat[0] - radius, flat[1] - radius, flat[0] + radius, flat[1] + radius]
  if kind in ("point", "points", "line", "linestrip") or len(points) < 2: return problems.note(NO_BOX.format("shapes"), [where])
  return around_points(flat)


# ---- Label Studio

def _is_task(row: dict[str, Any]) -> bool:
  if isinstance(row.get("data"), dict) and ("annotations" in row or "completions" in row): return True
  return any(isinstance(value, list) and value and isinstance(value[0], dict) and "original_width" in value[0] for value in row.values())


def read_label_studio(content: list[dict[str, Any]], file: Path, folder: Path, roots: list[Path], problems: Problems) -> Listing:
  """The pictures of the tasks of a Label Studio export, JSON or JSON-MIN. A task that nobody annotated is passed over."""
  entries, unlabelled, several = [], [], []
  for row, task in enumerate(content):
    where = f"task {task.get('id', row) if isinstance(task, dict) else row}"
    if not isinstance(task, dict) or (name := _task_picture(task)) is None:
      problems.error("tasks that name no picture", [where])
      continue
    answers = task.get("annotations", task.get("completions"))
    if isinstance(task.get("data"), dict):
      given = [a for a in answers or [] if isinstance(a, dict) and not a.get("was_cancelled") and isinstance(a.get("result"), list)]
      if len(given) > 1: several.append(where)
      results = given[0]["result"] if given else None
    else:   # JSON-MIN: what was drawn stands among the task's own fields
      lists = [v for v in task.values() if isinstance(v, list) and all(isinstance(x, dict) for x in v)]
      results = [{"value": value, **value} for values in lists for value in values] if lists else None
    if results is None:
      unlabelled.append(where)
      continue
    entry = Entry(name, None, where)
    labels = {r.get("id"): n for r in results if isinstance(r, dict) and (n := _task_label(r)) and r.get("id")}   # shapes and labels may be apart
    for number, result in enumerate(results, 1):
      if not isinstance(result, dict) or not isinstance(value := result.get("value"), dict): continue
      if not {"x", "points"} & value.keys():
        if _task_label(result) and "rle" in value: problems.note(NO_BOX.format("results"), [f"{where} result {number}"])
        continue
      size = stated_size(result.get("original_height"), result.get("original_width"), where, problems)
      if size is None:
        problems.error("results without original_width and original_height", [f"{where} result {number}"])
        continue
      entry.size = size
      if (label := _task_label(result) or labels.get(result.get("id"))) is None:
        problems.note("shapes without a label, passed over", [f"{where} result {number}"])
        continue
      if (corners := _task_box(value, size, f"{where} result {number}", problems)) is not None:
        if not any(box[:2] == (label, corners) for box in entry.boxes): entry.boxes.append((label, corners, number, OBJECT))
    entries.append(entry)
  problems.note("tasks that nobody annotated, passed over", unlabelled)
  problems.odd("tasks annotated more than once, of which the first answer is taken", several)
  if not entries: raise UserError(f"{file}: no task in it is annotated")
  return listing_of(entries, folder, roots, problems, "data.image", row_word="result")


def _task_picture(task: dict[str, Any]) -> str | None:
  data = task["data"] if isinstance(task.get("data"), dict) else task
  texts = {key: value for key, value in data.items() if isinstance(value, str)}
  named = [value for key, value in texts.items() if is_picture(value.partition("?")[0]) or is_picture(value)]
  return next((texts[key] for key in ("image", "img", "url", "picture") if key in texts), named[0] if named else None)


def _task_label(result: dict[str, Any]) -> str | None:
  value = result.get("value")
  if not isinstance(value, dict): return None
  names = next((v for k, v in value.items() if k.endswith("labels") and isinstance(v, list)), [])
  return names[0] if names and isinstance(names[0], str) else None


def _task_box(value: dict[str, Any], size: tuple[int, int], where: str, problems: Problems) -> list[float] | None:
  """xyxy pixels of a shape in hundredths of the picture; a rectangle is turned about its first corner, an ellipse about its middle."""
  across, down = size[1] / 100, size[0] / 100
  if "points" in value:
    points = value["points"]
    if not isinstance(points, list) or not points or not all(isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in points):
      return problems.error("shapes whose points are not pairs of numbers", [where])
    return around_points([n for x, y in points for n in (x * across, y * down)])
  turned = value.get("rotation") or 0
  keys = ("x", "y", "radiusX", "radiusY") if "radiusX" in value else ("x", "y", "width", "height")
  if not all(key in value for key in keys): return problems.note(NO_BOX.format("results"), [where])   # a point
  if not all(_is_number(value[key]) for key in keys) or not _is_number(turned): return problems.error("shapes whose place is not numbers", [where])
  x, y, w, h = (value[key] * scale for key, scale in zip(keys, (across, down, across, down)))
  if turned % 360: problems.odd("rotation, taken as the upright box around the turned one", [where])
  if "radiusX" in value: return around_turned(x, y, 2 * w, 2 * h, math.radians(turned))
  cos, sin = math.cos(math.radians(turned)), math.sin(math.radians(turned))
  return around_points([n for dx, dy in ((0, 0), (w, 0), (w, h), (0, h)) for n in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)])


# ---- VIA

def read_via(content: dict[str, Any], file: Path, folder: Path, roots: list[Path], problems: Problems) -> Listing:
  """The pictures of a VIA project or of the annotations exported from one."""
  rows = content.get("_via_img_metadata", content)
  if not isinstance(rows, dict) or not rows: raise UserError(f"{file}: _via_img_metadata has no picture")
  regions = []
  for key, row in rows.items():
    if not isinstance(row, dict) or not isinstance(row.get("filename"), str):
      problems.error("pictures without a filename", [shown(key)])
      continue
    given = row.get("regions") or []
    regions.append((row["filename"], list(given.values()) if isinstance(given, dict) else given))
  return _via_listing(regions, folder, roots, problems, "filename")


def via_table(rows: Iterable[dict[str, str]], folder: Path, roots: list[Path], problems: Problems) -> Listing:
  """The pictures of VIA's CSV: `rows` as its header names them."""
  regions: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    mine = regions.setdefault(row.get("filename") or row.get("#filename") or "", [])
    if row.get("region_count") == "0": continue
    try: mine.append({"shape_attributes": json.loads(row["region_shape_attributes"] or "{}"),
                      "region_attributes": json.loads(row["region_attributes"] or "{}")})
    except (ValueError, KeyError, RecursionError): problems.error("rows whose regions cannot be read", [shown(row.get("filename"))])
  return _via_listing(list(regions.items()), folder, roots, problems, "filename")


def _via_listing(pictures: list[tuple[str, Any]], folder: Path, roots: list[Path], problems: Problems, said: str) -> Listing:
  entries, key = [], _class_attribute(pictures)
  for name, regions in pictures:
    entry = Entry(name, None, name)
    for number, region in enumerate(regions if isinstance(regions, list) else [], 1):
      where = f"{shown(name)} region {number}"
      shape, about = (region.get(k) if isinstance(region, dict) else None for k in ("shape_attributes", "region_attributes"))
      if not isinstance(shape, dict) or not shape:
        problems.error("regions without shape_attributes", [where])
        continue
      if (corners := _via_box(shape, where, problems)) is None: continue
      label = "object" if key is None else _via_label(about, key)
      if label is None: problems.error(f"regions without the attribute '{key}', their class", [where])
      else: entry.boxes.append((label, corners, number, OBJECT))
    entries.append(entry)
  if key is None and any(entry.boxes for entry in entries):
    problems.odd("regions have no attribute that could be their class, which is taken to be one, 'object'", ["all regions"])
  return listing_of(entries, folder, roots, problems, said, row_word="region")


def _class_attribute(pictures: list[tuple[str, Any]]) -> str | None:
  """The attribute that most regions have, of several the one that sounds most like a class."""
  counts = Counter(key for _, regions in pictures if isinstance(regions, list) for region in regions
                   if isinstance(region, dict) and isinstance(region.get("region_attributes"), dict) for key in region["region_attributes"])
  if not counts: return None
  def rank(key: str) -> tuple[int, int]:
    return (CLASS_ATTRIBUTES.index(key.lower()) if key.lower() in CLASS_ATTRIBUTES else len(CLASS_ATTRIBUTES), -counts[key])
  return min(counts, key=rank)


def _via_label(about: Any, key: str) -> str | None:
  value = about.get(key) if isinstance(about, dict) else None
  if isinstance(value, dict): value = next((name for name, on in value.items() if on), None)   # check boxes
  return value.strip() or None if isinstance(value, str) else None


def _via_box(shape: dict[str, Any], where: str, problems: Problems) -> list[float] | None:
  def numbers(*keys: str) -> list[float] | None:
    values = [shape.get(key) for key in keys]
    return values if all(map(_is_number, values)) else problems.error(f"regions without {', '.join(keys)}", [where])
  kind = shape.get("name")
  if kind == "rect": return (b := numbers("x", "y", "width", "height")) and [b[0], b[1], b[0] + b[2], b[1] + b[3]]
  if kind == "circle": return (b := numbers("cx", "cy", "r")) and [b[0] - b[2], b[1] - b[2], b[0] + b[2], b[1] + b[2]]
  if kind == "ellipse":
    turned = shape.get("theta") if _is_number(shape.get("theta")) else 0.0
    return (b := numbers("cx", "cy", "rx", "ry")) and around_turned(b[0], b[1], 2 * b[2], 2 * b[3], turned)
  if kind in ("polygon", "polyline"):
    xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
    if not (isinstance(xs, list) and isinstance(ys, list) and len(xs) == len(ys) > 1 and all(map(_is_number, [*xs, *ys]))):
      return problems.error("regions whose points are not numbers", [where])
    return [min(xs), min(ys), max(xs), max(ys)]
  return problems.note(NO_BOX.format("regions"), [where])


# ---- shared

def _is_number(value: Any) -> bool: return type(value) in (int, float) and abs(value) <= FARTHEST


def stated_size(height: Any, width: Any, where: str, problems: Problems) -> tuple[int, int] | None:
  """(height, width) where both are stated; a size that can be none is reported."""
  if height is None or width is None: return None
  if all(type(n) is int and 0 < n <= FARTHEST for n in (height, width)): return height, width
  return problems.error("sizes of pictures that are no positive whole numbers", [f"{shown(where)} {shown(width, 20)}x{shown(height, 20)}"])
