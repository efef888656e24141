"""What every program asks of a detector, whatever its network. A family is a file beside this one, with a subclass that says what only it knows."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple
import numpy as np
from tinygrad import Context, Device, Tensor, dtypes
from tinygrad.dtype import DType
from tinydet.datasets.fit import Fit
from tinydet.datasets.transforms import MEAN_GREY
from tinydet.detection import postprocess
from tinydet.errors import UserError
from tinydet.models.preprocess import MEAN, STD, normalize
from tinydet.runtime.devices import to_devices, to_host
from tinydet.runtime.graphs import jit, lock

Canvas = tuple[int, int]       # height and width of the network's input
Outputs = tuple[Tensor, ...]   # what the network gives; only its family knows their meaning


@dataclass(frozen=True)
class Preprocessing:
  """From a picture to what a network expects: how it is placed, what fills the rest, and the mean and deviation that pixels in 0..1 are freed of."""
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  letterbox: bool = False
  centred: bool = False
  fill: tuple[int, ...] = MEAN_GREY


class Predicted(NamedTuple):
  """All candidates of a batch, before any selection, in the order of the network's outputs."""
  boxes: np.ndarray    # f32 [B,N,4] xyxy, pixels of the canvas, not clipped
  scores: np.ndarray   # f32 [B,N,K] in 0..1


class Detector:
  """A network, `network`, with `num_classes` classes, under its builder name `name`, and what training, scoring, explaining and exporting ask of it.

  A family gives `losses`, `candidates`, `features` and `head`, and changes of the rest what is other for it."""
  name: str
  network: Any                                         # its state dict has the official keys
  num_classes: int
  preprocessing: Preprocessing = Preprocessing()
  multiple: ClassVar[int] = 1                          # sides of a canvas are multiples of it
  sigmoid: ClassVar[bool] = True                       # whether the scores of `candidates` are logits
  usual_size: tuple[int, int] | None = None            # (width, height) where weights do not say what they were trained at
  class_names: list[str] | None = None                 # of its published weights
  selection: Mapping[str, Any] = {}                    # its own defaults of `postprocess.select`; None for no suppression at all
  progress: Callable[[], Tensor | float] = staticmethod(lambda: 0.0)   # the share of a training run that is done, on the device
  chosen: np.ndarray | None = None                     # f32 [own classes,K], where it is asked for others than its own (see `choose`)
  _predict: Any = None                                 # what `predict` has captured
  _readers: Mapping[Canvas, Any] = {}                  # what `read` has
  stages: ClassVar[Mapping[str, tuple[str, ...]]] = {} # from the output down: a part's name -> how its tensors' names begin

  def fit(self, size: tuple[int, int], max_size: int = 0) -> Fit:
    """How pictures come to the network at `size` (width, height); UserError where its strides do not divide that."""
    p = self.preprocessing
    if odd := [side for side in (() if max_size else size) if side % self.multiple]:
      near = max(1, round(odd[0] / self.multiple)) * self.multiple
      raise UserError(f"--size {size[0]}x{size[1]}: {self.name} needs sides that are multiples of {self.multiple}, such as {near}")
    return Fit(tuple(size), max_size, p.letterbox, tuple(p.fill), p.centred)

  def prepare(self, images: Tensor, dtype: DType = dtypes.float32) -> Tensor:
    """u8 [B,H,W,3] RGB -> `dtype` [B,3,H,W], what the network takes and then computes in."""
    return normalize(images, dtype, self.preprocessing.mean, self.preprocessing.std)

  def anchor_shapes(self) -> np.ndarray | None:
    """f64 [A,2], (width, height) in pixels of the anchors of all levels; None where there are none to fit."""
    return None

  def fit_anchors(self, shapes: np.ndarray) -> None:
    """Take anchors that suit boxes of `shapes` f64 [N,2], (width, height) in pixels of the canvas."""
    raise NotImplementedError

  def constants(self, canvas: Canvas) -> list[Tensor]:
    """Tensors that outputs of this canvas are read with: made once, before any graph is captured, and placed on all devices."""
    return []

  def features(self, x: Tensor, layer: str = "backbone") -> list[Tensor]:
    """Feature maps [B,C,h,w] of a prepared batch, where heat maps are taken; `layer` is one of `levels`."""
    raise NotImplementedError

  def head(self, features: list[Tensor], layer: str = "backbone") -> Outputs:
    """What the network makes of its `features`."""
    raise NotImplementedError

  def levels(self, layer: str = "backbone") -> dict[str, int]:
    """Names and strides of the levels of `features`."""
    raise NotImplementedError

  def __call__(self, images: Tensor, dtype: DType = dtypes.float32) -> Outputs:
    """The network's outputs for u8 [B,H,W,3] RGB on a canvas."""
    return self.head(self.features(self.prepare(images, dtype)))

  def infer(self, images: Tensor, dtype: DType = dtypes.float32) -> Outputs:
    """As the call, not in training, and every output in memory as float32."""
    with Context(TRAINING=0): return tuple(t.float().contiguous() for t in self(images, dtype))

  def losses(self, outputs: Outputs, boxes: Tensor, labels: Tensor, canvas: Canvas) -> dict[str, Tensor]:
    """Scalars by name, "loss" being the one to descend, given boxes f32 [B,M,4] xyxy pixels and labels i32 [B,M], -1 for padding. Whatever learns
    whatever is decided in here, on the device."""
    raise NotImplementedError

  def candidates(self, outputs: Outputs, canvas: Canvas) -> tuple[Tensor, Tensor]:
    """Scores [B,N,K], logits where `sigmoid`, and boxes [B,N,4] xyxy pixels of the canvas, of all candidates in the official order."""
    raise NotImplementedError

  def detect(self, outputs: Outputs, canvas: Canvas, sizes: np.ndarray, origins: np.ndarray | None = None, hidden: Tensor | None = None,
             **options: Any) -> postprocess.Detections:
    """Detections of a batch, in pixels of the canvas; `sizes` and `origins` int [B,2] tell where the pictures are (see `postprocess.select`, which
    also has the options). `hidden` f32 [K] is added to the logits, -inf for classes not to be found."""
    with lock:   # until all has been read off
      scores, boxes = self.read(outputs, canvas)
      if hidden is not None: scores = scores + hidden if self.sigmoid else (hidden < 0).where(0, scores)
      return postprocess.select(scores, boxes, None, [scores.shape[1]], sizes, origins=origins, sigmoid=self.sigmoid, **self.options(options))

  def read(self, outputs: Outputs, canvas: Canvas) -> tuple[Tensor, Tensor]:
    """`candidates`, captured, for whoever holds `lock`: traced each time they would take longer than a small network."""
    if canvas not in self._readers:
      def contiguous(*outputs: Tensor) -> tuple[Tensor, ...]: return tuple(t.contiguous() for t in self.candidates(outputs, canvas))
      self._readers = {**self._readers, canvas: jit(contiguous)}
    Tensor.realize(*outputs)
    return self._readers[canvas](*outputs)

  def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a selection: `given` ones that are not None, else the detector's own."""
    return {**self.selection, **{key: value for key, value in given.items() if value is not None}}

  def choose(self, labels: Sequence[int | None]) -> None:
    """From now on answer for other classes: number i is class `labels[i]` of its own, or one that it never finds (None)."""
    self.chosen = np.zeros((self.num_classes, len(labels)), np.float32)
    for i, label in enumerate(labels):
      if label is not None: self.chosen[label, i] = 1
    self.num_classes, self._readers = len(labels), {}

  def of_classes(self, scores: Tensor) -> Tensor:
    """Scores [B,N,own classes] in 0..1 as those of the classes asked for, [B,N,K]."""
    if self.chosen is None: return scores
    return scores @ Tensor(self.chosen).to(scores.device)

  def class_scores(self, outputs: Outputs, canvas: Canvas) -> Tensor:
    """What an explanation differentiates: scores or logits [B,N,K] of all candidates."""
    return self.candidates(outputs, canvas)[0]

  def level_of(self, row: int, canvas: Canvas) -> str:
    """The name of the level that candidate `row` belongs to."""
    return ""

  def predict(self, images: np.ndarray) -> Predicted:
    """Boxes and scores of all candidates for u8 [B,H,W,3] RGB, already on a canvas."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
      raise TypeError(f"a batch is u8 [B,H,W,3] RGB, not {images.dtype} {list(images.shape)}")
    self.fit(images.shape[2:0:-1])
    for constant in self.constants(images.shape[1:3]): constant.realize()
    with lock:   # until what was found is copied off
      if self._predict is None: self._predict = jit(self._everything)
      return Predicted(*map(to_host, self._predict(to_devices(images, (Device.DEFAULT,)))))

  def _everything(self, images: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in self.decoded(self.infer(images), images.shape[1:3]))

  def decoded(self, outputs: Outputs, canvas: Canvas) -> tuple[Tensor, Tensor]:
    """Boxes f32 [B,N,4] and scores f32 [B,N,K] in 0..1 of all candidates, as `predict` gives them."""
    scores, boxes = self.candidates(outputs, canvas)
    return boxes.float(), scores.float().sigmoid() if self.sigmoid else scores.float()

  def fold(self) -> None:
    """Make the network faster for good, where there is a way: it computes the same, and is no longer for training."""

  def freeze(self, trainable_layers: int) -> None:
    """Leave the last `trainable_layers` stages of the backbone to learn, and fix the rest."""

  def assume(self, about: Mapping[str, Any]) -> None:
    """Take over, from the metadata of a file whose weights this detector gets, what its outputs mean there."""
    self.assume_input(about)

  def assume_input(self, about: Mapping[str, Any]) -> None:
    """Take over, from the metadata of a file whose weights this detector or its backbone gets, how pictures are prepared for them."""
    given = about.get("input")
    if isinstance(given, dict): self.preprocessing = Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})

  def about(self) -> dict[str, Any]:
    """What a file of its weights should say of it: JSON values."""
    return {"model": self.name, "num_classes": self.num_classes, "input": asdict(self.preprocessing)}

  def init_rule(self, key: str, shape: tuple[int, ...]) -> Any:
    """How the tensor `key` is drawn anew (`nn.init.Draw`)."""
    raise NotImplementedError
