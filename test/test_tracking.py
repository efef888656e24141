import base64, hashlib, http.server, io, json, os, re, subprocess, sys, threading, time
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from tinydet.errors import UserError
from tinydet.weights import checkpoint
from tinydet.reporting.pictures import class_color, draw_boxes, truth_and_prediction
from tinydet.reporting.tracking import Progress, Tracker, duration, progress_line

ROOT = Path(__file__).parents[1]
RUN = """
import numpy as np, os, sys
from tinydet.reporting.tracking import Tracker
tracker = Tracker("runs/demo", {"bs": 16, "size": [128, 96]}, project="detect", target=0.4)
for step in range(3): tracker.log({"train/loss": 1 / (step + 1)}, step, step / 3)
tracker.log({"eval/mAP": 0.25}, 3, 1)
tracker.log({"eval/mAP": 0.125}, 6, 2)
image, box = np.zeros((32, 32, 3), np.uint8), np.array([[4, 5, 20, 21]], np.float32)
tracker.picture("eval/0", image, box, [1], box + 2, [0], [0.75], ["disk", "square"], 6)
exec(os.environ.get("MIDWAY", ""))
tracker.summary({"seconds_to_target": None})
tracker.finish()
"""


def run(code, folder, **environ):
  """Run code in folder as somebody without credentials, without standard input and at most for a minute."""
  environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)} | environ
  return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                        check=False, timeout=60)


def metrics(folder):
  def strict(name): raise AssertionError(f"{name} is not JSON")
  return [json.loads(line, parse_constant=strict) for line in (folder/"metrics.jsonl").read_text().splitlines()]


def leet(folder, *flags):
  """What wandb's own reader finds in an offline run."""
  done = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(folder)], capture_output=True, text=True, check=True,
                        stdin=subprocess.DEVNULL, timeout=60)
  return done.stdout


def test_local_files_without_wandb(tmp_path):
  tracker = Tracker(tmp_path/"runs"/"one", {"bs": 16}, project="p", target=0.5, mode="disabled")
  tracker.log({"train/loss": np.float32(1.5), "n": np.int64(3)}, 1, 0.5)
  tracker.log({"train/loss": float("nan"), "lr": float("inf")}, np.int64(2), np.float32(1))
  assert len(metrics(tmp_path/"runs"/"one")) == 2, "every line is on the disk at once"
  tracker.log({"eval/mAP": 0.25}, 3, 1)
  tracker.log({"eval/mAP": float("nan")}, 4, 2)
  tracker.summary({"note": "x"})
  tracker.finish()
  lines = metrics(tracker.folder)
  assert [line.pop("seconds") >= 0 for line in lines] == [True] * 4
  assert lines == [{"step": 1, "epoch": 0.5, "train/loss": 1.5, "n": 3}, {"step": 2, "epoch": 1.0, "train/loss": None, "lr": None},
                   {"step": 3, "epoch": 1, "eval/mAP": 0.25, "eval/target": 0.5}, {"step": 4, "epoch": 2, "eval/mAP": None, "eval/target": 0.5}]
  assert json.loads((tracker.folder/"config.json").read_text()) == {"bs": 16}
  assert json.loads((tracker.folder/"summary.json").read_text()) == {"note": "x", "best_mAP": 0.25}
  assert not (tracker.folder/"wandb").exists()


def test_names_and_resuming(tmp_path):
  first = Tracker(tmp_path/"a", {}, project="p", mode="disabled")
  first.log({"train/loss": 1.0}, 1, 0)
  first.finish()
  assert Tracker(tmp_path/"a", {}, project="p", mode="disabled").folder == tmp_path/"a-2"
  # as a crash leaves it: the clock far on, the last line unfinished
  (first.folder/"metrics.jsonl").write_text('{"step": 1, "epoch": 0, "seconds": 100.0}\n{"step": 2, "epo')
  again = Tracker(tmp_path/"a", {}, project="p", mode="disabled", resume={"run_id": first.id, "step": 1, "evaluated": 0})
  again.log({"train/loss": 0.5}, 2, 1)
  assert again.folder == first.folder and again.id == first.id
  assert [line["step"] for line in metrics(again.folder)] == [1, 2] and 100 <= metrics(again.folder)[1]["seconds"] < 160
  (tmp_path/"file").write_text("")
  with pytest.raises(UserError, match="run folder"): Tracker(tmp_path/"file"/"a", {}, project="p", mode="disabled")


def test_without_credentials_the_run_is_offline_and_never_asks(tmp_path):
  done = run(RUN, tmp_path)
  assert done.returncode == 0 and done.stderr == "", done.stderr
  sync, view = done.stdout.splitlines()
  folder = Path(re.fullmatch(r"upload this run: wandb sync (\S+)", sync)[1])
  assert view.endswith(f"wandb leet {folder}") and folder.parts[:3] == ("runs", "demo", "wandb")
  summary = json.loads(leet(tmp_path/folder, "--summary"))
  assert (summary["project"], summary["name"], summary["state"]) == ("detect", "demo", "finished")
  assert summary["config"] == {"bs": 16, "size": [128, 96]} and summary["summary"]["eval/mAP"] == {"max": 0.25, "last": 0.125}
  history = leet(tmp_path/folder)
  for value in ("train/loss", "0.3333333333333333", "eval/mAP", "0.125", "eval/target", "0.25"): assert value in history, value
  overlays = [json.loads(p.read_text()) for p in (tmp_path/folder).rglob("*.boxes2D.json")]
  assert sorted(o["box_data"][0]["box_caption"] for o in overlays) == ["disk 0.75", "square"]
  assert Image.open(tmp_path/"runs/demo/pictures/eval-0-0000006.jpg").size[0] > 2 * 480
  assert not os.path.exists(tmp_path/"wandb"), "wandb's files belong to the run's folder"


EVALUATED = """
import numpy as np, os
from types import SimpleNamespace
from tinydet.datasets.sample import Sample
from tinydet.scoring.analysis import analyse
from tinydet.scoring.coco_metric import CocoMetric
from tinydet.weights import checkpoint
from tinydet.reporting import panels, report
from tinydet.reporting.tracking import Tracker
resume = {"run_id": os.environ["RUN_ID"], "step": 9, "evaluated": 1} if "RUN_ID" in os.environ else None
tracker = Tracker("runs/demo", {"bs": 16}, project="detect", target=0.4, tags=["small", "sgd"], group="rates", artifacts="best", resume=resume)
print(tracker.id)

class Data:   # on the first picture both objects are found, on the second none, on the third one is taken for the other class
  class_names, category_ids = ["disk", "box"], [7, 3]
  def __getitem__(self, i): return Sample(np.full((40, 1600, 3), 90 * i, np.uint8), np.float32([[4, 4, 20, 20], [100, 5, 140, 35]]),
                                          np.int32([0, 1]), i + 1, (40, 1600), (40, 1600))
  def image_name(self, i): return f"{i}.jpg"
data = Data()
truth = [{"image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
         for i in (1, 2, 3) for c, b in ((7, [4, 4, 16, 16]), (3, [100, 5, 40, 30]))]
metric = CocoMetric({"images": [{"id": i} for i in (1, 2, 3)], "annotations": truth,
                     "categories": [{"id": 3, "name": "box"}, {"id": 7, "name": "disk"}]}, data.category_ids)
metric.add_results([{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in (
  (1, 7, [4, 4, 16, 16], 0.9), (1, 3, [100, 5, 40, 30], 0.8), (3, 7, [100, 5, 40, 30], 0.7), (3, 7, [4, 4, 16, 16], 0.6), (2, 3, [0, 0, 9, 9], 0.1))])
result = metric.compute()

def evaluate(step, epoch, weights):
  checkpoint.save("runs/demo/best.safetensors", {"w": np.float32([weights])}, {"model": "m", "step": step, "mAP": result.metrics["mAP"]})
  checkpoint.save(f"runs/demo/checkpoint-{step}.safetensors", {"w": np.float32([weights] * 2)}, {"step": step})
  tracker.improved()
  tracker.log({f"eval/{k}": v for k, v in result.metrics.items()} | {f"eval/AP/{k}": v for k, v in result.class_ap.items()}, step, epoch)
  analysis = analyse(metric, result, pictures=2)
  ranked = sorted(analysis["worst"] + analysis["best"], key=lambda entry: entry["quality"])
  pictures = report.ranked_pictures(ranked, data, metric, analysis["score_threshold"])
  tracker.show(lambda wandb: panels.of_detector(wandb, analysis, pictures, data.class_names), step, epoch)
for epoch in (1, 2):
  tracker.log({"train/loss": 2 - epoch}, 9 * epoch, epoch)
  evaluate(9 * epoch, epoch, epoch)
open("runs/demo/report.html", "w").write("<p>report</p>")
exec(os.environ.get("MIDWAY", ""))
tracker.summary({"minutes": 1.0})
tracker.finish()
"""


def records(folder):
  """What an offline run holds, as wandb's reader gives it: kind -> contents in order; and its tables by name, in the order they were logged, each
  with the files that go with it."""
  kinds = {}
  for line in leet(folder).splitlines(): kinds.setdefault((record := json.loads(line))["type"], []).append(record.get(record["type"]))
  tables = {}
  logged = {key.removesuffix("._type") for history in kinds["history"] for key, value in history["item"].items() if value == "table-file"}
  for files in (artifact_files(artifact) for artifact in kinds["artifact"] if artifact["type"] == "run_table"):
    name = next(path for path in files if path.endswith(".table.json"))
    table = json.loads(files[name])
    tables.setdefault(name.removesuffix(".table.json"), []).append((table["columns"], table["data"], files))
  assert tables.keys() == logged
  return kinds, tables


def artifact_files(record):
  """Content of each file of an artifact, from where wandb would upload it, after a look at its digest."""
  files = {}
  for entry in record["manifest"]["contents"]:
    files[entry["path"]] = content = Path(entry["local_path"]).read_bytes()
    assert base64.b64encode(hashlib.md5(content).digest()).decode() == entry["digest"]
  return files


def test_an_offline_run_holds_all_of_it(tmp_path):
  done = run(EVALUATED, tmp_path, WANDB_X_STATS_SAMPLING_INTERVAL="0.1")
  assert done.returncode == 0 and done.stderr == "", done.stderr
  run_id, sync, _ = done.stdout.splitlines()
  folder = tmp_path/re.fullmatch(r"upload this run: wandb sync (\S+)", sync)[1]
  kinds, tables = records(folder)
  assert (kinds["run"][0]["tags"], kinds["run"][0]["run_group"], kinds["run"][0]["run_id"]) == (["small", "sgd"], "rates", run_id)
  assert any("cpu" in stats["item"] for stats in kinds["stats"]), "how busy the machine is"

  metrics = {metric.get("name", metric.get("glob_name")): metric for metric in kinds["metric"]}
  for name, axis, summary in (("eval/*", "epoch", None), ("train/*", "step", None), ("pictures/*", "step", None), ("train/loss", "step", "min"),
                              ("eval/mAP", "epoch", "max"), ("eval/AP/disk", "epoch", "max")):
    assert metrics[name]["step_metric"] == axis and metrics[name].get("summary") == (summary and {summary: True, "last": True})
  summary = json.loads(leet(folder, "--summary"))["summary"]
  assert summary["train/loss"] == {"min": 0, "last": 0} and summary["minutes"] == 1 and summary["target"] == 0.4

  assert all(len(logged) == 2 for logged in tables.values()), "each evaluation has its own"
  columns, rows, files = tables["eval/pictures"][0]
  assert columns == ["picture", "name", "quality", "truth", "found", "correct"]
  assert [row[1:] for row in rows] == [["1.jpg", 0, 2, 0, 0], ["2.jpg", 0.5, 2, 2, 1], ["0.jpg", 1, 2, 2, 2]], "the worst first"
  assert rows[1][0]["_type"] == "image-file"
  assert Image.open(io.BytesIO(files[rows[1][0]["path"]])).size == (800, 20)
  for layer, expected in (("ground_truth", [(0, 2, "disk", None), (1, 50, "box", None)]),
                          ("predictions", [(0, 50, "disk 0.70", 0.7), (0, 2, "disk 0.60", 0.6)])):
    boxes = rows[1][0]["boxes"][layer]
    assert [(b["class_id"], b["position"]["minX"], b["box_caption"], b.get("scores", {}).get("score")) for b in boxes] == expected

  assert tables["eval/classes"][0][0] == ["class", "boxes", "AP", "AP50"]
  found = {row[0]: row[1:] for row in tables["eval/classes"][0][1]}
  assert found["disk"][0] == found["box"][0] == 3 and found["box"][2] == pytest.approx(34 / 101) and found["disk"][2] > found["box"][2]
  assert {tuple(row[:2]): row[2] for row in tables["eval/confusion_matrix_table"][0][1] if row[2]} == {
    ("disk", "disk"): 2, ("box", "box"): 1, ("box", "disk"): 1, ("disk", "missed"): 1, ("box", "missed"): 1}
  curve = [(x, y) for name, x, y in tables["eval/precision_recall_by_class_table"][0][1] if name == "box"]
  assert len(curve) == 51 and curve[0] == (0, 1) and curve[-1] == (1, 0) and [y for x, y in curve if x <= 0.32] == [1] * 17
  assert {row[0] for row in tables["eval/precision_recall_table"][0][1]} == {"IoU 0.50", "IoU 0.75", "mean of 0.50 to 0.95"}
  assert {row[0]: row[1] for row in tables["eval/errors"][0][1]}["class"] == 1
  assert [[row[:2] for row in rows if row[2] == 0.4] for _, rows, _ in tables["eval/score_and_target_table"]] == [
    [[1, "target"]], [[1, "target"], [2, "target"]]], "a line beside the score's"
  charts = {key.removeprefix("_wandb.visualize."): value["panel_config"]["panelDefId"] for record in kinds["config"]
            for key, value in record["update"].items() if key.startswith("_wandb.visualize.")}
  assert charts == {"eval/precision_recall": "wandb/area-under-curve/v0", "eval/precision_recall_by_class": "wandb/area-under-curve/v0",
                    "eval/confusion_matrix": "wandb/confusion_matrix/v1", "eval/score_and_target": "wandb/lineseries/v0"}

  models = [a for a in kinds["artifact"] if a["type"] == "model"]
  assert {a["name"] for a in models} == {f"model-{run_id}"} and ["best" in a["aliases"] for a in models] == [True, True, True, False]
  assert "latest" in models[-1]["aliases"] and [json.loads(a["metadata"])["step"] for a in models] == [9, 18, 18, 18]
  weights = [next(iter(artifact_files(a).items())) for a in models]
  assert [name for name, _ in weights] == ["best.safetensors"] * 3 + ["checkpoint-18.safetensors"]
  values = []
  for _, content in weights:
    (tmp_path/"w").write_bytes(content)
    values.append(checkpoint.load(tmp_path/"w")[0]["w"][0])
  assert values == [1, 2, 2, 2], "a version stays what it was when the file has a successor"
  assert (tmp_path/"runs/demo/best.safetensors").stat().st_nlink > 1, "no copy"
  assert (folder/"files"/next(h["item"]["report.path"] for h in kinds["history"] if "report.path" in h["item"])).read_text() == "<p>report</p>"
  assert not (tmp_path/".local").exists(), "wandb's files belong to the run's folder"

  done = run(EVALUATED, tmp_path, RUN_ID=run_id)
  assert done.returncode == 0 and done.stdout.count("offline-run-") == 3, "both parts are to be uploaded, the last one to be viewed"
  kinds, tables = records(next(f for f in (tmp_path/"runs/demo/wandb").glob("offline-run-*") if f != folder))
  assert kinds["run"][0]["run_id"] == run_id and len(tables["eval/pictures"]) == 2
  lines = [row[:2] for row in tables["eval/score_and_target_table"][1][1] if row[2] == 0.4]
  assert lines == [[1, "target"]] * 2 + [[2, "target"]], "what came before is in the chart"


def test_asked_to_go_online_without_credentials_it_says_so_once(tmp_path):
  done = run(RUN, tmp_path, WANDB_MODE="online")
  assert done.returncode == 0 and done.stderr.count("\n") == 1 and "not logged in" in done.stderr and "wandb sync" in done.stdout


def test_wandb_mode_disabled_is_honoured(tmp_path):
  done = run(RUN, tmp_path, WANDB_MODE="disabled")
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and len(metrics(tmp_path/"runs"/"demo")) == 5


def test_training_survives_a_missing_wandb(tmp_path):
  done = run("import sys; sys.modules['wandb'] = None\n" + RUN, tmp_path)
  assert done.returncode == 0 and done.stderr.count("\n") == 1 and "the run goes on" in done.stderr and len(metrics(tmp_path/"runs"/"demo")) == 5


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds wandb's service through /proc")
def test_training_survives_the_death_of_wandbs_service(tmp_path):
  kill = """
import signal, time
for folder in filter(str.isdigit, os.listdir("/proc")):
  try: parent = open(f"/proc/{folder}/stat").read().rsplit(")", 1)[1].split()[1]
  except OSError: continue   # it has ended meanwhile
  if parent == str(os.getpid()): os.kill(int(folder), signal.SIGKILL)
time.sleep(0.5)
for step in range(7, 10): tracker.log({"train/loss": 1.0}, step, 3); time.sleep(0.1)
"""
  done = run(RUN, tmp_path, MIDWAY=kill)
  assert done.returncode == 0 and len(metrics(tmp_path/"runs"/"demo")) == 8, done.stderr
  assert done.stderr.count("\n") == 1 and "wandb stopped working" in done.stderr, done.stderr


PROJECT = {"id": "p", "internalId": "p", "name": "detect", "entity": {"id": "e", "name": "me"}}
ARTIFACT = {"id": "QQ==", "artifactSequence": {"id": "Qg==", "name": "model", "project": PROJECT}, "artifactType": {"name": "model"}, "tags": [],
            "description": None, "metadata": "{}", "ttlDurationSeconds": -2, "ttlIsInherited": True, "versionIndex": 0, "historyStep": None,
            "state": "COMMITTED", "size": 8, "digest": "", "commitHash": None, "fileCount": 1, "createdAt": "2020-01-01T00:00:00",
            "updatedAt": None, "aliases": []}


def wandb_server(seen):
  """As much of a wandb server as a run with artifacts takes, on a free port; seen collects what it is sent. It says that it has all files."""
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      seen.append(self.rfile.read(int(self.headers.get("content-length") or 0)).decode(errors="replace"))
      name = (json.loads(seen[-1]).get("variables") or {}).get("name", "x") if "graphql" in self.path else "x"
      bucket = {"id": "Zm9v", "name": name, "displayName": "demo", "config": "{}", "historyLineCount": 0,
                "project": PROJECT}
      data = {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}, "upsertBucket": {"bucket": bucket, "inserted": True},
              "createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}, "project": {"artifact": None},
              "createArtifact": {"artifact": {"id": "QQ==", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "QQ=="}}}},
              "artifact": ARTIFACT}
      answer = json.dumps({"data": data} if "graphql" in self.path else {}).encode()
      self.send_response(200)
      self.send_header("content-length", str(len(answer)))
      self.end_headers()
      self.wfile.write(answer)

    def log_message(self, *_): pass
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return server


@pytest.mark.by_hand
def test_logged_in_it_goes_online_and_a_server_that_falls_silent_costs_only_seconds(tmp_path):
  server = wandb_server(seen := [])
  login = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40}
  (tmp_path/"zero").mkdir()
  assert run(RUN, tmp_path/"zero", **login).stdout.startswith("upload this run") and not seen, "nothing is sent that nobody asked for"
  login["WANDB_MODE"] = "online"
  done = run(RUN, tmp_path, **login)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and any("train/loss" in body for body in seen)

  (tmp_path/"two").mkdir()
  done = run(EVALUATED, tmp_path/"two", **login)
  assert done.returncode == 0 and done.stderr == "" and "wandb takes the weights (0 MB)" in done.stdout, (done.stdout, done.stderr)
  created = [body["variables"]["input"] for body in map(json.loads, filter(lambda body: "mutation CreateArtifact " in body, seen))]
  models = [artifact for artifact in created if artifact["artifactCollectionName"].startswith("model-")]
  assert [sorted(alias["alias"] for alias in artifact["aliases"]) for artifact in models] == [["best", "latest"]] * 3 + [["latest"]]
  assert not list((tmp_path/"two").rglob("wandb/run-*/artifacts/*")), "links to what is uploaded are not kept"

  def stop_when_ready():
    while not (tmp_path/"ready").exists(): time.sleep(0.1)
    server.shutdown()
    server.server_close()
  (stopping := threading.Thread(target=stop_when_ready, daemon=True)).start()
  start, table = time.monotonic(), "tracker.show(lambda wandb: {'eval/table': wandb.Table(['a'], [[1]])}, 7, 3)"
  done = run(RUN, tmp_path, MIDWAY=f"import time; open({str(tmp_path/'ready')!r}, 'w').close(); time.sleep(1.5); {table}", **login)
  stopping.join(10)
  assert done.returncode == 0 and time.monotonic() - start < 30
  assert "did not finish in time" in done.stderr and "wandb sync runs/demo-2/wandb/run-" in done.stdout, (done.stdout, done.stderr)


def test_boxes_are_where_they_should_be_and_the_picture_is_enlarged():
  image = np.full((40, 60, 3), 90, np.uint8)
  drawn = draw_boxes(image, np.array([[10, 12, 50, 36]], np.float32), np.array([1]), None, ["a", "b"])
  assert drawn.dtype == np.uint8 and drawn.shape == (320, 480, 3) and (image == 90).all()
  own = (drawn == class_color(1)).all(-1)
  for y, x in ((96 + 2, 240), (288 - 3, 240), (190, 80 + 2), (190, 400 - 3)): assert own[y, x], (y, x)
  assert (drawn[110:270, 100:380] == 90).all() and (drawn[300:] == 90).all() and (drawn[:, :70] == 90).all()
  assert own[60:95, 80:200].any(), "the label sits on the box"


@pytest.mark.parametrize("background", [0, 128, 255])
def test_a_box_contrasts_with_any_background(background):
  for label in range(20):
    drawn = draw_boxes(np.full((500, 500, 3), background, np.uint8), [[100, 100, 400, 400]], [label], None, [""] * 20)
    line = drawn[250, 98:106].astype(int)
    assert np.abs(line - background).max() >= 100


def test_boxes_from_an_untrained_network_draw_without_a_fuss():
  wild = np.array([[np.nan] * 4, [5, 5, 5, 5], [9, 9, 2, 2], [-1e9, -1e9, 1e9, 1e9], [70, 70, 90, 90], [0, 0, np.inf, 3], [63.9, 63.9, 64, 64]])
  assert draw_boxes(np.zeros((64, 64, 3), np.uint8), wild, np.arange(7), np.linspace(0, 1, 7), ["one"]).shape == (512, 512, 3)
  assert draw_boxes(np.zeros((700, 20, 3), np.uint8), np.zeros((0, 4)), [], None, []).shape == (700, 20, 3)


def test_truth_and_prediction_share_one_picture():
  image, box = np.zeros((500, 500, 3), np.uint8), [[100, 100, 400, 400]]
  both = truth_and_prediction(image, box, [0], np.zeros((0, 4)), [], [], ["a"])
  color = (both == class_color(0)).all(-1)
  assert both.shape[1] == 1004 and color[:, :500].any() and not color[:, 504:].any()


class Terminal(io.StringIO):
  def isatty(self): return True


def test_progress_on_a_terminal_and_elsewhere():
  now = [0.0]
  def update(progress):
    now[0] = 0.0
    for step in range(1, 41):
      now[0] += 30 if step == 1 else 0.5
      progress.update(step, 2 / step, 3_100_000_000)
    progress.close()
    progress.close()
  update(Progress(40, 16, stream=(plain := io.StringIO()), clock=lambda: now[0]))
  lines = plain.getvalue().splitlines()
  assert lines == ["step 1/40  loss 2.0000  3.1 GB", "step 21/40  loss 0.0952  32.0 images/s  0:10 left  3.1 GB",
                   "step 40/40  loss 0.0500  32.0 images/s  0:00 left  3.1 GB"]
  update(Progress(40, 16, stream=(terminal := Terminal()), clock=lambda: now[0]))
  assert terminal.getvalue().count("\r") == 40 and terminal.getvalue().count("\n") == 1 and terminal.getvalue().endswith("\n")


def test_an_evaluation_is_no_step():
  """After a minute of something else the speed is that of the steps before, and soon of those after."""
  now, out = [0.0], io.StringIO()
  progress = Progress(1000, 16, interval=0, stream=out, clock=lambda: now[0])
  for step in range(1, 81):
    now[0] += 0.5 if step <= 40 else 0.25
    if step == 41:
      progress.close()
      now[0] += 60
    progress.update(step, 1.0)
  lines = out.getvalue().splitlines()
  assert "32.0 images/s  8:00 left" in lines[39] and "32.0 images/s  8:00 left" in lines[40], lines[38:42]
  assert 32 < float(lines[50].split()[4]) < 64 and "64.0 images/s" in lines[79], (lines[50], lines[79])


def test_progress_texts():
  assert progress_line(1, 2, float("nan"), float("nan"), float("nan")) == "step 1/2  loss nan"
  assert progress_line(1, 2, 1, 1234.5, 3723, 5_000_000) == "step 1/2  loss 1.0000  1234 images/s  1:02:03 left  5 MB"
  assert [duration(s) for s in (0.4, 7, 65, 3599.6)] == ["0:00", "0:07", "1:05", "1:00:00"]
