"""Detection in one call: pictures in, boxes with scores and class names out."""
import functools, time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
import numpy as np
from PIL import Image, ImageOps
from tinygrad import Device, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.datasets.fit import Fit
from tinydet.datasets.image import opened, to_rgb
from tinydet.detection import looks, postprocess, tiles
from tinydet.detectors import open_detector
from tinydet.errors import UserError
from tinydet.runtime.device import require_device
from tinydet.runtime.devices import devices, replicate, to_devices
from tinydet.runtime.graphs import jit, lock
from tinydet.runtime.precision import DTYPES

LONGEST_QUEUE = 3   # batches of pictures that may wait for one before them
TILES_NMS = 0.5     # IoU above which boxes of neighbouring tiles are taken for one, unless a threshold is given
READERS = 2   # threads that read and resize pictures while the network computes; Pillow does both without holding Python's lock
Item = TypeVar("Item")


class Found(NamedTuple):
  """What a detector finds on one picture, best first; plain arrays."""
  boxes: np.ndarray    # f32 [N,4] xyxy in pixels of the picture
  scores: np.ndarray   # f32 [N] in 0..1
  labels: np.ndarray   # i32 [N], places in the detector's class_names
  names: list[str]     # N, the class of each box


def detect(images: Any, weights: str | Path = "coco", *, classes: Sequence[str] | None = None, score_threshold: float = 0.3,
           nms_threshold: float | None = None, max_detections: int = 300, tile: int | tuple[int, int] | None = None, overlap: float = 0.2,
           **network: Any) -> list[Found]:
  """Find objects on pictures: `for box, score, name in zip(found.boxes, found.scores, found.names)` for each `found` of the list returned.

  Args:
    images: a picture or a list of them, of any sizes: a path, a Pillow image, or an array u8 [H,W,3] RGB. Paths and Pillow images are turned upright
      where their EXIF data says how, and the boxes belong to the upright picture.
    weights: what `--weights` takes: coco, mlperf, shapes, a file, or the folder of a run. The network is built at the first call and kept.
    classes: find only these, by name.
    score_threshold, nms_threshold, max_detections: as in `postprocess.select`; the second is by default the detector's own.
    tile, overlap: for small objects on large pictures, look at overlapping tiles of so many pixels too (see `Predictor.stream`).
    network: `size`, `max_size`, `batch_size`, `variant`, `gpus`, `dtype`, `tta` (see `Predictor`); other values build another network.
  Raises UserError for a picture or weights that cannot be read, and for a class that the weights do not know.
  """
  one = isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4)
  found = predictor(weights, **network).stream(
    [images] if one else images, read_picture, classes=classes, score_threshold=score_threshold, nms_threshold=nms_threshold,
    max_detections=max_detections, tile=(tile, tile) if isinstance(tile, int) else tile, overlap=overlap)
  return [result for _, _, result in found]


def predictor(weights: str | Path, **network: Any) -> "Predictor":
  """The `Predictor` of these weights; asked again, the same one, ready to run, unless the file has changed since."""
  path = Path(weights)
  files = [path, *path.glob("*.safetensors")] if path.is_dir() else [path] * path.is_file()
  network = Predictor.__init__.__kwdefaults__ | network
  hashable = {key: tuple(value) if isinstance(value, list) else value for key, value in network.items()}
  with lock:   # threads that ask for the same one share it
    return _predictor(str(weights), tuple(sorted((str(f), f.stat().st_mtime_ns) for f in files)), **hashable)


@functools.lru_cache(maxsize=2)
def _predictor(weights: str, state: tuple, **network: Any) -> "Predictor":
  return Predictor(weights, **network)


def read_picture(image: Any) -> np.ndarray:
  """u8 [H,W,3] RGB of a path, a Pillow image or such an array, upright; UserError names a file that cannot be read."""
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
      raise TypeError(f"a picture as an array is u8 [H,W,3] RGB, not {image.dtype} {list(image.shape)}")
    return image
  if isinstance(image, Image.Image): return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
  try:
    with opened(image) as picture: return np.asarray(to_rgb(ImageOps.exif_transpose(picture)))
  except Exception as e:   # decoders raise almost anything on broken files
    raise UserError(f"{image}: cannot be read as a picture ({type(e).__name__}: {e})") from e


class Predictor:
  """A detector ready to use, and what is known of it: `detector` itself, class_names and category_ids in label order, `fit`, how pictures come to it,
  notes for the user, and `about` (see `detectors.open_detector`).

  Args:
    weights: what `--weights` takes (see `detectors.open_detector`); variant is which of torchvision's networks "coco" is, v1 or v2.
    size, max_size: (width, height) or one side in pixels, and the longer side at most, as in training; by default what the weights were trained at.
    class_names: the classes of a data set, to which the detector's own are matched by name.
    batch_size: pictures that go through the network together, divided among `gpus` devices; dtype is what it computes in.
    tta: look at each picture mirrored too (flip), and larger too (scales), and join what is found (see `detection.looks`).
    fold: make the network faster (see `Detector.fold`), unless its tensors are asked for by name.
  Raises UserError.
  """
  def __init__(self, weights: str, *, variant: str = "v1", size: int | tuple[int, int] | None = None, max_size: int | None = None,
               class_names: Sequence[str] | None = None, batch_size: int = 1, gpus: int = 1, dtype: str = "float32", fold: bool = True,
               tta: str = "none"):
    require_device()
    self.devices, self.batch_size, self.dtype = devices(gpus), batch_size, DTYPES[dtype]
    if batch_size % gpus: raise UserError(f"--bs {batch_size}: is not a multiple of --gpus {gpus}")
    self.detector, self.about, self.notes = open_detector(weights, variant, None if class_names is None else list(class_names))
    if fold: self.detector.fold()
    self.class_names = self.about.get("class_names") or [f"class {label}" for label in range(self.detector.num_classes)]
    self.category_ids = self.about.get("category_ids") or list(range(1, self.detector.num_classes + 1))
    trained_at = self.about.get("size")
    if size is None and trained_at is None: raise UserError(f"{self.about['weights']}: does not say what size it was trained at; give --size")
    size = tuple(trained_at) if size is None else (size, size) if isinstance(size, int) else size
    self.fit = self.detector.fit(size, self.about.get("max_size", 0) if max_size is None else max_size)
    self.tta = tta
    self._compiled: set[tuple[int, int]] = set()
    replicate([*get_state_dict(self.detector.network).values()], self.devices)
    self._forward = jit(lambda images: self.detector.infer(images, self.dtype))

  def place(self, canvases: Iterable[tuple[int, int]]) -> None:
    """Make what reading outputs of these canvases (height, width) takes, on all devices."""
    for canvas in canvases: replicate(self.detector.constants(canvas), self.devices)

  def find(self, images: np.ndarray, sizes: np.ndarray, origins: np.ndarray, seconds: Counter | None = None, hidden: Tensor | None = None,
           **options: Any) -> postprocess.Detections:
    """As `_find`, after as many looks as `tta` says."""
    if self.tta == "none": return self._find(images, sizes, origins, seconds, hidden, **options)
    found, boxes, canvas = [], [], images.shape[1:3]
    for scale, mirrored in looks.LOOKS[self.tta]:
      seen = looks.look(images, sizes, origins, scale, mirrored)
      found.append(self._find(*seen, seconds, hidden, **options))
      boxes.append(looks.back(found[-1], seen[0].shape[1:3], canvas, mirrored))
    chosen = self.detector.options(options)
    return looks.join(found, boxes, chosen.get("score_threshold", 0.05), chosen.get("max_detections", 300))

  def _find(self, images: np.ndarray, sizes: np.ndarray, origins: np.ndarray, seconds: Counter | None = None, hidden: Tensor | None = None,
            **options: Any) -> postprocess.Detections:
    """What is found on a batch u8 [batch_size,H,W,3] of canvases, in their pixels; `sizes` and `origins` int [batch_size,2] tell where the pictures
    are. `hidden` and `options` are those of `Detector.detect`; `seconds` collects time as for `stream`."""
    canvas, seconds = images.shape[1:3], Counter() if seconds is None else seconds
    with lock:   # the device's memory is this thread's, until what was found is copied off
      kind, begun = "network" if canvas in self._compiled else "compiling", time.monotonic()
      if canvas not in self._compiled: self.place([canvas])
      self._compiled.add(canvas)
      outputs = self._forward(to_devices(images, self.devices))
      for name in self.devices: Device[name].synchronize()
      seconds[kind] += (done := time.monotonic()) - begun
      found = self.detector.detect(outputs, canvas, sizes, origins, hidden, **options)
      seconds["post-processing"] += time.monotonic() - done
    return found

  def stream(self, items: Iterable[Item], load: Callable[[Item], np.ndarray | None], *, classes: Sequence[str] | None = None,
             score_threshold: float = 0.05, nms_threshold: float | None = None, max_detections: int = 300, tile: tuple[int, int] | None = None,
             overlap: float = 0.2, seconds: Counter | None = None) -> Iterator[tuple[Item, np.ndarray | None, Found]]:
    """Yield `(item, picture, found)` for each of `items` in their order, as soon as it is known.

    `load(item)` gives the picture, u8 [H,W,3] RGB, or None for one to pass over; it runs in other threads, a batch ahead. With `tile` (width, height)
    a larger picture is looked at whole and in tiles of so many pixels, of which neighbours share `overlap` (see `detection.tiles`); take tiles in the
    proportions that the network was trained at. `seconds` collects the time spent in "reading" (of all threads together), "network" and
    "post-processing", and in "compiling", the detector's first batch of each canvas. The other options are those of `detect`."""
    seconds = Counter() if seconds is None else seconds
    hidden = None if classes is None else np.full(len(self.class_names), -np.inf, np.float32)   # added to the logits
    if hidden is not None: hidden[self.labels_of(classes)] = 0
    hidden = None if hidden is None else Tensor(hidden)
    options = {"score_threshold": score_threshold, "nms_threshold": nms_threshold, "max_detections": max_detections}
    waiting: deque[_Picture] = deque()
    views: dict[tuple[int, int], list[tuple[_Picture, int]]] = {canvas: [] for canvas in self.fit.canvases()}

    def run(canvas: tuple[int, int]) -> None:
      """Put up to a batch of the views of a canvas through the network and hand the results to their pictures."""
      batch, views[canvas] = views[canvas][:self.batch_size], views[canvas][self.batch_size:]
      samples = [picture.samples[v] for picture, v in batch]
      images = np.zeros((self.batch_size, *canvas, 3), np.uint8)
      sizes = np.full((self.batch_size, 2), canvas, np.int32)
      originals, origins = sizes.copy(), np.zeros_like(sizes)
      for row, sample in enumerate(samples):
        images[row], sizes[row], originals[row], origins[row] = sample.image, sample.content_size, sample.original_size, sample.origin
      found = self.find(images, sizes, origins, seconds, hidden, **options)
      found = postprocess.to_original(found, np.maximum(sizes, 1), originals, origins)
      for row, (picture, v) in enumerate(batch):
        n = found.counts[row]
        picture.found[v], picture.samples[v] = (found.boxes[row, :n], found.scores[row, :n], found.labels[row, :n]), None

    def ready() -> Iterator[tuple[Item, np.ndarray | None, Found]]:
      while waiting and None not in waiting[0].found:
        picture, begun = waiting.popleft(), time.monotonic()
        found = picture.join(TILES_NMS if nms_threshold is None else nms_threshold, max_detections)
        seconds["post-processing"] += time.monotonic() - begun
        yield picture.item, picture.image, Found(*found, [self.class_names[label] for label in found[2]])

    with ThreadPoolExecutor(READERS) as pool:
      for picture in _ahead(pool, lambda item: _Picture(item, load, self.fit, tile, overlap), items, self.batch_size + READERS):
        seconds["reading"] += picture.seconds
        waiting.append(picture)
        for v, sample in enumerate(picture.samples): views[sample.image.shape[:2]].append((picture, v))
        # Results come in order, so a picture of a rare canvas does not wait for long until its batch is full.
        late = len(waiting) > LONGEST_QUEUE * self.batch_size
        for canvas in self.fit.canvases():
          while len(views[canvas]) >= (1 if late else self.batch_size): run(canvas)
        yield from ready()
      for canvas in self.fit.canvases():
        while views[canvas]: run(canvas)
      yield from ready()

  def labels_of(self, classes: Sequence[str]) -> list[int]:
    """The labels of classes by name; UserError where one is unknown."""
    wanted, known = {name.strip().lower() for name in classes}, [name.strip().lower() for name in self.class_names]
    if unknown := sorted(wanted.difference(known)):
      raise UserError(f"--classes: {self.about['weights']} does not know {', '.join(unknown)}; it knows {', '.join(self.class_names)}")
    return [label for label, name in enumerate(known) if name in wanted]


class _Picture:
  """A picture on its way: its windows, each prepared for the network, and what was found in them."""
  def __init__(self, item: Any, load: Callable, fit: Fit, tile: tuple[int, int] | None, overlap: float):
    begun = time.monotonic()
    self.item, self.image = item, load(item)
    self.windows = np.zeros((0, 4), np.int32) if self.image is None else tiles.windows(*self.image.shape[:2], tile, overlap)
    self.samples = [fit.place(self.image[y1:y2, x1:x2]) for x1, y1, x2, y2 in self.windows]
    self.found: list[tuple[np.ndarray, ...] | None] = [None] * len(self.windows)
    self.seconds = time.monotonic() - begun

  def join(self, nms_threshold: float, max_detections: int) -> tuple[np.ndarray, ...]:
    """Boxes, scores and labels in the whole picture."""
    if self.image is None: return np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    if len(self.windows) == 1: return self.found[0]
    boxes = np.concatenate([found[0] + np.tile(window[:2], 2).astype(np.float32) for found, window in zip(self.found, self.windows)])
    scores, labels = (np.concatenate([found[i] for found in self.found]) for i in (1, 2))
    window = np.repeat(self.windows, [len(found[1]) for found in self.found], axis=0)
    return tuple(x[:max_detections] for x in tiles.merge(boxes, scores, labels, window, *self.image.shape[:2], nms_threshold))


def _ahead(pool: ThreadPoolExecutor, function: Callable[[Item], Any], items: Iterable[Item], count: int) -> Iterator[Any]:
  """`map(function, items)` in the pool's threads, `count` items ahead."""
  running: deque = deque()
  try:
    for item in items:
      running.append(pool.submit(function, item))
      if len(running) > count: yield running.popleft().result()
    while running: yield running.popleft().result()
  finally:
    for future in running: future.cancel()
