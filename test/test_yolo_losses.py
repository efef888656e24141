"""YOLO's losses against the official programs (golden/yolo/README.md): terms, gradients, running statistics after a step."""
import numpy as np, pytest
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.detectors import yolo as detectors
from yolo_golden import GOLDEN, fill

WHOLE = {"yolov8n"}   # the gradient of all parameters, of others that of the box branch's last layer: minutes of compiling each, and the same losses
TOLERANCE = {"yolov9t": (1e-4, 1e-2), "yolov6n": (1e-3, 5e-2)}   # of losses and of gradient norms, where they are not the usual


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolov9t", "yolov10n", "yolo26n", "yolov6n"])
def test_a_step_of_the_official_program(name):
  golden = np.load(GOLDEN / f"loss_{name}.npz")
  detector = detectors.build(name, int(golden["num_classes"]))
  tensors = get_state_dict(fill(detector.network))
  last = next(key.removeprefix("gradnorm/") for key in golden.files if key.endswith(("cv2.0.2.weight", "cv2.1.2.weight", "reg_preds.0.weight")))
  params = {key: t for key, t in tensors.items() if t.is_param and (name in WHOLE or key == last)}
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
  if name in WHOLE: assert np.sqrt(sum(n ** 2 for n in norms.values())) == pytest.approx(float(golden["gradnorm"]), rel=gradient)
  for key, value in after.items(): np.testing.assert_allclose(tensors[key].numpy(), value, rtol=1e-3, atol=1e-5)
