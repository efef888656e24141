"""Checkpoints of a running loop: when they are due, written beside the training, and found again."""
import contextlib, os, re, threading, time
from pathlib import Path
from typing import Any, TextIO
import numpy as np
from tinygrad.nn.state import get_state_dict
from tinydet.errors import UserError
from tinydet.models.layer_list import AUXILIARY
from tinydet.nn.init import set_all
from tinydet.weights import checkpoint
from tinydet.training.optim import Optimizer
from tinydet.runtime.mpi import ALONE, Ranks
from tinydet.runtime import random
from tinydet.runtime.lock import claim
from tinydet.reporting.tracking import warn
from tinydet.weights.weights import save_weights


class Checkpoints:
  """The checkpoints of one run, `folder`/checkpoint-<step>.safetensors: weights as `model.`, optimiser state as `optimizer.`, random numbers as
  `random.`, metadata `about` and what `save` is given.

  They are due every `every_steps` steps and every `every_minutes` minutes, 0 meaning never; the last `keep` stay. A checkpoint is copied off the
  device at once and written by a thread; one that cannot be written is reported, and the run goes on. Each of `ranks` has its object and calls
  `save`; rank 0 alone writes."""
  def __init__(self, folder: Path, model: Any, optimizer: Optimizer, about: dict, *, keep: int = 2, every_steps: int = 0, every_minutes: float = 0,
               ranks: Ranks = ALONE):
    self.ranks, self.folder, self.about, self.keep, self.every_steps, self.every_minutes = ranks, folder, about, keep, every_steps, every_minutes
    self.tensors = {f"model.{k}": t for k, t in get_state_dict(model).items()} | {f"optimizer.{k}": t for k, t in optimizer.state().items()}
    # What ranks have each of their own between two updates.
    self.apart = [t for k, t in self.tensors.items() if k.startswith("optimizer.sum.") or "running_" in k] if optimizer.sums else []
    self.saved: tuple[int, int] | None = None   # steps and evaluations in the last one
    self._time, self._thread, self._failure = time.monotonic(), None, None

  def due(self, step: int) -> bool:
    """Whether a checkpoint should follow `step`."""
    return bool((self.every_steps and step % self.every_steps == 0) or
                (self.every_minutes and time.monotonic() - self._time >= 60 * self.every_minutes))

  def save(self, step: int, progress: dict) -> None:
    """Take the state after `step` steps with `progress` (JSON values), unless the last one has it already."""
    if self.saved == (step, progress["evaluated"]): return
    for tensor in self.apart: self.ranks.average(tensor)
    self.saved, self._time = (step, progress["evaluated"]), time.monotonic()
    if self.ranks.rank: return
    self.wait()
    # copied, since a device whose memory is the host's may lend it
    arrays = {key: np.array(t.numpy()) for key, t in self.tensors.items()} | random.state()
    self._thread = threading.Thread(target=self._write, args=(step, arrays, self.about | progress | {"step": step}), name="checkpoint")
    self._thread.start()

  def weights(self) -> dict[str, np.ndarray]:
    """A copy of the weights as they are now; nothing on a rank that does not write them."""
    if self.ranks.rank: return {}
    return {key.removeprefix("model."): np.array(t.numpy()) for key, t in self.tensors.items() if key.startswith("model.")}

  def keep_best(self, metadata: dict, half: bool = False, weights: dict[str, np.ndarray] | None = None) -> None:
    """Write `weights`, by default those of now, less layers for training alone, to `folder`/best.safetensors, in half precision if asked; reported
    where it fails, and the run goes on."""
    if self.ranks.rank: return
    weights = {key: value for key, value in (self.weights() if weights is None else weights).items() if not key.startswith(AUXILIARY)}
    try: save_weights(self.folder / "best.safetensors", weights, self.about | metadata, half)
    except UserError as e: warn(f"{e}: the run goes on, and tries again after the next evaluation that is the best")

  def wait(self) -> None:
    """Return when nothing is being written."""
    if self._thread is not None: self._thread.join()
    self._thread = None
    if self._failure is not None and not isinstance(self._failure, UserError | OSError): raise self._failure

  def finish(self) -> None:
    """Wait; UserError where the last checkpoint could not be written."""
    self.wait()
    if self._failure is not None: raise UserError(f"the last checkpoint is missing: {self._failure}")

  def _write(self, step: int, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    try:
      checkpoint.save(self.folder / f"checkpoint-{step}.safetensors", arrays, metadata)
      checkpoint.prune(self.folder, self.keep, step)
      self._failure = None
    except (UserError, OSError) as e:
      self._failure = e
      warn(f"{e}: the run goes on, the checkpoint before stays")
    except BaseException as e: self._failure = e   # a fault of ours, for `wait` to raise


def run_name(name: str | None, data: str, backbone: str) -> str:
  """`--run-name`, or else the data's and the backbone's names as far as a folder's name can have them."""
  return name or re.sub(r"[^A-Za-z0-9._-]+|^[._-]+", "-", f"{Path(data).resolve().name}-{backbone}").strip("-")


def find_run(resume: str | None, out: str, name: str) -> Path | None:
  """The folder of the run that `--resume` means: its own value, or for "auto" the run `name` in `out`; None where there is none to go on with."""
  if resume is None: return None
  folder = Path(out)/name if resume == "auto" else Path(resume)
  if resume == "auto": return folder if folder.is_dir() else None
  if not folder.is_dir(): raise UserError(f"--resume {resume}: is no folder; give the folder of a run, or auto")
  return folder


def open_run(resume: str | None, out: str, name: str) -> tuple[Path, TextIO | None, dict[str, np.ndarray], dict | None]:
  """Where a run lies and what it goes on from: its folder, a lock on it, tensors and metadata of its newest whole checkpoint.

  Without `--resume` it is a new run: nothing is touched, no lock, no tensors, metadata None. A run that "auto" found without a checkpoint begins
  again in its folder, with metadata {}. UserError where another process has the folder, or nothing is there to resume."""
  if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name): raise UserError(f"run name {name!r}: use letters, digits, '.', '_' and '-'")
  if (folder := find_run(resume, out, name)) is None: return Path(out)/name, None, {}, None
  lock, newest = claim(folder), load_newest(folder)
  if newest is None and resume != "auto": raise UserError(f"--resume {resume}: no whole checkpoint-*.safetensors is there")
  return folder, lock, *(newest or ({}, {}))


def load_newest(folder: Path) -> tuple[dict[str, np.ndarray], dict] | None:
  """Tensors and metadata of the newest whole checkpoint of the run in `folder`; None where there is no checkpoint. Broken ones are reported in a line
  each and passed over. UserError where none is whole, and where the system does not let one be read: it may be whole, and the newest. Nothing is
  removed but what a killed process left half-written."""
  try: names = os.listdir(folder)
  except OSError as e: raise UserError(f"cannot read {folder}: {e.strerror}; mend its permissions or its disk, or choose another --run-name") from e
  for name in names:
    if name.startswith(".") and name.endswith(".partial"):
      with contextlib.suppress(OSError): (folder/name).unlink()
  found = checkpoint.checkpoints(folder)
  for path in reversed(found):
    try: return checkpoint.load(path)
    except UserError as e:
      if isinstance(e.__cause__, OSError):
        raise UserError(f"{e}; mend its permissions or its disk, or move it away to go on from the checkpoint before it") from e
      warn(f"{e}; the checkpoint before it is used" if path != found[0] else str(e))
  if not found: return None
  raise UserError(f"{folder}: none of its checkpoints is whole; choose another --run-name, or move them away to begin anew")


def restore(model: Any, optimizer: Optimizer, tensors: dict[str, np.ndarray], name: str) -> None:
  """Put the tensors of a checkpoint back into `model` and `optimizer`; UserError, naming the run as `name`, where they are of another network."""
  wanted = {f"model.{k}": t for k, t in get_state_dict(model).items()} | {f"optimizer.{k}": t for k, t in optimizer.state().items()}
  if odd := sorted(wanted.keys() ^ {key for key in tensors if not key.startswith("random.")}):
    raise UserError(f"{name}: is of another network or optimiser; {len(odd)} tensors differ, {', '.join(odd[:4])} for example")
  for key, tensor in wanted.items():
    if tensors[key].shape != tensor.shape: raise UserError(f"{name}: {key} has shape {tensors[key].shape}, this run needs {tensor.shape}")
  set_all((tensor, tensors[key]) for key, tensor in wanted.items())
