"""The story that trainers of classifiers share: losses and ranks, the evaluation after an epoch, the run from its first step to its last."""
import shlex, time
from collections.abc import Callable
from typing import Any
import numpy as np
from tinygrad import Context, Tensor, dtypes
from tinydet.models.preprocess import normalize
from tinydet.reporting import panels, report
from tinydet.reporting.tracking import duration
from tinydet.runtime.devices import to_devices
from tinydet.runtime.graphs import jit
from tinydet.runtime.precision import DTYPES
from tinydet.training.run import Run

PICTURES_IN_TABLE = 32   # validation pictures of the highest loss, in wandb's table of each evaluation


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


class Evaluation:
  """Scores a classifier on the validation pictures after an epoch, keeps the best weights, and writes what a person sees of it."""
  def __init__(self, run: Run, model: Any, prepare: Callable[[Tensor], Tensor], loader: Any, dataset: Any, averaged: Any):
    self.run, self.loader, self.dataset, self.averaged, self.scores = run, loader, dataset, averaged, None
    def forward(images: Tensor) -> Tensor:
      with Context(TRAINING=0): return model(prepare(images)).float().contiguous()
    self._forward = jit(forward)

  def after_epoch(self, epoch: int, step: int, log: bool = True) -> bool | None:
    """Evaluate, draw, keep the best; None where no evaluation is due, True ends the run."""
    run, config, begun = self.run, self.run.config, time.monotonic()
    if epoch % config.eval_every and epoch < config.epochs: return None
    with self.averaged():
      self.scores = scores = self._evaluate(step, epoch)
      run.keep_if_best(scores["top1"], epoch, step)
    if log: run.tracker.log({f"eval/{key}": value for key, value in scores.items()} | {"eval/seconds": time.monotonic() - begun}, step, epoch)
    print(f"epoch {epoch}: {self.line()}  ({duration(time.monotonic() - begun)})", flush=True)
    run.update_report()
    return run.ends

  def line(self) -> str:
    """The scores in words."""
    return f"top-1 {self.scores['top1']:.4f}  top-5 {self.scores['top5']:.4f}  loss {self.scores['loss']:.4f}"

  def _evaluate(self, step: int, epoch: int) -> dict[str, float]:
    """Top-1, top-5 and loss over the validation pictures."""
    losses, places, found, drawn, ranks = [], [], [], 0, self.run.ranks
    for batch in self.loader.epoch(0):
      self.run.signals.raise_if_stopped()
      real = np.count_nonzero(batch.image_ids >= 0)   # the last batch is filled up at its end
      logits = self._forward(to_devices(batch.images, self.run.gpus)).numpy()[:real]
      chances = np.exp(logits - logits.max(1, keepdims=True))
      chances /= chances.sum(1, keepdims=True)
      self._draw(batch, chances, step, self.run.config.pictures - drawn)
      drawn += real
      found.append(np.stack([batch.image_ids[:real], batch.labels[:real, 0], chances.argmax(1), chances.max(1)], 1))
      for values, new in zip((losses, places), losses_and_ranks(logits, batch.labels[:real, 0])): values.append(new)
    parts = ranks.gather([np.concatenate(values) for values in (losses, places, found)])
    loss, place, found = ranks.broadcast([np.concatenate(part) for part in zip(*parts)])
    loss, place, found = (values[np.argsort(found[:, 0])] for values in (loss, place, found))   # image ids count up in the data set's order
    self.run.tracker.show(lambda wandb: self._worst(wandb, loss, found[:, 1:]), step, epoch)
    classes = len(self.dataset.class_names)
    return {"top1": float(np.mean(place <= 1)), "top5": float(np.mean(place <= min(5, classes))), "loss": float(loss.mean())}

  def _draw(self, batch: Any, chances: np.ndarray, step: int, count: int) -> None:
    """Draw the first `count` pictures of `batch`, each with its class and the likeliest one, given the chances [N,K] of all classes."""
    for i in range(min(count, len(chances))):
      found = batch.boxes[i], chances[i].argmax(keepdims=True), chances[i].max(keepdims=True)
      self.run.tracker.picture(f"val-{batch.image_ids[i]}", batch.images[i], batch.boxes[i], batch.labels[i], *found, self.dataset.class_names, step)

  def _worst(self, wandb: Any, losses: np.ndarray, found: np.ndarray) -> dict:
    """wandb's panels, given the losses [N] and found [N,3], the true label, the likeliest one and its chance, of all validation pictures."""
    counts = np.zeros((len(self.dataset.class_names),) * 2, int)
    np.add.at(counts, (found[:, 0].astype(int), found[:, 1].astype(int)), 1)
    worst = np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")[:PICTURES_IN_TABLE].tolist()
    pictures = [(report.shrunk(self.dataset[i].image, 480)[0], self.dataset.image_name(i), float(losses[i]), int(found[i, 0]), int(found[i, 1]),
                 found[i, 2]) for i in worst]
    return panels.of_classifier(wandb, pictures, counts, self.dataset.class_names)


def train_classifier(run: Run, model: Any, name: str, data: tuple[Any, Any], loaders: tuple[Any, Any], about: dict[str, Any],
                     notes: list[str]) -> None:
  """Train `model`, called `name`, on `data`, training and validation set with their `loaders`, from the run's first step to its last line. `about` is
  what a file of its weights should say of it; its "input" has the mean and the deviation that pixels in 0..1 are freed of."""
  config, (train_set, val_set), (train_loader, val_loader) = run.config, data, loaders
  run.at_end(train_loader.close)
  run.at_end(val_loader.close)
  run.check_data(train_set, len(train_loader))
  optimizer, buffers = run.prepare(model, len(train_loader))

  def prepare(images: Tensor) -> Tensor: return normalize(images, DTYPES[config.dtype], **about["input"])

  def losses(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    all_logits = [(weight, logits.float().contiguous()) for weight, logits in model.all_logits(prepare(images))]
    loss = sum((cross_entropy(logits, labels, config.label_smoothing) * weight for weight, logits in all_logits[1:]),
               cross_entropy(all_logits[0][1], labels, config.label_smoothing))
    return {"loss": loss, "accuracy": (all_logits[0][1].argmax(1) == labels).cast(dtypes.float32).mean()}

  def to_device(batch: Any) -> tuple[Tensor, Tensor]: return to_devices(batch.images, run.gpus), to_devices(batch.labels[:, 0], run.gpus)

  step = run.make_step(losses, optimizer, buffers)
  if config.find_lr: return run.find_lr(optimizer, step, train_loader, to_device)
  learns, classes = sum(p.numel() for p in optimizer.params.values()), train_set.class_names
  headline = [f"{name}: {learns / 1e6:.2f} M trainable parameters, {len(classes)} classes, {len(train_set)} training and {len(val_set)} validation "
              f"pictures at {config.size}x{config.size} on {', '.join(run.gpus)}", *(f"note: {note}" for note in notes)]
  about |= {"num_classes": len(classes), "class_names": classes, "category_ids": train_set.category_ids, "size": [config.size, config.size]}
  run.open(model, optimizer, about, headline, len(train_loader))
  evaluation = Evaluation(run, model, prepare, val_loader, val_set, optimizer.averaged)
  with run.signals:
    done = run.train(model, losses, step, train_loader, to_device, evaluation.after_epoch)
    if evaluation.scores is None: evaluation.after_epoch(config.epochs, done, log=False)
  print(evaluation.line())
  run.conclude("top-1", evaluation.scores)
  shown = config.data.replace("crops", "shapes") if config.data.partition(":")[0] == "crops" else "FOLDER"
  print(f"a detector from it: python examples/train_retinanet.py --weights {shlex.quote(str(run.folder))} --backbone {name} --data {shown}" +
        " --norm group" * (config.norm == "group"))
