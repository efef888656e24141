"""The report of a run, `report.html`: one page with charts, pictures and tables that loads nothing from anywhere.

A trainer calls `save_environment` at its start, `save_evaluation` after each evaluation, and `update`. From what these and the tracker left in the
folder the page can be built again at any time, of runs that were stopped too:

  python -m tinydet.reporting.report runs/mine
  python -m tinydet.reporting.report --compare runs/mine runs/other --out compare.html

matplotlib draws, Jinja2 lays out `report.html.jinja`; a run goes on without them.
"""
import argparse, base64, datetime, html, io, json, logging, os, platform, re, shlex, sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
import numpy as np
from PIL import Image
from tinydet.errors import UserError, exit_on_user_error
from tinydet.weights.checkpoint import whole_file
from tinydet.reporting.advice import advise
from tinydet.reporting.panels import most_confused
from tinydet.reporting.pictures import draw_boxes
from tinydet.reporting.tracking import duration

PICTURES = 4              # of the best and of the worst on the page
PICTURE_SIDE = 560        # pixels of a picture on the page, along its longer side
CHART_SIZE = (5.0, 2.9)   # inches of 72 units: a chart as wide as a phone's screen, so that its text is as large there as it is here
COLORS = 8                # of --s1 .. --s8 in the template
DASHES = ("", "6 2", "2 2", "8 2 2 2")
SIZES = {"mAP_small": "small, under 32² pixels", "mAP_medium": "medium", "mAP_large": "large, over 96² pixels"}
SCORES = {"mAP": "mAP", "top1": "top-1"}
LABELS = {"mAP50": "AP50", "mAP75": "AP75", "mAP_small": "small", "mAP_medium": "medium", "mAP_large": "large", "top1": "top-1", "top5": "top-5",
          "bbox_regression": "boxes", "gradient_norm": "gradient norm"}
KINDS = {"class": ("Class", "the right place, the wrong class"), "localisation": ("Localisation", "the right class, IoU 0.1 to 0.5"),
         "both": ("Both", "the wrong class, IoU 0.1 to 0.5"), "duplicate": ("Duplicate", "of an object that a better detection has"),
         "background": ("Background", "nothing is there"), "missed": ("Missed", "objects that no detection is near")}
VARIABLES = ("DEV", "BEAM", "JIT", "JITBEAM", "NOOPT", "DEBUG", "PARALLEL", "CC")   # of tinygrad, that change speed or numbers


# ------------------------------------------------------------------------------------------------------------------------------------- records


def save_environment(folder: str | Path, sources: dict[str, str]) -> None:
  """Write environment.json: versions, device, host, the command that started the run, and `sources`, what set each setting (`config.sources`).

  A run that goes on keeps the sources that it began with, but for flags and variables given now."""
  from tinygrad import Device
  from importlib.metadata import PackageNotFoundError, version
  def installed(package: str) -> str | None:
    try: return version(package)
    except PackageNotFoundError: return None
  file = Path(folder)/"environment.json"
  before = _object(file).get("sources", {})
  sources = before | {name: source for name, source in sources.items() if name not in before or source not in ("default", "preset resumed")}
  program = Path(sys.argv[0])
  shown = program.relative_to(Path.cwd()) if program.is_absolute() and program.is_relative_to(Path.cwd()) else program
  _save_json(file, {
    "command": shlex.join(["python", str(shown), *sys.argv[1:]]), "started": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    "Python": platform.python_version(), **{name: installed(name) for name in ("tinygrad", "numpy", "pycocotools")}, "device": Device.DEFAULT,
    "host": platform.node(), "system": platform.platform(), "processors": os.cpu_count(),
    "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}, "sources": sources})


def save_evaluation(folder: str | Path, analysis: dict[str, Any], dataset: Any, metric: Any, *, step: int, epoch: float) -> None:
  """Write evaluation.json, which is `analysis` (`detection.analysis.analyse`), and the pictures that it calls best and worst.

  `dataset` and `metric` are those of `ranked_pictures`. The pictures, best-1-truth.jpg and the like in pictures/, are those of the last evaluation;
  detections are drawn from the analysis' score threshold up."""
  pictures: dict[str, list[dict]] = {}
  for group in ("best", "worst"):
    pictures[group] = []
    for place, picture in enumerate(ranked_pictures(entries := analysis[group][:PICTURES], dataset, metric, analysis["score_threshold"])):
      files = []
      for what in ("truth", "found"):
        files.append(f"{group}-{place + 1}-{what}.jpg")
        with whole_file(Path(folder)/"pictures"/files[-1]) as f:
          drawn = draw_boxes(picture["image"], *picture[f"{what}_boxes"], dataset.class_names)
          Image.fromarray(drawn).save(f, "JPEG", quality=90, subsampling=0)
      pictures[group].append(entries[place] | {"name": picture["name"], "files": files})
  _save_json(Path(folder)/"evaluation.json", {"step": int(step), "epoch": float(epoch), **analysis, **pictures})


def ranked_pictures(entries: Sequence[dict[str, Any]], dataset: Any, metric: Any, score_threshold: float) -> Iterator[dict[str, Any]]:
  """The pictures that `entries` of `detection.analysis.rank_pictures` are about, each as its entry and "name", "image" u8 [H,W,3], 800 pixels long
  at most, and (boxes xyxy in pixels of image, labels, scores or None) as "truth_boxes" and "found_boxes", the latter from `score_threshold` up.

  `dataset` is the one evaluated, in the order of the images in the ground truth of `metric`, its `CocoMetric`."""
  row_of = {image["id"]: i for i, image in enumerate(metric.ground_truth["images"])}
  label_of = {category: label for label, category in enumerate(np.asarray(metric.category_ids).tolist())}
  for entry in entries:
    row = row_of[entry["image_id"]]
    sample = dataset[row]
    boxes, scores, categories = metric.found.get(entry["image_id"], (np.empty((0, 4)), np.empty(0), np.empty(0, int)))
    sure = np.asarray(scores) >= score_threshold
    labels = np.array([label_of[c] for c in np.asarray(categories)[sure].tolist()], int)
    corners = np.concatenate([boxes[sure, :2], boxes[sure, :2] + boxes[sure, 2:]], 1)
    image, shrink = shrunk(sample.image, 800)
    yield entry | {"name": metric.ground_truth["images"][row].get("file_name") or dataset.image_name(row), "image": image,
                   "truth_boxes": (sample.boxes * shrink, sample.labels, None),
                   "found_boxes": (corners * shrink, labels, np.asarray(scores)[sure])}


def update(folder: str | Path, record: Callable[[], None] | None = None) -> str | None:
  """Call `record`, if given, and write the report; returns None, or one line that says why there is none. Nothing here may stop a training run."""
  try:
    if record is not None: record()
    write(folder)
  except Exception as e: return f"no report: {(str(e).strip() or type(e).__name__).splitlines()[0]}"
  return None


def write(folder: str | Path, *, compare: Sequence[str | Path] = (), out: str | Path | None = None) -> Path:
  """Write the page about the run in `folder`, or about it and those of `compare` overlaid, and return its path: `out`, by default report.html, or
  compare.html, in `folder`. UserError where a folder is no run's or matplotlib or Jinja2 are missing."""
  try: import jinja2, matplotlib  # noqa: F401
  except ImportError as e:
    raise UserError(f"a report needs matplotlib and Jinja2, and {e.name} is not installed: pip install matplotlib jinja2") from None
  logging.getLogger("matplotlib").setLevel(logging.ERROR)   # it would announce that it looks for fonts
  runs = [read_run(f) for f in dict.fromkeys(Path(f) for f in (folder, *compare))]
  names = [run.name for run in runs]
  for run in runs:
    if names.count(run.name) > 1: run.name = str(run.folder)
  out = Path(out) if out is not None else Path(folder)/("compare.html" if len(runs) > 1 else "report.html")
  environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  environment.filters |= {"score": _score, "setting": _setting}
  template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
  context = {"written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "runs": runs, "labels": LABELS}
  page = template.render(context | (_compared(runs) if len(runs) > 1 else _single(runs[0])))
  with whole_file(out) as f: f.write(page.encode("utf-8", "replace"))
  return out


# ------------------------------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Record:
  """What a folder holds of a run. lines are those of metrics.jsonl in the order of steps, without steps that a resumed run did again."""
  folder: Path
  name: str
  config: dict[str, Any]
  lines: list[dict[str, Any]]
  summary: dict[str, Any]
  evaluation: dict[str, Any]
  environment: dict[str, Any]

  @property
  def score(self) -> str:
    """The series that ranks its evaluations: "mAP", or "top1" of a classifier."""
    return "top1" if any("eval/top1" in line for line in self.lines) or "label_smoothing" in self.config else "mAP"

  @property
  def target(self) -> float | None: return self.config.get("target")

  @property
  def target_name(self) -> str: return "MLCommons' target" if self.config.get("preset") == "mlperf" and self.target == 0.34 else "target"

  @property
  def finished(self) -> bool: return "minutes" in self.summary

  @property
  def evaluations(self) -> list[dict[str, Any]]:
    """The lines of its evaluations, the last one of each step."""
    return list({line["step"]: line for line in self.lines if f"eval/{self.score}" in line}.values())

  @property
  def best(self) -> dict[str, Any] | None:
    """Its best evaluation, the first of equals."""
    known = [line for line in self.evaluations if (line[f"eval/{self.score}"] or 0) >= 0]   # -1 where there is no truth at all
    return max(known, key=lambda line: line[f"eval/{self.score}"] or 0, default=None)

  @property
  def seconds(self) -> float: return self.lines[-1]["seconds"] if self.lines else 0.0

  @property
  def speed(self) -> float | None:
    """The median of its images per second."""
    speeds = self.series("train/images_per_s")[1]
    return float(np.median(speeds)) if len(speeds) else None

  def series(self, key: str, axis: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
    """The finite values of a series, and where they are on `axis`."""
    rows = {line["step"]: (line[axis], line[key]) for line in self.lines if isinstance(line.get(key), (int, float))}
    return tuple(np.array(list(rows.values()), np.float64).reshape(-1, 2).T)


def read_run(folder: str | Path) -> Record:
  """What is whole in a run's folder; UserError where it is not one."""
  folder = Path(folder)
  if not (folder/"config.json").exists() and not (folder/"metrics.jsonl").exists():
    raise UserError(f"{folder}: is not the folder of a run, which has a config.json and a metrics.jsonl")
  lines, newest = [], 0
  try: text = (folder/"metrics.jsonl").read_bytes().decode("utf-8", "replace")
  except FileNotFoundError: text = ""
  except OSError as e: raise UserError(f"cannot read {folder/'metrics.jsonl'}: {e.strerror or e}") from e
  for row in text.splitlines():
    try: line = json.loads(row)
    except ValueError: continue   # a line that a crash left unfinished
    if not isinstance(line, dict) or not all(isinstance(line.get(key), (int, float)) for key in ("step", "epoch", "seconds")): continue
    if line["step"] < newest and not any(key.startswith("eval/") for key in line):   # an evaluation may be scored while the training goes on
      lines = [before for before in lines if before["step"] <= line["step"]]
      newest = line["step"]
    newest = max(newest, line["step"])
    lines.append(line)
  return Record(folder, folder.resolve().name, _object(folder/"config.json"), sorted(lines, key=lambda line: line["step"]),
             *(_object(folder/f"{name}.json") for name in ("summary", "evaluation", "environment")))


def _object(file: Path) -> dict[str, Any]:
  """The JSON object in a file; empty where there is none."""
  try: value = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError): return {}
  return value if isinstance(value, dict) else {}


def _save_json(file: Path, value: Any) -> None:
  with whole_file(file) as f: f.write((json.dumps(value, allow_nan=False) + "\n").encode())


# ------------------------------------------------------------------------------------------------------------------------------------- charts


@dataclass
class Line:
  name: str
  x: np.ndarray
  y: np.ndarray
  color: int = 0
  dots: bool = False


@dataclass
class Chart:
  title: str
  svg: str                            # markup
  legend: list[tuple[str, int, str]]  # name, colour 1.., dashes
  note: str


def chart(title: str, lines: list[Line], x_label: str, *, target: tuple[float, str] | None = None, top: float | None = None, noisy: bool = False,
          note: str = "") -> Iterator[Chart]:
  """A line chart as SVG whose colours are the page's variables, with a sentence for those who do not see it; nothing where no line has a point.

  target, a value and its name, is a horizontal line; top, the axis' end. noisy lines are drawn faintly, under their smoothed course."""
  lines = [line for line in lines if len(line.x)]
  if not lines: return
  import matplotlib
  from matplotlib.figure import Figure
  from matplotlib.ticker import FuncFormatter, MaxNLocator
  inks = {"ink": "#010101", "muted": "#010102", "grid": "#010103", **{f"s{i + 1}": f"#0102{i:02x}" for i in range(COLORS)}}
  style = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "axes.edgecolor": inks["grid"], "axes.linewidth": 0.8,
           "xtick.color": inks["muted"], "ytick.color": inks["muted"], "axes.labelcolor": inks["muted"], "font.size": 11, "font.family": "sans-serif",
           "lines.scale_dashes": False, "path.simplify_threshold": 0.5}
  with matplotlib.rc_context(style):
    figure = Figure(figsize=CHART_SIZE, layout="constrained")
    axes = figure.subplots()
    for line in lines:
      color, dashes = _look(line.color)
      look = {"color": inks[f"s{color}"], "linestyle": (0, [float(d) for d in dashes.split()]) if dashes else "-"}
      x, y = _thinned(line.x, line.y)
      if noisy and len(x) > 40:
        axes.plot(x, y, color=look["color"], linewidth=0.8, alpha=0.3)
        y = _smooth(y)
      axes.plot(x, y, linewidth=1.8, marker="o" if line.dots or len(x) == 1 else None, markersize=4, markevery=max(1, len(x) // 30), **look)
    if target is not None:
      axes.axhline(target[0], color=inks["ink"], linewidth=1, linestyle=(0, (3, 3)))
      axes.text(0.01, target[0], f"{target[1]} {target[0]:.3g}", transform=axes.get_yaxis_transform(), va="bottom", color=inks["ink"])
    values = np.concatenate([line.y for line in lines])
    if top is None:
      usual = float(np.percentile(values, 97))
      top = (usual if values.max() > 5 * usual > 0 else float(values.max())) * 1.06
    if values.min() >= 0: axes.set_ylim(0, max(top, 1.15 * target[0] if target else 0) or 1)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=x_label == "epoch" and max(line.x.max() for line in lines) >= 3))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis): axis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"e-0", "e-", f"{value:.4g}")))
    axes.grid(axis="y", color=inks["grid"], linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(buffer := io.StringIO(), format="svg", transparent=True, metadata={"Date": None})
  legend = [(line.name, *_look(line.color)) for line in lines]
  spoken = "; ".join(f"{line.name} from {line.y[0]:.3g} at {line.x[0]:.3g} to {line.y[-1]:.3g} at {line.x[-1]:.3g}, highest {line.y.max():.3g}"
                     for line in lines)
  spoken = f"{title} by {x_label}: {spoken}" + (f"; {target[1]} {target[0]:.3g}" if target is not None else "")
  yield Chart(title, _inline(buffer.getvalue(), inks, spoken), legend, note)


def _look(number: int) -> tuple[int, str]:
  """The colour, 1 to COLORS, and the dashes of the line of a number; dashes tell lines apart in print too."""
  return number % COLORS + 1, DASHES[(number + number // COLORS) % len(DASHES)]


def _inline(svg: str, inks: dict[str, str], spoken: str) -> str:
  """matplotlib's SVG file as an element of a page: no prologue, no metadata, no fonts or colours of its own, no ids but those referred to."""
  svg = svg[svg.index("<svg"):]
  view = re.search(r'viewBox="([^"]+)"', svg)[1]
  body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index(">") + 1:], flags=re.S)
  used = {name for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body) for name in pair}
  body = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", body).replace("xlink:href", "href")
  body = re.sub(r"font-family: [^;\"]*;? ?|font: (?=\d)", "", body)
  for name, color in inks.items(): body = body.replace(color, f"var(--{name})")
  body = re.sub(r"\s*\n\s*", " ", body).replace("> <", "><")
  return f'<svg class="chart" role="img" aria-label="{html.escape(spoken)}" viewBox="{view}">{body}'


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
  """At most `most` points, each the mean of some neighbours."""
  if len(x) <= most: return x, y
  edges = np.linspace(0, len(x), most + 1).astype(int)[:-1]
  counts = np.diff(np.append(edges, len(x)))
  return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _smooth(y: np.ndarray) -> np.ndarray:
  """Means over a window of a thirtieth of the points, narrower at the ends."""
  reach = max(1, len(y) // 60)
  total, i = np.append(0.0, np.cumsum(y)), np.arange(len(y))
  low, high = np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(y))
  return (total[high] - total[low]) / (high - low)


def _lines(run: Record, names: Sequence[str], *, dots: bool = False) -> list[Line]:
  """The series of one run, as lines of a chart."""
  return [Line(LABELS.get(n, n).removeprefix(prefix), *run.series(f"{prefix}{n}"), color, dots)
          for color, (prefix, n) in enumerate(("eval/" if dots else "train/", n) for n in names)]


def _clock(runs: list[Record]) -> tuple[str, float]:
  """The unit for the time of the longest run, and its seconds."""
  longest = max(run.seconds for run in runs)
  return ("hours", 3600.0) if longest > 3 * 3600 else ("minutes", 60.0)


def _target(run: Record) -> tuple[float, str] | None: return None if run.target is None else (run.target, run.target_name)


def _over_time(run: Record, key: str, unit: float, scale: float, name: str, color: int = 0) -> Line:
  seconds, values = run.series(key, "seconds")
  return Line(name, seconds / unit, values / scale, color)


def _bytes(runs: list[Record]) -> tuple[str, float]:
  most = max((run.series("train/memory")[1].max(initial=0) for run in runs), default=0)
  return ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)


# ------------------------------------------------------------------------------------------------------------------------------------- pages


def _single(run: Record) -> dict[str, Any]:
  """What the template shows of one run."""
  scalars = dict.fromkeys(key.removeprefix("train/") for line in run.lines for key in line if key.startswith("train/"))
  others = ("lr", "images_per_s", "memory", "gradient_norm", "skipped", "loss_scale", "accuracy", "hours_to_target")
  losses = [name for name in scalars if name not in others]
  scores = ["top1", "top5"] if run.score == "top1" else ["mAP", "mAP50", "mAP75"]
  unit, seconds = _clock([run])
  memory, scale = _bytes([run])
  learning = [
    *chart(SCORES[run.score], _lines(run, scores, dots=True), "epoch", target=_target(run)),
    *chart("Training losses", _lines(run, losses), "epoch", noisy=True),
    *chart("Validation loss", [Line("loss", *run.series("eval/loss"), dots=True)], "epoch"),
    *chart("Accuracy on training pictures", [Line("accuracy", *run.series("train/accuracy"))], "epoch", noisy=True),
    *chart("Learning rate", [Line("learning rate", *run.series("train/lr"))], "epoch"),
    *chart("Gradient norm", [Line("gradient norm", *run.series("train/gradient_norm"))], "epoch", noisy=True),
    *chart("AP by size of the object", [line for line in _lines(run, list(SIZES), dots=True) if (line.y >= 0).any()], "epoch",
           note="; ".join(SIZES.values()))]
  speed = [*chart("Images per second", [_over_time(run, "train/images_per_s", seconds, 1, "images/s")], unit, noisy=True),
           *chart("Hours to the target, expected", [_over_time(run, "train/hours_to_target", seconds, 1, "hours")], unit),
           *chart(f"Device memory, {memory}", [_over_time(run, "train/memory", seconds, scale, memory)], unit)]
  evaluation = run.evaluation
  known = [c for c in evaluation.get("classes", []) if c["AP"] is not None]
  curves = []
  if evaluation.get("precision", {}).get("AP50"):
    recall = np.array(evaluation["recall"])
    means = [Line(name, recall, np.array(evaluation["precision"][key]), i) for i, (key, name) in
             enumerate({"AP50": "IoU 0.50", "AP75": "IoU 0.75", "AP": "mean of 0.50 to 0.95"}.items())]
    ranked = sorted((c for c in known if c["precision"]), key=lambda c: -c["AP50"])
    shown = ranked if len(ranked) <= COLORS else ranked[:COLORS // 2] + ranked[-COLORS // 2:]
    curves = [*chart("Precision by recall, all classes", means, "recall", top=1.02),
              *chart("Precision by recall at IoU 0.50", [Line(c["name"], recall, np.array(c["precision"]), i) for i, c in enumerate(shown)], "recall",
                     top=1.02, note="" if len(shown) == len(ranked) else f"the best and the worst {COLORS // 2} of {len(ranked)} classes")]
  if not known and run.evaluations:   # a run without evaluation.json
    last = run.evaluations[-1]
    known = [{"name": key.removeprefix("eval/AP/"), "boxes": None, "AP": value, "AP50": None}
             for key, value in last.items() if key.startswith("eval/AP/") and value is not None]
  known.sort(key=lambda c: -c["AP"])
  best, target = run.best, run.target
  reached = next((line for line in run.evaluations if target is not None and (line[f"eval/{run.score}"] or 0) >= target), None)
  left_out = ("eval/AP/", "eval/AR1", "eval/AR_", "eval/target", "eval/seconds")
  columns = [key for key in dict.fromkeys(k for line in run.evaluations for k in line)
             if key.startswith("eval/") and (key == "eval/AR100" or not key.startswith(left_out))]
  return {
    "run": run, "title": run.name, "advice": _advice(run),
    "score_name": SCORES[run.score], "key": f"eval/{run.score}", "best": best, "reached": reached,
    "took": duration(run.seconds), "reached_after": duration(reached["seconds"]) if reached else "", "learning": learning, "curves": curves,
    "speed": speed, "columns": columns, "pictures": list(_pictures(run)), "classes": known,
    "absent": len(evaluation.get("classes", [])) - len(known) if evaluation.get("classes") else 0, "confusion": _confusion(evaluation),
    "errors": _errors(evaluation), **_settings(run), "commands": _commands(run), "compare": False}


def _advice(run: Record) -> list[str]:
  """What `advice.advise` says of a detector's run."""
  if run.score != "mAP": return []
  size, longer = run.config.get("size"), run.config.get("max_size")
  known = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)
  side = None if not known else (min(size) * longer if longer else size[0] * size[1]) ** 0.5
  return advise(run.series("eval/mAP"), run.series("train/loss"), run.evaluation.get("sizes"), side)


def _compared(runs: list[Record]) -> dict[str, Any]:
  """What the template shows of several runs."""
  unit, seconds = _clock(runs)
  memory, scale = _bytes(runs)
  def overlay(key: str, dots: bool = False) -> list[Line]: return [Line(run.name, *run.series(key), i, dots) for i, run in enumerate(runs)]
  def timed(key: str, scale: float) -> list[Line]: return [_over_time(run, key, seconds, scale, run.name, i) for i, run in enumerate(runs)]
  targets = {_target(run) for run in runs}
  charts = [
    *(c for score in dict.fromkeys(run.score for run in runs)
      for c in chart(SCORES[score], overlay(f"eval/{score}", True), "epoch", target=next(iter(targets)) if len(targets) == 1 else None)),
    *chart("Training loss", overlay("train/loss"), "epoch", noisy=True),
    *chart("AP50", overlay("eval/mAP50", True), "epoch"),
    *chart("Precision by recall at IoU 0.50", [Line(run.name, np.array(run.evaluation["recall"]), np.array(run.evaluation["precision"]["AP50"]), i)
           for i, run in enumerate(runs) if run.evaluation.get("precision", {}).get("AP50")], "recall", top=1.02),
    *chart("Learning rate", overlay("train/lr"), "epoch"),
    *chart("Images per second", timed("train/images_per_s", 1), unit, noisy=True),
    *chart(f"Device memory, {memory}", timed("train/memory", scale), unit)]
  def differing(names: Sequence[str], value: Callable[[Record, str], Any]) -> list[tuple[str, list]]:
    rows = [(name, [value(run, name) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(map(repr, values))) > 1]
  names = list(dict.fromkeys(key for run in runs for key in run.config if key not in ("run_name", "resume", "out")))
  settings = differing(names, lambda run, name: run.config.get(name, ""))
  hosts = differing(("Python", "tinygrad", "device", "host", "system"), lambda run, name: run.environment.get(name, ""))
  last = [run.evaluations[-1] if run.evaluations else {} for run in runs]
  by_class = [(key.removeprefix("eval/AP/"), [line.get(key) for line in last]) for key in dict.fromkeys(k for line in last for k in line)
              if key.startswith("eval/AP/") and any(line.get(key) is not None for line in last)]
  return {"title": "Comparison of " + ", ".join(run.name for run in runs), "charts": charts, "settings": settings, "hosts": hosts,
          "by_class": by_class, "took": [duration(run.seconds) for run in runs], "scores": [SCORES[run.score] for run in runs], "compare": True,
          "keys": [_look(i) for i in range(len(runs))]}


def _pictures(run: Record) -> Iterator[tuple[str, list[dict[str, Any]]]]:
  """Groups of pictures: the best and the worst, or, of a run that did not record them, some of its last evaluation."""
  headings = {"worst": "Worst", "best": "Best"}
  if not any(run.evaluation.get(group) for group in headings):
    steps = {p: int(m[1]) for p in (run.folder/"pictures").glob("*.jpg") if (m := re.search(r"-(\d{7,})$", p.stem))}
    last = sorted(p for p, step in steps.items() if step == max(steps.values()))[:4]
    sources = [(p.name, _data_uri(p, 2 * PICTURE_SIDE)) for p in last]
    shown = [{"name": name, "images": [(uri, f"{name}: truth on the left, prediction on the right", "")]} for name, uri in sources if uri]
    if shown: yield f"At step {max(steps.values()):,}", shown
    return
  for group, heading in headings.items():
    shown = []
    for entry in run.evaluation.get(group, []):
      uris = [_data_uri(run.folder/"pictures"/Path(name).name, PICTURE_SIDE) for name in entry["files"]]
      if not all(uris): continue
      captions = (f"{entry['truth']} in truth", f"{entry['found']} found, {entry['correct']} right")
      alts = (f"{entry['name']} with its {entry['truth']} true boxes", f"{entry['name']} with {entry['found']} detections")
      shown.append(entry | {"images": list(zip(uris, alts, captions))})
    if shown: yield heading, shown


def _confusion(evaluation: dict[str, Any], most: int = 12) -> dict[str, Any] | None:
  """The matrix of the classes that are confused most, rows as shares of the truth, and the pairs confused most often."""
  if not evaluation.get("confusion"): return None
  names, k = [c["name"] for c in evaluation["classes"]], len(evaluation["classes"])
  matrix = np.zeros((k + 1, k + 1), int)
  for i, j, count in evaluation["confusion"]: matrix[i, j] = count
  mixed = matrix[:k, :k] - np.diag(np.diag(matrix)[:k])
  present, chosen = most_confused(matrix, k), most_confused(matrix, most)
  shown, totals = [*chosen, k], matrix.sum(1)
  rows = [{"name": names[i] if i < k else "background", "cells": [
    {"count": int(matrix[i, j]), "share": float(matrix[i, j] / totals[i]) if totals[i] else 0.0, "same": i == j} for j in shown]} for i in shown]
  pairs = [(names[i], names[j], int(mixed[i, j]), mixed[i, j] / totals[i]) for i, j in np.argwhere(mixed)]
  return {"columns": [*(names[i] for i in chosen), "missed"], "rows": rows, "left_out": len(present) - len(chosen),
          "pairs": sorted(pairs, key=lambda p: -p[2])[:6]}


def _errors(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
  """The rows of the table of errors by kind, longest bar 100."""
  if not evaluation.get("errors"): return []
  every, confident = evaluation["errors"]["kinds"], evaluation["confident_errors"]["kinds"]
  longest = max([entry["delta_AP50"] or 0 for entry in every.values()] + [1e-9])
  return [{"name": name, "what": what, "count": every[kind]["count"], "confident": confident[kind]["count"], "delta": every[kind]["delta_AP50"],
           "bar": max(0.0, 100 * (every[kind]["delta_AP50"] or 0) / longest)} for kind, (name, what) in KINDS.items()]


def _settings(run: Record) -> dict[str, Any]:
  """The settings in two parts: what flags and variables set, with these, and the rest."""
  sources = run.environment.get("sources", {})
  def chosen(name: str) -> bool: return not str(sources.get(name, "default")).startswith(("default", "the run", "preset "))
  return {"changed": [(name, value, sources[name]) for name, value in run.config.items() if chosen(name)],
          "rest": [(name, value, sources.get(name, "")) for name, value in run.config.items() if not chosen(name)], "sourced": bool(sources)}


def _commands(run: Record) -> list[tuple[str, str]]:
  """What to type next, from the folder that the run was started in."""
  folder, data = shlex.quote(str(run.folder)), shlex.quote(str(run.config.get("data", "FOLDER")))
  again = "This report again", f"python -m tinydet.reporting.report {folder}"
  if run.score == "top1":
    backbone = shlex.quote(str(run.config.get("backbone", "resnet18")))
    detector_data = data.replace("crops", "shapes", 1) if data.startswith("crops") else "FOLDER"
    return [("Resume", f"python examples/train_classifier.py --resume {folder}"),
            ("Train a detector", f"python examples/train_retinanet.py --weights {folder} --backbone {backbone} --data {detector_data}"), again]
  fcos = "fpn_channels" in run.config and "box_loss" not in run.config
  trainer = "train_yolo" if "model" in run.config else "train_fcos" if fcos else "train_retinanet"
  return [("Resume", f"python examples/{trainer}.py --resume {folder}"),
          ("Evaluate", f"python examples/evaluate.py --weights {folder} --data {data}"),
          ("Detect", f"python examples/detect.py picture.jpg --weights {folder}"),
          again]


def _score(value: Any) -> str:
  """A score to three places; a dash where there is none, and for the -1 of sizes that the truth does not have."""
  return "–" if not isinstance(value, (int, float)) or value == -1 else f"{value:.3f}"


def _setting(value: Any, name: str = "") -> str:
  """A setting as the text that would set it."""
  if isinstance(value, bool): return "1" if value else "0"
  if isinstance(value, list): return ("x" if name == "size" else ",").join(map(_setting, value)) or "none"
  return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def shrunk(image: np.ndarray, side: int) -> tuple[np.ndarray, float]:
  """image u8 [H,W,3], made smaller if a side is longer than `side`, and the factor."""
  factor = min(1.0, side / max(image.shape[:2]))
  if factor == 1.0: return image, factor
  size = [max(1, round(n * factor)) for n in image.shape[1::-1]]
  return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.LANCZOS)), factor


def _data_uri(file: Path, side: int) -> str | None:
  """A picture as the text of an image's source; None where it cannot be read."""
  try:
    with Image.open(file) as picture: pixels = np.asarray(picture.convert("RGB"))
  except (OSError, ValueError, Image.DecompressionBombError): return None
  Image.fromarray(shrunk(pixels, side)[0]).save(buffer := io.BytesIO(), "JPEG", quality=78)
  return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m tinydet.reporting.report", description="Write the report of a run, or overlay several.")
  parser.add_argument("run", nargs="?", metavar="RUN", help="folder of the run")
  parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="folders of runs to overlay")
  parser.add_argument("--out", metavar="FILE", help="the page; by default report.html or compare.html in the first run's folder")
  options = parser.parse_args(argv)
  folders = [*([options.run] if options.run else []), *options.compare]
  if not folders: parser.error("name the folder of a run")
  with exit_on_user_error(): print(write(folders[0], compare=folders[1:], out=options.out))


if __name__ == "__main__": main(sys.argv[1:])
