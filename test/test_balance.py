"""Rare classes oftener: LVIS' factors by hand, epochs of one length, and what workers and resuming make of them."""
import numpy as np, pytest
from tinydet.datasets.balance import draw, repeat_factors
from tinydet.datasets.buckets import Buckets
from tinydet.datasets.loader import Loader
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import pad_to


class Data:
  """100 pictures, four of which show class 2, whose pixels are noise of their draw's own."""
  name, max_boxes, class_names, sizes = "data", 2, ["common", "rare"], np.array([(8, 8)] * 100)
  def __len__(self): return 100
  def image_name(self, i): return f"picture {i}"
  def __getitem__(self, i): return Sample(np.full((8, 8, 3), i, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int32), i, (8, 8), (8, 8))

  def ground_truth(self):
    rows = [(i, 1) for i in range(90)] * 2 + [(i, 2) for i in range(4)] + [(50, 2, 1)]   # the last is a crowd
    return {"images": [{"id": i} for i in range(100)],
            "annotations": [{"image_id": r[0], "category_id": r[1], "iscrowd": int(len(r) > 2)} for r in rows]}


def noisy(sample, rng): return Sample(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8), sample.boxes, sample.labels, sample.image_id, (8, 8), (8, 8))


def test_factors_are_those_of_the_paper():
  factors = repeat_factors(Data(), 0.16)
  np.testing.assert_allclose(factors, [2.0] * 4 + [1.0] * 96)
  np.testing.assert_allclose(repeat_factors(Data(), 1.0), [5.0] * 4 + [(1 / 0.9) ** 0.5] * 86 + [1.0] * 10)


@pytest.mark.parametrize("count", [7, 100])
def test_an_epoch_is_of_one_length_and_in_proportion(count):
  factors = np.random.default_rng(0).uniform(1, 6, count)
  groups, seen, epochs = np.arange(count) % 3, np.zeros(count), 200
  sizes = set()
  for epoch in range(epochs):
    drawn = draw(factors, groups, np.random.default_rng((1, epoch)))
    assert len(drawn) == count and len(set(drawn.tolist())) == count
    counts = np.bincount(drawn % count, minlength=count)
    for i in range(count): assert sorted(drawn[drawn % count == i] // count) == list(range(counts[i]))   # copy 0, 1, 2 ...
    sizes.add(tuple(np.bincount(groups[drawn % count], minlength=3)))
    for g in range(3):   # of a group, each as often as its share says, rounded down or up
      members = groups == g
      share = factors[members] / factors[members].sum() * counts[members].sum()
      assert (counts[members] >= np.floor(share - 1e-9)).all() and (counts[members] <= np.ceil(share + 1e-9)).all()
    seen += counts
  assert len(sizes) == 1
  for g in range(3):
    members = groups == g
    share = factors[members] / factors[members].sum() * seen[members].sum() / epochs
    deviation = np.sqrt(share % 1 * (1 - share % 1) / epochs)   # of the mean of a whole number and a chance of one more
    assert (np.abs(seen[members] / epochs - share) <= 4 * deviation + 1e-9).all()


def test_copies_are_drawn_apart_and_epochs_begin_anywhere():
  data, factors = Data(), repeat_factors(Data(), 1.0)
  options = {"seed": 2, "shuffle": True, "drop_last": True, "factors": factors}
  loader = Loader(data, 10, noisy, **options)
  batches = list(loader.epoch(3))
  ids = np.concatenate([b.image_ids for b in batches])
  assert len(batches) == len(loader) == 10 and (ids < 4).sum() >= 12
  images = [image.tobytes() for b in batches for image in b.images]
  assert len(set(images)) == len(images)   # the copies of one picture are other draws
  for a, b in zip(batches[4:], loader.epoch(3, start=4), strict=True): np.testing.assert_array_equal(a.images, b.images)
  assert loader.names(3, 0) == [f"picture {i}" for i in ids[:10]]
  buckets = Buckets(((8, 8), (8, 16)), np.arange(100) % 2, 0.0, 0.0)
  counts = [[b.images.shape[2] for b in Loader(data, 10, noisy, buckets=buckets, **options).epoch(e)] for e in (0, 1)]
  assert counts[0].count(8) == counts[1].count(8) and len(counts[0]) == len(counts[1])


def test_workers_change_nothing():
  factors = repeat_factors(Data(), 1.0)
  class_batches = []
  for workers in (0, 2):
    loader = Loader(Data(), 10, pad_to(8, 8), seed=2, shuffle=True, drop_last=True, factors=factors, workers=workers)
    class_batches.append([b.image_ids.tolist() for b in loader.epoch(1)])
    loader.close()
  assert class_batches[0] == class_batches[1]
