"""Pictures from files as RGB bytes."""
from pathlib import Path
import numpy as np
from PIL import Image, ImageOps
from extra.errors import UserError

SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_image(path: Path, size: tuple[int, int] | None, field: str) -> np.ndarray:
  """The picture in a file as u8 [H,W,3] RGB: 16 bits scaled to 8, transparency laid on white.

  `size` (height, width) is what the annotations declare (None: nothing), `field` where they do so, for messages. Boxes belong to the picture of
  that size: the file's EXIF orientation is applied when it makes the sizes agree and the stored pixels do not.
  Raises UserError when the file is no readable image or has another size.
  """
  try:
    with Image.open(path) as picture:
      stored = (picture.height, picture.width)
      picture.load()
      if size is not None and size != stored: picture = ImageOps.exif_transpose(picture)
      image = _rgb(picture)
  except Exception as e:  # decoders raise almost anything on broken files
    raise UserError(f"{path}: cannot be read as an image ({type(e).__name__}: {e}); replace the file or remove it from the annotations") from e
  if size is not None and image.shape[:2] != size:
    raise UserError(f"{path}: the picture is {stored[1]}x{stored[0]} pixels, but {field} says {size[1]}x{size[0]}; correct one of them")
  return image


def _rgb(picture: Image.Image) -> np.ndarray:
  if picture.mode in SIXTEEN_BIT:
    grey = (np.asarray(picture).astype(np.int64).clip(0, 65535) + 128) // 257
    return np.repeat(grey.astype(np.uint8)[..., None], 3, 2)
  if picture.mode == "F": raise ValueError("floating-point pixels have no agreed range, convert them to 8 or 16 bits")
  if picture.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in picture.info:
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
  return np.asarray(picture.convert("RGB"))
