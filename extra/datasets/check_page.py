"""The page about a data set: pictures with their boxes, histograms, how anchors fit, and near-duplicates. One file, with nothing fetched."""
import base64, html, io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
import numpy as np
from PIL import Image
from tinydet.datasets.duplicates import near_duplicates
from tinydet.datasets.fit import Fit, seen_shapes
from tinydet.detection.anchor_fit import MISSED, anchor_shapes, most_missed
from tinydet.download import write_whole

GRID, SIDE = 24, 320       # pictures of each split on the page, and their longer side in pixels
MOST_SHOWN = 12            # pairs of near-duplicates
AT = 320                   # pixels: the trainer's default --size, at which anchors are judged
SIZES = (0, 16, 32, 64, 96, 192, 384)   # pixels: square root of a box's area
STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em;color:#222;background:#fff}
figure{display:inline-block;position:relative;margin:4px;vertical-align:top}figure svg{position:absolute;left:0;top:0}
figcaption{font-size:11px;max-width:320px;overflow-wrap:anywhere}td,th{text-align:left;padding:1px 8px;font-variant-numeric:tabular-nums}
i{display:inline-block;height:.8em;background:#4a7ab5}.bad{color:#a40000}"""


def leaks(datasets: Mapping[str, Any], small: Mapping[str, Sequence[np.ndarray]]) -> dict[str, list[tuple[str, str]]]:
  """Near-duplicates as pairs of files: within each split, by its name, and across them, "across". `small` are thumbnails of all pictures."""
  owners = [(split, i) for split, pictures in small.items() for i in range(len(pictures))]
  found: dict[str, list[tuple[str, str]]] = {split: [] for split in [*small, "across"]}
  for one, other in near_duplicates([picture for pictures in small.values() for picture in pictures]):
    (a, i), (b, j) = owners[one], owners[other]
    found[a if a == b else "across"].append((datasets[a].image_name(i), datasets[b].image_name(j)))
  return found


def anchor_line(datasets: Mapping[str, Any], size: int = AT) -> str:
  """What share of the boxes, or of a class of them, RetinaNet's anchors miss, with pictures stretched to `size`; "" without boxes."""
  by_class: dict[str, np.ndarray] = {}
  for dataset in datasets.values():
    for name, shapes in seen_shapes(dataset, Fit((size, size))).items(): by_class[name] = np.concatenate([by_class.get(name, shapes[:0]), shapes])
  if not by_class: return ""
  missed, worst, shapes = most_missed(by_class, anchor_shapes())
  small = (np.sqrt(shapes.prod(1)) < 16).mean()
  fits = "a larger --size makes them fit" if small > missed / 2 else "--anchors auto fits them, a YOLO has none"
  advice = f"; {fits}" if missed > 0.1 else ""
  return f"RetinaNet's anchors at {size}x{size}: {missed:.0%} of {worst} are below an IoU of {MISSED:g} with every shape{advice}"


def write_page(file: Path, title: str, layout: str, datasets: Mapping[str, Any], notes: Sequence[str], duplicates: Mapping[str, list]) -> None:
  """Write the page; UserError where the disk refuses."""
  parts = [f"<!doctype html><meta charset=utf-8><title>{_text(title)}</title><style>{STYLE}</style><h1>{_text(title)}</h1><p>{_text(layout)}"]
  parts += [f"<p class=bad>{_text(line)}" for line in notes]
  if line := anchor_line(datasets): parts.append(f"<p>{_text(line)}")
  for split, pairs in duplicates.items():
    if not pairs: continue
    what = "both in train and in val: the score is of pictures that were learnt" if split == "across" else f"within {split}"
    rows = "".join(f"<tr><td>{_text(one)}<td>{_text(other)}" for one, other in pairs[:MOST_SHOWN])
    parts.append(f"<h2>{len(pairs):,} pairs of nearly the same picture {what}</h2><table>{rows}</table>")
  for split, dataset in datasets.items():
    parts += [f"<h2>{split}: {len(dataset):,} pictures</h2>", *_histograms(dataset)]
    step = max(1, len(dataset) // GRID)
    parts += [_figure(dataset, i) for i in range(0, len(dataset), step)][:GRID]
  write_whole(file, "\n".join(parts).encode("utf-8", "backslashreplace"))


def _histograms(dataset: Any) -> list[str]:
  truth = dataset.ground_truth()
  objects = [a for a in truth["annotations"] if not (a["iscrowd"] or a.get("difficult"))]
  names = {category["id"]: category["name"] for category in truth["categories"]}
  counts = dict.fromkeys(names, 0)
  for a in objects: counts[a["category_id"]] += 1
  sides = np.sqrt([a["bbox"][2] * a["bbox"][3] for a in objects])
  labels = [f"{low} to {high}" for low, high in pairwise(SIZES)] + [f"{SIZES[-1]} and more"]
  return [_table("class", [names[k] for k in counts], list(counts.values())),
          _table("size of a box in the picture, square root of its area", labels, np.histogram(sides, [*SIZES, np.inf])[0].tolist())]


def _figure(dataset: Any, index: int) -> str:
  sample = dataset[index]
  picture = Image.fromarray(sample.image)
  picture.thumbnail((SIDE, SIDE))
  data = io.BytesIO()
  picture.save(data, "JPEG", quality=80)
  scale = picture.width / sample.image.shape[1]
  marks = []
  for (x0, y0, x1, y1), label in zip((sample.boxes * scale).round(1).tolist(), sample.labels.tolist()):
    colour = f"hsl({label * 137.5 % 360:.0f} 90% 55%)"
    marks.append(f'<rect x={x0} y={y0} width={x1 - x0:.1f} height={y1 - y0:.1f} fill=none stroke="{colour}" stroke-width=2></rect>'
                 f'<text x={x0 + 2} y={max(9, y0 - 2)} font-size=10 fill="{colour}" stroke=#000 stroke-width=2 paint-order=stroke>'
                 f"{_text(dataset.class_names[label])}</text>")
  size, source = f"width={picture.width} height={picture.height}", base64.b64encode(data.getvalue()).decode()
  return (f'<figure><img {size} alt="" src="data:image/jpeg;base64,{source}"><svg {size}>{"".join(marks)}</svg>'
          f"<figcaption>{_text(dataset.image_name(index))}</figcaption></figure>")


def _table(title: str, names: Sequence[str], counts: Sequence[int]) -> str:
  most = max([1, *counts])
  rows = "".join(f'<tr><td>{_text(name)}<td>{count:,}<td><i style="width:{300 * count / most:.0f}px"></i>' for name, count in zip(names, counts))
  return f"<table><tr><th>{_text(title)}<th>boxes<th>{rows}</table>"


def _text(value: Any) -> str: return html.escape(str(value))
