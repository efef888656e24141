"""What others published of a recipe: how many passes over its data it takes to its score; and what that makes of a run's time."""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any
import numpy as np

LOADING = {"data", "strict", "workers", "gpus", "seed", "dtype"}   # where pictures lie and what computes: nothing of what is learnt


@dataclass(frozen=True)
class Convergence:
  """A recipe's convergence: on `pictures` training pictures, `epochs(pictures an update)` passes to its score, None where nobody said; whoever may
  change the settings `free`; `source`, in words for the screen."""
  pictures: int
  epochs: Callable[[int], float | None]
  free: frozenset[str]
  source: str


# MLCommons' reference convergence points for RetinaNet, mAP 0.34: pictures an update -> epochs, the mean of their runs less the best and the worst.
# From mlperf-logging 4.1.68, rcp_checker/training_5.1.0/rcps_retinanet.json.
MLPERF_EPOCHS = {256: 4.0, 320: 74 / 18, 512: 5.0, 768: 5.0, 1024: 6.0, 1280: 120 / 18, 2048: 142 / 18, 2560: 95 / 11, 4096: 197 / 13}


def mlperf_epochs(batch: int) -> float | None:
  """Epochs to mAP 0.34 in MLCommons' reference runs, between their batch sizes by interpolation, as their checker does. None above them; below, the
  smallest one's 4, which four of five runs with 96 pictures an update needed too (tinycorp, MLPerf Training 5.0)."""
  return float(np.interp(batch, list(MLPERF_EPOCHS), list(MLPERF_EPOCHS.values()))) if batch <= max(MLPERF_EPOCHS) else None


CONVERGENCE: dict[str, Convergence] = {   # by preset
  "mlperf": Convergence(1_170_301, mlperf_epochs, frozenset({"bs", "accumulate", "lr", "warmup", "epochs"}), "MLCommons' reference runs"),
  # docs.pytorch.org/vision, RetinaNet_ResNet50_FPN_Weights.COCO_V1: box mAP 36.4 by references/detection, 26 epochs of 8 GPUs x 2 pictures
  "coco": Convergence(118_287, lambda batch: 26.0 if batch == 16 else None, frozenset({"bs", "accumulate"}), "torchvision")}


def changed(config: Any, recipe: Any, free: frozenset[str] | set[str]) -> list[str]:
  """The settings of data, model, training and score in which `config` differs from `recipe`, less those of `free` and LOADING."""
  return [f.name for f in fields(recipe) if f.name not in free | LOADING and getattr(config, f.name) != getattr(recipe, f.name)
          and (f.metadata["group"] in ("data", "model", "training") or f.name in ("target", "eval_every"))]


def hours_to_target(epochs: float, done: float, pictures: int, images_per_second: float, evaluation_seconds: float = 0.0) -> float:
  """Hours from `done` epochs to `epochs`, over `pictures` each, with an evaluation after each epoch; 0 where they are over."""
  left = max(epochs - done, 0.0)
  return (left * pictures / images_per_second + math.ceil(left) * evaluation_seconds) / 3600


class Forecast:
  """When a run should reach its target, where its recipe is one of CONVERGENCE; no words and no numbers where it is not.

  recipes: the configuration of each preset of CONVERGENCE; pictures: those of the run's training data, as many as published, give or take 2%."""
  def __init__(self, config: Any, recipes: Mapping[str, Any], pictures: int):
    fits = [known for name, known in CONVERGENCE.items() if name in recipes
            if not changed(config, recipes[name], known.free) and abs(pictures / known.pictures - 1) < 0.02]
    self.epochs = fits[0].epochs(config.bs * config.accumulate) if fits else None
    self.source, self.pictures, self.target = fits[0].source if fits else "", pictures, config.target
    self.speed, self.evaluation, self.said = 0.0, 0.0, False

  def measured(self, done: float, images_per_second: float) -> tuple[dict[str, float], str]:
    """After `done` epochs, at a speed: what to log, and at first a line to print."""
    if self.epochs is None: return {}, ""
    self.speed, first, self.said = images_per_second, not self.said, True
    return {"train/hours_to_target": self._hours(done)}, self._line(done) if first else ""

  def evaluated(self, done: float, seconds: float, reached: bool) -> str:
    """After an evaluation that took `seconds`: a line to print, unless the target is `reached`."""
    self.evaluation = seconds
    return "" if self.epochs is None or not self.speed or reached else self._line(done)

  def _hours(self, done: float) -> float: return hours_to_target(self.epochs, done, self.pictures, self.speed, self.evaluation)

  def _line(self, done: float) -> str:
    left = self.epochs - done
    if left <= 0: return f"mAP {self.target:g} was due: {self.source} reached it after {self.epochs:.3g} epochs"
    evaluations = f" and {math.ceil(left)} evaluations" if self.evaluation else ", and evaluations"
    return (f"about {self._hours(done):.3g} h to mAP {self.target:g}: {left:.3g} epochs of {self.pictures} pictures at {self.speed:.4g} images/s"
            f"{evaluations}, if it learns as fast as {self.source}")
