"""A data set of any layout written as COCO's or YOLO's: pictures copied, annotations as this project reads them."""
import json, os, shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
import yaml
from PIL import Image
from tinydet.datasets.image import ORIENTATION, opened
from tinydet.download import write_whole
from tinydet.errors import UserError


def convert(kind: str, datasets: Mapping[str, Any], folder: Path) -> list[str]:
  """Write `datasets`, by split, as "coco" (`annotations/instances_{split}.json`, `{split}/`) or "yolo" (`data.yaml`, `images/{split}/`,
  `labels/{split}/`) into the new `folder`; returns notes. A picture that its EXIF orientation turns is written as it is read, without one.

  UserError where `folder` is there, or the disk refuses."""
  if folder.exists(): raise UserError(f"--out {folder}: is there already; choose another")
  notes, left_out = [], 0
  try:
    for split, dataset in datasets.items():
      truth = dataset.ground_truth()
      pictures = folder/(split if kind == "coco" else f"images/{split}")
      pictures.mkdir(parents=True)
      names = _file_names([dataset.file_name(i) for i in range(len(dataset))])
      names = [_copy(dataset, i, pictures/name).name for i, name in enumerate(names)]
      for image, name in zip(truth["images"], names): image["file_name"] = name
      ignored = sum(bool(a["iscrowd"] or a.get("difficult")) for a in truth["annotations"])
      if kind == "coco":
        for a in truth["annotations"]: a["iscrowd"] = int(bool(a["iscrowd"] or a.pop("difficult", 0))); a.pop("difficult", None)
        (folder/"annotations").mkdir(exist_ok=True)
        write_whole(folder/"annotations"/f"instances_{split}.json", json.dumps(truth).encode())
      else:
        left_out += ignored
        _write_labels(folder/"labels"/split, dataset, truth)
    if kind == "yolo":
      names = next(iter(datasets.values())).class_names
      about = {"path": ".", **{split: f"images/{split}" for split in datasets}, "names": dict(enumerate(names))}
      write_whole(folder/"data.yaml", yaml.safe_dump(about, sort_keys=False, allow_unicode=True).encode("utf-8", "backslashreplace"))
      if left_out: notes.append(f"crowd regions and difficult objects, which YOLO's labels cannot say, left out ({left_out:,})")
  except OSError as e: raise UserError(f"cannot write into {folder}: {e.strerror or e}") from e
  return notes


def _write_labels(folder: Path, dataset: Any, truth: dict[str, Any]) -> None:
  folder.mkdir(parents=True)
  label_of = {category: label for label, category in enumerate(dataset.category_ids)}
  lines: dict[int, list[str]] = {image["id"]: [] for image in truth["images"]}
  sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
  for a in truth["annotations"]:
    if a["iscrowd"] or a.get("difficult"): continue
    (width, height), (x, y, w, h) = sizes[a["image_id"]], a["bbox"]
    x0, y0, x1, y1 = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
    numbers = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
    lines[a["image_id"]].append(f"{label_of[a['category_id']]} {' '.join(f'{n:.8f}' for n in numbers)}\n")
  for image in truth["images"]:
    (folder/(os.path.splitext(image["file_name"])[0] + ".txt")).write_text("".join(lines[image["id"]]))


def _file_names(paths: list[str]) -> list[str]:
  """A name for each picture whose stem is its own: that of its file, with its folders where several have it."""
  stems = [os.path.splitext(os.path.basename(path))[0].lower() for path in paths]
  if len(set(stems)) == len(stems): return [os.path.basename(path) for path in paths]
  joined = [path.replace("../", "").replace("/", "_") for path in paths]
  if len({os.path.splitext(name)[0].lower() for name in joined}) == len(joined): return joined
  return [f"{i:06}_{name}" for i, name in enumerate(joined, 1)]


def _copy(dataset: Any, index: int, to: Path) -> Path:
  source = dataset.image_name(index)
  with opened(source) as picture: turned = picture.getexif().get(ORIENTATION, 1) not in (0, 1)
  if not turned:
    shutil.copyfile(source, to)
    return to
  to = to.with_suffix(".png")
  Image.fromarray(dataset[index].image).save(to)
  return to
