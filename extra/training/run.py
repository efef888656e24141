"""A run, from its settings to its last line: folder, lock, record, checkpoints, signals and report, as one object on every rank."""
import contextlib, math, os, sys, time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.config import DEVICE, as_dict, describe, differences, is_free, named_sources, parse, recall, set_free
from tinydet.errors import UserError, exit_on_user_error
from tinydet.reporting import report
from tinydet.reporting.tracking import Tracker, Untracked, duration, warn
from tinydet.runtime import random
from tinydet.runtime.device import default_device, require_device
from tinydet.runtime.devices import devices, replicate, take_devices
from tinydet.runtime.mpi import Ranks, join
from tinydet.runtime.signals import Signals, before_the_loop
from tinydet.training.find_lr import find_lr
from tinydet.training.loop import Step, make_step, train
from tinydet.training.numerics import first_not_finite
from tinydet.training.optim import Optimizer
from tinydet.training.resume import Checkpoints, find_run, open_run, restore, run_name
from tinydet.training.trainer import TrainerConfig, check_batch_size, make_optimizer, settle_batch

Config = TypeVar("Config", bound=TrainerConfig)
Networks = Mapping[str, Mapping[str, Any]]
SLOWER = 0.1   # times the rate, on a plateau (He et al. 2016, section 3.4)


def launch(config_class: type[Config], presets: Mapping[str, Mapping[str, Any]], main: Callable[[Config, "Run"], None], embedded: str,
           network: str, score: str = "mAP", networks: Networks | None = None) -> None:
  """The whole of a trainer but its `main(config, run)`: settings of all sources, the ranks, the device.

  `presets` has "demo", the default where `--data` is an `embedded` data set, and "folder", the default elsewhere. `network` is the setting that names
  the network, for the run's own name, `score` the series that ranks its evaluations. `networks` are the settings of a folder's network on a
  "processor" and on a "gpu"."""
  started = time.monotonic()
  with exit_on_user_error(), before_the_loop(), join() as ranks:
    config = settings(config_class, presets, embedded, network, ranks.rank == 0, networks)
    config = ranks.broadcast(config)   # the folder of the run may be on rank 0's machine alone
    with named_sources(config):
      take_devices(ranks, config.gpus)
      require_device()
      meant = presets.get(config.preset, {}).get("bs", config_class.bs)
      with contextlib.closing(Run(config, ranks, getattr(config, network), started, score, meant)) as run: main(config, run)


def settings(config_class: type[Config], presets: Mapping[str, Mapping[str, Any]], embedded: str, network: str, resumes: bool = True,
             networks: Networks | None = None) -> Config:
  """The settings of this program from the command line and the environment; of a run that is resumed, if this rank `resumes`, from its own record
  where neither says."""
  read = partial(parse, config_class, presets, sys.argv[1:], os.environ)
  config = read("demo")
  if config.data.partition(":")[0] != embedded: config = read("folder")
  if not resumes: return config
  chosen = choose_network(config, networks, network) if networks else ""
  with named_sources(config): folder = find_run(config.resume, config.out, run_name(config.run_name, config.data, getattr(config, network)))
  if folder is None or not (folder / "config.json").is_file():
    if chosen: print(chosen)
    return config
  return read(kept=recall(config_class, folder / "config.json"))


def choose_network(config: Any, networks: Networks, network: str) -> str:
  """Take the settings that a program has for a folder's network on this kind of device, where the user names neither network nor weights, and with
  `--budget` those that are free; in words for the user where they name the network."""
  unsaid = config.preset == "folder" and is_free(config, network) and is_free(config, "weights")
  if not (unsaid or config.budget): return ""
  processor = default_device().partition(":")[0] in ("CPU", "LLVM")
  set_free(config, networks["processor" if processor else "gpu"], DEVICE)
  if not unsaid: return ""
  where = "this processor" if processor else "a GPU"
  return f"network: {getattr(config, network)}, which learns a few hundred pictures in half an hour on {where}; --{network} chooses another"


class Run:
  """One run of a trainer. Each of `ranks` has its own; rank 0 alone writes.

  `config` is the trainer's, `network` the name that the run is called after, `score` the series that ranks its evaluations, `meant_bs` the pictures
  a step that its preset's learning rate is meant for. `resumed` is the metadata of the checkpoint that it goes on from: None for a new run, {} for
  one that begins again in its folder. UserError for settings that do not go together, and where the folder is taken or nothing is there to resume."""
  def __init__(self, config: Any, ranks: Ranks, network: str, started: float, score: str = "mAP", meant_bs: int = 8):
    self.config, self.ranks, self.score, self.started, self.meant_bs = config, ranks, score, started, meant_bs
    if config.find_lr and (config.resume or ranks.size > 1):
      raise UserError("--find-lr: sweeps in one process from what --weights names; no --resume")
    if config.schedule == "plateau" and getattr(config, "score_in_background", False):
      raise UserError("--schedule plateau: follows each score at once; leave out --score-in-background")
    check_batch_size(config, ranks)
    settle_batch(config)
    self.gpus, self.signals = devices(config.gpus), Signals(ranks)
    self.folder, self._lock, self._state, self.resumed = Path(os.devnull), None, {}, None
    name = run_name(config.run_name, config.data, network)
    if ranks.rank == 0: self.folder, self._lock, self._state, self.resumed = open_run(config.resume, config.out, name)
    self.resumed = ranks.broadcast(self.resumed)
    self.tracker: Any = None
    self.checkpoints: Checkpoints | None = None
    self.about: dict[str, Any] = {}
    self._optimizer: Optimizer | None = None
    self._epoch = 0   # that was evaluated last
    self._closing = contextlib.ExitStack()

  @property
  def goes_on_in(self) -> Path | None:
    """The folder of a run that is resumed, on rank 0."""
    return self.folder if self.resumed and self.ranks.rank == 0 else None

  # ---- what it starts from

  def check_data(self, train_set: Any, steps_per_epoch: int) -> None:
    """UserError where the data are not those of the run that is resumed: other classes, or epochs of another length."""
    if not self.resumed: return
    where, known, now = f"--resume {self.config.resume}", self.resumed.get("class_names"), list(train_set.class_names)
    if known and list(known) != now:
      raise UserError(f"{where}: the run learnt {', '.join(known)}, the data now names {', '.join(now)}: put the data back as it was, or start a new "
                      f"run with --weights {self.folder}")
    ids = self.resumed.get("category_ids")
    if ids and list(ids) != list(train_set.category_ids):
      raise UserError(f"{where}: the data now gives its classes the ids {', '.join(map(str, train_set.category_ids))}, not "
                      f"{', '.join(map(str, ids))}: put the data back as it was")
    length = self.resumed.get("steps_per_epoch", steps_per_epoch)
    if length != steps_per_epoch:
      raise UserError(f"{where}: an epoch of the run has {length} steps, with this data and --bs {self.config.bs} it has {steps_per_epoch}: resume "
                      f"with the settings of before, or start a new run with --weights {self.folder}")

  def prepare(self, network: Any, steps_per_epoch: int) -> tuple[Optimizer, list[Tensor]]:
    """The optimiser and the buffers of `network`: restored where the run is resumed, the same on all ranks, and on all devices."""
    tensors = get_state_dict(network)
    optimizer = make_optimizer(self.config, {key: t for key, t in tensors.items() if t.is_param}, steps_per_epoch, self.ranks.size)
    self._optimizer = optimizer
    random.seed(self.config.seed, self.ranks.rank)
    if self.resumed and self.ranks.rank == 0: restore(network, optimizer, self._state, self.config.resume)
    random.restore(self.ranks.broadcast({key: values for key, values in self._state.items() if key.startswith("random.")}), self.ranks.rank)
    random.prepare(*self.gpus)
    self._state = {}
    self.ranks.spread([*tensors.values(), *optimizer.state().values()])
    replicate([*tensors.values(), *optimizer.state().values()], self.gpus)
    return optimizer, [t for t in tensors.values() if not t.is_param]

  def make_step(self, losses: Callable[..., dict[str, Tensor]], optimizer: Optimizer, buffers: list[Tensor]) -> Step:
    """The step of `loop.make_step` with this run's settings."""
    return make_step(losses, optimizer, buffers, self.config.accumulate, self.resumed["step"] if self.resumed else 0, self.ranks, self.config.wire)

  # ---- while it goes on

  def open(self, network: Any, optimizer: Optimizer, about: dict[str, Any], headline: list[str], steps_per_epoch: int) -> None:
    """Begin the record and the checkpoints, whose metadata is `about`, and print what the run is: `headline`, settings, folder."""
    config = self.config
    finished = bool(self.resumed) and self.resumed["step"] >= config.epochs * steps_per_epoch
    if finished: print(f"note: the run in {self.folder} is finished, so nothing is trained and its settings stay; --epochs "
                       f"{config.epochs + 1} or more would go on with it")
    elif self.resumed and (changed := differences(recall(type(config), self.folder / "config.json"), config) if self.ranks.rank == 0 else ""):
      print(f"note: resumed with other settings: {changed}")
    self.tracker = Untracked() if self.ranks.rank else Tracker(
      self.folder, None if finished else as_dict(config), project=config.project, score=self.score, target=config.target, mode=config.wandb,
      resume=self.resumed, lock=self._lock, tags=config.tags, group=config.group, artifacts=config.artifacts)
    self.folder = self.tracker.folder
    best = f"best_{self.score}"
    self.about = about | {"config": as_dict(config), "run_id": self.tracker.id, best: self.resumed[best] if self.resumed else -1.0,
                          "best_epoch": self.resumed.get("best_epoch", 0) if self.resumed else 0,
                          "slowed_epoch": self.resumed.get("slowed_epoch", 0) if self.resumed else 0}
    self.checkpoints = Checkpoints(self.folder, network, optimizer, self.about, keep=config.keep, every_steps=config.save_steps,
                                   every_minutes=config.save_minutes, ranks=self.ranks)
    for line in headline: print(line)
    print(f"settings: {describe(config) or 'the defaults'}")
    if self.ranks.rank == 0: report.save_environment(self.folder, config.sources)
    self.update_report()
    print(f"run: {self.folder}   (the first step compiles: up to a minute on a processor)")

  def find_lr(self, optimizer: Optimizer, step: Step, loader: Any, to_device: Callable) -> None:
    """Sweep the learning rate in place of training."""
    with contextlib.closing(loader): find_lr(self.folder, self.config.find_lr, optimizer, step, loader, to_device, as_dict(self.config))

  def train(self, network: Any, losses: Callable, step: Step, loader: Any, to_device: Callable, after_epoch: Callable, **options: Any) -> int:
    """`loop.train` with this run's settings; returns the steps done."""
    explain = partial(first_not_finite, network, losses) if self.config.debug_numerics else lambda *_: ""
    return train(step, loader, to_device, self.tracker, self.checkpoints, self.signals, epochs=self.config.epochs, start=self.resumed or None,
                 log_every=self.config.log_every, max_skipped=self.config.max_skipped, after_epoch=after_epoch, explain=explain, ranks=self.ranks,
                 **options)

  @property
  def best(self) -> float: return self.about[f"best_{self.score}"]

  @property
  def reached(self) -> bool:
    """Whether the best score is at the target."""
    return self.config.target is not None and self.best >= self.config.target

  @property
  def ends(self) -> bool:
    """Whether the run is to end at its target and is there, or has no more patience or time."""
    waited = self._epoch - self.about.get("best_epoch", 0)
    spent = time.monotonic() - self.started
    if self.config.patience and waited >= self.config.patience:
      print(f"no better {self.score} for {waited} epochs (--patience {self.config.patience}): the run ends")
      return True
    if (budget := getattr(self.config, "budget", 0)) and spent > budget:
      print(f"the time of --budget is over ({duration(spent)}): the run ends")
      return True
    return self.config.stop_at_target and self.reached

  def keep_if_best(self, value: float, epoch: int, step: int, weights: dict[str, np.ndarray] | None = None) -> None:
    """Keep `weights`, by default those of now, where the score `value` is the best so far. Weights that are not finite are never the best."""
    self._epoch = epoch
    if not value > self.best: return self._slow_down(epoch)
    weights = self.checkpoints.weights() if weights is None else weights
    if bad := [key for key, array in weights.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]:
      warn(f"epoch {epoch}: {bad[0]} is not finite: these weights are not kept as the best")
      return
    self.about[f"best_{self.score}"], self.about["best_epoch"] = value, epoch
    self.checkpoints.keep_best({"epoch": epoch, "step": step, self.score: value}, self.config.save_half, weights)
    self.tracker.improved()

  def _slow_down(self, epoch: int) -> None:
    """Lower the rate where the score has not risen for long enough, with the plateau schedule."""
    waited = epoch - max(self.about.get("best_epoch", 0), self.about.get("slowed_epoch", 0))
    if self.config.schedule != "plateau" or waited < self.config.plateau: return
    left = self._optimizer.slow(SLOWER, self.config.last_lr)
    self.about["slowed_epoch"] = epoch
    print(f"no better {self.score} for {waited} epochs (--plateau {self.config.plateau}): the learning rate is now {left * self.config.lr:.3g}")

  def update_report(self, record: Callable[[], None] | None = None) -> None:
    """Write the report anew, after `record()`; a failure is said and costs the report alone."""
    if self.ranks.rank == 0 and (why := report.update(self.folder, *([record] if record else []))): print(f"note: {why}")

  # ---- its end

  def conclude(self, label: str, values: dict[str, float]) -> None:
    """The last lines of a run that came to its end, and its summary."""
    self.checkpoints.finish()
    target = "" if self.config.target is None else f"; target {self.config.target:.4f}: {'reached' if self.reached else 'missed'}"
    print(f"best {label} {self.best:.4f}{target}; {duration(time.monotonic() - self.started)} in all" if self.best >= 0 else
          f"no {label}: nothing could be scored; {duration(time.monotonic() - self.started)} in all")
    kept = [self.folder / "best.safetensors", *sorted(self.folder.glob("checkpoint-*.safetensors"), key=lambda p: p.stat().st_mtime)[-1:]]
    weights = next((path for path in kept if path.is_file()), None)
    print(f"pictures: {self.folder / 'pictures'}" + (f"   weights: {weights}" if weights else ""))
    self.tracker.summary({f"final/{key}": value for key, value in values.items() if math.isfinite(value)} |
                         {"minutes": (time.monotonic() - self.started) / 60})

  def at_end(self, close: Callable[[], None]) -> None:
    """Have `close` called when the run ends, however it does."""
    self._closing.callback(close)

  def close(self) -> None:
    """End the record, whatever ended the run."""
    with contextlib.ExitStack() as last:
      if self.tracker is not None:
        last.callback(self.tracker.finish)
        last.callback(self._report)
        last.callback(self.checkpoints.wait)
      elif self._lock is not None: last.callback(self._lock.close)
      last.callback(self._closing.close)

  def _report(self) -> None:
    if self.ranks.rank == 0: print(report.update(self.folder) or f"report: {self.folder / 'report.html'}")
