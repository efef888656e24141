"""What a training run would say of a data set, without a run: `python -m tinydet.datasets.check FOLDER`. Nothing is downloaded."""
import argparse, os, signal, sys, warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
import numpy as np
from tinydet.datasets import SPLITS, open_dataset
from tinydet.datasets.check_page import anchor_line, leaks, write_page
from tinydet.datasets.convert import convert
from tinydet.datasets.download import local_folder
from tinydet.datasets.duplicates import thumbnail
from tinydet.datasets.problems import refuse_empty, shown
from tinydet.datasets.shapes import Shapes
from tinydet.datasets.split import VAL_SHARE, Rule
from tinydet.errors import UserError, exit_on_user_error

COUNTS = (0, 1, 2, 6, 11, 21, 51, 101)                       # boxes an image: the beginnings of the table's columns
AREAS = {"small": 0, "medium": 32 ** 2, "large": 96 ** 2}    # square pixels, as in COCO's metrics
BAR = 40


def check(spec: str, splits: list[str], strict: bool, fast: bool, page: Path | None = None, **options: Any) -> dict[str, Any]:
  """Print what a run would say, and what is in the splits, as tables; UserError with every error of all of them.

  Unless `fast`, every picture is decoded: a run finds those that are cut short only when their turn comes. Then those that are nearly the same are
  told, and `page`, where it is given, is written. `options` are those of `open_dataset`. Returns the splits.
  """
  errors, datasets = [], {}
  for split in splits:
    try: datasets[split] = open_dataset(spec, split, strict=strict, **options)
    except UserError as e: errors.append(str(e))
    else:
      if split == "train" and not isinstance(datasets[split], Shapes):
        try: refuse_empty(datasets[split])
        except UserError as e: errors.append(str(e))
  for layout in dict.fromkeys(getattr(dataset, "layout", "") for dataset in datasets.values()):
    if layout: print(f"{shown(spec)} is {layout}")
  for line in dict.fromkeys(line for dataset in datasets.values() for line in dataset.warnings): print(f"note: {line}")
  if len({tuple(dataset.class_names) for dataset in datasets.values()}) > 1:
    errors.append(f"{spec}: training and validation data name different classes")
  for split, dataset in datasets.items(): print(f"\n{shown(spec)}, {split}\n{describe(dataset)}", end="")
  if "val" in datasets and not isinstance(datasets["val"], Shapes) and not datasets["val"].object_counts().any():
    print(f"note: {datasets['val'].name}: no picture of the split 'val' has an object: there will be no score, and no best weights")
  folders, small = {split: dataset for split, dataset in datasets.items() if not isinstance(dataset, Shapes)}, {}
  for split, dataset in {} if fast else folders.items():
    failures, small[split] = decode(dataset)
    errors += failures
  if errors: raise UserError("\nerror: ".join(dict.fromkeys(errors)))
  if folders and (line := anchor_line(folders)): print(f"\n{line}")
  if small:
    duplicates = leaks(folders, small)
    for split, pairs in duplicates.items():
      where = "both in train and in val: the score will be of pictures that were learnt" if split == "across" else f"within {split}"
      if pairs: print(f"note: nearly the same picture {where} ({len(pairs):,}): {', '.join(f'{shown(a)} and {shown(b)}' for a, b in pairs[:3])}")
    if page:
      notes = list(dict.fromkeys(line for dataset in folders.values() for line in dataset.warnings))
      write_page(page, spec, next(iter(folders.values())).layout, folders, notes, duplicates)
      print(f"page: {page}")
  print("\nA run would accept it" + ("." if not fast else " as far as the headers of the pictures tell."))
  return datasets


def describe(dataset: Any) -> str:
  """Pictures, their sizes, boxes an image, boxes by area, and classes, as a text of several lines."""
  truth = dataset.ground_truth()
  sizes = np.array([(image["width"], image["height"]) for image in truth["images"]])
  objects = [a for a in truth["annotations"] if not (a["iscrowd"] or a.get("difficult"))]
  position = {image["id"]: i for i, image in enumerate(truth["images"])}
  owners = np.array([position[a["image_id"]] for a in objects], np.int64)
  label_of = {category: label for label, category in enumerate(dataset.category_ids)}
  labels = np.array([label_of[a["category_id"]] for a in objects], np.int64)
  areas = np.array([a["area"] for a in objects], np.float64)

  smallest, median, largest = sizes.min(0), np.median(sizes, axis=0).astype(int), sizes.max(0)
  common = Counter(map(tuple, sizes.tolist())).most_common(3)
  lines = [f"{len(sizes):,} pictures, {len(objects):,} boxes, {len(truth['annotations']) - len(objects):,} crowd regions or difficult objects",
           f"width {smallest[0]} to {largest[0]}, median {median[0]}; height {smallest[1]} to {largest[1]}, median {median[1]}; most common "
           + ", ".join(f"{width}x{height} ({count:,})" for (width, height), count in common)]
  per_image = np.bincount(owners, minlength=len(sizes))
  names = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(COUNTS)] + [f"{COUNTS[-1]}+"]
  lines += _table("boxes an image", names, np.histogram(per_image, [*COUNTS, np.inf])[0].tolist(), "pictures")
  lines += _table("area of a box", list(AREAS), np.histogram(areas, [*AREAS.values(), np.inf])[0].tolist(), "boxes")
  pairs = np.unique(np.stack([labels, owners]), axis=1)[0]
  lines += _table("class", [f"{shown(name, 40)} (id {id})" for name, id in zip(dataset.class_names, dataset.category_ids)],
                  np.bincount(labels, minlength=len(dataset.class_names)).tolist(), "boxes",
                  np.bincount(pairs, minlength=len(dataset.class_names)).tolist())
  return "\n".join(lines) + "\n"


def decode(dataset: Any) -> tuple[list[str], list[np.ndarray]]:
  """Read every sample of the data set: what a run would stop with, first ten by name, and a `thumbnail` of each of the others."""
  def read(index: int) -> str | np.ndarray:
    try: return thumbnail(dataset[index].picture)
    except UserError as e: return str(e)
  failures, small = [], []
  with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    warnings.simplefilter("ignore")
    for done, found in enumerate(pool.map(read, range(len(dataset))), 1):
      (failures if isinstance(found, str) else small).append(found)
      if sys.stderr.isatty() and (done % 50 == 0 or done == len(dataset)):
        print(f"\rdecoded {done:,} of {len(dataset):,} pictures", end="\n" * (done == len(dataset)), file=sys.stderr, flush=True)
  if not failures: return [], small
  return ["\n  ".join([f"{dataset.name}: pictures that cannot be read to their end ({len(failures):,})", *failures[:10]])], small


def _table(title: str, names: list[str], counts: list[int], unit: str, images: list[int] | None = None) -> list[str]:
  width, most = max(map(len, [title, *names])), max([1, *counts])
  head = f"{title:{width}}  {unit:>9}" + ("" if images is None else f"  {'pictures':>9}")
  rows = [f"{name:{width}}  {count:9,}" + ("" if images is None else f"  {images[i]:9,}") + f"  {'#' * -(-BAR * count // most)}".rstrip()
          for i, (name, count) in enumerate(zip(names, counts))]
  return ["", head, *rows]


def main(argv: list[str]) -> None:
  """The program; see the module."""
  parser = argparse.ArgumentParser("python -m tinydet.datasets.check", description="What a training run would say of a data set, and what is in it.")
  parser.add_argument("path", help="a folder of labelled pictures in any layout of docs/layouts.md, its annotation file, the embedded shapes:1, "
                      "shapes:2, or coco, openimages-mlperf once they are downloaded")
  parser.add_argument("--images", help="folder of the pictures, where they do not lie with the annotations")
  parser.add_argument("--val-share", type=float, default=VAL_SHARE,
                      help="share that is val, by a hash of the names, where the data does not say which")
  parser.add_argument("--data-dir", default=os.environ.get("TINYDET_DATA_DIR"),
                      help="where the data sets that are downloaded lie; by default TINYDET_DATA_DIR, or else the user's cache folder")
  parser.add_argument("--split", choices=(*SPLITS, "both"), default="both")
  parser.add_argument("--strict", action="store_true", help="make every oddity an error")
  parser.add_argument("--fast", action="store_true", help="read the headers of the pictures, not their pixels")
  parser.add_argument("--page", type=Path, default=Path("check.html"), help="the page to write, unless --fast; default check.html")
  parser.add_argument("--convert", choices=("coco", "yolo"), help="write the data set in this layout into the new folder --out")
  parser.add_argument("--out", type=Path, help="by default the data set's name and the layout, as photos-coco")
  args = parser.parse_args(argv)
  splits = list(SPLITS) if args.split == "both" else [args.split]
  embedded = args.path.partition(":")[0] == "shapes"
  if embedded and args.convert: raise UserError(f"--convert {args.convert}: is for folders, not for embedded data sets")
  datasets = check(local_folder(args.path, args.data_dir, download=False), splits, args.strict, args.fast, args.page,
                   **({} if embedded else {"images": args.images, "rule": Rule(args.val_share)}))
  if args.convert:
    out = args.out or Path(f"{Path(args.path).resolve().stem}-{args.convert}")
    for note in convert(args.convert, datasets, out): print(f"note: {note}")
    print(f"written to {out}; train on it with --data {out}")


if __name__ == "__main__":
  if hasattr(signal, "SIGPIPE"): signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `| head` ends it without a word
  with exit_on_user_error(): main(sys.argv[1:])
