"""From batches of a validation set to COCO's numbers."""
from typing import Any
from collections.abc import Callable, Iterable, Mapping
import numpy as np
from tinygrad import Tensor
from tinydet.detection.anchors import level_sizes
from tinydet.scoring.coco_metric import CocoMetric
from tinydet.detection.postprocess import Detections, detect, to_original


def evaluate(predict: Callable[[Any], tuple[Tensor, Tensor]], batches: Iterable[Any], anchors: Mapping[tuple[int, int], Tensor],
             metric: CocoMetric, watch: Callable[[Any, Detections], None] = lambda batch, detections: None, **options: Any) -> CocoMetric:
  """Add to `metric` what a detector finds on every batch, and return it.

  Args: `predict(batch) -> (cls_logits [B,A,K], bbox_regression [B,A,4])`; `anchors` has those of each batch's canvas (height, width), f32 [A,4]
  xyxy pixels of the network input;
  `watch(batch, detections)` sees the detections in pixels of the network input (to draw them, say); `options` go to `postprocess.detect`."""
  for batch in batches:
    canvas = batch.images.shape[1:3]
    detections = detect(*predict(batch), anchors[canvas], level_sizes(*canvas), batch.sizes, **options)
    watch(batch, detections)
    metric.add(to_original(detections, np.maximum(batch.sizes, 1), batch.original_sizes), batch.image_ids)
  return metric
