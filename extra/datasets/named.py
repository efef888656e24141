"""The data set that the command line of a program which uses weights names: divided as the run that made them divided it."""
import os
from typing import Any
from tinydet.datasets import open_dataset, split
from tinydet.datasets.download import local_folder
from tinydet.datasets.subset import Subset

EMBEDDED = "shapes"   # how the names of embedded data sets begin


def images(text: str) -> int | str:
  """Parse `--images`: a number of pictures, or else the folder that they lie in; ValueError for anything else."""
  if text.strip().isdecimal() and len(text.strip()) < 10: return int(text)
  if not os.path.isdir(text): raise ValueError("expected a whole number, at least 0, or a folder of pictures")
  return text


def open_named(data: str, data_dir: str | None, part: str, pictures: int | str, weights: str, val_share: float | None) -> Any:
  """The "train" or "val" `part` of `data`: the first `pictures` of it (0: all), or all that lie in the folder `pictures`. UserError as `open_dataset`
  raises it."""
  count, folder = (pictures, None) if isinstance(pictures, int) else (0, pictures)
  options = {} if data.partition(":")[0] == EMBEDDED else {"images": folder, "rule": split.recall(weights, val_share)}
  dataset = open_dataset(local_folder(data, data_dir, (part,)), part, **options)
  return Subset(dataset, count) if count else dataset
