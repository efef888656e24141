"""FCOS (Tian et al. 2019): backbone, feature pyramid, and two heads shared by all levels, with torchvision's `state_dict` keys."""
import math
from collections.abc import Mapping
from tinygrad import Tensor, dtypes
from tinydet.models import classifiers, fpn, retinanet
from tinydet.models.classifier import Classifier
from tinydet.models.retinanet import PRIOR, Backbone, usual_channels
from tinydet.nn import canvas, init
from tinydet.nn.layers import NORMS, Conv2d, relu


MARK = "head.regression_head.bbox_ctrness.weight"   # a tensor that RetinaNet has not


class _Head:
  """Four times convolution, norm and ReLU, then one convolution for each of `outputs`: name -> numbers a place."""
  def __init__(self, channels: int, outputs: Mapping[str, int]):
    self.outputs = tuple(outputs)
    self.conv = [layer for _ in range(4) for layer in (Conv2d(channels, channels, 3, padding=1), NORMS["group"](channels), relu)]
    for name, numbers in outputs.items(): setattr(self, name, Conv2d(channels, numbers, 3, padding=1, dtype=dtypes.float32))

  def __call__(self, levels: list[Tensor]) -> list[Tensor]:
    """[B,N,numbers] f32 for each of the outputs, level by level, row by row."""
    sizes, x = [level.shape[2:] for level in levels], canvas.pack(levels).contiguous()
    for conv, norm in zip(self.conv[::3], self.conv[1::3]):
      x = canvas.pack([norm(level) for level in canvas.unpack(conv(x), sizes)]).contiguous().relu()   # a level's statistics are its own
    found = []
    for name in self.outputs:
      out = getattr(self, name)(x).contiguous()
      parts = [part.permute(0, 2, 3, 1).reshape(x.shape[0], -1, out.shape[1]) for part in canvas.unpack(out, sizes)]
      found.append(parts[0].cat(*parts[1:], dim=1).contiguous().contiguous_backward())
    return found


class _Heads:
  def __init__(self, channels: int, num_classes: int):
    self.classification_head = _Head(channels, {"cls_logits": num_classes})
    self.regression_head = _Head(channels, {"bbox_reg": 4, "bbox_ctrness": 1})


class FCOS:
  """A normalised batch [B,3,H,W] -> (class logits [B,N,K], distances to a box's sides [B,N,4] of places in strides, not negative, centreness logits
  [B,N,1]), all f32."""
  body = "backbone.body."   # how the names of the classifier's tensors begin here

  def __init__(self, body: Classifier, num_classes: int, channels: int = 256):
    self.num_classes, self.backbone, self.head = num_classes, Backbone(body, channels, "p5"), _Heads(channels, num_classes)

  @property
  def top(self) -> tuple[str, ...]:
    """How the names of the classifier's tensors begin that have no place here."""
    return self.backbone.body.top

  @property
  def class_rows(self) -> dict[str, tuple[int, int]]:
    """The tensors with a row for each class: how many times they have all, and how many other rows come before the classes each time."""
    return {f"head.classification_head.cls_logits.{part}": (1, 0) for part in ("weight", "bias")}

  def heads(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the heads make of P3..P7."""
    (logits,), (sides, centreness) = self.head.classification_head(levels), self.head.regression_head(levels)
    return logits, sides.relu(), centreness

  def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]: return self.heads(self.backbone.fpn(self.backbone.body.feature_maps(x)))


def current_key(key: str) -> str:
  """The name that torchvision gives a tensor now, from the one in an older file: pyramids changed as RetinaNet's, heads did not. Theirs are counted
  with norms and activations between them, as if they were an old RetinaNet's."""
  return key if key.startswith("head.") else retinanet.current_key(key)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """The name for `build` of the detector whose tensors have these names and shapes; None if it is none of this project."""
  if not all(len(shapes.get(key, ())) == 4 for key in ("head.classification_head.cls_logits.weight", MARK)): return None
  body = {key.removeprefix("backbone.body."): shape for key, shape in shapes.items() if key.startswith("backbone.body.")}
  backbone = classifiers.recognise(body)
  return None if backbone is None else f"fcos_{backbone}_fpn"


def init_rule(model: FCOS, key: str, shape: tuple[int, ...]) -> init.Draw:
  """torchvision's initialisation of the detector's tensor `key`."""
  if key.startswith(model.body): return model.backbone.body.init_rule(key.removeprefix(model.body), shape)
  if key.startswith("backbone.fpn."): return fpn.init_rule(key, shape)
  if key.endswith("cls_logits.bias"): return init.constant(-math.log((1 - PRIOR) / PRIOR))
  return init.normal(0.01) if len(shape) == 4 else init.normalization(key)


def build(name: str, num_classes: int, norm: str | None = None, seed: int = 0, channels: int | None = None) -> FCOS:
  """`fcos_<backbone>_fpn`, <backbone> being one of `classifiers.NAMES`, initialised from `seed`; `norm` (a key of `NORMS`, by default "frozen") is
  the backbone's. Pyramid and heads are `channels` wide, by default as `retinanet.usual_channels` has it.
  Raises ValueError for another name."""
  backbone = name.removeprefix("fcos_").removesuffix("_fpn")
  if name != f"fcos_{backbone}_fpn" or backbone not in classifiers.NAMES:
    raise ValueError(f"{name!r} is no detector: fcos_<backbone>_fpn with a backbone of {', '.join(classifiers.NAMES)}")
  body = classifiers.made(backbone, None, norm or "frozen")
  model = FCOS(body, num_classes, channels or usual_channels(body))
  init.initialize(model, lambda key, shape: init_rule(model, key, shape), seed)
  return model
