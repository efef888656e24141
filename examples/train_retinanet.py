"""Train RetinaNet in tinygrad.

With no arguments it fine-tunes the small detector that ships with the code to shapes it has never seen: a few minutes on a laptop's processor.
With `--data FOLDER` it trains on yours: COCO (annotations/instances_*.json) or Pascal VOC (Annotations/, JPEGImages/), whichever is there.
tinygrad's own variables work as ever: DEV=CUDA, BEAM=2, DEBUG=2."""
import contextlib, os, sys, time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from tinydet.runtime.device import require_device
from tinydet.errors import UserError, exit_on_user_error
from tinydet.config import as_dict, describe, option, parse, recall, show_input, show_size, size
import numpy as np
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.datasets import open_dataset
from tinydet.datasets.download import local_folder
from tinydet.datasets.buckets import choose_buckets, one_bucket
from tinydet.datasets.loader import Loader
from tinydet.datasets.subset import Subset
from tinydet.datasets.transforms import compose, for_network, horizontal_flip, one_canvas, photometric_jitter, scale_jitter
from tinydet.detection.anchors import anchors
from tinydet.scoring.coco_metric import CocoMetric, CocoResult
from tinydet.scoring.evaluation import evaluate
from tinydet.detection.losses import BOX_LOSSES, detection_losses
from tinydet.detection.matcher import match
from tinydet.scoring.background import Pending, score
from tinydet.models import resnet, retinanet
from tinydet.models.preprocess import normalize
from tinydet.nn.layers import NORMS
from tinydet.reporting import panels, report
from tinydet.training.find_lr import find_lr
from tinydet.runtime.graphs import jit
from tinydet.training.loop import make_step, train
from tinydet.reporting.mlperf import MLPerfLog
from tinydet.training.optim import WARMUP_FACTOR
from tinydet.training.numerics import first_not_finite
from tinydet.runtime.devices import devices, replicate, take_devices, to_devices
from tinydet.runtime.precision import DTYPES
from tinydet.reporting.forecast import PUBLISHED, Forecast
from tinydet.runtime.mpi import Ranks, join
from tinydet.training.resume import Checkpoints, find_run, open_run, restore, run_name
from tinydet.runtime.signals import Signals
from tinydet.reporting.tracking import Tracker, Untracked, duration
from tinydet.training.trainer import TrainerConfig, check_batch_size, make_optimizer
from tinydet.weights.weights import load_weights

# ---------------------------------------------------------------------------------------------------------------------------- configuration


PICTURES_IN_TABLE = 32   # validation pictures, the worst and the best, in wandb's table of each evaluation


def embedded(data: str) -> bool: return data.partition(":")[0] == "shapes"


@dataclass
class Config(TrainerConfig):
  data: str = option("shapes:2", "a folder in COCO or Pascal VOC layout, the embedded shapes:1, shapes:2, or coco, openimages-mlperf, which are "
                     "downloaded on first use", group="data")
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
  strict: bool = option(False, "make every oddity of the data an error", group="data")
  workers: int = option(2, "processes that load training pictures; 0 loads between steps", minimum=0, maximum=256, group="data")
  train_images: int = option(0, "use only the first so many training pictures; 0 uses all; shapes are drawn on demand, any number", minimum=0,
                             group="data")
  overfit: bool = option(False, "evaluate on the training pictures, unchanged: a sound model learns a few by heart", group="data")

  backbone: str = option("resnet18", "the classifier underneath", choices=tuple(resnet.BACKBONES), group="model")
  variant: str = option("v1", "torchvision's RetinaNet v1, or v2: P6 from C5, group norm in the heads", choices=("v1", "v2"), group="model")
  norm: str = option("auto", "the backbone's norm layers; auto is batch where --weights is none and frozen otherwise", choices=("auto", *NORMS),
                     group="model")
  weights: str = option("none", "where to start: none, shapes (ships with the code), imagenet, imagenet_v2, coco, mlperf, a .pth or .safetensors "
                        "file, or the folder of a run", group="model")
  trainable_layers: int = option(5, "stages of the backbone that learn, counted from the top; all of them where --weights is none", minimum=0,
                                 maximum=5, group="model")
  box_loss: str = option("l1", "how boxes are compared", choices=tuple(BOX_LOSSES), group="model")

  score_in_background: bool = option(False, "go on training while another process scores an evaluation", group="run")
  pictures: int = option(8, "validation pictures drawn after each evaluation", minimum=0, group="run")
  mlperf_log: bool = option(False, "write mlperf.log for MLCommons' compliance checker (pip install -e '.[mlperf]')", group="run")


SHAPES = {"size": (128, 128), "backbone": "resnet10_quarter", "norm": "batch", "box_loss": "giou", "lr": 3e-3, "target": 0.6}
PRESETS = {
  # The small detector that ships with the code, fine-tuned to the six shapes of the second family: the default where --data is no folder.
  "demo": SHAPES | {"data": "shapes:2", "weights": "shapes", "trainable_layers": 3, "bs": 16, "train_images": 4000, "epochs": 4,
                    "warmup": 0.2, "eval_every": 2},
  # How that detector was made: the first family, from random weights.
  "scratch": SHAPES | {"data": "shapes:1", "bs": 16, "train_images": 6000, "epochs": 8, "log_every": 50},
  # The default where --data is a folder: the defaults above, meant for a few hundred to some thousand pictures.
  "folder": {},
  # torchvision's references/detection: 8 GPUs x 2 images, SGD 0.01, 26 epochs
  "coco": {"data": "coco", "size": (800, 800), "max_size": 1333, "backbone": "resnet50", "weights": "imagenet", "trainable_layers": 3, "bs": 16,
           "epochs": 26, "optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4, "norm_weight_decay": 1e-4, "schedule": "step", "milestones": (16, 22),
           "warmup": 0.136, "target": 0.364, "score_in_background": True, "workers": 8, "log_every": 50},
  # MLCommons' single_stage_detector: 800x800, mirrored, Adam 1e-4 after an epoch of warm-up, evaluated every epoch, until mAP 0.34
  "mlperf": {"data": "openimages-mlperf", "size": (800, 800), "flip": 0.5, "backbone": "resnext50_32x4d", "norm": "frozen", "weights": "imagenet",
             "trainable_layers": 3, "box_loss": "l1", "bs": 256, "epochs": 10, "optimizer": "adam", "lr": 1e-4, "weight_decay": 0.0,
             "schedule": "constant", "warmup": 1.0, "dtype": "bf16", "eval_every": 1, "target": 0.34, "stop_at_target": True,
             "score_in_background": True, "workers": 8, "log_every": 50, "mlperf_log": True}}


def main(config: Config, ranks: Ranks) -> None:
  started = time.monotonic()
  gpus = devices(config.gpus)
  if config.find_lr and (config.resume or ranks.size > 1): raise UserError("--find-lr: sweeps in one process from what --weights names; no --resume")
  check_batch_size(config, ranks)
  mlperf = MLPerfLog(config, Config(**PRESETS["mlperf"]), WARMUP_FACTOR, config.mlperf_log and ranks.rank == 0)
  folder, lock, state, resumed = None, None, {}, None
  if ranks.rank == 0: folder, lock, state, resumed = open_run(config.resume, config.out, run_name(config.run_name, config.data, config.backbone))
  resumed = ranks.broadcast(resumed)

  # ---------------------------------------------------------------------------------------------------------------------------- data
  splits, wrong = [], []
  with ranks.in_turn(): data = local_folder(config.data, config.data_dir)   # one downloads, the others find it there
  for split, count in (("train", config.train_images or 4000), ("val", 256))[:1 if config.overfit else 2]:
    options = {"size": max(config.size), "count": count} if embedded(config.data) else {"strict": config.strict}
    try: splits.append(open_dataset(data, split, **options))
    except UserError as e: wrong.append(str(e))
  if wrong: raise UserError("\n".join(dict.fromkeys(wrong)))   # what is wrong with either, at once
  if config.train_images and not embedded(config.data): splits[0] = Subset(splits[0], config.train_images)
  train_set, val_set = splits[0], splits[-1]
  if train_set.class_names != val_set.class_names: raise UserError(f"{config.data}: training and validation data name different classes")
  for warning in dict.fromkeys([*train_set.warnings, *val_set.warnings]): print(f"note: {warning}")

  fit, canvas = for_network(config.size, config.max_size), one_canvas(config.size, config.max_size)
  train_buckets, val_buckets = (choose_buckets(data.sizes, config.size, config.max_size, config.buckets, config.bs) for data in (train_set, val_set))
  augment = [] if config.overfit else [photometric_jitter()] * config.photometric + [horizontal_flip(config.flip)] * (config.flip > 0)
  if config.scale_jitter and not config.overfit:
    augment, train_buckets = [*augment, scale_jitter(0.5, 2.0, *canvas)], one_bucket(len(train_set), canvas)
  else: augment = [fit, *augment]
  train_loader = Loader(train_set, config.bs, compose(*augment), seed=config.seed, shuffle=True, drop_last=True, workers=config.workers,
                        buckets=train_buckets, shard=(ranks.rank, ranks.size), reduced=True)
  val_loader = Loader(val_set, config.bs, fit, workers=config.workers, buckets=val_buckets, shard=(ranks.rank, ranks.size))

  # ---------------------------------------------------------------------------------------------------------------------------- model
  name = f"retinanet_{config.backbone}_fpn" + "_v2" * (config.variant == "v2")
  norm = config.norm if config.norm != "auto" else "batch" if config.weights == "none" else "frozen"
  model = retinanet.build(name, len(train_set.class_names), norm, config.seed)
  notes = load_weights(config.weights, model, name) if config.weights != "none" and not resumed and ranks.rank == 0 else []
  if config.weights != "none": retinanet.freeze(model, config.trainable_layers)   # random layers are no use fixed (torchvision does the same)
  tensors = get_state_dict(model)
  params = {key: t for key, t in tensors.items() if t.is_param}
  buffers = [t for t in tensors.values() if not t.is_param]
  optimizer = make_optimizer(config, params, len(train_loader))
  if resumed and ranks.rank == 0: restore(model, optimizer, state, config.resume)
  ranks.spread([*tensors.values(), *optimizer.state().values()])
  level_anchors = {canvas: Tensor(anchors(*canvas)) for canvas in {*train_buckets.canvases, *val_buckets.canvases}}
  replicate([*tensors.values(), *optimizer.state().values(), *level_anchors.values()], gpus)

  def losses(images: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    here = level_anchors[images.shape[1:3]]
    classes, matched = match(here, boxes, labels)
    outputs = model(normalize(images, DTYPES[config.dtype]))
    classification, regression = detection_losses(*outputs, here, classes, matched, config.box_loss)
    return {"loss": classification + regression, "classification": classification, "bbox_regression": regression}

  step = make_step(losses, optimizer, buffers, config.accumulate, resumed["step"] if resumed else 0, ranks, config.wire)

  def to_device(batch) -> tuple[Tensor, ...]: return tuple(to_devices(a, gpus) for a in (batch.images, batch.boxes, batch.labels))

  if config.find_lr:
    with contextlib.closing(train_loader): find_lr(folder, config.find_lr, optimizer, step, train_loader, to_device, as_dict(config))
    return

  # ---------------------------------------------------------------------------------------------------------------------------- log
  tracker = Untracked() if ranks.rank else Tracker(folder, as_dict(config), project=config.project, target=config.target, mode=config.wandb,
                                                   resume=resumed, lock=lock, tags=config.tags, group=config.group, artifacts=config.artifacts)
  about = {"model": name, "norm": norm, "num_classes": len(train_set.class_names), "class_names": train_set.class_names,
           "category_ids": train_set.category_ids, "size": list(config.size), "max_size": config.max_size, "config": as_dict(config),
           "run_id": tracker.id, "best_mAP": resumed["best_mAP"] if resumed else -1.0}
  checkpoints = Checkpoints(tracker.folder, model, optimizer, about, keep=config.keep, every_steps=config.save_steps,
                            every_minutes=config.save_minutes, ranks=ranks)
  print(f"{name}: {sum(p.numel() for p in params.values()) / 1e6:.2f} M trainable parameters, {len(train_set.class_names)} classes, "
        f"{len(train_set)} training and {len(val_set)} validation pictures at {show_input(config.size, config.max_size)} on {', '.join(gpus)}")
  if config.max_size: print(f"training on {train_buckets}\nvalidation on {val_buckets}\nnote: each canvas compiles when it first comes, "
                            f"{len(train_buckets.canvases)} for training and {len(val_buckets.canvases)} for validation")
  print(f"settings: {describe(config) or 'the defaults'}")
  for note in notes: print(f"note: {note}")
  if ranks.rank == 0:
    report.save_environment(tracker.folder, config.sources)
    if why := report.update(tracker.folder): print(f"note: {why}")
  mlperf.open(tracker.folder, len(train_set.class_names), len(train_set), len(val_set), bool(resumed))
  forecast = Forecast(config, {preset: Config(**PRESETS[preset]) for preset in PUBLISHED}, len(train_set))
  print(f"run: {tracker.folder}   (the first step compiles: about a minute on a processor)")

  # ---------------------------------------------------------------------------------------------------------------------------- evaluation
  @jit
  def forward(images: Tensor) -> tuple[Tensor, ...]:
    with Context(TRAINING=0): return tuple(t.float().contiguous() for t in model(normalize(images, DTYPES[config.dtype])))

  result = None

  def draw(batch, detections) -> None:
    signals.raise_if_stopped()
    for i in np.flatnonzero(batch.image_ids >= 0)[:config.pictures - len(drawn)]:
      known, sure = batch.labels[i] >= 0, detections.scores[i] > 0.5
      found = (x[i][sure] for x in (detections.boxes, detections.labels, detections.scores))
      drawn.append(tracker.picture(f"val-{batch.image_ids[i]}", batch.images[i], batch.boxes[i][known], batch.labels[i][known], *found,
                                   train_set.class_names, done_steps))

  def after_epoch(epoch: int, done: int, log: bool = True) -> bool | Pending | None:
    """Evaluate and draw, then have it scored; True ends the run."""
    nonlocal done_steps
    if epoch % config.eval_every and epoch < config.epochs: return None
    done_steps = done
    drawn.clear()
    begun = time.monotonic()
    mlperf.start_evaluation(epoch)
    with optimizer.averaged():
      metric = evaluate(lambda batch: forward(to_devices(batch.images, gpus)), val_loader.epoch(0), level_anchors,
                        CocoMetric(val_set.ground_truth(), val_set.category_ids), draw)
      for found in ranks.gather(metric.found): metric.found |= found
      weights = checkpoints.weights()
    return score(metric, partial(scored, epoch, done, log, begun, metric, weights), background=config.score_in_background and log,
                 here=ranks.rank == 0, pictures=PICTURES_IN_TABLE // 2)

  def scored(epoch: int, done: int, log: bool, begun: float, metric: CocoMetric, weights: dict, found: CocoResult | None,
             analysis: Callable) -> bool:
    """Log the score, keep the weights if they are the best; True ends the run."""
    nonlocal result
    result = ranks.broadcast(found)
    if (mAP := result.metrics["mAP"]) > about["best_mAP"]:
      about["best_mAP"] = mAP
      checkpoints.keep_best({"epoch": epoch, "step": done, "mAP": mAP}, config.save_half, weights)
      tracker.improved()
    mlperf.evaluated(epoch, mAP)
    values = {f"eval/{key}": value for key, value in result.metrics.items()} | {"eval/seconds": time.monotonic() - begun}
    if log: tracker.log(values | {f"eval/AP/{key}": value for key, value in result.class_ap.items()}, done, epoch)
    print(f"epoch {epoch}: mAP {mAP:.4f}  mAP50 {result.metrics['mAP50']:.4f}  ({duration(time.monotonic() - begun)})", flush=True)
    if line := forecast.evaluated(epoch, time.monotonic() - begun, config.target is not None and about["best_mAP"] >= config.target): print(line)
    def record() -> None:
      report.save_evaluation(tracker.folder, found := analysis(), val_set, metric, step=done, epoch=epoch)
      ranked = sorted(found["worst"] + found["best"], key=lambda entry: entry["quality"])
      pictures = report.ranked_pictures(ranked, val_set, metric, found["score_threshold"])
      tracker.show(lambda wandb: panels.of_detector(wandb, found, pictures, val_set.class_names), done, epoch)
    if ranks.rank == 0 and (why := report.update(tracker.folder, record)): print(f"note: {why}")
    return config.stop_at_target and config.target is not None and about["best_mAP"] >= config.target

  # ---------------------------------------------------------------------------------------------------------------------------- loop
  drawn, done_steps, signals = [], resumed["step"] if resumed else 0, Signals(ranks)
  explain = partial(first_not_finite, model, losses) if config.debug_numerics else lambda *_: ""
  try:
    with signals:
      train(step, train_loader, to_device, tracker, checkpoints, signals, epochs=config.epochs, start=resumed or None, log_every=config.log_every,
            max_skipped=config.max_skipped, after_epoch=after_epoch, explain=explain, forecast=forecast.measured, ranks=ranks)
      if result is None: after_epoch(config.epochs, done_steps, log=False)
      checkpoints.finish()
    best = about["best_mAP"]
    print(result.table, end="")
    target = "" if config.target is None else f"; target {config.target:.4f}: {'reached' if best >= config.target else 'missed'}"
    print(f"best mAP {best:.4f}{target}; {duration(time.monotonic() - started)} in all")
    print(f"pictures: {tracker.folder / 'pictures'}   weights: {tracker.folder / 'best.safetensors'}")
    tracker.summary({f"final/{key}": value for key, value in result.metrics.items()} | {"minutes": (time.monotonic() - started) / 60})
  finally:
    mlperf.close()
    checkpoints.wait()
    train_loader.close()
    val_loader.close()
    if ranks.rank == 0: print(report.update(tracker.folder) or f"report: {tracker.folder / 'report.html'}")
    tracker.finish()


if __name__ == "__main__":
  with exit_on_user_error(), join() as ranks:
    config = parse(Config, PRESETS, sys.argv[1:], os.environ, "demo")
    if not embedded(config.data): config = parse(Config, PRESETS, sys.argv[1:], os.environ, "folder")
    folder = find_run(config.resume, config.out, run_name(config.run_name, config.data, config.backbone)) if ranks.rank == 0 else None
    if folder is not None and (folder / "config.json").is_file():
      config = parse(Config, {"resumed": recall(Config, folder / "config.json")}, sys.argv[1:], os.environ, "resumed")
    config = ranks.broadcast(config)   # the folder of the run may be on rank 0's machine alone
    take_devices(ranks, config.gpus)
    require_device()
    main(config, ranks)
