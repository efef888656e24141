"""What a run leaves behind: local files always, Weights & Biases where it works, and one line of progress on the screen."""
import contextlib, errno, json, math, os, re, secrets, shlex, shutil, sys, threading, time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO
import numpy as np
from PIL import Image
from extra.errors import UserError
from extra.training.checkpoint import whole_file
from extra.training.pictures import truth_and_prediction

try: import fcntl
except ImportError: fcntl = None   # Windows: nothing keeps a second process out

FINISH_SECONDS = 5


class Tracker:
  """The record of one run, in `folder`: config.json, metrics.jsonl, summary.json, pictures/ and wandb's own files.

  config is JSON values; score names the series that ranks a run's evaluations, higher being better, and target is its
  value to reach, drawn as `eval/target` beside `eval/<score>`; summary.json gets the best as `best_<score>`. mode is "online", "offline", "disabled"
  or None: WANDB_MODE or wandb's own settings decide, else online when logged in and offline otherwise. Nothing ever prompts, and no failure of wandb
  stops a run: it is reported in one line, and the local files go on. Nor does a full disk: it costs lines and pictures.

  A name that is taken gets a number appended. `resume` is the metadata of the checkpoint to go on from, or {} to begin again in a folder that exists:
  the folder is used as it is, what metrics.jsonl holds from after the checkpoint is cut off, as it will come again, and wandb's run
  `resume["run_id"]` goes on; `lock` is then what `claim` gave for the folder. UserError where the folder cannot be made.
  """
  def __init__(self, folder: str | Path, config: dict[str, Any], *, project: str, score: str = "mAP", target: float | None = None,
               mode: str | None = None, resume: dict | None = None, lock: TextIO | None = None):
    self.folder = _run_folder(Path(folder), resume is not None)
    self._lock = lock or claim(self.folder)
    self.score, self.target, self.id, self._summary = score, target, (resume or {}).get("run_id") or secrets.token_hex(4), {}
    kept = _mend(self.folder/"metrics.jsonl", (resume or {}).get("step", 0), (resume or {}).get("evaluated", 0))
    scores = [line[f"eval/{score}"] for line in kept if line.get(f"eval/{score}") is not None]
    self.best, self._started = max(scores, default=None), time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)
    self._metrics, self._warned = open(self.folder/"metrics.jsonl", "ab", buffering=0), False
    with whole_file(self.folder/"config.json") as f: f.write(json.dumps(config, indent=2).encode() + b"\n")
    self._wandb, self._run = None, None
    if mode != "disabled": self._start_wandb(config, project, mode, bool(resume))

  def log(self, metrics: dict[str, Any], step: int, epoch: float) -> None:
    """Append one line of metrics ("train/loss", "eval/mAP", ...) with step, epoch and seconds since the start; NaN and infinity become null."""
    line = {"step": int(step), "epoch": _plain(epoch), "seconds": round(time.monotonic() - self._started, 3)}
    line |= {key: _plain(value) for key, value in metrics.items()}
    if (key := f"eval/{self.score}") in line:
      if self.target is not None: line["eval/target"] = self.target
      if line[key] is not None: self.best = max(line[key], -math.inf if self.best is None else self.best)
    with self._surviving("metrics.jsonl"):
      end, data = os.fstat(self._metrics.fileno()).st_size, json.dumps(line, allow_nan=False).encode() + b"\n"
      try:
        if self._metrics.write(data) != len(data): raise OSError(errno.ENOSPC, "no space left")
      except OSError:   # half a line would spoil the file for its readers
        self._metrics.truncate(end)
        raise
    self._send(lambda wandb, run: run.log({key: value for key, value in line.items() if value is not None}))

  @contextlib.contextmanager
  def _surviving(self, what: str) -> Iterator[None]:
    """Report, once, that something cannot be written, and go on."""
    try: yield
    except (OSError, UserError) as e:
      if not self._warned: warn(f"{self.folder/what} cannot be written ({_reason(e)}): the run goes on without it, and without others that fail")
      self._warned = True

  def picture(self, name: str, image: np.ndarray, truth_boxes: np.ndarray, truth_labels: np.ndarray, boxes: np.ndarray, labels: np.ndarray,
              scores: np.ndarray, class_names: Sequence[str], step: int) -> Path:
    """Save image u8 [H,W,3] with the true and the predicted boxes (f32 [M,4] xyxy, pixels of image) side by side; returns the JPEG's path.

    wandb gets the plain image with both sets as overlays to switch on and off. name is the series: pictures/<name>-<step>.jpg.
    """
    path = self.folder/"pictures"/f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{step:07d}.jpg"
    drawn = truth_and_prediction(image, truth_boxes, truth_labels, boxes, labels, scores, class_names)
    with self._surviving(f"pictures/{path.name}"), whole_file(path) as f: Image.fromarray(drawn).save(f, "JPEG", quality=90, subsampling=0)
    names = dict(enumerate(class_names))
    def overlay(boxes, labels, scores):
      data = [{"position": dict(zip(("minX", "minY", "maxX", "maxY"), map(float, box))), "domain": "pixel", "class_id": int(label),
               "box_caption": names.get(int(label), str(label)) + ("" if score is None else f" {score:.2f}"),
               **({} if score is None else {"scores": {"score": float(score)}})} for box, label, score in zip(boxes, labels, scores)]
      return {"box_data": data, "class_labels": names}
    self._send(lambda wandb, run: run.log({"step": int(step), f"pictures/{name}": wandb.Image(image, boxes={
      "predictions": overlay(boxes, labels, scores), "ground_truth": overlay(truth_boxes, truth_labels, [None] * len(truth_boxes))})}))
    return path

  def summary(self, values: dict[str, Any]) -> None:
    """Add final figures of the run to summary.json and to wandb's summary."""
    self._summary |= {key: _plain(value) for key, value in values.items()}
    if self.best is not None: self._summary[f"best_{self.score}"] = self.best
    with self._surviving("summary.json"), whole_file(self.folder/"summary.json") as f:
      f.write(json.dumps(self._summary, indent=2, allow_nan=False).encode() + b"\n")
    self._send(lambda wandb, run: run.summary.update(self._summary))

  def finish(self) -> None:
    """Close the run, giving wandb a few seconds; a run that wandb has not uploaded prints how to upload it and how to view it."""
    self.summary({})
    self._metrics.close()
    self._lock.close()
    if self._run is None: return
    (run, self._run), local = (self._run, None), self._run.settings.mode == "offline"
    try: run.finish()
    except Exception as e:
      warn(f"wandb did not finish in time ({_reason(e)})")
      _tear_down(self._wandb)
      local = True
    folders = sorted(str(p) for p in (self.folder/"wandb").glob(f"*run-*-{self.id}"))
    if local and folders:
      print(f"upload this run: wandb sync {shlex.join(folders)}")
      print(f"view this run:   wandb leet {shlex.quote(folders[-1])}")

  def _start_wandb(self, config: dict[str, Any], project: str, mode: str | None, resumed: bool) -> None:
    try:
      import wandb
      self._wandb = wandb
      wanted = wandb.setup(wandb.Settings(silent=True, console="off", **({"mode": mode} if mode else {}))).settings.mode
      if wanted in ("online", "shared") and not wandb.login(prompt=False, verify=False):
        if mode or os.environ.get("WANDB_MODE"): warn("wandb is not logged in (wandb login): this run is recorded offline")
        wanted = "offline"
    except Exception as e: return self._give_up(e)
    # an unreachable server costs one wait, then the run is recorded offline
    for attempt in dict.fromkeys((wanted, "offline")):
      try:
        settings = wandb.Settings(silent=True, console="off", init_timeout=15, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)
        resume = "allow" if resumed and attempt == "online" else None
        self._run = wandb.init(project=project, name=self.folder.name, id=self.id, dir=str(self.folder), config=config, mode=attempt, resume=resume,
                               settings=settings)
      except Exception as e:
        if attempt in ("offline", "disabled"): return self._give_up(e)
        warn(f"wandb cannot go online ({_reason(e)}): this run is recorded offline")
        _tear_down(wandb)
      else: break
    self._send(self._define)

  def _define(self, wandb: Any, run: Any) -> None:
    run.define_metric("step")
    run.define_metric("epoch")
    for prefix, axis in (("train/*", "step"), ("pictures/*", "step"), ("eval/*", "epoch")): run.define_metric(prefix, step_metric=axis)
    run.define_metric(f"eval/{self.score}", step_metric="epoch", summary="max")
    if self.target is not None: run.summary["target"] = self.target

  def _send(self, action: Callable[[Any, Any], Any]) -> None:
    """Do something with wandb, and without it from its first failure on."""
    if self._run is None: return
    try: action(self._wandb, self._run)
    except Exception as e: self._give_up(e)

  def _give_up(self, e: Exception) -> None:
    self._run = None
    warn(f"wandb stopped working ({_reason(e)}): the run goes on, recorded in {self.folder}")
    # or wandb's own exit hook would wait for a dead service, or print its traceback
    if self._wandb is not None: _tear_down(self._wandb)


class Untracked:
  """The record that a rank other than the first keeps of a run: none."""
  folder, id = Path(os.devnull), ""
  def nothing(self, *_: Any, **__: Any) -> None: """Do nothing."""
  log = picture = summary = finish = nothing


class Progress:
  """One line about a running loop: rewritten in place on a terminal, printed every `interval` seconds elsewhere.

  steps is the step at which the loop ends, batch_size the images a step. Speed is that of the last 20 updates, so the first step's compile time does
  not spoil it.
  """
  def __init__(self, steps: int, batch_size: int, *, interval: float = 10.0, stream: TextIO | None = None,
               clock: Callable[[], float] = time.monotonic):
    self.steps, self.batch_size, self.interval, self.stream, self.clock = steps, batch_size, interval, stream or sys.stdout, clock
    self.terminal = self.stream.isatty()
    self._recent: deque[tuple[float, int]] = deque(maxlen=20)
    self._printed, self._width = -math.inf, 0

  def update(self, step: int, loss: float, memory: int = 0) -> None:
    """Show that step steps are done, the loss and the device memory in bytes (0: not shown)."""
    now = self.clock()
    self._recent.append((now, step))
    (then, before), speed = self._recent[0], math.nan
    if now > then: speed = (step - before) / (now - then)
    line = progress_line(step, self.steps, loss, speed * self.batch_size, (self.steps - step) / speed if speed > 0 else math.nan, memory)
    if self.terminal:
      line = line[:shutil.get_terminal_size().columns - 1]
      self.stream.write("\r" + line.ljust(self._width))
      self.stream.flush()
      self._width = len(line)
    elif now - self._printed >= self.interval or step >= self.steps:
      print(line, file=self.stream, flush=True)
      self._printed = now

  def close(self) -> None:
    """End the line on a terminal, so that other text can follow; may be called often."""
    if self._width: print(file=self.stream, flush=True)
    self._width = 0


def progress_line(step: int, steps: int, loss: float, images_per_second: float, seconds_left: float, memory: int = 0) -> str:
  """"step 40/200  loss 0.8123  38.2 images/s  1:05 left  3.1 GB"; what is NaN is not known yet and left out, except the loss; memory is in bytes."""
  parts = [f"step {step}/{steps}", f"loss {loss:.4f}"]
  if not math.isnan(images_per_second): parts.append(f"{images_per_second:.{1 if images_per_second < 100 else 0}f} images/s")
  if not math.isnan(seconds_left): parts.append(f"{duration(seconds_left)} left")
  if memory: parts.append(f"{memory / 1e9:.1f} GB" if memory >= 1e9 else f"{memory / 1e6:.0f} MB")
  return "  ".join(parts)


def duration(seconds: float) -> str:
  """Seconds as 0:07, 1:05 or 2:03:04."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def claim(folder: Path) -> TextIO:
  """Take the folder of a run for this process, until the file returned is closed or the process ends; UserError where another process has it."""
  try:
    file = open(folder/"run.lock", "a", encoding="utf-8")
    if fcntl is not None: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError: raise UserError(f"{folder}: another process is running there; end it first, or choose another --run-name") from None
  except OSError as e: raise UserError(f"{folder}: cannot be written ({e.strerror}); choose another --out, or mend its permissions") from e
  return file


def _run_folder(wanted: Path, resumed: bool) -> Path:
  """Make the folder of a run: a new one, numbered if the name is taken, or the old one."""
  runs, name = wanted.parent, wanted.name
  try:
    for number in range(1, 10_000):
      folder = runs/(name if number == 1 else f"{name}-{number}")
      try: folder.mkdir(parents=True, exist_ok=resumed)
      except FileExistsError: continue
      (folder/"pictures").mkdir(exist_ok=True)
      return folder
  except OSError as e: raise UserError(f"cannot make a run folder in {runs}: {e.strerror}; choose another --out, or mend its permissions") from e
  raise UserError(f"{runs} holds too many runs called {name}: choose another name")


def _mend(metrics: Path, step: int, evaluated: int) -> list[dict]:
  """Cut off a line that a crash left unfinished, and what came after `step` steps and `evaluated` evaluated epochs; returns the lines that stay."""
  if not metrics.exists(): return []
  content, kept = metrics.read_bytes(), []
  for text in content.splitlines(keepends=True):
    try: line = json.loads(text) if text.endswith(b"\n") else {}
    except ValueError: line = {}
    if not {"step", "epoch", "seconds"} <= line.keys() or line["step"] > step: continue
    if line["epoch"] > evaluated and any(key.startswith("eval/") for key in line): continue
    kept.append((text, line))
  if (whole := b"".join(text for text, _ in kept)) != content:
    with whole_file(metrics) as f: f.write(whole)
  return [line for _, line in kept]


def _tear_down(wandb: Any) -> None:
  """Stop wandb's service, waiting a few seconds at most."""
  def stop() -> None:
    with contextlib.suppress(Exception, SystemExit): wandb.teardown()
  (thread := threading.Thread(target=stop, daemon=True)).start()
  thread.join(FINISH_SECONDS)


def _plain(value: Any) -> Any:
  """A metric as a strict JSON value."""
  if isinstance(value, (np.generic, np.ndarray)): value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _reason(e: Exception) -> str: return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def warn(message: str) -> None:
  """One line about something that the run survives."""
  print(f"warning: {message}", file=sys.stderr, flush=True)
