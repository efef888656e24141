"""RetinaNet (Lin et al. 2017): backbone, feature pyramid, and two heads shared by all levels, with torchvision's `state_dict` keys."""
import math, re
from collections.abc import Mapping
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_parameters
from tinydet.models import fpn, resnet
from tinydet.nn import canvas, init
from tinydet.nn.layers import NORMS, Conv2d

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


class _Backbone:
  def __init__(self, body: resnet.ResNet, channels: int, p6_from: str):
    self.body, self.fpn = body, fpn.FeaturePyramid(body.channels[1:], channels, p6_from)


class RetinaNet:
  """A normalised batch [B,3,H,W] -> (cls_logits [B,A,K], bbox_regression [B,A,4]), both f32, anchors in the order of `tinydet.detection.anchors`."""
  def __init__(self, body: resnet.ResNet, num_classes: int, *, channels: int = 256, num_anchors: int = 9, p6_from: str = "p5",
               head_norm: str | None = None):
    self.num_classes, self.num_anchors = num_classes, num_anchors
    self.backbone = _Backbone(body, channels, p6_from)
    self.head = _Heads(channels, num_classes, num_anchors, head_norm)

  body = "backbone.body."   # how the names of the classifier's tensors begin here

  @property
  def class_rows(self) -> dict[str, tuple[int, int]]:
    """The tensors with a row for each class: how many times they have all, and how many other rows come before the classes each time."""
    return {f"head.classification_head.cls_logits.{part}": (self.num_anchors, 0) for part in ("weight", "bias")}

  def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
    levels = self.backbone.fpn(self.backbone.body.features(x)[1:])
    return self.head.classification_head(levels), self.head.regression_head(levels)


def freeze(model: RetinaNet, trainable_layers: int) -> None:
  """Leave the last `trainable_layers` of the backbone's stem and four stages to learn, and fix the rest (torchvision `_resnet_fpn_extractor`)."""
  stages = ["conv1", "layer1", "layer2", "layer3", "layer4"][:5 - trainable_layers]
  if "conv1" in stages: stages.append("bn1")
  for stage in stages:
    for tensor in get_parameters(getattr(model.backbone.body, stage)): tensor.is_param_(False)


def current_key(key: str) -> str:
  """The name that torchvision gives a tensor now, from the one it has in files from before version 0.14, or from now: pyramid blocks gained a level
  of nesting, and the convolutions of a head lost the activations that used to be counted between them."""
  if match := re.fullmatch(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)", key): return f"{match[1]}.0.{match[2]}"
  if match := re.fullmatch(r"(head\.(?:classification|regression)_head\.conv)\.([0246])\.(weight|bias)", key):
    return f"{match[1]}.{int(match[2]) // 2}.0.{match[3]}"
  return key


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """The name for `build` of the detector whose tensors have these names and shapes (`current_key` names); None if it is none of this project."""
  body = {key.removeprefix("backbone.body."): shape for key, shape in shapes.items() if key.startswith("backbone.body.")}
  backbone, p6 = resnet.recognise(body), shapes.get("backbone.fpn.extra_blocks.p6.weight")
  heads = ("head.classification_head.cls_logits.weight", "head.regression_head.bbox_reg.weight")
  if backbone is None or p6 is None or not all(len(shapes.get(key, ())) == 4 and shapes[key][0] >= 4 for key in heads): return None
  return f"retinanet_{backbone}_fpn" + "_v2" * (p6[0] != p6[1])


def init_rule(key: str, shape: tuple[int, ...]) -> init.Draw:
  """torchvision's initialisation of the detector's tensor `key`."""
  if key.startswith("backbone.body."): return resnet.init_rule(key.removeprefix("backbone.body."), shape)
  if key.startswith("backbone.fpn."): return fpn.init_rule(key, shape)
  if key.endswith("cls_logits.bias"): return init.constant(-math.log((1 - PRIOR) / PRIOR))
  if len(shape) == 4: return init.normal(0.01)
  return init.normalization(key)


def build(name: str, num_classes: int, norm: str | None = None, seed: int = 0) -> RetinaNet:
  """`retinanet_<backbone>_fpn` or `retinanet_<backbone>_fpn_v2`, <backbone> being any key of `resnet.BACKBONES`, initialised from `seed`.

  v2 takes P6 from C5, has group norm in its heads and batch norm in its backbone, where v1 has it frozen; `norm` (a key of `NORMS`) overrides the
  backbone's. A backbone narrower than ResNet-18 gets a pyramid as much narrower, and group norm in its heads, being meant to train from scratch.
  Raises ValueError for another name."""
  backbone = name.removeprefix("retinanet_").removesuffix("_v2").removesuffix("_fpn")
  if not name.startswith(f"retinanet_{backbone}_fpn") or backbone not in resnet.BACKBONES:
    raise ValueError(f"{name!r} is no detector: retinanet_<backbone>_fpn[_v2] with a backbone of {', '.join(resnet.BACKBONES)}")
  v2, (block, layers, options) = name.endswith("_v2"), resnet.BACKBONES[backbone]
  width = options.get("width", 64)
  body = resnet.ResNet(block, layers, None, norm or ("batch" if v2 else "frozen"), **options)
  model = RetinaNet(body, num_classes, channels=min(256, width * 2 if width < 64 else 256), p6_from="c5" if v2 else "p5",
                    head_norm="group" if v2 or width < 64 else None)
  init.initialize(model, init_rule, seed)
  return model
