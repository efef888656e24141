"""Pictures from files as RGB bytes, and what their headers tell before that."""
import contextlib, io, os, stat, warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tinydet.datasets.problems import Problems, reason, shown
from tinydet.errors import UserError

FORMATS = ("JPEG", "PNG", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP")   # Pillow knows more; one of them, EPS, starts a program
SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
MODES = {"RGB": None, "RGBX": None, "YCbCr": None, "1": "grey-scale", "L": "grey-scale", "LA": "grey-scale", "La": "grey-scale", "P": "of a palette",
         "PA": "of a palette", "RGBA": None, "RGBa": None, "CMYK": "CMYK", **dict.fromkeys(SIXTEEN_BIT, "of 16 bits")}
ALPHA = ("LA", "PA", "La", "RGBa", "RGBA")
MAX_PIXELS = 100_000_000     # 300 MB as RGB, in each worker
MAX_HEADERS = 20_000         # read before training: about a second; of a larger data set, so many in even steps
MAX_DECODED = 32             # of those whose header calls for a look at the pixels, before training
DARK = 0.25                  # of its range: the largest value of a 16-bit picture that has rather 8 to 14 bits
ORIENTATION = 0x0112         # of EXIF
WHOLE_CHECK = "python -m tinydet.datasets.check"


def read_image(path: str | Path, size: tuple[int, int] | None, field: str, resized: tuple[int, int] | None = None,
               upright: bool = False) -> Image.Image:
  """The picture in a file in RGB: 16 bits scaled to 8, transparency laid on white (passed over where all is transparent), of several frames the
  first.

  `size` (height, width) is what the annotations declare (None: nothing), `field` where they do so, for messages. Boxes belong to the picture of
  that size: the file's EXIF orientation is applied when it makes the sizes agree and the stored pixels do not, and where the size cannot tell (half a
  turn, a mirror image, a square) when the data set's pictures are `upright` (see `check_headers`).
  With `resized` (height, width) the picture comes stretched to that, bilinear with antialiasing. A JPEG that is at least twice as large on both sides
  is decoded at a half, a quarter or an eighth of its resolution first, from as many of the frequencies it is stored as: in half the time, and a grey
  level or two away from what it would be otherwise, being less blurred.
  Raises UserError when the file is no readable image, has more than MAX_PIXELS or another size.
  """
  try:
    with opened(path) as picture:
      found = stored = (picture.height, picture.width)
      part = None   # of the decoded pixels that is the picture: a side that the scale does not divide has less of its last pixel
      turns = size is not None and (size != stored or (upright and _untold(stored, _turn(picture))))
      if resized is not None and size == stored and not turns and stored[0] >= 2 * resized[0] and stored[1] >= 2 * resized[1]:
        drafted = picture.draft(None, resized[::-1])
        part = drafted and drafted[1]
      picture.load()
      if turns:
        picture = ImageOps.exif_transpose(picture)
        found = (picture.height, picture.width)
      picture = to_rgb(picture)
  except Exception as e:  # decoders raise almost anything on broken files
    raise UserError(f"{path}: cannot be read as an image ({_why(e)}); replace the file or remove it from the annotations") from e
  if size is not None and found != size:
    raise UserError(f"{path}: the picture is {stored[1]}x{stored[0]} pixels, but {field} says {size[1]}x{size[0]}; correct one of them")
  return picture if resized is None else picture.resize(resized[::-1], Image.Resampling.BILINEAR, box=part)


def check_headers(problems: Problems, folder: str | Path, names: Sequence[str], sizes: Sequence[tuple[int, int]],
                  told: Sequence[bool] | None = None) -> bool | None:
  """Report what the headers of the files `names` in `folder` tell, where `sizes` (height, width) are annotated; few pixels are decoded. A size that
  is not `told` by the annotations is from `header_sizes`, and proves nothing.

  Returns whether the annotations are of upright pictures, as their EXIF orientation says: one rule for all, from those whose annotated size proves
  it, None where none does. Then they are taken for upright, as whoever labels a picture looks at it so, and as it will be shown to the detector.

  Finds what is no picture, is cut short in its header, has too many pixels or another size, and counts what `read_image` will convert. Symbolic
  links are followed, as data sets are often made of them, and one that leads out of the folder's surroundings is counted.
  """
  chosen = range(len(names)) if len(names) <= MAX_HEADERS else np.linspace(0, len(names) - 1, MAX_HEADERS).astype(int).tolist()
  if len(chosen) < len(names):
    problems.note(f"pictures, of which {MAX_HEADERS:,} were looked at, evenly spread; {WHOLE_CHECK} reads all", names, lambda _: "")
  turned, stored, untold = [], [], []   # pictures with an EXIF orientation: what their annotated size proves
  deep, transparent = [], []
  for i in chosen:
    name, size = shown(names[i]), tuple(sizes[i])
    try:
      with opened(os.path.join(folder, names[i])) as picture: found, turn, oddities = _size_and_oddities(picture, size)
    except Exception as e: problems.error("pictures that cannot be read", [f"{name} ({_why(e)})"])
    else:
      if found != size: problems.error("pictures of another size than annotated", [f"{name} is {found[1]}x{found[0]}, not {size[1]}x{size[0]}"])
      elif turn != 1:
        unknown = _untold(size, turn) or (told is not None and not told[i])
        (untold if unknown else stored if (picture.height, picture.width) == size else turned).append(name)
      for what in oddities: problems.odd(f"pictures {what}", [name])
      if found == size and _sixteen_bit(picture): deep.append(names[i])
      if found == size and _has_alpha(picture): transparent.append(names[i])
  upright = bool(turned) if bool(turned) != bool(stored) else None
  problems.odd("pictures turned as their EXIF orientation says, for their annotated size is the turned one", turned)
  problems.odd("pictures left as stored in spite of an EXIF orientation, for their annotated size is the stored one", stored)
  taken = {True: "turned, as the others of this data set are", False: "left as stored, as the others of this data set are",
           None: "turned upright; nothing tells whether their boxes were drawn so, and they may lie elsewhere"}[upright]
  why = "whose EXIF orientation leaves their size as it is (half a turn, a mirror image, a square)"
  if told is not None and not all(told): why = "with an EXIF orientation, and no annotated size that tells how their boxes were drawn"
  problems.odd(f"pictures {why}, {taken}", untold)
  _look_at_pixels(problems, folder, deep, transparent)
  problems.odd("pictures behind symbolic links out of the data set, followed", _links_out(folder, names), shown)
  return upright


def _turn(picture: Image.Image) -> int:
  """The EXIF orientation, 1 where there is none."""
  try: turn = Image.Image.getexif(picture).get(ORIENTATION, 1)   # PNG's own decodes the picture first
  except Exception: return 1   # what is no EXIF turns nothing
  return turn if turn in range(2, 9) else 1


def _untold(size: tuple[int, int], turn: int) -> bool:
  """Whether a picture of `size` has an orientation that its size does not show."""
  return turn in (2, 3, 4) or (turn in (5, 6, 7, 8) and size[0] == size[1])


def header_sizes(problems: Problems, folder: str | Path, names: Sequence[str]) -> list[tuple[int, int]]:
  """(height, width) of pictures whose annotations do not say it, upright as their EXIF orientation says; (0, 0) for one that was reported."""
  def read(name: str) -> tuple[int, int] | str:
    try:
      with opened(os.path.join(folder, name)) as picture: size, turn = (picture.height, picture.width), _turn(picture)
    except Exception as e: return f"{shown(name)} ({_why(e)})"   # decoders raise almost anything on broken files
    return size[::-1] if turn in (5, 6, 7, 8) else size
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool: found = list(pool.map(read, names))
  problems.error("pictures that cannot be read", [line for line in found if isinstance(line, str)])
  return [(0, 0) if isinstance(size, str) else size for size in found]


def _sixteen_bit(picture: Image.Image) -> bool:
  """Whether its file has 16 bits a value, which Pillow keeps of grey pictures and not of coloured ones."""
  return picture.mode in SIXTEEN_BIT or any(";16" in str(tile[3]) for tile in picture.tile)


def _has_alpha(picture: Image.Image) -> bool: return picture.mode in ALPHA or "transparency" in picture.info


def _look_at_pixels(problems: Problems, folder: str | Path, deep: list[str], transparent: list[str]) -> None:
  """Report 16-bit pictures that will be dark, and transparent ones of which nothing would be seen."""
  dark, invisible = [], []
  for names, look in ((deep, dark), (transparent, invisible)):
    for name in names[:MAX_DECODED]:
      with contextlib.suppress(Exception), opened(os.path.join(folder, name)) as picture:   # `read_image` will say why
        if look is invisible:
          if _all_transparent(picture): look.append(shown(name))
          continue
        pixels = np.asarray(picture)[..., :-1 if picture.mode in ALPHA else None]   # colours alone
        most = int(pixels.max()) * (1 if picture.mode in SIXTEEN_BIT else 257)
        if 0 < most < DARK * 65535: look.append(f"{shown(name)} has {most:,} of 65,535")
  problems.odd("pictures of 16 bits whose largest value is small, so that they come out dark; multiply their values to fill the range", dark)
  problems.odd("pictures that are transparent everywhere, their transparency passed over", invisible)


def _all_transparent(picture: Image.Image) -> bool:
  return picture.convert("RGBA").getchannel("A").getextrema()[1] == 0


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
  """The picture in a regular file, not decoded, of a known kind and a bearable size; ValueError, OSError or what the decoder raises otherwise."""
  about = os.stat(path)
  if not stat.S_ISREG(about.st_mode): raise ValueError("not a regular file")   # opening a pipe would wait for ever
  if not about.st_size: raise ValueError("zero bytes")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with Image.open(path, formats=FORMATS) as picture:
      if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height}, more than {MAX_PIXELS // 10 ** 6} million pixels")
      if picture.mode not in MODES: raise ValueError(f"pixels of kind {picture.mode} have no agreed range, convert them to 8 or 16 bits")
      yield picture


def jpeg_size(source: str | Path | bytes) -> tuple[int, int]:
  """(height, width) of the stored pixels of a JPEG, a file or its content, as its header says; ValueError where it is none."""
  try:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=("JPEG",)) as picture: return picture.height, picture.width
  except Exception as e: raise ValueError(f"it is no JPEG ({_why(e)})") from e   # decoders raise almost anything on broken files


def _size_and_oddities(picture: Image.Image, size: tuple[int, int]) -> tuple[tuple[int, int], int, list[str]]:
  """(height, width) as `read_image` will find them where `size` is annotated, the EXIF orientation, and what it will convert."""
  stored, turn = (picture.height, picture.width), _turn(picture)
  if turn == 1 and stored != size and picture.format == "PNG":   # its EXIF may stand behind the pixels
    with contextlib.suppress(Exception): turn = picture.getexif().get(ORIENTATION, 1)
  found = stored[::-1] if stored != size and turn in (5, 6, 7, 8) else stored
  if found != size: return found, turn, []
  oddities = []
  if kind := MODES[picture.mode]: oddities.append(f"{kind}, converted")
  if _has_alpha(picture): oddities.append("with transparency, laid on white")
  if getattr(picture, "is_animated", False): oddities.append("of several frames, of which the first is used")
  return found, turn, oddities


def _links_out(folder: str | Path, names: Sequence[str]) -> list[str]:
  root = os.path.join(os.path.dirname(os.path.realpath(folder)), "")
  places = {sub: os.path.realpath(os.path.join(folder, sub)) for sub in {os.path.dirname(name) for name in names}}
  def real(name: str) -> str:
    path = os.path.join(folder, name)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(places[os.path.dirname(name)], "")
  return [name for name in names if not real(name).startswith(root)]


def _why(error: Exception) -> str:
  if isinstance(error, UnidentifiedImageError): return "not a picture, or its header is broken"
  if isinstance(error, Image.DecompressionBombError): return f"more than {MAX_PIXELS // 10 ** 6} million pixels"
  return reason(error)


def to_rgb(picture: Image.Image) -> Image.Image:
  """In RGB: 16 bits scaled to 8, transparency laid on white, or passed over where all is transparent, for then the colours are what was meant.
  ValueError for pixels whose range is unknown."""
  if picture.mode in SIXTEEN_BIT:
    grey = np.asarray(picture).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535: raise ValueError("pixels of 32 bits have no agreed range, convert them to 8 or 16 bits")
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
  if _has_alpha(picture):
    picture = picture.convert("RGBA")
    if not _all_transparent(picture): picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
  return picture if picture.mode == "RGB" else picture.convert("RGB")
