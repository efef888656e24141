import pytest
from torch_peer import torchvision
from torchvision.models import get_model_weights, list_models
from torchvision.transforms._presets import ObjectDetection
from tinydet.models import classifiers
from tinydet.models.preprocess import MEAN, STD
from tinydet.weights.pretrained import PUBLISHED

THEIRS = {"imagenet": "IMAGENET1K_V1", "imagenet_v2": "IMAGENET1K_V2", "coco": "COCO_V1"}
OURS = [e for e in PUBLISHED if e.name in THEIRS]


@pytest.mark.parametrize("entry", OURS, ids=lambda e: f"{e.name}-{e.architecture}")
def test_an_entry_says_what_torchvision_says(entry):
  weights = get_model_weights(entry.architecture)[THEIRS[entry.name]]
  assert entry.url == weights.url
  assert entry.checksum.startswith("sha256:" + weights.url.rsplit("-", 1)[1].removesuffix(".pth")) and len(entry.checksum) in (7 + 8, 7 + 10, 7 + 64)
  metrics, = weights.meta["_metrics"].values()
  assert entry.score == metrics["box_map" if entry.name == "coco" else "acc@1"]
  assert entry.num_classes == len(weights.meta["categories"])
  if entry.name == "coco": assert list(entry.class_names) == weights.meta["categories"] and weights.transforms is ObjectDetection


@pytest.mark.parametrize("entry", [e for e in OURS if e.name != "coco"], ids=lambda e: f"{e.name}-{e.architecture}")
def test_a_classifiers_pictures_are_torchvisions(entry):
  theirs = get_model_weights(entry.architecture)[THEIRS[entry.name]].transforms()
  kind = "bicubic" if entry.bicubic else "bilinear"
  assert (theirs.resize_size, theirs.crop_size, theirs.interpolation.value) == ([entry.resize], [entry.crop], kind)
  turned = entry.architecture in ("inception_v3", "googlenet")   # by `transform_input`, see test_classifiers.py
  assert turned or (entry.input or (MEAN, STD)) == (tuple(theirs.mean), tuple(theirs.std))


def test_nothing_of_torchvisions_is_missing():
  detectors = [m for m in list_models(module=torchvision.models.detection) if m.startswith(("retinanet_", "fcos_"))]
  theirs = {(a, w.name) for a in [*classifiers.NAMES, *detectors] if a != "resnet10_quarter" for w in get_model_weights(a)
            if w.name in THEIRS.values()}   # SWAG's and SSD's are not
  assert {(e.architecture, THEIRS[e.name]) for e in OURS} == theirs


def test_the_detectors_input_and_norms_are_torchvisions(monkeypatch):
  detection = torchvision.models.detection
  for entry in OURS:
    if entry.name != "coco" or not entry.architecture.startswith("retinanet_"): continue
    weights = get_model_weights(entry.architecture)["COCO_V1"]
    empty = getattr(detection, entry.architecture)(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, *args, empty=empty, **kwargs: empty)
    model = getattr(detection, entry.architecture)(weights=weights)
    assert (model.transform.min_size, model.transform.max_size) == (entry.size[:1], entry.max_size) and entry.size == (800, 800)
    assert {m.eps for m in model.backbone.modules() if "BatchNorm" in type(m).__name__} == {entry.eps}
    assert model.head.classification_head.num_classes == entry.num_classes
