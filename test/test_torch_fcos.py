"""FCOS here and in torchvision, from the same drawn parameters: tensors, outputs, losses, gradients, detections, and its published file's entry."""
import numpy as np
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet import detectors
from tinydet.models.preprocess import normalize
from tinydet.nn import init
from tinydet.weights import pretrained
from classifier_golden import values
from torch_peer import torch, torchvision
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fcos_resnet50_fpn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

CANVAS = (128, 160)
KEYS = ("backbone.body.conv1.weight", "backbone.body.layer3.0.conv1.weight", "head.regression_head.bbox_ctrness.weight",
        "head.regression_head.bbox_reg.weight", "head.classification_head.conv.4.weight", "head.regression_head.conv.0.weight")


def nms(boxes, scores, threshold):
  """Greedy, as torchvision's operator, which PyPI's builds do not all have: boxes without area overlap nothing."""
  keep, overlap = [], box_ops.box_iou(boxes, boxes)
  for i in scores.argsort(descending=True).tolist():
    if not any(overlap[i, j] > threshold for j in keep): keep.append(i)
  return torch.tensor(keep, dtype=torch.int64)


def test_it_computes_what_torchvisions_does(monkeypatch):
  """The second picture has no boxes; of the first one's, two overlap and one is of few pixels."""
  body = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
  theirs = FCOS(_resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)), 5)
  drawn = {key: values(key, t.shape, 0.5).astype(np.float32) for key, t in theirs.state_dict().items()}
  theirs.load_state_dict({key: torch.from_numpy(value) for key, value in drawn.items()})
  monkeypatch.setattr(init, "initialize", lambda *_: None)
  ours = detectors.build("fcos_resnet18_fpn", 5, norm="frozen")
  tensors = get_state_dict(ours.network)
  shapes = {key: t.shape for key, t in tensors.items()}
  assert shapes == {key: value.shape for key, value in drawn.items()}
  assert detectors.recognise(shapes) == ("fcos_resnet18_fpn", 5, {"norm": "frozen", "channels": 256})
  for key, t in tensors.items(): init.set_values(t, drawn[key])

  images = np.random.default_rng(0).integers(0, 256, (2, CANVAS[0] // 16, CANVAS[1] // 16, 3), np.uint8).repeat(16, 1).repeat(16, 2)
  pixels = torch.from_numpy(normalize(Tensor(images)).numpy())
  targets = [{"boxes": torch.tensor([[10., 10, 60, 70], [30, 20, 150, 120], [5, 5, 14, 17]]), "labels": torch.tensor([0, 3, 4])},
             {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
  levels = list(theirs.backbone(pixels).values())
  outputs, anchors = theirs.head(levels), theirs.anchor_generator(ImageList(pixels, [CANVAS] * 2), levels)
  sizes = [level.shape[2] * level.shape[3] for level in levels]
  losses = theirs.compute_loss(targets, outputs, anchors, sizes)
  sum(losses.values()).backward()

  boxes, labels = np.zeros((2, 4, 4), np.float32), np.full((2, 4), -1, np.int32)
  boxes[0, :3], labels[0, :3] = targets[0]["boxes"], targets[0]["labels"]
  found = ours(Tensor(images))
  own = ours.losses(found, Tensor(boxes), Tensor(labels), CANVAS)
  norms = [g.square().sum().sqrt() for g in own["loss"].gradient(*(tensors[key] for key in KEYS))]
  with Context(NOOPT=1): Tensor.realize(*found, *own.values(), *norms)   # all of it at once: plain loops compile in half the time
  for value, key in zip(found, ("cls_logits", "bbox_regression", "bbox_ctrness")):
    expected = outputs[key].detach().numpy()
    assert abs(value.numpy() - expected).max() <= 1e-4 * abs(expected).max(), key
  for key, expected in losses.items(): np.testing.assert_allclose(own[key].item(), expected.item(), rtol=1e-4, err_msg=key)
  named = dict(theirs.named_parameters())
  for key, norm in zip(KEYS, norms): np.testing.assert_allclose(norm.item(), named[key].grad.norm().item(), rtol=1e-3, err_msg=key)

  monkeypatch.setattr(box_ops, "nms", nms)
  split = {key: [part.detach() for part in value.split(sizes, dim=1)] for key, value in outputs.items()}
  expected = theirs.eval().postprocess_detections(split, [list(a.split(sizes)) for a in anchors], [CANVAS] * 2)
  detected = ours.detect(found, CANVAS, np.array([CANVAS] * 2))
  for i in range(2):
    count = len(expected[i]["scores"])
    assert count > 20 and (detected.scores[i] > 0).sum() == count
    np.testing.assert_allclose(detected.scores[i][:count], expected[i]["scores"], atol=1e-4)
    same = abs(detected.boxes[i][:count] - expected[i]["boxes"].numpy()).max(1) < 0.01
    same &= detected.labels[i][:count] == expected[i]["labels"].numpy()
    assert same.mean() >= 0.98   # two of all but the same score may change places


def test_the_published_detector():
  with torch.device("meta"): theirs = fcos_resnet50_fpn(weights=None, weights_backbone=None)
  weights, entry = FCOS_ResNet50_FPN_Weights.COCO_V1, pretrained.published("coco", "fcos_resnet50_fpn")
  assert entry.url == weights.url and entry.score == weights.meta["_metrics"]["COCO-val2017"]["box_map"]
  assert entry.class_names == tuple(weights.meta["categories"]) and entry.eps == 1e-5
  ours = {key: t.shape for key, t in get_state_dict(detectors.build("fcos_resnet50_fpn", 91).network).items()}
  assert ours == {key: tuple(t.shape) for key, t in theirs.state_dict().items() if not key.endswith("num_batches_tracked")}
  assert detectors.published_name("coco", "fcos") == "fcos_resnet50_fpn"
