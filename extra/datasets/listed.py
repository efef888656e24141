"""Data sets whose annotations are many small files or a table: what a reader makes of them (`Listing`), checked and served as samples (`Listed`)."""
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
import numpy as np
from tinydet.datasets.find_pictures import find_pictures
from tinydet.datasets.image import check_headers, header_sizes, read_image
from tinydet.datasets.problems import Problems, check_boxes, check_class_names, shown
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import resized_boxes

FARTHEST = 1e6   # pixels; no coordinate of a real box is larger
OBJECT, DIFFICULT, CROWD = range(3)   # what a box is: to be learnt, neither right nor wrong (VOC), a region of many (COCO)


@dataclass
class Listing:
  """Pictures and boxes as the files of some layout state them. `picture` and `box` add to it; a reader reports itself what is no box at all."""
  folder: Path                         # where the pictures lie
  class_names: list[str] = field(default_factory=list)
  names: list[str] = field(default_factory=list)                       # of pictures, relative to `folder`
  sizes: list[tuple[int, int] | None] = field(default_factory=list)    # (height, width) as annotated
  said_in: list[str] = field(default_factory=list)                     # the file or field that annotates each
  corners: list[list[float]] = field(default_factory=list)             # xyxy, pixels or, with `fractions`, shares of width and height
  labels: list[int] = field(default_factory=list)
  images: list[int] = field(default_factory=list)
  kinds: list[int] = field(default_factory=list)
  rows: list[int] = field(default_factory=list)                        # line or number of each box, 0 where its file says enough
  flat: list[bool] = field(default_factory=list)                       # without area as written
  splits: list[str] = field(default_factory=list)                      # of pictures, where their files say it: "train", "val" or "test"
  fractions: bool = False
  row_word: str = "line"

  def picture(self, name: str, size: tuple[int, int] | None, said_in: str) -> int:
    """Add a picture; returns its number."""
    self.names.append(name)
    self.sizes.append(size)
    self.said_in.append(said_in)
    return len(self.names) - 1

  def box(self, image: int, label: int, corners: list[float], row: int = 0, kind: int = OBJECT, flat: bool | None = None) -> None:
    """Add a box of picture number `image`, in any order of pictures."""
    self.images.append(image)
    self.labels.append(label)
    self.corners.append(corners)
    self.rows.append(row)
    self.kinds.append(kind)
    self.flat.append(corners[2] <= corners[0] or corners[3] <= corners[1] if flat is None else flat)

  def said(self, i: int) -> str:
    """Where box `i` is annotated."""
    where = shown(self.said_in[self.images[i]])
    return f"{where} {self.row_word} {self.rows[i]}" if self.rows[i] else where


@dataclass
class Entry:
  """A picture and its boxes as one place of an annotation file states them, before the picture is looked for."""
  name: str                                     # path, address or name of the picture
  size: tuple[int, int] | None                  # (height, width) as annotated
  said_in: str                                  # the file or field that annotates it
  boxes: list[tuple[str, list[float], int, int]] = field(default_factory=list)   # class, xyxy, line or number (0: none), kind
  split: str = ""


def listing_of(entries: Sequence[Entry], folder: Path, roots: Sequence[Path], problems: Problems, said: str, class_names: Sequence[str] = (),
               fractions: bool = False, row_word: str = "number") -> Listing:
  """A `Listing` of `entries`, whose pictures are looked for in `folder` and `roots`; `said` is the field that names them. Classes are `class_names`,
  or else those of the boxes, sorted. A picture that several entries name has the boxes of all of them."""
  found, _ = find_pictures(problems, folder, [entry.name for entry in entries], [folder, *roots], said)
  known = {name for entry in entries for name, *_ in entry.boxes}
  order = list(class_names) or sorted(known)
  label_of = {name: i for i, name in enumerate(order)}
  if class_names: problems.error("classes that the list of classes does not have", sorted(known - label_of.keys()), shown)
  listing, rows = Listing(folder, order, fractions=fractions, row_word=row_word), {}
  for entry, file in zip(entries, found):
    if file is None: continue
    if (key := (entry.split, os.path.normpath(file))) not in rows:
      rows[key] = listing.picture(file, entry.size, entry.said_in)
      listing.splits.append(entry.split)
    for name, corners, row, kind in entry.boxes:
      if name in label_of: listing.box(rows[key], label_of[name], corners, row, kind)
  return listing


class Listed:
  """The data set that a `Listing` states. Labels are numbers of its class names; image ids 1, 2, ... in its order.

  Boxes are clipped to the picture; those of which nothing is left are dropped. Difficult and crowd boxes are not in the samples. Pictures without an
  annotated size have the one that their EXIF orientation turns them to. `warnings` counts what is odd; UserError with all that cannot be mended, and
  where `problems` is strict with all oddities too.
  """
  def __init__(self, name: str, listing: Listing, problems: Problems):
    self.name, self.folder, self.class_names = name, listing.folder, listing.class_names
    self.category_ids = list(range(1, len(self.class_names) + 1))
    self.file_names, self.said_in, self.splits = listing.names, listing.said_in, listing.splits
    check_class_names(problems, self.class_names)
    told = [size is not None for size in listing.sizes]
    unsaid = [i for i, known in enumerate(told) if not known]
    read = dict(zip(unsaid, header_sizes(problems, self.folder, [self.file_names[i] for i in unsaid])))
    self.sizes: list[tuple[int, int]] = [read.get(i, size) for i, size in enumerate(listing.sizes)]
    known = [i for i, size in enumerate(self.sizes) if max(size) > 0]
    self.upright = check_headers(problems, self.folder, [self.file_names[i] for i in known], [self.sizes[i] for i in known],
                                 [told[i] for i in known])
    self._take_boxes(listing, problems)
    self.warnings = problems.finish()

  def _take_boxes(self, listing: Listing, problems: Problems) -> None:
    boxes, labels = np.array(listing.corners, np.float64).reshape(-1, 4), np.array(listing.labels, np.int32)
    images, kinds, flat = np.array(listing.images, np.int64), np.array(listing.kinds, np.int8), np.array(listing.flat, bool)
    sizes = np.array([size if max(size) else (FARTHEST, FARTHEST) for size in self.sizes], np.int64).reshape(-1, 2)
    if listing.fractions: boxes *= sizes[images][:, [1, 0, 1, 0]]
    keep = check_boxes(problems, boxes, labels, images, sizes, flat, lambda i: shown(self.file_names[i]), listing.said)
    keep = np.flatnonzero(keep)
    keep = keep[np.argsort(images[keep], kind="stable")]
    images = images[keep]
    self.boxes = boxes[keep].clip(0, sizes[images][:, [1, 0, 1, 0]])
    self.labels, self.kinds = labels[keep], kinds[keep]
    self.offsets = np.searchsorted(images, np.arange(len(self.file_names) + 1))
    self.max_boxes = int(np.bincount(images[self.kinds == OBJECT], minlength=1).max())
    unused = np.flatnonzero(np.bincount(self.labels, minlength=len(self.class_names)) == 0)
    problems.note("classes without a box", unused, lambda k: shown(self.class_names[k]))

  def __len__(self) -> int: return len(self.file_names)

  def file_name(self, index: int) -> str: return self.file_names[index]

  def image_name(self, index: int) -> str: return os.path.join(self.folder, self.file_names[index])

  def object_counts(self) -> np.ndarray:
    """i64 [N]: how many objects each picture has that are to be learnt."""
    return np.diff(np.concatenate([[0], np.cumsum(self.kinds == OBJECT)])[self.offsets])

  def __getitem__(self, index: int) -> Sample: return self._sample(index, None)

  def resized(self, index: int, size: tuple[int, int]) -> Sample:
    """As `transforms.resize(*size)` makes of `self[index]`, but for what `read_image` says of large JPEGs."""
    return self._sample(index, size)

  def _sample(self, index: int, resized: tuple[int, int] | None) -> Sample:
    mine, size = slice(*self.offsets[index:index + 2]), self.sizes[index]
    objects = self.kinds[mine] == OBJECT
    image = read_image(self.image_name(index), size, f"the size in {self.said_in[index]}", resized, self.upright is not False)
    boxes = self.boxes[mine][objects].astype(np.float32)
    if resized: boxes = resized_boxes(boxes, size, resized)
    return Sample(image, boxes, self.labels[mine][objects], index + 1, size, resized or size)

  def ground_truth(self) -> dict[str, Any]:
    """The annotations in the form of a COCO instances file; the area is the box's."""
    images = [{"id": i, "file_name": name, "height": h, "width": w} for i, (name, (h, w)) in enumerate(zip(self.file_names, self.sizes), 1)]
    owners = np.repeat(np.arange(1, len(self) + 1), np.diff(self.offsets)).tolist()
    columns = zip(owners, self.boxes.tolist(), self.labels.tolist(), self.kinds.tolist())
    annotations = [{"id": a, "image_id": i, "category_id": self.category_ids[label], "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0), "iscrowd": int(kind == CROWD), "difficult": int(kind == DIFFICULT)}
                   for a, (i, (x0, y0, x1, y1), label, kind) in enumerate(columns, 1)]
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names)]}
