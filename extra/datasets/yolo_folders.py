"""Where the parts of a data set in YOLO's form are: a `data.yaml`, darknet's `.data`, or folders that are laid out so."""
import json, os, re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
import yaml
from tinydet.datasets.find_pictures import SUFFIXES, folders_in, is_picture, walk_files
from tinydet.datasets.problems import read_bytes, reason, shown
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
