"""Score a detector, or a file of detections, on a data set: COCO's table, AP per class, and the detections as a COCO result file.

  python examples/evaluate.py --weights runs/mine --data path/to/folder
  python examples/evaluate.py --weights coco --data path/to/coco
  python examples/evaluate.py --from-json detections.json --data path/to/folder

Pictures are prepared as the weights were trained; --size and --max-size say otherwise."""
import json, math, os, sys, time
from dataclasses import dataclass
from tinydet.runtime.device import require_device
from tinydet.errors import UserError, exit_on_user_error
from tinydet.config import option, parse, show_input, show_size, size
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.datasets import open_dataset
from tinydet.datasets.download import local_folder
from tinydet.datasets.buckets import choose_buckets
from tinydet.datasets.loader import Loader
from tinydet.datasets.subset import Subset
from tinydet.datasets.transforms import for_network
from tinydet.detection.anchors import anchors
from tinydet.scoring.coco_metric import CocoMetric, read_results
from tinydet.scoring.evaluation import evaluate
from tinydet.models.preprocess import normalize
from tinydet.weights import checkpoint
from tinydet.runtime.graphs import jit
from tinydet.runtime.devices import devices, replicate, to_devices
from tinydet.runtime.precision import DTYPES
from tinydet.reporting.tracking import duration
from tinydet.weights.weights import open_detector


@dataclass
class Config:
  data: str = option("shapes:1", "a folder in COCO or Pascal VOC layout, the embedded shapes:1, shapes:2, or coco, openimages-mlperf, whose split is "
                     "downloaded on first use", group="data")
  data_dir: str | None = option(None, "where the data sets that are downloaded lie; by default the user's cache folder", group="data")
  split: str = option("val", "part of it to score", choices=("train", "val"), group="data")
  images: int = option(0, "use only the first so many pictures; 0 uses all", minimum=0, group="data")
  size: tuple | None = option(None, "pixels the network sees: 800, or width x height as 192x144; by default what the weights were trained with",
                              parse=size, show=show_size, group="data")
  max_size: int | None = option(None, "keep the aspect ratio, the longer side at most this; 0 resizes to --size exactly", minimum=0, group="data")
  buckets: int = option(5, "with --max-size, canvases at most; a batch is padded to one of them, and each is compiled", minimum=1, maximum=16,
                        group="data")
  workers: int = option(2, "processes that load pictures; 0 loads between batches", minimum=0, maximum=256, group="data")

  weights: str = option("shapes", "shapes (ships with the code), coco, mlperf, a .safetensors or .pth file, or the folder of a run", group="model")
  variant: str = option("v1", "which of torchvision's two networks --weights coco is", choices=("v1", "v2"), group="model")
  score_threshold: float = option(0.05, "drop detections that score less", minimum=0, maximum=1, group="model")
  nms_threshold: float = option(0.5, "drop detections that overlap a better one of their class with an IoU above this", minimum=0, maximum=1,
                                group="model")
  max_detections: int = option(300, "most detections a picture", minimum=1, group="model")
  dtype: str = option("float32", "what the network computes in", choices=tuple(DTYPES), group="model")
  bs: int = option(8, "pictures a step, over all devices", minimum=1, group="model")
  gpus: int = option(1, "devices to divide the batch among", minimum=1, group="model")

  from_json: str | None = option(None, "score this COCO result file, without any network", group="results")
  to_json: str | None = option(None, "write the detections to this COCO result file", group="results")


def score_detector(config: Config, dataset, metric: CocoMetric) -> None:
  """Fill `metric` with what the detector finds on `dataset`."""
  names = devices(config.gpus)
  if config.bs % config.gpus: raise UserError(f"--bs {config.bs}: is not a multiple of --gpus {config.gpus}")
  backbone = "resnext50_32x4d" if config.weights == "mlperf" else "resnet50"   # the published detectors
  architecture = f"retinanet_{backbone}_fpn" + "_v2" * (config.variant == "v2")
  model, about, notes = open_detector(config.weights, architecture, dataset.class_names)
  trained_at = about.get("size"), about.get("max_size", 0)
  if config.size is None and trained_at[0] is None: raise UserError(f"{about['weights']}: does not say what size it was trained at; give --size")
  network_size, max_size = config.size or tuple(trained_at[0]), trained_at[1] if config.max_size is None else config.max_size
  buckets = choose_buckets(dataset.sizes, network_size, max_size, config.buckets, config.bs)
  for note in notes: print(f"note: {note}")
  print(f"{about['model']} from {about['weights']}: {len(dataset)} pictures at {show_input(network_size, max_size)} on {', '.join(names)}")
  if max_size: print(f"{buckets}; each compiles when it first comes")

  level_anchors = {canvas: Tensor(anchors(*canvas)) for canvas in buckets.canvases}
  replicate([*get_state_dict(model).values(), *level_anchors.values()], names)

  @jit
  def forward(images: Tensor) -> tuple[Tensor, ...]:
    with Context(TRAINING=0): return tuple(t.float().contiguous() for t in model(normalize(images, DTYPES[config.dtype])))

  fit, done, started = for_network(network_size, max_size), 0, time.monotonic()
  loader = Loader(dataset, config.bs, fit, workers=config.workers, buckets=buckets)
  def watch(batch, detections) -> None:
    nonlocal done
    done += int((batch.image_ids >= 0).sum())
    if sys.stderr.isatty():
      seconds = time.monotonic() - started
      left = duration(seconds / done * (len(dataset) - done))
      print(f"\r{done}/{len(dataset)}  {done / seconds:.1f} images/s  {left} left ", end="", file=sys.stderr)
  try:
    evaluate(lambda batch: forward(to_devices(batch.images, names)), loader.epoch(0), level_anchors, metric, watch,
             score_threshold=config.score_threshold, nms_threshold=config.nms_threshold, max_detections=config.max_detections)
  finally:
    loader.close()
    if sys.stderr.isatty(): print(file=sys.stderr)


def main(config: Config) -> None:
  started = time.monotonic()
  dataset = open_dataset(local_folder(config.data, config.data_dir, (config.split,)), config.split)
  if config.images: dataset = Subset(dataset, config.images)
  for warning in dataset.warnings: print(f"note: {warning}")
  truth = dataset.ground_truth()
  metric = CocoMetric(truth, dataset.category_ids)
  if config.from_json:
    try: metric.add_results(read_results(config.from_json))
    except ValueError as e: raise UserError(f"{config.from_json}: {e}; is it of another data set or split?") from None
  else:
    require_device()
    score_detector(config, dataset, metric)
  result = metric.compute()

  boxes = {name: 0 for name in dataset.class_names}
  by_id = dict(zip(dataset.category_ids, dataset.class_names))
  for annotation in truth["annotations"]: boxes[by_id[annotation["category_id"]]] += not annotation.get("iscrowd", 0)
  print(f"\n{'class':24} {'boxes':>8} {'AP':>7}")
  for name, ap in sorted(result.class_ap.items(), key=lambda item: (math.isnan(item[1]), -item[1] if item[1] == item[1] else 0)):
    print(f"{name:24} {boxes[name]:8} {'     no' if math.isnan(ap) else f'{ap:7.3f}'}")
  print(f"\n{result.table}{sum(len(found[1]) for found in metric.found.values())} detections; {duration(time.monotonic() - started)} in all")
  if config.to_json:
    with checkpoint.whole_file(config.to_json) as f: f.write(json.dumps(metric.results()).encode())
    print(f"detections: {config.to_json}")


if __name__ == "__main__":
  with exit_on_user_error(): main(parse(Config, {}, sys.argv[1:], os.environ))
