"""Which layout a folder or file of annotations has: a table, in the order in which they are tried. Another layout is another row."""
import os, re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from tinydet.datasets import cvat, native, tables, voc, yolo_folders, yolo_labels
from tinydet.datasets.coco import LARGE, Coco
from tinydet.datasets.find_pictures import SPLIT_NAMES, SUFFIXES, folders_in, is_picture, of_another_split, walk_files
from tinydet.datasets.listed import Listed, Listing
from tinydet.datasets.problems import Problems, shown
from tinydet.datasets.split import Rule, part_of
from tinydet.datasets.subset import Part
from tinydet.errors import UserError

SPLIT_WORD = re.compile(r"(?:^|[^a-z])(train|valid|validation|val|test)(?:ing)?(?:[^a-z]|$)", re.I)
USUAL = re.compile("annot|instance|coco|via|result|dataset", re.I)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
MANY = 12   # JSON files in a folder: of more, only those that a data set's would be called like are looked into


@dataclass(frozen=True)
class Found:
  """A data set that was recognised: why, and how each of its splits is opened, `open(strict)`; "all" is a data set that does not say its splits."""
  layout: str
  why: str
  splits: dict[str, Callable[[bool], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
  """Where to look: a folder, or a file of annotations and its folder, and the folder that --images names."""
  folder: Path
  file: Path | None = None
  images: Path | None = None

  @property
  def roots(self) -> list[Path]: return [self.images] if self.images else [self.folder]

  def files(self, suffix: str) -> list[Path]:
    """The files of a suffix in the folder and in those that annotations or a split may be in."""
    if self.file is not None: return [self.file] if self.file.suffix.lower() == suffix else []
    names = {"annotations", "annotation", "labels", *(n for names in SPLIT_NAMES.values() for n in names)}
    folders = [self.folder, *(path for name, path in folders_in(self.folder).items() if name in names)]
    found = [Path(e.path) for folder in folders for e in os.scandir(folder) if e.name.lower().endswith(suffix) and not e.name.startswith(".")]
    found = sorted(p for p in found if os.path.isfile(p))
    return found if len(found) <= MANY else [p for p in found if SPLIT_WORD.search(p.stem) or USUAL.search(p.stem)]


# ---- COCO

def _coco_by_names(place: Place) -> Found | None:
  """The names that COCO itself and Roboflow give their files."""
  if place.file is not None: return None
  folder, splits, files_of = place.folder, {}, {}
  for split, names in SPLIT_NAMES.items():
    patterns = [p for n in names for p in (f"annotations/instances_{n}*.json", f"{n}.json", f"{n}/_annotations.coco.json")]
    if files := sorted({file for pattern in patterns for file in folder.glob(pattern)}): files_of[split] = files
  if files_of.keys() <= {"test"}: return None
  for split, files in files_of.items():
    splits[split] = partial(_ambiguous, folder, split, files) if len(files) > 1 else partial(_open_coco, files[0], place, split)
  return Found("COCO", ", ".join(str(files[0].relative_to(folder)) for files in files_of.values()), splits)


def _ambiguous(folder: Path, split: str, files: list[Path], strict: bool) -> Any:
  raise UserError(f"{folder}: {' and '.join(str(f.relative_to(folder)) for f in files)} may both be '{split}'; keep one, or name it with --data")


def _coco_by_content(place: Place) -> Found | None:
  """Files of any name that have what COCO's have: CVAT's, Label Studio's, labelme2coco's, LVIS."""
  files = [file for file in place.files(".json") if _kind(file) == "COCO"]
  if not files: return None
  by_split: dict[str, list[Path]] = {}
  for file in files: by_split.setdefault("all" if place.file else _split_word(file, place.folder), []).append(file)
  names = {key: by_split[key] for key in SPLIT_NAMES if key in by_split} if "train" in by_split else {}
  if not names: names = {"all": by_split.get("all") or files}
  return Found("COCO", ", ".join(str(fs[0].relative_to(place.folder)) for fs in names.values()), {
    split: partial(_ambiguous, place.folder, split, fs) if len(fs) > 1 else partial(_open_coco, fs[0], place, split) for split, fs in names.items()})


def _split_word(file: Path, folder: Path) -> str:
  words = SPLIT_WORD.findall(file.stem) or SPLIT_WORD.findall(str(file.parent.relative_to(folder)))
  return {"valid": "val", "validation": "val"}.get(words[-1].lower(), words[-1].lower()) if words else "all"


def _open_coco(file: Path, place: Place, split: str, strict: bool) -> Coco:
  folder, tail = place.folder, file.stem.removeprefix("instances_")
  if place.images: return Coco(file, place.images, strict, place.roots, split)
  if file.name == "_annotations.coco.json": return Coco(file, file.parent, strict, place.roots, split)
  names = SPLIT_NAMES.get(split, ())
  usual = ("images", "JPEGImages", "data", "imgs")
  places = [folder/p for p in dict.fromkeys([tail, *names, f"images/{tail}", *(f"images/{n}" for n in names), *usual])]
  places += [file.parent] * (file.parent != folder) + [folder]
  for here in places:
    shared = here in (file.parent, folder)   # with the annotations
    if here.is_dir() and not (shared and not any(is_picture(e.name) for e in os.scandir(here))): return Coco(file, here, strict, place.roots, split)
  if any(not of_another_split(name, split) for name in walk_files(folder)): return Coco(file, folder, strict, split=split)
  looked = ", ".join(f"{p.relative_to(folder)}/" for p in places[:-1] if p != file.parent)
  raise UserError(f"{file}: no folder with its images; looked for {looked} in {folder}; name it with --images")


def _kind(file: Path) -> str:
  """Which tool's JSON a file is, as `native.kind_of` says; of a large one its beginning is looked at."""
  try:
    if file.stat().st_size <= LARGE: return native.kind_of(native.read_json(file))
    with open(file, "rb") as f: head = f.read(2 ** 20)
  except (OSError, UserError): return ""
  return "COCO" if re.search(rb'"(images|annotations|categories)"\s*:\s*\[', head) else ""


# ---- Pascal VOC

def _voc(place: Place) -> Found | None:
  if place.file is not None or (places := voc.find_places(place.folder)) is None: return None
  if place.images: places = voc.Places(places.annotations, place.images, places.lists)
  where = {places.annotations: "", places.pictures: ""}
  names = [f"{os.path.relpath(p, place.folder)}/".replace("./", "the folder") for p in where]
  why = f"XML files in {names[0]}, pictures in {names[-1]}" + (", ImageSets/" if places.lists else "")
  return Found("Pascal VOC", why, {split: partial(_open_voc, place.folder, name, places) for split, name in voc.find_lists(places).items()})


def _open_voc(folder: Path, name: str | None, places: voc.Places, strict: bool) -> voc.Voc: return voc.Voc(folder, name, strict, places)


# ---- YOLO

def _yolo(place: Place) -> Found | None:
  if (found := yolo_folders.find_yolo(place.file or place.folder)) is None: return None
  why, parts = found
  return Found("YOLO", why, {split: partial(yolo_labels.open_yolo, parts, split) for split in parts.splits})


# ---- the own files of tools

def _one_file(tool: str, files: list[Path], name: str, read: Callable[[Problems], Listing], place: Place) -> Found | None:
  """The data set `name` that the first of `files` is; of several it cannot be said which is meant."""
  if not files: return None
  if len(files) > 1: return Found(tool, files[0].name, {"all": partial(_ambiguous, place.folder, "all", files)})
  def open_it(strict: bool) -> Listed:
    problems = Problems(files[0], strict)
    return Listed(name, read(problems), problems)
  return Found(tool, str(files[0].relative_to(place.folder)), {"all": open_it})


def _own_json(tool: str, read: Callable[..., Listing], place: Place) -> Found | None:
  files = [file for file in place.files(".json") if _kind(file) == tool]
  def read_it(problems: Problems) -> Listing: return read(native.read_json(files[0]), files[0], _pictures_folder(place), place.roots, problems)
  return _one_file(tool, files, files[0].stem if files else "", read_it, place)


def _cvat(place: Place) -> Found | None:
  files = [file for file in place.files(".xml")[:MANY] if cvat.is_cvat(file)]
  def read_it(problems: Problems) -> Listing: return cvat.read_cvat(files[0], _pictures_folder(place), place.roots, problems)
  return _one_file("CVAT", files, place.folder.resolve().name, read_it, place)


def _labelme(place: Place) -> Found | None:
  if place.file is not None and (place.file.suffix.lower() != ".json" or _kind(place.file) != "labelme"): return None
  names = walk_files(place.folder, (".json",))[:3]
  if not any(_kind(place.folder/name) == "labelme" for name in names): return None
  def open_it(strict: bool) -> Listed:
    problems = Problems(place.folder, strict)
    return Listed(place.folder.resolve().name, native.read_labelme(place.folder, place.roots, problems), problems)
  return Found("labelme", f"{names[0]} is a picture's", {"all": open_it})


def _tables(place: Place) -> Found | None:
  files = [file for file in place.files(".csv") if tables.kind_of_table(file)]
  if not files: return None
  by_split: dict[str, list[Path]] = {}
  for file in files: by_split.setdefault("all" if place.file else _split_word(file, place.folder), []).append(file)
  chosen = {key: by_split[key] for key in SPLIT_NAMES if key in by_split} if "train" in by_split else {"all": by_split.get("all") or files}
  kind = tables.kind_of_table(next(iter(chosen.values()))[0])
  def open_it(strict: bool) -> Listed:
    for split, several in chosen.items():
      if len(several) > 1: _ambiguous(place.folder, split, several, strict)
    problems = Problems(place.file or place.folder, strict)
    by_name = {"" if split == "all" else split: several[0] for split, several in chosen.items()}
    listing = tables.read_tables(by_name, _pictures_folder(place), place.roots, problems)
    return Listed((place.file or place.folder.resolve()).stem, listing, problems)
  where = ", ".join(str(several[0].relative_to(place.folder)) for several in chosen.values())
  return Found("CSV" if kind == "columns" else f"CSV of {kind}", where, {"all": open_it})


def _pictures_folder(place: Place) -> Path:
  """The folder that names of pictures begin at: that of --images, `images/` or the like where it alone has pictures, else the folder."""
  if place.images: return place.images
  if any(is_picture(e.name) for e in os.scandir(place.folder)): return place.folder
  return next((path for name, path in folders_in(place.folder).items() if name in voc.PICTURES), place.folder)


# ---- the table

@dataclass(frozen=True)
class Layout:
  """How a layout is told from others: what is looked for, in words, and the function that looks."""
  name: str
  looks_for: str
  find: Callable[[Place], Found | None]


LAYOUTS = (
  Layout("COCO", "annotations/instances_{split}*.json, {split}.json or {split}/_annotations.coco.json", _coco_by_names),
  Layout("CVAT", "its own XML for images", _cvat),
  Layout("Pascal VOC", "Annotations/ with JPEGImages/, or XML files beside the pictures", _voc),
  Layout("YOLO", "data.yaml, or images/ with labels/", _yolo),
  Layout("COCO", "one JSON file with images, annotations and categories (CVAT, Label Studio, LVIS)", _coco_by_content),
  Layout("Label Studio", "its JSON export", partial(_own_json, "Label Studio", native.read_label_studio)),
  Layout("VIA", "its project or JSON export", partial(_own_json, "VIA", native.read_via)),
  Layout("CSV", "a table with a row a box (keras-retinanet, Open Images, VIA, or with named columns)", _tables),
  Layout("labelme", "a JSON file beside each picture", _labelme),
)


def recognise(spec: str | Path, images: str | Path | None = None, split: str = "train") -> tuple[Found, list[str]]:
  """The data set that a folder or a file of annotations is, and the names of other layouts that the folder has as well.

  A folder that has none, but one folder that has one, is taken for an unpacked archive. UserError where nothing is recognised, for `split`."""
  path, pictures = Path(spec), None if images is None else Path(images)
  if pictures is not None and not pictures.is_dir(): raise UserError(f"--images {images}: is no folder")
  if path.is_file(): return _of_file(path, pictures)
  if not os.path.isdir(path): raise UserError(f"{spec}: is neither a folder nor one of the embedded data sets, shapes:1 and shapes:2")
  try:
    if found := _all(Place(path, images=pictures)): return found[0], sorted({f.layout for f in found[1:]} - {found[0].layout})
    below = next((found for level in _folders_below(path) if (found := [d for d in level if _all(Place(d, images=pictures))])), [])
  except OSError as e: raise UserError(f"{e.filename or path}: cannot be opened ({e.strerror})") from e
  if len(below) > 1:
    raise UserError(f"{path}: has several data sets, {' and '.join(str(d.relative_to(path)) for d in below[:4])}; give one of them to --data")
  if below:
    found = _all(Place(below[0], images=pictures))
    first = found[0]
    return Found(first.layout, f"in {below[0].relative_to(path)}/, {first.why}", first.splits), sorted({f.layout for f in found[1:]} - {first.layout})
  raise UserError(_nothing(path, split))


def open_split(found: Found, split: str, strict: bool, rule: Rule | None, spec: str) -> Any:
  """The "train" or "val" pictures of a data set that was recognised. Where it has no "val", its "test" is taken for that; where it has training
  pictures alone, they are divided by `rule`, or without one are all "train"."""
  splits = found.splits
  if split in splits and (rule is None or split == "val" or {"val", "test"} & splits.keys()): return splits[split](strict)
  if split == "val" and {"train", "test"} <= splits.keys():
    dataset = splits["test"](strict)
    dataset.warnings = [*dataset.warnings, f"{spec}: has no split val, so its split test is taken for it"]
    return dataset
  whole = splits.get("all") or (rule and splits.get("train"))
  if whole is None:
    raise UserError(f"{spec}: no data set with a split '{split}' is here; it is {found.layout} ({found.why}), which has {', '.join(splits)}")
  dataset = whole(strict)
  rule, said = rule or Rule(), _said_splits(dataset)
  alone = "it has training pictures alone"
  if said is None or "train" not in said:
    return part_of(dataset, split, rule, "it does not say which pictures are for validation" if "all" in splits else alone)
  mine = split if split in said else "test" if "test" in said else None
  if mine is None: return part_of(dataset, split, rule, alone)
  part = Part(dataset, [i for i, name in enumerate(said) if name == mine])
  if mine != split: part.warnings = [*dataset.warnings, f"{spec}: has no split val, so its split test is taken for it"]
  return part


def _said_splits(dataset: Any) -> list[str] | None:
  """The split of each picture as the annotations or its folders name it; None where they do not."""
  if (said := getattr(dataset, "splits", None)) and all(said): return said
  ours = {name: split for split, names in SPLIT_NAMES.items() for name in names}
  found = [next((ours[part] for part in map(str.lower, dataset.file_name(i).split("/")[:-1]) if part in ours), None) for i in range(len(dataset))]
  return found if found and None not in found else None


def _of_file(file: Path, images: Path | None) -> tuple[Found, list[str]]:
  root = file.parent.parent if file.parent.name.lower() in ("annotations", "annotation") else file.parent
  for layout in LAYOUTS:
    if found := layout.find(Place(root, file, images)): return found, []
  if file.suffix.lower() == ".json": native.read_json(file)   # says why, where it is none
  if file.suffix.lower() in ARCHIVES: raise UserError(f"{file}: is an archive; unpack it, and give --data the folder")
  raise UserError(f"{file}: is no annotation file of a known layout: JSON of COCO, LVIS, Label Studio, VIA or labelme, CVAT's XML, a "
                  "data.yaml, or a CSV table")


def _all(place: Place) -> list[Found]:
  """What a folder may be, the likeliest first; of the names that COCO gives its files, nothing else is meant, and the set may be large."""
  if found := LAYOUTS[0].find(place): return [found]
  return [found for layout in LAYOUTS[1:] if (found := layout.find(place))]


def _folders_below(folder: Path) -> Iterator[list[Path]]:
  """The folders one level down, and those two levels down: an archive holds its data set in a folder, which another may hold."""
  def inside(place: Path) -> list[Path]: return [path for name, path in folders_in(place).items() if not name.startswith("__")][:20]
  yield (first := inside(folder))
  yield [d for place in first for d in inside(place)]


def _nothing(folder: Path, split: str) -> str:
  found = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
  looked = "; ".join(f"{layout.looks_for.format(split=split)} ({layout.name})" for layout in LAYOUTS)
  pictures = len(walk_files(folder, SUFFIXES))
  return (f"{folder}: no data set with a split '{split}' is here; looked for {looked}; found {', '.join(map(shown, found[:8])) or 'an empty folder'}"
          f"{', ...' if len(found) > 8 else ''}" + (f", {pictures:,} pictures" if pictures else ""))
