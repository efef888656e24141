"""Data sets in the form of Pascal VOC: a folder of `Annotations/*.xml`, `JPEGImages/` and `ImageSets/Main/<split>.txt`."""
import os, zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
import numpy as np
from extra.datasets.image import read_image
from extra.datasets.sample import Sample
from extra.errors import UserError


class Voc:
  """The images that `ImageSets/Main/<split>.txt` lists; without such a folder a tenth of all, by a hash of the name, is "val", the rest "train".

  Classes are the sorted names in all annotations of the folder, so that every split gives the same labels. Corners in the files are the first and
  the last pixel of the object, counted from 1: a box here is (xmin - 1, ymin - 1, xmax, ymax), clipped to the image. Boxes of which nothing is left,
  and those whose corners coincide in x or y or are reversed, are dropped; `warnings` counts them. Objects marked `difficult` are crowd regions: not
  in the samples, ignored by the metric. Image ids are 1, 2, ... in the order of the split.
  Raises UserError, naming file and field, for what cannot be mended.
  """

  def __init__(self, folder: str | Path, split: str):
    self.folder, self.split = Path(folder), split
    self.name = f"{self.folder.resolve().name}/{split}"
    self.warnings: list[str] = []
    pictures = {os.path.splitext(name)[0]: name for name in _listing(self.folder / "JPEGImages")}
    annotated = sorted(name[:-4] for name in _listing(self.folder / "Annotations") if name.endswith(".xml"))
    self.names = self._split_names(annotated)
    for name in self.names:
      for known, what in ((pictures, f"JPEGImages/{name}.jpg"), (set(annotated), f"Annotations/{name}.xml")):
        if name not in known: raise UserError(f"{self.folder / what}: file missing, but the split '{split}' lists {name}")
    self.file_names = [pictures[name] for name in self.names]
    trees = {name: _parse(self.folder / "Annotations" / f"{name}.xml") for name in annotated}
    self.class_names = sorted({_text(o, "name", self._xml(name)) for name, tree in trees.items() for o in tree.iter("object")})
    if not self.class_names: raise UserError(f"{self.folder / 'Annotations'}: no file there has an <object>")
    self.category_ids = list(range(1, len(self.class_names) + 1))
    self._read_objects([trees[name] for name in self.names])

  def __len__(self) -> int: return len(self.names)

  def image_name(self, index: int) -> str: return str(self.folder / "JPEGImages" / self.file_names[index])

  def __getitem__(self, index: int) -> Sample:
    image = read_image(self.folder / "JPEGImages" / self.file_names[index], self.sizes[index], f"<size> in {self._xml(self.names[index])}")
    objects, size = ~self.difficult[index], image.shape[:2]
    return Sample(image, self.boxes[index][objects].astype(np.float32), self.labels[index][objects], index + 1, size, size)

  def ground_truth(self) -> dict[str, Any]:
    """The annotations in the form of a COCO instances file; the area is the box's."""
    images, annotations = [], []
    for i, (size, name) in enumerate(zip(self.sizes, self.file_names)):
      images.append({"id": i + 1, "file_name": name, "height": size[0], "width": size[1]})
      for (x0, y0, x1, y1), label, difficult in zip(self.boxes[i].tolist(), self.labels[i].tolist(), self.difficult[i].tolist()):
        annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "category_id": self.category_ids[label],
                            "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": int(difficult)})
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names)]}

  def _xml(self, name: str) -> Path: return self.folder / "Annotations" / f"{name}.xml"

  def _split_names(self, annotated: list[str]) -> list[str]:
    if (self.folder / "ImageSets" / "Main").is_dir():
      file = self.folder / "ImageSets" / "Main" / f"{self.split}.txt"
      try: names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
      except OSError as e: raise UserError(f"{file}: cannot be opened ({e.strerror})") from e
    else: names = [name for name in annotated if (zlib.crc32(name.encode()) % 10 == 0) == (self.split == "val")]
    if not names: raise UserError(f"{self.folder}: the split '{self.split}' has no image")
    return names

  def _read_objects(self, trees: list[ElementTree.Element]) -> None:
    label_of = {name: i for i, name in enumerate(self.class_names)}
    self.sizes: list[tuple[int, int]] = []
    self.boxes, self.labels, self.difficult = [], [], []
    empty: list[str] = []
    outside: list[str] = []
    for name, tree in zip(self.names, trees):
      file = self._xml(name)
      height, width = (int(_number(tree, f"size/{key}", file)) for key in ("height", "width"))
      if height <= 0 or width <= 0: raise UserError(f"{file}: <size> {width}x{height} must be positive")
      boxes, labels, difficult = [], [], []
      for item in tree.iter("object"):
        x0, y0, x1, y1 = (_number(item, f"bndbox/{key}", file) for key in ("xmin", "ymin", "xmax", "ymax"))
        box = np.array([x0 - 1, y0 - 1, x1, y1])
        clipped = box.clip(0, [width, height] * 2)
        if x1 <= x0 or y1 <= y0 or (clipped[2:] <= clipped[:2]).any():
          empty.append(file.name)
          continue
        if np.abs(clipped - box).max() > 1: outside.append(file.name)
        boxes.append(clipped)
        labels.append(label_of[_text(item, "name", file)])
        difficult.append(item.findtext("difficult", "0").strip() == "1")
      self.sizes.append((height, width))
      self.boxes.append(np.array(boxes, np.float64).reshape(-1, 4))
      self.labels.append(np.array(labels, np.int32))
      self.difficult.append(np.array(difficult, bool))
    self.max_boxes = max(int((~d).sum()) for d in self.difficult)
    for files, what in ((empty, "without area dropped"), (outside, "more than 1 pixel over the border of their image clipped")):
      if files: self.warnings.append(f"{self.folder}: {len(files)} box{'es' * (len(files) > 1)} {what} (first: {files[0]})")


def _listing(folder: Path) -> list[str]:
  try: return [entry.name for entry in os.scandir(folder)]
  except OSError as e: raise UserError(f"{folder}: cannot be opened ({e.strerror})") from e


def _parse(file: Path) -> ElementTree.Element:
  """The root of an XML file; a document type declaration, the only place for entities, is refused."""
  try: content = file.read_bytes()
  except OSError as e: raise UserError(f"{file}: cannot be opened ({e.strerror})") from e
  parser = ElementTree.XMLParser(target=_Tree(file))
  try: return ElementTree.XML(content, parser)
  except (ElementTree.ParseError, ValueError, LookupError) as e: raise UserError(f"{file}: is not XML ({e})") from e


class _Tree(ElementTree.TreeBuilder):
  def __init__(self, file: Path):
    super().__init__()
    self.file = file

  def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
    raise UserError(f"{self.file}: a DOCTYPE declaration is refused; remove it")


def _text(element: ElementTree.Element, path: str, file: Path) -> str:
  text = element.findtext(path)
  if text is None or not text.strip(): raise UserError(f"{file}: <{element.tag}> has no <{path}>")
  return text.strip()


def _number(element: ElementTree.Element, path: str, file: Path) -> float:
  text = _text(element, path, file)
  try: value = float(text)
  except ValueError: value = np.nan
  if not np.isfinite(value): raise UserError(f"{file}: <{path}> is '{text[:40]}', not a number")
  return value
