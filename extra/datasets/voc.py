"""Data sets in the form of Pascal VOC: an XML file a picture, in `Annotations/` or beside the pictures, and perhaps `ImageSets/Main/*.txt`."""
import math, os, re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
import numpy as np
from tinydet.datasets.find_pictures import folders_in, is_picture, walk_files
from tinydet.datasets.listed import DIFFICULT, FARTHEST, OBJECT, Listed, Listing
from tinydet.datasets.outlines import around_turned
from tinydet.datasets.problems import Problems, read_bytes, reason, shown
from tinydet.errors import UserError

MAX_XML = 32_000_000   # bytes; an annotation with 10,000 objects has 3 million
FRACTIONS = 0.5        # of all boxes: more have one where corners are counted from 0; the 1-based files of VOC2012 have a few
ANNOTATIONS = ("annotations", "annotation", "xml", "xmls", "labels")   # names of folders, in any case
PICTURES = ("jpegimages", "images", "image", "imgs", "img", "pictures", "photos")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class Places:
  """The folders of annotations and of pictures, which may be one, and that of the lists of names, where there is one."""
  annotations: Path
  pictures: Path
  lists: Path | None = None


def find_places(folder: Path) -> Places | None:
  """Where the parts of VOC are in `folder`; None where it is not in this form."""
  by_name = folders_in(folder)
  classic = {"annotations", "jpegimages"} <= by_name.keys()
  annotations = by_name["annotations"] if classic else next((by_name[n] for n in ANNOTATIONS if n in by_name and _has_xml(by_name[n])), None)
  pictures = next((by_name[n] for n in PICTURES if n in by_name), None)
  if annotations is None:
    if not _has_xml(pictures or folder, beside=True): return None
    annotations = pictures = pictures or folder
  if pictures is None: pictures = annotations if any(is_picture(e.name) for e in os.scandir(annotations)) else folder
  sets = by_name.get("imagesets")
  main = sets and folders_in(sets).get("main", sets)
  return Places(annotations, pictures, main)


def find_lists(places: Places) -> dict[str, str | None]:
  """Our names of the splits, "train" and "val", or "all" where the folder has none -> the list that holds it, None for all annotations.

  As VOC's own challenge has it, `trainval` and `test` come before `train` and `val`."""
  if places.lists is None: return {"all": None}
  there = {e.name[:-4].lower(): e.name[:-4] for e in os.scandir(places.lists) if e.name.lower().endswith(".txt")}
  val = next((n for n in ("val", "valid", "validation") if n in there), None)
  for train, other in (("trainval", "test"), ("train", val), ("train", "test")):
    if train in there and other in there: return {"train": there[train], "val": there[other]}
  if "train" in there or val: return {ours: there[n] for ours, n in (("train", "train"), ("val", val)) if n in there}
  if "trainval" in there or len(there) == 1: return {"all": there.get("trainval") or next(iter(there.values()))}
  if not there: return {"all": None}
  raise UserError(f"{places.lists}: has no train.txt and val.txt; found {', '.join(f'{n}.txt' for n in sorted(there.values())[:8])}")


class Voc(Listed):
  """The pictures that the list `split` names, all that have an annotation where `split` is None.

  Classes are the sorted names in all annotations of the folder, so that every split gives the same labels. Corners in the files are the first and
  the last pixel of the object, counted from 1: a box here is (xmin - 1, ymin - 1, xmax, ymax), clipped to the image. Where most have fractions, or an
  xmin or ymin is 0, the folder counts from 0 and they are taken as they are. Boxes of which nothing is left, and those whose corners coincide in x or
  y, are dropped. Objects marked `difficult` are not in the samples; what finds one is neither right nor wrong. A listed picture without an annotation
  is background.
  `warnings` counts what is odd. Image ids are 1, 2, ... in the order of the split.
  Raises UserError with all that cannot be mended, and with `strict` all oddities too.
  """

  def __init__(self, folder: str | Path, split: str | None, strict: bool = False, places: Places | None = None):
    folder = Path(folder)
    problems = Problems(folder, strict)
    places = places or find_places(folder)
    if places is None: raise UserError(f"{folder}: has no Annotations/ with XML files")
    pictures: dict[str, list[str]] = {}
    for name in walk_files(_opened(places.pictures)): pictures.setdefault(os.path.splitext(name)[0], []).append(name)
    annotated = {os.path.splitext(name)[0]: name for name in walk_files(_opened(places.annotations), (".xml",))}
    trees = _parse_all(places.annotations, annotated, problems)
    self.names = _names_of_split(places, split, annotated, pictures, problems)
    unheard = [n for n in self.names if n not in annotated]
    problems.error(f"listed in the split '{split}', but the file is missing in {places.pictures.name}", [n for n in self.names if n not in pictures],
                   lambda n: shown(f"{n}.jpg"))
    problems.note(f"listed in the split '{split}' without an XML file, taken as background", [n for n in unheard if n in pictures], shown)
    listed = set(self.names)
    problems.note("annotations without a picture, passed over", [n for n in sorted(annotated) if n not in pictures and n not in listed], shown)
    problems.note("pictures without an annotation, passed over", [n for n in sorted(pictures) if n not in annotated and n not in listed], shown)
    self.names = [name for name in self.names if (name in trees or name in unheard) and name in pictures]
    classes = sorted({text for tree in trees.values() for item in tree.iter("object") if (text := _text(item, "name"))})
    listing = Listing(places.pictures, classes)
    from_zero = _counts_from_zero(trees.values())
    problems.odd("corners counted from 0, for some have fractions or are 0; taken as they are", ["all annotations"] * from_zero)
    self._read(listing, pictures, annotated, trees, from_zero, problems)
    super().__init__(f"{folder.resolve().name}/{split or 'all'}", listing, problems)
    if not classes: raise UserError(f"{places.annotations}: no file there has an <object>")

  def _read(self, listing: Listing, pictures: dict[str, list[str]], annotated: dict[str, str], trees: dict[str, ElementTree.Element],
            from_zero: bool, problems: Problems) -> None:
    label_of = {name: i for i, name in enumerate(listing.class_names)}
    for name in self.names:
      picture = _the_picture(pictures[name], problems)
      if (tree := trees.get(name)) is None:
        listing.picture(picture, None, picture)
        continue
      file = annotated[name]
      image = listing.picture(picture, _size(tree, shown(file), problems), file)
      for item in tree.iter("object"): _read_object(listing, image, item, label_of, shown(file), 0 if from_zero else 1, problems)


def _read_object(listing: Listing, image: int, item: ElementTree.Element, label_of: dict[str, int], file: str, first: int,
                 problems: Problems) -> None:
  """Add the boxes of an <object> whose pixels are counted from `first`."""
  if (name := _text(item, "name")) is None: problems.error("<object> without <name>", [file])
  problems.error("<object> with more than one <name>", [file] * (len(item.findall("name")) > 1))
  flag = (_text(item, "difficult") or "0").lower()
  if flag not in ("0", "1"):
    problems.odd("<difficult> is neither 0 nor 1, taken as 1 where it is true or yes, else as 0", [f"{file} {shown(flag)}"])
  kind = DIFFICULT if flag in ("1", "true", "yes") else OBJECT
  boxes = item.findall("bndbox")
  if not boxes and (turned := item.find("robndbox")) is not None:
    numbers = [_number(turned, key, file, problems) for key in ("cx", "cy", "w", "h", "angle")]
    if name is not None and None not in numbers:
      problems.odd("<robndbox>, taken as the upright box around it", [file])
      listing.box(image, label_of[name], around_turned(*numbers), kind=kind)
    return
  if len(boxes) > 1: problems.odd("<object> with more than one <bndbox>, each taken as an object of that class", [file])
  for box in boxes or [None]:
    numbers = [_number(item if box is None else box, f"bndbox/{key}" if box is None else key, file, problems, "bndbox/") for key in CORNERS]
    if name is None or None in numbers: continue
    if numbers[2] < numbers[0] or numbers[3] < numbers[1]:
      problems.error("<bndbox> of negative width or height", [file])
      continue
    flat = numbers[2] == numbers[0] or numbers[3] == numbers[1]
    corners = [numbers[0] - first, numbers[1] - first, *numbers[2:]]
    if degrees := _rotation(item):   # CVAT: the corners are those before it was turned about its middle
      problems.odd("<attribute> rotation, taken as the upright box around the turned one", [f"{file} {degrees:g} degrees"])
      x0, y0, x1, y1 = corners
      corners = around_turned((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, math.radians(degrees))
    listing.box(image, label_of[name], corners, kind=kind, flat=flat)


def _opened(folder: Path) -> Path:
  """`folder`, where it can be listed; `os.walk` would pass over one that cannot."""
  try: os.scandir(folder).close()
  except OSError as e: raise UserError(f"{folder}: cannot be opened ({e.strerror})") from e
  return folder


def _has_xml(folder: Path, beside: bool = False) -> bool:
  """Whether there is an XML file in a folder or below it, `beside` its picture."""
  for _, folders, files in os.walk(folder):
    stems = {os.path.splitext(name)[0] for name in files if is_picture(name)}
    if any(name.lower().endswith(".xml") and (not beside or name[:-4] in stems) for name in files): return True
    folders[:] = [name for name in folders if not name.startswith(".")]
  return False


def _parse_all(folder: Path, annotated: dict[str, str], problems: Problems) -> dict[str, ElementTree.Element]:
  trees = {}
  for name, file in annotated.items():
    try:
      trees[name] = parse_xml(folder / file)
      if not any(trees[name].find(key) is not None for key in ("size", "object", "filename")):   # they may be in a name space
        problems.error(f"annotations with no <size>, <object> or <filename> in their <{shown(trees[name].tag, 60)}>", [shown(file)])
    except (OSError, ValueError, LookupError) as e:   # LookupError: of an encoding that nobody knows
      problems.error("annotations that cannot be read", [f"{shown(file)} ({reason(e)})"])
  return trees


def _names_of_split(places: Places, split: str | None, annotated: dict[str, str], pictures: dict[str, list[str]], problems: Problems) -> list[str]:
  if split is None: return sorted(annotated)
  if places.lists is None: raise UserError(f"{places.annotations.parent}: has no ImageSets/Main/{split}.txt")
  file = places.lists / f"{split}.txt"
  try: lines = read_bytes(file).decode("utf-8-sig").splitlines()
  except OSError as e: raise UserError(f"{file}: cannot be opened ({e.strerror})") from e
  except ValueError as e: raise UserError(f"{file}: is not a list of names ({reason(e)})") from e
  listed, mended = [], []
  for line in filter(None, map(str.strip, lines)):
    listed.append(name := _listed_name(line, annotated, pictures))
    if name != line: mended.append(line)
  problems.odd(f"lines of {split}.txt with more than a name, of which the name is taken", mended, shown)
  names = list(dict.fromkeys(listed))
  if len(names) < len(listed):
    again = set(names)
    problems.odd(f"listed more than once in {split}.txt, taken once", [n for n in listed if n not in again or again.remove(n)], shown)
  if not names: raise UserError(f"{file}: the split '{split}' has no image; write a picture's name a line")
  return names


def _listed_name(line: str, annotated: dict[str, str], pictures: dict[str, list[str]]) -> str:
  """The name that a line of a list means: VOC's lists of a class have -1, 0 or 1 behind it, other tools write the file, or a path to it."""
  def known(name: str) -> bool: return name in annotated or name in pictures
  if known(line): return line
  name = re.sub(r"\s+(-1|0|1)$", "", line)
  stems = [name, os.path.splitext(name)[0] if is_picture(name) or name.lower().endswith(".xml") else name]
  stems += ["/".join(stems[-1].replace("\\", "/").split("/")[i:]) for i in range(1, stems[-1].replace("\\", "/").count("/") + 1)]
  return next(filter(known, stems), line)


def _counts_from_zero(trees: Iterable[ElementTree.Element]) -> bool:
  """Whether corners begin at 0, as Datumaro (and so CVAT) writes them: VOC's own begin at 1."""
  boxes = fractions = 0
  for tree in trees:
    for box in tree.iter("bndbox"):
      try: numbers = [float(_text(box, key) or "nan") for key in CORNERS]
      except ValueError: continue
      if 0 in numbers[:2]: return True
      boxes += 1
      fractions += any(np.isfinite(n) and n % 1 for n in numbers)
  return fractions > FRACTIONS * boxes


def _rotation(item: ElementTree.Element) -> float:
  """Degrees that CVAT says an object is turned by."""
  for attribute in item.iterfind("attributes/attribute"):
    if (_text(attribute, "name") or "").lower() == "rotation":
      try: degrees = float(_text(attribute, "value") or 0)
      except ValueError: return 0.0
      return degrees if math.isfinite(degrees) else 0.0
  return 0.0


def _the_picture(candidates: list[str], problems: Problems) -> str:
  """The picture among the files of one stem."""
  if len(candidates) > 1: problems.error("annotations with more than one picture; keep one", [", ".join(map(shown, candidates))])
  return candidates[0]


def _size(tree: ElementTree.Element, file: str, problems: Problems) -> tuple[int, int] | None:
  """(height, width) as annotated; None where the picture has to say it: none is stated, or 0x0, as some tools write what they did not look up."""
  problems.error("annotations with more than one <size>", [file] * (len(tree.findall("size")) > 1))
  if any(not (_text(tree, f"size/{key}") or "").strip("0.") for key in ("height", "width")):
    return problems.odd("annotations without a <size>, or of 0 pixels, which is taken from the picture", [file])
  height, width = (_number(tree, f"size/{key}", file, problems) for key in ("height", "width"))
  if None in (height, width): return None
  if min(height, width) >= 1 and not height % 1 and not width % 1: return int(height), int(width)
  return problems.error("<size> of an annotation is not of positive whole numbers", [f"{file} {width:g}x{height:g}"])


def parse_xml(file: Path, most: int = MAX_XML) -> ElementTree.Element:
  """The root of an XML file of at most `most` bytes; a document type declaration, the only place for entities, is refused. OSError, ValueError or
  LookupError where it cannot be read."""
  text = read_bytes(file, most)
  try: return ElementTree.XML(text, ElementTree.XMLParser(target=_Tree()))
  except ElementTree.ParseError as e: raise ValueError(f"is not XML: {e}") from e


class _Tree(ElementTree.TreeBuilder):
  def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
    raise ValueError("a DOCTYPE declaration is refused, remove it")


def _text(element: ElementTree.Element, path: str) -> str | None:
  return (element.findtext(path) or "").strip() or None


def _number(element: ElementTree.Element, path: str, file: str, problems: Problems, inside: str = "") -> float | None:
  """The number in <path>, called <`inside`path> in messages; None after reporting that there is none."""
  said = inside + path.removeprefix(inside)
  if (text := _text(element, path)) is None: return problems.error(f"<{'object' if inside else element.tag}> without <{said}>", [file])
  if len(element.findall(path)) > 1: return problems.error(f"<{said}> more than once", [file])
  try: value = float(text.replace("_", "?"))
  except ValueError: value = np.nan
  if abs(value) <= FARTHEST: return value
  return problems.error(f"<{said}> is no number of at most a million", [f"{file} {shown(text, 40)}"])
