"""Losses, in float32 whatever the network computes in. `classes` and `matched` come from `matcher.match`."""
from collections.abc import Callable
from tinygrad import Tensor, UOp, dtypes, function
from tinydet.detection.boxes import decode, encode, generalized_iou


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
  """Focal loss of each logit (Lin et al. 2017, equation 5; torchvision `sigmoid_focal_loss`): f32 `logits` and bool `targets` of one shape -> f32.

  Everything is written in z, the logit with its sign turned where the target is False, so that a large z is a confident, right answer: the
  cross-entropy is softplus(-z), and the miss 1 - p_t is sigmoid(-z). The gradient is given in closed form: derived term by term it is a NaN where
  exp(z) overflows."""
  def terms(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = targets.where(logits, -logits)
    e = (-z.abs()).exp()                       # in (0, 1]: nothing overflows
    return targets.where(alpha, 1 - alpha), (z >= 0).where(e, 1.0) / (1 + e), (-z).maximum(0) + (1 + e).log()

  def forward(logits: Tensor, targets: Tensor) -> Tensor:
    weight, miss, cross_entropy = terms(logits, targets)
    return weight * miss ** gamma * cross_entropy

  def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
    logits, targets = (Tensor(u) for u in call.src[1:])
    weight, miss, cross_entropy = terms(logits, targets)
    slope = weight * miss ** gamma * (gamma * (1 - miss) * cross_entropy + miss)        # -d loss / d z
    return ((Tensor(grad) * targets.where(-slope, slope)).uop, None)

  return function(forward, grad_fxn=gradient)(logits, targets)


def l1(deltas: Tensor, matched: Tensor, anchors: Tensor) -> Tensor:
  """Sum over the four coordinates [...] of |deltas - encode(matched)|."""
  return (deltas - encode(matched, anchors)).abs().sum(-1)


def smooth_l1(deltas: Tensor, matched: Tensor, anchors: Tensor, beta: float = 1 / 9) -> Tensor:
  """As `l1`, quadratic below `beta` (Girshick 2015, equation 3)."""
  error = (deltas - encode(matched, anchors)).abs()
  return (error < beta).where(0.5 / beta * error * error, error - 0.5 * beta).sum(-1)


def giou(deltas: Tensor, matched: Tensor, anchors: Tensor) -> Tensor:
  """1 - GIoU [...] of the decoded and the matched boxes (torchvision's RetinaNet v2)."""
  return 1 - generalized_iou(decode(deltas, anchors), matched)


BOX_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"l1": l1, "smooth_l1": smooth_l1, "giou": giou}


def detection_losses(cls_logits: Tensor, bbox_regression: Tensor, anchors: Tensor, classes: Tensor, matched: Tensor,
                     box_loss: str = "l1") -> tuple[Tensor, Tensor]:
  """(classification, bbox_regression), two scalars: each image's sum over max(1, its positives), averaged over the batch.

  As torchvision's `RetinaNetHead.compute_loss`.

  Args: `cls_logits` [B,A,K], `bbox_regression` [B,A,4], `anchors` f32 [A,4], `classes` i32 [B,A], `matched` f32 [B,A,4] xyxy pixels."""
  cls_logits, bbox_regression = cls_logits.cast(dtypes.float32), bbox_regression.cast(dtypes.float32)
  foreground = classes >= 0
  positives = foreground.sum(1).maximum(1).cast(dtypes.float32)
  targets = classes.unsqueeze(-1).eq(Tensor.arange(cls_logits.shape[-1]))
  focal = (classes >= -1).unsqueeze(-1).where(sigmoid_focal_loss(cls_logits, targets), 0).sum((1, 2))
  # An anchor stands in for the box where there is none: its deltas are 0, so no log(0) reaches the gradient.
  boxes = foreground.unsqueeze(-1).where(matched, anchors)
  regression = foreground.where(BOX_LOSSES[box_loss](bbox_regression, boxes, anchors), 0).sum(1)
  return (focal / positives).mean(), (regression / positives).mean()
