"""What wandb shows beside a run's curves: pictures with boxes to switch on and off, tables of pictures, classes and errors, precision by recall, and
confusion.

Functions that take `wandb` are given the module, which this one does not import, so that a run can do without it."""
from collections.abc import Iterable, Sequence
from typing import Any
import numpy as np

CLASSES_IN_MATRIX, CLASSES_IN_CURVES = 30, 20


def boxed_image(wandb: Any, image: np.ndarray, truth: tuple, found: tuple, class_names: Sequence[str], caption: str | None = None) -> Any:
  """image u8 [H,W,3] as wandb shows it, with two layers of boxes, "ground_truth" and "predictions": each is boxes f32 [M,4] (xyxy, pixels of image),
  labels [M] and scores [M] or None."""
  names = dict(enumerate(map(str, class_names)))
  def layer(boxes, labels, scores):
    data = [{"position": dict(zip(("minX", "minY", "maxX", "maxY"), map(float, box))), "domain": "pixel", "class_id": int(label),
             "box_caption": names.get(int(label), str(label)) + ("" if score is None else f" {score:.2f}"),
             **({} if score is None else {"scores": {"score": float(score)}})}
            for box, label, score in zip(boxes, labels, [None] * len(boxes) if scores is None else scores)]
    return {"box_data": data, "class_labels": names}
  return wandb.Image(image, caption=caption, file_type="jpg", boxes={"predictions": layer(*found), "ground_truth": layer(*truth)})


def of_detector(wandb: Any, analysis: dict[str, Any], pictures: Iterable[dict[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
  """The panels of an evaluation: `analysis` is that of `detection.analysis.analyse`, `pictures` are `report.ranked_pictures`, the worst first."""
  rows = [[boxed_image(wandb, p["image"], p["truth_boxes"], p["found_boxes"], class_names), p["name"], p["quality"], p["truth"], p["found"],
           p["correct"]] for p in pictures]
  classes = analysis["classes"]
  errors, confident = (analysis[key]["kinds"] for key in ("errors", "confident_errors"))
  matrix = np.zeros((len(classes) + 1,) * 2, int)
  for i, j, count in analysis["confusion"]: matrix[i, j] = count
  recall = analysis["recall"]
  means = {"IoU 0.50": "AP50", "IoU 0.75": "AP75", "mean of 0.50 to 0.95": "AP"}
  ranked = sorted((c for c in classes if c["precision"]), key=lambda c: c["AP50"])
  if len(ranked) > CLASSES_IN_CURVES: ranked = ranked[:CLASSES_IN_CURVES // 2] + ranked[-CLASSES_IN_CURVES // 2:]
  return {
    "eval/pictures": wandb.Table(columns=["picture", "name", "quality", "truth", "found", "correct"], data=rows),
    "eval/classes": wandb.Table(columns=["class", "boxes", "AP", "AP50"], data=[[c["name"], c["boxes"], c["AP"], c["AP50"]] for c in classes]),
    "eval/errors": wandb.Table(columns=["kind", "count", f"count from score {analysis['score_threshold']:g}", "AP50 lost to it"],
                               data=[[kind, e["count"], confident[kind]["count"], e["delta_AP50"]] for kind, e in errors.items()]),
    "eval/precision_recall": _curves(wandb, "Precision by recall, all classes", recall,
                                     [(name, analysis["precision"][key]) for name, key in means.items() if analysis["precision"][key]]),
    "eval/precision_recall_by_class": _curves(wandb, "Precision by recall at IoU 0.50", recall, [(c["name"], c["precision"]) for c in ranked]),
    "eval/confusion_matrix": confusion(wandb, matrix, [c["name"] for c in classes])}


def of_classifier(wandb: Any, pictures: Iterable[tuple[np.ndarray, str, float, int, int, float]], counts: np.ndarray,
                  class_names: Sequence[str]) -> dict[str, Any]:
  """The panels of an evaluation: `pictures` are (image u8 [H,W,3], name, loss, true label, found label, its chance), the worst first, and `counts`
  i64 [K,K] says how often class i was taken for class j."""
  rows = [[wandb.Image(image, file_type="jpg"), name, loss, class_names[label], class_names[found], chance]
          for image, name, loss, label, found, chance in pictures]
  totals = counts.sum(1)
  return {
    "eval/pictures": wandb.Table(columns=["picture", "name", "loss", "truth", "found", "chance"], data=rows),
    "eval/classes": wandb.Table(columns=["class", "pictures", "top-1"], data=[[str(name), int(n), float(counts[i, i] / n) if n else None]
                                                                             for i, (name, n) in enumerate(zip(class_names, totals))]),
    "eval/confusion_matrix": confusion(wandb, np.pad(counts, ((0, 1), (0, 1))), class_names)}


def beside_target(wandb: Any, name: str, scores: Sequence[tuple[float, float]], target: float) -> Any:
  """A chart of a score, as (epoch, value), with its target as a second line."""
  epochs, values = zip(*scores)
  return wandb.plot.line_series(epochs, [values, [target] * len(epochs)], keys=[name, "target"], title=f"{name} and its target", xname="epoch")


def confusion(wandb: Any, matrix: np.ndarray, class_names: Sequence[str]) -> Any:
  """A chart of how often class i was found as class j, i64 [K+1,K+1] with background last, which is left out where it is all zeros; of many classes,
  those confused most."""
  k = len(class_names)
  chosen = most_confused(matrix, CLASSES_IN_MATRIX)
  background = [k] if matrix[k].any() or matrix[:, k].any() else []
  data = [["background" if i == k else str(class_names[i]), "missed" if j == k else str(class_names[j]), int(matrix[i, j])]
          for i in chosen + background for j in chosen + background]
  fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
  return wandb.plot_table(vega_spec_name="wandb/confusion_matrix/v1", data_table=wandb.Table(columns=list(fields), data=data), fields=fields,
                          string_fields={"title": "Confusion" + f", the {len(chosen)} classes confused most" * (len(chosen) < k)})


def most_confused(matrix: np.ndarray, most: int) -> list[int]:
  """Of the classes that occur in matrix i64 [K+1,K+1], with background last, the `most` that are confused most with others, in label order."""
  k = len(matrix) - 1
  mixed = matrix[:k, :k] - np.diag(np.diag(matrix)[:k])
  occurs = matrix[:k].sum(1) + matrix[:, :k].sum(0)
  present = np.flatnonzero(occurs)
  weight = mixed.sum(0) + mixed.sum(1) + occurs * 1e-6
  return sorted(present[np.argsort(-weight[present], kind="stable")][:most].tolist())


def _curves(wandb: Any, title: str, recall: Sequence[float], curves: Sequence[tuple[str, Sequence[float]]]) -> Any:
  """A chart of precision by recall, a line for each (name, precision)."""
  data = [[str(name), x, y] for name, precision in curves for x, y in zip(recall, precision)]
  fields = {"x": "recall", "y": "precision", "class": "class"}
  return wandb.plot_table(vega_spec_name="wandb/area-under-curve/v0", data_table=wandb.Table(columns=["class", "recall", "precision"], data=data),
                          fields=fields, string_fields={"title": title, "x-axis-title": "recall", "y-axis-title": "precision"})
