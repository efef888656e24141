"""A trainer as small as one gets, for test_mpi.py: by itself, or under mpiexec with as many ranks as that starts.

  mpiexec -n 2 python test/mpi_program.py '[{"out": "runs", "name": "a"}]'

Each dictionary is the arguments of a `run`."""
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
from tinygrad.nn.state import get_state_dict
from tinydet.datasets.loader import Loader
from tinydet.datasets.sample import Sample
from tinydet.runtime.device import require_device
from tinydet.errors import UserError, exit_on_user_error
from tinydet.models.preprocess import normalize
from tinydet.nn import init
from tinydet.nn.layers import NORMS, Conv2d, Linear
from tinydet.training.loop import make_step, train
from tinydet.training.optim import Optimizer, schedule
from tinydet.runtime.devices import devices, replicate, to_devices
from tinydet.runtime.mpi import ALONE, Ranks, join
from tinydet.training.resume import Checkpoints, open_run, restore
from tinydet.runtime.signals import Signals
from tinydet.reporting.tracking import Tracker, Untracked

PICTURES, BATCH, SIDE = 32, 8, 8


class Pictures:
  """Noise, and how bright it is on the whole: label 0 to 9, or 99, whose loss is not a number, for the pictures of `poisoned`."""
  name, max_boxes = "noise", 1

  def __init__(self, poisoned, missing): self.poisoned, self.missing = poisoned, missing

  def __len__(self): return PICTURES

  def __getitem__(self, i):
    if i == self.missing: raise UserError(f"picture {i} is gone")
    rng = np.random.default_rng((3, i))
    image = rng.integers(0, 50 + 20 * (i % 10), (SIDE, SIDE, 3)).astype(np.uint8)
    label = 99 if i in self.poisoned else i % 10
    return Sample(image, np.array([[0, 0, SIDE, SIDE]], np.float32), np.array([label], np.int32), i, (SIDE, SIDE), (SIDE, SIDE))

  def image_name(self, i): return f"picture {i}"


class Classifier:
  def __init__(self, norm):
    self.conv, self.norm, self.fc = Conv2d(3, 8, 3, 2, 1, bias=False), NORMS[norm](8), Linear(8, 10)

  def __call__(self, x): return self.fc(self.norm(self.conv(x)).relu().contiguous().mean((2, 3)))


def run(out: str, name: str, ranks: Ranks = ALONE, *, norm: str = "group", accumulate: int = 1, wire: str = "float32", gpus: int = 1,
        resume: bool = False, every_steps: int = 0, at: int = 0, who: int = -1, what: str = "", poisoned: tuple[int, ...] = (),
        missing: int = -1) -> dict:
  """Train for two epochs of four steps and leave metrics.jsonl and checkpoints in `out`/`name`. After step `at` rank `who` does `what`: it dies
  ("kill"), raises ("raise") or gets a signal (its name). Returns the state, and whether all ranks have the same."""
  model, names = Classifier(norm), devices(gpus)
  # Ranks that draw other weights, or read none, get those of rank 0.
  init.initialize(model, lambda key, shape: init.normal(0.3) if len(shape) > 1 else init.normalization(key), ranks.rank)
  tensors = get_state_dict(model)
  params, buffers = {k: t for k, t in tensors.items() if t.is_param}, [t for t in tensors.values() if not t.is_param]
  # SGD, as Adam makes a whole step of the rounding of a gradient that is 0
  optimizer = Optimizer(params, "sgd", schedule("constant", 0.02, 100), clip_norm=5.0, ema_decay=0.9, accumulate=accumulate,
                        loss_scale=1024.0 if wire == "half" else None)
  folder, lock, state, resumed = open_run("auto" if resume else None, out, name) if ranks.rank == 0 else (None, None, {}, None)
  resumed = ranks.broadcast(resumed)
  if resumed and ranks.rank == 0: restore(model, optimizer, state, name)
  ranks.spread([*tensors.values(), *optimizer.state().values()])
  replicate([*tensors.values(), *optimizer.state().values()], names)

  def losses(images, labels):
    logits = model(normalize(images))
    each = logits.sparse_categorical_crossentropy(labels.clip(0, 9), reduction="none") + (labels == 99).where(float("nan"), 0.0)
    return {"loss": each.mean(), "accuracy": (logits.argmax(1) == labels).float().mean()}

  step, done = make_step(losses, optimizer, buffers, accumulate, resumed["step"] if resumed else 0, ranks, wire), [resumed["step"] if resumed else 0]
  def watched(*tensors):
    read = step(*tensors)
    done[0] += 1
    if done[0] == at and ranks.rank == who:
      if what == "raise": raise ValueError("a bug")
      if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
      os.killpg(0, getattr(signal, what))   # as mpirun does: to the children too, some of which compile
      time.sleep(0.1)
    return read

  loader = Loader(Pictures(poisoned, missing), BATCH, lambda sample, rng: sample, shuffle=True, drop_last=True, shard=(ranks.rank, ranks.size))
  tracker = Untracked() if ranks.rank else Tracker(folder, {}, project="test", mode="disabled", resume=resumed, lock=lock)
  checkpoints = Checkpoints(tracker.folder, model, optimizer, {}, keep=99, every_steps=every_steps, ranks=ranks)
  signals = Signals(ranks)
  try:
    with signals:
      train(watched, loader, lambda batch: (to_devices(batch.images, names), to_devices(batch.labels[:, 0], names)), tracker, checkpoints, signals,
            epochs=2, start=resumed or None, log_every=1, max_skipped=2, ranks=ranks)
      checkpoints.finish()
  finally:
    checkpoints.wait()
    tracker.finish()
  state = {k: t.numpy().copy() for k, t in (tensors | optimizer.state()).items()}
  everywhere = ranks.gather({k: v.tobytes() for k, v in state.items()})
  return {"state": state, "same": all(other == everywhere[0] for other in everywhere[1:])}


def take_turns(ranks: Ranks, file: str) -> None:
  with ranks.in_turn(), open(file, "a", encoding="utf-8") as f:
    f.write(f"{ranks.rank} begins\n")
    f.flush()
    time.sleep(0.1 if ranks.rank == 0 else 0)
    f.write(f"{ranks.rank} ends\n")


if __name__ == "__main__":
  with exit_on_user_error(), join() as ranks:
    require_device()
    print(f"ranks: {ranks.size}", flush=True)
    for arguments in json.loads(sys.argv[1]):
      if "turns" in arguments: take_turns(ranks, arguments["turns"])
      else:
        result = run(ranks=ranks, **arguments)
        if ranks.rank == 0:
          folder = Path(arguments["out"]) / arguments["name"]
          np.savez(folder / "state.npz", **result["state"])
          (folder / "same").write_text(json.dumps(result["same"]))
