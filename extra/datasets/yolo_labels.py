"""Data sets in YOLO's form: a text file a picture, a line a box (class, centre, width, height in shares of it), and perhaps a `data.yaml`."""
import json, os, re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
import yaml
from tinydet.datasets.find_pictures import SUFFIXES, find_pictures, folders_in, is_picture, walk_files
from tinydet.datasets.listed import Listed, Listing
from tinydet.datasets.outlines import around_points
from tinydet.datasets.problems import Problems, read_bytes, reason, shown
from tinydet.errors import UserError

MAX_TEXT = 32_000_000   # bytes of a label file, a YAML file, or a list of names
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
LINE = re.compile(rf"\s*\d+(\.0*)?(\s+{NUMBER}){{4,}}\s*$")
NAME_FILES = ("classes.txt", "obj.names", "classes.names", "predefined_classes.txt", "class_names.txt", "labels.txt", "names.txt", "_darknet.labels")
NOT_LABELS = {*NAME_FILES, "train.txt", "val.txt", "valid.txt", "test.txt", "readme.txt", "readme.dataset.txt", "readme.roboflow.txt"}
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
LOOKED_AT = 20          # text files, to see whether they are labels


@dataclass(frozen=True)
class Yolo:
  """Where a data set in this form is: its folder, the folders or lists of pictures of each split ("all" without one), and what its settings say."""
  root: Path
  splits: dict[str, list[Path]]
  class_names: list[str] | None = None
  named_in: str = ""              # the file that has the class names
  keypoints: bool = False
  notes: tuple[tuple[str, str], ...] = field(default=())   # oddities of the settings: kind, name


def find_yolo(place: Path) -> tuple[str, Yolo] | None:
  """Why `place`, a folder or a YAML file, is taken for this form, and where its parts are; None where it is not. UserError for a broken YAML file."""
  if place.is_file(): return (f"{place.name} is its settings", _of_yaml(place)) if place.suffix.lower() in (".yaml", ".yml") else None
  for file in sorted(place.glob("*.y*ml"), key=lambda p: (p.stem not in ("data", "dataset"), p.name)):
    if file.suffix.lower() in (".yaml", ".yml") and _names_data(file): return f"{file.name} names its parts", _of_yaml(file)
  if (file := next((f for f in (place/"obj.data", *sorted(place.glob("*.data"))) if f.is_file()), None)) is not None and (found := _of_darknet(file)):
    return f"{file.name} names its parts", found
  return _of_folders(place)


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


# ---- labels

def _label_files(picture: str) -> Iterator[str]:
  """Where the labels of a picture may be, relative paths: `labels` in place of its last folder `images`, or beside it."""
  parts, stem = picture.split("/"), os.path.splitext(picture.rsplit("/", 1)[-1])[0] + ".txt"
  for at in range(len(parts) - 2, -1, -1):
    if parts[at].lower() == "images": yield "/".join([*parts[:at], "Labels" if parts[at] == "Images" else "labels", *parts[at + 1:-1], stem]); break
  yield "/".join([*parts[:-1], stem])
  yield "/".join(["labels", *parts[:-1], stem])
  if len(parts) > 1: yield "/".join([*parts[:-2], "labels", stem])


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


# ---- where the parts are

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


def _settings(file: Path) -> Any:
  try: return yaml.load(read_bytes(file, MAX_TEXT).decode("utf-8-sig"), Loader=yaml.BaseLoader)   # all texts: a class may be called no
  except OSError as e: raise UserError(f"{file}: cannot be opened ({e.strerror})") from e
  except (ValueError, RecursionError) as e: raise UserError(f"{file}: is not a YAML file that can be read ({reason(e)})") from e
  except yaml.YAMLError as e:
    mark = getattr(e, "problem_mark", None)
    raise UserError(f"{file}: is not a YAML file: {shown(getattr(e, 'problem', None) or e)}" + (f", line {mark.line + 1}" if mark else "")) from e


def _names_data(file: Path) -> bool:
  """Whether a YAML file is a data set's settings; one that is broken is taken for them where it is called so, to be told."""
  try: content = _settings(file)
  except UserError: return file.stem == "data"
  return isinstance(content, dict) and ("names" in content or "nc" in content) and bool({"train", "val", "test", "path"} & content.keys())


def _of_yaml(file: Path) -> Yolo:
  content = _settings(file)
  if not isinstance(content, dict): raise UserError(f"{file}: is no data set's settings; expected train, val and names")
  root, notes, splits = file.parent, [], {}
  base = content.get("path")
  bases = [root] if not isinstance(base, str) or not base else [Path(base).expanduser(), root/base, root]
  for ours, theirs in SPLITS.items():
    given = next((content[name] for name in theirs if content.get(name)), None)
    entries = given if isinstance(given, list) else [given] if given else []
    if not all(isinstance(entry, str) and entry for entry in entries):
      raise UserError(f"{file}: {ours}: expected a folder, a list of pictures, or several of them")
    places = []
    for entry in entries:
      place, as_written = _resolve(entry, bases, root)
      if place is None: notes.append((f"folders that {file.name} names and that are not there", f"{ours}: {shown(entry)}"))
      else:
        places.append(place)
        if not as_written: notes.append((f"folders that {file.name} names otherwise", f"{shown(entry)} is {os.path.relpath(place, root)}"))
    if places and len(places) == len(entries): splits[ours] = places
  if not splits:
    if (found := _of_folders(root)) is None:
      raise UserError(f"{file}: train and val name no folder that is there, " + (", ".join(name for _, name in notes) or "for it has neither"))
    splits = found[1].splits
  names = _class_names(file, content, notes)
  return Yolo(root, splits, names, file.name, "kpt_shape" in content, tuple(notes))


def _resolve(entry: str, bases: Sequence[Path], root: Path) -> tuple[Path | None, bool]:
  """The folder or list that an entry of a YAML file means, and whether it is where the file says. Roboflow's climb one folder too many, and other
  tools' are those of another machine: then the ends of the path are tried beside the file."""
  entry = entry.replace("\\", "/")
  for base in bases:
    if (base/entry).exists(): return Path(os.path.normpath(base/entry)), True
  parts = [part for part in entry.split("/") if part not in ("", ".", "..")]
  for at in range(len(parts)):
    if (place := root.joinpath(*parts[at:])).exists(): return place, entry.startswith("../") and at == 0
  return None, False


def _class_names(file: Path, content: dict, notes: list[tuple[str, str]]) -> list[str] | None:
  names = content.get("names")
  if isinstance(names, dict):
    if not all(re.fullmatch(r"\d{1,6}", key) for key in names): raise UserError(f"{file}: names: its keys are not the class numbers from 0")
    by_number = {int(key): name for key, name in names.items()}
    if gaps := sorted(set(range(max(by_number, default=-1) + 1)) - by_number.keys()):
      if len(gaps) > 1000: raise UserError(f"{file}: names: has {len(by_number)} classes and numbers up to {max(by_number)}")
      notes.append((f"class numbers without a name in {file.name}, called by their number", ", ".join(map(str, gaps[:10]))))
    names = [by_number.get(i, str(i)) for i in range(max(by_number, default=-1) + 1)]
  if names is None or names == "": return _names_beside(file.parent)[0]
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
    raise UserError(f"{file}: names: expected the classes' names, as a list or by number")
  if (count := content.get("nc")) and count != str(len(names)):
    notes.append((f"nc of {file.name} is not the number of its names, which is taken", f"{shown(count)} and {len(names)}"))
  return names


def _of_darknet(file: Path) -> Yolo | None:
  """What a `.data` file of darknet says, as CVAT writes it."""
  try: lines = read_bytes(file, MAX_TEXT).decode("utf-8-sig").splitlines()
  except (OSError, ValueError): return None
  content = {key.strip(): value.strip() for key, equals, value in (line.partition("=") for line in lines) if equals}
  if "train" not in content and "valid" not in content: return None
  splits, notes = {}, []
  for ours, theirs in (("train", "train"), ("val", "valid"), ("test", "test")):
    if (entry := content.get(theirs)) and (place := _resolve(entry, [file.parent], file.parent)[0]) is not None: splits[ours] = [place]
  if not splits: return None
  if set(splits) == {"train"} or splits.get("val") == splits.get("train"): splits = {"all": splits["train"]}
  where = _resolve(content["names"], [file.parent], file.parent)[0] if "names" in content else None
  names = (_lines(where), where.name) if where is not None else _names_beside(file.parent)
  return Yolo(file.parent, splits, *names, notes=tuple(notes))


def _of_folders(folder: Path) -> tuple[str, Yolo] | None:
  """Where pictures and labels are in a folder without settings."""
  def below(*names: str) -> Path | None:
    here = folder
    for name in names:
      if (here := folders_in(here).get(name)) is None: return None
    return here
  pairs = [("images/{0} and labels/{0}", lambda n: (below("images", n), below("labels", n))),
           ("{0}/images and {0}/labels", lambda n: (below(n, "images"), below(n, "labels"))),
           ("pictures and labels in {0}/", lambda n: (below(n), below(n)))]
  for why, places in pairs:
    both = {ours: next((p for n in names if all(p := places(n)) and _has_labels(p[1])), None) for ours, names in SPLITS.items()}
    splits = {ours: [found[0]] for ours, found in both.items() if found}
    if splits: return why.format(next(iter(splits))), Yolo(folder, splits, *_names_beside(folder, *(p[0] for p in splits.values())))
  images, labels, inside = below("images"), below("labels"), below("obj_train_data")
  own = any(is_picture(e.name) for e in os.scandir(folder))
  if images and labels and _has_labels(labels): why, place = "images/ and labels/", images
  elif inside and _has_labels(inside): why, place = "obj_train_data/", inside
  elif images and _has_labels(images): why, place = "pictures and labels in images/", images
  elif labels and own and _has_labels(labels): why, place = "labels/ beside the pictures", folder
  elif own and _has_labels(folder): why, place = "a text file of boxes beside each picture", folder
  else: return None
  lists = {ours: next((f for n in names if (f := folder/f"{n}.txt").is_file() and _lists_pictures(f)), None) for ours, names in SPLITS.items()}
  splits = {ours: [file] for ours, file in lists.items() if file}
  if "train" in splits: why = f"{why}, train.txt"
  else: splits = {"all": [place]}
  return why, Yolo(folder, splits, *_names_beside(folder, place))


def _has_labels(folder: Path) -> bool:
  """Whether the text files in a folder are labels, going by the first that are not empty."""
  looked = 0
  for name in walk_files(folder, (".txt",)):
    if name.rsplit("/", 1)[-1].lower() in NOT_LABELS or not os.path.getsize(folder/name): continue
    try: first = next((line for line in read_bytes(folder/name, MAX_TEXT).decode("utf-8-sig").splitlines() if line.strip()), "")
    except (OSError, ValueError): first = ""
    if LINE.match(first): return True
    if (looked := looked + 1) == LOOKED_AT: break
  return False


def _lists_pictures(file: Path) -> bool:
  try: first = read_bytes(file, MAX_TEXT).decode("utf-8-sig").split("\n", 1)[0].strip()
  except (OSError, ValueError): return False
  return first.lower().endswith(SUFFIXES)


def _names_beside(folder: Path, *others: Path) -> tuple[list[str] | None, str]:
  """Class names from a file of them in the folder, in `labels/` or with the pictures, and that file's name; None where there is none."""
  for place in (folder, folder/"labels", folder/"labels"/"train", *others, *(o.parent/"labels" for o in others)):
    for name in NAME_FILES:
      if (place/name).is_file() and (names := _lines(place/name)): return names, name
    if (place/"notes.json").is_file():   # Label Studio's
      try: categories = json.loads(read_bytes(place/"notes.json", MAX_TEXT))["categories"]
      except (OSError, ValueError, KeyError, TypeError, RecursionError): continue
      if isinstance(categories, list) and categories and all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in categories):
        return [c["name"] for c in categories], "notes.json"
  return None, ""


def _lines(file: Path) -> list[str]:
  try: lines = [line.strip() for line in read_bytes(file, MAX_TEXT).decode("utf-8-sig").splitlines()]
  except (OSError, ValueError) as e: raise UserError(f"{file}: is not a list of class names ({reason(e)})") from e
  while lines and not lines[-1]: lines.pop()
  return lines
