"""The first pictures of a data set, as a data set."""
import re
from pathlib import Path
from typing import Any
from tinydet.datasets.sample import Sample


class Subset:
  """The first `count` images of `dataset`, with everything else as it is there."""
  def __init__(self, dataset: Any, count: int):
    self.dataset, self.count = dataset, min(count, len(dataset))
    self.name, self.class_names, self.category_ids = dataset.name, dataset.class_names, dataset.category_ids
    self.max_boxes, self.warnings = dataset.max_boxes, dataset.warnings
    if hasattr(dataset, "resized"): self.resized = dataset.resized   # the same pictures have the same numbers

  def __len__(self) -> int: return self.count

  @property
  def sizes(self) -> Any: return self.dataset.sizes[:self.count]

  def __getitem__(self, index: int) -> Sample: return self.dataset[range(self.count)[index]]

  def image_name(self, index: int) -> str: return self.dataset.image_name(index)

  def ground_truth(self) -> dict:
    """The images' part of the data set's ground truth, in COCO form."""
    truth = self.dataset.ground_truth()
    images = truth["images"][:self.count]
    kept = {image["id"] for image in images}
    return truth | {"images": images, "annotations": [a for a in truth["annotations"] if a["image_id"] in kept]}


def subset_of(file: Path) -> int | None:
  """How many pictures of the whole a downloaded annotation file is of, 0 for all of them; None where there is no such file."""
  try:
    with open(file, "rb") as f: head = f.read(64)
  except FileNotFoundError: return None
  return int(match[1]) if (match := re.match(rb'\{"info": \{"subset": (\d+)', head)) else 0
