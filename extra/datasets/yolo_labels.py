"""Data sets in YOLO's form: a text file a picture, a line a box (class, centre, width, height in shares of it)."""
import os, re
from collections.abc import Iterator
from pathlib import Path
from tinydet.datasets.find_pictures import find_pictures, walk_files
from tinydet.datasets.listed import Listed, Listing
from tinydet.datasets.outlines import around_points
from tinydet.datasets.problems import Problems, read_bytes, reason, shown
from tinydet.datasets.yolo_folders import MAX_TEXT, NOT_LABELS, NUMBER, Yolo
from tinydet.errors import UserError


def open_yolo(yolo: Yolo, split: str, strict: bool) -> Listed:
  """The pictures of a split. A picture with an empty label file is background, and so is one without a file, which is counted.

  UserError with all that cannot be mended, and with `strict` all oddities too."""
  problems = Problems(yolo.root, strict)
  for what, name in yolo.notes: problems.odd(what, [name])
  listing = Listing(yolo.root, fractions=True)
  names, labels = _pictures(yolo, split, problems), {}
  for name in names:
    if (label := next((p for p in _label_files(name) if os.path.isfile(yolo.root/p)), None)) is not None: labels[name] = label
  if names and not labels:
    raise UserError(f"{yolo.root}: no picture of the split '{split}' has a label file; looked for {next(_label_files(names[0]))} for {names[0]}")
  problems.note("pictures without a label file, taken as background", [n for n in names if n not in labels], shown)
  problems.note("label files without a picture, passed over", _unused(yolo.root, labels), shown)
  if yolo.class_names is None:
    problems.odd("no file names the classes (data.yaml, classes.txt), so their numbers are their names", [yolo.root.name])
  for name in names:
    image = listing.picture(name, None, labels.get(name, name))
    if name in labels: _read_labels(listing, image, yolo, labels[name], problems)
  listing.class_names = yolo.class_names or [str(i) for i in range(class_numbers(yolo))]
  again = {n for n in listing.class_names if listing.class_names.count(n) > 1}
  problems.error(f"class names used more than once in {yolo.named_in}", sorted(again), shown)
  return Listed(f"{yolo.root.resolve().name}/{split}", listing, problems)


def class_numbers(yolo: Yolo) -> int:
  """One more than the highest class number in the label files of all splits, for data sets that do not name their classes."""
  most, problems = -1, Problems(yolo.root, False)
  for split in yolo.splits:
    for name in _pictures(yolo, split, problems):
      if (label := next((p for p in _label_files(name) if os.path.isfile(yolo.root/p)), None)) is None: continue
      for line in (yolo.root/label).read_bytes().split(b"\n"):
        if (word := line.split(None, 1)[:1]) and word[0].isdigit() and len(word[0]) < 6: most = max(most, int(word[0]))
  return most + 1


def _label_files(picture: str) -> Iterator[str]:
  """Where the labels of a picture may be, relative paths: `labels` in place of its last folder `images`, or beside it."""
  parts, stem = picture.split("/"), os.path.splitext(picture.rsplit("/", 1)[-1])[0]
  places = [[*parts[:-1]], ["labels", *parts[:-1]], *([[*parts[:-2], "labels"]] if len(parts) > 1 else [])]
  if (at := next((i for i in range(len(parts) - 2, -1, -1) if parts[i].lower() == "images"), None)) is not None:
    places.insert(0, [*parts[:at], "Labels" if parts[at] == "Images" else "labels", *parts[at + 1:-1]])
  for place in places:
    for suffix in (".txt", ".TXT"): yield "/".join([*place, stem + suffix])


def _unused(root: Path, labels: dict[str, str]) -> list[str]:
  used = set(labels.values())
  folders = {os.path.dirname(label) for label in used}
  return sorted(path for folder in folders for entry in os.scandir(root/folder)
                if entry.name.lower().endswith(".txt") and entry.name.lower() not in NOT_LABELS
                and (path := f"{folder}/{entry.name}".lstrip("/")) not in used)


def _read_labels(listing: Listing, image: int, yolo: Yolo, label: str, problems: Problems) -> None:
  try: text = read_bytes(yolo.root/label, MAX_TEXT).decode("utf-8-sig") if os.path.getsize(yolo.root/label) else ""
  except (OSError, ValueError) as e: return problems.error("label files that cannot be read", [f"{shown(label)} ({reason(e)})"])
  for row, line in enumerate(text.splitlines(), 1):
    if not (words := line.split()): continue
    where = f"{shown(label)} line {row}"
    if len(words) < 5 or not all(re.fullmatch(NUMBER, word) for word in words) or float(words[0]) % 1 or float(words[0]) < 0:
      problems.error("lines that are not a class number and four shares of the picture (centre x, y, width, height)", [f"{where} {shown(line, 40)}"])
      continue
    number, values = int(float(words[0])), [float(word) for word in words[1:]]
    if yolo.class_names is not None and number >= len(yolo.class_names):
      problems.error(f"class numbers of which {yolo.named_in} has no name", [f"{where} {number}"])
      continue
    if (corners := _corners(values, where, yolo.keypoints, problems)) is not None:
      listing.box(image, number, corners, row, flat=corners[2] <= corners[0] or corners[3] <= corners[1])


def _corners(values: list[float], where: str, keypoints: bool, problems: Problems) -> list[float] | None:
  """xyxy in shares of the picture; None after reporting that there is no box. More than four values are a score, keypoints, or an outline."""
  outline = len(values) > 5 and not keypoints
  if outline and len(values) % 2: return problems.error("lines with an odd number of coordinates", [where])
  if len(values) == 5: problems.odd("lines with a sixth column, taken for a score and passed over", [where])
  if outline: problems.note("lines with outlines, taken as the boxes around them", [where])
  elif len(values) > 5: problems.note("lines with keypoints, of which the box is taken", [where])
  shares = values if outline else values[:4]
  if max(map(abs, shares)) > 2: return problems.error("numbers that are no shares of the picture, 0 to 1", [f"{where} {max(shares, key=abs):g}"])
  if not outline and min(shares[2:]) < 0: return problems.error("boxes of negative width or height", [where])
  if not (-1e-6 <= min(shares) and max(shares) <= 1 + 1e-6): problems.odd("boxes with numbers out of 0 to 1, clipped to the picture", [where])
  if outline: return around_points(shares)
  x, y, width, height = shares
  return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def _pictures(yolo: Yolo, split: str, problems: Problems) -> list[str]:
  """The pictures of a split, paths relative to the root."""
  found: dict[str, None] = {}
  for place in yolo.splits[split]:
    if place.is_dir():
      inside = os.path.relpath(place, yolo.root).replace(os.sep, "/")
      names = [name if inside == "." else f"{inside}/{name}" for name in walk_files(place)]
      if not names: problems.error(f"folders of the split '{split}' without a picture", [shown(inside)])
    else: names = _listed(yolo.root, place, problems)
    found |= dict.fromkeys(names)
  return list(found)


def _listed(root: Path, file: Path, problems: Problems) -> list[str]:
  """The pictures that a list of paths names."""
  try: lines = [line.strip() for line in read_bytes(file, MAX_TEXT).decode("utf-8-sig").splitlines() if line.strip()]
  except (OSError, ValueError) as e: raise UserError(f"{file}: is not a list of pictures ({reason(e)})") from e
  lines = [line.removeprefix("./") for line in dict.fromkeys(lines)]
  inside = os.path.relpath(file.parent, root).replace(os.sep, "/")
  known = [name if os.path.isfile(root/name) else f"{inside}/{name}" if os.path.isfile(file.parent/name) else None for name in lines]
  there = [i for i, name in enumerate(known) if name is not None and not os.path.isabs(name)]
  rest = [i for i in range(len(lines)) if i not in set(there)]
  moved, _ = find_pictures(problems, root, [lines[i] for i in rest], [root, file.parent], f"lines of {file.name}") if rest else ([], [])
  for i, name in zip(rest, moved): known[i] = name
  return [os.path.normpath(name).replace(os.sep, "/") for name in known if name is not None]
