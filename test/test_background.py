"""Scores from another process are those of this one, and nothing is left of it however it ends."""
import os, pickle, re, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from tinydet.scoring.analysis import analyse
from tinydet.scoring.coco_metric import CocoMetric
from tinydet.scoring.background import Pending, score
from tinydet.errors import UserError

CATEGORY_IDS = [7, 90, 3]


def metric_of(seed=0, images=30):
  rng = np.random.default_rng(seed)
  boxes = rng.uniform(0, 200, (images, 4, 4))
  truth = {"images": [{"id": i, "width": 400, "height": 400} for i in range(images)],
           "categories": [{"id": c, "name": f"c{c}"} for c in CATEGORY_IDS],
           "annotations": [{"id": 4 * i + j, "image_id": i, "category_id": CATEGORY_IDS[j % 3], "bbox": boxes[i, j].tolist(),
                            "area": boxes[i, j, 2] * boxes[i, j, 3], "iscrowd": int(j == 3)} for i in range(images) for j in range(4)]}
  metric = CocoMetric(truth, CATEGORY_IDS)
  metric.add_results([{"image_id": i, "category_id": CATEGORY_IDS[j % 3], "bbox": (boxes[i, j] * rng.uniform(0.9, 1.1, 4)).tolist(),
                       "score": rng.random()} for i in range(0, images, 2) for j in range(4)])
  return metric


class Given:
  """What the trainer does with a score."""
  def __init__(self, ends=False): self.ends = ends

  def __call__(self, result, analysis):
    self.result, self.analysis = result, analysis
    return self.ends


@pytest.mark.parametrize("metric", [metric_of(), CocoMetric(metric_of().ground_truth, CATEGORY_IDS)], ids=["detections", "none"])
def test_in_the_background_as_in_the_foreground(metric):
  here, there = Given(), Given(ends=True)
  assert score(metric, here, pictures=2) is False
  pending = score(metric, there, background=True, pictures=2)
  child = pending._process.pid
  assert not hasattr(there, "result") and pending.finish() is True
  assert here.result.metrics == there.result.metrics and here.result.table == there.result.table
  np.testing.assert_array_equal(here.result.precision, there.result.precision)
  np.testing.assert_equal(here.result.class_ap, there.result.class_ap)
  assert here.analysis() == there.analysis() == analyse(metric, here.result, pictures=2)
  assert not Path(f"/proc/{child}").exists()


def test_it_is_ready_when_it_need_not_be_waited_for():
  pending = Pending(metric_of(), Given(), {})
  end = time.monotonic() + 60
  while not pending.ready() and time.monotonic() < end: time.sleep(0.02)
  assert pending.ready() and pending.finish() is False


def test_detections_travel_whole():
  metric = metric_of()
  again = pickle.loads(pickle.dumps(metric))
  assert list(again.found) == list(metric.found) and again.results() == metric.results()
  assert pickle.loads(pickle.dumps(CocoMetric(metric.ground_truth, CATEGORY_IDS))).found == {}


def test_a_process_that_dies_and_one_that_fails():
  pending = Pending(metric_of(), Given(), {})
  pending._process.kill()
  with pytest.raises(UserError, match=r"died \(killed by SIGKILL\); .*--no-score-in-background"): pending.finish()
  spoilt = metric_of()
  del spoilt.ground_truth["annotations"][0]["bbox"]
  with pytest.raises(RuntimeError, match="KeyError: 'bbox'"): Pending(spoilt, Given(), {}).finish()
  given = Given()
  Pending(metric_of(), given, {"no_such_option": 1}).finish()   # a report that fails costs no score
  assert given.result.metrics["mAP"] > 0
  with pytest.raises(RuntimeError, match="no_such_option"): given.analysis()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
def test_signals_to_all_processes_do_not_cost_the_score():
  pending = Pending(metric_of(), given := Given(), {})
  end = time.monotonic() + 60
  def ignored(): return int(re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pending._process.pid}/status").read_text())[1], 16)
  while not ignored() >> signal.SIGTERM - 1 & 1 and time.monotonic() < end: time.sleep(0.01)
  for number in (signal.SIGTERM, signal.SIGINT):
    if not pending.ready(): os.kill(pending._process.pid, number)
  pending.finish()
  assert given.result.metrics["mAP"] > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
def test_no_tinygrad_and_no_orphan():
  program = ("import sys, time; sys.path.insert(0, 'test'); from test_background import *\n"
             "pending = Pending(metric_of(images=3), Given(), {}); assert 'tinygrad' not in sys.modules\n"
             "os.kill(pending._process.pid, signal.SIGSTOP); print(pending._process.pid, flush=True); time.sleep(60)")
  root = Path(__file__).parents[1]
  environment = os.environ | {"PYTHONPATH": str(root)}
  with subprocess.Popen([sys.executable, "-c", program], cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as p:
    child = int(p.stdout.readline())
    p.kill()
  os.kill(child, signal.SIGCONT)
  def gone():
    try: return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError: return True
  end = time.monotonic() + 60
  while not gone() and time.monotonic() < end: time.sleep(0.05)
  assert gone()
