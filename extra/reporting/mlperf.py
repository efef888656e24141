"""A run's log as MLPerf Training wants it: `:::MLLOG` lines in mlperf.log, through MLCommons' own package, for their own checker.

    pip install -e '.[mlperf]'
    python -m mlperf_logging.compliance_checker --usage training --ruleset 5.1.0 runs/<name>/mlperf.log

Who submits is said by the variables MLPERF_SUBMISSION_ORG, MLPERF_SUBMISSION_PLATFORM and MLPERF_SUBMISSION_STATUS (onprem, cloud or research); with
MLPERF_CLEAR_CACHE=1 the run begins by dropping the system's page cache, as the rules demand and root may."""
import logging, os, re, time
from pathlib import Path
from typing import Any
from tinygrad import Device
from tinydet.errors import UserError
from tinydet.reporting.forecast import CONVERGENCE, changed
from tinydet.reporting.tracking import warn

CLASSES, EVAL_PICTURES, TARGET = 264, 24_781, 0.34   # of OpenImages as MLPerf has it; CONVERGENCE["mlperf"] has its training pictures
CACHES = Path("/proc/sys/vm/drop_caches")


class MLPerfLog:
  """The log of the run that begins now: the rules' clock starts here, before any data is touched. Where `on` is False, everything does nothing.

  `recipe` is the reference's configuration: a run that differs from it where the rules allow no choice is logged in the Open division. A run that is
  resumed adds nothing, as the rules know of one start only. `warmup_factor` is the share of the rate that a warm-up begins with."""
  def __init__(self, config: Any, recipe: Any, warmup_factor: float, on: bool):
    self.config, self.recipe, self.warmup_factor, self.logger, self.make = config, recipe, warmup_factor, None, None
    self.first, self.span = 1, "epoch" if config.eval_every == 1 else "block"
    if not on: return
    try: from mlperf_logging.mllog.mllog import MLLogger
    except ImportError:
      raise UserError("--mlperf-log: needs a package that is missing; pip install 'mlperf-logging>=4.1.68', or give --no-mlperf-log") from None
    self.make, self.cleared, self.started = MLLogger, clear_caches(), int(time.time() * 1000)

  def open(self, folder: Path, classes: int, train_pictures: int, eval_pictures: int, resumed: bool) -> None:
    """Write everything up to the first epoch into `folder`/mlperf.log."""
    if self.make is None: return
    if resumed:
      print("note: a resumed run cannot count for MLPerf: nothing is added to mlperf.log")
      return
    config, path = self.config, folder / "mlperf.log"
    try: handler = logging.FileHandler(path, "w", encoding="utf-8")
    except OSError as e:
      warn(f"{path} cannot be written ({e.strerror}): the run goes on without it")
      return
    handler.handleError = lambda record: warn(f"{path} cannot be written, and lacks a line: the run goes on")
    logger = logging.Logger("mlperf")   # of its own: nothing of it in other libraries' logs, nor of theirs in it
    logger.addHandler(handler)
    self.logger = self.make(logger, default_stack_offset=2, root_dir=re.escape(str(Path(__file__).parents[2])))

    other = changed(config, self.recipe, CONVERGENCE["mlperf"].free)
    if (classes, train_pictures, eval_pictures) != (CLASSES, CONVERGENCE["mlperf"].pictures, EVAL_PICTURES): other.insert(0, "data")
    self._log("submission_benchmark", "retinanet", at=self.started)
    self._log("submission_division", "open" if other else "closed", at=self.started)
    for key, usual in (("org", "unnamed"), ("platform", f"{config.gpus}x{Device.DEFAULT}"), ("status", "onprem")):
      self._log(f"submission_{key}", os.environ.get(f"MLPERF_SUBMISSION_{key.upper()}") or usual, at=self.started)
    self._log("cache_clear", self.cleared, at=self.started)
    self._log("init_start", at=self.started)
    settings = {"seed": config.seed, "global_batch_size": config.bs * config.accumulate, "gradient_accumulation_steps": config.accumulate,
                "opt_name": config.optimizer, "opt_base_learning_rate": config.lr, "opt_weight_decay": config.weight_decay,
                "opt_learning_rate_warmup_epochs": config.warmup, "opt_learning_rate_warmup_factor": self.warmup_factor}
    for key, value in settings.items(): self._log(key, value, at=self.started)
    self._log("init_stop", at=self.started)
    self._log("run_start", at=self.started)
    self._log("train_samples", train_pictures)
    self._log("eval_samples", eval_pictures)
    self._begin(1)
    print(f"MLPerf log: {path}, " + (f"open division (other than the reference's: {', '.join(other)})" if other else "closed division"))

  def start_evaluation(self, epoch: int) -> None:
    """`epoch` epochs are done, and their weights about to be judged."""
    self._log(f"{self.span}_stop", epoch_num=epoch, first_epoch_num=self.first)
    self._log("eval_start", epoch_num=epoch)

  def evaluated(self, epoch: int, score: float) -> None:
    """They are worth `score`. The run is over for MLPerf, successfully, if that is the target."""
    self._log("eval_accuracy", score, epoch_num=epoch)
    self._log("eval_stop", epoch_num=epoch)
    if score >= (TARGET if self.config.target is None else self.config.target): self._stop("success")
    elif epoch < self.config.epochs: self._begin(epoch + 1)

  def close(self) -> None:
    """The run is over; without success if that was not said before."""
    self._stop("aborted")

  def _begin(self, epoch: int) -> None:
    """Epochs are numbered from 1 (the rules, "Epoch numbering"). What lies between two evaluations is one of them, or a block."""
    every = min(self.config.eval_every, max(self.config.epochs - epoch + 1, 1))
    self.first = epoch
    self._log(f"{self.span}_start", epoch_num=epoch, first_epoch_num=epoch, epoch_count=every)

  def _stop(self, status: str) -> None:
    if self.logger is None: return
    self._log("run_stop", status=status)
    for handler in self.logger.logger.handlers: handler.close()
    self.logger = None

  def _log(self, key: str, value: Any = None, at: int | None = None, **metadata: Any) -> None:
    if self.logger is None: return
    kind = {"start": self.logger.start, "stop": self.logger.end}.get(key.rpartition("_")[2], self.logger.event)
    kind(key, value, metadata, time_ms=at)


def clear_caches() -> bool:
  """Drop the system's page cache if MLPERF_CLEAR_CACHE=1; whether that was done."""
  if os.environ.get("MLPERF_CLEAR_CACHE") != "1": return False
  try:
    with open(CACHES, "w", encoding="ascii") as f:
      os.sync()
      f.write("3\n")
  except OSError as e:
    warn(f"MLPERF_CLEAR_CACHE=1: {CACHES} cannot be written ({e.strerror}); run as root, or drop the caches before")
    return False
  return True
