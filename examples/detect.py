"""Find objects on pictures, in videos and before a camera, with any weights.

  python examples/detect.py photos/ more/*.jpg --weights coco
  python examples/detect.py clip.mp4 --weights runs/mine --classes cat,dog
  python examples/detect.py webcam --weights coco
  python examples/detect.py --data path/to/folder --weights runs/mine

Pictures with boxes go to a new folder, --out, with detections.json (COCO's result format), images.json (what its ids stand for) and detections.csv.
With --data the pictures are a data set's and the ids its own, so that evaluate.py --from-json can score detections.json. With nothing at all it shows
the small detector that ships with the code on embedded pictures. Videos and cameras need PyAV (pip install av)."""
import csv, io, itertools, json, os, shutil, signal, sys, threading, time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tinydet.runtime.device import require_device
from tinydet.errors import UserError, exit_on_user_error
from tinydet.config import named_sources, option, parse, show_size, size as parse_size, split_words
import numpy as np
from PIL import Image
from tinydet.datasets import named
from tinydet.datasets.files import expand, left_unread
from tinydet.detection.looks import LOOKS
from tinydet.datasets.video import Video, VideoWriter, pixels, require_av
from tinydet.predict import Found, Predictor, predictor, read_picture
from tinydet.weights import checkpoint
from tinydet.reporting.pictures import draw_boxes
from tinydet.runtime.precision import DTYPES
from tinydet.reporting.tracking import duration

# ---------------------------------------------------------------------------------------------------------------------------- configuration

def words(text: str) -> tuple[str, ...]:
  """Parse "cat, dog"; ValueError where nothing is named."""
  if not (parts := tuple(part.strip() for part in text.split(",") if part.strip())): raise ValueError("expected one or more, separated by commas")
  return parts


@dataclass
class Config:
  source: tuple | None = option(None, "files, folders and patterns such as 'photos/*.jpg', separated by commas, webcam or a camera's number; "
                                "also without the flag, separated by spaces", parse=words, show=",".join, group="data")
  data: str | None = option(None, "a data set, as in training, whose pictures and ids to take; of coco and openimages-mlperf --split is downloaded "
                            "on first use", group="data")
  data_dir: str | None = option(None, "where the data sets that are downloaded lie; by default the user's cache folder", group="data")
  split: str = option("val", "part of it", choices=("train", "val"), group="data")
  images: int | str = option(0, "a number: use only the first so many pictures, 0 uses all; a folder: where the data set's pictures lie",
                             parse=named.images, group="data")
  val_share: float | None = option(None, "share that is val, by a hash of the names, where the data does not say which; by default as the weights' "
                                   "run had it", minimum=0.01, maximum=0.9, group="data")
  size: tuple | None = option(None, "pixels the network sees: 800, or width x height as 192x144; by default what the weights were trained with",
                              parse=parse_size, show=show_size, group="data")
  max_size: int | None = option(None, "keep the aspect ratio, the longer side at most this; 0 resizes to --size exactly", minimum=0, group="data")
  tile: tuple | None = option(None, "for small objects on large pictures: look at tiles of so many pixels too, 640 or 640x480", parse=parse_size,
                              show=show_size, group="data")
  overlap: float = option(0.2, "share of a tile that its neighbour sees too", minimum=0, maximum=0.9, group="data")

  weights: str = option("coco", "shapes (ships with the code), coco, mlperf, a .safetensors or .pth file, or the folder of a run", group="model")
  variant: str = option("v1", "which of torchvision's networks --weights coco is: RetinaNet v1 or v2, or FCOS", choices=("v1", "v2", "fcos"),
                       group="model")
  classes: tuple | None = option(None, "find only these, as cat,dog", parse=words, show=",".join, group="model")
  score_threshold: float = option(0.05, "drop detections that score less", minimum=0, maximum=1, group="model")
  nms_threshold: float | None = option(None, "drop detections that overlap a better one of their class with an IoU above this; by default the "
                                       "detector's own", minimum=0, maximum=1, group="model")
  max_detections: int = option(300, "most detections a picture", minimum=1, group="model")
  tta: str = option("none", "look at each picture more than once and join what is found: flip, mirrored, twice as slow; scales, larger too, which "
                    "finds more small objects, five times as slow", choices=tuple(LOOKS), group="model")
  dtype: str = option("float32", "what the network computes in", choices=tuple(DTYPES), group="model")
  bs: int = option(8, "pictures a step, over all devices", minimum=1, group="model")
  gpus: int = option(1, "devices to divide the batch among", minimum=1, group="model")

  draw_threshold: float = option(0.3, "draw and count detections that score at least this", minimum=0, maximum=1, group="results")
  out: str = option("detections", "folder to make; a number is appended where it is taken", group="results")


PRESETS = {"demo": {"data": "shapes:1", "weights": "shapes", "images": 16}}   # where nothing says what to look at


# ---------------------------------------------------------------------------------------------------------------------------- what to look at

@dataclass
class Picture:
  name: str                          # file, or the data set's name for it
  id: int
  load: Callable[[], np.ndarray]
  error: str | None = None


# ---------------------------------------------------------------------------------------------------------------------------- results

class Results:
  """What was found: written to the folder as it comes, and counted."""
  def __init__(self, folder: Path, detector: Predictor, draw_threshold: float, files: ExitStack):
    self.folder, self.detector, self.draw_threshold, self.images, self.total = folder, detector, draw_threshold, [], 0
    self.counts, self.pictures, self.scores = Counter(), Counter(), Counter()
    self.taken: set[str] = set()
    self.json, self.csv = (files.enter_context(checkpoint.whole_file(folder / f"detections.{suffix}")) for suffix in ("json", "csv"))
    self.json.write(b"[")
    self._row("file", "class", "score", "x1", "y1", "x2", "y2", "frame")

  def path_for(self, name: str, suffixes: tuple[str, ...]) -> Path:
    """A new file of the folder for the picture or video `name`: called as it is, with the first of `suffixes` where its own is not among them."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    if suffix.lower() not in suffixes: suffix = suffixes[0]
    for number in itertools.count(1):
      candidate = f"{stem}{f'-{number}' if number > 1 else ''}{suffix}"
      if candidate.lower() not in self.taken: break   # names that differ in case only are one file on some systems
    self.taken.add(candidate.lower())
    return self.folder / candidate

  def add(self, image_id: int, file: str, drawn: Path, image: np.ndarray, found: Found, frame: int | None = None) -> Found:
    """Take what was found on a picture or frame; returns the part of it that is sure enough to be drawn."""
    about = {"id": image_id, "file_name": file, "height": image.shape[0], "width": image.shape[1], "drawn": drawn.name}
    self.images.append(about if frame is None else about | {"frame": frame})
    boxes, scores, ids = found.boxes.astype(np.float64).tolist(), found.scores.tolist(), self.detector.category_ids
    for (x1, y1, x2, y2), score, label, name in zip(boxes, scores, found.labels, found.names):
      entry = {"image_id": image_id, "category_id": ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
      self.json.write((b", " if self.total else b"") + json.dumps(entry).encode())
      self._row(file, name, f"{score:.4f}", *(f"{x:.2f}" for x in (x1, y1, x2, y2)), "" if frame is None else frame)
      self.total += 1
    sure = Found(*(part[:(found.scores >= np.float32(self.draw_threshold)).sum()] for part in found))
    self.counts.update(sure.names)
    self.pictures.update(set(sure.names))
    for name, score in zip(sure.names, scores): self.scores[name] += score
    return sure

  def draw(self, image: np.ndarray, found: Found, **options: int) -> np.ndarray:
    return draw_boxes(image, found.boxes, found.labels, found.scores, self.detector.class_names, **options)

  def finish(self) -> None:
    self.json.write(b"]")
    categories = [{"id": i, "name": name} for i, name in zip(self.detector.category_ids, self.detector.class_names)]
    with checkpoint.whole_file(self.folder / "images.json") as f: f.write(json.dumps({"images": self.images, "categories": categories}).encode())

  def table(self) -> str:
    if not self.counts: return f"nothing scores {self.draw_threshold:g} or more"
    rows = [f"{name:24} {n:7} {self.pictures[name]:9} {self.scores[name] / n:11.2f}" for name, n in self.counts.most_common()]
    return "\n".join([f"{'class':24} {'found':>7} {'pictures':>9} {'mean score':>11}   of {self.draw_threshold:g} or more", *rows])

  def _row(self, *values: object) -> None:
    csv.writer(text := io.StringIO()).writerow(values)
    self.csv.write(text.getvalue().encode("utf-8", "backslashreplace"))   # names of files need not be UTF-8


def warn(message: str) -> int:
  print(f"warning: {message}", file=sys.stderr, flush=True)
  return 0


class Bar:
  """Progress: one line rewritten in place on a terminal, a line every ten seconds elsewhere. `total` is 0 where it is not known."""
  def __init__(self, what: str, total: int):
    self.what, self.total, self.terminal, self.shown = what, total, sys.stderr.isatty(), False
    self.printed, self.first = time.monotonic(), None

  def update(self, done: int) -> None:
    now, line, full = time.monotonic(), f"{self.what}: {done}", ""
    if self.first is None: self.first = now, done   # the first batch compiles
    if not self.terminal and now - self.printed < 10: return
    self.printed, (begun, before) = now, self.first
    if self.total >= done: line, full = f"{line}/{self.total}", f"[{'#' * (20 * done // self.total):.<20}] "
    if now - begun > 1:
      speed = (done - before) / (now - begun)
      line += f"  {speed:.1f} images/s" + (f"  {duration((self.total - done) / speed)} left" if full else "")
    if not self.terminal: return print(line, flush=True)
    columns, self.shown = shutil.get_terminal_size().columns - 1, True
    print("\r" + (full + line)[:columns].ljust(columns), end="", file=sys.stderr, flush=True)

  def warn(self, message: str) -> None:
    self.close()
    warn(message)

  def close(self) -> None:
    if self.shown: print(file=sys.stderr)
    self.shown = False


# ---------------------------------------------------------------------------------------------------------------------------- pictures

def look_at_pictures(pictures: list[Picture], stream: Callable, results: Results, seconds: Counter) -> int:
  """Detect on each picture and save it with its boxes; returns how many could be read."""
  bar, read = Bar("pictures", len(pictures)), 0

  def load(picture: Picture) -> np.ndarray | None:
    try: return picture.load()
    except UserError as e: picture.error = str(e)
    return None

  def save(path: Path, image: np.ndarray, found: Found) -> float:
    begun = time.monotonic()
    drawn = Image.fromarray(results.draw(image, found))
    try: drawn.save(path, quality=92)
    except OSError as e: raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    return time.monotonic() - begun

  saving: deque = deque()
  with ThreadPoolExecutor(2) as pool:
    for n, (picture, image, found) in enumerate(stream(pictures, load), 1):
      if image is None: bar.warn(f"passed over: {picture.error}")
      else:
        read += 1
        path = results.path_for(picture.name, (".jpg", ".jpeg", ".png", ".webp"))
        saving.append(pool.submit(save, path, image, results.add(picture.id, picture.name, path, image, found)))
        if len(saving) > 8: seconds["drawing"] += saving.popleft().result()
      bar.update(n)
    for future in saving: seconds["drawing"] += future.result()
  bar.close()
  return read


# ---------------------------------------------------------------------------------------------------------------------------- videos

def look_at_video(source: Path | int, first_id: int, most: int, stream: Callable, results: Results, seconds: Counter) -> int:
  """Detect on each frame, at most `most` where that is not 0, and save the video with its boxes, at its own frame rate and size; returns how many
  frames could be read. `source` is a file or the number of a camera."""
  try: video = Video(source)
  except UserError as e: return warn(f"passed over: {e}")
  if video.has_sound: print(f"note: {video.name}: its sound is not kept")
  path, writer, done = results.path_for("webcam" if isinstance(source, int) else video.name, (".mp4",)), None, 0
  bar = Bar(video.name, min(most or video.frames_expected, video.frames_expected))

  def frames() -> Iterator:
    try: yield from itertools.islice(video.frames(), most or None)
    except UserError as e: bar.warn(f"{e}; its last frames are missing")

  try:
    for frame, image, found in stream(frames(), pixels):
      if writer is None: writer = VideoWriter(path, *image.shape[:2], video.rate, video.time_base)
      sure, begun = results.add(first_id + done, video.name, path, image, found, done), time.monotonic()
      writer.write(results.draw(image, sure, at_least=1), frame.pts)
      seconds["drawing"] += time.monotonic() - begun
      bar.update(done := done + 1)
    bar.close()
    if writer is not None: writer.finish()
  except BaseException:
    if writer is not None: writer.abandon()
    raise
  finally: video.close()
  return done or warn(f"passed over: {video.name}: no frame of it can be read")


# ---------------------------------------------------------------------------------------------------------------------------- the program

def main(config: Config) -> None:
  started, seconds, dataset, videos = time.monotonic(), Counter(), None, []
  if config.data is not None:
    if config.source is not None: raise UserError(f"--data {config.data}: takes its pictures from the data set; leave out {', '.join(config.source)}")
    dataset = named.open_named(config.data, config.data_dir, config.split, config.images, config.weights, config.val_share)
    ids = [image["id"] for image in dataset.ground_truth()["images"]]
    pictures = [Picture(dataset.image_name(i), image_id, lambda i=i: dataset[i].image) for i, image_id in enumerate(ids)]
  else:
    if isinstance(config.images, str): raise UserError(f"--images {config.images}: a folder is for --data; name it without the flag")
    files, videos = expand(config.source)
    for line in left_unread(config.source): print(f"note: {line}")
    pictures = [Picture(str(file), i, lambda file=file: read_picture(file)) for i, file in enumerate(files[:config.images or None], 1)]
  if videos: require_av()

  # no larger than what there is to fill it, as far as that is known
  bs = config.bs if videos or config.tile else min(config.bs, -(-len(pictures) // config.gpus) * config.gpus)
  found_by = predictor(config.weights, variant=config.variant, size=config.size, max_size=config.max_size, batch_size=bs, gpus=config.gpus,
                      dtype=config.dtype, tta=config.tta, class_names=None if dataset is None else tuple(dataset.class_names))
  if dataset is not None: found_by.category_ids = dataset.category_ids
  if config.classes: found_by.labels_of(config.classes)
  for note in found_by.notes: print(f"note: {note}")
  what = " and ".join(f"{n} {kind}{'s' * (n > 1)}" for n, kind in ((len(pictures), "picture"), (len(videos), "video")) if n)
  print(f"{found_by.about['model']} from {found_by.about['weights']}: {what} at {found_by.fit} on {', '.join(found_by.devices)}")

  first, since = 0, time.monotonic()   # pictures of the first batch, which compiles, and when they were done
  def stream(items: Iterable, load: Callable) -> Iterator:
    nonlocal first, since
    for result in found_by.stream(itertools.takewhile(lambda _: not STOP.is_set(), items), load, classes=config.classes, tile=config.tile,
                                  score_threshold=config.score_threshold, nms_threshold=config.nms_threshold,
                                  max_detections=config.max_detections, overlap=config.overlap, seconds=seconds):
      if not seconds["network"]: first, since = first + 1, time.monotonic()
      yield result

  folder = checkpoint.new_folder(Path(config.out))
  try:
    with ExitStack() as files:
      results = Results(folder, found_by, config.draw_threshold, files)
      done = look_at_pictures(pictures, stream, results, seconds) if pictures else 0
      passed_over = 0 if STOP.is_set() else len(pictures) - done
      for video in videos:
        if STOP.is_set(): break
        last = results.images[-1]["id"] if results.images else 0
        frames = look_at_video(video, max(last, len(pictures)) + 1, config.images, stream, results, seconds)
        done, passed_over = done + frames, passed_over + (not frames)
      if not done: raise UserError("nothing could be read" if not STOP.is_set() else "stopped before the first picture")
      results.finish()
  except BaseException:
    with suppress(OSError): folder.rmdir()   # where it is empty
    raise

  print(f"\n{results.table()}")
  speed = f"{(done - first) / (time.monotonic() - since):.1f} images/s after the first batch; " if done > first else ""
  network = seconds["network"] / (done - first) if done > first else seconds["compiling"] / first
  print(f"\n{'stopped after ' * STOP.is_set()}{done} pictures{f', {passed_over} passed over' if passed_over else ''}, {results.total} detections of "
        f"{config.score_threshold:g} or more; {duration(time.monotonic() - started)} in all")
  print(f"{speed}a picture takes {1e3 * seconds['reading'] / done:.0f} ms to read, {1e3 * network:.0f} ms in the network"
        f"{'' if done > first else ' (compiling included)'}, {1e3 * seconds['post-processing'] / done:.0f} ms of post-processing, "
        f"{1e3 * seconds['drawing'] / done:.0f} ms to draw and save")
  print(f"results: {folder}")
  if STOP.is_set() and not any(isinstance(video, int) for video in videos): sys.exit(130)   # Ctrl-C is how a camera's film ends


def stop(*_: object) -> None:
  """Ctrl-C ends the work, and all that was found is kept; a second one ends the program."""
  STOP.set()
  signal.signal(signal.SIGINT, signal.default_int_handler)


STOP = threading.Event()
if __name__ == "__main__":
  with exit_on_user_error():
    free, flags = split_words(sys.argv[1:])
    config = parse(Config, PRESETS, flags, os.environ)
    if free: config.source = (*free, *(config.source or ()))
    if config.source is None and config.data is None:
      if config.sources["weights"] != "default": raise UserError("nothing to look at: name pictures, folders, videos or webcam, or give --data")
      config = parse(Config, PRESETS, flags, os.environ, "demo")
    with named_sources(config):
      require_device()
      signal.signal(signal.SIGINT, stop)
      main(config)
