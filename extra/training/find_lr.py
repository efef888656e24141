"""The learning-rate range test (Smith 2015, "Cyclical Learning Rates", section 3.3): train for some steps while the rate grows exponentially, watch
where the loss falls and where it diverges, and suggest a rate."""
import itertools, json, logging, math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import GlobalCounters, Tensor
from tinydet.errors import UserError
from tinydet.training import optim
from tinydet.weights.checkpoint import whole_file
from tinydet.training.loop import memory_error_explained
from tinydet.reporting.tracking import Progress, new_folder

LOW, HIGH = 1e-6, 10.0
DIVERGED = 4.0   # times the lowest loss, smoothed, where that is above the first too


def find_lr(folder: Path, steps: int, optimizer: optim.Optimizer, step: Callable, loader: Any, to_device: Callable[[Any], tuple[Tensor, ...]],
            config: dict[str, Any]) -> dict[str, Any]:
  """Sweep the rate of `optimizer` from 1e-6 to 10 over `steps` updates with the batches of `loader`, and print what `suggest` makes of it; ends early
  where the loss diverges.

  `step` is that of `loop.make_step`, not called before, and `to_device` as for `loop.train`. find_lr.json, with what `suggest` returns, the rates,
  losses and `config` (JSON values), and find_lr.png go to a new folder, `folder` with "-find-lr" after its name. The weights are spoilt afterwards.
  UserError where no update is finite."""
  optimizer.rate = optim.exponential(LOW, HIGH, steps)
  rates, losses, pending, spent = [], [], [], 0
  progress = Progress(steps, loader.batch_size)
  for batch in _batches(loader):
    with memory_error_explained(loader.batch_size): scalars = step(*to_device(batch))()
    pending.append(scalars["loss"])
    if "lr" not in scalars: continue   # with --accumulate, an update has the loss of several steps
    loss, spent, pending = float(np.mean(pending)), spent + 1, []
    if not math.isfinite(loss): break
    if not scalars["skipped"]:   # one whose gradient is not finite: the loss scale of half precision adapts
      rates.append(scalars["lr"])
      losses.append(loss)
      progress.update(len(rates), loss, GlobalCounters.mem_used)
      if diverged(losses): break
    if len(rates) == steps or spent == 2 * steps: break
  progress.close()
  if not rates: raise UserError("--find-lr: no update was finite, at the lowest rate either; look at the data and --dtype")
  result = suggest(rates, losses)
  found = {"what": "learning-rate range test: losses while the rate grew; the weights were not kept", "steps": steps, **result, "rates": rates,
           "losses": losses, "config": config}
  out = new_folder(folder.with_name(f"{folder.name}-find-lr"))
  with whole_file(out/"find_lr.json") as f: f.write((json.dumps(found, allow_nan=False, indent=1) + "\n").encode())
  drawn = plot(out/"find_lr.png", rates, losses, result)
  if result["suggestion"] is None: print(f"no suggestion: {result['reason']}")
  else: print(f"loss falls most steeply at {result['steepest']:.2g}, is lowest at {result['lowest']:.2g}, and rises beyond {result['end']:.2g}: use "
              f"--lr {result['suggestion']:g}" + (f" ({result['reason']})" if result["reason"] else ""))
  print(f"sweep: {out / 'find_lr.json'}" + (f"   plot: {out / 'find_lr.png'}" if drawn else "   (a plot needs matplotlib: pip install matplotlib)"))
  return found


def smooth(losses: list[float]) -> np.ndarray:
  """losses [N] averaged with a Gaussian window, f64 [N]. Centred, so that it does not shift the curve towards higher rates as a running mean does."""
  losses, i = np.asarray(losses, np.float64), np.arange(len(losses))
  weights = np.exp(-0.5 * ((i[:, None] - i) / max(0.5, 0.025 * len(losses))) ** 2)
  return weights @ losses / weights.sum(1)


def diverged(losses: list[float]) -> bool:
  """Whether losses [N], the last one the newest, have risen far above their minimum and above where they began."""
  smoothed = smooth(losses)
  return bool(smoothed[-1] > DIVERGED * smoothed.min() and smoothed[-1] > smoothed[0] and losses[-1] > losses[0])


def suggest(rates: list[float], losses: list[float]) -> dict[str, Any]:
  """What a sweep tells: {"suggestion", "steepest", "lowest", "end", "reason", "smoothed"}, of ascending rates [N] and losses [N].

  The suggestion, to two digits, is a tenth of "end", the highest rate at which the smoothed loss keeps three quarters of its whole fall; beyond it
  learning breaks down. With noise this moves less than the two rules in common use, the rate of the steepest fall and a tenth of the rate of the
  lowest loss: both depend on where a flat stretch dips by chance. "steepest" and "lowest" are those rates. The suggestion is None, and "reason" says
  why, where the loss does not fall by more than its noise; "reason" also tells of a sweep that ended before the loss rose."""
  start = float(np.median(losses[:max(2, len(losses) // 5)]))
  smoothed = smooth(np.minimum(losses, DIVERGED * start))   # or the last, huge losses would reach far back
  at = int(smoothed.argmin())
  # the deviation of normal noise, from neighbours' differences: the median leaves out those of the divergence
  fall, noise = start - float(smoothed[at]), 1.05 * float(np.median(np.abs(np.diff(losses)))) if len(losses) > 1 else 0.0
  result = {"suggestion": None, "steepest": None, "lowest": float(rates[at]), "end": None, "reason": "", "smoothed": smoothed.tolist()}
  if len(rates) < 3 or fall <= max(1.5 * noise, 0.02 * abs(start)):
    return result | {"reason": "the loss does not fall by more than its noise; sweep with more steps, or a larger --bs"}
  begin = int(np.flatnonzero(smoothed[:at] >= start - 0.1 * fall).max(initial=0))   # before that, noise is steeper
  steepest = begin + int(np.gradient(smoothed, np.log(rates))[begin:at + 1].argmin())
  end = int(np.flatnonzero(smoothed <= smoothed[at] + 0.25 * fall).max())
  if end == len(rates) - 1: result["reason"] = "the sweep ended before the loss rose, so a higher rate may do"
  return result | {"suggestion": float(f"{rates[end] / 10:.1e}"), "steepest": float(rates[steepest]), "end": float(rates[end])}


def plot(path: Path, rates: list[float], losses: list[float], result: dict[str, Any]) -> bool:
  """Draw a sweep to a PNG; False where matplotlib is missing."""
  logging.getLogger("matplotlib").setLevel(logging.ERROR)   # it would announce that it looks for fonts
  try: from matplotlib.figure import Figure
  except ImportError: return False
  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  axes.plot(rates, losses, color="#1f6fb4", linewidth=0.8, alpha=0.4, label="loss")
  axes.plot(rates, result["smoothed"], color="#1f6fb4", linewidth=1.8, label="smoothed")
  for key, color, style in (("steepest", "#5b6470", ":"), ("lowest", "#5b6470", "--"), ("end", "#010101", "-."), ("suggestion", "#c4501b", "-")):
    if result[key] is not None: axes.axvline(result[key], color=color, linestyle=style, linewidth=1.2, label=f"{key} {result[key]:.2g}")
  low, high = min(losses), max(result["smoothed"][0], float(np.median(losses)))
  axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(low - 0.1 * (high - low), high + 0.5 * (high - low)) if high > low else None)
  axes.legend(frameon=False)
  with whole_file(path) as f: figure.savefig(f, format="png", dpi=110)
  return True


def _batches(loader: Any) -> Iterator[Any]:
  """Batches without end, epoch after epoch."""
  for epoch in itertools.count(): yield from loader.epoch(epoch)
