"""Measure annotations and scoring at the size of OpenImages on this machine, with a made-up data set. No network and no tinygrad.

  python examples/bench_scale.py --folder scratch/big                    # annotations of 1.17 million pictures: 2.5 GB and a folder of links to one
  python examples/bench_scale.py --images 0 --val-images 24781           # detections on a validation set
  python examples/bench_scale.py --images 0 --against-pycocotools        # and what pycocotools makes of them: a quarter of an hour, 3.4 GB

Each measurement runs in a fresh process, whose peak memory is shown; a worker's is what it has alone (Private_Dirty), that and its share of what
several map (Pss), and that and all of what it maps (Rss)."""
import contextlib, io, os, pickle, re, sys, time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tinydet.datasets.coco import Coco
from tinydet.datasets.loader import Loader
from tinydet.datasets.transforms import resize
from tinydet.scoring.analysis import analyse
from tinydet.scoring.coco_metric import CocoMetric
from tinydet.errors import exit_on_user_error
from tinydet.config import option, parse

SIDES = (768, 1024)   # height and width of every picture
LINKS = 30_000        # to one file: fewer than any common file system allows
AT_ONCE = 500_000     # detections that pycocotools gets: up to 6 kB each


@dataclass
class Config:
  folder: str = option("bench-scale", "where the data set is made, and left", group="annotations")
  images: int = option(1_170_000, "training pictures; 0 skips this", minimum=0, group="annotations")
  boxes: float = option(8.5, "boxes on a picture, on average", minimum=0, group="annotations")
  classes: int = option(264, "classes", minimum=1, group="annotations")
  workers: int = option(2, "loader workers", minimum=1, group="annotations")

  val_images: int = option(24_781, "validation pictures; 0 skips this", minimum=0, group="scoring")
  val_detections: int = option(300, "detections on each", minimum=1, group="scoring")
  against_pycocotools: bool = option(False, "have pycocotools score the same, a slice of the classes at a time, and compare", group="scoring")


def make_data(folder: Path, images: int, boxes: float, classes: int) -> None:
  """A data set in COCO layout with the fields of MLCommons' OpenImages, all of whose pictures are links to a few files."""
  (folder / "train").mkdir(parents=True)
  (folder / "annotations").mkdir()
  rng, names = np.random.default_rng(0), [f"{i * 2654435761 % 2 ** 64:016x}.jpg" for i in range(images)]
  for first in range(0, images, LINKS):
    Image.new("RGB", SIDES[::-1], (first // LINKS, 80, 120)).save(source := folder / "train" / names[first])
    for name in names[first + 1:first + LINKS]: os.link(source, folder / "train" / name)
  with open(folder / "annotations" / "instances_train.json", "w") as f:
    f.write('{"info": {}, "licenses": [], "categories": [')
    f.write(", ".join(f'{{"id": {k}, "name": "class {k}", "supercategory": "none"}}' for k in range(1, classes + 1)))
    f.write('], "annotations": [')
    number = 0
    for first in range(0, images, 10_000):
      counts = rng.poisson(boxes, min(10_000, images - first))
      corners = np.sort(rng.random((counts.sum(), 2, 2)), axis=1).reshape(-1, 4) * np.tile(SIDES[::-1], 2)
      labels = 1 + (rng.random(len(corners)) ** 2 * classes).astype(int)
      for image, (x, y, x1, y1), label in zip(np.repeat(np.arange(first, first + len(counts)), counts).tolist(), corners.tolist(), labels.tolist()):
        w, h = round(x1 - x, 6), round(y1 - y, 6)
        f.write(", " * (number > 0) + f'{{"id": {number}, "image_id": {image}, "freebase_id": "/m/0{label:04x}", "category_id": {label}, '
                f'"iscrowd": 0, "bbox": [{round(x, 6)}, {round(y, 6)}, {w}, {h}], "area": {w * h}, "IsOccluded": 0, "IsInside": 0, "IsDepiction": 0, '
                '"IsTruncated": 1, "IsGroupOf": 0}')
        number += 1
    f.write('], "images": [')
    f.write(", ".join(f'{{"id": {i}, "file_name": "{name}", "height": {SIDES[0]}, "width": {SIDES[1]}, "license": null, "coco_url": null}}'
                      for i, name in enumerate(names)))
    f.write("]}")


def alone(function: Callable, *args: Any) -> Any:
  """What `function` returns in a process of its own, with that process's peak memory in bytes."""
  with ProcessPoolExecutor(1, get_context("spawn")) as pool: return pool.submit(_measured, function, *args).result()


def _measured(function: Callable, *args: Any) -> tuple[Any, int]:
  return function(*args), memory("status", "VmHWM")


def memory(file: str, key: str, process: int | str = "self") -> int:
  return 1024 * int(re.search(rf"^{key}:\s*(\d+)", Path(f"/proc/{process}/{file}").read_text(), re.MULTILINE)[1])


def open_data(folder: Path) -> tuple[float, float, int, int]:
  """Seconds, of them on a processor, pictures and boxes."""
  begun, used = time.perf_counter(), time.process_time()
  dataset = Coco(folder / "annotations" / "instances_train.json", folder / "train")
  return time.perf_counter() - begun, time.process_time() - used, len(dataset), len(dataset.boxes)


def made_up_metric(config: Config) -> CocoMetric:
  """Truth, and detections of which a third are near it; the others are of classes drawn with the same odds, anywhere."""
  rng, found_each = np.random.default_rng(0), config.val_detections
  counts = rng.poisson(config.boxes, config.val_images)
  labels = lambda n: 1 + (rng.random(n) ** 2 * config.classes).astype(int)
  def corners(n): return np.sort(rng.random((n, 2, 2)), axis=1).reshape(-1, 4) * np.tile(SIDES[::-1], 2)
  truth, categories, offsets = corners(counts.sum()), labels(counts.sum()), np.cumsum([0, *counts])
  owners = np.repeat(np.arange(config.val_images), counts).tolist()
  annotations = [{"id": i, "image_id": image, "category_id": category, "bbox": [x, y, x1 - x, y1 - y], "area": (x1 - x) * (y1 - y), "iscrowd": 0}
                 for i, (image, category, (x, y, x1, y1)) in enumerate(zip(owners, categories.tolist(), truth.tolist()), 1)]
  metric = CocoMetric({"images": [{"id": i, "height": SIDES[0], "width": SIDES[1]} for i in range(config.val_images)], "annotations": annotations,
                       "categories": [{"id": k, "name": f"class {k}"} for k in range(1, config.classes + 1)]}, list(range(1, config.classes + 1)))
  for image in range(config.val_images):
    boxes, found_labels = corners(found_each), labels(found_each)
    if counts[image]:
      near = rng.integers(offsets[image], offsets[image + 1], found_each // 3)
      boxes[:len(near)], found_labels[:len(near)] = truth[near] * rng.normal(1, 0.05, (len(near), 4)), categories[near]
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    scores = rng.beta(1, 6, found_each) + np.where(np.arange(found_each) < found_each // 3, 0.1, 0)
    order = np.argsort(-scores)
    metric.add(Found(boxes[None, order].astype(np.float32), scores[None, order].astype(np.float32), found_labels[None, order] - 1,
                     np.array([found_each])), np.array([image]))
  return metric


@dataclass
class Found:
  boxes: np.ndarray
  scores: np.ndarray
  labels: np.ndarray
  counts: np.ndarray


def score(config: Config) -> dict[str, Any]:
  metric = made_up_metric(config)
  before = memory("status", "VmHWM")
  begun, used = time.perf_counter(), time.process_time()
  result = metric.compute()
  scored, used = time.perf_counter() - begun, time.process_time() - used
  peak = memory("status", "VmHWM")
  begun, used_before = time.perf_counter(), time.process_time()
  analyse(metric, result)
  analysed = time.perf_counter() - begun, time.process_time() - used_before
  begun = time.perf_counter()
  size = len(pickle.dumps(metric))
  return {"scored": (scored, used), "analysed": analysed, "packed": (time.perf_counter() - begun, size), "before": before, "peak": peak,
          "mAP": result.metrics["mAP"], "detections": sum(len(arrays[1]) for arrays in metric.found.values())}


def measure_scoring(config: Config) -> None:
  s, peak = alone(score, config)
  (scored, used), (analysed, used_there), (packed, size) = s["scored"], s["analysed"], s["packed"]
  print(f"{s['detections']:,} detections on {config.val_images:,} pictures, {config.classes} classes: scored in {scored:.1f} s ({used:.1f} s of a "
        f"processor), peak {s['peak'] / 1e6:,.0f} MB, of which {s['before'] / 1e6:,.0f} MB before; mAP {s['mAP']:.6f}\n"
        f"the report's analysis: {analysed:.1f} s ({used_there:.1f} s of a processor), peak {peak / 1e6:,.0f} MB; "
        f"handing over to another process: {packed:.1f} s, {size / 1e6:,.0f} MB", flush=True)
  if not config.against_pycocotools: return
  c, _ = alone(compare, config)
  print(f"pycocotools, at most {AT_ONCE:,} detections or a class at a time: {c['used']:.1f} s of a processor, peak {c['peak'] / 1e6:,.0f} MB, "
        f"of which {c['before'] / 1e6:,.0f} MB before")
  if any(c["apart"].values()): sys.exit("DIFFERENT, at most by " + ", ".join(f"{apart:.1e} ({name})" for name, apart in c["apart"].items()))
  print(f"identical: {', '.join(c['apart'])}")


def score_with_pycocotools(metric: CocoMetric, at_once: int) -> COCOeval:
  """What pycocotools makes of all that `metric` holds, after `summarize`: of as many classes at a time as have `at_once` detections in all, one at
  least. Its numbers of a class depend on that class alone."""
  found = np.concatenate([categories for _, _, categories in metric.found.values()])
  groups, held = [[]], 0
  for category in sorted(metric.category_ids.tolist()):
    count = int((found == category).sum())
    if groups[-1] and held + count > at_once: groups, held = [*groups, []], 0
    groups[-1].append(category)
    held += count
  parts = [score_classes(metric, group) for group in groups]
  with contextlib.redirect_stdout(io.StringIO()):
    evaluation = COCOeval(iouType="bbox")
    evaluation.eval = {"precision": np.concatenate([part[0] for part in parts], 2), "recall": np.concatenate([part[1] for part in parts], 1)}
    evaluation.summarize()
  return evaluation


def score_classes(metric: CocoMetric, categories: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """pycocotools' precision and recall of some classes, given nothing of the others."""
  with contextlib.redirect_stdout(io.StringIO()):
    truth, results = COCO(), []
    truth.dataset = metric.ground_truth | {"annotations": [dict(a) for a in metric.ground_truth["annotations"] if a["category_id"] in categories]}
    truth.createIndex()
    for image_id, arrays in metric.found.items():
      mine = np.isin(arrays[2], categories)
      results += [{"image_id": image_id, "category_id": category, "bbox": box, "score": score}
                  for box, score, category in zip(*(column[mine].tolist() for column in arrays))]
    evaluation = COCOeval(truth, truth.loadRes(results) if results else COCO(), "bbox")
    evaluation.params.imgIds, evaluation.params.catIds = sorted(metric.image_ids), categories
    evaluation.evaluate()
    evaluation.accumulate()
  return evaluation.eval["precision"], evaluation.eval["recall"]


def compare(config: Config) -> dict[str, Any]:
  """pycocotools' seconds of a processor and memory, and the largest differences of ours from its numbers."""
  metric = made_up_metric(config)
  before, used = memory("status", "VmHWM"), time.process_time()
  theirs = score_with_pycocotools(metric, AT_ONCE)
  used, peak = time.process_time() - used, memory("status", "VmHWM")
  ours = metric.accumulate()
  with contextlib.redirect_stdout(io.StringIO()): ours.summarize()
  pairs = {"precision": (ours.eval["precision"], theirs.eval["precision"]), "recall": (ours.eval["recall"], theirs.eval["recall"]),
           "the 12 numbers": (ours.stats, theirs.stats)}
  return {"used": used, "before": before, "peak": peak, "apart": {name: float(np.abs(one - other).max()) for name, (one, other) in pairs.items()}}


def load(folder: Path, workers: int, batches: int = 50) -> tuple[float, list[dict[str, float]]]:
  """Seconds to the first batch, and MB that each worker holds after some."""
  loader = Loader(Coco(folder / "annotations" / "instances_train.json", folder / "train"), 16, resize(64, 64), shuffle=True, workers=workers)
  begun, first = time.perf_counter(), 0.0
  for i, _ in zip(range(batches), loader.epoch(0)):
    if i == 0: first = time.perf_counter() - begun
  held = [{key: memory("smaps_rollup", key, p.pid) / 1e6 for key in ("Private_Dirty", "Pss", "Rss")} for p in loader._pool.processes]
  loader.close()
  return first, held


def measure_annotations(config: Config) -> None:
  folder = Path(config.folder)
  if not folder.exists():
    begun = time.perf_counter()
    make_data(folder, config.images, config.boxes, config.classes)
    print(f"made in {time.perf_counter() - begun:.0f} s")
  size = (folder / "annotations" / "instances_train.json").stat().st_size
  os.environ["XDG_CACHE_HOME"] = str(cache := folder.absolute() / "cache")
  for kept in cache.rglob("*.index"): kept.unlink()
  for what in ("first", "second"):
    (seconds, used, images, boxes), peak = alone(open_data, folder)
    print(f"{what} open: {images:,} pictures, {boxes:,} boxes, {size / 1e9:.2f} GB: {seconds:.1f} s ({used:.1f} s of a processor), "
          f"peak {peak / 1e6:,.0f} MB", flush=True)
  kept = sum(p.stat().st_size for p in cache.rglob("*.index"))
  (first, held), _ = alone(load, folder, config.workers)
  print(f"kept: {kept / 1e6:,.0f} MB; first batch of {config.workers} workers after {first:.1f} s; each holds, MB: "
        + "; ".join(", ".join(f"{key} {value:.0f}" for key, value in worker.items()) for worker in held))


def main(config: Config) -> None:
  print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}", flush=True)
  if config.images: measure_annotations(config)
  if config.val_images: measure_scoring(config)


if __name__ == "__main__":
  with exit_on_user_error(): main(parse(Config, {}, sys.argv[1:], os.environ))
