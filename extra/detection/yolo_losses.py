"""Losses of the YOLO family, in float32. Cells of all levels are the last axis, as the heads give them."""
from typing import NamedTuple
from tinygrad import Tensor, dtypes
from tinygrad.function import function
from tinygrad.uop.ops import UOp
from tinydet.detection import yolo
from tinydet.detection.assigners import targets, task_aligned
from tinydet.detection.boxes import similarity

FACTORS = 100   # of up to 2 each, whose product a float32 can hold


class Recipe(NamedTuple):
  """How a head of sides learns: gains of its terms, kinds of IoU, and task alignment's numbers."""
  box: float = 7.5
  classes: float = 0.5
  sides: float = 1.5            # of the distribution of sides, or of the plain sides' difference where `plain_sides`
  box_kind: str = "ciou"
  match_kind: str = "ciou"      # the assigner's
  topk: int = 10
  alpha: float = 0.5
  beta: float = 6.0
  last_topk: int = 0            # see `assigners.task_aligned`
  smallest: float = 0.0
  varifocal: bool = False
  plain_sides: bool = False     # the mean difference of sides, over the picture's width and height (YOLO26)
  times_batch: bool = True      # the loss is multiplied by the number of pictures


def binary_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
  """Cross-entropy of sigmoid(`logits`) with `wanted` in 0..1, element by element, f32. Its gradient, sigmoid less `wanted`, is given: derived term by
  term it is none at 0."""
  def forward(x: Tensor, y: Tensor) -> Tensor: return x.maximum(0) - x * y + (1 + (-x.abs()).exp()).log()
  return function(forward, grad_fxn=_entropy_gradient)(logits, wanted)


def summed_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
  """The sum of `binary_cross_entropy` of [B,K,N]. The logarithms of up to `FACTORS` classes are that of a product, each factor being 1 to 2: a third
  of the time."""
  def forward(x: Tensor, y: Tensor) -> Tensor:
    factors = 1 + (-x.abs()).exp()
    logs = [factors[:, first:first + FACTORS].prod(1).log().sum() for first in range(0, x.shape[1], FACTORS)]
    return (x.maximum(0) - x * y).sum() + sum(logs[1:], logs[0])
  return function(forward, grad_fxn=_entropy_gradient)(logits, wanted)


def _entropy_gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
  """That of either for its logits: each one's own `grad`, or that of their sum, which is spread."""
  return (Tensor(grad) * (Tensor(call.src[1]).sigmoid() - Tensor(call.src[2]))).uop, None


def varifocal(logits: Tensor, wanted: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
  """Varifocal loss of each logit (Zhang et al. 2021, equation 2): cross-entropy, weighed by `wanted` where that is positive, and by alpha p^gamma
  elsewhere. The weight has a gradient too, as in YOLOv6's own program."""
  weight = (wanted > 0).where(wanted, alpha * logits.sigmoid() ** gamma)
  return binary_cross_entropy(logits, wanted) * weight


def distribution_focal(logits: Tensor, sides: Tensor) -> Tensor:
  """f32 [B,N]: cross-entropy of [B,4,bins,N] logits with the two bins next to each of `sides` [B,4,N], by nearness; the mean of the four (Li et al.
  2020, equation 6)."""
  bins = logits.shape[2]
  near = (1 - (sides.unsqueeze(2) - Tensor.arange(bins).cast(dtypes.float32).reshape(1, 1, bins, 1)).abs()).maximum(0)
  return (logits.logsumexp(2) - (logits * near).sum(2)).mean(1)


def side_losses(box: Tensor, classes: Tensor, boxes: Tensor, labels: Tensor, canvas: tuple[int, int], strides: tuple[int, ...],
                recipe: Recipe) -> dict[str, Tensor]:
  """The terms of a head of sides, each with its gain and over max(1, the sum of what scores are wanted): "box", "classes", "sides".

  Args: `box` [B,4*bins,N], logits of each side's distribution over 0, 1, ... strides, or with one bin the side in strides; `classes` [B,K,N] logits;
  `boxes` f32 [B,M,4] xyxy pixels, `labels` i32 [B,M], -1 for padding; `canvas` height and width."""
  batch, channels, n = box.shape
  bins, num_classes = channels // 4, classes.shape[1]
  (places, steps), box, classes = yolo.cells(canvas, strides), box.float(), classes.float()
  centre = places + 0.5
  sides = box if bins == 1 else yolo.expected_sides(box, bins).contiguous()
  found = ((centre - sides[:, :2]).cat(centre + sides[:, 2:], dim=1)).transpose(1, 2)   # in strides, as their IoUs are taken
  pixels = (found * steps.reshape(1, -1, 1)).detach().contiguous()
  assigned = task_aligned((centre * steps).transpose(0, 1).contiguous(), pixels, classes.detach().sigmoid().transpose(1, 2), boxes, labels,
                          topk=recipe.topk, alpha=recipe.alpha, beta=recipe.beta, kind=recipe.match_kind, last_topk=recipe.last_topk,
                          smallest=recipe.smallest)
  own, scores = targets(assigned, boxes, labels, num_classes)
  total, known = scores.sum().maximum(1).contiguous(), assigned.index >= 0
  wanted = (own / steps.reshape(1, -1, 1)).contiguous()
  # Where nothing is learnt two plain boxes stand in: no gradient comes from there, and none that is not finite.
  there, plain = known.unsqueeze(-1), Tensor.arange(4).cast(dtypes.float32)
  alike = similarity(there.where(found, plain), there.where(wanted, plain * 1.5 - 0.3), recipe.box_kind)
  terms = {"box": ((1 - alike) * assigned.quality).sum() * recipe.box}
  wanted_scores = scores.transpose(1, 2).contiguous()
  terms["classes"] = (varifocal(classes, wanted_scores).sum() if recipe.varifocal else summed_cross_entropy(classes, wanted_scores)) * recipe.classes
  goal = (centre - wanted.transpose(1, 2)[:, :2]).cat(wanted.transpose(1, 2)[:, 2:] - centre, dim=1)
  if bins > 1:
    of_side = distribution_focal(box.reshape(batch, 4, bins, n), goal.clamp(0, bins - 1.01).contiguous())
    terms["sides"] = (of_side * assigned.quality).sum() * recipe.sides
  elif recipe.plain_sides:
    scale = steps.unsqueeze(0) / Tensor.stack(*(Tensor(float(canvas[i])) for i in (1, 0, 1, 0))).reshape(4, 1)
    terms["sides"] = (((sides - goal) * scale).abs().mean(1) * assigned.quality).sum() * recipe.sides
  return {name: term / total for name, term in terms.items()}
