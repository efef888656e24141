"""How a trainer's settings become canvases and transforms, for every way that a family fits pictures."""
import numpy as np, pytest
from tinydet.datasets.fit import Fit
from tinydet.datasets.shapes import Shapes
from tinydet.errors import UserError
from tinydet.runtime.mpi import ALONE
from tinydet.training.detection import DetectionConfig
from tinydet.training.loaders import make_loaders, scaled

FITS = {"stretch": Fit((64, 96)), "letterbox": Fit((96, 64), letterbox=True, fill=(114,) * 3, centred=True), "shorter": Fit((64, 64), 96)}
CHANGES = {"none": {}, "place": {"mosaic": 0.5, "mosaic_nine": 0.5, "mixup": 0.3, "rotate": 10.0, "shear": 3.0, "perspective": 0.1},
           "ssd": {"expand": 0.5, "iou_crop": 0.8}, "patches": {"paste": 1.0, "cutout": 0.5, "grey": 0.5, "hsv": True},
           "jitter": {"scale_jitter": True, "cutout": 0.5}}


def loaders(fit, **options):
  data = Shapes("train", 1, size=64, count=16)
  return make_loaders(DetectionConfig(bs=4, workers=options.pop("workers", 0), **options), fit, data, data, ALONE)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_every_change_comes_to_a_canvas(fit, changes, scale):
  train, val = loaders(FITS[fit], multi_scale=scale, **CHANGES[changes])
  canvases = set(train.buckets.canvases)
  assert len(canvases) == (1 if not scale else len({scaled(FITS[fit], f).canvas() for f in (0.5, 0.75, 1, 1.25, 1.5)}))
  batches = [batch for epoch in range(2) for batch in train.epoch(epoch)]
  assert len(batches) == 2 * len(train) == 8
  for batch in batches:
    height, width = batch.images.shape[1:3]
    assert (height, width) in canvases and height % 32 == width % 32 == 0
    (top, left), (h, w) = batch.origins.T, batch.sizes.T
    edges = np.stack([left, top, left + w, top + h], 1)[:, None]
    real = (batch.labels >= 0)[..., None]
    assert (np.where(real, batch.boxes - edges, 0)[..., :2] >= -1e-3).all() and (np.where(real, batch.boxes - edges, 0)[..., 2:] <= 1e-3).all()
  if scale: assert batches[0].images.shape[1:3] == max(canvases) and len({b.images.shape for b in batches}) > 1
  assert {b.images.shape[1:3] for b in val.epoch(0)} == {FITS[fit].canvas()} or fit == "shorter"


def test_a_batch_has_its_size_whatever_the_workers_and_where_an_epoch_begins():
  options = {"multi_scale": 0.5, "mosaic": 1.0, "balance": 0.9}
  alone, _ = loaders(FITS["stretch"], **options)
  many, _ = loaders(FITS["stretch"], workers=2, **options)
  first = [b for epoch in (0, 1) for b in alone.epoch(epoch)]
  second = [b for epoch in (0, 1) for b in many.epoch(epoch)]
  many.close()
  for a, b in zip(first, second, strict=True):
    for field in vars(a): np.testing.assert_array_equal(getattr(a, field), getattr(b, field), field)
  for a, b in zip(first[6:], alone.epoch(1, start=2), strict=True): np.testing.assert_array_equal(a.images, b.images)


def test_learning_by_heart_changes_nothing_and_two_zooms_are_refused():
  everything = {k: v for name in CHANGES if name != "jitter" for k, v in CHANGES[name].items()}
  train, val = loaders(FITS["letterbox"], overfit=True, multi_scale=0.5, balance=0.5, **everything)
  plain = {b.image_ids[i]: b.images[i] for b in val.epoch(0) for i in range(4)}
  for batch in train.epoch(1):
    for i in range(4): np.testing.assert_array_equal(batch.images[i], plain[batch.image_ids[i]])
  with pytest.raises(UserError, match="--scale-jitter"): loaders(FITS["stretch"], scale_jitter=True, rotate=3.0)


def test_sizes_keep_their_proportion():
  fit = scaled(Fit((800, 800), 1333), 0.75)
  assert fit.size == (608, 608) and fit.max_size == 992
  assert scaled(Fit((320, 192)), 1.25).size == (384, 256) and scaled(Fit((32, 32)), 0.25).size == (32, 32)
