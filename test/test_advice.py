"""What a report advises, on made-up runs of each kind and on those that call for nothing."""
import numpy as np, pytest
from tinydet.reporting.advice import advise
from tinydet.scoring.analysis import SIDES, missed_by_size

EPOCHS = np.arange(1, 21.0)
STEPS = np.arange(0.25, 20.1, 0.25)
FALLING = 3 * 0.9 ** STEPS + 0.2
SATURATED = 0.5 * (1 - 0.5 ** EPOCHS)


def said(scores, losses=(STEPS, FALLING), sizes=None, side=None): return [line.partition(":")[0] for line in advise(scores, losses, sizes, side)]


def test_a_score_that_still_rises_wants_epochs():
  assert said((EPOCHS, 0.02 * EPOCHS)) == ["More epochs"]
  assert said((EPOCHS, SATURATED)) == []
  noise = np.random.default_rng(0).uniform(-0.004, 0.004, 20)
  assert said((EPOCHS, SATURATED + noise)) == []                     # the best is the last by chance or not
  assert said((EPOCHS, np.where(EPOCHS == 20, 0.504, SATURATED))) == []
  assert said((EPOCHS[:3], 0.1 * EPOCHS[:3])) == [] and said(([], [])) == []   # too few evaluations
  assert said((EPOCHS * 5, 0.02 * EPOCHS), (STEPS * 5, FALLING)) == ["More epochs"]   # evaluated every fifth epoch


@pytest.mark.parametrize(("drop", "losses", "wanted"), [
  (0.006, FALLING, True), (0.0005, FALLING, False), (0.006, np.full(80, 0.5), False), (0.006, FALLING[::-1], False)])
def test_a_score_that_falls_while_the_loss_does_wants_pictures(drop, losses, wanted):
  scores = np.where(EPOCHS < 8, 0.05 * EPOCHS, 0.4 - drop * (EPOCHS - 8))
  assert said((EPOCHS, scores), (STEPS, losses)) == ["More pictures, or stronger augmentation (--mosaic, --zoom, --hsv)"] * wanted
  assert said((EPOCHS, scores), ([], [])) == []


def sizes(objects, missed):
  """Of two kinds: a fiftieth, and a fifth of the picture's side."""
  found = {"sides": list(SIDES), "objects": [0] * (len(SIDES) - 1), "missed": [0] * (len(SIDES) - 1)}
  for share, count, lost in zip((1 / 50, 1 / 5), objects, missed):
    at = int(np.searchsorted(SIDES, share)) - 1
    found["objects"][at], found["missed"][at] = count, lost
  return found


@pytest.mark.parametrize(("objects", "missed", "side", "wanted"), [
  ((100, 100), (60, 10), 320, True), ((100, 100), (60, 10), 2000, False), ((100, 100), (60, 50), 320, False), ((100, 1000), (60, 10), 320, False),
  ((4, 10), (3, 0), 320, False), ((100, 100), (60, 10), None, False), ((100, 0), (60, 0), 320, True), ((0, 100), (0, 90), 320, False)])
def test_small_objects_that_are_missed_want_larger_pictures(objects, missed, side, wanted):
  assert said((EPOCHS, SATURATED), sizes=sizes(objects, missed), side=side) == ["Larger pictures (--size)"] * wanted


def test_missed_objects_are_counted_by_their_share_of_the_picture():
  truth = {"images": [{"id": 1, "width": 200, "height": 50}, {"id": 2}],
           "annotations": [{"image_id": 1, "category_id": 5, "bbox": [0, 0, 30, 30]}, {"image_id": 1, "category_id": 5, "bbox": [100, 0, 30, 30]},
                           {"image_id": 1, "category_id": 5, "bbox": [50, 0, 2, 2]},
                           {"image_id": 1, "category_id": 5, "bbox": [0, 0, 9, 9], "iscrowd": 1},
                           {"image_id": 2, "category_id": 5, "bbox": [0, 0, 9, 9]}]}
  found = {1: (np.array([[0, 0, 30, 29], [100, 0, 30, 30.0]]), np.array([0.9, 0.2]), np.array([5, 5]))}
  counted = missed_by_size(truth, [5], found)
  assert {i: pair for i, pair in enumerate(zip(counted["objects"], counted["missed"])) if pair != (0, 0)} == {
    int(np.searchsorted(SIDES, 0.02)) - 1: (1, 1), int(np.searchsorted(SIDES, 0.3)) - 1: (2, 1)}
