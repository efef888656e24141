"""Data sets whose boxes are rows of a CSV file: keras-retinanet's without a header, Open Images', and those that name their columns."""
import csv, io, os, re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from tinydet.datasets.find_pictures import is_picture
from tinydet.datasets.listed import CROWD, FARTHEST, OBJECT, Entry, Listing, listing_of
from tinydet.datasets.native import via_table
from tinydet.datasets.problems import Problems, read_bytes, reason, shown
from tinydet.errors import UserError

MAX_TABLE = 2 ** 32   # bytes; Open Images' training table has 2.3 GB
# What columns are called, in small letters without _ and blanks; the first that is there counts.
COLUMNS = {"picture": ("filename", "imageid", "image", "imagepath", "imagename", "path", "file", "filepath", "img", "imgpath",
                       "imgname", "#filename"),
           "class": ("class", "label", "labelname", "name", "classname", "category", "object", "classes", "species", "type"),
           "xmin": ("xmin", "x1", "left", "bboxxmin", "x0", "bboxleft"), "ymin": ("ymin", "y1", "top", "bboxymin", "y0", "bboxtop"),
           "xmax": ("xmax", "x2", "right", "bboxxmax", "bboxright"), "ymax": ("ymax", "y2", "bottom", "bboxymax", "bboxbottom"),
           "x": ("x", "bboxx", "xleft"), "y": ("y", "bboxy", "ytop"), "w": ("w", "boxwidth", "bboxwidth", "bboxw"),
           "h": ("h", "boxheight", "bboxheight", "bboxh"), "box": ("bbox", "box", "bndbox"),
           "width": ("width", "imagewidth", "imgwidth"), "height": ("height", "imageheight", "imgheight"), "group": ("isgroupof",),
           "split": ("split", "subset", "set", "fold", "partition")}
CORNERS, SIZES = ("xmin", "ymin", "xmax", "ymax"), ("x", "y", "w", "h")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
CLASS_FILES = re.compile(r"(^|.*[-_])(class(es)?|class-descriptions.*|classes-.*|labels?|class_list|label_map)\.csv$", re.I)


def kind_of_table(file: Path) -> str:
  """What a CSV file is: "keras-retinanet", "Open Images", "VIA", "columns", or ""."""
  try:
    with open(file, "rb") as f: head = f.read(65536).decode("utf-8-sig", "replace")
    rows = [row for row in _reader(head.rsplit("\n", 1)[0] if "\n" in head else head) if row][:2]
  except (OSError, csv.Error): return ""
  if not rows: return ""
  names = [_plain(cell) for cell in rows[0]]
  if "regionshapeattributes" in names: return "VIA"
  columns = _columns(rows[0])
  if {"picture", "class"} <= columns.keys() and _box_columns(columns):
    return "Open Images" if "imageid" in names and "labelname" in names else "columns"
  first = rows[0]
  if len(first) == 6 and (is_picture(first[0]) or is_picture(first[0].strip())) and (all(map(_is_number, first[1:5])) or not any(first[1:])):
    return "keras-retinanet"
  return ""


def read_tables(files: dict[str, Path], folder: Path, roots: list[Path], problems: Problems) -> Listing:
  """The pictures of CSV files by split ("" where they have none). A picture with a row but no box is background.

  Corners are pixels from 0; where all are within 0 and 1, as in Open Images, shares of the picture."""
  entries: dict[tuple[str, str], Entry] = {}
  order: list[str] = []
  for split, file in files.items():
    rows, kind = _rows(file), kind_of_table(file)
    if kind == "VIA":
      head = next(rows)
      return via_table((dict(zip(head, row)) for row in rows), folder, roots, problems)
    columns = {name: i for i, name in enumerate(("picture", *CORNERS, "class"))} if kind == "keras-retinanet" else _columns(next(rows))
    names = _class_names(file)
    order = order or (list(names.values()) if kind == "keras-retinanet" else [])
    # pictures beside a file in a folder of its own, as Roboflow's are, belong to it whatever the others are called
    own = file.parent.relative_to(folder).as_posix() if file.parent != folder and file.parent.is_relative_to(folder) else ""
    beside = {name: f"{own}/{name}" for name in os.listdir(file.parent)} if own else {}
    for number, row in enumerate(rows, 1 if kind == "keras-retinanet" else 2):
      _take_row(entries, row, columns, split, file.name, number, names if kind == "Open Images" else {}, beside, problems)
  if not entries: raise UserError(f"{next(iter(files.values()))}: has no row with a picture")
  corners = [box[1] for entry in entries.values() for box in entry.boxes]
  fractions = bool(corners) and all(0 <= c <= 1 for box in corners for c in box) and any(c % 1 for box in corners for c in box)
  return listing_of(list(entries.values()), folder, roots, problems, "the column of pictures", order, fractions, "line")


def _take_row(entries: dict[tuple[str, str], Entry], row: list[str], columns: dict[str, int], split: str, file: str, number: int,
              names: dict[str, str], beside: dict[str, str], problems: Problems) -> None:
  where = f"{file} line {number}"
  def cell(key: str) -> str: return row[columns[key]].strip() if columns.get(key, len(row)) < len(row) else ""
  if not any(map(str.strip, row)): return
  if not (picture := cell("picture")): return problems.error("rows without a picture", [where])
  if not os.path.splitext(picture)[1]: picture += ".jpg"   # Open Images names them by their ids
  picture, split = beside.get(picture, picture), SPLIT_WORDS.get(cell("split").lower(), split)
  size = None
  if all(map(_is_number, (cell("width"), cell("height")))): size = int(float(cell("height"))), int(float(cell("width")))
  if size is not None and min(size) < 1: return problems.error("rows whose width and height are no size", [where])
  entry = entries.setdefault((split, picture), Entry(picture, size, file, split=split))
  keys = _box_columns(columns)
  texts = _numbers(cell("box")) if keys == ("box",) else [cell(key) for key in keys]
  label = cell("class")
  if not any(texts): return   # background
  if len(texts) != 4 or not all(map(_is_number, texts)):
    return problems.error("rows whose box is not four numbers of at most a million", [f"{where} {shown(','.join(row), 60)}"])
  if not label: return problems.error("rows with a box and without a class", [where])
  numbers = [float(text) for text in texts]
  corners = numbers if keys == CORNERS else [numbers[0], numbers[1], numbers[0] + numbers[2], numbers[1] + numbers[3]]
  if corners[2] < corners[0] or corners[3] < corners[1]: return problems.error("boxes of negative width or height", [where])
  entry.boxes.append((names.get(label, label), corners, number, CROWD if cell("group") == "1" else OBJECT))


def _numbers(text: str) -> list[str]:
  """The texts of the numbers in "[1, 2, 3, 4]"; none where it is no such list."""
  return [part.strip() for part in text.strip().strip("[]()").split(",")] if text.strip() else []


def _rows(file: Path) -> Any:
  try: text = read_bytes(file, MAX_TABLE).decode("utf-8-sig")
  except OSError as e: raise UserError(f"{file}: cannot be opened ({e.strerror})") from e
  except ValueError as e: raise UserError(f"{file}: is not a table that can be read ({reason(e)})") from e
  reader = _reader(text)
  while True:
    try: row = next(reader)
    except StopIteration: return
    except csv.Error as e: raise UserError(f"{file}: is not a table that can be read ({reason(e)}, line {reader.line_num})") from e
    if row: yield row


def _reader(text: str) -> Any:
  """Rows of a table whose cells are apart by what its first line has most of: commas, the semicolons of spreadsheets where commas are in numbers, or
  tabs."""
  first = text[:65536].lstrip("\r\n").split("\n", 1)[0]
  return csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count))


def _class_names(file: Path) -> dict[str, str]:
  """What a list of classes beside a table says: keras-retinanet's name -> name in the order of the numbers, Open Images' id -> name."""
  for other in sorted(file.parent.glob("*.csv")):
    if other == file or not CLASS_FILES.match(other.name): continue
    pairs = [row for row in _rows(other) if len(row) == 2]
    if pairs and all(row[1].strip().isdigit() for row in pairs):
      return {name.strip(): name.strip() for name, _ in sorted(pairs, key=lambda row: int(row[1]))}
    if pairs and all(row[0].startswith("/") for row in pairs): return {id.strip(): name.strip() for id, name in pairs}
  return {}


def _columns(head: Sequence[str]) -> dict[str, int]:
  plain = [_plain(cell) for cell in head]
  return {key: plain.index(name) for key, names in COLUMNS.items() if (name := next((n for n in names if n in plain), None)) is not None}


def _box_columns(columns: dict[str, int]) -> tuple[str, ...]:
  """Which columns are the box: corners, x, y and sizes, or one; none where there is none."""
  if set(CORNERS) <= columns.keys(): return CORNERS
  if set(SIZES) <= columns.keys(): return SIZES
  return ("box",) if "box" in columns else ()


def _plain(cell: str) -> str: return re.sub(r"[_\s-]", "", cell.strip().lower())


def _is_number(text: str) -> bool:
  return bool(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", text)) and abs(float(text)) <= FARTHEST
