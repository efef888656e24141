"""Anchors fitted to boxes: k-means against a plain one in float64, what the network then has, and that weights say so."""
import json
from itertools import pairwise
from types import SimpleNamespace
import numpy as np, pytest
from tinygrad.nn.state import get_state_dict
from tinydet import detectors
from tinydet.datasets.fit import Fit, seen_shapes
from tinydet.detection.anchor_fit import MISSED, SCALES, anchor_shapes, best_iou, fit_levels, fit_shapes, most_missed, placed_iou
from tinydet.detection.anchors import ASPECT_RATIOS, SIZES, anchors
from tinydet.detectors import yolo
from tinydet.errors import UserError
from tinydet.nn.init import set_values
from tinydet.training.plan import choose_anchors

NAME = "retinanet_resnet10_quarter_fpn"


def iou(a, b):
  inner = min(a[0], b[0]) * min(a[1], b[1])
  return inner / (a[0] * a[1] + b[0] * b[1] - inner)


def test_clusters_are_a_fixed_point_and_find_what_was_drawn():
  rng = np.random.default_rng(0)
  centres = np.array([(10, 30), (40, 12), (60, 60), (200, 90)], float)
  shapes = np.concatenate([c * rng.uniform(0.9, 1.1, (40, 2)) for c in centres])
  found = fit_shapes(shapes, 4)
  np.testing.assert_allclose(found, centres[np.argsort(centres.prod(1))], rtol=0.05)
  np.testing.assert_array_equal(found, fit_shapes(shapes, 4))
  nearest = np.array([max(range(4), key=lambda i: iou(s, found[i])) for s in shapes])
  for i in range(4): np.testing.assert_allclose(found[i], shapes[nearest == i].mean(0))
  for few in (shapes[:1], shapes[:2], np.repeat(shapes[:1], 9, 0)):   # fewer shapes than clusters
    assert fit_shapes(few, 3).shape == (3, 2) and np.isin(fit_shapes(few, 3).round(6), few.round(6)).all()


@pytest.mark.parametrize(("width", "height"), [(9.0, 40.0), (11.0, 9.0), (100.0, 18.0)])
def test_levels_suit_slim_and_small_boxes(width, height):
  shapes = np.array([width, height]) * np.random.default_rng(1).uniform(0.8, 1.25, (200, 2))
  sizes, ratios = fit_levels(shapes)
  assert np.shape(sizes) == (5, 3) and len(ratios) == 3 and list(ratios) == sorted(ratios)
  assert all(b == pytest.approx(2 * a, rel=0.04) for one, other in pairwise(sizes) for a, b in zip(one, other))   # still an octave a level
  before, after = best_iou(shapes, anchor_shapes()), best_iou(shapes, anchor_shapes(sizes, ratios))
  assert after.mean() > before.mean() + 0.1 and (after < MISSED).mean() < 0.05


def test_sizes_are_fitted_to_where_cells_are():
  """Against anchors as they lie on a canvas, and boxes anywhere on it: of the sizes that were tried none gives a much better mean. Laid centre on
  centre, boxes of 55 pixels are fitted as well by the anchors of 54 of level 5, whose cells are 32 pixels apart, as by larger ones of level 3."""
  rng = np.random.default_rng(2)
  shapes = np.concatenate([np.array([19, 17]) * rng.uniform(0.9, 1.1, (60, 2)), np.array([55, 52]) * rng.uniform(0.9, 1.1, (60, 2))])
  corners = rng.uniform(0, 1, (120, 2)) * (256 - shapes)
  boxes = np.concatenate([corners, corners + shapes], 1)
  def mean(sizes, ratios):
    placed = anchors(256, 256, False, sizes, ratios).astype(np.float64)
    inner = (np.minimum(boxes[:, None, 2:], placed[None, :, 2:]) - np.maximum(boxes[:, None, :2], placed[None, :, :2])).clip(0).prod(2)
    return (inner / (shapes.prod(1)[:, None] + (placed[:, 2:] - placed[:, :2]).prod(1)[None] - inner)).max(1).mean()
  sizes, ratios = fit_levels(shapes)
  tried = {scale: mean(tuple(tuple(size * scale for size in level) for level in SIZES), ratios) for scale in SCALES}
  assert mean(sizes, ratios) > max(tried.values()) - 0.02 and mean(sizes, ratios) > tried[2 ** -1.25] + 0.03
  np.testing.assert_allclose(placed_iou(shapes, sizes, ratios).mean(), mean(sizes, ratios), atol=0.02)


class Boxes:
  name = "boxes"
  def __init__(self, boxes, size=(200, 100)): self.boxes, self.size = boxes, size
  def __len__(self): return 1
  def ground_truth(self):
    odd = [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 99, 1], "iscrowd": 1}, {"image_id": 7, "category_id": 1, "bbox": [0, 0, 0, 9]}]
    return {"images": [{"id": 7, "height": self.size[0], "width": self.size[1]}], "categories": [{"id": 1, "name": "pole"}, {"id": 2, "name": "dot"}],
            "annotations": [{"image_id": 7, "category_id": 1, "bbox": [3, 4, w, h], "iscrowd": 0} for w, h in self.boxes] + odd}


@pytest.mark.parametrize(("fit", "scale"), [(Fit((320, 320)), (3.2, 1.6)), (Fit((320, 320), letterbox=True), (1.6, 1.6)),
                                            (Fit((160, 160), 1333), (1.6, 1.6)), (Fit((160, 160), 240), (1.2, 1.2))])
def test_boxes_are_judged_as_the_network_sees_them(fit, scale):
  by_class = seen_shapes(Boxes([(10, 20), (5, 50)]), fit)
  assert list(by_class) == ["pole"] and seen_shapes(Boxes([]), fit) == {}
  np.testing.assert_allclose(by_class["pole"], np.array([(10, 20), (5, 50)]) * scale)


def test_a_class_that_anchors_miss_is_not_lost_among_the_others():
  """A thousand boxes that fit and twenty dots of 9 pixels that none does: 2% of all, but all of a class."""
  detector, data = detectors.build(NAME, 2, norm="batch"), Boxes([(32, 32)] * 1000)
  truth = data.ground_truth()
  truth["annotations"] += [{"image_id": 7, "category_id": 2, "bbox": [3, 4, 9, 9]}] * 20
  data.ground_truth = lambda: truth
  dots = np.array([[9.0, 9.0]] * 20)
  share, words, shapes = most_missed(by_class := seen_shapes(data, Fit((100, 200))), anchor_shapes())
  assert (share, words) == (1, "class 'dot'") and (shapes == dots).all()
  assert most_missed({"pole": by_class["pole"], "dot": dots[:9]}, anchor_shapes())[:2] == (pytest.approx(9 / 1009), "the boxes")
  note = choose_anchors(Config, Run, detector, data, Fit((100, 200)))
  assert note.startswith("anchors: fitted to the boxes; of class 'dot' 100.0% were below an IoU of 0.4 with every shape, now no more than 0.0%")
  assert (best_iou(dots, detector.anchor_shapes()) > 0.5).all()


class Run: resumed = None
class Config: anchors = "auto"


def test_weights_say_which_anchors_they_learnt():
  detector, slim = detectors.build(NAME, 2, norm="batch"), Boxes([(4, 60), (5, 70), (4, 64)])
  assert "as they are" in choose_anchors(Config, Run, detector, Boxes([(30, 30)] * 9), Fit((200, 200))) and "anchors" not in detector.about()
  note = choose_anchors(Config, Run, detector, slim, Fit((100, 200)))
  assert "of the boxes 100.0% were below an IoU of 0.4 with every shape, now no more than 0.0%" in note
  about = json.loads(json.dumps(detector.about()))
  other = detectors.build(NAME, 2, norm="batch")
  other.assume(about)
  np.testing.assert_array_equal(other.anchors((64, 64)).numpy(), detector.anchors((64, 64)).numpy())
  np.testing.assert_array_equal(other.anchors((64, 64)).numpy(), anchors(64, 64, False, *fit_levels(np.array(slim.boxes, float))))
  assert other.about() == detector.about()
  other.assume({})
  assert (other.sizes, other.ratios) == (SIZES, ASPECT_RATIOS) and "anchors" not in other.about()
  for odd in ([], {"sizes": 3}, {"sizes": [[1, 2, 3]] * 5, "ratios": [1, 2]}, {"sizes": [[1, 2, -3]] * 5, "ratios": [1, 2, 3]}, "x",
              {"sizes": [[1, 2, float("nan")]] * 5, "ratios": [1, 2, 3]}, {"sizes": [["a"] * 3] * 5, "ratios": [1, 2, 3]}):
    with pytest.raises(UserError, match="anchors"): other.assume({"anchors": odd})


def test_families_without_anchors_and_resumed_runs_keep_what_they_have():
  yolo = detectors.build("yolov8t", 2)
  assert "no anchors to fit" in choose_anchors(Config, Run, yolo, Boxes([(4, 60)]), Fit((96, 96)))
  assert choose_anchors(Config, SimpleNamespace(resumed={"step": 1}), yolo, Boxes([(4, 60)]), Fit((96, 96))) == ""


@pytest.mark.parametrize("name", ["yolov3-tiny", "yolov5n-classic", "yolov7"])
def test_a_yolos_anchors_are_fitted_and_kept(name):
  detector = yolo.build(name, 2)
  levels = len(detector.facts.strides)
  published = detector.anchor_shapes()
  np.testing.assert_allclose(published, np.reshape(detector.facts.anchors, (-1, 2)), rtol=1e-5)
  assert yolo.build("yolov8n", 2).anchor_shapes() is None
  centres = np.array([(4 + 3 * i, 5 + 4 * i) for i in range(3 * levels)], np.float64) * 2
  shapes = (centres[:, None] + np.array([(-0.1, 0), (0.1, 0), (0, 0.1), (0, -0.1)])).reshape(-1, 2)
  detector.fit_anchors(shapes)
  np.testing.assert_allclose(detector.anchor_shapes(), centres, atol=0.01)
  again = yolo.build(name, 2)
  again.assume(detector.about())
  for key, tensor in get_state_dict(detector.network).items():
    if "anchor" in key: set_values(get_state_dict(again.network)[key], tensor.numpy())
  np.testing.assert_allclose(again.anchor_shapes(), centres, atol=0.01)
  if name == "yolov7": np.testing.assert_allclose(detector.network.model[-1].anchor_grid.numpy().reshape(-1, 2), centres, atol=0.01)
  if name == "yolov3-tiny":
    for wrong in ([1, 2], "many", [[[1, 2]] * 3] * 5, [[[0, 2]] * 3] * levels):
      with pytest.raises(UserError, match="anchors"): again.assume(detector.about() | {"anchors": wrong})
