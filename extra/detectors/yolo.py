"""The YOLO family as a detector: a network, and what only its family knows of pictures, outputs and detections."""
from collections.abc import Iterable
from typing import Any, NamedTuple
import numpy as np
from tinygrad import Context, Tensor, dtypes
from tinygrad.dtype import DType
from tinydet.class_names import COCO80
from tinydet.detection import yolo as decoding
from tinydet.detection.postprocess import Detections
from tinydet.models import yolo
from tinydet.models.fold import fold
from tinydet.models.yolo import recognise   # noqa: F401 of this family
from tinydet.runtime.graphs import jit

FILL = 114   # grey of what a letterboxed picture does not cover


class Candidates(NamedTuple):
  """All that a network proposes: boxes f32 [B,N,4] xyxy in pixels of the canvas, scores f32 [B,N,K]; numpy arrays."""
  boxes: np.ndarray
  scores: np.ndarray


class Yolo:
  """A network of the family, ready to run. `network` has the official files' tensors until `fold` is called; `facts` say how its outputs decode,
  `letterbox` and `FILL` how a picture comes into the canvas, whose sides are multiples of `stride`."""
  def __init__(self, name: str, network: Any, num_classes: int, class_names: list[str] | None = None):
    self.name, self.network, self.num_classes, self.facts = name, network, num_classes, yolo.facts(name)
    self.class_names = class_names or (list(COCO80) if num_classes == 80 else [f"class {i}" for i in range(num_classes)])
    self.stride, self.letterbox = self.facts.strides[-1], self.facts.letterbox
    self._predict = jit(self._everything)

  def prepare(self, images: Tensor, dtype: DType = dtypes.float32) -> Tensor:
    """u8 [B,H,W,3] RGB -> `dtype` [B,3,H,W] in 0..1. Not laid out in memory: the first convolution alone reads it."""
    return (images.permute(0, 3, 1, 2).cast(dtypes.float32) * (1 / 255)).cast(dtype)

  def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
    """What `prepare` gave, sides multiples of `stride`, through the network: a tuple of f32 tensors (see the network's head)."""
    return self.network(x)

  def candidates(self, outputs: tuple[Tensor, ...], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes f32 [B,N,4] xyxy in pixels of the canvas (height, width) and scores f32 [B,N,K] of all candidates of the head that detects."""
    known = self.facts
    if known.decode != "sides":
      boxes, _, scores = decoding.decode_anchors(outputs, self.anchors(), known.strides, known.scale_xy or None)
      return boxes, scores
    box, classes = outputs[-2:] if known.end2end else outputs[:2]
    sides = box if known.bins == 1 else decoding.expected_sides(box, known.bins)
    return decoding.decode_sides(sides, canvas, known.strides), classes.sigmoid().transpose(1, 2)

  def anchors(self) -> Tensor:
    """w, h in pixels f32 [levels,3,2]: the file's own where it has some. Of constants, as a captured graph has no host to ask."""
    def numbers(values: Iterable[float]) -> Tensor: return Tensor.stack(*(Tensor(float(v)) for v in values))
    head = self.network.model[-1]
    if not hasattr(head, "anchors"): return numbers(v for level in self.facts.anchors for v in level).reshape(-1, 3, 2)
    return head.anchors.float() * numbers(self.facts.strides).reshape(-1, 1, 1)

  def detect(self, outputs: tuple[Tensor, ...], canvas: tuple[int, int], *, score_threshold: float = 0.25, nms_threshold: float | None = None,
             max_detections: int = 300) -> Detections:
    """Detections of a batch (see `detection.yolo.select`); by default NMS as the family's own programs do it, and none for a one-to-one head."""
    boxes, scores = self.candidates(outputs, canvas)
    threshold = None if self.facts.end2end else self.facts.nms if nms_threshold is None else nms_threshold
    return decoding.select(boxes, scores, score_threshold=score_threshold, nms_threshold=threshold, max_detections=max_detections)

  def _everything(self, images: Tensor) -> tuple[Tensor, Tensor]:
    with Context(TRAINING=0):
      boxes, scores = self.candidates(self(self.prepare(images)), images.shape[1:3])
    return boxes.contiguous(), scores.contiguous()

  def predict(self, images: np.ndarray) -> Candidates:
    """All candidates on pictures u8 [B,H,W,3] RGB that are on the canvas already."""
    check_canvas(images.shape[1:3], self.stride)
    return Candidates(*(t.numpy() for t in self._predict(Tensor(np.ascontiguousarray(images)).realize())))

  def fold(self) -> "Yolo":
    """Make the network faster for good: norms and branches become part of convolutions (see `tinydet.models.fold`). Returns the detector."""
    fold(self.network)
    self._predict = jit(self._everything)
    return self


def check_canvas(canvas: tuple[int, int], stride: int) -> None:
  """ValueError unless both sides are multiples of `stride`."""
  if any(side % stride or not side for side in canvas):
    raise ValueError(f"a canvas of {canvas[1]}x{canvas[0]} has a side that is no multiple of {stride}")


def build(name: str, num_classes: int = 80, class_names: list[str] | None = None, seed: int = 0) -> Yolo:
  """The detector `name`, one of `models.yolo.NAMES`, initialised from `seed`. Raises ValueError for another name."""
  return Yolo(name, yolo.build(name, num_classes, seed), num_classes, class_names)
