"""Data sets in the form of Pascal VOC: a folder of `Annotations/*.xml`, `JPEGImages/` and `ImageSets/Main/<split>.txt`."""
import os, zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
import numpy as np
from tinydet.datasets.image import check_headers, read_image
from tinydet.datasets.image_folder import SUFFIXES
from tinydet.datasets.problems import Problems, check_boxes, check_class_names, read_bytes, reason, shown
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import resized_boxes
from tinydet.errors import UserError

MAX_XML = 32_000_000   # bytes; an annotation with 10,000 objects has 3 million
FARTHEST = 1e6         # pixels; no coordinate of a real box is larger


class Voc:
  """The images that `ImageSets/Main/<split>.txt` lists; without such a folder a tenth of all, by a hash of the name, is "val", the rest "train".

  Classes are the sorted names in all annotations of the folder, so that every split gives the same labels. Corners in the files are the first and
  the last pixel of the object, counted from 1: a box here is (xmin - 1, ymin - 1, xmax, ymax), clipped to the image. Boxes of which nothing is left,
  and those whose corners coincide in x or y, are dropped. Objects marked `difficult` are not in the samples; what finds one is neither right
  nor wrong.
  `warnings` counts what is odd. Image ids are 1, 2, ... in the order of the split.
  Raises UserError with all that cannot be mended, and with `strict` all oddities too.
  """

  def __init__(self, folder: str | Path, split: str, strict: bool = False):
    self.folder, self.split = Path(folder), split
    self.name = f"{self.folder.resolve().name}/{split}"
    problems = Problems(self.folder, strict)
    pictures: dict[str, list[str]] = {}
    for name in sorted(_listing(self.folder / "JPEGImages")): pictures.setdefault(os.path.splitext(name)[0], []).append(name)
    annotated = {name[:-4]: name for name in sorted(_listing(self.folder / "Annotations")) if name.lower().endswith(".xml")}
    trees = self._parse_all(annotated, problems)
    names = self._split_names(sorted(annotated), problems)
    problems.error(f"listed in the split '{split}', but the file is missing in Annotations", [n for n in names if n not in annotated],
                   lambda n: shown(f"{n}.xml"))
    problems.error(f"listed in the split '{split}', but the file is missing in JPEGImages", [n for n in names if n not in pictures],
                   lambda n: shown(f"{n}.jpg"))
    problems.note("annotations without a picture, passed over", [n for n in sorted(annotated) if n not in pictures and n not in set(names)], shown)
    problems.note("pictures without an annotation, passed over", [n for n in sorted(pictures) if n not in annotated], shown)
    self.class_names = sorted({text for tree in trees.values() for item in tree.iter("object") if (text := _text(item, "name"))})
    self.category_ids = list(range(1, len(self.class_names) + 1))
    check_class_names(problems, self.class_names)
    self.names = [name for name in names if name in trees and name in pictures]
    self.file_names = [self._picture(pictures[name], problems) for name in self.names]
    self._read_objects([trees[name] for name in self.names], [annotated[name] for name in self.names], problems)
    known = [i for i, size in enumerate(self.sizes) if max(size) > 0]
    self.upright = check_headers(problems, self.folder / "JPEGImages", [self.file_names[i] for i in known], [self.sizes[i] for i in known])
    self.warnings = problems.finish()
    if not self.class_names: raise UserError(f"{self.folder / 'Annotations'}: no file there has an <object>")

  def __len__(self) -> int: return len(self.names)

  def image_name(self, index: int) -> str: return os.path.join(self.folder, "JPEGImages", self.file_names[index])

  def __getitem__(self, index: int) -> Sample: return self._sample(index, None)

  def resized(self, index: int, size: tuple[int, int]) -> Sample:
    """As `transforms.resize(*size)` makes of `self[index]`, but for what `read_image` says of large JPEGs."""
    return self._sample(index, size)

  def _sample(self, index: int, resized: tuple[int, int] | None) -> Sample:
    mine, size = slice(*self.offsets[index:index + 2]), self.sizes[index]
    objects = ~self.difficult[mine]
    field = f"<size> in {os.path.join(self.folder, 'Annotations', self.names[index])}.xml"
    image = read_image(self.image_name(index), size, field, resized, self.upright is not False)
    boxes = self.boxes[mine][objects].astype(np.float32)
    if resized: boxes = resized_boxes(boxes, size, resized)
    return Sample(image, boxes, self.labels[mine][objects], index + 1, size, resized or size)

  def ground_truth(self) -> dict[str, Any]:
    """The annotations in the form of a COCO instances file; the area is the box's."""
    images = [{"id": i, "file_name": name, "height": h, "width": w} for i, (name, (h, w)) in enumerate(zip(self.file_names, self.sizes), 1)]
    owners = np.repeat(np.arange(1, len(self) + 1), np.diff(self.offsets)).tolist()
    columns = zip(owners, self.boxes.tolist(), self.labels.tolist(), self.difficult.tolist())
    annotations = [{"id": a, "image_id": i, "category_id": self.category_ids[label], "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0), "iscrowd": 0, "difficult": int(difficult)}
                   for a, (i, (x0, y0, x1, y1), label, difficult) in enumerate(columns, 1)]
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names)]}

  def _parse_all(self, annotated: dict[str, str], problems: Problems) -> dict[str, ElementTree.Element]:
    trees = {}
    for name, file in annotated.items():
      try: trees[name] = _parse(self.folder / "Annotations" / file)
      except (OSError, ValueError, LookupError, ElementTree.ParseError) as e:   # LookupError: of an encoding that nobody knows
        why = f"is not XML: {e}" if isinstance(e, ElementTree.ParseError) else reason(e)
        problems.error("annotations that cannot be read", [f"{shown(file)} ({why})"])
    return trees

  def _split_names(self, annotated: list[str], problems: Problems) -> list[str]:
    if (self.folder / "ImageSets" / "Main").is_dir():
      file = self.folder / "ImageSets" / "Main" / f"{self.split}.txt"
      try: lines = read_bytes(file).decode("utf-8-sig").splitlines()
      except OSError as e: raise UserError(f"{file}: cannot be opened ({e.strerror})") from e
      except ValueError as e: raise UserError(f"{file}: is not a list of names ({reason(e)})") from e
      listed = [line.strip() for line in lines if line.strip()]
      names = list(dict.fromkeys(listed))
      if len(names) < len(listed):
        again = set(names)
        problems.odd(f"listed more than once in {self.split}.txt, taken once", [n for n in listed if n not in again or again.remove(n)], shown)
    else: names = [name for name in annotated if (zlib.crc32(os.fsencode(name)) % 10 == 0) == (self.split == "val")]
    if not names: raise UserError(f"{self.folder}: the split '{self.split}' has no image")
    return names

  def _picture(self, candidates: list[str], problems: Problems) -> str:
    """The picture among the files of one stem."""
    found = [name for name in candidates if name.lower().endswith(SUFFIXES)] if len(candidates) > 1 else candidates
    if len(found) != 1: problems.error("annotations with more than one picture; keep one", [", ".join(map(shown, candidates))])
    return found[0] if found else candidates[0]

  def _read_objects(self, trees: list[ElementTree.Element], files: list[str], problems: Problems) -> None:
    label_of = {name: i for i, name in enumerate(self.class_names)}
    self.sizes: list[tuple[int, int]] = []
    corners, labels, images, difficult = [], [], [], []
    for image, (file, tree) in enumerate(zip(map(shown, files), trees)):
      height, width = (_number(tree, f"size/{key}", file, problems) for key in ("height", "width"))
      if None in (height, width): height = width = 0
      elif min(height, width) < 1 or height % 1 or width % 1:
        problems.error("<size> of an annotation is not of positive whole numbers", [f"{file} {width:g}x{height:g}"])
        height = width = 0
      self.sizes.append((int(height), int(width)))
      for item in tree.iter("object"):
        box = [_number(item, f"bndbox/{key}", file, problems) for key in ("xmin", "ymin", "xmax", "ymax")]
        if (name := _text(item, "name")) is None: problems.error("<object> without <name>", [file])
        flag = (_text(item, "difficult") or "0").lower()
        if flag not in ("0", "1"):
          problems.odd("<difficult> is neither 0 nor 1, taken as 1 where it is true or yes, else as 0", [f"{file} {shown(flag)}"])
        if name is None or None in box: continue
        if box[2] < box[0] or box[3] < box[1]:
          problems.error("<bndbox> of negative width or height", [file])
          continue
        corners.append(box)
        labels.append(label_of[name])
        images.append(image)
        difficult.append(flag in ("1", "true", "yes"))
    boxes, labels, images = np.array(corners, np.float64).reshape(-1, 4), np.array(labels, np.int32), np.array(images, np.int64)
    flat = (boxes[:, 2:] == boxes[:, :2]).any(1)
    boxes[:, :2] -= 1
    sizes = np.array([size if max(size) else (FARTHEST, FARTHEST) for size in self.sizes], np.int64).reshape(-1, 2)
    keep = check_boxes(problems, boxes, labels, images, sizes, flat, lambda i: shown(self.file_names[i]), lambda i: shown(files[images[i]]))
    self.boxes = boxes[keep].clip(0, sizes[images[keep]][:, [1, 0, 1, 0]])
    self.labels, self.difficult = labels[keep], np.array(difficult, bool)[keep]
    self.offsets = np.searchsorted(images[keep], np.arange(len(self.names) + 1))
    self.max_boxes = int(np.bincount(images[keep][~self.difficult], minlength=1).max())
    unused = np.flatnonzero(np.bincount(self.labels, minlength=len(self.class_names)) == 0)
    problems.note(f"classes without a box in the split '{self.split}'", unused, lambda k: shown(self.class_names[k]))


def _listing(folder: Path) -> list[str]:
  try: return [entry.name for entry in os.scandir(folder)]
  except OSError as e: raise UserError(f"{folder}: cannot be opened ({e.strerror})") from e


def _parse(file: Path) -> ElementTree.Element:
  """The root of an XML file; a document type declaration, the only place for entities, is refused."""
  return ElementTree.XML(read_bytes(file, MAX_XML), ElementTree.XMLParser(target=_Tree()))


class _Tree(ElementTree.TreeBuilder):
  def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
    raise ValueError("a DOCTYPE declaration is refused, remove it")


def _text(element: ElementTree.Element, path: str) -> str | None:
  return (element.findtext(path) or "").strip() or None


def _number(element: ElementTree.Element, path: str, file: str, problems: Problems) -> float | None:
  """The number in <path>; None after reporting that there is none."""
  if (text := _text(element, path)) is None: return problems.error(f"<{element.tag}> without <{path}>", [file])
  try: value = float(text.replace("_", "?"))
  except ValueError: value = np.nan
  if abs(value) <= FARTHEST: return value
  return problems.error(f"<{path}> is no number of at most a million", [f"{file} {shown(text, 40)}"])
