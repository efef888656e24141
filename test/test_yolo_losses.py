"""YOLO's losses against the official programs (golden/yolo/README.md): terms, gradients, running statistics after a step."""
import numpy as np, pytest
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.detection.boxes import SIMILARITIES, similarity
from tinydet.detection.yolo_losses import Recipe, binary_cross_entropy, distribution_focal, side_losses, summed_cross_entropy, varifocal
from tinydet.detectors import yolo as detectors
from yolo_golden import GOLDEN, fill
from by_hand import by_hand

TOLERANCE = {"yolov9t": (1e-4, 1e-2), "yolov6n": (1e-3, 5e-2)}   # of losses and of gradient norms, where they are not the usual


@pytest.mark.parametrize(("name", "whole"), by_hand(
  [("yolov8n", False), ("yolov8n", True), ("yolov10n", False), ("yolo11n", False), ("yolo26n", False), ("yolov6n", False), ("yolov9t", False)],
  ("yolov8n", True), "yolov10n", "yolo11n", "yolov9t"))
def test_a_step_of_the_official_program(name, whole):
  """`whole`: the gradient of all parameters, else that of the box branch's last layer, as compiling takes minutes."""
  golden = np.load(GOLDEN / f"loss_{name}.npz")
  detector = detectors.build(name, int(golden["num_classes"]))
  tensors = get_state_dict(fill(detector.network))
  last = next(key.removeprefix("gradnorm/") for key in golden.files if key.endswith(("cv2.0.2.weight", "cv2.1.2.weight", "reg_preds.0.weight")))
  params = {key: t for key, t in tensors.items() if t.is_param and (whole or key == last)}
  boxes, labels = Tensor(golden["target_boxes"]), Tensor(golden["target_labels"].astype(np.int32))
  with Context(TRAINING=1):
    outputs = detector(Tensor(golden["images"]))
    found = detector.losses(outputs, boxes, labels, golden["images"].shape[1:3])
  gradients = dict(zip(params, found["loss"].gradient(*params.values())))
  after = {key.removeprefix("after/"): golden[key] for key in golden.files if key.startswith("after/")}
  Tensor.realize(*found.values(), *gradients.values(), *(tensors[key] for key in after))
  values = {key: t.item() for key, t in found.items()}
  loss, gradient = TOLERANCE.get(name, (1e-4, 1e-3))
  if name == "yolo26n":
    many, one = golden["loss_items_one2many"], golden["loss_items_one2one"]
    items = 0.8 * many + 0.2 * one
  else: items = golden["loss_items"]
  if name == "yolov6n": items = items[[0, 2]]
  assert [values[key] for key in ("box", "classes", "sides")[:len(items)]] == pytest.approx(items.tolist(), rel=loss)
  assert values["loss"] == pytest.approx(float(golden["loss_total"]), rel=loss)
  norms = {key: float(np.sqrt((g.numpy().astype(np.float64) ** 2).sum())) for key, g in gradients.items()}
  for key in golden.files:
    if key.removeprefix("gradnorm/") in norms: assert norms[key.removeprefix("gradnorm/")] == pytest.approx(float(golden[key]), rel=gradient), key
  if whole: assert np.sqrt(sum(n ** 2 for n in norms.values())) == pytest.approx(float(golden["gradnorm"]), rel=gradient)
  for key, value in after.items(): np.testing.assert_allclose(tensors[key].numpy(), value, rtol=1e-3, atol=1e-5)


def numbers(a, b, kind):
  """Similarity of pairs of boxes in float64, from the papers' formulas ("ciou" and "siou" are in the golden steps)."""
  size = [x[:, 2:] - x[:, :2] for x in (a, b)]
  shared = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(1)
  union, hull = size[0].prod(1) + size[1].prod(1) - shared, np.maximum(a[:, 2:], b[:, 2:]) - np.minimum(a[:, :2], b[:, :2])
  away = ((a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) ** 2).sum(1) / 4
  return shared / union - {"iou": 0, "giou": 1 - union / hull.prod(1), "diou": away / (hull ** 2).sum(1)}[kind]


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_similarity_and_its_gradient(kind):
  rng = np.random.default_rng(0)
  corner, side = rng.random((2, 40, 2)) * 10, rng.random((2, 40, 2)) * 9 + 1
  a, b = (np.concatenate([corner[i], corner[i] + side[i]], 1) for i in range(2))
  x = Tensor(a.astype(np.float32))
  found = similarity(x, Tensor(b.astype(np.float32)), kind)
  np.testing.assert_allclose(found.numpy(), numbers(a, b, kind), atol=1e-5)
  way = rng.standard_normal(a.shape)
  slope = (numbers(a + 1e-6 * way, b, kind) - numbers(a - 1e-6 * way, b, kind)) / 2e-6
  np.testing.assert_allclose((found.sum().gradient(x)[0].numpy() * way).sum(1), slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_equal_boxes_are_alike_and_nothing_is_infinite(kind):
  boxes = np.float32([[0, 0, 8, 4], [1, 1, 1, 1], [-5, 2, 300, 2.5], [3, 3, 2, 1]])   # the second and last are none
  x = Tensor(boxes)
  found = similarity(x, Tensor(boxes.copy()), kind)
  gradient, = found[:3].sum().gradient(x)
  assert found.numpy()[[0, 2]] == pytest.approx(1, abs=1e-4) and np.isfinite(gradient.numpy()[[0, 2]]).all()
  far = similarity(x, Tensor(boxes + 1e4), kind)
  assert np.isfinite(far.numpy()).all() and np.isfinite(far.sum().gradient(x)[0].numpy()[[0, 2]]).all()


def test_cross_entropy_varifocal_and_distributions():
  rng = np.random.default_rng(0)
  x, y = np.float64([-90, -3, 0, 0.5, 40]).repeat(3), np.tile([0.0, 0.3, 1.0], 5)
  def entropy(x): return np.logaddexp(0, x) - x * y
  p = 1 / (1 + np.exp(-x))
  logits, wanted = Tensor(x.astype(np.float32)), Tensor(y.astype(np.float32))
  found = binary_cross_entropy(logits, wanted)
  np.testing.assert_allclose(found.numpy(), entropy(x), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found.sum().gradient(logits)[0].numpy(), p - y, atol=1e-6)
  def weighed(x): return entropy(x) * np.where(y > 0, y, 0.75 / (1 + np.exp(-x)) ** 2)
  found = varifocal(logits, wanted)
  np.testing.assert_allclose(found.numpy(), weighed(x), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found.sum().gradient(logits)[0].numpy(), (weighed(x + 1e-5) - weighed(x - 1e-5)) / 2e-5, rtol=1e-3, atol=1e-5)
  logits, sides = rng.standard_normal((2, 4, 5, 3)), rng.random((2, 4, 3)) * 3.99
  sides[0, 0] = (0, 2, 3.99)
  log_p, low = logits - np.log(np.exp(logits).sum(2, keepdims=True)), np.floor(sides).astype(int)[:, :, None]
  left, right = (np.take_along_axis(log_p, low + i, 2)[:, :, 0] for i in (0, 1))
  expected = -(left * (low[:, :, 0] + 1 - sides) + right * (sides - low[:, :, 0])).mean(1)
  np.testing.assert_allclose(distribution_focal(Tensor(logits.astype(np.float32)), Tensor(sides.astype(np.float32))).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("classes", [1, 7, 230])
def test_the_sum_of_cross_entropies(classes):
  """In float64, of logits near zero, where products are largest, and of wild ones; and its gradient."""
  rng = np.random.default_rng(classes)
  x = rng.standard_normal((2, classes, 9)).astype(np.float32) * np.float32([1e-4, 1, 80])[rng.integers(0, 3, (2, classes, 9))]
  y = rng.random(x.shape).astype(np.float32) * (rng.random(x.shape) < 0.3)
  logits, wide = Tensor(x), x.astype(np.float64)
  found = summed_cross_entropy(logits, Tensor(y))
  assert found.item() == pytest.approx((np.maximum(wide, 0) - wide * y + np.log1p(np.exp(-abs(wide)))).sum(), rel=1e-6)
  gradient, = found.gradient(logits)
  np.testing.assert_allclose(gradient.numpy(), 1 / (1 + np.exp(-wide)) - y, atol=1e-6)


def test_pictures_without_boxes_teach_only_that_nothing_is_there():
  box, classes = Tensor(np.ones((2, 64, 84), np.float32)), Tensor(np.zeros((2, 3, 84), np.float32))
  found = side_losses(box, classes, Tensor(np.zeros((2, 5, 4), np.float32)), Tensor(np.full((2, 5), -1, np.int32)), (64, 64), (8, 16, 32), Recipe())
  gradients = sum(found.values()).gradient(box, classes)
  Tensor.realize(*found.values(), *gradients)
  assert found["box"].item() == found["sides"].item() == 0 and found["classes"].item() == pytest.approx(0.5 * 2 * 3 * 84 * np.log(2), rel=1e-5)
  assert (gradients[0].numpy() == 0).all() and gradients[1].numpy() == pytest.approx(0.25)
