"""The loop that every trainer here runs. A task brings its losses; this brings the gradient, the update, the log and the clock."""
import itertools, math, time
from typing import Any
from collections.abc import Callable
import numpy as np
from tinygrad import Context, GlobalCounters, Tensor, TinyJit
from extra.errors import UserError
from extra.training.optim import Optimizer
from extra.training.tracking import Progress, Tracker


def jit(function: Callable) -> TinyJit:
  """A `TinyJit` that captures at its first call rather than its second, so the graph is scheduled once. All its inputs and state must be realised."""
  jitted = TinyJit(function)
  jitted.cnt = 1
  return jitted


def make_step(losses: Callable[..., dict[str, Tensor]], optimizer: Optimizer, buffers: list[Tensor], accumulate: int = 1) -> Callable:
  """A training step as captured graphs. `step(*tensors)` starts it and returns `read() -> {name: float}`, which waits for it: the losses, and `lr`
  and `gradient_norm` where the weights were updated.

  Args: `losses(*tensors)` returns scalars by name, "loss" being the one to descend; `buffers` are tensors that it assigns (running statistics).
  With `accumulate` > 1 a step adds its gradient to a sum, and every `accumulate`-th step updates the weights with their mean."""
  params, names = list(optimizer.params.values()), {}
  sums = [p.zeros_like().contiguous() for p in params] if accumulate > 1 else []
  Tensor.realize(*params, *buffers, *optimizer.state().values(), *sums)

  def finish(graph: str, scalars: dict[str, Tensor], changed: list[Tensor]) -> Tensor:
    names[graph] = list(scalars)
    values = Tensor.stack(*(scalar.reshape(()).float() for scalar in scalars.values()))
    Tensor.realize(values, *changed, *buffers)
    return values

  @jit
  def update(*tensors: Tensor) -> Tensor:
    with Context(TRAINING=1):
      scalars = losses(*tensors)
      gradients = [g.contiguous() for g in scalars["loss"].gradient(*params)]
      # In two parts, as the time tinygrad takes to schedule a graph grows faster than its number of assignments.
      Tensor.realize(*scalars.values(), *gradients, *buffers)
      changed, logs = optimizer.update(gradients)
      return finish("update", scalars | logs, changed)

  @jit
  def add(*tensors: Tensor) -> Tensor:
    with Context(TRAINING=1):
      scalars = losses(*tensors)
      return finish("add", scalars, [total.assign(total + g / accumulate) for total, g in zip(sums, scalars["loss"].gradient(*params))])

  @jit
  def apply() -> Tensor:
    changed, logs = optimizer.update(sums)
    Tensor.realize(values := Tensor.stack(*(log.reshape(()) for log in logs.values())), *changed)
    Tensor.realize(*(total.assign(total.zeros_like()) for total in sums))
    names["apply"] = list(logs)
    return values

  calls = itertools.count(1)
  def step(*tensors: Tensor) -> Callable[[], dict[str, float]]:
    if accumulate == 1: results = [("update", update(*tensors))]
    else: results = [("add", add(*tensors))] + ([("apply", apply())] if next(calls) % accumulate == 0 else [])
    return lambda: {name: value for graph, values in results for name, value in zip(names[graph], values.tolist())}
  return step


def train(step: Callable, loader: Any, to_device: Callable[[Any], tuple[Tensor, ...]], tracker: Tracker, *, epochs: int, start: int = 0,
          log_every: int = 10, after_epoch: Callable[[int, int], bool] = lambda epoch, steps: False) -> int:
  """Run `step` over the batches of `epochs` epochs, from step `start` on, and return the number of steps done.

  `to_device(batch)` gives the tensors of a step. The mean of each scalar over `log_every` steps goes to `tracker` as `train/<name>`, with the speed.
  After each epoch comes `after_epoch(epochs done, steps done)`, which ends the run by returning True.
  Raises UserError where the loss is no longer a finite number."""
  per_epoch, done, window, since = len(loader), start, [], None
  progress = Progress(per_epoch * epochs, loader.batch_size)
  for epoch in range(start // per_epoch, epochs):
    batches = loader.epoch(epoch, start=done % per_epoch)
    batch = next(batches, None)
    tensors = to_device(batch) if batch is not None else ()
    while batch is not None:
      read, ids = step(*tensors), batch.image_ids
      # The next batch moves to the device while this one computes: only then wait for the numbers.
      if (batch := next(batches, None)) is not None: tensors = to_device(batch)
      scalars = read()
      done += 1
      if not math.isfinite(scalars["loss"]):
        raise UserError(f"the loss is {scalars['loss']} at step {done} (image ids {ids.tolist()}): lower --lr, lengthen --warmup or set --clip-norm")
      window.append(scalars)
      if since is None: since, timed = time.monotonic(), 0   # the first step compiles: not counted as speed
      else: timed += 1
      progress.update(done, scalars["loss"], GlobalCounters.mem_used)
      if len(window) == log_every or batch is None:
        means = {f"train/{name}": float(np.mean([s[name] for s in window if name in s])) for name in dict.fromkeys(k for s in window for k in s)}
        if timed: means["train/images_per_s"] = timed * loader.batch_size / (time.monotonic() - since)
        tracker.log(means | {"train/memory": GlobalCounters.mem_used}, done, done / per_epoch)
        since, timed = time.monotonic(), 0
        window.clear()
    progress.close()
    if after_epoch(epoch + 1, done): break
    since = since and time.monotonic()
  return done
