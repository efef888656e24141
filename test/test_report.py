import base64, io, json, os, shutil, sys
from html.parser import HTMLParser
import numpy as np, pytest
from PIL import Image
from tinydet.datasets.sample import Sample
from tinydet.scoring.analysis import analyse
from tinydet.scoring.coco_metric import CocoMetric
from tinydet.errors import UserError
from tinydet.reporting import report
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }} $\\frac{", "_Ünïcode 漢字 & co"]
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
  """The page's elements, the text of each kind of them, and the cells of its tables' rows; well formed or AssertionError."""
  def __init__(self, path):
    super().__init__()
    self.open, self.tags, self.text, self.rows = [], [], {}, []
    self.source = path.read_text(encoding="utf-8")
    self.feed(self.source)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    assert len(dict(attrs)) == len(attrs)
    if tag not in VOID: self.open.append(tag)
    if tag == "tr": self.rows.append([])
    if tag in ("td", "th"): self.rows[-1].append("")

  def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag): assert self.open.pop() == tag

  def handle_data(self, data):
    for tag in set(self.open): self.text[tag] = self.text.get(tag, "") + data
    if "td" in self.open or "th" in self.open: self.rows[-1][-1] += data.strip()

  def all(self, tag): return [attrs for name, attrs in self.tags if name == tag]


def nothing_leaves(page):
  """No element and no style refers to anything outside of the page, and the page forbids it."""
  assert page.all("meta")[1]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
  assert len(ids) == len(set(ids))
  for tag, attrs in page.tags:
    assert tag not in ("script", "iframe", "object", "embed", "base", "form", "video", "audio") and not any(name.startswith("on") for name in attrs)
    for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
      if name in attrs: assert attrs[name].startswith("data:") or attrs[name].removeprefix("#") in ids, (tag, attrs[name][:80])
  styles = page.text["style"] + " ".join(attrs.get("style", "") + attrs.get("clip-path", "") for _, attrs in page.tags)
  assert "@import" not in styles and all(target.startswith("(#") for target in styles.split("url")[1:])
  for picture in page.all("img"): assert picture["alt"]
  charts = [attrs for attrs in page.all("svg") if attrs.get("class") == "chart"]
  for svg in charts: assert svg["aria-label"] and svg["viewbox"]
  assert "#0101" not in page.source and "#0102" not in page.source   # every colour of a chart is one of the page's
  return charts


def training(steps=60, evaluations=(20, 40, 60), class_names=("cat", "dog"), score="mAP"):
  lines = []
  for step in range(5, steps + 1, 5):
    lines.append({"step": step, "epoch": step / 20, "seconds": 2.0 * step, "train/loss": 3 / step, "train/classification": 2 / step,
                  "train/bbox_regression": 1 / step, "train/lr": 1e-3 * (1 - step / 60), "train/images_per_s": 40 + step % 7,
                  "train/memory": 5e8 + step})
    if step in evaluations:
      value = 0.123456 + step / 200
      values = {"top1": value, "top5": 0.9, "loss": 0.7} if score == "top1" else {
        "mAP": value, "mAP50": value * 1.5, "mAP75": value * 0.9, "mAP_small": 0.1, "mAP_medium": value, "mAP_large": -1.0, "AR1": 0.3,
        "AR100": 0.6,
        **{f"AP/{name}": value - 0.01 * i for i, name in enumerate(class_names)}}
      lines.append({"step": step, "epoch": step // 20, "seconds": 2.0 * step + 1, "eval/target": 0.4} | {f"eval/{k}": v for k, v in values.items()})
  return lines


def run_folder(folder, lines=None, config=None, summary=True):
  folder.mkdir(parents=True)
  if config is None:
    config = {"preset": "demo", "data": "shapes:2", "size": [128, 96], "backbone": "resnet18", "epochs": 3, "target": 0.4, "lr": 0.001}
  (folder/"config.json").write_text(json.dumps(config))
  lines = training() if lines is None else lines
  (folder/"metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  if summary: (folder/"summary.json").write_text(json.dumps({"minutes": 2.0}))
  return folder


class Pictures:
  """Twelve pictures, of which every third has nothing on it."""
  class_names, category_ids = HOSTILE, [3, 1, 9, 4]

  def __init__(self, side=96):
    rng = np.random.default_rng(0)
    self.images = [rng.integers(0, 255, (side, 2 * side, 3), np.uint8) for _ in range(12)]
    self.boxes = [np.float32([[5, 5, 45, 45], [60, 10, 90, 80]])[:i % 3] for i in range(12)]

  def __len__(self): return 12

  def __getitem__(self, i):
    size = self.images[i].shape[:2]
    return Sample(self.images[i], self.boxes[i], np.arange(len(self.boxes[i]), dtype=np.int32) + i // 3 % 3, 500 - i, size, size)

  def image_name(self, i): return f'"><b>{i}.jpg'

  def ground_truth(self):
    annotations = [{"image_id": 500 - i, "category_id": self.category_ids[label], "bbox": [*box[:2], *(box[2:] - box[:2])],
                    "area": float(np.prod(box[2:] - box[:2])), "iscrowd": 0}
                   for i in range(12) for box, label in zip(self.boxes[i].astype(float), self[i].labels)]
    return {"images": [{"id": 500 - i, "height": 96, "width": 192} for i in range(12)], "annotations": annotations,
            "categories": [{"id": c, "name": n} for c, n in zip(self.category_ids, HOSTILE)]}


def evaluated(folder, dataset=None):
  """Record an evaluation of `Pictures` in which half of the pictures go right, and return the analysis."""
  dataset = dataset or Pictures()
  metric = CocoMetric(dataset.ground_truth(), dataset.category_ids)
  for i in range(12):
    boxes = np.array(dataset.boxes[i], np.float64).reshape(-1, 4)
    if i % 2: boxes = boxes + 30
    metric.found[500 - i] = (np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1), np.full(len(boxes), 0.9),
                             np.array(dataset.category_ids)[dataset[i].labels])
  report.save_evaluation(folder, record := analyse(metric, metric.compute(), pictures=2), dataset, metric, step=60, epoch=3)
  return record


@pytest.fixture
def complete(tmp_path, monkeypatch):
  """A run with everything that a report can show."""
  folder = run_folder(tmp_path/"runs"/"a&b", training(class_names=HOSTILE))
  monkeypatch.setattr(sys, "argv", ["examples/train_retinanet.py", "--data", "<i>data</i>"])
  report.save_environment(folder, {"lr": "--lr", "epochs": "preset demo", "size": "default"})
  evaluated(folder)
  return folder


def test_a_complete_report(complete):
  path = report.write(complete)
  page = Page(path)
  charts = nothing_leaves(page)
  assert path == complete/"report.html" and path.stat().st_size < 2_000_000
  assert len(charts) == 8 and len(page.all("img")) == 8   # two of the best and two of the worst, truth and prediction
  for picture in page.all("img"):
    with Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as image: assert image.size == (560, 280)
  # numbers
  lines = [line for line in training(class_names=HOSTILE) if "eval/mAP" in line]
  assert page.text["strong"] == f"{lines[-1]['eval/mAP']:.3f}"
  table = [row for row in page.rows if row and row[0] in ("1", "2", "3") and len(row) == 9]
  values = [[line[f"eval/{key}"] for key in ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large", "AR100")] for line in lines]
  assert table == [[str(line["epoch"]), str(line["step"]), *("–" if v == -1 else f"{v:.3f}" for v in row)] for line, row in zip(lines, values)]
  assert "target 0.400 reached at epoch 3, after 2:01" in " ".join(page.text["header"].split()) and "finished" in page.text["dd"]
  # hostile names show as what they are
  for name in HOSTILE: assert name in page.text["th"] and name in page.text["li"]
  assert "a&b" in page.text["h1"] and '"><b>' in page.text["figcaption"] and "<i>data</i>" in page.text["pre"]
  assert ["lr", "0.001", "--lr"] in page.rows and ["size", "128x96", "default"] in page.rows
  record = json.loads((complete/"evaluation.json").read_text())
  for entry in record["classes"]:
    if entry["AP"] is not None: assert [entry["name"], str(entry["boxes"]), f"{entry['AP50']:.3f}", f"{entry['AP']:.3f}", ""] in page.rows
  for kind, confident in zip(record["errors"]["kinds"].items(), record["confident_errors"]["kinds"].values()):
    row = next(row for row in page.rows if row[0].lower().startswith(kind[0]) and row[1][0] in "+-")
    assert row[1:] == [f"{kind[1]['delta_AP50']:+.3f}", "", str(kind[1]["count"]), str(confident["count"])]


def test_hours_to_the_target_are_of_the_speed_and_no_loss(tmp_path):
  lines = [line | {"train/hours_to_target": 3 - line["epoch"]} if "train/loss" in line else line for line in training()]
  page, without = (Page(report.write(run_folder(tmp_path/name, of))) for name, of in (("with", lines), ("without", training())))
  charts, before = ([attrs["aria-label"] for attrs in nothing_leaves(p)] for p in (page, without))
  assert len(charts) == len(before) + 1 and "Hours to the target, expected" in " ".join(charts)
  assert "hours_to_target" not in page.source and not any("Hours to the target" in label for label in before)


def test_pictures_of_an_evaluation(tmp_path):
  record = evaluated(run_folder(tmp_path/"run"))
  saved = json.loads((tmp_path/"run"/"evaluation.json").read_text())
  assert saved["step"] == 60 and saved["epoch"] == 3 and saved["errors"] == record["errors"]
  assert [p["image_id"] for p in saved["best"]] == [p["image_id"] for p in record["best"]] and saved["best"][0]["quality"] == 1
  files = [file for group in ("best", "worst") for entry in saved[group] for file in entry["files"]]
  assert sorted(p.name for p in (tmp_path/"run"/"pictures").iterdir()) == sorted(files)
  row = 500 - saved["worst"][0]["image_id"]
  assert saved["worst"][0]["name"] == f'"><b>{row}.jpg' and row % 2 == 1
  truth, found = (np.asarray(Image.open(tmp_path/"run"/"pictures"/f).convert("RGB"), int) for f in saved["worst"][0]["files"])
  assert truth.shape == (288, 576, 3) and np.abs(truth - found).max() > 100   # enlarged threefold, with other boxes
  assert saved["best"][0]["image_id"] == 490   # one box, found exactly: its right edge is where it is in truth
  truth, found = (np.asarray(Image.open(tmp_path/"run"/"pictures"/f).convert("RGB"), int) for f in saved["best"][0]["files"])
  assert np.abs(truth - found)[60:90, 110:150].max() < 60


def test_a_large_picture_is_shrunk_with_its_boxes(tmp_path):
  evaluated(run_folder(tmp_path/"run"), Pictures(side=1200))
  with Image.open(tmp_path/"run"/"pictures"/"best-1-truth.jpg") as image: assert image.size == (800, 400)


def test_unfinished_runs(tmp_path):
  folder = run_folder(tmp_path/"run", training(30, ()), summary=False)
  with open(folder/"metrics.jsonl", "a") as f: f.write('{"step": 35, "epoch": 1.75, "sec')   # killed while writing
  page = Page(report.write(folder))
  assert len(nothing_leaves(page)) == 4 and "unfinished, 1.5 of 3 epochs" in page.text["dd"] and "no score yet" in page.text["header"]

  for file in ("config.json", "metrics.jsonl"):   # no more than one of its files, and that empty
    (folder := tmp_path/f"only {file}").mkdir()
    (folder/file).touch()
    page = Page(report.write(folder))
    assert nothing_leaves(page) == [] and "no step done yet" in page.text["dd"]
  with pytest.raises(UserError, match="is not the folder of a run"): report.write(tmp_path)

  folder = run_folder(tmp_path/"evaluated", training(40, (20, 40)), summary=False)   # from before evaluation.json
  (folder/"pictures").mkdir()
  for step in (20, 40): Image.new("RGB", (1200, 500), (step, 0, 0)).save(folder/"pictures"/f"val-1-{step:07d}.jpg")
  (folder/"pictures"/"val-2-0000040.jpg").write_bytes(b"no picture")
  page = Page(report.write(folder))
  assert "target 0.400 not reached yet, 0.077 short" in " ".join(page.text["header"].split())
  assert ["cat", "–", "–", "0.323", ""] in page.rows and len(page.all("img")) == 1 and "At step 40" in page.text["h3"]


def test_a_classifier(tmp_path):
  folder = run_folder(tmp_path/"run", training(score="top1"), {"label_smoothing": 0.1, "data": "crops:1", "backbone": "resnet10_quarter"})
  page = Page(report.write(folder))
  nothing_leaves(page)
  assert page.text["strong"] == "0.423" and "top-1" in page.text["header"] and "Validation loss" in page.text["figcaption"]
  assert "--resume" in page.text["pre"] and "--data shapes:1" in page.text["pre"] and "evaluate.py" not in page.text["pre"]


def test_steps_that_a_resumed_run_did_again_count_once(tmp_path):
  first, again = training(60, (20, 40)), training(60, (60,))
  for line in again: line["train/loss"] = 7.0
  going_on = report.read_run(run_folder(tmp_path/"early", first + [line for line in again if 40 < line["step"] <= 50]))
  assert (going_on.series("train/loss")[0] * 20).tolist() == list(range(5, 51, 5))
  run = report.read_run(run_folder(tmp_path/"run", first + [line for line in again if line["step"] > 40]))
  x, y = run.series("train/loss")
  assert (x * 20).tolist() == list(range(5, 61, 5)) and y[:8].tolist() == [3 / s for s in range(5, 41, 5)] and (y[8:] == 7).all()
  assert [line["step"] for line in run.evaluations] == [20, 40, 60]


def test_an_evaluation_scored_during_the_next_epoch_costs_no_line(tmp_path):
  lines = training(60, (20, 40))
  late = sorted(lines, key=lambda line: line["step"] + 12 * ("eval/mAP" in line))
  assert late != lines
  runs = [report.read_run(run_folder(tmp_path/name, given)) for name, given in (("soon", lines), ("late", late))]
  assert runs[0].lines == runs[1].lines and runs[0].evaluations == runs[1].evaluations


def test_many_classes(tmp_path):
  names = [f"class {i}" for i in range(80)]
  folder = run_folder(tmp_path/"run", training(class_names=names))
  rng = np.random.default_rng(0)
  record = evaluated(folder)
  classes = [{"name": n, "boxes": 10, "AP": 0.5 - i / 200, "AP50": 0.9 - i / 100, "precision": [1.0] * 51} for i, n in enumerate(names)]
  counts = [[i, j, int(rng.integers(1, 9))] for i in range(80) for j in (i, (i + 1) % 80, 80)]
  record |= {"step": 60, "epoch": 3, "classes": classes, "confusion": [*counts, [17, 33, 50]], "best": [], "worst": []}
  (folder/"evaluation.json").write_text(json.dumps(record))
  page = Page(report.write(folder))
  nothing_leaves(page)
  assert "class 17 taken for class 33, 50×" in page.text["p"] and "68 others are left out" in page.text["p"]
  table = [row[0] for row in page.rows if len(row) == 5 and row[0].startswith("class ")]
  assert table == [*names[:10], *names[70:], *names]   # the best and the worst, and all of them folded away


def test_runs_compared(complete, tmp_path, capsys):
  other = run_folder(tmp_path/"runs"/"other", training(40, (20, 40), class_names=HOSTILE[:2]),
                     {"preset": "demo", "lr": 0.01, "backbone": "resnet18"}, summary=False)
  report.main(["--compare", str(complete), str(other), "--out", str(tmp_path/"both.html")])
  assert capsys.readouterr().out == f"{tmp_path/'both.html'}\n"
  page = Page(tmp_path/"both.html")
  assert len(nothing_leaves(page)) == 7
  assert ["lr", "0.001", "0.01"] in page.rows and not any(row[0] == "backbone" for row in page.rows)
  scores = {row[0]: row[1:] for row in page.rows if row[-1] in ("finished", "unfinished")}
  assert scores["a&b"][:4] == ["0.423mAP", "3", "0.423", "0.635"] and scores["other"][:3] == ["0.323mAP", "2", "0.323"]
  assert [HOSTILE[0], "0.423", "0.323"] in page.rows and [HOSTILE[3], "0.393", "–"] in page.rows
  assert report.write(complete, compare=[other]) == complete/"compare.html"


def test_the_command_line(complete, capsys):
  report.main([str(complete)])
  assert capsys.readouterr().out == f"{complete/'report.html'}\n"
  with pytest.raises(SystemExit) as stop: report.main([str(complete.parent)])
  assert stop.value.code == 2 and "is not the folder of a run" in capsys.readouterr().err
  with pytest.raises(SystemExit): report.main([])


def test_a_run_goes_on_without_a_report(complete, monkeypatch):
  def fails(): raise RuntimeError("no space\nleft")
  assert report.update(complete, fails) == "no report: no space" and not (complete/"report.html").exists()
  assert report.update(complete) is None and (complete/"report.html").exists()
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  missing = "no report: a report needs matplotlib and Jinja2, and matplotlib is not installed: pip install matplotlib jinja2"
  assert report.update(complete) == missing


def test_a_resumed_run_keeps_what_set_its_settings(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1"])
  report.save_environment(tmp_path, {"lr": "--lr", "bs": "preset demo", "size": "default"})
  report.save_environment(tmp_path, {"lr": "preset resumed", "bs": "--bs", "size": "preset resumed", "new": "default"})
  written = json.loads((tmp_path/"environment.json").read_text())
  assert written["sources"] == {"lr": "--lr", "bs": "--bs", "size": "default", "new": "default"}
  assert written["command"] == "python train.py --lr 1" and written["Python"] == sys.version.split()[0] and written["tinygrad"]


def browser():
  for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
    if name and (path := shutil.which(name)): return path
  return None


@pytest.mark.skipif(browser() is None, reason="no Chromium (apt-get install chromium, or CHROMIUM=path)")
def test_in_a_browser(complete, tmp_path):
  """Light, dark, printed and on a phone: nothing on the console, no request, all there, nothing wider than the screen.

  The pictures of it are kept in the folder CHROMIUM_SCREENSHOTS."""
  playwright = pytest.importorskip("playwright.sync_api")
  other = run_folder(tmp_path/"runs"/"other")
  shots = os.environ.get("CHROMIUM_SCREENSHOTS", str(tmp_path))
  with playwright.sync_playwright() as p:
    chromium = p.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
    for path in (report.write(complete), report.write(complete, compare=[other])):
      for look, scheme, media, width in (("light", "light", "screen", 1180), ("dark", "dark", "screen", 1180), ("phone", "dark", "screen", 360),
                                         ("print", "dark", "print", 760)):
        tab = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.emulate_media(media=media)
        said, asked = [], []
        tab.on("console", lambda message, said=said: said.append(message.text))
        tab.on("pageerror", lambda error, said=said: said.append(str(error)))
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        tab.goto(path.as_uri())
        assert said == [] and [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert tab.evaluate("document.images.length") == (8 if path.name == "report.html" else 0)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        names = tab.evaluate("[...document.querySelectorAll('tbody th:not(.n)')].filter(e => e.checkVisibility()).map(e => e.clientWidth)")
        assert min(names) >= 80   # columns are not squeezed to a letter a line
        paper = "rgb(20, 23, 27)" if look in ("dark", "phone") else "rgb(255, 255, 255)"
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        with Image.open(io.BytesIO(tab.screenshot(path=f"{shots}/{path.stem}-{look}.png", full_page=True))) as shot:
          pixels = np.asarray(shot.convert("RGB"), int)
        boxes = tab.evaluate("[...document.querySelectorAll('svg.chart')].map(e => { const r = e.getBoundingClientRect();"
                             " const heights = [...e.querySelectorAll('text')].map(t => t.getBoundingClientRect().height);"
                             " return [r.x, r.y, r.right, r.bottom, ...heights] })")
        assert len(boxes) == (8 if path.name == "report.html" else 7)
        lines = [(0x6c, 0xb2, 0xf0), (0xff, 0x91, 0x66)] if look in ("dark", "phone") else [(0x1f, 0x6f, 0xb4), (0xc4, 0x50, 0x1b)]
        for x, y, right, bottom, *heights in boxes:
          # large enough to read, with a line in one of the first of the page's colours
          assert right - x >= 300 and bottom - y >= 150 and min(heights) >= 9
          inside = pixels[round(y):round(bottom), round(x):round(right)]
          assert max((np.abs(inside - line).max(-1) < 60).sum() for line in lines) > 20
        tab.close()
    chromium.close()


def test_advice_is_on_the_page(tmp_path):
  folder = run_folder(tmp_path / "run", training(steps=100, evaluations=(20, 40, 60, 80, 100)))
  page = Page(report.write(folder))
  assert "More epochs: the score still rose by 0.200 in the last quarter of the run." in page.text["section"]
  assert "More epochs" not in Page(report.write(run_folder(tmp_path / "short", training()))).text["section"]
