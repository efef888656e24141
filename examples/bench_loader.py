"""Training pictures a second of one core: JPEG to a canvas, and a YOLO's mosaic with zoom, shift and HSV, by our loader, by Pillow and by OpenCV.

    python examples/bench_loader.py path/to/folder      (pip install opencv-python-headless)

All three read the same files, in turns. Pillow's and OpenCV's way is the one that is written first: each of four pictures is decoded whole, resized
to fit the canvas, laid on a sheet of twice its sides, and the sheet is scaled and shifted onto the canvas; then HSV by a table for each channel.
Boxes are left out of theirs. Ours decodes at a lower resolution what is made smaller, and computes what is seen only."""
import os, sys, time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import numpy as np
from PIL import Image
from tinydet.config import option, parse, split_words
from tinydet.datasets import open_dataset
from tinydet.datasets.augment import Strength, hsv, place
from tinydet.datasets.buckets import one_bucket
from tinydet.datasets.fit import Fit
from tinydet.datasets.loader import Loader
from tinydet.datasets.subset import Subset
from tinydet.datasets.transforms import compose
from tinydet.errors import UserError, exit_on_user_error

FILL, ZOOM, SHIFT, GAINS = (114, 114, 114), 0.5, 0.1, (0.015, 0.7, 0.4)
BATCH = 8


@dataclass
class Config:
  size: int = option(640, "pixels of the canvas's sides", minimum=32)
  images: int = option(64, "training pictures a turn", minimum=BATCH)
  turns: int = option(5, "turns to time after the first", minimum=1)
  workers: int = option(4, "processes of ours that load for a step that waits for them; 0 leaves that out", minimum=0)


def ours(data: Subset, size: int, mosaic: bool, workers: int = 0) -> Loader:
  """The loader as `train_yolo.py` has it; without `mosaic` pictures are fitted into the canvas and nothing else."""
  strength = Strength(ZOOM, SHIFT, mosaic=1.0) if mosaic else Strength()
  transform = compose(place(size, size, FILL, strength, most=200), *[hsv(*GAINS)] * mosaic)
  fit = Fit((size, size), letterbox=True, fill=FILL)
  return Loader(data, BATCH, transform, shuffle=True, drop_last=True, reduced=True, max_boxes=200, workers=workers,
                buckets=one_bucket(len(data), (size, size), fit.pad((size, size))))


def tables(gains: np.ndarray, turn: int) -> list[np.ndarray]:
  """u8 [256] each: what the gains make of hue, which goes round at `turn`, saturation and value."""
  levels = np.arange(256)
  return [(levels * gains[0] % turn).astype(np.uint8), *((levels * gain).clip(0, 255).astype(np.uint8) for gain in gains[1:])]


class Pillow:
  """A picture by Pillow."""
  @staticmethod
  def read(file: str, size: int) -> Image.Image:
    image = Image.open(file).convert("RGB")
    scale = size / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR)

  @staticmethod
  def size(image: Image.Image) -> tuple[int, int]: return image.size

  @staticmethod
  def sheet(side: int) -> Image.Image: return Image.new("RGB", (side, side), FILL)

  @staticmethod
  def paste(sheet: Image.Image, image: Image.Image, left: int, top: int) -> None: sheet.paste(image, (left, top))

  @staticmethod
  def warp(sheet: Image.Image, size: int, scale: float, left: float, top: float) -> Image.Image:
    back = (1 / scale, 0, -left / scale, 0, 1 / scale, -top / scale)
    return sheet.transform((size, size), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR, fillcolor=FILL)

  @staticmethod
  def colours(image: Image.Image, gains: np.ndarray) -> np.ndarray:
    return np.asarray(image.convert("HSV").point(np.concatenate(tables(gains, 256)).tolist()).convert("RGB"))


class OpenCV:
  """A picture by OpenCV, on one thread."""
  def __init__(self):
    try: import cv2
    except ImportError as e: raise UserError("needs the package opencv-python-headless: pip install opencv-python-headless") from e
    cv2.setNumThreads(1)
    self.cv2 = cv2

  def read(self, file: str, size: int) -> np.ndarray:
    image = self.cv2.imread(file)
    scale = size / max(image.shape[:2])
    return self.cv2.resize(image, (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))), interpolation=self.cv2.INTER_LINEAR)

  def size(self, image: np.ndarray) -> tuple[int, int]: return image.shape[1], image.shape[0]

  def sheet(self, side: int) -> np.ndarray: return np.full((side, side, 3), FILL, np.uint8)

  def paste(self, sheet: np.ndarray, image: np.ndarray, left: int, top: int) -> None:
    sheet[max(top, 0):top + image.shape[0], max(left, 0):left + image.shape[1]] = image

  def warp(self, sheet: np.ndarray, size: int, scale: float, left: float, top: float) -> np.ndarray:
    return self.cv2.warpAffine(sheet, np.array([[scale, 0, left], [0, scale, top]]), (size, size), borderValue=FILL)

  def colours(self, image: np.ndarray, gains: np.ndarray) -> np.ndarray:
    parts = self.cv2.split(self.cv2.cvtColor(image, self.cv2.COLOR_BGR2HSV))
    merged = self.cv2.merge([self.cv2.LUT(part, table) for part, table in zip(parts, tables(gains, 180))])
    return self.cv2.cvtColor(merged, self.cv2.COLOR_HSV2RGB)


def theirs(library: Pillow | OpenCV, files: list[str], size: int, mosaic: bool, rng: np.random.Generator) -> None:
  """A picture u8 [size,size,3] of each of `files`, in batches as a trainer wants them."""
  batch = np.empty((BATCH, size, size, 3), np.uint8)
  for i, first in enumerate(files):
    if not mosaic:
      sheet, image = library.sheet(size), library.read(first, size)
      width, height = library.size(image)
      library.paste(sheet, image, (size - width) // 2, (size - height) // 2)
      batch[i % BATCH] = np.asarray(sheet)
      continue
    sheet = library.sheet(2 * size)
    for corner, file in enumerate([first, *(files[j] for j in rng.integers(len(files), size=3))]):
      image = library.read(file, size)
      width, height = library.size(image)
      library.paste(sheet, image, size - width if corner % 2 == 0 else size, size - height if corner < 2 else size)
    scale, shift = 1 + rng.uniform(-ZOOM, ZOOM), size / 2 + rng.uniform(-SHIFT, SHIFT, 2) * size
    warped = library.warp(sheet, size, scale, *(shift - scale * size))
    batch[i % BATCH] = library.colours(warped, 1 + rng.uniform(-1, 1, 3) * GAINS)


def rate(work: Callable[[], None], count: int) -> float:
  begun = time.perf_counter()
  work()
  return count / (time.perf_counter() - begun)


def loaded(loader: Loader, epoch: int) -> None:
  for _ in loader.epoch(epoch): pass


def main(config: Config, words: tuple[str, ...]) -> None:
  if len(words) != 1: raise UserError("expected one folder of labelled pictures")
  data = open_dataset(words[0], "train")
  if len(data) < BATCH: raise UserError(f"{words[0]}: its {len(data)} training pictures do not fill one batch of {BATCH}")
  data = Subset(data, min(config.images, len(data)) // BATCH * BATCH)
  files, rng = [data.image_name(i) for i in range(len(data))], np.random.default_rng(0)
  libraries = {"Pillow": Pillow(), "OpenCV": OpenCV()}
  print(f"{len(files)} pictures onto {config.size}x{config.size}, one core, load {os.getloadavg()[0]:.1f}\n")
  print("| pictures a second | ours | " + " | ".join(libraries) + " | ours / OpenCV's |\n" + "| --- " * (len(libraries) + 3) + "|")
  for mosaic in (False, True):
    turns = np.array([turn(ours(data, config.size, mosaic), files, config.size, mosaic, list(libraries.values()), rng)
                      for _ in range(1 + config.turns)])[1:]
    numbers = np.median(turns, axis=0)
    what = "mosaic of four, zoom, shift, HSV" if mosaic else "fitted into the canvas"
    print(f"| {what} | {' | '.join(f'{n:.1f}' for n in numbers)} | {np.median(turns[:, 0] / turns[:, -1]):.2f} |", flush=True)
  if config.workers: print(f"\n{starving(ours(data, config.size, True, config.workers), numbers[0])}")


def turn(loader: Loader, files: list[str], size: int, mosaic: bool, libraries: list[Pillow | OpenCV], rng: np.random.Generator) -> list[float]:
  """Pictures a second of ours and of each library."""
  return [rate(lambda: loaded(loader, int(rng.integers(1000))), len(files)),
          *(rate(partial(theirs, library, files, size, mosaic, rng), len(files)) for library in libraries)]


def starving(loader: Loader, alone: float) -> str:
  """How many pictures of a step of 20 ms the workers keep up with."""
  loaded(loader, 0)   # they start
  found = rate(lambda: [loaded(loader, epoch) for epoch in range(1, 4)], 3 * len(loader) * BATCH)
  loader.close()
  return (f"{loader.workers} workers on {len(os.sched_getaffinity(0))} cores: {found:.1f} pictures/s, {found / alone:.1f} times one core's; "
          f"a step of 20 ms waits for none while it takes {found * 0.02:.1f} of them or fewer")


if __name__ == "__main__":
  with exit_on_user_error():
    words, flags = split_words(sys.argv[1:])
    main(parse(Config, {}, flags, os.environ), words)
