"""What a data set yields (`Sample`) and what a loader yields (`Batch`): plain numpy arrays on the host."""
from dataclasses import dataclass
import numpy as np


@dataclass
class Sample:
  """One picture with its objects. Boxes are xyxy in pixels of `image`, where pixel i covers the interval [i, i+1]."""
  image: np.ndarray                # u8 [H,W,3] RGB
  boxes: np.ndarray                # f32 [M,4]
  labels: np.ndarray               # i32 [M], 0..K-1
  image_id: int
  original_size: tuple[int, int]   # (height, width) of the picture in its file; transforms keep it
  content_size: tuple[int, int]    # (height, width) of the part of `image`, from its top left corner, that is picture and not padding


@dataclass
class Batch:
  """`B` samples on one canvas size; rows with fewer than `Mmax` objects are filled with label -1."""
  images: np.ndarray               # u8 [B,H,W,3] RGB
  boxes: np.ndarray                # f32 [B,Mmax,4] xyxy pixels of the canvas, 0 where there is no object
  labels: np.ndarray               # i32 [B,Mmax], -1 where there is no object
  sizes: np.ndarray                # i32 [B,2] (height, width) of the picture inside the canvas
  original_sizes: np.ndarray       # i32 [B,2] (height, width) of the picture in its file
  image_ids: np.ndarray            # i64 [B], -1 for an all-zero image that only fills the last batch
