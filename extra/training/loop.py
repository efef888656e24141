"""The loop that every trainer here runs. A task brings its losses; this brings the gradient, the update, the log and the clock."""
import contextlib, itertools, math, time
from typing import Any
from collections.abc import Callable, Iterator
import numpy as np
from tinygrad import Context, GlobalCounters, Tensor, dtypes
from tinygrad.helpers import to_tuple
from tinydet.errors import UserError
from tinydet.runtime.graphs import in_place, jit
from tinydet.training.optim import Optimizer
from tinydet.runtime.mpi import ALONE, WIRES, Exchange, Ranks
from tinydet.training.resume import Checkpoints
from tinydet.runtime.signals import Signals, Stopped
from tinydet.reporting.tracking import Progress, Tracker, warn


def make_step(losses: Callable[..., dict[str, Tensor]], optimizer: Optimizer, buffers: list[Tensor], accumulate: int = 1,
              start: int = 0, ranks: Ranks = ALONE, wire: str = "float32") -> Callable:
  """A training step as captured graphs. `step(*tensors)` starts it and returns `read() -> {name: float}`, which waits for it: the losses, and `lr`
  and what `Optimizer.update` logs where the weights were updated. Tensors of another shape are another graph of the same step.

  Args: `losses(*tensors)` returns scalars by name, "loss" being the one to descend; `buffers` are tensors that it assigns (running statistics).
  With `accumulate` > 1 a step adds its gradient to the optimiser's sums, and every `accumulate`-th step updates the weights with their mean; `start`
  is the number of steps done before.
  Several `ranks` each give the step their own part of the batch. Before an update, `read` adds up gradients and running statistics over them, the
  former as `wire` (see ranks.WIRES), in one all-reduce for each dtype, and gives the means of the scalars: all make the same update, or none."""
  params, names, sums = list(optimizer.params.values()), {}, list(optimizer.sums.values())
  Tensor.realize(*params, *buffers, *optimizer.state().values())

  moved: list[Tensor] = []   # buffers that `losses` assigns, as far as they have a mean
  def traced(*tensors: Tensor) -> dict[str, Tensor]:
    before = [b.uop for b in buffers]
    scalars = losses(*tensors)
    moved[:] = [b for b, uop in zip(buffers, before) if b.uop is not uop and dtypes.is_float(b.dtype)]
    return scalars

  def gradient(loss: Tensor) -> list[Tensor]:
    return (loss if optimizer.loss_scale is None else loss * optimizer.loss_scale[:1].reshape(())).gradient(*params)

  def poisoned(loss: Tensor) -> list[Tensor]:
    """The gradient, NaN where the loss is not finite, which need not show in its gradient."""
    poison = loss.isfinite().where(0.0, math.nan).contiguous()
    return [g + poison for g in gradient(loss)]

  def finish(graph: str, scalars: dict[str, Tensor], changed: list[Tensor]) -> Tensor:
    names[graph] = list(scalars)
    values = Tensor.stack(*(scalar.reshape(()).float() for scalar in scalars.values()))
    Tensor.realize(values, *changed, *buffers)
    return values

  @jit
  def update(*tensors: Tensor) -> Tensor:
    with Context(TRAINING=1):
      scalars = losses(*tensors)
      gradients = gradient(scalars["loss"])
      # In three parts: the time tinygrad takes to schedule a graph grows faster than its number of assignments, and kernels of one part are compiled
      # while the next is scheduled.
      Tensor.realize(*scalars.values())
      Tensor.realize(*gradients, *buffers)
      changed, logs = optimizer.update(gradients, scalars["loss"])
      with in_place(): return finish("update", scalars | logs, changed)

  @jit
  def add(*tensors: Tensor) -> Tensor:
    with Context(TRAINING=1):
      scalars = traced(*tensors)
      return finish("add", scalars, [total.assign(total + g / accumulate) for total, g in zip(sums, poisoned(scalars["loss"]))])

  @jit
  def apply() -> Tensor:
    changed, logs = optimizer.update(sums)
    with in_place(): Tensor.realize(values := Tensor.stack(*(log.reshape(()) for log in logs.values())), *changed)
    Tensor.realize(*(total.assign(total.zeros_like()) for total in sums))
    names["apply"] = list(logs)
    return values

  calls = itertools.count(start + 1)
  def step(*tensors: Tensor) -> Callable[[], dict[str, float]]:
    if accumulate == 1: results = [("update", update(*tensors))]
    else: results = [("add", add(*tensors))] + ([("apply", apply())] if next(calls) % accumulate == 0 else [])
    return lambda: {name: value for graph, values in results for name, value in zip(names[graph], values.tolist())}
  if ranks.size == 1: return step

  # With several ranks the update is cut in two where they talk: `begin` or `pack` fills the exchange, `update_all` takes the sums out.
  exchange: list[Exchange] = []

  def fill(gradients: list[Tensor]) -> list[Tensor]:
    values = [*((g / ranks.size).cast(WIRES[wire]) for g in gradients), *(b / ranks.size for b in moved)]
    if not exchange: exchange.append(Exchange([(v.shape, v.dtype) for v in values], to_tuple(params[0].device), ranks))
    return [part.assign(value) for part, value in zip(exchange[0].tensors, values)]

  @jit
  def begin(*tensors: Tensor) -> Tensor:
    with Context(TRAINING=1):
      scalars = traced(*tensors)
      return finish("begin", scalars, fill(poisoned(scalars["loss"])))

  @jit
  def pack() -> None:
    Tensor.realize(*fill(sums))
    Tensor.realize(*(total.assign(total.zeros_like()) for total in sums))

  @jit
  def update_all() -> Tensor:
    parts = exchange[0].tensors
    changed, logs = optimizer.update([part.cast(dtypes.float32) for part in parts[:len(params)]])
    means = [b.assign(part) for b, part in zip(moved, parts[len(params):])]
    with in_place(): Tensor.realize(values := Tensor.stack(*(log.reshape(()) for log in logs.values())), *changed, *means)
    names["update_all"] = list(logs)
    return values

  def step_of_all(*tensors: Tensor) -> Callable[[], dict[str, float]]:
    graph, values = ("begin", begin(*tensors)) if accumulate == 1 else ("add", add(*tensors))
    due = next(calls) % accumulate == 0
    def read() -> dict[str, float]:
      scalars = dict(zip(names[graph], ranks.means(values.tolist())))
      if not due: return scalars
      if accumulate > 1: pack()
      exchange[0].add()
      logs = update_all().tolist()
      return scalars | dict(zip(names["update_all"], logs))
    return read
  return step_of_all


def train(step: Callable, loader: Any, to_device: Callable[[Any], tuple[Tensor, ...]], tracker: Tracker, checkpoints: Checkpoints, signals: Signals,
          *, epochs: int, start: dict | None = None, log_every: int = 10, max_skipped: int = 20,
          after_epoch: Callable[[int, int], Any] = lambda epoch, steps: None, explain: Callable[..., str] = lambda *tensors: "",
          forecast: Callable[[float, float], tuple[dict[str, float], str]] = lambda epochs, images_per_second: ({}, ""), ranks: Ranks = ALONE) -> int:
  """Run `step` over the batches of `epochs` epochs and return the number of steps done.

  `to_device(batch)` gives the tensors of a step. The mean of each scalar over `log_every` steps goes to `tracker` as `train/<name>`, with the speed.
  After each epoch comes `after_epoch(epochs done, steps done)`: None where there was nothing to do, True to end the run, or an evaluation that is
  under way, of which `ready()` says whether it is done and `finish()` waits for it and says whether to end. Until then the only checkpoint is that of
  its weights, from where a resumed run repeats it; what asks for another one waits for it. `start` is the metadata of the checkpoint to go on from:
  the run is then the same, to the last bit, as one that was never interrupted.
  `checkpoints` are written when due, when `signals` ask for one or end the run, after each `after_epoch` that did something, and when data cannot be
  loaded (UserError), in training or in an evaluation. A step whose loss or gradient is not finite changes no weights; after `max_skipped` of them in
  a row the run ends with a UserError that names the pictures and adds what `explain(*tensors)` says of the step's tensors. `forecast(epochs done,
  images a second)` makes of each logged speed more to log, and a line to print or none.
  All `ranks` run it side by side; what one meets, a signal or data that cannot be loaded, ends or saves all after the same step."""
  start = start or {"step": 0, "evaluated": 0, "window": [], "skipped": 0}
  per_epoch, done, evaluated, window, skipped = len(loader), start["step"], start["evaluated"], list(start["window"]), start["skipped"]
  progress, since, timed, compiled = Progress(per_epoch * epochs, loader.batch_size), None, 0, set()
  pending: tuple[int, Any] | None = None   # epoch and evaluation that is under way

  def save() -> None: checkpoints.save(done, {"epoch": done / per_epoch, "evaluated": evaluated, "window": window, "skipped": skipped})

  def finish_pending() -> bool:
    """Wait for an evaluation that is under way; True ends the run."""
    nonlocal evaluated, pending
    if pending is None: return False
    (epoch, evaluation), pending = pending, None
    progress.close()
    ends = evaluation.finish()
    evaluated = epoch
    return ends

  def between_steps(failure: UserError | None) -> tuple[bool, bool]:
    """Save and stop as is due; whether the data failed any rank, and whether the run ends."""
    ready = pending is not None and pending[1].ready()
    stop, asked, due, failed, ready = signals.agree(checkpoints.due(done), failure is not None, ready)
    ends = bool(ready or stop or asked) and finish_pending()
    if stop or asked or ends or (due and pending is None): save()
    if stop: raise Stopped(stop)
    return bool(failed), ends

  def finish_epoch(epoch: int) -> bool:
    nonlocal evaluated, pending
    if finish_pending():
      save()
      return True
    try: ends = after_epoch(epoch, done)
    except (Stopped, UserError) as e:
      if isinstance(e, Stopped) or ranks.size == 1: save()   # what one rank alone meets, the others do not save
      raise
    if hasattr(ends, "ready"): ends, pending = False, (epoch, ends)
    else: evaluated = epoch
    if ends is not None: save()
    return bool(ends)

  if done and done % per_epoch == 0 and evaluated < done // per_epoch and finish_epoch(done // per_epoch): return done
  for epoch in range(done // per_epoch, epochs):
    batches, at = loader.epoch(epoch, start=done % per_epoch), done % per_epoch
    batch, tensors, failure = _load(batches, to_device)
    failed = bool(ranks.largest(failure is not None)[0])
    while batch is not None and not failed:
      with memory_error_explained(loader.batch_size): read, used = step(*tensors), tensors
      # The next batch moves to the device while this one computes: only then wait for the numbers.
      batch, tensors, failure = _load(batches, to_device)
      with memory_error_explained(loader.batch_size): scalars = read()
      done, at = done + 1, at + 1
      if math.isfinite(scalars["loss"]) and not scalars.get("skipped"): skipped = 0
      else:
        skipped += 1
        if skipped in (1, max_skipped): warn(f"step {done}: {_not_finite(scalars)}: its update is skipped")
        if skipped >= max_skipped:
          names = ", ".join(loader.names(epoch, at - 1))
          reasons = ranks.gather(explain(*used))
          reason = "; ".join(f"rank {rank}: {text}" if len(reasons) > 1 else text for rank, text in enumerate(reasons) if text)
          ranks.raise_together(UserError(
            f"{skipped} steps in a row were not finite; the last, {done}, had {_not_finite(scalars)}{reason and ': '}{reason} (pictures: {names}); "
            "lower --lr, lengthen --warmup or set --clip-norm, and resume from the last checkpoint"))
      window.append(scalars)
      if (shapes := tuple(getattr(tensor, "shape", None) for tensor in used)) in compiled: timed += 1
      else: since, timed = time.monotonic(), 0   # the first step of a shape compiles: not counted as speed
      compiled.add(shapes)
      progress.update(done, scalars["loss"], GlobalCounters.mem_used)
      if len(window) == log_every or (batch is None and failure is None):
        means = {f"train/{name}": _mean([s[name] for s in window if name in s]) for name in dict.fromkeys(k for s in window for k in s)}
        if "train/skipped" in means: means["train/skipped"] = sum(s.get("skipped", 0) for s in window)
        if timed:
          means["train/images_per_s"] = timed * loader.batch_size / (time.monotonic() - since)
          expected, line = forecast(done / per_epoch, means["train/images_per_s"])
          means |= expected
          if line:
            progress.close()
            print(line, flush=True)
        tracker.log(means | {"train/memory": GlobalCounters.mem_used}, done, done / per_epoch)
        since, timed = time.monotonic(), 0
        window.clear()
      failed, ends = between_steps(failure)
      if ends: return done
    progress.close()
    if failed:   # the weights are whole, whatever became of the data
      finish_pending()
      if done: save()
      ranks.raise_together(failure)
    if finish_epoch(epoch + 1): break
    since = since and time.monotonic()
  if pending is not None:
    finish_pending()
    save()
  return done


@contextlib.contextmanager
def memory_error_explained(batch_size: int) -> Iterator[None]:
  """A device or host that runs out of memory inside is a UserError that says what to do."""
  try: yield
  except (MemoryError, RuntimeError, OSError) as e:
    if not isinstance(e, MemoryError) and "memory" not in str(e).lower(): raise
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
