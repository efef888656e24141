"""Score a detector, or a file of detections, on a data set: COCO's table, AP per class, and the detections as a COCO result file.

  python examples/evaluate.py --weights runs/mine --data path/to/folder
  python examples/evaluate.py --weights coco --data path/to/coco
  python examples/evaluate.py --from-json detections.json --data path/to/folder

Pictures are prepared as the weights were trained; --size and --max-size say otherwise."""
import contextlib, json, math, os, sys, time
from dataclasses import dataclass
from tinydet.config import named_sources, option, parse, show_size, size
from tinydet.datasets import named
from tinydet.datasets.loader import Loader
from tinydet.detection.looks import LOOKS
from tinydet.errors import UserError, exit_on_user_error
from tinydet.predict import Predictor
from tinydet.reporting.tracking import duration
from tinydet.runtime.precision import DTYPES
from tinydet.scoring.coco_metric import CocoMetric, read_results
from tinydet.scoring.evaluation import evaluate
from tinydet.weights import checkpoint


@dataclass
class Config:
  data: str = option("shapes:1", "a folder of labelled pictures or its annotation file, the embedded shapes:1, shapes:2, or coco, openimages-mlperf, "
                     "whose split is downloaded on first use", group="data")
  data_dir: str | None = option(None, "where the data sets that are downloaded lie; by default the user's cache folder", group="data")
  split: str = option("val", "part of it to score", choices=("train", "val"), group="data")
  images: int | str = option(0, "a number: use only the first so many pictures, 0 uses all; a folder: where the data set's pictures lie",
                             parse=named.images, group="data")
  val_share: float | None = option(None, "share that is val, by a hash of the names, where the data does not say which; by default as the weights' "
                                   "run had it", minimum=0.01, maximum=0.9, group="data")
  size: tuple | None = option(None, "pixels the network sees: 800, or width x height as 192x144; by default what the weights were trained with",
                              parse=size, show=show_size, group="data")
  max_size: int | None = option(None, "keep the aspect ratio, the longer side at most this; 0 resizes to --size exactly", minimum=0, group="data")
  buckets: int = option(5, "with --max-size, canvases at most; a batch is padded to one of them, and each is compiled", minimum=1, maximum=16,
                        group="data")
  workers: int = option(2, "processes that load pictures; 0 loads between batches", minimum=0, maximum=256, group="data")

  weights: str = option("shapes", "shapes (ships with the code), coco, mlperf, a .safetensors or .pth file, or the folder of a run", group="model")
  variant: str = option("v1", "which of torchvision's networks --weights coco is: RetinaNet v1 or v2, or FCOS", choices=("v1", "v2", "fcos"),
                       group="model")
  score_threshold: float = option(0.05, "drop detections that score less", minimum=0, maximum=1, group="model")
  nms_threshold: float | None = option(None, "drop detections that overlap a better one of their class with an IoU above this; by default the "
                                       "detector's own", minimum=0, maximum=1, group="model")
  max_detections: int = option(300, "most detections a picture", minimum=1, group="model")
  tta: str = option("none", "look at each picture more than once and join what is found: flip, mirrored, twice as slow; scales, larger too, which "
                    "finds more small objects, five times as slow", choices=tuple(LOOKS), group="model")
  dtype: str = option("float32", "what the network computes in", choices=tuple(DTYPES), group="model")
  bs: int = option(8, "pictures a step, over all devices", minimum=1, group="model")
  gpus: int = option(1, "devices to divide the batch among", minimum=1, group="model")

  from_json: str | None = option(None, "score this COCO result file, without any network", group="results")
  to_json: str | None = option(None, "write the detections to this COCO result file", group="results")


def score_detector(config: Config, dataset, metric: CocoMetric) -> None:
  """Fill `metric` with what the detector finds on `dataset`."""
  predictor = Predictor(config.weights, variant=config.variant, size=config.size, max_size=config.max_size, class_names=dataset.class_names,
                        batch_size=config.bs, gpus=config.gpus, dtype=config.dtype, tta=config.tta)
  buckets = predictor.fit.buckets(dataset.sizes, config.buckets, config.bs)
  for note in predictor.notes: print(f"note: {note}")
  print(f"{predictor.about['model']} from {predictor.about['weights']}: {len(dataset)} pictures at {predictor.fit} on "
        f"{', '.join(predictor.devices)}")
  if len(buckets.canvases) > 1: print(f"{buckets}; each compiles when it first comes")
  predictor.place(buckets.canvases)
  options = {key: getattr(config, key) for key in ("score_threshold", "nms_threshold", "max_detections")}
  done, started = 0, time.monotonic()
  def watch(batch, detections) -> None:
    nonlocal done
    done += int((batch.image_ids >= 0).sum())
    if sys.stderr.isatty():
      seconds = time.monotonic() - started
      left = duration(seconds / done * (len(dataset) - done))
      print(f"\r{done}/{len(dataset)}  {done / seconds:.1f} images/s  {left} left ", end="", file=sys.stderr)
  with contextlib.closing(Loader(dataset, config.bs, predictor.fit.resize(), workers=config.workers, buckets=buckets)) as loader:
    evaluate(lambda batch: predictor.find(batch.images, batch.sizes, batch.origins, **options), loader.epoch(0), metric, watch)
  if sys.stderr.isatty(): print(file=sys.stderr)


def main(config: Config) -> None:
  started = time.monotonic()
  dataset = named.open_named(config.data, config.data_dir, config.split, config.images, config.weights, config.val_share)
  for warning in dataset.warnings: print(f"note: {warning}")
  truth = dataset.ground_truth()
  metric = CocoMetric(truth, dataset.category_ids)
  if config.from_json:
    try: metric.add_results(read_results(config.from_json))
    except ValueError as e: raise UserError(f"{config.from_json}: {e}; is it of another data set or split?") from None
  else:
    score_detector(config, dataset, metric)
  result = metric.compute()

  boxes = {name: 0 for name in dataset.class_names}
  by_id = dict(zip(dataset.category_ids, dataset.class_names))
  for annotation in truth["annotations"]:
    boxes[by_id[annotation["category_id"]]] += not (annotation.get("iscrowd", 0) or annotation.get("difficult", 0))
  print(f"\n{'class':24} {'boxes':>8} {'AP':>7}")
  for name, ap in sorted(result.class_ap.items(), key=lambda item: (math.isnan(item[1]), -item[1] if item[1] == item[1] else 0)):
    print(f"{name:24} {boxes[name]:8} {'     no' if math.isnan(ap) else f'{ap:7.3f}'}")
  print(f"\n{result.table}{sum(len(found[1]) for found in metric.found.values())} detections; {duration(time.monotonic() - started)} in all")
  if config.to_json:
    with checkpoint.whole_file(config.to_json) as f: f.write(json.dumps(metric.results()).encode())
    print(f"detections: {config.to_json}")


if __name__ == "__main__":
  with exit_on_user_error(), named_sources(config := parse(Config, {}, sys.argv[1:], os.environ)): main(config)
