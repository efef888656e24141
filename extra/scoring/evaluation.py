"""From batches of a validation set to COCO's numbers."""
from collections.abc import Callable, Iterable
from typing import Any
import numpy as np
from tinydet.detection.postprocess import Detections, to_original
from tinydet.scoring.coco_metric import CocoMetric


def evaluate(find: Callable[[Any], Detections], batches: Iterable[Any], metric: CocoMetric,
             watch: Callable[[Any, Detections], None] = lambda batch, detections: None) -> CocoMetric:
  """Add to `metric` what `find(batch)` finds on every batch, in pixels of the network input, and return it. `watch(batch, detections)` sees both, to
  draw them, say."""
  for batch in batches:
    watch(batch, detections := find(batch))
    metric.add(to_original(detections, np.maximum(batch.sizes, 1), batch.original_sizes, batch.origins), batch.image_ids)
  return metric
