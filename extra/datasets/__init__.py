"""Data sets by name or folder.

A data set is any object with `name`, `class_names` (in label order), `category_ids` (label -> the data set's own id), `max_boxes` (the most objects
on an image), `warnings` (one line for each kind of oddity that was mended), `sizes` ((height, width) of each image, known without decoding one),
`len(d)`, `d[i]` (a `Sample`), `d.image_name(i)` for messages, and `d.ground_truth()` in the form of a COCO instances file. One
that reads files may have `d.resized(i, (height, width))`, a `Sample` read at that size, faster.
"""
from pathlib import Path
from typing import Any
from tinydet.datasets.coco import Coco
from tinydet.datasets.crops import Crops
from tinydet.datasets.image_folder import ImageFolder
from tinydet.datasets.layouts import open_split, recognise
from tinydet.datasets.listed import Listed
from tinydet.datasets.problems import reason
from tinydet.datasets.shapes import Shapes
from tinydet.datasets.split import Rule
from tinydet.datasets.subset import Part
from tinydet.errors import UserError

SPLITS = ("train", "val")


def open_dataset(spec: str | Path, split: str, *, strict: bool = False, images: str | Path | None = None, rule: Rule | None = None,
                 **shapes_options: Any) -> Shapes | Coco | Listed | Part:
  """The "train" or "val" split of a data set.

  `spec` is "shapes" (the embedded data set, family 1), "shapes:1" or "shapes:2", with `shapes_options` (`size`, `count`, `seed`) for `Shapes`, or a
  folder or a file of annotations in one of the layouts of `layouts.LAYOUTS`, whose pictures lie in `images` where that is given. A data set that does
  not say its splits is divided by the folders its pictures lie in, where they are called train and val, or else by `rule` (by default a fifth is
  "val"); with `rule`, so is one that has training pictures alone.
  `layout` says how it was recognised. Raises UserError for any other folder and for a broken data set, with all its errors; with `strict`, oddities
  that would be mended are errors too.
  """
  if split not in SPLITS: raise UserError(f"split '{split}' is unknown; choose train or val")
  if str(spec).partition(":")[0] == "shapes":
    family = str(spec).partition(":")[2] or "1"
    if family not in ("1", "2"): raise UserError(f"data set '{spec}' is unknown; the embedded ones are shapes:1 and shapes:2")
    return Shapes(split, int(family), **shapes_options)
  if shapes_options: raise TypeError(f"{', '.join(shapes_options)} are options of the embedded data set, not of the folder {spec}")
  try: found, others = recognise(spec, images, split)
  except (ValueError, OSError) as e: raise UserError(f"{str(spec)[:200]!r}: is no name of a folder ({reason(e)})") from e   # a NUL, or too long
  dataset = open_split(found, split, strict, rule, str(spec))
  dataset.layout = f"{found.layout}: {found.why}"
  if others:
    dataset.warnings = [*dataset.warnings, f"{spec}: is also laid out as {' and '.join(others)}, which is passed over; taken as {dataset.layout}"]
  return dataset


def open_classes(spec: str | Path, split: str, **crops_options: Any) -> Crops | ImageFolder:
  """The "train" or "val" split of a data set for classifiers, whose samples have one box, the whole picture, with its class.

  `spec` is "crops:1" or "crops:2" ("crops" is the first), with `crops_options` (`size`, `count`, `seed`) for `Crops`, or a folder with
  `train/<class>/` and `val/<class>/` for `ImageFolder`. Raises UserError for anything else. There is no `ground_truth`.
  """
  if split not in SPLITS: raise UserError(f"split '{split}' is unknown; choose train or val")
  if str(spec).partition(":")[0] == "crops":
    family = str(spec).partition(":")[2] or "1"
    if family not in ("1", "2"): raise UserError(f"data set '{spec}' is unknown; the embedded ones are crops:1 and crops:2")
    return Crops(split, int(family), **crops_options)
  if crops_options: raise TypeError(f"{', '.join(crops_options)} are options of the embedded data set, not of the folder {spec}")
  if not Path(spec).is_dir(): raise UserError(f"{spec}: is neither a folder nor one of the embedded data sets, crops:1 and crops:2")
  return ImageFolder(spec, split)

