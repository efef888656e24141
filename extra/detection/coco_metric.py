"""COCO's twelve detection numbers, counted by pycocotools' `COCOeval`."""
import contextlib, io, json, math
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from extra.detection.postprocess import Detections
from extra.errors import UserError

METRIC_NAMES = ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


@dataclass
class CocoResult:
  """What `CocoMetric.compute` found. K classes are in label order."""
  metrics: dict[str, float]   # by METRIC_NAMES; -1, as in pycocotools, where the ground truth holds no box of that size
  class_ap: dict[str, float]  # class name -> AP over IoU 0.50:0.95; NaN where the ground truth holds no box of the class
  precision: np.ndarray       # f64 [T=10,R=101,K] at IoU 0.50:0.05:0.95 and recall 0:0.01:1, all areas, 100 detections; -1 for a class without truth
  table: str                  # the twelve lines that pycocotools prints


class CocoMetric:
  """Gathers detections image by image, then scores them all.

  Args:
    ground_truth: COCO instances dict (`images`, `annotations` with `bbox` xywh, `area`, `iscrowd`, `category_id`, `image_id`; `categories`); it is
      not changed.
    category_ids: the category id of each label 0..K-1.
    image_ids: the images to score; all of the ground truth if None. An image without detections counts as an image where nothing was found.
  """
  def __init__(self, ground_truth: dict, category_ids: list[int], image_ids: list[int] | None = None):
    self.ground_truth, self.category_ids = ground_truth, np.array(category_ids)
    known = {image["id"] for image in ground_truth["images"]}
    self.image_ids = known if image_ids is None else set(image_ids)
    if missing := self.image_ids - known: raise ValueError(f"image ids {sorted(missing)[:5]} are not in the ground truth")
    self.found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

  def add(self, detections: Detections, image_ids: np.ndarray) -> None:
    """Takes the `detections` of a batch, boxes in pixels of the original pictures; `image_ids` int [B], of which -1 marks an image that only pads."""
    for i, image_id in enumerate(np.asarray(image_ids).tolist()):
      if image_id == -1: continue
      if image_id not in self.image_ids: raise ValueError(f"image id {image_id} is not among the images to score")
      if image_id in self.found: raise ValueError(f"image id {image_id} was added before")
      n = detections.counts[i]
      boxes = detections.boxes[i, :n].astype(np.float64)
      self.found[image_id] = (np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1), detections.scores[i, :n].copy(),
                              self.category_ids[detections.labels[i, :n]])

  def add_results(self, results: list[dict]) -> None:
    """Takes detections in COCO's results format (see `read_results`) of images without any so far; ValueError names an unknown image or category."""
    rows: dict[int, list[dict]] = {}
    for result in results: rows.setdefault(result["image_id"], []).append(result)
    if unknown := rows.keys() - self.image_ids: raise ValueError(f"image_id {min(unknown)} is not among the pictures to score")
    unknown = {result["category_id"] for result in results} - set(self.category_ids.tolist())
    if unknown: raise ValueError(f"category_id {min(unknown)} is not in the data")
    for image_id, found in rows.items():
      self.found[image_id] = (np.array([r["bbox"] for r in found], np.float64), np.array([r["score"] for r in found], np.float64),
                              np.array([r["category_id"] for r in found]))

  def results(self) -> list[dict]:
    """The detections in COCO's results format: image_id, category_id, bbox xywh, score."""
    return [{"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for image_id, arrays in self.found.items() for box, score, category in zip(*(a.tolist() for a in arrays))]

  def compute(self) -> CocoResult:
    """Scores what was added so far."""
    images, categories = self.ground_truth["images"], self.ground_truth["categories"]
    # COCOeval writes into annotations and takes an annotation id of 0 for "no match"
    truth = [{**annotation, "id": i} for i, annotation in enumerate(self.ground_truth["annotations"], 1)]
    found = [{**result, "id": i, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0} for i, result in enumerate(self.results(), 1)]
    with contextlib.redirect_stdout(io.StringIO()):
      evaluation = COCOeval(*(_index({"images": images, "categories": categories, "annotations": a}) for a in (truth, found)), "bbox")
      evaluation.params.imgIds, evaluation.params.catIds = sorted(self.image_ids), sorted(self.category_ids.tolist())
      evaluation.evaluate()
      evaluation.accumulate()
    with contextlib.redirect_stdout(table := io.StringIO()): evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, np.argsort(np.argsort(self.category_ids)), 0, -1]
    names = {category["id"]: category["name"] for category in categories}
    class_ap = {names[c]: float(p[p > -1].mean()) if (p > -1).any() else float("nan")
                for c, p in zip(self.category_ids.tolist(), np.moveaxis(precision, -1, 0))}
    return CocoResult(dict(zip(METRIC_NAMES, evaluation.stats.tolist())), class_ap, precision, table.getvalue())


def read_results(path: str | Path) -> list[dict]:
  """The detections in a COCO result file: a list of {image_id, category_id, bbox xywh in pixels, score}; UserError names what is wrong where."""
  try: results = json.loads(Path(path).read_text(encoding="utf-8"))
  except OSError as e: raise UserError(f"cannot read {path}: {e.strerror or e}") from e
  except (ValueError, RecursionError) as e: raise UserError(f"{path}: is not a JSON file: {e}") from None
  if not isinstance(results, list): raise UserError(f"{path}: is not a COCO result file, which is a list of detections")
  def number(x) -> bool: return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
  for i, result in enumerate(results):
    if not isinstance(result, dict): raise UserError(f"{path}: entry {i} is not an object")
    for key in ("image_id", "category_id"):
      if type(result.get(key)) is not int: raise UserError(f"{path}: entry {i} needs a whole number as its {key}")
    if not number(result.get("score")): raise UserError(f"{path}: entry {i} needs a number as its score")
    box = result.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(number, box)) and min(box[2:]) >= 0):
      raise UserError(f"{path}: entry {i} needs a bbox of four numbers, x, y, width and height")
  return results


def _index(dataset: dict) -> COCO:
  coco = COCO()
  coco.dataset = dataset
  coco.createIndex()
  return coco
