"""Assignment: which anchor learns which box. It runs on the device, inside the jitted step, so only boxes and labels cross from the host."""
from tinygrad import Tensor, dtypes
from tinydet.detection.boxes import iou

FOREGROUND, BACKGROUND = 0.5, 0.4  # IoU at and above which an anchor learns a box, and below which it learns background


def match(anchors: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
  """Assign each anchor the box it overlaps most (Lin et al. 2017, section 4; torchvision `Matcher(0.5, 0.4, allow_low_quality_matches=True)`).

  Args: `anchors` f32 [A,4]; `boxes` f32 [B,M,4] xyxy pixels; `labels` i32 [B,M], -1 where the box is padding (its coordinates are ignored).
  Returns: `classes` i32 [B,A], the label to learn, -1 for background, -2 for an IoU in between, which no loss counts;
  `matched` f32 [B,A,4], the box to learn where classes >= 0 (elsewhere the best overlapping one, or zeros).

  A box that no anchor overlaps by half still claims its best anchors (all that tie), so that it is learnt at all. Unlike torchvision's, a box
  that overlaps no anchor claims none, rather than all of them."""
  valid = (labels >= 0).unsqueeze(-1)
  # Kept in memory: an anchor claims a box where its IoU *equals* the maximum, which holds only if both sides read the same rounded number.
  overlap = valid.where(iou(boxes, anchors), -1.0).contiguous()                                     # [B,M,A]
  best, nearest = overlap.max(1, keepdim=True), overlap.max(2, keepdim=True)                        # [B,1,A] and [B,M,1]
  box_index = Tensor.arange(boxes.shape[1]).reshape(1, -1, 1)
  chosen = box_index.eq((overlap.eq(best)).where(box_index, boxes.shape[1]).min(1, keepdim=True))   # [B,M,A], one box (the first) per anchor
  claimed = (overlap.eq(nearest) & (nearest > 0)).any(1)
  foreground, background = (best.squeeze(1) >= FOREGROUND) | claimed, best.squeeze(1) < BACKGROUND
  label = chosen.where(labels.unsqueeze(-1), 0).sum(1)
  classes = foreground.where(label, background.where(-1, -2)).cast(dtypes.int)
  matched = chosen.unsqueeze(-1).where(boxes.unsqueeze(2), 0).sum(1)
  return classes.contiguous(), matched.contiguous()
