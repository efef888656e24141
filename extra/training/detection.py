"""The story that all trainers of detectors share: the data and its loaders, the evaluation after an epoch, the run from first step to last line."""
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet import detectors
from tinydet.config import option, show_size, size
from tinydet.datasets import open_dataset, split
from tinydet.datasets.download import local_folder
from tinydet.datasets.fit import Fit
from tinydet.datasets.loader import Loader
from tinydet.datasets.problems import refuse_empty
from tinydet.datasets.subset import Subset, whole_of
from tinydet.detectors import Detector
from tinydet.errors import UserError
from tinydet.reporting import panels, report
from tinydet.reporting.forecast import CONVERGENCE, Forecast
from tinydet.reporting.tracking import duration
from tinydet.runtime.devices import replicate, to_devices
from tinydet.runtime.graphs import jit
from tinydet.runtime.mpi import Ranks
from tinydet.runtime.precision import DTYPES
from tinydet.scoring.background import Pending, score
from tinydet.scoring.coco_metric import CocoMetric, CocoResult
from tinydet.scoring.evaluation import evaluate
from tinydet.training import plan
from tinydet.training.loaders import make_loaders
from tinydet.training.run import Run
from tinydet.training.trainer import TrainerConfig, total_updates

PICTURES_IN_TABLE = 32   # validation pictures, the worst and the best, in wandb's table of each evaluation
EMBEDDED = "shapes"      # how the names of embedded data sets begin


@dataclass
class DetectionConfig(TrainerConfig):
  """What trainers of detectors add; a program adds its networks."""
  bs: int = option(8, "pictures a step, over all devices and machines; auto: doubled while they fit and a picture's time falls, the rate with them",
                   minimum=0, parse=plan.pictures, show=plan.show_pictures, group="training")
  data: str = option("shapes:2", "a folder of labelled pictures in any layout of docs/layouts.md (COCO, VOC, YOLO, ...), its annotation file, the "
                     "embedded shapes:1, shapes:2, or coco, openimages-mlperf, which are downloaded on first use", group="data")
  images: str | None = option(None, "folder of the pictures, where they do not lie with --data", group="data")
  val_share: float = option(split.VAL_SHARE, "share of the pictures to validate on, by a hash of their names, where the data does not say which",
                            minimum=0.01, maximum=0.9, group="data")
  data_dir: str | None = option(None, "where the data sets that are downloaded lie, each in a folder of its name; by default the user's cache "
                                "folder", group="data")
  size: tuple = option((320, 320), "pixels the network sees: 800, or width x height as 192x144; with --max-size, the shorter side", parse=size,
                       show=show_size, group="data")
  max_size: int = option(0, "keep the aspect ratio, the longer side at most this, on a padded canvas; 0 resizes to --size exactly", minimum=0,
                         group="data")
  buckets: int = option(5, "with --max-size, canvases at most; a batch is padded to one of them, and each is compiled", minimum=1, maximum=16,
                        group="data")
  flip: float = option(0.5, "chance of mirroring a training picture", minimum=0, maximum=1, group="data")
  scale_jitter: bool = option(False, "zoom training pictures by 0.5 to 2", group="data")
  photometric: bool = option(False, "vary brightness, contrast, saturation and hue of training pictures", group="data")
  mosaic: float = option(0.0, "chance of a training picture made of several (see extra/datasets/augment.py)", minimum=0, maximum=1, group="data")
  mosaic_nine: float = option(0.0, "share of those that are made of nine, the others of four", minimum=0, maximum=1, group="data")
  mixup: float = option(0.0, "chance of a training picture blended with another", minimum=0, maximum=1, group="data")
  paste: float = option(0.0, "chance of objects of another picture, boxes and all, being pasted in", minimum=0, maximum=1, group="data")
  close_mosaic: int = option(10, "last epochs without mosaics, blends and pasted objects", minimum=0, group="data")
  zoom: float = option(0.0, "scale training pictures by up to 1 +- this, 0.5 say, inside the canvas", minimum=0, maximum=0.95, group="data")
  shift: float = option(0.0, "shift training pictures by up to this share of the canvas", minimum=0, maximum=1, group="data")
  rotate: float = option(0.0, "turn training pictures by up to so many degrees either way", minimum=0, maximum=180, group="data")
  shear: float = option(0.0, "slant training pictures by up to so many degrees", minimum=0, maximum=45, group="data")
  perspective: float = option(0.0, "tilt training pictures: an edge comes up to this share nearer or goes farther", minimum=0, maximum=0.3,
                              group="data")
  iou_crop: float = option(0.0, "chance of cutting a training picture to a part that shows some object, as SSD does", minimum=0, maximum=1,
                           group="data")
  expand: float = option(0.0, "chance of laying a training picture, up to 4 times smaller, on an empty sheet, as SSD does", minimum=0, maximum=1,
                         group="data")
  cutout: float = option(0.0, "chance of covering parts of a training picture", minimum=0, maximum=1, group="data")
  grey: float = option(0.0, "chance of a training picture without colour", minimum=0, maximum=1, group="data")
  multi_scale: float = option(0.0, "train at five sizes from 1 - this to 1 + this, times --size, a batch at one of them; each is compiled", minimum=0,
                              maximum=0.75, group="data")
  balance: float = option(0.0, "show classes oftener that fewer than this share of the pictures have, 0.1 say, by the root of what they lack",
                          minimum=0, maximum=1, group="data")
  hsv: bool = option(False, "vary hue, saturation and value of training pictures as YOLOv5 does: by 0.015, 0.7 and 0.4", group="data")
  strict: bool = option(False, "make every oddity of the data an error", group="data")
  workers: int = option(2, "processes that load training pictures; 0 loads between steps", minimum=0, maximum=256, group="data")
  train_images: int = option(0, "use only the first so many training pictures; 0 uses all; shapes are drawn on demand, any number", minimum=0,
                             group="data")
  overfit: bool = option(False, "evaluate on the training pictures, unchanged: a sound model learns a few by heart", group="data")
  weights: str = option("none", "where to start: none, auto (the best that is published for the network and can be had), "
                        "shapes or shapes-yolo (ship with the code), imagenet, imagenet_v2, coco, mlperf, the name of "
                        "a YOLO, a .pth or .safetensors file, or the folder of a run", group="model")
  anchors: str = option("published", "auto: fit their sizes and shapes to the boxes, where they miss more than a tenth of those of a class",
                        choices=("published", "auto"), group="model")
  budget: float = option(0.0, "time for the whole run, such as 30m or 2h: network, size and epochs are chosen to fill it where they are left free; "
                         "0: as the settings say", parse=plan.seconds, show=plan.show_seconds, group="training")
  trainable_layers: int = option(5, "stages of the backbone that learn, counted from the top; all of them where --weights is none", minimum=0,
                                 maximum=5, group="model")
  score_in_background: bool = option(False, "go on training while another process scores an evaluation", group="run")
  pictures: int = option(8, "validation pictures drawn after each evaluation", minimum=0, group="run")


def open_splits(config: DetectionConfig, ranks: Ranks, kept: Path | None = None) -> tuple[Any, Any]:
  """The training and the validation data set, divided as the run in the folder `kept` did, which rank 0 knows; UserError with all that is wrong with
  either."""
  splits, wrong, embedded = [], [], config.data.partition(":")[0] == EMBEDDED
  with ranks.in_turn(): data = local_folder(config.data, config.data_dir)   # one downloads, the others find it there
  rule = ranks.broadcast(split.Rule(config.val_share) if kept is None else split.recall(kept, config.val_share))
  for name, count in (("train", config.train_images or 4000), ("val", 256))[:1 if config.overfit else 2]:
    options = {"size": max(config.size), "count": count} if embedded else {"strict": config.strict, "images": config.images, "rule": rule}
    try: splits.append(open_dataset(data, name, **options))
    except UserError as e: wrong.append(str(e))
  if wrong[1:] == [wrong[0].replace("train", "val") for _ in wrong[1:]]: wrong[1:] = []   # a folder that is no data set at all is told of once
  if wrong: raise UserError("\n".join(dict.fromkeys(wrong)))
  if config.train_images and not embedded: splits[0] = Subset(splits[0], config.train_images)
  train_set, val_set = splits[0], splits[-1]
  wholes = [whole_of(data) for data in splits]
  if None in (rules := [getattr(data, "upright", False) for data in wholes]):   # one rule for a data set, from whichever part proves it
    for data in wholes: data.upright = next((rule for rule in rules if rule is not None), None)
  if train_set.class_names != val_set.class_names: raise UserError(f"{config.data}: training and validation data name different classes")
  if not embedded:
    refuse_empty(train_set)
    print(f"data: {config.data} is {splits[-1].layout}")
    if len(splits) > 1 and not val_set.object_counts().any():
      print(f"note: {val_set.name}: no picture of the split 'val' has an object: there will be no score, and no best weights")
  for warning in dict.fromkeys([*train_set.warnings, *val_set.warnings]): print(f"note: {warning}")
  return train_set, val_set


def start_from(config: DetectionConfig, detector: Detector, class_names: Sequence[str], run: Run) -> list[str]:
  """Let `detector` begin with `--weights`, and freeze what is not to learn; returns notes for the user."""
  notes = []
  if run.resumed: detector.assume(run.resumed)
  elif config.weights != "none" and run.ranks.rank == 0: notes = detectors.start(detector, config.weights, class_names)
  detector.assume(run.ranks.broadcast(detector.about()))
  if config.weights != "none": detector.freeze(config.trainable_layers)   # random layers are no use fixed (torchvision does the same)
  return notes


class Evaluation:
  """Scores a detector on the validation pictures after an epoch, keeps the best weights, and writes what a person sees of it."""
  def __init__(self, run: Run, detector: Detector, loader: Loader, dataset: Any, averaged: Callable, forecast: Forecast, observers: Iterable[Any]):
    self.run, self.detector, self.loader, self.dataset, self.averaged = run, detector, loader, dataset, averaged
    self.forecast, self.observers, self.result = forecast, tuple(observers), None
    self._forward = jit(lambda images: detector.infer(images, DTYPES[run.config.dtype]))
    self._step, self._drawn = run.resumed["step"] if run.resumed else 0, 0

  def find(self, batch: Any) -> Any:
    """Detections of a batch, in pixels of its canvas."""
    outputs = self._forward(to_devices(batch.images, self.run.gpus))
    return self.detector.detect(outputs, batch.images.shape[1:3], batch.sizes, batch.origins)

  def after_epoch(self, epoch: int, step: int, log: bool = True) -> bool | Pending | None:
    """Evaluate and draw, then have it scored; None where no evaluation is due, True ends the run."""
    config, ranks = self.run.config, self.run.ranks
    if epoch % config.eval_every and epoch < config.epochs: return None
    self._step, self._drawn, begun = step, 0, time.monotonic()
    for observer in self.observers: observer.start_evaluation(epoch)
    with self.averaged():
      metric = CocoMetric(self.dataset.ground_truth(), self.dataset.category_ids)
      evaluate(self.find, self.loader.epoch(0), metric, self._draw)
      for found in ranks.gather(metric.found): metric.found |= found
      weights = self.run.checkpoints.weights()
    return score(metric, partial(self._scored, epoch, step, log, begun, metric, weights), background=config.score_in_background and log,
                 here=ranks.rank == 0, pictures=PICTURES_IN_TABLE // 2)

  def _draw(self, batch: Any, detections: Any) -> None:
    self.run.signals.raise_if_stopped()
    for i in np.flatnonzero(batch.image_ids >= 0)[:self.run.config.pictures - self._drawn]:
      known, sure = batch.labels[i] >= 0, detections.scores[i] > 0.5
      found = (x[i][sure] for x in (detections.boxes, detections.labels, detections.scores))
      self.run.tracker.picture(f"val-{batch.image_ids[i]}", batch.images[i], batch.boxes[i][known], batch.labels[i][known], *found,
                               self.dataset.class_names, self._step)
      self._drawn += 1

  def _scored(self, epoch: int, step: int, log: bool, begun: float, metric: CocoMetric, weights: dict, found: CocoResult | None,
              analysis: Callable) -> bool:
    """Log the score, keep the weights if they are the best; True ends the run."""
    run, self.result = self.run, self.run.ranks.broadcast(found)
    metrics, seconds = self.result.metrics, time.monotonic() - begun
    run.keep_if_best(metrics["mAP"], epoch, step, weights)
    for observer in self.observers: observer.evaluated(epoch, metrics["mAP"])
    values = {f"eval/{key}": value for key, value in metrics.items()} | {"eval/seconds": seconds}
    if log: run.tracker.log(values | {f"eval/AP/{key}": value for key, value in self.result.class_ap.items()}, step, epoch)
    print(f"epoch {epoch}: mAP {metrics['mAP']:.4f}  mAP50 {metrics['mAP50']:.4f}  ({duration(seconds)})", flush=True)
    if line := self.forecast.evaluated(epoch, seconds, run.reached): print(line)
    def record() -> None:
      report.save_evaluation(run.folder, found := analysis(), self.dataset, metric, step=step, epoch=epoch)
      ranked = sorted(found["worst"] + found["best"], key=lambda entry: entry["quality"])
      pictures = report.ranked_pictures(ranked, self.dataset, metric, found["score_threshold"])
      run.tracker.show(lambda wandb: panels.of_detector(wandb, found, pictures, self.dataset.class_names), step, epoch)
    run.update_report(record)
    return run.ends


def train_detector(run: Run, detector: Detector, fit: Fit, data: tuple[Any, Any], recipes: Mapping[str, Any], notes: Sequence[str] = (),
                   observers: Sequence[Any] = ()) -> None:
  """Train `detector` on `data`, training and validation set, from the run's first step to its last line.

  `recipes` are the settings of published runs, for `Forecast`, and `notes` for the user. Each of `observers` is told of the run: `open`,
  `start_evaluation`, `evaluated`, `close` (see `MLPerfLog`)."""
  config, (train_set, val_set) = run.config, data
  notes = [*notes, *filter(None, [plan.choose_anchors(config, run, detector, train_set, fit)])]
  train_loader, val_loader = make_loaders(config, fit, train_set, val_set, run.ranks)
  run.at_end(train_loader.close)
  run.at_end(val_loader.close)
  run.check_data(train_set, len(train_loader))
  plan.steady_start(config, run, len(train_loader))
  optimizer, buffers = run.prepare(detector.network, len(train_loader))
  updates = total_updates(config, len(train_loader))
  detector.progress = lambda: (optimizer.steps / updates).minimum(1).reshape(())
  canvases = {*train_loader.buckets.canvases, *val_loader.buckets.canvases}
  replicate([constant for canvas in sorted(canvases) for constant in detector.constants(canvas)], run.gpus)

  def losses(images: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return detector.losses(detector(images, DTYPES[config.dtype]), boxes, labels, images.shape[1:3])

  def to_device(batch: Any) -> tuple[Tensor, ...]: return tuple(to_devices(a, run.gpus) for a in (batch.images, batch.boxes, batch.labels))

  step = run.make_step(losses, optimizer, buffers)
  if config.find_lr: return run.find_lr(optimizer, step, train_loader, to_device)

  learns = sum(p.numel() for p in get_state_dict(detector.network).values() if p.is_param)
  headline = [f"{detector.name}: {learns / 1e6:.2f} M trainable parameters, {len(train_set.class_names)} classes, {len(train_set)} training and "
              f"{len(val_set)} validation pictures at {fit} on {', '.join(run.gpus)}"]
  if config.max_size or config.multi_scale:
    headline += [f"training on {train_loader.buckets}", f"validation on {val_loader.buckets}", "note: each canvas compiles when it first comes, "
                 f"{len(train_loader.buckets.canvases)} for training and {len(val_loader.buckets.canvases)} for validation"]
  about = detector.about() | {"class_names": train_set.class_names, "category_ids": train_set.category_ids, "size": list(config.size),
                              "max_size": config.max_size}
  run.open(detector.network, optimizer, about, headline + [f"note: {note}" for note in notes], len(train_loader))
  if run.ranks.rank == 0: split.save(run.folder, train_set, config.val_share)
  for observer in observers:
    observer.open(run.folder, len(train_set.class_names), len(train_set), len(val_set), bool(run.resumed))
    run.at_end(observer.close)
  forecast = Forecast(config, {preset: recipes[preset] for preset in CONVERGENCE if preset in recipes}, len(train_set))
  evaluation = Evaluation(run, detector, val_loader, val_set, optimizer.averaged, forecast, observers)
  with run.signals:
    done = run.train(detector.network, losses, step, train_loader, to_device, evaluation.after_epoch, forecast=forecast.measured)
    if evaluation.result is None: evaluation.after_epoch(config.epochs, done, log=False)
  print(evaluation.result.table, end="")
  run.conclude("mAP", evaluation.result.metrics)
