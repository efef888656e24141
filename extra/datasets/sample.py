"""What a data set yields (`Sample`) and what a loader yields (`Batch`): plain numpy arrays on the host."""
from dataclasses import dataclass
import numpy as np
from PIL import Image


class _Pixels:
  """The attribute `image` of a sample: a Pillow picture that it is set to becomes an array when it is read, and not while Pillow's own operations
  (`Sample.picture`) follow each other, for each way between the two costs as much as mirroring a picture."""
  def __get__(self, sample: "Sample | None", owner: type) -> np.ndarray:
    if sample is None: raise AttributeError("image")   # so that the field has no default
    if isinstance(pixels := sample.__dict__["image"], Image.Image): pixels = sample.__dict__["image"] = np.asarray(pixels)
    return pixels

  def __set__(self, sample: "Sample", pixels: np.ndarray | Image.Image) -> None: sample.__dict__["image"] = pixels


@dataclass
class Sample:
  """One picture with its objects. Boxes are xyxy in pixels of `image`, where pixel i covers the interval [i, i+1]."""
  image: np.ndarray = _Pixels()    # u8 [H,W,3] RGB; a Pillow picture, all of it content, may be given instead
  boxes: np.ndarray                # f32 [M,4]
  labels: np.ndarray               # i32 [M], 0..K-1
  image_id: int
  original_size: tuple[int, int]   # (height, width) of the picture in its file; transforms keep it
  content_size: tuple[int, int]    # (height, width) of the part of `image` that is picture and not padding
  origin: tuple[int, int] = (0, 0) # (row, column) of its top left corner

  @property
  def picture(self) -> Image.Image:
    """The content of `image`, for Pillow."""
    pixels = self.__dict__["image"]
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels[self.window]))

  @property
  def window(self) -> tuple[slice, slice]:
    """Rows and columns of `image` that are content."""
    (top, left), (height, width) = self.origin, self.content_size
    return slice(top, top + height), slice(left, left + width)

  def with_content(self, picture: Image.Image) -> np.ndarray | Image.Image:
    """`image` where `picture`, of the same size, is its content."""
    pixels = self.__dict__["image"]
    if isinstance(pixels, Image.Image) or pixels.shape[:2] == self.content_size: return picture
    padded = pixels.copy()
    padded[self.window] = np.asarray(picture)
    return padded


@dataclass
class Batch:
  """`B` samples on one canvas size; rows with fewer than `Mmax` objects are filled with label -1."""
  images: np.ndarray               # u8 [B,H,W,3] RGB
  boxes: np.ndarray                # f32 [B,Mmax,4] xyxy pixels of the canvas, 0 where there is no object
  labels: np.ndarray               # i32 [B,Mmax], -1 where there is no object
  sizes: np.ndarray                # i32 [B,2] (height, width) of the picture inside the canvas
  origins: np.ndarray              # i32 [B,2] (row, column) of the picture's top left corner there
  original_sizes: np.ndarray       # i32 [B,2] (height, width) of the picture in its file
  image_ids: np.ndarray            # i64 [B], -1 for an all-zero image that only fills the last batch
