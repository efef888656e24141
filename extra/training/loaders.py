"""The loaders of a detector's trainer, and how `DetectionConfig` changes training pictures on their way."""
from dataclasses import replace
from typing import Any
import numpy as np
from tinydet.datasets.augment import Strength, boxes_at_most, grey, hsv, place
from tinydet.datasets.balance import repeat_factors
from tinydet.datasets.buckets import MULTIPLE, Buckets, Scales, one_bucket
from tinydet.datasets.fit import Fit
from tinydet.datasets.loader import Loader
from tinydet.datasets.patches import PASTED, cutout, expand, iou_crop, paste
from tinydet.datasets.transforms import Transform, compose, horizontal_flip, photometric_jitter, scale_jitter
from tinydet.errors import UserError
from tinydet.runtime.mpi import Ranks

MOST_BOXES = 200   # of a picture made of several, unless one has more by itself
SIZES = 5          # that --multi-scale chooses from: each is a graph to compile


def make_loaders(config: Any, fit: Fit, train_set: Any, val_set: Any, ranks: Ranks) -> tuple[Loader, Loader]:
  """Loaders of batches for this rank: training pictures augmented and in a random order, validation pictures as they are. UserError for settings that
  do not go together."""
  share = {"workers": config.workers, "shard": (ranks.rank, ranks.size)}
  val_loader = Loader(val_set, config.bs, fit.resize(), buckets=fit.buckets(val_set.sizes, config.buckets, config.bs), **share)
  strength = strength_of(config)
  if strength != Strength() and config.scale_jitter:
    raise UserError("--scale-jitter: does what --zoom does; leave it out with --mosaic, --mixup, --zoom, --shift, --rotate, --shear, --perspective")
  pasted = PASTED if config.paste and not config.overfit else 0
  length = boxes_at_most(train_set, strength.most_pictures, MOST_BOXES) + pasted if strength != Strength() or pasted else None
  transform = compose(*augmentation(config, fit))
  factors = repeat_factors(train_set, config.balance) if config.balance and not config.overfit else None
  train_loader = Loader(train_set, config.bs, transform, seed=config.seed, shuffle=True, drop_last=True, reduced=True, max_boxes=length,
                        buckets=canvases(config, fit, train_set, strength), factors=factors, **share)
  return train_loader, val_loader


def strength_of(config: Any) -> Strength:
  """What `place` is to do; nothing at all where the training pictures are to be learnt by heart."""
  if config.overfit: return Strength()
  return Strength(config.zoom, config.shift, config.rotate, config.shear, config.perspective, config.mosaic, config.mosaic_nine, config.mixup)


def augmentation(config: Any, fit: Fit) -> list[Transform]:
  """From a picture of the data set to one that `fit` can pad to its canvas, if it is not on it already."""
  if config.overfit: return [fit.resize()]
  last_epoch, strength = max(0, config.epochs - config.close_mosaic), strength_of(config)
  first = [expand(config.expand, fit.fill)] * (config.expand > 0) + [iou_crop(config.iou_crop)] * (config.iou_crop > 0)
  pasted = [paste(config.paste, last_epoch=last_epoch)] * (config.paste > 0)
  colours = [photometric_jitter()] * config.photometric + [hsv()] * config.hsv + [grey(config.grey)] * (config.grey > 0)
  last = [horizontal_flip(config.flip)] * (config.flip > 0) + [cutout(config.cutout)] * (config.cutout > 0)
  if strength != Strength():
    return [*first, place(*fit.canvas(), fit.fill, strength, most=MOST_BOXES, last_epoch=last_epoch), *pasted, *colours, *last]
  if config.scale_jitter: return [*first, *pasted, *colours, *last[:config.flip > 0], scale_jitter(0.5, 2.0, *fit.canvas(), fit.fill),
                                  *last[config.flip > 0:]]
  return [*first, fit.resize(), *pasted, *colours, *last]


def canvases(config: Any, fit: Fit, train_set: Any, strength: Strength) -> Buckets | Scales:
  """The canvases of training batches: by the pictures' shapes, or one, where pictures lose theirs, or with --multi-scale some sizes of it."""
  if config.multi_scale and not config.overfit:
    fits = [scaled(fit, factor) for factor in np.linspace(1 - config.multi_scale, 1 + config.multi_scale, SIZES)]
    return Scales({one.canvas(): compose(*augmentation(config, one), one.pad(one.canvas())) for one in fits})
  changed = strength != Strength() or config.scale_jitter or config.iou_crop or config.expand
  if changed and not config.overfit: return one_bucket(len(train_set), fit.canvas(), fit.pad(fit.canvas()))
  return fit.buckets(train_set.sizes, config.buckets, config.bs)


def scaled(fit: Fit, factor: float) -> Fit:
  """`fit` at `factor` times its size, in multiples of 32."""
  def rounded(side: int) -> int: return max(MULTIPLE, round(side * factor / MULTIPLE) * MULTIPLE)
  return replace(fit, size=tuple(map(rounded, fit.size)), max_size=rounded(fit.max_size) if fit.max_size else 0)
