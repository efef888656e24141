"""See what in a picture a detection rests on, and check that the map tells it.

  python examples/explain.py photos/ --weights coco
  python examples/explain.py photos/*.jpg --weights runs/mine --method gradcam --top 1
  python examples/explain.py --data path/to/folder --weights runs/mine --check

For the surest detections of each picture a heat map over the picture, of all levels together and of each level, goes to a new folder, --out, beside
explanations.json with the numbers. --check measures every map: how the score falls as its hottest pixels go (deletion) and rises as they come
(insertion), against random maps, and how the map changes as the network's weights are randomised from the output down. With nothing at all it
explains the small detector that ships with the code on embedded pictures."""
import itertools, json, os, sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.config import named_sources, option, parse, show_size, size as parse_size, split_words
from tinydet.datasets import named
from tinydet.datasets.files import expand, left_unread
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import MEAN_GREY
from tinydet.detection import explain, postprocess
from tinydet.detectors import Detector
from tinydet.errors import UserError, exit_on_user_error
from tinydet.predict import Predictor, read_picture
from tinydet.reporting.pictures import draw_boxes, draw_heat
from tinydet.runtime.device import require_device
from tinydet.runtime.graphs import jit
from tinydet.weights import checkpoint

RANDOM_MAPS = 4       # that a map is compared with: one alone may be lucky
BLUR = 1 / 16         # deviation of the Gaussian that insertion starts from, of the picture's longer side
PANEL = 640           # longer side of a picture in a panel, pixels


@dataclass
class Config:
  source: tuple | None = option(None, "files, folders and patterns such as 'photos/*.jpg', separated by spaces, without the flag",
                                parse=lambda text: tuple(part.strip() for part in text.split(",")), show=",".join, group="data")
  data: str | None = option(None, "a data set, as in training, whose pictures to take; of coco and openimages-mlperf --split is downloaded on first "
                            "use", group="data")
  data_dir: str | None = option(None, "where the data sets that are downloaded lie; by default the user's cache folder", group="data")
  split: str = option("val", "part of it", choices=("train", "val"), group="data")
  images: int | str = option(0, "a number: use only the first so many pictures, 0 uses all; a folder: where the data set's pictures lie",
                             parse=named.images, group="data")
  val_share: float | None = option(None, "share that is val, by a hash of the names, where the data does not say which; by default as the weights' "
                                   "run had it", minimum=0.01, maximum=0.9, group="data")
  size: tuple | None = option(None, "pixels the network sees: 800, or width x height as 192x144; by default what the weights were trained with",
                              parse=parse_size, show=show_size, group="data")
  max_size: int | None = option(None, "keep the aspect ratio, the longer side at most this; 0 resizes to --size exactly", minimum=0, group="data")

  weights: str = option("coco", "shapes (ships with the code), coco, mlperf, a .safetensors or .pth file, or the folder of a run", group="model")
  variant: str = option("v1", "which of torchvision's networks --weights coco is: RetinaNet v1 or v2, or FCOS", choices=("v1", "v2", "fcos"),
                       group="model")
  threshold: float = option(0.3, "explain detections that score more", minimum=0, maximum=1, group="model")
  top: int = option(3, "explain at most so many detections of a picture, the surest", minimum=1, group="model")

  method: str = option("hirescam", "hirescam tells objects of one picture apart; the gradcams blend them; eigencam knows no class",
                       choices=tuple(explain.METHODS), group="map")
  layer: str = option("backbone", "whose feature maps: the backbone's C3 to C5, or the pyramid's P3 to P7, of which only the detection's own counts",
                      choices=("backbone", "pyramid"), group="map")
  check: bool = option(False, "measure deletion and insertion against random maps, and the change as weights are randomised", group="map")
  bs: int = option(16, "pictures a step of --check", minimum=1, group="map")
  out: str = option("explanations", "folder to make; a number is appended where it is taken", group="results")


PRESETS = {"demo": {"data": "shapes:1", "weights": "shapes", "images": 8}}   # where nothing says what to look at


# ---------------------------------------------------------------------------------------------------------------------------- the network

class Network:
  """A detector as the functions that an explanation needs, each captured once. `names` and `strides` are those of the levels of feature maps."""
  def __init__(self, detector: Detector, layer: str):
    levels = detector.levels(layer)
    self.names, self.strides = list(levels), list(levels.values())
    canvas: list[tuple[int, int]] = []   # of the picture at hand, for what is captured

    def logits(features: list[Tensor]) -> Tensor: return detector.class_scores(detector.head(features, layer), canvas[-1])

    @jit
    def forward(images: Tensor) -> tuple[Tensor, ...]:
      features = detector.features(detector.prepare(images), layer)
      return *(f.contiguous() for f in features), *(output.contiguous() for output in detector.head(features, layer))

    @jit
    def gradients(entry: Tensor, *features: Tensor) -> list[Tensor]:
      return [g.contiguous() for g in explain.gradients(logits, list(features), entry)]

    @jit
    def scores(images: Tensor, entry: Tensor) -> Tensor:
      found = logits(detector.features(detector.prepare(images), layer)).reshape(images.shape[0], -1)
      chosen = (Tensor.arange(found.shape[1]) == entry).where(found, 0).sum(1)
      return (chosen.sigmoid() if detector.sigmoid else chosen).contiguous()
    self._canvas, self._forward, self._gradients, self._scores = canvas, forward, gradients, scores

  def forward(self, image: np.ndarray) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Feature maps and outputs for a canvas u8 [H,W,3]."""
    self._canvas.append(image.shape[:2])
    found, count = self._forward(Tensor(image[None])), len(self.names)
    return list(found[:count]), tuple(found[count:])

  def maps(self, method: str, features: list[Tensor], entries: list[int]) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Maps and shares (see `explain.level_maps`) of the scores numbered anchor * K + label, from the features of `forward`."""
    activations = [f.numpy()[0] for f in features]
    gradients = [[g.numpy()[0] for g in self._gradients(Tensor([entry]), *features)] for entry in entries]
    return [explain.level_maps(method, activations, gradient) for gradient in gradients]

  def scores(self, canvases: np.ndarray, entry: int, bs: int) -> np.ndarray:
    """One score, f32 [N] in 0..1, of each of the inputs u8 [N,H,W,3]."""
    batches = [canvases[i:i + bs] for i in range(0, len(canvases), bs)]
    full = [np.concatenate([batch, np.repeat(batch[-1:], bs - len(batch), 0)]) for batch in batches]
    return np.concatenate([self._scores(Tensor(batch), Tensor([entry])).numpy() for batch in full])[:len(canvases)]


# ---------------------------------------------------------------------------------------------------------------------------- one picture

def explain_picture(image: np.ndarray, predictor: Predictor, network: Network, config: Config) -> Iterator[tuple[dict, np.ndarray]]:
  """The numbers of each of the picture's surest detections, as explanations.json has them, and its panel u8 [H,W,3]."""
  detector, sample = predictor.detector, predictor.fit.place(image)
  content, canvas = sample.content_size, sample.image
  side, origin = canvas.shape[:2], np.array([sample.origin])
  features, outputs = network.forward(canvas)
  corner = sample.origin
  found = detector.detect(outputs, side, np.array([content]), origin, score_threshold=config.threshold, max_detections=config.top)
  boxes = postprocess.to_original(found, np.array([content]), np.array([image.shape[:2]]), origin).boxes[0]
  count = found.counts[0]
  entries = (found.anchors[0, :count].astype(int) * detector.num_classes + found.labels[0, :count]).tolist()
  explained = network.maps(config.method, features, entries)
  heats = [explain.combine(maps, shares, network.strides, content, content, corner).sum(0) for maps, shares in explained]
  if config.check:
    curves = [check_curves(sample, heat, maps[shares.argmax()].shape, network.strides[shares.argmax()],
                           lambda canvases, entry=entry: network.scores(canvases, entry, config.bs))
              for heat, (maps, shares), entry in zip(heats, explained, entries)]
    changes = check_weights(detector, network, config.method, sample, heats, entries)

  inside_window = found.boxes[0] - np.tile(np.float32(corner[::-1]), 2)   # the maps are of the picture, not of the canvas
  for i, (maps, shares) in enumerate(explained):
    label, score, box, anchor = int(found.labels[0, i]), float(found.scores[0, i]), boxes[i], int(found.anchors[0, i])
    about = {"class": predictor.class_names[label], "score": score, "box": box.astype(float).tolist(), "anchor": anchor,
             "level": detector.level_of(anchor, side), "shares": dict(zip(network.names, shares.tolist())),
             "inside": explain.inside(heats[i], inside_window[i])}
    if config.check: about |= {"curves": curves[i], "randomised": changes[i]}
    yield about, panel(image, box, label, score, predictor.class_names, config.method, network, maps, shares, sample)


def panel(image: np.ndarray, box: np.ndarray, label: int, score: float, class_names: list[str], method: str, network: Network,
          maps: list[np.ndarray], shares: np.ndarray, sample: Sample) -> np.ndarray:
  """The picture and the map of all levels over it, both with the box, and below them the map of each level, as bright as its share, u8 [H,W,3]."""
  scale = PANEL / max(image.shape[:2])
  height, width = (max(1, round(side * scale)) for side in image.shape[:2])
  image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC))
  def boxed(picture: np.ndarray) -> np.ndarray:
    return draw_boxes(picture, box[None] * scale, np.array([label]), np.array([score]), class_names)
  parts = explain.combine(maps, shares, network.strides, sample.content_size, (height, width), sample.origin)
  upper = [(f"{class_names[label]} {score:.2f}", boxed(image)),
           (f"{method}, {network.names[0]} to {network.names[-1]}", boxed(draw_heat(image, parts.sum(0))))]
  small = 2 * width // len(maps), max(1, 2 * height // len(maps))
  lower = []
  for name, share, part in zip(network.names, shares, parts):
    drawn = Image.fromarray(draw_heat(image, part / (part.max() or 1) * share / (shares.max() or 1)))
    lower.append((f"{name}: {share:.0%}", np.asarray(drawn.resize(small, Image.Resampling.LANCZOS))))
  font = ImageFont.load_default(size=18)
  strip = font.getbbox("Ag")[3] + 8
  canvas = Image.new("RGB", (2 * width, 2 * strip + height + small[1]))
  for row, top in ((upper, 0), (lower, strip + height)):
    for i, (caption, picture) in enumerate(row):
      canvas.paste(Image.fromarray(picture), (i * picture.shape[1], top + strip))
      ImageDraw.Draw(canvas).text((i * picture.shape[1] + 6, top + 4), caption, font=font, fill="white")
  return np.asarray(canvas)


# ---------------------------------------------------------------------------------------------------------------------------- checks

def check_curves(sample: Sample, heat: np.ndarray, cells: tuple[int, int], stride: int,
                 score: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
  """Deletion and insertion of the map `heat` over the part of the canvas that is picture, and their means over random maps as coarse as it is, whose
  `cells` have a `stride`: noise of single pixels would say more about the network's taste for noise."""
  content, picture = sample.content_size, sample.image[sample.window]
  blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(BLUR * max(content))))
  def score_parts(parts: np.ndarray) -> np.ndarray:
    canvases = np.repeat(sample.image[None], len(parts), 0)
    canvases[(slice(None), *sample.window)] = parts
    return score(canvases)
  measure = lambda heat: explain.deletion_and_insertion(score_parts, picture, blurred, np.full_like(picture, MEAN_GREY), heat)
  rng = np.random.default_rng(0)
  random = np.mean([measure(explain.resample(rng.random(cells), stride, content, content, sample.origin)) for _ in range(RANDOM_MAPS)], 0)
  return dict(zip(("deletion", "insertion", "random_deletion", "random_insertion"), (*measure(heat), *random.tolist())))


def check_weights(detector: Detector, network: Network, method: str, sample: Sample, heats: list[np.ndarray], entries: list[int]) -> list[list[dict]]:
  """For each map of `heats`, how like it is to the one after each of the detector's stages is randomised: [{stage, rank_correlation, ssim}, ...]."""
  state = {key: tensor for key, tensor in get_state_dict(detector.network).items() if not key.endswith("num_batches_tracked")}
  stages = {name: {key: tensor for key, tensor in state.items() if key.startswith(prefixes)} for name, prefixes in detector.stages.items()}
  rng, changes, content = np.random.default_rng(0), [[] for _ in heats], sample.content_size
  for stage in explain.cascade(stages, lambda key, shape: detector.init_rule(key, shape)(rng, shape)):
    features, _ = network.forward(sample.image)
    for heat, change, (maps, shares) in zip(heats, changes, network.maps(method, features, entries)):
      other = explain.combine(maps, shares, network.strides, content, content, sample.origin).sum(0)
      change.append({"stage": stage, "rank_correlation": explain.rank_correlation(heat, other), "ssim": explain.ssim(heat, other)})
  return changes


# ---------------------------------------------------------------------------------------------------------------------------- the program

def main(config: Config) -> None:
  if config.data is not None:
    if config.source is not None: raise UserError(f"--data {config.data}: takes its pictures from the data set; leave out {', '.join(config.source)}")
    dataset = named.open_named(config.data, config.data_dir, config.split, config.images, config.weights, config.val_share)
    pictures = [(dataset.image_name(i), lambda i=i: dataset[i].image) for i in range(len(dataset))]
  else:
    if isinstance(config.images, str): raise UserError(f"--images {config.images}: a folder is for --data; name it without the flag")
    files, videos = expand(config.source)
    for line in left_unread(config.source): print(f"note: {line}")
    if videos: raise UserError(f"{videos[0]}: is a video or a camera; explain pictures, such as frames of it")
    pictures = [(str(file), lambda file=file: read_picture(file)) for file in files[:config.images or None]]

  found_by = Predictor(config.weights, variant=config.variant, size=config.size, max_size=config.max_size,
                       fold=False)   # its own: --check changes the weights
  network = Network(found_by.detector, config.layer)
  found_by.place(found_by.fit.canvases())
  for note in found_by.notes: print(f"note: {note}")
  print(f"{found_by.about['model']} from {found_by.about['weights']}: {config.method} of {network.names[0]} to {network.names[-1]}, {len(pictures)} "
        f"picture{'s' * (len(pictures) > 1)} at {found_by.fit}\n")
  print(f"{'picture':32} {'class':16} {'score':>5} {'level':>5} {'in box':>6}" +
        f"{'deletion':>10} {'random':>6} {'insertion':>10} {'random':>6}" * config.check, flush=True)

  folder, done, taken, stopped = checkpoint.new_folder(Path(config.out)), [], set(), False
  try:
    for name, load in pictures:
      try: image = load()
      except UserError as e:
        print(f"warning: passed over: {e}", file=sys.stderr, flush=True)
        continue
      base = Path(name).stem
      stem = next(s for n in itertools.count(1) if (s := f"{base}{f'_{n}' if n > 1 else ''}").lower() not in taken)
      taken.add(stem.lower())
      about = {"file": name, "height": image.shape[0], "width": image.shape[1], "detections": []}
      for number, (numbers, drawn) in enumerate(explain_picture(image, found_by, network, config), 1):
        path = folder / f"{stem}-{number}.jpg"
        with checkpoint.whole_file(path) as f: Image.fromarray(drawn).save(f, "JPEG", quality=92)
        about["detections"].append(numbers | {"drawn": path.name})
        print(row(name, numbers), flush=True)
      if not about["detections"]: print(f"{shortened(name):32} nothing scores more than {config.threshold:g}", flush=True)
      done.append(about)
  except KeyboardInterrupt: stopped = True
  except BaseException:
    with suppress(OSError): folder.rmdir()   # where it is empty
    raise
  if not done:
    with suppress(OSError): folder.rmdir()
    raise UserError("stopped before the first picture" if stopped else "nothing could be read")

  detections = [detection for about in done for detection in about["detections"]]
  means = mean_numbers(detections)
  settings = {key: getattr(config, key) for key in ("weights", "method", "layer", "threshold", "top")}
  with checkpoint.whole_file(folder / "explanations.json") as f: f.write(json.dumps(settings | {"mean": means, "pictures": done}, indent=1).encode())
  if detections: print(row(f"mean of {len(detections)}", means | {"class": "", "level": ""}))
  if detections and config.check:
    print(f"\n{'weights randomised down to':32} {'rank correlation':>16} {'SSIM':>6}   with the map as it was, 1 is the same")
    for change in means["randomised"]: print(f"{change['stage']:32} {change['rank_correlation']:16.2f} {change['ssim']:6.2f}")
  print(f"\nresults: {folder}")
  if stopped: sys.exit(130)


def mean_numbers(detections: list[dict]) -> dict:
  """Means over detections, in their form; {} where there are none."""
  if not detections: return {}
  mean = lambda rows, keys: {key: float(np.mean([r[key] for r in rows])) for key in keys}
  means = mean(detections, ("score", "inside"))
  if "curves" in detections[0]:
    means["curves"] = mean([d["curves"] for d in detections], detections[0]["curves"])
    means["randomised"] = [{"stage": changes[0]["stage"]} | mean(changes, ("rank_correlation", "ssim")) for changes in
                           zip(*(d["randomised"] for d in detections))]
  return means


def row(name: str, numbers: dict) -> str:
  """A line of the table."""
  line = f"{shortened(name):32} {numbers['class'][:16]:16} {numbers['score']:5.2f} {numbers['level']:>5} {numbers['inside']:6.0%}"
  if "curves" not in numbers: return line
  curves = numbers["curves"]
  return f"{line}{curves['deletion']:10.2f} {curves['random_deletion']:6.2f} {curves['insertion']:10.2f} {curves['random_insertion']:6.2f}"


def shortened(name: str) -> str: return name if len(name) <= 32 else "…" + name[-31:]


if __name__ == "__main__":
  with exit_on_user_error():
    free, flags = split_words(sys.argv[1:], switches=("--check", "--no-check"))
    config = parse(Config, PRESETS, flags, os.environ)
    if free: config.source = (*free, *(config.source or ()))
    if config.source is None and config.data is None:
      if config.sources["weights"] != "default": raise UserError("nothing to explain: name pictures, folders or patterns, or give --data")
      config = parse(Config, PRESETS, flags, os.environ, "demo")
    with named_sources(config):
      require_device()
      main(config)
