"""COCO's twelve detection numbers, those of pycocotools' `COCOeval` to the last digit, in a fraction of its time and memory."""
import contextlib, io, json, math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval, Params
from tinydet.errors import UserError
if TYPE_CHECKING: from tinydet.detection.postprocess import Detections   # which imports tinygrad: scoring does without

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
      not changed. Pascal VOC's `difficult` boxes need not be found, and what overlaps one as much as a hit does is neither right nor wrong (their
      development kit, VOCevaldet); what lies inside a crowd is that however little it covers.
    category_ids: the category id of each label 0..K-1.
    image_ids: the images to score; all of the ground truth if None. An image without detections counts as an image where nothing was found.
  """
  def __init__(self, ground_truth: dict, category_ids: list[int], image_ids: list[int] | None = None):
    self.ground_truth, self.category_ids = ground_truth, np.array(category_ids)
    known = {image["id"] for image in ground_truth["images"]}
    self.image_ids = known if image_ids is None else set(image_ids)
    if missing := self.image_ids - known: raise ValueError(f"image ids {sorted(missing)[:5]} are not in the ground truth")
    self.found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

  def add(self, detections: "Detections", image_ids: np.ndarray) -> None:
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

  def __getstate__(self) -> dict:
    """With the detections of all images in three arrays, not three for each."""
    counts = [len(arrays[1]) for arrays in self.found.values()]
    return self.__dict__ | {"found": (list(self.found), counts, *(np.concatenate(column) for column in zip(*self.found.values())))}

  def __setstate__(self, state: dict) -> None:
    image_ids, counts, *columns = state["found"]
    parts = [np.split(column, np.cumsum(counts)[:-1]) for column in columns]
    self.__dict__ = state | {"found": dict(zip(image_ids, zip(*parts)))}

  def compute(self) -> CocoResult:
    """Scores what was added so far."""
    evaluation = self.accumulate()
    with contextlib.redirect_stdout(table := io.StringIO()): evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, np.argsort(np.argsort(self.category_ids)), 0, -1]
    names = {category["id"]: category["name"] for category in self.ground_truth["categories"]}
    class_ap = {names[c]: float(p[p > -1].mean()) if (p > -1).any() else float("nan")
                for c, p in zip(self.category_ids.tolist(), np.moveaxis(precision, -1, 0))}
    return CocoResult(dict(zip(METRIC_NAMES, evaluation.stats.tolist())), class_ap, precision, table.getvalue())

  def accumulate(self) -> COCOeval:
    """What was added so far as pycocotools' `COCOeval` after `evaluate` and `accumulate`, with precision f64 [T=10,R=101,K,A=4,M=3] and recall f64
    [T,K,A,M] in `eval`, at all thresholds of IoU, recalls, classes (by category id), ranges of areas and numbers of detections on an image.

    One class after the other: `COCOeval` itself has an entry for each class and size on each image, 26 million of them for the validation set of
    OpenImages."""
    with contextlib.redirect_stdout(io.StringIO()): evaluation = COCOeval(iouType="bbox")
    parameters = evaluation.params
    parameters.imgIds, parameters.catIds = sorted(self.image_ids), sorted(self.category_ids.tolist())
    truth, found = self._truth(), self._detections()
    scores = [_score_class(parameters, _of_class(truth, category), _of_class(found, category)) for category in parameters.catIds]
    evaluation.eval = {"precision": np.stack([precision for precision, _ in scores], 2), "recall": np.stack([recall for _, recall in scores], 1)}
    return evaluation

  def _truth(self) -> tuple[np.ndarray, ...]:
    """Category ids i64 [G], image ids i64 [G], boxes f64 [G,4], areas f64 [G], crowd and difficult bool [G], by class and image."""
    rows = [annotation for annotation in self.ground_truth["annotations"] if annotation["image_id"] in self.image_ids]
    categories, images = (np.array([row[key] for row in rows], np.int64) for key in ("category_id", "image_id"))
    order = np.lexsort((images, categories))
    columns = (np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4), np.array([row["area"] for row in rows], np.float64),
               *(np.array([bool(row.get(key, 0)) for row in rows], bool) for key in ("iscrowd", "difficult")))
    return tuple(column[order] for column in (categories, images, *columns))

  def _detections(self) -> tuple[np.ndarray, ...]:
    """Category ids i64 [D], image ids i64 [D], scores f64 [D] and boxes f64 [D,4], by class and image, the best first."""
    images = np.repeat(np.array(list(self.found), np.int64), [len(arrays[1]) for arrays in self.found.values()])
    boxes, scores, categories = (np.concatenate([np.empty(shape, dtype), *(arrays[i] for arrays in self.found.values())]).astype(dtype)
                                 for i, (shape, dtype) in enumerate((((0, 4), np.float64), (0, np.float64), (0, np.int64))))
    order = np.lexsort((-scores, images, categories))
    return tuple(column[order] for column in (categories, images, scores, boxes))


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


def _of_class(columns: tuple[np.ndarray, ...], category: int) -> tuple[np.ndarray, ...]:
  """The rows of a class, less the first of the columns, the category ids that they are sorted by."""
  mine = slice(*np.searchsorted(columns[0], [category, category + 1]))
  return tuple(column[mine] for column in columns[1:])


def _score_class(parameters: Params, truth: tuple[np.ndarray, ...], found: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Precision f64 [T,R,A,M] and recall f64 [T,A,M] of a class at T thresholds of IoU, R recalls, A ranges of areas and M numbers of detections on an
  image, -1 where there is no truth: to the last digit those of `COCOeval.evaluate` and `accumulate`."""
  (truth_images, truth_boxes, truth_areas, crowd, difficult), (images, scores, boxes) = truth, found
  again = crowd | difficult   # to be matched any number of times
  thresholds, limits = np.minimum(parameters.iouThrs, 1 - 1e-10), np.array(parameters.areaRng)
  precision = -np.ones((len(thresholds), len(parameters.recThrs), len(limits), len(parameters.maxDets)))
  recall = -np.ones((len(thresholds), len(limits), len(parameters.maxDets)))
  ranks = np.arange(len(images)) - np.searchsorted(images, images)
  images, scores, boxes, ranks = (column[ranks < parameters.maxDets[-1]] for column in (images, scores, boxes, ranks))

  def outside(areas: np.ndarray) -> np.ndarray: return (areas < limits[:, :1]) | (areas > limits[:, 1:])   # [A,N]
  no_truth = again | outside(truth_areas)
  ignored = np.repeat(outside(boxes[:, 2] * boxes[:, 3])[:, None], len(thresholds), 1)   # [A,T,D]
  matched = np.zeros_like(ignored)
  ids, firsts = np.unique(truth_images, return_index=True)
  for image_id, g0, g1 in zip(ids, firsts, [*firsts[1:], len(truth_images)]):
    d0, d1 = np.searchsorted(images, image_id), np.searchsorted(images, image_id, "right")
    if d0 == d1: continue
    overlaps = mask.iou(boxes[d0:d1], truth_boxes[g0:g1], crowd[g0:g1].astype(np.uint8))
    hit, excused = _match(overlaps, again[g0:g1], no_truth[:, g0:g1], thresholds)
    matched[..., d0:d1], ignored[..., d0:d1] = hit, np.where(hit, excused, ignored[..., d0:d1])

  positives = (~no_truth).sum(1)
  for m, most in enumerate(parameters.maxDets):
    counted = np.flatnonzero(ranks < most)
    counted = counted[np.argsort(-scores[counted], kind="stable")]
    for a in np.flatnonzero(positives):
      for t in range(len(thresholds)):
        hits = matched[a, t, counted][~ignored[a, t, counted]]
        right, seen = np.cumsum(hits).astype(np.float64), np.arange(1, len(hits) + 1, dtype=np.float64)
        recalls = right / positives[a]
        best = np.maximum.accumulate((right / (seen + np.spacing(1)))[::-1])[::-1]
        precision[t, :, a, m] = np.append(best, 0.0)[np.searchsorted(recalls, parameters.recThrs)]
        recall[t, a, m] = recalls[-1] if len(hits) else 0.0
  return precision, recall


def _match(overlaps: np.ndarray, again: np.ndarray, no_truth: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Match the detections of a class on an image, the best first, as `COCOeval.evaluateImg` does: with the free truth that overlaps most.

  overlaps f64 [D,G]; again bool [G], to be matched any number of times; no_truth bool [A,G], what need not be found and is only taken where there is
  nothing else; thresholds f64 [T]. Returns, bool [A,T,D], what is matched and which of this with `no_truth`."""
  free = np.ones((len(no_truth), len(thresholds), len(again)), bool)
  matched, excused = np.zeros((2, *free.shape[:2], len(overlaps)), bool)
  a, t = np.ogrid[:free.shape[0], :free.shape[1]]
  for d in np.flatnonzero((overlaps >= thresholds.min()).any(1)):
    possible = free & (overlaps[d] >= thresholds[:, None])
    real = possible & ~no_truth[:, None]
    among = np.where(real.any(-1, keepdims=True), real, possible)
    best = len(again) - 1 - np.where(among, overlaps[d], -1)[..., ::-1].argmax(-1)   # of equals the last
    matched[..., d] = possible.any(-1)
    excused[..., d] = matched[..., d] & no_truth[a, best]
    free[a, t, best] &= ~matched[..., d] | again[best]
  return matched, excused
