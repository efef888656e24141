"""What would have made a run better: more epochs, more pictures or larger ones, from its curves and from the sizes of what it misses."""
from collections.abc import Mapping, Sequence
from typing import Any
import numpy as np

LAST = 0.25          # of a run: its end, in which a score that still rises calls for more epochs
RISES = 0.03         # of the score by then, and POINTS at least, is a rise
FALLS = 0.05         # of the best score, and POINTS at least, is a fall
POINTS = 0.005       # of mAP: less is chance
LEARNS = 0.1         # of the training loss: what it falls by while the score falls, where pictures are learnt by heart
SMALL = 24           # pixels of the network's input: objects with less are hard to see for every detector
MISSES, TIMES = 0.1, 2.0   # share of all objects missed, and how much oftener small ones are, before pictures are too small
FEWEST = 4           # evaluations, and missed objects, that say anything


def advise(scores: tuple[Sequence[float], Sequence[float]], losses: tuple[Sequence[float], Sequence[float]], sizes: Mapping[str, Any] | None,
           side: float | None) -> list[str]:
  """Lines for the user, none where nothing stands out.

  Args: `scores` and `losses`, both (epochs, values), the one of the evaluations, the other of training; `sizes` as `analysis.missed_by_size` gives
  it, and `side`, the root of the area of the network's input in pixels, or None."""
  curve, loss = ([np.asarray(values, np.float64) for values in series] for series in (scores, losses))
  return [line for line in (_longer(*curve), _more(*curve, *loss), _larger(sizes, side)) if line]


def _longer(epochs: np.ndarray, values: np.ndarray) -> str:
  """Whether the best score is that of the end, and well above the best of before."""
  if len(values) < FEWEST: return ""
  before = values[epochs <= (1 - LAST) * epochs[-1]]
  if not len(before) or values.argmax() < len(before): return ""
  rise = float(values.max() - before.max())
  if rise < max(POINTS, RISES * values.max()): return ""
  return f"More epochs: the score still rose by {rise:.3f} in the last quarter of the run."


def _more(epochs: np.ndarray, values: np.ndarray, loss_epochs: np.ndarray, losses: np.ndarray) -> str:
  """Whether the score fell while the training loss went on falling."""
  if len(values) < FEWEST or not len(losses): return ""
  best = int(values.argmax())
  fall = float(values[best] - np.median(values[-3:]))
  span = (epochs[-1] - epochs[best]) / 2
  if span <= 0 or fall < max(POINTS, FALLS * values[best]): return ""
  then, late = losses[np.abs(loss_epochs - epochs[best]) <= span / 2], losses[loss_epochs > epochs[-1] - span / 2]
  if not len(then) or not len(late) or late.mean() > (1 - LEARNS) * then.mean(): return ""
  return (f"More pictures, or stronger augmentation (--mosaic, --zoom, --hsv): after epoch {epochs[best]:g} the score fell by {fall:.3f} while the "
          f"training loss went from {then.mean():.3g} to {late.mean():.3g}, so the training pictures were learnt by heart.")


def _larger(sizes: Mapping[str, Any] | None, side: float | None) -> str:
  """Whether it is the small objects that are missed."""
  if not sizes or not side: return ""
  small = np.array(sizes["sides"][1:]) * side <= SMALL
  objects, missed = np.array(sizes["objects"]), np.array(sizes["missed"])
  if missed[small].sum() < FEWEST or missed.sum() < MISSES * objects.sum(): return ""
  here, others = missed[small].sum() / objects[small].sum(), missed[~small].sum() / max(1, objects[~small].sum())
  if here < TIMES * others or missed[small].sum() < missed.sum() / 2: return ""
  return (f"Larger pictures (--size): of the objects smaller than {SMALL} pixels there, {here:.0%} are missed, of the others {others:.0%}; or "
          "--tile, where pictures are large.")
