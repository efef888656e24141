"""Pictures of rare classes more often: repeat-factor sampling (Gupta et al. 2019, "LVIS", section B.2), in epochs that are all of one length."""
from collections.abc import Sequence
from typing import Any
import numpy as np


def repeat_factors(dataset: Any, share: float) -> np.ndarray:
  """f64 [N]: how often each picture of `dataset` should come, 1 or more. A class that a share f of the pictures shows is worth
  max(1, sqrt(share / f)); a picture has the factor of its rarest class. Pictures count, not boxes, as a box brings its whole picture along; crowds do
  not."""
  truth = dataset.ground_truth()
  place = {image["id"]: i for i, image in enumerate(truth["images"])}
  shown: dict[int, set[int]] = {}
  for a in truth["annotations"]:
    if not (a.get("iscrowd") or a.get("difficult")): shown.setdefault(a["category_id"], set()).add(place[a["image_id"]])
  factors = np.ones(len(dataset))
  for pictures in shown.values():
    members = np.array(sorted(pictures))
    factors[members] = np.maximum(factors[members], np.sqrt(share * len(dataset) / len(members)))
  return factors


def draw(factors: np.ndarray, groups: Sequence[int] | np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """i64 [N]: the pictures of one epoch in random order, number `i + copy * N` for each copy of picture i.

  There are N in all, picture i coming as often as its share of all `factors` says, rounded down or up. `groups` [N] are numbers of canvases: each
  gets the same number of pictures in every epoch, so that all epochs have the same batches."""
  total, groups, chosen = len(factors), np.asarray(groups), []
  shares = np.array([factors[groups == g].sum() for g in range(groups.max() + 1)]) * total / factors.sum()
  sizes = np.diff(np.floor(np.cumsum(shares) + 0.5).astype(int), prepend=0)
  sizes[-1] += total - sizes.sum()
  for group, size in enumerate(sizes):
    members = rng.permutation(np.flatnonzero(groups == group))
    if not len(members): continue
    edges = np.cumsum(factors[members])
    marks = (np.arange(size) + rng.random()) * edges[-1] / size if size else np.zeros(0)   # evenly spaced: nobody comes far more often than meant
    counts = np.bincount(np.minimum(np.searchsorted(edges, marks, side="right"), len(members) - 1), minlength=len(members))
    chosen += [member + copy * total for member, count in zip(members.tolist(), counts.tolist()) for copy in range(count)]
  return rng.permutation(np.array(chosen, np.int64))
