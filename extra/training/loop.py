"""The loop that every trainer here runs. A task brings its losses; this brings the gradient, the update, the log and the clock."""
import contextlib, itertools, math, time
from typing import Any
from collections.abc import Callable, Iterator
from functools import partial
import numpy as np
from tinygrad import Context, GlobalCounters, Tensor, dtypes
from tinygrad.dtype import DType
from tinydet.errors import UserError
from tinydet.runtime.graphs import in_place, jit
from tinydet.training.optim import Optimizer
from tinydet.runtime.memory import out_of_memory
from tinydet.runtime.mpi import ALONE, WIRES, Exchange, Ranks
from tinydet.training.resume import Checkpoints
from tinydet.runtime.signals import Signals, Stopped
from tinydet.reporting.tracking import Progress, Tracker, warn

Step = Callable[..., Callable[[], dict[str, float]]]   # tensors -> read() -> scalars by name


def make_step(losses: Callable[..., dict[str, Tensor]], optimizer: Optimizer, buffers: list[Tensor], accumulate: int = 1,
              start: int = 0, ranks: Ranks = ALONE, wire: str = "float32") -> Step:
  """A training step as captured graphs. `step(*tensors)` starts it and returns `read() -> {name: float}`, which waits for it: the losses, and `lr`
  and what `Optimizer.update` logs where the weights were updated. Tensors of another shape are another graph of the same step.

  Args: `losses(*tensors)` returns scalars by name, "loss" being the one to descend; `buffers` are tensors that it assigns (running statistics).
  With `accumulate` > 1 a step adds its gradient to the optimiser's sums, and every `accumulate`-th step updates the weights with their mean; `start`
  is the number of steps done before.
  Several `ranks` each give the step their own part of the batch; gradients travel between them as `wire` (see mpi.WIRES)."""
  Tensor.realize(*optimizer.params.values(), *buffers, *optimizer.state().values())
  parts = _Parts(losses, optimizer, buffers, accumulate)
  calls = itertools.count(start + 1)
  return _step_of_one(parts, calls) if ranks.size == 1 else _step_of_many(parts, calls, ranks, WIRES[wire])


class _Parts:
  """What steps of one rank and of many are made of. `names` are those of the scalars that each graph returns, `moved` the buffers that `losses` was
  seen to assign and that have a mean."""
  def __init__(self, losses: Callable[..., dict[str, Tensor]], optimizer: Optimizer, buffers: list[Tensor], accumulate: int):
    self.losses, self.optimizer, self.buffers, self.accumulate = losses, optimizer, buffers, accumulate
    self.params, self.sums = list(optimizer.params.values()), list(optimizer.sums.values())
    self.names: dict[str, list[str]] = {}
    self.moved: list[Tensor] = []

  def traced(self, *tensors: Tensor) -> dict[str, Tensor]:
    """The losses, noting what they assign."""
    before = [b.uop for b in self.buffers]
    scalars = self.losses(*tensors)
    self.moved[:] = [b for b, uop in zip(self.buffers, before) if b.uop is not uop and dtypes.is_float(b.dtype)]
    return scalars

  def gradient(self, loss: Tensor) -> list[Tensor]:
    scale = self.optimizer.loss_scale
    gradients = (loss if scale is None else loss * scale[:1].reshape(())).gradient(*self.params)
    self.optimizer.idle = {name for name, g in zip(self.optimizer.params, gradients) if g.uop.base.op.name == "CONST"}
    return gradients

  def poisoned(self, loss: Tensor) -> list[Tensor]:
    """The gradient, NaN where the loss is not finite, which need not show in its gradient."""
    poison = loss.isfinite().where(0.0, math.nan).contiguous()
    return [g + poison for g in self.gradient(loss)]

  def finish(self, graph: str, scalars: dict[str, Tensor], changed: list[Tensor]) -> Tensor:
    """Realise what a graph changes, and its scalars as one tensor."""
    self.names[graph] = list(scalars)
    values = Tensor.stack(*(scalar.reshape(()).float() for scalar in scalars.values()))
    Tensor.realize(values, *changed, *self.buffers)
    return values

  def add(self, *tensors: Tensor) -> Tensor:
    """Add a batch's gradient to the sums."""
    with Context(TRAINING=1):
      scalars = self.traced(*tensors)
      gradients = self.poisoned(scalars["loss"])
      return self.finish("add", scalars, [total.assign(total + g / self.accumulate) for total, g in zip(self.sums, gradients)])

  def apply(self, graph: str, gradients: list[Tensor], means: list[Tensor]) -> Tensor:
    """Update the weights with `gradients` that are in memory; `means` are to be realised with them."""
    changed, logs = self.optimizer.update(gradients)
    with in_place(): Tensor.realize(values := Tensor.stack(*(log.reshape(()) for log in logs.values())), *changed, *means)
    self.names[graph] = list(logs)
    return values

  def clear(self) -> None: Tensor.realize(*(total.assign(total.zeros_like()) for total in self.sums))


def _step_of_one(parts: _Parts, calls: Iterator[int]) -> Step:
  """The step of a run of one process."""
  @jit
  def update(*tensors: Tensor) -> Tensor:
    with Context(TRAINING=1):
      scalars = parts.losses(*tensors)
      gradients = parts.gradient(scalars["loss"])
      # In three parts: the time tinygrad takes to schedule a graph grows faster than its number of assignments, and kernels of one part are compiled
      # while the next is scheduled.
      Tensor.realize(*scalars.values(), *parts.buffers)   # with which a norm's statistics stay for the gradient
      Tensor.realize(*gradients)
      changed, logs = parts.optimizer.update(gradients, scalars["loss"])
      with in_place(): return parts.finish("update", scalars | logs, changed)

  @jit
  def apply() -> Tensor:
    values = parts.apply("apply", parts.sums, [])
    parts.clear()
    return values

  add = jit(parts.add)
  def step(*tensors: Tensor) -> Callable[[], dict[str, float]]:
    if parts.accumulate == 1: results = [("update", update(*tensors))]
    else: results = [("add", add(*tensors))] + ([("apply", apply())] if next(calls) % parts.accumulate == 0 else [])
    return lambda: {name: value for graph, values in results for name, value in zip(parts.names[graph], values.tolist())}
  return step


def _step_of_many(parts: _Parts, calls: Iterator[int], ranks: Ranks, wire: DType) -> Step:
  """The step of one of many ranks: cut in two where they talk. `begin` or `pack` fills the exchange, `update` takes the sums out.

  Before an update, `read` adds up gradients and running statistics over them in one all-reduce for each dtype, and gives the means of the scalars:
  all make the same update, or none."""
  exchange: list[Exchange] = []

  def fill(gradients: list[Tensor]) -> list[Tensor]:
    values = [*((g / ranks.size).cast(wire) for g in gradients), *(b / ranks.size for b in parts.moved)]
    device = parts.params[0].device
    devices = device if isinstance(device, tuple) else (device,)
    if not exchange: exchange.append(Exchange([(v.shape, v.dtype) for v in values], devices, ranks))
    return [part.assign(value) for part, value in zip(exchange[0].tensors, values)]

  @jit
  def begin(*tensors: Tensor) -> Tensor:
    with Context(TRAINING=1):
      scalars = parts.traced(*tensors)
      return parts.finish("begin", scalars, fill(parts.poisoned(scalars["loss"])))

  @jit
  def pack() -> None:
    Tensor.realize(*fill(parts.sums))
    parts.clear()

  @jit
  def update() -> Tensor:
    summed, count = exchange[0].tensors, len(parts.params)
    return parts.apply("update", [part.cast(dtypes.float32) for part in summed[:count]],
                       [b.assign(part) for b, part in zip(parts.moved, summed[count:])])

  add = jit(parts.add)
  def step(*tensors: Tensor) -> Callable[[], dict[str, float]]:
    graph, values = ("begin", begin(*tensors)) if parts.accumulate == 1 else ("add", add(*tensors))
    due = next(calls) % parts.accumulate == 0
    def read() -> dict[str, float]:
      scalars = dict(zip(parts.names[graph], ranks.means(values.tolist())))
      if not due: return scalars
      if parts.accumulate > 1: pack()
      exchange[0].add()
      logs = update().tolist()   # whose names are known after its first call
      return scalars | dict(zip(parts.names["update"], logs))
    return read
  return step


class Course:
  """How far a run is, and what is due between two steps: to save, to evaluate, to wait for an evaluation, to stop.

  `done` steps, `evaluated` epochs, the scalars of the steps since the last line of the log (`window`), and `skipped` updates in a row are what a
  checkpoint says of it. While an evaluation is under way the only checkpoint is that of its weights, from where a resumed run repeats it."""
  def __init__(self, start: dict, per_epoch: int, checkpoints: Checkpoints, signals: Signals, ranks: Ranks,
               after_epoch: Callable[[int, int], Any], close_line: Callable[[], None]):
    self.per_epoch, self.checkpoints, self.signals, self.ranks = per_epoch, checkpoints, signals, ranks
    self.after_epoch, self.close_line = after_epoch, close_line
    self.done, self.evaluated, self.window, self.skipped = start["step"], start["evaluated"], list(start["window"]), start["skipped"]
    self.pending: tuple[int, Any] | None = None   # epoch and evaluation that is under way

  def save(self) -> None:
    """Write a checkpoint of now, unless the last one is it."""
    self.checkpoints.save(self.done, {"epoch": self.done / self.per_epoch, "evaluated": self.evaluated, "window": self.window,
                                      "skipped": self.skipped, "steps_per_epoch": self.per_epoch})

  def finish_pending(self) -> bool:
    """Wait for an evaluation that is under way; True ends the run."""
    if self.pending is None: return False
    (epoch, evaluation), self.pending = self.pending, None
    self.close_line()
    ends = evaluation.finish()
    self.evaluated = epoch
    return ends

  def between_steps(self, failure: UserError | None) -> tuple[bool, bool]:
    """Save and stop as is due; whether the data failed any rank, and whether the run ends."""
    ready = self.pending is not None and self.pending[1].ready()
    stop, asked, due, failed, ready = self.signals.agree(self.checkpoints.due(self.done), failure is not None, ready)
    ends = bool(ready or stop or asked) and self.finish_pending()
    if stop or asked or ends or (due and self.pending is None): self.save()
    if stop: raise Stopped(stop)
    return bool(failed), ends

  def finish_epoch(self, epoch: int) -> bool:
    """Evaluate after `epoch` epochs, or begin to; True ends the run."""
    if self.finish_pending():
      self.save()
      return True
    try: ends = self.after_epoch(epoch, self.done)
    except (Stopped, UserError) as e:
      if isinstance(e, Stopped) or self.ranks.size == 1: self.save()   # what one rank alone meets, the others do not save
      raise
    if hasattr(ends, "ready"): ends, self.pending = False, (epoch, ends)
    else: self.evaluated = epoch
    if ends is not None: self.save()
    return bool(ends)

  def fail(self, failure: UserError | None) -> None:
    """End all ranks over data that one could not load: the weights are whole, whatever became of it."""
    self.finish_pending()
    if self.done: self.save()
    self.ranks.raise_together(failure)

  def close(self) -> int:
    """Wait for what is under way at the end; returns the number of steps done."""
    if self.pending is not None:
      self.finish_pending()
      self.save()
    return self.done


def train(step: Step, loader: Any, to_device: Callable[[Any], tuple[Tensor, ...]], tracker: Tracker, checkpoints: Checkpoints, signals: Signals,
          *, epochs: int, start: dict | None = None, log_every: int = 10, max_skipped: int = 20,
          after_epoch: Callable[[int, int], Any] = lambda epoch, steps: None, explain: Callable[..., str] = lambda *tensors: "",
          forecast: Callable[[float, float], tuple[dict[str, float], str]] = lambda epochs, images_per_second: ({}, ""), ranks: Ranks = ALONE) -> int:
  """Run `step` over the batches of `epochs` epochs and return the number of steps done.

  `to_device(batch)` gives the tensors of a step. The mean of each scalar over `log_every` steps goes to `tracker` as `train/<name>`, with the speed.
  After each epoch comes `after_epoch(epochs done, steps done)`: None where there was nothing to do, True to end the run, or an evaluation that is
  under way, of which `ready()` says whether it is done and `finish()` waits for it and says whether to end. `start` is the metadata of the checkpoint
  to go on from: the run is then the same, to the last bit, as one that was never interrupted.
  `checkpoints` are written when due, when `signals` ask for one or end the run, after each `after_epoch` that did something, and when data cannot be
  loaded (UserError), in training or in an evaluation. A step whose loss or gradient is not finite changes no weights; after `max_skipped` of them in
  a row the run ends with a UserError that names the pictures and adds what `explain(*tensors)` says of the step's tensors. `forecast(epochs done,
  images a second)` makes of each logged speed more to log, and a line to print or none.
  All `ranks` run it side by side; what one meets, a signal or data that cannot be loaded, ends or saves all after the same step."""
  per_epoch = len(loader)
  progress = Progress(per_epoch * epochs, loader.batch_size)
  course = Course(start or {"step": 0, "evaluated": 0, "window": [], "skipped": 0}, per_epoch, checkpoints, signals, ranks, after_epoch,
                  progress.close)
  since, timed, compiled = None, 0, set()
  first = course.done // per_epoch
  if course.done and course.done % per_epoch == 0 and course.evaluated < first and course.finish_epoch(first): return course.done
  for epoch in range(first, epochs):
    batches, at = loader.epoch(epoch, start=course.done % per_epoch), course.done % per_epoch
    batch, tensors, failure = _load(batches, to_device)
    failed = bool(ranks.largest(failure is not None)[0])
    while batch is not None and not failed:
      with memory_error_explained(loader.batch_size): read, used = step(*tensors), tensors
      # The next batch moves to the device while this one computes: only then wait for the numbers.
      batch, tensors, failure = _load(batches, to_device)
      with memory_error_explained(loader.batch_size): scalars = read()
      course.done, at = course.done + 1, at + 1
      if math.isfinite(scalars["loss"]) and not scalars.get("skipped"): course.skipped = 0
      else: _count_skipped(course, scalars, max_skipped, partial(loader.names, epoch, at - 1), partial(explain, *used))
      course.window.append(scalars)
      if (shapes := tuple(getattr(tensor, "shape", None) for tensor in used)) in compiled: timed += 1
      else: since, timed = time.monotonic(), 0   # the first step of a shape compiles: not counted as speed
      compiled.add(shapes)
      progress.update(course.done, scalars["loss"], GlobalCounters.mem_used)
      if len(course.window) == log_every or (batch is None and failure is None):
        means = _means(course.window)
        if timed:
          means["train/images_per_s"] = timed * loader.batch_size / (time.monotonic() - since)
          expected, line = forecast(course.done / per_epoch, means["train/images_per_s"])
          means |= expected
          if line:
            progress.close()
            print(line, flush=True)
        tracker.log(means | {"train/memory": GlobalCounters.mem_used}, course.done, course.done / per_epoch)
        since, timed = time.monotonic(), 0
        course.window.clear()
      failed, ends = course.between_steps(failure)
      if ends: return course.done
    progress.close()
    if failed: course.fail(failure)
    if course.finish_epoch(epoch + 1): break
    since = since and time.monotonic()
  return course.close()


def _count_skipped(course: Course, scalars: dict[str, float], most: int, names: Callable[[], list[str]], explain: Callable[[], str]) -> None:
  """Take note of an update that was skipped; UserError on all ranks after `most` in a row."""
  course.skipped += 1
  if course.skipped in (1, most): warn(f"step {course.done}: {_not_finite(scalars)}: its update is skipped")
  if course.skipped < most: return
  reasons = course.ranks.gather(explain())
  reason = "; ".join(f"rank {rank}: {text}" if len(reasons) > 1 else text for rank, text in enumerate(reasons) if text)
  course.ranks.raise_together(UserError(
    f"{course.skipped} steps in a row were not finite; the last, {course.done}, had {_not_finite(scalars)}{reason and ': '}{reason} (pictures: "
    f"{', '.join(names())}); lower --lr, lengthen --warmup or set --clip-norm, and resume from the last checkpoint"))


def _means(window: list[dict[str, float]]) -> dict[str, float]:
  """What a line of the log says of the steps in `window`: means, and how many updates were skipped."""
  means = {f"train/{name}": _mean([s[name] for s in window if name in s]) for name in dict.fromkeys(k for s in window for k in s)}
  if "train/skipped" in means: means["train/skipped"] = sum(s.get("skipped", 0) for s in window)
  return means


@contextlib.contextmanager
def memory_error_explained(batch_size: int) -> Iterator[None]:
  """A device or host that runs out of memory inside is a UserError that says what to do."""
  try: yield
  except (MemoryError, RuntimeError, OSError) as e:
    if not out_of_memory(e): raise
    half = f"--bs {batch_size // 2} with --accumulate 2 learns the same" if batch_size > 1 else "choose a smaller --size or --backbone"
    raise UserError(f"memory ran out at --bs {batch_size}, with {GlobalCounters.mem_used / 1e9:.1f} GB in use on the device: {half}") from e


def _load(batches: Iterator[Any], to_device: Callable) -> tuple[Any, tuple[Tensor, ...], UserError | None]:
  """The next batch (None at the end) and its tensors, or what became of it: to be raised when the step that is under way has been counted."""
  try:
    batch = next(batches, None)
    return batch, to_device(batch) if batch is not None else (), None
  except UserError as e: return None, (), e


def _mean(values: list[float]) -> float:
  """The mean of those that are finite, NaN where none is."""
  finite = [v for v in values if math.isfinite(v)]
  return float(np.mean(finite)) if finite else math.nan


def _not_finite(scalars: dict[str, float]) -> str:
  return ", ".join(f"{name} {value}" for name, value in scalars.items() if not math.isfinite(value)) or "a gradient that is not finite"
