"""Classified pictures as ImageNet keeps them: `train/<class>/*.jpg` and `val/<class>/*.jpg`."""
import os
from collections.abc import Iterator
from pathlib import Path
import numpy as np
from tinydet.datasets.find_pictures import SUFFIXES
from tinydet.datasets.image import read_image
from tinydet.datasets.sample import Sample
from tinydet.errors import UserError

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation", "test")}  # our name -> names met in folders; the first that is there counts


class ImageFolder:
  """The pictures of one split ("train" or "val") of `folder`, each labelled with the folder it lies in, however deep.

  Class names are the sorted names of the split's folders, the same in both splits. The order of the pictures takes from all classes in turn, in
  proportion to their sizes, so that the first so many are a fair part of the whole. A sample's one box is the whole picture. A picture is a file
  with one of SUFFIXES in any case; `warnings` counts other files, and pictures outside the class folders. Hidden files and folders are passed over.
  Image ids are 1, 2, ... in the order of the pictures. Raises UserError where a folder is missing, classes differ, or one has no picture.
  """
  max_boxes = 1

  def __init__(self, folder: str | Path, split: str):
    folder = Path(folder)
    self.folder = _split_folder(folder, split)
    self.name, self.warnings = f"{folder.resolve().name}/{split}", []
    self.class_names = self._agreed_classes(_split_folder(folder, "val" if split == "train" else "train"))
    self.category_ids = list(range(len(self.class_names)))
    names, labels, places, odd = [], [], [], []
    empty = []
    for label, class_name in enumerate(self.class_names):
      files = sorted(_files(self.folder, class_name))
      found = [name for name in files if name.lower().endswith(SUFFIXES)]
      odd += [name for name in files if not name.lower().endswith(SUFFIXES)]
      if not found: empty.append(class_name)
      names += [os.fsencode(name) for name in found]
      labels += [label] * len(found)
      places += ((np.arange(len(found)) + 0.5) / max(1, len(found))).tolist()
    if empty: raise UserError(f"{self.folder}: {_some(empty)} hold{'s' * (len(empty) == 1)} no picture ({', '.join(SUFFIXES)}); fill or remove "
                              f"{'it' if len(empty) == 1 else 'them'} in both splits")
    stray = [e.name for e in _entries(self.folder) if not e.is_dir() and e.name.lower().endswith(SUFFIXES)]
    for files, what in ((odd, "not named as a picture"), (stray, "not in the folder of a class")):
      if files: self.warnings.append(f"{self.folder}: {len(files)} file{'s' * (len(files) > 1)} left out, {what} (first: {files[0]})")
    order = np.lexsort((labels, places))
    # Bytes in one array, not a list of texts: a twentieth of the objects to send to each worker of a loader.
    self.file_names, self.labels = np.array(names)[order], np.array(labels, np.int32)[order]

  def __len__(self) -> int: return len(self.labels)

  def image_name(self, index: int) -> str: return str(self.folder / os.fsdecode(self.file_names[index]))

  def __getitem__(self, index: int) -> Sample:
    image = read_image(Path(self.image_name(index)), None, "")
    size = (image.height, image.width)
    return Sample(image, np.array([[0, 0, size[1], size[0]]], np.float32), self.labels[index:index + 1], index + 1, size, size)

  def _agreed_classes(self, other: Path) -> list[str]:
    mine, theirs = ({e.name for e in _entries(folder) if e.is_dir()} for folder in (self.folder, other))
    if not mine: raise UserError(f"{self.folder}: has no folder for a class; put the pictures of each class into one of its own")
    lacks = [f"{_some(sorted(names))} in {here} only" for names, here in ((mine - theirs, self.folder), (theirs - mine, other)) if names]
    if lacks: raise UserError(f"{self.folder.parent}: both splits need the same class folders, but {'; '.join(lacks)}")
    return sorted(mine)


def _split_folder(folder: Path, split: str) -> Path:
  for name in SPLIT_NAMES[split]:
    if (folder / name).is_dir(): return folder / name
  found = sorted(e.name + "/" * e.is_dir() for e in _entries(folder))
  raise UserError(f"{folder}: has no folder {' or '.join(f'{name}/' for name in SPLIT_NAMES[split])}; expected train/<class>/*.jpg and "
                  f"val/<class>/*.jpg, found {', '.join(found[:8]) or 'nothing'}{', ...' if len(found) > 8 else ''}")


def _entries(folder: Path) -> list[os.DirEntry]:
  """What is in a folder and not hidden."""
  try: return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
  except OSError as e: raise UserError(f"{folder}: cannot be opened ({e.strerror})") from e


def _files(root: Path, inside: str, above: tuple[str, ...] = ()) -> Iterator[str]:
  """Paths, relative to `root`, of all files in its folder `inside` and in the folders below; a link that leads back up is not followed."""
  if (real := os.path.realpath(root / inside)) in above: return
  for entry in _entries(root / inside):
    name = f"{inside}/{entry.name}"
    if entry.is_dir(): yield from _files(root, name, (*above, real))
    else: yield name


def _some(names: list[str]) -> str:
  """The first few of `names`, and how many more there are."""
  return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
