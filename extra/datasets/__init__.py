"""Data sets by name or folder.

A data set is any object with `name`, `class_names` (in label order), `category_ids` (label -> the data set's own id), `max_boxes` (the most objects
on an image), `warnings` (one line for each kind of oddity that was mended), `sizes` ((height, width) of each image, known without decoding one),
`len(d)`, `d[i]` (a `Sample`), `d.image_name(i)` for messages, and `d.ground_truth()` in the form of a COCO instances file. One
that reads files may have `d.resized(i, (height, width))`, a `Sample` read at that size, faster.
"""
import os
from pathlib import Path
from typing import Any
from tinydet.datasets.coco import Coco
from tinydet.datasets.crops import Crops
from tinydet.datasets.image_folder import ImageFolder
from tinydet.datasets.shapes import Shapes
from tinydet.datasets.voc import Voc
from tinydet.errors import UserError

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation")}  # our name -> names met in folders


def open_dataset(spec: str | Path, split: str, *, strict: bool = False, **shapes_options: Any) -> Shapes | Coco | Voc:
  """The "train" or "val" split of a data set.

  `spec` is "shapes" (the embedded data set, family 1), "shapes:1" or "shapes:2", with `shapes_options` (`size`, `count`, `seed`) for `Shapes`, or a
  folder in one of these layouts:
  COCO: `annotations/instances_train*.json` with images in a folder named like the rest of the file name (`train2017/`), `train/` or `images/`;
    or `train.json` with images in `train/` or `images/`; or `train/_annotations.coco.json` beside its images; likewise for `val`, `valid` or
    `validation`.
  Pascal VOC: `Annotations/` and `JPEGImages/`; training is the split `trainval` and validation `test` if `ImageSets/Main/test.txt` exists, otherwise
    `train` and `val`.
  Raises UserError for any other folder and for a broken data set, with all its errors; with `strict`, oddities that would be mended are errors too.
  """
  if split not in SPLIT_NAMES: raise UserError(f"split '{split}' is unknown; choose train or val")
  if str(spec).partition(":")[0] == "shapes":
    family = str(spec).partition(":")[2] or "1"
    if family not in ("1", "2"): raise UserError(f"data set '{spec}' is unknown; the embedded ones are shapes:1 and shapes:2")
    return Shapes(split, int(family), **shapes_options)
  if shapes_options: raise TypeError(f"{', '.join(shapes_options)} are options of the embedded data set, not of the folder {spec}")
  folder = Path(spec)
  if not os.path.isdir(folder): raise UserError(f"{spec}: is neither a folder nor one of the embedded data sets, shapes:1 and shapes:2")
  if (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir():
    has_test = (folder / "ImageSets" / "Main" / "test.txt").exists()
    return Voc(folder, {"train": "trainval", "val": "test"}[split] if has_test else split, strict)
  return _open_coco(folder, split, strict)


def open_classes(spec: str | Path, split: str, **crops_options: Any) -> Crops | ImageFolder:
  """The "train" or "val" split of a data set for classifiers, whose samples have one box, the whole picture, with its class.

  `spec` is "crops:1" or "crops:2" ("crops" is the first), with `crops_options` (`size`, `count`, `seed`) for `Crops`, or a folder with
  `train/<class>/` and `val/<class>/` for `ImageFolder`. Raises UserError for anything else. There is no `ground_truth`.
  """
  if split not in SPLIT_NAMES: raise UserError(f"split '{split}' is unknown; choose train or val")
  if str(spec).partition(":")[0] == "crops":
    family = str(spec).partition(":")[2] or "1"
    if family not in ("1", "2"): raise UserError(f"data set '{spec}' is unknown; the embedded ones are crops:1 and crops:2")
    return Crops(split, int(family), **crops_options)
  if crops_options: raise TypeError(f"{', '.join(crops_options)} are options of the embedded data set, not of the folder {spec}")
  if not Path(spec).is_dir(): raise UserError(f"{spec}: is neither a folder nor one of the embedded data sets, crops:1 and crops:2")
  return ImageFolder(spec, split)


def _open_coco(folder: Path, split: str, strict: bool) -> Coco:
  names = SPLIT_NAMES[split]
  patterns = [p for n in names for p in (f"annotations/instances_{n}*.json", f"{n}.json", f"{n}/_annotations.coco.json")]
  files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
  if len(files) > 1: raise UserError(f"{folder}: {' and '.join(str(f.relative_to(folder)) for f in files)} may both be '{split}'; keep one")
  if not files:
    found = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    raise UserError(f"{folder}: no data set with a split '{split}' is here; looked for annotations/instances_{split}*.json, {split}.json or "
                    f"{split}/_annotations.coco.json (COCO), and for Annotations/ with JPEGImages/ (Pascal VOC); found "
                    f"{', '.join(found[:8]) or 'an empty folder'}{', ...' if len(found) > 8 else ''}")
  file = files[0]
  if file.name == "_annotations.coco.json": return Coco(file, file.parent, strict)
  tail = file.stem.removeprefix("instances_")
  places = [folder / p for p in dict.fromkeys([tail, *names, f"images/{tail}", *(f"images/{n}" for n in names), "images"])]
  for place in places:
    if place.is_dir(): return Coco(file, place, strict)
  raise UserError(f"{file}: no folder with its images; looked for {', '.join(str(p.relative_to(folder)) + '/' for p in places)} in {folder}")
