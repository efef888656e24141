"""The embedded data set for classifiers: each picture is a part of a picture of `shapes` with one shape in its middle, or with none."""
from dataclasses import replace
import numpy as np
from tinydet.datasets.sample import Sample
from tinydet.datasets.shapes import DEFAULT_COUNT, SPLITS, Shapes

BACKGROUND = 0.08  # chance that a picture with shapes gives a part without; with the 8% that have none, a seventh in all


class Crops:
  """`count` square cut-outs of the embedded pictures of `family` (1 or 2): the six shapes, and "background".

  Cut-out i comes from picture i of `Shapes(split, family, size, seed=seed)` and depends on (seed, family, split, i) only, so no picture is in both
  splits. It shows the uppermost shape, which nothing hides, at 0.45 to 0.9 of its side and within a tenth of its middle, as far as the picture
  reaches. Background is any part without a shape: a detector's backbone has to know what nothing looks like. A sample's one box is the whole cut-out.
  """
  max_boxes = 1

  def __init__(self, split: str = "train", family: int = 1, size: int = 128, count: int | None = None, seed: int = 0):
    self.shapes = Shapes(split, family, size, DEFAULT_COUNT[split] if count is None else count, seed)
    self.name = f"crops:{family}"
    self.class_names = [*self.shapes.class_names, "background"]
    self.category_ids = [*self.shapes.category_ids, 0]
    self.warnings: list[str] = []

  def __len__(self) -> int: return len(self.shapes)

  def image_name(self, index: int) -> str: return f"{self.name}/{self.shapes.split}/{index}"

  def __getitem__(self, index: int) -> Sample:
    sample, rng = self.shapes[index], np.random.default_rng((self.shapes.seed, self.shapes.family, SPLITS.index(self.shapes.split), index, 2))
    left, top, side, label = self._place(sample, rng)
    image = np.ascontiguousarray(sample.image[top:top + side, left:left + side])
    return replace(sample, image=image, boxes=np.array([[0, 0, side, side]], np.float32), labels=np.array([label], np.int32),
                   original_size=(side, side), content_size=(side, side))

  def _place(self, sample: Sample, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top and side, in pixels, of the part to cut out, and its label."""
    size, background = self.shapes.size, len(self.class_names) - 1
    if len(sample.boxes) == 0 or rng.random() < BACKGROUND:
      for _ in range(20):
        side = int(size * rng.uniform(0.12, 0.7))
        left, top = (int(x) for x in rng.integers(0, size - side + 1, 2))
        apart = (sample.boxes[:, :2] >= (left + side, top + side)) | (sample.boxes[:, 2:] <= (left, top))
        if apart.any(1).all(): return left, top, side, background
    box = sample.boxes[-1].astype(np.float64)
    longer = (box[2:] - box[:2]).max()
    side = min(size, int(longer / rng.uniform(0.45, 0.9)))
    left, top = (int(x) for x in ((box[:2] + box[2:] - side) / 2 + rng.uniform(-0.1, 0.1, 2) * side).clip(0, size - side))
    return left, top, side, int(sample.labels[-1])
