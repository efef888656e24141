"""What a run leaves behind: local files always, Weights & Biases where it works, and one line of progress on the screen."""
import contextlib, errno, json, math, os, queue, re, secrets, shlex, shutil, sys, threading, time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO
import numpy as np
from PIL import Image
from tinydet.errors import UserError
from tinydet.weights.checkpoint import checkpoints, metadata, whole_file
from tinydet.runtime.lock import claim
from tinydet.reporting.panels import beside_target, boxed_image
from tinydet.reporting.pictures import truth_and_prediction

FINISH_SECONDS = 5
HASHED, UPLOADED = 5e7, 1e6   # bytes a second that the slowest disk reads and the slowest network takes, where wandb is waited for at the end
WAITING = 8                   # tables and artifacts that wait for wandb before further ones are dropped
ARTIFACTS = ("end", "best", "none")
# what wandb's table of runs shows of a series beside its last value; of others of an evaluation the maximum
SUMMARIES = {"train/loss": "min", "eval/loss": "min", "train/accuracy": "max", "train/images_per_s": "mean", "train/memory": "max",
             "eval/seconds": "mean", "eval/target": "max"}


class Tracker:
  """The record of one run, in `folder`: config.json, metrics.jsonl, summary.json, pictures/ and wandb's own files.

  config is JSON values, None to leave config.json as it is; score names the series that ranks a run's evaluations, higher being better, and target is
  its value to reach, drawn as `eval/target` beside `eval/<score>`; summary.json gets the best as `best_<score>`. mode is "online", "offline",
  "disabled" or None: WANDB_MODE decides, else offline, as what goes to a server is a choice. Nothing ever prompts, and no failure of wandb
  stops a run: it is reported in one line, and the local files go on. Nor does a full disk: it costs lines and pictures.
  tags and group are wandb's; artifacts, one of ARTIFACTS, says when it gets weights as the artifact model-<id>: "end" is best.safetensors, under the
  alias best, and the last checkpoint, under latest, once a run has come to its end; "best" is also each new best.safetensors.

  A name that is taken gets a number appended. `resume` is the metadata of the checkpoint to go on from, or {} to begin again in a folder that exists:
  the folder is used as it is, what metrics.jsonl holds from after the checkpoint is cut off, as it will come again, and wandb's run
  `resume["run_id"]` goes on; `lock` is then what `claim` gave for the folder. UserError where the folder cannot be made.
  """
  def __init__(self, folder: str | Path, config: dict[str, Any] | None, *, project: str, score: str = "mAP", target: float | None = None,
               mode: str | None = None, resume: dict | None = None, lock: TextIO | None = None, tags: Sequence[str] = (), group: str | None = None,
               artifacts: str = "end"):
    self.folder = new_folder(Path(folder), resume is not None)
    self._lock = lock or claim(self.folder)
    with contextlib.suppress(OSError): (self.folder/"pictures").mkdir(exist_ok=True)   # where it fails, each picture says so
    self.score, self.target, self.id, self._summary = score, target, (resume or {}).get("run_id") or secrets.token_hex(4), {}
    kept = _mend(self.folder/"metrics.jsonl", (resume or {}).get("step", 0), (resume or {}).get("evaluated", 0))
    self._scores = [(line["epoch"], line[f"eval/{score}"]) for line in kept if line.get(f"eval/{score}") is not None]
    self._started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)
    self._metrics, self._warned = open(self.folder/"metrics.jsonl", "ab", buffering=0), False
    if config is not None:
      with whole_file(self.folder/"config.json") as f: f.write(json.dumps(config, indent=2).encode() + b"\n")
    self._wandb, self._run, self._artifacts, self._complete = None, None, artifacts, False
    self._defined: set[str] = set()
    self._actions, self._thread, self._answered, self._uploads, self._missed = queue.Queue(), None, threading.Event(), [], False
    self._owns_data_dir = False
    if mode != "disabled": self._start_wandb(config, mode, bool(resume), {"project": project, "tags": list(tags) or None, "group": group})

  @property
  def best(self) -> float | None:
    """The best score of all evaluations."""
    return max((value for _, value in self._scores), default=None)

  def log(self, metrics: dict[str, Any], step: int, epoch: float) -> None:
    """Append one line of metrics ("train/loss", "eval/mAP", ...) with step, epoch and seconds since the start; NaN and infinity become null."""
    line = {"step": int(step), "epoch": _plain(epoch), "seconds": round(time.monotonic() - self._started, 3)}
    line |= {key: _plain(value) for key, value in metrics.items()}
    if (key := f"eval/{self.score}") in line:
      if self.target is not None: line["eval/target"] = self.target
      if line[key] is not None: self._scores.append((line["epoch"], line[key]))
    with self._surviving("metrics.jsonl"):
      end, data = os.fstat(self._metrics.fileno()).st_size, json.dumps(line, allow_nan=False).encode() + b"\n"
      try:
        if self._metrics.write(data) != len(data): raise OSError(errno.ENOSPC, "no space left")
      except OSError:   # half a line would spoil the file for its readers
        self._metrics.truncate(end)
        raise
    self._send(lambda _, run: self._log_line(run, {key: value for key, value in line.items() if value is not None}))
    if key in line and self.target is not None and self._scores:
      self.show(lambda wandb: {"eval/score_and_target": beside_target(wandb, self.score, self._scores, self.target)}, step, epoch)

  def _log_line(self, run: Any, line: dict[str, Any]) -> None:
    for key in line:
      summary = SUMMARIES.get(key, "max" if key.startswith("eval/") else None)
      if summary is None or key in self._defined: continue
      run.define_metric(key, step_metric="epoch" if key.startswith("eval/") else "step", summary=f"{summary},last")
      self._defined.add(key)
    run.log(line)

  def show(self, make: Callable[[Any], dict[str, Any]], step: int, epoch: float) -> None:
    """Show in wandb what `make(wandb)` returns by name: tables, charts. Nothing is made where there is no wandb."""
    if self._run is None: return
    try: panels = make(self._wandb)
    except Exception as e:
      self._miss(_reason(e))
      return
    self._later(lambda _, run: run.log({"step": int(step), "epoch": _plain(epoch)} | panels))

  def improved(self) -> None:
    """Take notice that best.safetensors is a new one."""
    if self._artifacts == "best": self._send_model(self.folder/"best.safetensors", "best")

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
    overlays = (truth_boxes, truth_labels, None), (boxes, labels, scores), class_names
    self._send(lambda wandb, run: run.log({"step": int(step), f"pictures/{name}": boxed_image(wandb, image, *overlays)}))
    return path

  def summary(self, values: dict[str, Any]) -> None:
    """Add final figures of a run that came to its end to summary.json and to wandb's summary."""
    self._complete = True
    self._write_summary(values)

  def _write_summary(self, values: dict[str, Any]) -> None:
    self._summary |= {key: _plain(value) for key, value in values.items()}
    if self.best is not None: self._summary[f"best_{self.score}"] = self.best
    with self._surviving("summary.json"), whole_file(self.folder/"summary.json") as f:
      f.write(json.dumps(self._summary, indent=2, allow_nan=False).encode() + b"\n")
    self._send(lambda wandb, run: run.summary.update(self._summary))

  def finish(self) -> None:
    """Close the run, giving wandb a few seconds, and the report and the weights of a run that came to its end, with the time to upload them; a run
    that wandb has not uploaded prints how to upload it and how to view it."""
    self._write_summary({})
    self._metrics.close()
    self._lock.close()
    self._send(self._send_last)
    self._drain()
    if self._owns_data_dir: os.environ.pop("WANDB_DATA_DIR", None)
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

  def _start_wandb(self, config: dict[str, Any], mode: str | None, resumed: bool, about: dict[str, Any]) -> None:
    try:
      import wandb
      self._wandb = wandb
      self._owns_data_dir = "WANDB_DATA_DIR" not in os.environ
      if self._owns_data_dir:   # where tables wait for their upload: with the run, not in the user's home
        os.environ["WANDB_DATA_DIR"] = str((self.folder/"wandb").resolve())
      mode = mode or (None if os.environ.get("WANDB_MODE") else "offline")
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
        self._run = wandb.init(name=self.folder.name, id=self.id, dir=str(self.folder), config=config, mode=attempt, resume=resume,
                               settings=settings, **about)
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
    if self.target is not None: run.summary["target"] = self.target

  def _send(self, action: Callable[[Any, Any], Any]) -> None:
    """Do something with wandb, and without it from its first failure on."""
    if self._run is None: return
    try: action(self._wandb, self._run)
    except Exception as e:
      if self._run is not None: self._give_up(e)

  def _give_up(self, e: Exception) -> None:
    self._run = None
    warn(f"wandb stopped working ({_reason(e)}): the run goes on, recorded in {self.folder}")
    # or wandb's own exit hook would wait for a dead service, or print its traceback
    if self._wandb is not None: _tear_down(self._wandb)

  def _later(self, action: Callable[[Any, Any], Any]) -> None:
    """Do something with wandb in a thread: it asks its server before it takes a table or an artifact, and training does not wait for that. Here a
    failure costs what is sent, not the run's record."""
    if self._run is None: return
    if self._thread is None:
      self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
      self._thread.start()
    if self._actions.qsize() < WAITING: self._actions.put(action)
    else: self._miss("its server does not keep up")

  def _work(self) -> None:
    for action in iter(self._actions.get, None):
      try: action(self._wandb, self._run)
      except ConnectionError: pass   # wandb's service is gone, which the run's next line reports
      except Exception as e:
        if self._run is not None: self._miss(_reason(e))
    self._answered.set()
    if self._uploads: print(f"wandb takes the weights ({sum(size for *_, size in self._uploads) / 1e6:.0f} MB)", flush=True)
    for artifact, link, size in self._uploads:
      try: artifact.wait(round(FINISH_SECONDS + size / UPLOADED))
      except Exception as e: self._miss(_reason(e))
      else:
        if link is not None: link.unlink()

  def _miss(self, reason: str) -> None:
    if not self._missed: warn(f"wandb misses a table or an artifact ({reason}): the run goes on without it, and without others that fail")
    self._missed = True

  def _send_model(self, file: Path, alias: str) -> None:
    """Send weights as a version of the artifact model-<id>. wandb gets no copy but a link, which leads to them when the file has a successor too."""
    if self._run is None or not file.exists(): return
    link = Path(self._run.dir).resolve().parent/"artifacts"/f"{secrets.token_hex(4)}-{file.name}"
    try:
      link.parent.mkdir(exist_ok=True)
      os.link(file, link)
    except OSError: link = None   # a file system without links: wandb copies
    def log(wandb: Any, run: Any) -> None:
      known = metadata(link or file)
      known = {key: known[key] for key in ("model", "step", "epoch", self.score) if key in known}
      artifact = wandb.Artifact(f"model-{self.id}", "model", metadata=known)
      artifact.add_file(str((link or file).resolve()), name=file.name, policy="immutable" if link else "mutable", skip_cache=True)
      run.log_artifact(artifact, aliases=[alias])
      if run.settings.mode != "offline": self._uploads.append((artifact, link, artifact.size))
    self._later(log)

  def _send_last(self, wandb: Any, run: Any) -> None:
    """Send what a run leaves behind: its report, and its weights if it came to its end."""
    if (report := self.folder/"report.html").exists(): run.log({"report": wandb.Html(str(report), inject=False)})
    if not self._complete or self._artifacts == "none": return
    self._send_model(self.folder/"best.safetensors", "best")
    for last in checkpoints(self.folder)[-1:]: self._send_model(last, "latest")   # the version that comes last is wandb's latest

  def _drain(self) -> None:
    """Wait for what is left to `_later`: a few seconds, and where the server answers, as long as uploads may take."""
    if self._thread is None or self._run is None: return
    self._actions.put(None)
    to_hash = sum(file.stat().st_size for file in (self.folder/"best.safetensors", *checkpoints(self.folder)[-1:]) if file.exists())
    if self._answered.wait(FINISH_SECONDS + to_hash / HASHED):
      self._thread.join(sum(FINISH_SECONDS + size / UPLOADED for *_, size in self._uploads) + FINISH_SECONDS)


class Untracked:
  """The record that a rank other than the first keeps of a run: none."""
  folder, id = Path(os.devnull), ""
  def nothing(self, *_: Any, **__: Any) -> None: """Do nothing."""
  log = picture = show = improved = summary = finish = nothing


class Progress:
  """One line about a running loop: rewritten in place on a terminal, printed every `interval` seconds elsewhere.

  steps is the step at which the loop ends, batch_size the images a step. Speed is that of the last 20 updates, so the first step's compile time does
  not spoil it, and neither does what is done after `close`, such as an evaluation.
  """
  def __init__(self, steps: int, batch_size: int, *, interval: float = 10.0, stream: TextIO | None = None,
               clock: Callable[[], float] = time.monotonic):
    self.steps, self.batch_size, self.interval, self.stream, self.clock = steps, batch_size, interval, stream or sys.stdout, clock
    self.terminal = self.stream.isatty()
    self._recent: deque[tuple[float, int]] = deque(maxlen=20)
    self._printed, self._width, self._closed = -math.inf, 0, False

  def update(self, step: int, loss: float, memory: int = 0) -> None:
    """Show that step steps are done, the loss and the device memory in bytes (0: not shown)."""
    now = self.clock()
    if self._closed and len(self._recent) > 1:   # this update took as long as those before
      (first, before), (last, after) = self._recent[0], self._recent[-1]
      rest = now - last - (last - first) / (after - before) * (step - after)
      self._recent = deque([(then + rest, at) for then, at in self._recent], maxlen=self._recent.maxlen)
    self._closed = False
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
    self._width, self._closed = 0, True


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


def new_folder(wanted: Path, resumed: bool = False) -> Path:
  """Make the folder of a run: a new one, numbered if the name is taken, or the old one."""
  runs, name = wanted.parent, wanted.name
  try:
    for number in range(1, 10_000):
      folder = runs/(name if number == 1 else f"{name}-{number}")
      try: folder.mkdir(parents=True, exist_ok=resumed)
      except FileExistsError: continue
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
