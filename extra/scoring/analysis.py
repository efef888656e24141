"""What a detector gets wrong: confusion between classes, errors by kind (TIDE), and which pictures went best and worst. numpy and pycocotools only.

The functions take a COCO instances dict, `category_ids` (label -> category id) and `found`, as `CocoMetric` holds them: image id -> (boxes f64 [N,4]
xywh in pixels of the original picture, scores [N], category ids [N]). An image that is not in `found` is one where nothing was found. As in
`COCOeval`, the best 100 detections of a class count on each picture, and one whose best match is a crowd of its class is neither right nor wrong.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
import numpy as np
from pycocotools import mask
from tinydet.scoring.coco_metric import CocoMetric, CocoResult

KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")
MAX_DETECTIONS = 100        # of a class on a picture (COCOeval)
FOREGROUND, BACKGROUND = 0.5, 0.1
SIDES = (0, 1 / 64, 1 / 48, 1 / 32, 1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 4, 1 / 2, 2)   # of a picture's: limits of sizes that objects are counted in
CURVE_POINTS = slice(0, 101, 2)   # of COCOeval's 101 recalls, what a record of precision keeps

Found = dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass
class Picture:
  """Truth [M] and detections [N], the best first, of one picture, with labels 0..K-1 and their overlaps."""
  image_id: int
  truth: np.ndarray     # i64 [M] labels
  crowd: np.ndarray     # bool [M], difficult ones too
  labels: np.ndarray    # i64 [N]
  scores: np.ndarray    # f64 [N]
  overlaps: np.ndarray  # f64 [N,M] IoU; with a crowd, the part of the detection that it covers
  sides: np.ndarray     # f64 [M] root of the truth's area as a share of the root of the picture's; NaN where that is not known

  def own(self) -> np.ndarray: return self.labels[:, None] == self.truth[None, :]

  def match(self) -> tuple[np.ndarray, np.ndarray]:
    """The truth i64 [N] that `COCOeval` gives each detection at IoU 0.5, the free one of its class that it overlaps most, or -1; and, bool [N], which
    of the others are excused by a crowd of their class."""
    matched, excused, free = np.full(len(self.labels), -1), np.zeros(len(self.labels), bool), ~self.crowd
    possible = self.own() & (self.overlaps >= FOREGROUND)
    for i in np.flatnonzero(possible.any(1)):
      candidates = np.flatnonzero(possible[i] & free)[::-1]   # of equals the last
      if len(candidates):
        matched[i] = candidates[self.overlaps[i, candidates].argmax()]
        free[matched[i]] = False
      else: excused[i] = (possible[i] & self.crowd).any()
    return matched, excused


def confusion(ground_truth: dict, category_ids: list[int], found: Found, *, score_threshold: float = 0.3) -> np.ndarray:
  """How often truth of class i was found as class j, i64 [K+1,K+1] at IoU 0.5; row K is background (false positives), column K is what was missed.

  Detections of at least `score_threshold` choose in order of their scores, each the free truth of any class that it overlaps most."""
  background = len(category_ids)
  counts = np.zeros((background + 1, background + 1), np.int64)
  for picture in _pictures(ground_truth, category_ids, found, score_threshold):
    free = ~picture.crowd
    crowded = (picture.own() & picture.crowd & (picture.overlaps >= FOREGROUND)).any(1)
    for label, overlaps, excused in zip(picture.labels, picture.overlaps, crowded):
      best = int(np.where(free, overlaps, -1).argmax()) if free.any() else -1
      if best >= 0 and overlaps[best] >= FOREGROUND:
        counts[picture.truth[best], label] += 1
        free[best] = False
      elif not excused: counts[background, label] += 1
    np.add.at(counts, (picture.truth[free], background), 1)
  return counts


def error_kinds(ground_truth: dict, category_ids: list[int], found: Found, *, score_threshold: float = 0.0) -> dict[str, Any]:
  """Errors by kind, and what mending each kind alone would add to AP50 (TIDE: Bolya et al. 2020, sections 2.2 and 2.3).

  A false positive is of kind "localisation" where it overlaps truth of its class with an IoU of 0.1 to 0.5, else "class" (truth of another class, at
  least 0.5), "duplicate" (truth of its class, at least 0.5, which a better detection has), "background" (all truth under 0.1), else "both". "missed"
  is truth neither found nor the object of a "class" or "localisation" error. Mending turns the best of these two on an undetected truth into a hit,
  removes the rest and the other false positives, and takes what was missed out of the truth. All this is as in the authors' program.

  Returns {"AP50", "correct", "kinds": {kind: {"count", "delta_AP50"}}}, of detections of at least `score_threshold`; AP50 is `COCOeval`'s at
  threshold 0, and NaN, with its deltas, where there is no truth."""
  labels, scores, kinds, targets, truth, start = [], [], [], [], [], 0
  for picture in _pictures(ground_truth, category_ids, found, score_threshold):
    matched, excused = picture.match()
    # one truth more, which nothing overlaps, so that there is a largest overlap
    overlaps, own = np.pad(np.where(picture.crowd, 0.0, picture.overlaps), ((0, 0), (0, 1))), np.pad(picture.own(), ((0, 0), (0, 1)))
    same, other = np.where(own, overlaps, 0.0), np.where(own, 0.0, overlaps)
    best_same, best_other = same.max(1), other.max(1)
    kind = np.select([matched >= 0, (best_same >= BACKGROUND) & (best_same < FOREGROUND), best_other >= FOREGROUND, best_same >= FOREGROUND,
                      np.maximum(best_same, best_other) < BACKGROUND],
                     [-1, *(KINDS.index(k) for k in ("localisation", "class", "duplicate", "background"))], KINDS.index("both"))
    target = np.select([matched >= 0, kind == KINDS.index("class")], [matched, other.argmax(1)], same.argmax(1))
    for rows, values in zip((labels, scores, kinds, targets), (picture.labels, picture.scores, kind, target + start)): rows.append(values[~excused])
    truth.append(np.where(picture.crowd, -1, picture.truth))
    start += len(picture.truth)
  labels, kinds, targets, truth = (np.concatenate([np.empty(0, np.int64), *rows]) for rows in (labels, kinds, targets, truth))
  scores = np.concatenate([np.empty(0), *scores])

  correct, positives = kinds < 0, np.bincount(truth[truth >= 0], minlength=len(category_ids))
  detected = np.zeros(len(truth), bool)
  detected[targets[correct]] = True
  classes = positives > 0
  base = _mean_ap(labels, scores, correct, positives, classes)
  result = {"AP50": base, "correct": int(correct.sum()), "kinds": {}}
  # of all errors that a correction would turn into a hit on the same, undetected truth, the best one can be
  mendable = np.flatnonzero(np.isin(kinds, [KINDS.index("class"), KINDS.index("localisation")]))
  mendable = mendable[~detected[targets[mendable]]]
  mendable = mendable[np.lexsort((-scores[mendable], targets[mendable]))]
  chosen = np.zeros(len(kinds), bool)
  chosen[mendable[np.diff(targets[mendable], prepend=-1) != 0]] = True
  for number, kind in enumerate(KINDS):
    mine, left = kinds == number, positives
    if kind == "missed":
      missed = (truth >= 0) & ~detected
      missed[targets[mendable]] = False
      left = positives - np.bincount(truth[missed], minlength=len(positives))
    right, keep, mended = correct | (mine & chosen), ~mine | chosen, labels.copy()
    mended[mine & chosen] = truth[targets[mine & chosen]]
    delta = _mean_ap(mended[keep], scores[keep], right[keep], left, classes) - base
    result["kinds"][kind] = {"count": int(missed.sum() if kind == "missed" else mine.sum()), "delta_AP50": delta}
  return result


def missed_by_size(ground_truth: dict, category_ids: list[int], found: Found, *, score_threshold: float = 0.3) -> dict[str, list]:
  """How many objects of each size there are, "objects", and how many of them no detection of at least `score_threshold` finds, "missed", between
  neighbours of `SIDES`, which is "sides"."""
  objects, missed = (np.zeros(len(SIDES) - 1, np.int64) for _ in range(2))
  for picture in _pictures(ground_truth, category_ids, found, score_threshold):
    matched, _ = picture.match()
    left = ~picture.crowd & ~np.isnan(picture.sides)
    objects += np.histogram(picture.sides[left], SIDES)[0]
    left[matched[matched >= 0]] = False
    missed += np.histogram(picture.sides[left], SIDES)[0]
  return {"sides": list(SIDES), "objects": objects.tolist(), "missed": missed.tolist()}


def rank_pictures(ground_truth: dict, category_ids: list[int], found: Found, *, score_threshold: float = 0.3) -> list[dict[str, Any]]:
  """All pictures, the best first, as {"image_id", "quality", "truth", "found", "correct"}: counts of boxes, of detections of at least
  `score_threshold` and of hits at IoU 0.5.

  quality is F1 with each hit counted by its IoU: 2 * (sum of IoU) / (truth + found), which tells a tight box from a loose one. Where there is nothing
  to find it is 1, and 0 if something was found. Of equals, the one with fewer wrong boxes is the better."""
  ranked = []
  for picture in _pictures(ground_truth, category_ids, found, score_threshold):
    matched, excused = picture.match()
    hit = matched >= 0
    truth, count, correct = int((~picture.crowd).sum()), int((~excused).sum()), int(hit.sum())
    quality = 2 * float(picture.overlaps[hit, matched[hit]].sum()) / (truth + count) if truth + count else 1.0
    ranked.append({"image_id": picture.image_id, "quality": quality, "truth": truth, "found": count, "correct": correct})
  return sorted(ranked, key=lambda p: (-p["quality"], p["truth"] + p["found"] - 2 * p["correct"]))


def best_and_worst(ranked: list[dict[str, Any]], count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Of `rank_pictures`, the `count` best, best first, and the `count` worst, worst first; no picture is both. A picture without truth is among the
  best only where there are not enough others."""
  worst = ranked[::-1][:min(count, len(ranked) // 2)]
  rest = ranked[:len(ranked) - len(worst)]
  return sorted(rest, key=lambda p: not p["truth"])[:count], worst


def analyse(metric: CocoMetric, result: CocoResult, *, score_threshold: float = 0.3, pictures: int = 4) -> dict[str, Any]:
  """All of the above for an evaluation and its result, with precision-recall curves at half of `COCOeval`'s recalls, as JSON values (NaN is None).

  "classes" are in label order; "confusion" lists [truth, found, count] with K for background; "errors" counts all detections, "confident_errors"
  those of at least `score_threshold`; "best" and "worst" are `pictures` entries of `rank_pictures`."""
  kept = {image["id"]: image for image in metric.ground_truth["images"] if image["id"] in metric.image_ids}
  truth = metric.ground_truth | {"images": list(kept.values())}
  ids = metric.category_ids.tolist()
  given = truth, ids, metric.found
  names = {category["id"]: category["name"] for category in truth["categories"]}
  boxes = {c: 0 for c in ids}
  for annotation in truth["annotations"]:
    if annotation["image_id"] in kept and not (annotation.get("iscrowd", 0) or annotation.get("difficult", 0)): boxes[annotation["category_id"]] += 1
  precision = result.precision
  def mean(values: np.ndarray) -> float | None: return float(values[values > -1].mean()) if (values > -1).any() else None
  def curve(values: np.ndarray) -> list[float] | None:
    """[T,101,K] averaged over thresholds and over classes that have truth."""
    known = (values > -1).all((0, 1))
    return np.round(values[..., known].mean((0, 2))[CURVE_POINTS], 4).tolist() if known.any() else None
  classes = [{"name": str(names[c]), "boxes": boxes[c], "AP": mean(precision[..., k]), "AP50": mean(precision[0, :, k]),
              "precision": curve(precision[:1, :, k:k + 1])} for k, c in enumerate(ids)]
  matrix = confusion(*given, score_threshold=score_threshold)
  best, worst = best_and_worst(rank_pictures(*given, score_threshold=score_threshold), pictures)
  return _json({
    "images": len(kept), "score_threshold": score_threshold, "classes": classes, "recall": np.linspace(0, 1, 101)[CURVE_POINTS].round(4).tolist(),
    "precision": {"AP50": curve(precision[:1]), "AP75": curve(precision[5:6]), "AP": curve(precision)},
    "confusion": [[int(i), int(j), int(matrix[i, j])] for i, j in np.argwhere(matrix)],
    "errors": error_kinds(*given), "confident_errors": error_kinds(*given, score_threshold=score_threshold),
    "sizes": missed_by_size(*given, score_threshold=score_threshold), "best": best, "worst": worst})


def average_precision(scores: np.ndarray, correct: np.ndarray, positives: int) -> float:
  """`COCOeval`'s AP at one IoU of a class with `positives` boxes: the mean, over 101 recalls, of the best precision at that recall or above.

  scores [N], in any order, of which `correct` bool [N] are hits. With nothing to find it is 1 if nothing was found and 0 otherwise."""
  if positives == 0: return float(len(scores) == 0)
  hits = np.cumsum(correct[np.argsort(-scores, kind="stable")])
  precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
  at = np.searchsorted(hits / positives, np.linspace(0, 1, 101))
  return float(np.append(precision, 0.0)[at].mean())


def _mean_ap(labels: np.ndarray, scores: np.ndarray, correct: np.ndarray, positives: np.ndarray, classes: np.ndarray) -> float:
  """The mean `average_precision` of `classes` bool [K]."""
  values = [average_precision(scores[mine := labels == k], correct[mine], int(positives[k])) for k in np.flatnonzero(classes)]
  return float(np.mean(values)) if values else math.nan


def _pictures(ground_truth: dict, category_ids: list[int], found: Found, score_threshold: float) -> Iterator[Picture]:
  """The pictures in the order of their ids, as `COCOeval` takes them."""
  label_of = {category: label for label, category in enumerate(category_ids)}
  rows: dict[int, list[dict]] = {image["id"]: [] for image in ground_truth["images"]}
  for annotation in ground_truth["annotations"]:
    if annotation["image_id"] in rows: rows[annotation["image_id"]].append(annotation)
  areas = {image["id"]: image.get("width", math.nan) * image.get("height", math.nan) for image in ground_truth["images"]}
  for image_id in sorted(rows):
    mine = rows[image_id]
    sides = np.sqrt(np.array([a["bbox"][2] * a["bbox"][3] for a in mine], np.float64) / areas[image_id])
    truth = np.array([label_of[a["category_id"]] for a in mine], np.int64)
    crowd, difficult = (np.array([bool(a.get(key, 0)) for a in mine], bool) for key in ("iscrowd", "difficult"))
    boxes, scores, categories = found.get(image_id, (np.empty((0, 4)), np.empty(0), np.empty(0, np.int64)))
    labels = np.array([label_of[c] for c in np.asarray(categories).tolist()], np.int64)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    order = order[(_turn(labels[order]) < MAX_DETECTIONS) & (scores[order] >= score_threshold)]
    overlaps = np.zeros((len(order), len(mine)))
    if overlaps.size:
      overlaps = mask.iou(np.asarray(boxes, np.float64)[order], np.array([a["bbox"] for a in mine], np.float64), crowd.astype(np.uint8))
    yield Picture(image_id, truth, crowd | difficult, labels[order], np.asarray(scores, np.float64)[order], overlaps, sides)


def _turn(labels: np.ndarray) -> np.ndarray:
  """How many equal labels come before each, i64 [N]."""
  order = np.argsort(labels, kind="stable")
  turn = np.empty(len(labels), np.int64)
  turn[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
  return turn


def _json(value: Any) -> Any:
  if isinstance(value, dict): return {key: _json(v) for key, v in value.items()}
  if isinstance(value, list): return [_json(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
