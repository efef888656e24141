"""RetinaNet (Lin et al. 2017): backbone, feature pyramid, and two heads shared by all levels, with torchvision's `state_dict` keys."""
import math, re
from collections.abc import Mapping
from typing import Any
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict
from tinydet.models import classifiers, fpn
from tinydet.models.classifier import Classifier
from tinydet.nn import canvas, init
from tinydet.nn.layers import NORMS, Conv2d

LIGHT, TINY = 8_000_000, 500_000   # parameters of a backbone
WIDTH = 256   # channels of torchvision's pyramids
PRIOR = 0.01  # the score every anchor starts from, so that the first loss is not all background


class _Head:
  """Four 3x3 convolutions, then one named `output` with `per_anchor` numbers an anchor."""
  def __init__(self, channels: int, output: str, num_anchors: int, per_anchor: int, norm: str | None):
    self.output, self.per_anchor = output, per_anchor
    self.conv = [[Conv2d(channels, channels, 3, padding=1, bias=norm is None)] + ([] if norm is None else [NORMS[norm](channels)]) for _ in range(4)]
    # Logits near -5 and deltas of large anchors need more than bf16's eight bits.
    setattr(self, output, Conv2d(channels, num_anchors * per_anchor, 3, padding=1, dtype=dtypes.float32))

  def __call__(self, levels: list[Tensor]) -> Tensor:
    sizes = [x.shape[2:] for x in levels]
    x, gaps = canvas.pack(levels).contiguous(), canvas.mask(sizes, levels[0].device).contiguous()
    for conv, *norm in self.conv:
      x = conv(x)
      if norm: x = canvas.pack([norm[0](level) for level in canvas.unpack(x, sizes)]).contiguous().relu()   # a level's statistics are its own
      else: x = x.contiguous().relu() * gaps.cast(x.dtype)
    # Contiguous before and after the concatenation: else the last convolution is computed anew for each level inside the loss, and on the way back
    # the gradient of the loss for each level inside that convolution.
    x = getattr(self, self.output)(x).contiguous()
    outputs = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.per_anchor) for x in canvas.unpack(x, sizes)]
    return outputs[0].cat(*outputs[1:], dim=1).contiguous().contiguous_backward()


class _Heads:
  def __init__(self, channels: int, num_classes: int, num_anchors: int, norm: str | None):
    self.classification_head = _Head(channels, "cls_logits", num_anchors, num_classes, norm)
    self.regression_head = _Head(channels, "bbox_reg", num_anchors, 4, norm)


class Backbone:
  """A classifier's features and the pyramid on them."""
  def __init__(self, body: Classifier, channels: int, p6_from: str):
    self.body, self.fpn = body, fpn.FeaturePyramid(list(body.out_channels), channels, p6_from)

  @property
  def stages(self) -> dict[str, tuple[str, ...]]:
    """From the pyramid down: a part's name -> how its tensors' names begin."""
    body = reversed(list(zip(("stem", "layer1", "layer2", "layer3", "layer4"), self.body.stages)))
    return {"pyramid": ("backbone.fpn.",)} | {name: tuple(f"backbone.body.{prefix}" for prefix in stage) for name, stage in body if stage}


class RetinaNet:
  """A normalised batch [B,3,H,W] -> (cls_logits [B,A,K], bbox_regression [B,A,4]), both f32, anchors in the order of `tinydet.detection.anchors`."""
  def __init__(self, body: Classifier, num_classes: int, *, channels: int = 256, num_anchors: int = 9, p6_from: str = "p5",
               head_norm: str | None = None):
    self.num_classes, self.num_anchors = num_classes, num_anchors
    self.backbone = Backbone(body, channels, p6_from)
    self.head = _Heads(channels, num_classes, num_anchors, head_norm)

  body = "backbone.body."   # how the names of the classifier's tensors begin here

  @property
  def top(self) -> tuple[str, ...]:
    """How the names of the classifier's tensors begin that have no place here."""
    return self.backbone.body.top

  @property
  def class_rows(self) -> dict[str, tuple[int, int]]:
    """The tensors with a row for each class: how many times they have all, and how many other rows come before the classes each time."""
    return {f"head.classification_head.cls_logits.{part}": (self.num_anchors, 0) for part in ("weight", "bias")}

  def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
    levels = self.backbone.fpn(self.backbone.body.feature_maps(x))
    return self.head.classification_head(levels), self.head.regression_head(levels)


def freeze(model: Any, trainable_layers: int) -> None:
  """Leave the last `trainable_layers` of the five stages of `model.backbone.body` to learn, and fix the rest (torchvision
  `_resnet_fpn_extractor`)."""
  fixed = tuple(prefix for stage in model.backbone.body.stages[:5 - trainable_layers] for prefix in stage)
  for key, tensor in get_state_dict(model.backbone.body).items():
    if fixed and key.startswith(fixed): tensor.is_param_(False)


def current_key(key: str) -> str:
  """The name that torchvision gives a tensor now, from the one it has in files from before version 0.14, or from now: pyramid blocks gained a level
  of nesting, and the convolutions of a head lost the activations that used to be counted between them."""
  if match := re.fullmatch(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)", key): return f"{match[1]}.0.{match[2]}"
  if match := re.fullmatch(r"(head\.(?:classification|regression)_head\.conv)\.([0246])\.(weight|bias)", key):
    return f"{match[1]}.{int(match[2]) // 2}.0.{match[3]}"
  return key


def variants(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
  """Names for `build` of the detectors whose tensors have these names and shapes (`current_key` names), the likeliest first; none if it is none of
  this project. There are two where C5 is as wide as the pyramid, as P6 may come from either then."""
  heads = ("head.classification_head.cls_logits.weight", "head.regression_head.bbox_reg.weight")
  p6 = shapes.get("backbone.fpn.extra_blocks.p6.weight")
  if p6 is None or not all(len(shapes.get(key, ())) == 4 and shapes[key][0] >= 4 for key in heads): return []
  if "head.regression_head.bbox_ctrness.weight" in shapes: return []   # FCOS, which has all that RetinaNet has
  body = {key.removeprefix("backbone.body."): shape for key, shape in shapes.items() if key.startswith("backbone.body.")}
  if (backbone := classifiers.recognise(body)) is None: return []
  v1, v2 = f"retinanet_{backbone}_fpn", f"retinanet_{backbone}_fpn_v2"
  if p6[0] != p6[1]: return [v2]
  normed = "head.classification_head.conv.0.1.weight" in shapes
  if p6[1] != classifiers.made(backbone, None).out_channels[-1] or not normed: return [v1]
  if p6[1] >= WIDTH: return [v2]
  # narrow heads have norms in both; v2's backbone has batch norm, which counts its batches
  return [v2, v1] if any(key.endswith("num_batches_tracked") for key in body) else [v1, v2]


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """The first of `variants`; None if there is none."""
  return next(iter(variants(shapes)), None)


def init_rule(model: RetinaNet, key: str, shape: tuple[int, ...]) -> init.Draw:
  """torchvision's initialisation of the detector's tensor `key`."""
  if key.startswith(model.body): return model.backbone.body.init_rule(key.removeprefix(model.body), shape)
  if key.startswith("backbone.fpn."): return fpn.init_rule(key, shape)
  if key.endswith("cls_logits.bias"): return init.constant(-math.log((1 - PRIOR) / PRIOR))
  if len(shape) == 4: return init.normal(0.01)
  return init.normalization(key)


def usual_channels(body: Classifier) -> int:
  """How wide pyramid and heads are for a backbone: torchvision's 256, half of that beside less than `LIGHT` parameters, an eighth beside less than
  `TINY`."""
  parameters = sum(t.numel() for t in get_state_dict(body).values() if t.is_param)
  return WIDTH if parameters >= LIGHT else 128 if parameters >= TINY else 32


def build(name: str, num_classes: int, norm: str | None = None, seed: int = 0, channels: int | None = None) -> RetinaNet:
  """`retinanet_<backbone>_fpn` or `retinanet_<backbone>_fpn_v2`, <backbone> being one of `classifiers.NAMES`, initialised from `seed`.

  v2 takes P6 from C5, has group norm in its heads and batch norm in its backbone, where v1 has it frozen; `norm` (a key of `NORMS`) overrides the
  backbone's. Pyramid and heads are `channels` wide, by default as `usual_channels` has it. Narrower ones than torchvision's have group norm
  in the heads: four convolutions of so few channels, drawn as torchvision draws them, let little of the picture through. Raises ValueError for
  another name."""
  backbone = name.removeprefix("retinanet_").removesuffix("_v2").removesuffix("_fpn")
  if not name.startswith(f"retinanet_{backbone}_fpn") or backbone not in classifiers.NAMES:
    raise ValueError(f"{name!r} is no detector: retinanet_<backbone>_fpn[_v2] with a backbone of {', '.join(classifiers.NAMES)}")
  v2 = name.endswith("_v2")
  body = classifiers.made(backbone, None, norm or ("batch" if v2 else "frozen"))
  channels = channels or usual_channels(body)
  model = RetinaNet(body, num_classes, channels=channels, p6_from="c5" if v2 else "p5", head_norm="group" if v2 or channels < WIDTH else None)
  init.initialize(model, lambda key, shape: init_rule(model, key, shape), seed)
  return model
