"""The loop that every trainer here runs. A task brings its losses; this brings the gradient, the update, the log and the clock."""
import contextlib, itertools, math, time
from typing import Any
from collections.abc import Callable, Iterator
import numpy as np
from tinygrad import Context, GlobalCounters, Tensor, TinyJit
from extra.errors import UserError
from extra.training.optim import Optimizer
from extra.training.resume import Checkpoints
from extra.training.signals import Signals, Stopped
from extra.training.tracking import Progress, Tracker, warn


def jit(function: Callable) -> TinyJit:
  """A `TinyJit` that captures at its first call rather than its second, so the graph is scheduled once. All its inputs and state must be realised."""
  jitted = TinyJit(function)
  jitted.cnt = 1
  return jitted


def make_step(losses: Callable[..., dict[str, Tensor]], optimizer: Optimizer, buffers: list[Tensor], accumulate: int = 1,
              start: int = 0) -> Callable:
  """A training step as captured graphs. `step(*tensors)` starts it and returns `read() -> {name: float}`, which waits for it: the losses, and `lr`
  and what `Optimizer.update` logs where the weights were updated.

  Args: `losses(*tensors)` returns scalars by name, "loss" being the one to descend; `buffers` are tensors that it assigns (running statistics).
  With `accumulate` > 1 a step adds its gradient to the optimiser's sums, and every `accumulate`-th step updates the weights with their mean; `start`
  is the number of steps done before."""
  params, names, sums = list(optimizer.params.values()), {}, list(optimizer.sums.values())
  Tensor.realize(*params, *buffers, *optimizer.state().values())

  def gradient(loss: Tensor) -> list[Tensor]:
    return (loss if optimizer.loss_scale is None else loss * optimizer.loss_scale[:1].reshape(())).gradient(*params)

  def finish(graph: str, scalars: dict[str, Tensor], changed: list[Tensor]) -> Tensor:
    names[graph] = list(scalars)
    values = Tensor.stack(*(scalar.reshape(()).float() for scalar in scalars.values()))
    Tensor.realize(values, *changed, *buffers)
    return values

  @jit
  def update(*tensors: Tensor) -> Tensor:
    with Context(TRAINING=1):
      scalars = losses(*tensors)
      gradients = [g.contiguous() for g in gradient(scalars["loss"])]
      # In two parts, as the time tinygrad takes to schedule a graph grows faster than its number of assignments.
      Tensor.realize(*scalars.values(), *gradients, *buffers)
      changed, logs = optimizer.update(gradients, scalars["loss"])
      return finish("update", scalars | logs, changed)

  @jit
  def add(*tensors: Tensor) -> Tensor:
    with Context(TRAINING=1):
      scalars = losses(*tensors)
      poison = (scalars["loss"] * 0).contiguous()   # NaN where the loss is not finite, which need not show in its gradient
      return finish("add", scalars, [total.assign(total + g / accumulate + poison) for total, g in zip(sums, gradient(scalars["loss"]))])

  @jit
  def apply() -> Tensor:
    changed, logs = optimizer.update(sums)
    Tensor.realize(values := Tensor.stack(*(log.reshape(()) for log in logs.values())), *changed)
    Tensor.realize(*(total.assign(total.zeros_like()) for total in sums))
    names["apply"] = list(logs)
    return values

  calls = itertools.count(start + 1)
  def step(*tensors: Tensor) -> Callable[[], dict[str, float]]:
    if accumulate == 1: results = [("update", update(*tensors))]
    else: results = [("add", add(*tensors))] + ([("apply", apply())] if next(calls) % accumulate == 0 else [])
    return lambda: {name: value for graph, values in results for name, value in zip(names[graph], values.tolist())}
  return step


def train(step: Callable, loader: Any, to_device: Callable[[Any], tuple[Tensor, ...]], tracker: Tracker, checkpoints: Checkpoints, signals: Signals,
          *, epochs: int, start: dict | None = None, log_every: int = 10, max_skipped: int = 20,
          after_epoch: Callable[[int, int], Any] = lambda epoch, steps: None, explain: Callable[..., str] = lambda *tensors: "") -> int:
  """Run `step` over the batches of `epochs` epochs and return the number of steps done.

  `to_device(batch)` gives the tensors of a step. The mean of each scalar over `log_every` steps goes to `tracker` as `train/<name>`, with the speed.
  After each epoch comes `after_epoch(epochs done, steps done)`: None where there was nothing to do, True to end the run, or an evaluation that is
  under way, of which `ready()` says whether it is done and `finish()` waits for it and says whether to end. Until then the only checkpoint is that of
  its weights, from where a resumed run repeats it; what asks for another one waits for it. `start` is the metadata of the checkpoint to go on from:
  the run is then the same, to the last bit, as one that was never interrupted.
  `checkpoints` are written when due, when `signals` ask for one or end the run, after each `after_epoch` that did something, and when data cannot be
  loaded (UserError). A step whose loss or gradient is not finite changes no weights; after `max_skipped` of them in a row the run ends with a
  UserError that names the pictures and adds what `explain(*tensors)` says of the step's tensors."""
  start = start or {"step": 0, "evaluated": 0, "window": [], "skipped": 0}
  per_epoch, done, evaluated, window, skipped = len(loader), start["step"], start["evaluated"], list(start["window"]), start["skipped"]
  progress, since = Progress(per_epoch * epochs, loader.batch_size), None
  pending: tuple[int, Any] | None = None   # epoch and evaluation that is under way

  def save() -> None: checkpoints.save(done, {"epoch": done / per_epoch, "evaluated": evaluated, "window": window, "skipped": skipped})

  def finish_pending(wait: bool = True) -> bool:
    """Finish an evaluation that is under way, if it is ready or `wait` is set; True ends the run."""
    nonlocal evaluated, pending
    if pending is None or not (wait or pending[1].ready()): return False
    (epoch, evaluation), pending = pending, None
    progress.close()
    ends = evaluation.finish()
    evaluated = epoch
    return ends

  def between_steps() -> bool:
    asked = signals.stop is not None or signals.save
    ends = finish_pending(wait=asked)
    if ends or asked or (pending is None and checkpoints.due(done)): save()
    signals.save = False
    signals.raise_if_stopped()
    return ends

  def finish_epoch(epoch: int) -> bool:
    nonlocal evaluated, pending
    if finish_pending():
      save()
      return True
    try: ends = after_epoch(epoch, done)
    except Stopped:
      save()
      raise
    if hasattr(ends, "ready"): ends, pending = False, (epoch, ends)
    else: evaluated = epoch
    if ends is not None: save()
    return bool(ends)

  if done and done % per_epoch == 0 and evaluated < done // per_epoch and finish_epoch(done // per_epoch): return done
  for epoch in range(done // per_epoch, epochs):
    batches, at = loader.epoch(epoch, start=done % per_epoch), done % per_epoch
    batch, tensors, failure = _load(batches, to_device)
    while batch is not None:
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
          reason = explain(*used)
          raise UserError(f"{skipped} steps in a row were not finite; the last, {done}, had {_not_finite(scalars)}{reason and ': '}{reason} "
                          f"(pictures: {names}); lower --lr, lengthen --warmup or set --clip-norm, and resume from the last checkpoint")
      window.append(scalars)
      if since is None: since, timed = time.monotonic(), 0   # the first step compiles: not counted as speed
      else: timed += 1
      progress.update(done, scalars["loss"], GlobalCounters.mem_used)
      if len(window) == log_every or (batch is None and failure is None):
        means = {f"train/{name}": _mean([s[name] for s in window if name in s]) for name in dict.fromkeys(k for s in window for k in s)}
        if "train/skipped" in means: means["train/skipped"] = sum(s.get("skipped", 0) for s in window)
        if timed: means["train/images_per_s"] = timed * loader.batch_size / (time.monotonic() - since)
        tracker.log(means | {"train/memory": GlobalCounters.mem_used}, done, done / per_epoch)
        since, timed = time.monotonic(), 0
        window.clear()
      if between_steps(): return done
    progress.close()
    if failure is not None:   # the weights are whole, whatever became of the data
      finish_pending()
      if done: save()
      raise failure
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
