"""What a run survives, and how it ends where it cannot: one test a fault, injected for real into the program as its user runs it.

The classifier's program where it can be, since it starts in a third of the detector's time; loop, checkpoints and tracking are the same."""
import contextlib, json, os, re, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinydet.weights import checkpoint

ROOT = Path(__file__).parents[1]
FLAGS = ("--weights none --backbone resnet10_quarter --size 32 --resize 32 --bs 4 --epochs 3 --lr 1e-3 --workers 1 --pictures 1 --log-every 1 "
         "--save-minutes 0 --run-name r --wandb disabled").split()
STEPS = 18   # of a whole run
DETECTOR_FLAGS = ("--data shapes:1 --weights shapes --trainable-layers 0 --norm frozen --box-loss l1 --size 64 --bs 8 --train-images 24 --epochs 2 "
                  "--optimizer sgd --lr 1e-3 --eval-every 1 --workers 1 --pictures 1 --log-every 1 --save-minutes 0 --run-name r --wandb disabled "
                  "--score-in-background").split()   # few different kernels
DETECTOR_STEPS = 3   # of each of its two epochs
CLOCK = {"seconds", "train/images_per_s", "train/memory", "eval/seconds"}   # differs between any two runs
PATIENCE = 480   # seconds


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """24 pictures to train on, 4 to validate, in two classes."""
  folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
  for split, count in (("train", 12), ("val", 2)):
    for name, bright in (("dark", 0), ("light", 80)):
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        Image.fromarray(rng.integers(bright, bright + 120, (32, 32, 3)).astype(np.uint8)).save(folder / split / name / f"{i}.png")
  return folder


class Run:
  """The program at work in `folder`/runs/r, the detector's where there is no `data`."""
  def __init__(self, folder, data, *flags, limits=None, environment=None):
    command = ["train_resnet.py", *FLAGS, "--data", data] if data else ["train_retinanet.py", *DETECTOR_FLAGS]
    self.folder, self.log = folder / "runs" / "r", folder / "log"
    environ = {key: os.environ[key] for key in ("PATH", "HOME", "CC", "DEV", "NOOPT", "XDG_CACHE_HOME", "CACHEDB") if key in os.environ}
    with open(self.log, "w") as log:
      self.process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / command[0]), *map(str, [*command[1:], *flags])], cwd=folder, text=True,
        env=environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | (environment or {}), stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, preexec_fn=limits)   # noqa: PLW1509

  def wait(self, condition, pause=0.01):
    """Wait until `condition()` holds, while the run goes on."""
    until = time.monotonic() + PATIENCE
    while not condition():
      assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-2000:]
      time.sleep(pause)

  def reach(self, step):
    """Wait until `step` steps are logged."""
    self.wait(lambda: any(line["step"] >= step for line in self.lines()))
    return self

  def end(self):
    """(exit code, output) at its end, which comes soon."""
    code = self.process.wait(timeout=PATIENCE)
    return code, self.log.read_text()

  def lines(self):
    file = self.folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []

  def saved(self): return [int(p.stem.split("-")[1]) for p in checkpoint.checkpoints(self.folder)]

  def children(self, word):
    """Processes under this one whose command line has `word`."""
    found = []
    for entry in Path("/proc").iterdir():
      try: parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if entry.name.isdigit() else None
      except (OSError, IndexError): continue
      if parent == self.process.pid and word in (entry / "cmdline").read_text(): found.append(int(entry.name))
    return found


def learnt(run):
  return [{k: v for k, v in line.items() if k in ("step", "epoch", "train/loss", "eval/top1", "eval/loss")} for line in run.lines()]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, data):
  """A run that nobody disturbs."""
  run = Run(tmp_path_factory.mktemp("calm"), data)
  code, output = run.end()
  assert code == 0, output[-2000:]
  return run


def resumed_equals(calm, folder, data, *flags):
  run = Run(folder, data, "--resume", "auto", *flags)
  code, output = run.end()
  assert code == 0, output[-2000:]
  assert learnt(run) == learnt(calm)
  (one, _), (other, _) = (checkpoint.load(r.folder / f"checkpoint-{STEPS}.safetensors") for r in (run, calm))
  for key, values in one.items(): np.testing.assert_array_equal(values, other[key], err_msg=key)
  return output


def one_error(output): return [line for line in output.splitlines() if line.startswith("error: ")] if "Traceback" not in output else output[-3000:]


def gone(pids):
  until = time.monotonic() + 10
  while time.monotonic() < until and any(Path(f"/proc/{p}").exists() for p in pids): time.sleep(0.05)
  return not any(Path(f"/proc/{p}").exists() for p in pids)


def shared_memory(pids):
  """The files in /dev/shm that these processes have mapped."""
  return {line.split()[5] for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line}


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.by_hand)])
def test_signals(name, code, calm, data, tmp_path):
  # in a cache that knows of no graph there are processes to compile
  run = Run(tmp_path, data, "--save-steps", 100, environment={"CACHEDB": f"{tmp_path}/cache.db"}).reach(8)
  workers, compilers = run.children("loader"), run.children("runtime.workers")
  assert workers and compilers and not shared_memory([run.process.pid, *workers, *compilers]), "nothing that has a name, and could be left"
  run.process.send_signal(getattr(signal, name))
  found, output = run.end()
  assert found == code and "Traceback" not in output and f"{name}: ends after this step with a checkpoint" in output
  assert gone([*workers, *compilers])
  assert run.saved()[-1] == run.lines()[-1]["step"] >= 8
  resumed_equals(calm, tmp_path, data)


@pytest.mark.by_hand
def test_sigterm_to_all_of_a_job(calm, data, tmp_path):
  run = Run(tmp_path, data, "--save-steps", 100, environment={"CACHEDB": f"{tmp_path}/cache.db"}).reach(8)
  everyone = [run.process.pid, *run.children("")]
  assert len(everyone) > 3, "loader and compilers"
  for pid in everyone: os.kill(pid, signal.SIGTERM)
  code, output = run.end()
  assert code == 143 and "Traceback" not in output and gone(everyone)
  resumed_equals(calm, tmp_path, data)


@pytest.mark.by_hand
def test_usr1_and_a_second_signal(data, tmp_path):
  run = Run(tmp_path, data, "--epochs", 3000, "--eval-every", 3000).reach(7)   # no checkpoint is due
  step = run.lines()[-1]["step"]
  run.process.send_signal(signal.SIGUSR1)
  run.wait(lambda: any(s >= step for s in run.saved()))   # written by a thread
  run.reach(run.lines()[-1]["step"] + 2)   # and the run goes on
  workers = run.children("loader")
  os.kill(run.process.pid, signal.SIGSTOP)   # both arrive before the next step ends
  for _ in range(2):
    run.process.send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGINT)
  os.kill(run.process.pid, signal.SIGCONT)
  code, output = run.end()
  assert code in (130, 143) and "Traceback" not in output and gone(workers)


def test_kill_9(calm, data, tmp_path):
  run = Run(tmp_path, data, "--save-steps", 2).reach(9)
  workers = run.children("loader")
  run.process.kill()
  run.end()
  assert gone(workers), "workers end with the process that they serve"
  resumed_equals(calm, tmp_path, data)


def hold_score(run):
  """The process that scores for `run`, stopped when it has the detections and before it has the score; `run` has its checkpoint and goes on."""
  run.wait(lambda: run.children("tinydet.scoring.background"), 0.05)   # it takes longer than that to import what it needs
  scorer, = run.children("tinydet.scoring.background")
  def serves(): return int(re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{scorer}/status").read_text())[1], 16) >> signal.SIGTERM - 1 & 1
  run.wait(serves, 0.002)   # all is imported
  os.kill(scorer, signal.SIGSTOP)
  while True:
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
      if run.saved(): return scorer   # the first checkpoint is written when the detections are handed over
      time.sleep(0.01)
    os.kill(scorer, signal.SIGCONT)   # it takes some more of the detections
    time.sleep(0.003)
    os.kill(scorer, signal.SIGSTOP)


@pytest.mark.by_hand
def test_kill_9_while_a_score_is_pending(tmp_path):
  for name in ("calm", "killed"): (tmp_path / name).mkdir()
  runs = calm, run = [Run(tmp_path / name, None) for name in ("calm", "killed")]
  try:
    scorer = hold_score(run)
    run.reach(DETECTOR_STEPS + 1)
    assert run.saved() == [DETECTOR_STEPS] and not any("eval/mAP" in line for line in run.lines()), "trains on, without the score"
    run.process.kill()
    run.end()
    with contextlib.suppress(ProcessLookupError): os.kill(scorer, signal.SIGCONT)
    assert gone([scorer]), "it ends with the process that it serves"
    runs.append(again := Run(tmp_path / "killed", None, "--resume", "auto"))
    for code, output in (calm.end(), again.end()): assert code == 0, output[-2000:]
  finally:
    for each in runs: each.process.kill()

  def learnt(run, kind): return [{k: v for k, v in line.items() if k not in CLOCK} for line in run.lines() if kind in line]
  assert [line["step"] for line in learnt(calm, "eval/mAP")] == [DETECTOR_STEPS, 2 * DETECTOR_STEPS]
  assert all(0 < line["eval/mAP"] < 1 for line in learnt(calm, "eval/mAP"))
  for kind in ("train/loss", "eval/mAP"): assert learnt(again, kind) == learnt(calm, kind)
  for name in ("best.safetensors", f"checkpoint-{2 * DETECTOR_STEPS}.safetensors"):
    (one, about), (other, about_other) = (checkpoint.load(r.folder / name) for r in (calm, again))
    assert one.keys() == other.keys() and about["step"] == about_other["step"]
    for key, values in one.items(): np.testing.assert_array_equal(values, other[key], err_msg=key)


@pytest.mark.by_hand
def test_a_flipped_bit(calm, data, tmp_path):
  run = Run(tmp_path, data, "--save-steps", 4, "--keep", 3).reach(14)
  run.process.kill()
  run.end()
  newest = checkpoint.checkpoints(run.folder)[-1]
  content = bytearray(newest.read_bytes())
  content[-1000] ^= 1
  newest.write_bytes(content)
  output = resumed_equals(calm, tmp_path, data)
  assert f"{newest.name} is not a whole safetensors file: its content does not fit its checksum; the checkpoint before it is used" in output


@pytest.mark.by_hand
def test_a_worker_killed(calm, data, tmp_path):
  run = Run(tmp_path, data).reach(7)
  for pid in run.children("loader"): os.kill(pid, signal.SIGKILL)
  code, output = run.end()
  error, = one_error(output)
  assert code == 2 and "loader worker 0 died" in error and "killed by SIGKILL" in error and "lower --workers" in error
  assert run.saved()[-1] >= 7
  resumed_equals(calm, tmp_path, data)


@pytest.mark.by_hand
def test_the_data_goes_away(calm, data, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(data, copy)
  run = Run(tmp_path, copy).reach(7)
  (copy / "train").rename(copy / "elsewhere")
  code, output = run.end()
  error, = one_error(output)
  assert code == 2 and str(copy / "train") in error and run.saved()[-1] >= 7
  (copy / "elsewhere").rename(copy / "train")
  resumed_equals(calm, tmp_path, copy)


@pytest.mark.by_hand
def test_a_full_disk(calm, data, tmp_path):
  """No file may grow beyond 200 kB: checkpoints and weights fail, the log goes on."""
  def limits(): resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
  run = Run(tmp_path, data, limits=limits)
  code, output = run.end()
  error, = one_error(output)
  assert code == 2 and error.startswith("error: the last checkpoint is missing: cannot write") and "File too large" in error
  assert f"checkpoint-{STEPS // 3}.safetensors: File too large: the run goes on" in output and "best.safetensors: File too large: the run" in output
  assert learnt(run) == learnt(calm) and run.saved() == [] and not list(run.folder.glob(".*.partial"))
  resumed_equals(calm, tmp_path, data)


def test_a_disk_too_full_for_pictures(calm, data, tmp_path):
  """Not even for a picture, and soon not for the log, once everything is compiled."""
  run = Run(tmp_path, data, "--save-steps", 100).reach(7)
  size = (run.folder / "metrics.jsonl").stat().st_size
  resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (size + 1000, size + 1000))
  code, output = run.end()
  assert code == 2 and isinstance(one_error(output), list) and output.count("cannot be written") == 1, output[-3000:]
  lines = run.lines()
  assert 7 <= len(lines) < len(calm.lines()) and all(line in learnt(calm) for line in learnt(run))
  assert (run.folder / "metrics.jsonl").read_text().endswith("\n"), "no line is cut"


@pytest.mark.parametrize("out", ["/sys/kernel/runs", "file/runs"])
def test_a_place_that_cannot_be_written(out, data, tmp_path):
  (tmp_path / "file").write_text("")
  code, output = Run(tmp_path, data, "--out", out).end()
  error, = one_error(output)
  assert code == 2 and "cannot make a run folder" in error and "choose another --out" in error


def test_two_runs_in_one_folder(data, tmp_path):
  first = Run(tmp_path, data, "--epochs", 300, "--save-steps", 3).reach(4)
  try:
    (tmp_path / "second").mkdir()
    second = Run(tmp_path / "second", data, "--resume", first.folder)
    code, output = second.end()
    error, = one_error(output)
    assert code == 2 and "another process is running there" in error and str(first.folder) in error
    first.reach(first.lines()[-1]["step"] + 1)
  finally:
    first.process.kill()
    first.end()


@pytest.mark.by_hand
def test_wandb_dies(calm, data, tmp_path):
  run = Run(tmp_path, data, "--wandb", "offline").reach(3)
  service = run.children("wandb-core")
  assert service
  for pid in service: os.kill(pid, signal.SIGKILL)
  code, output = run.end()
  assert code == 0 and "Traceback" not in output, output[-3000:]
  assert learnt(run) == learnt(calm)


@pytest.mark.by_hand
def test_the_clock_is_set_back(calm, data, tmp_path):
  """time.time runs backwards, an hour a second."""
  (tmp_path / "sitecustomize.py").write_text("import time\nstart, real = time.time(), time.time\n"
                                             "time.time = lambda: start - 3600 * (real() - start)\n")
  run = Run(tmp_path, data, environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
  code, output = run.end()
  assert code == 0, output[-2000:]
  seconds = [line["seconds"] for line in run.lines()]
  assert learnt(run) == learnt(calm) and seconds == sorted(seconds) and seconds[0] >= 0


def test_a_loss_that_explodes(data, tmp_path):
  run = Run(tmp_path, data, "--lr", 1e30, "--optimizer", "sgd", "--warmup", 0, "--max-skipped", 3, "--debug-numerics", "--save-steps", 1, "--keep", 9)
  code, output = run.end()
  error, = one_error(output)
  assert code == 2 and "3 steps in a row were not finite" in error and "train/" in error and ".png" in error, error
  assert "is the first that is not finite" in error or "itself is not finite" in error or "the loss" in error
  tensors, _ = checkpoint.load(checkpoint.checkpoints(run.folder)[-1])
  assert all(np.isfinite(values).all() for values in tensors.values()), "what is kept is whole"
