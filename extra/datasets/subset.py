"""Some pictures of a data set, as a data set."""
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
import numpy as np
from tinydet.datasets.sample import Sample


class Part:
  """The images of `dataset` whose numbers are `indices`, in that order, with everything else as it is there."""
  def __init__(self, dataset: Any, indices: Sequence[int]):
    self.dataset, self.indices = dataset, indices
    self.name, self.class_names, self.category_ids = dataset.name, dataset.class_names, dataset.category_ids
    self.max_boxes, self.warnings = dataset.max_boxes, dataset.warnings
    if hasattr(dataset, "layout"): self.layout = dataset.layout
    if hasattr(dataset, "resized"): self.resized = partial(_resized, dataset, indices)

  def __len__(self) -> int: return len(self.indices)

  @property
  def sizes(self) -> Any: return np.asarray(self.dataset.sizes)[np.asarray(self.indices)]

  def __getitem__(self, index: int) -> Sample: return self.dataset[self.indices[index]]

  def file_name(self, index: int) -> str: return self.dataset.file_name(self.indices[index])

  def image_name(self, index: int) -> str: return self.dataset.image_name(self.indices[index])

  def object_counts(self) -> np.ndarray:
    """i64 [N]: how many objects each picture has that are to be learnt."""
    return self.dataset.object_counts()[np.asarray(self.indices)]

  def ground_truth(self) -> dict:
    """The images' part of the data set's ground truth, in COCO form."""
    truth = self.dataset.ground_truth()
    images = [truth["images"][i] for i in self.indices]
    kept = {image["id"] for image in images}
    return truth | {"images": images, "annotations": [a for a in truth["annotations"] if a["image_id"] in kept]}


def whole_of(dataset: Any) -> Any:
  """The data set that `dataset` is a part of, or a part of a part; itself where it is none."""
  while isinstance(dataset, Part): dataset = dataset.dataset
  return dataset


class Subset(Part):
  """The first `count` images of `dataset`."""
  def __init__(self, dataset: Any, count: int): super().__init__(dataset, range(min(count, len(dataset))))


def _resized(dataset: Any, indices: Sequence[int], index: int, size: tuple[int, int]) -> Sample: return dataset.resized(indices[index], size)


def subset_of(file: Path) -> int | None:
  """How many pictures of the whole a downloaded annotation file is of, 0 for all of them; None where there is no such file."""
  try:
    with open(file, "rb") as f: head = f.read(64)
  except FileNotFoundError: return None
  return int(match[1]) if (match := re.match(rb'\{"info": \{"subset": (\d+)', head)) else 0
