"""Train a classifier in tinygrad: ResNet and its kin, the networks underneath the detectors.

With no arguments it learns the six shapes, and background, from pictures that it draws itself: a few minutes on a laptop's processor.
With `--data FOLDER` it trains on yours, sorted as ImageNet is: train/<class>/*.jpg and val/<class>/*.jpg.
tinygrad's own variables work as ever: DEV=CUDA, BEAM=2, DEBUG=2."""
import contextlib, os, shlex, sys, time
from dataclasses import dataclass
from functools import partial
from tinydet.runtime.device import require_device
from tinydet.errors import UserError, exit_on_user_error
from tinydet.config import as_dict, describe, option, parse, recall
import numpy as np
from tinygrad import Context, Tensor, dtypes
from tinygrad.nn.state import get_state_dict
from tinydet.datasets import open_classes
from tinydet.datasets.loader import Loader
from tinydet.datasets.subset import Subset
from tinydet.datasets.transforms import center_crop_resize, compose, horizontal_flip, photometric_jitter, random_resized_crop
from tinydet.models import resnet
from tinydet.models.preprocess import normalize
from tinydet.nn.layers import NORMS
from tinydet.reporting import panels, report
from tinydet.training.find_lr import find_lr
from tinydet.runtime.graphs import jit
from tinydet.training.loop import make_step, train
from tinydet.training.numerics import first_not_finite
from tinydet.runtime.devices import devices, replicate, take_devices, to_devices
from tinydet.runtime.precision import DTYPES
from tinydet.runtime.mpi import Ranks, join
from tinydet.training.resume import Checkpoints, find_run, open_run, restore, run_name
from tinydet.runtime.signals import Signals
from tinydet.reporting.tracking import Tracker, Untracked, duration
from tinydet.training.trainer import TrainerConfig, check_batch_size, make_optimizer
from tinydet.weights.weights import load_weights

# ---------------------------------------------------------------------------------------------------------------------------- configuration


PICTURES_IN_TABLE = 32   # validation pictures of the highest loss, in wandb's table of each evaluation


def embedded(data: str) -> bool: return data.partition(":")[0] == "crops"


@dataclass
class Config(TrainerConfig):
  data: str = option("crops:1", "a folder with train/<class>/ and val/<class>/, or the embedded crops:1, crops:2", group="data")
  size: int = option(224, "pixels, squared, that the network sees", minimum=32, maximum=4096, group="data")
  resize: int = option(0, "shorter side of a validation picture, of which the network sees the middle; 0 is --size / 0.875", minimum=0, maximum=8192,
                       group="data")
  crop_scale: float = option(0.08, "smallest part, by area, of a training picture to show; 1 shows all of it", minimum=0.001, maximum=1, group="data")
  flip: float = option(0.5, "chance of mirroring a training picture", minimum=0, maximum=1, group="data")
  photometric: bool = option(False, "vary brightness, contrast, saturation and hue of training pictures", group="data")
  workers: int = option(2, "processes that load training pictures; 0 loads between steps", minimum=0, maximum=256, group="data")
  train_images: int = option(0, "use only so many training pictures, of all classes; 0 uses all; crops are drawn on demand, any number", minimum=0,
                             group="data")

  backbone: str = option("resnet18", "the network", choices=tuple(resnet.BACKBONES), group="model")
  norm: str = option("batch", "its norm layers", choices=tuple(NORMS), group="model")
  weights: str = option("none", "where to start: none, or what train_retinanet.py takes for it: the folder of a run, a file, a published name",
                        group="model")
  label_smoothing: float = option(0.0, "share of a label that is spread over all classes", minimum=0, maximum=1, group="model")

  pictures: int = option(8, "validation pictures drawn after each evaluation", minimum=0, group="run")
  project: str = option("tinygrad-resnet", "wandb's project", group="run")


PRESETS = {
  # The backbone of the small detector, on cut-outs of the shapes that it is to find: the default where --data is no folder.
  "demo": {"size": 64, "resize": 64, "crop_scale": 0.5, "backbone": "resnet10_quarter", "bs": 32, "train_images": 12000, "epochs": 5, "lr": 3e-3,
           "warmup": 0.2, "target": 0.9},
  # The default where --data is a folder, meant for some thousand pictures.
  "folder": {"bs": 32, "epochs": 30, "crop_scale": 0.25, "warmup": 1.0, "weight_decay": 0.01, "label_smoothing": 0.1},
  # torchvision's references/classification, the recipe of its V1 weights: 8 GPUs x 32 images, SGD 0.1, 90 epochs
  "imagenet": {"data": "imagenet", "resize": 256, "backbone": "resnet50", "bs": 256, "epochs": 90, "optimizer": "sgd", "lr": 0.1,
               "weight_decay": 1e-4, "norm_weight_decay": 1e-4, "schedule": "step", "milestones": (30, 60), "warmup": 0.0, "target": 0.761,
               "workers": 16, "log_every": 50}}

# ---------------------------------------------------------------------------------------------------------------------------- loss and score


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
  """Mean cross-entropy, a f32 scalar, of logits [B,K] with labels i32 [B]; rows labelled -1 do not count (torch `CrossEntropyLoss`)."""
  each, known = logits.float().sparse_categorical_crossentropy(labels, label_smoothing=smoothing, reduction="none"), labels >= 0
  return known.where(each, 0).sum() / known.sum().maximum(1)


def losses_and_ranks(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Cross-entropy f64 [N] of each row of logits [N,K], and the rank i64 [N] of its label, 1 being best. What is not less likely ranks before it, so
  a network that gives all classes the same logit, or NaN, gets nothing right."""
  logits = logits.astype(np.float64)
  own = np.take_along_axis(logits, labels[:, None], 1)
  top = logits.max(1, keepdims=True)
  return np.log(np.exp(logits - top).sum(1)) + (top - own)[:, 0], (~(logits < own)).sum(1)


def main(config: Config, ranks: Ranks) -> None:
  started = time.monotonic()
  gpus = devices(config.gpus)
  resize = config.resize or round(config.size / 0.875)
  if config.find_lr and (config.resume or ranks.size > 1): raise UserError("--find-lr: sweeps in one process from what --weights names; no --resume")
  check_batch_size(config, ranks)
  folder, lock, state, resumed = None, None, {}, None
  if ranks.rank == 0: folder, lock, state, resumed = open_run(config.resume, config.out, run_name(config.run_name, config.data, config.backbone))
  resumed = ranks.broadcast(resumed)
  if resize < config.size: raise UserError(f"--resize {resize}: is less than --size {config.size}, which is cut out of it")

  # ---------------------------------------------------------------------------------------------------------------------------- data
  if embedded(config.data):
    train_set = open_classes(config.data, "train", count=config.train_images or 12000)
    val_set = open_classes(config.data, "val", count=1000)
  else:
    train_set, val_set = open_classes(config.data, "train"), open_classes(config.data, "val")
    if config.train_images: train_set = Subset(train_set, config.train_images)
  num_classes = len(train_set.class_names)
  if num_classes < 2: raise UserError(f"{config.data}: has one class, {train_set.class_names[0]}; to tell pictures apart takes two")
  for warning in [*train_set.warnings, *val_set.warnings]: print(f"note: {warning}")

  fit = center_crop_resize(resize, config.size)
  augment = [random_resized_crop(config.size, config.size, (config.crop_scale, 1.0)), *[photometric_jitter()] * config.photometric,
             *[horizontal_flip(config.flip)] * (config.flip > 0)]
  train_loader = Loader(train_set, config.bs, compose(*augment), seed=config.seed, shuffle=True, drop_last=True, workers=config.workers,
                        shard=(ranks.rank, ranks.size), max_boxes=1)
  val_loader = Loader(val_set, config.bs, fit, workers=config.workers, shard=(ranks.rank, ranks.size), max_boxes=1)

  # ---------------------------------------------------------------------------------------------------------------------------- model
  name = config.backbone
  model = resnet.build(name, num_classes, config.norm, config.seed)
  notes = load_weights(config.weights, model, name) if config.weights != "none" and not resumed and ranks.rank == 0 else []
  tensors = get_state_dict(model)
  params = {key: t for key, t in tensors.items() if t.is_param}
  buffers = [t for t in tensors.values() if not t.is_param]
  optimizer = make_optimizer(config, params, len(train_loader))
  if resumed and ranks.rank == 0: restore(model, optimizer, state, config.resume)
  ranks.spread([*tensors.values(), *optimizer.state().values()])
  replicate([*tensors.values(), *optimizer.state().values()], gpus)

  def losses(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits = model(normalize(images, DTYPES[config.dtype])).float().contiguous()
    return {"loss": cross_entropy(logits, labels, config.label_smoothing), "accuracy": (logits.argmax(1) == labels).cast(dtypes.float32).mean()}

  step = make_step(losses, optimizer, buffers, config.accumulate, resumed["step"] if resumed else 0, ranks, config.wire)

  def to_device(batch) -> tuple[Tensor, ...]: return to_devices(batch.images, gpus), to_devices(batch.labels[:, 0], gpus)

  if config.find_lr:
    with contextlib.closing(train_loader): find_lr(folder, config.find_lr, optimizer, step, train_loader, to_device, as_dict(config))
    return

  # ---------------------------------------------------------------------------------------------------------------------------- log
  tracker = Untracked() if ranks.rank else Tracker(folder, as_dict(config), project=config.project, score="top1", target=config.target,
                                                   mode=config.wandb, resume=resumed, lock=lock, tags=config.tags, group=config.group,
                                                   artifacts=config.artifacts)
  about = {"model": name, "norm": config.norm, "num_classes": num_classes, "class_names": train_set.class_names,
           "category_ids": train_set.category_ids, "size": [config.size, config.size], "resize": resize, "config": as_dict(config),
           "run_id": tracker.id, "best_top1": resumed["best_top1"] if resumed else -1.0}
  checkpoints = Checkpoints(tracker.folder, model, optimizer, about, keep=config.keep, every_steps=config.save_steps,
                            every_minutes=config.save_minutes, ranks=ranks)
  print(f"{name}: {sum(p.numel() for p in params.values()) / 1e6:.2f} M trainable parameters, {num_classes} classes, {len(train_set)} training and "
        f"{len(val_set)} validation pictures at {config.size}x{config.size} on {', '.join(gpus)}")
  print(f"settings: {describe(config) or 'the defaults'}")
  for note in notes: print(f"note: {note}")
  if ranks.rank == 0:
    report.save_environment(tracker.folder, config.sources)
    if why := report.update(tracker.folder): print(f"note: {why}")
  print(f"run: {tracker.folder}   (the first step compiles: half a minute on a processor)")

  # ---------------------------------------------------------------------------------------------------------------------------- evaluation
  @jit
  def forward(images: Tensor) -> Tensor:
    with Context(TRAINING=0): return model(normalize(images, DTYPES[config.dtype])).float().contiguous()

  scores, signals = None, Signals(ranks)

  def draw(batch, chances: np.ndarray, done: int, count: int) -> None:
    """Draw the first `count` pictures of `batch`, each with its class and the likeliest one, given the chances [N,K] of all classes."""
    for i in range(min(count, len(chances))):
      found = batch.boxes[i], chances[i].argmax(keepdims=True), chances[i].max(keepdims=True)
      tracker.picture(f"val-{batch.image_ids[i]}", batch.images[i], batch.boxes[i], batch.labels[i], *found, train_set.class_names, done)

  def evaluate(done: int, epoch: int) -> dict[str, float]:
    """Top-1, top-5 and loss over the validation pictures."""
    losses, places, found, drawn = [], [], [], 0
    for batch in val_loader.epoch(0):
      signals.raise_if_stopped()
      real = np.count_nonzero(batch.image_ids >= 0)   # the last batch is filled up at its end
      logits = forward(to_devices(batch.images, gpus)).numpy()[:real]
      chances = np.exp(logits - logits.max(1, keepdims=True))
      chances /= chances.sum(1, keepdims=True)
      draw(batch, chances, done, config.pictures - drawn)
      drawn += real
      found.append(np.stack([batch.image_ids[:real], batch.labels[:real, 0], chances.argmax(1), chances.max(1)], 1))
      for values, new in zip((losses, places), losses_and_ranks(logits, batch.labels[:real, 0])): values.append(new)
    parts = ranks.gather([np.concatenate(values) for values in (losses, places, found)])
    loss, place, found = ranks.broadcast([np.concatenate(part) for part in zip(*parts)])
    loss, place, found = (values[np.argsort(found[:, 0])] for values in (loss, place, found))   # image ids count up in the data set's order
    tracker.show(lambda wandb: show_worst(wandb, loss, found[:, 1:]), done, epoch)
    return {"top1": float(np.mean(place <= 1)), "top5": float(np.mean(place <= min(5, num_classes))), "loss": float(loss.mean())}

  def show_worst(wandb, losses: np.ndarray, found: np.ndarray) -> dict:
    """wandb's panels, given the losses [N] and found [N,3], the true label, the likeliest one and its chance, of all validation pictures."""
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (found[:, 0].astype(int), found[:, 1].astype(int)), 1)
    worst = np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")[:PICTURES_IN_TABLE].tolist()
    pictures = [(report.shrunk(val_set[i].image, 480)[0], val_set.image_name(i), float(losses[i]), int(found[i, 0]), int(found[i, 1]), found[i, 2])
                for i in worst]
    return panels.of_classifier(wandb, pictures, counts, train_set.class_names)

  def after_epoch(epoch: int, done: int, log: bool = True) -> bool | None:
    """Evaluate, draw, keep the best; True ends the run."""
    nonlocal scores
    if epoch % config.eval_every and epoch < config.epochs: return None
    begun = time.monotonic()
    with optimizer.averaged():
      scores = evaluate(done, epoch)
      if scores["top1"] > about["best_top1"]:
        about["best_top1"] = scores["top1"]
        checkpoints.keep_best({"epoch": epoch, "step": done, "top1": scores["top1"]}, config.save_half)
        tracker.improved()
    if log: tracker.log({f"eval/{key}": value for key, value in scores.items()} | {"eval/seconds": time.monotonic() - begun}, done, epoch)
    print(f"epoch {epoch}: top-1 {scores['top1']:.4f}  top-5 {scores['top5']:.4f}  loss {scores['loss']:.4f}  "
          f"({duration(time.monotonic() - begun)})", flush=True)
    if why := report.update(tracker.folder): print(f"note: {why}")
    return config.stop_at_target and config.target is not None and about["best_top1"] >= config.target

  # ---------------------------------------------------------------------------------------------------------------------------- loop
  explain = partial(first_not_finite, model, losses) if config.debug_numerics else lambda *_: ""
  try:
    with signals:
      train(step, train_loader, to_device, tracker, checkpoints, signals, epochs=config.epochs, start=resumed or None, log_every=config.log_every,
            max_skipped=config.max_skipped, after_epoch=after_epoch, explain=explain, ranks=ranks)
      if scores is None: after_epoch(config.epochs, resumed["step"] if resumed else 0, log=False)
      checkpoints.finish()
    best = about["best_top1"]
    target = "" if config.target is None else f"; target {config.target:.4f}: {'reached' if best >= config.target else 'missed'}"
    print(f"top-1 {scores['top1']:.4f}  top-5 {scores['top5']:.4f}  loss {scores['loss']:.4f}")
    print(f"best top-1 {best:.4f}{target}; {duration(time.monotonic() - started)} in all")
    print(f"pictures: {tracker.folder / 'pictures'}   weights: {tracker.folder / 'best.safetensors'}")
    data = config.data.replace("crops", "shapes") if embedded(config.data) else "FOLDER"
    print(f"a detector from it: python examples/train_retinanet.py --weights {shlex.quote(str(tracker.folder))} --backbone {name} --data {data}" +
          " --norm group" * (config.norm == "group"))
    tracker.summary({f"final/{key}": value for key, value in scores.items()} | {"minutes": (time.monotonic() - started) / 60})
  finally:
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
