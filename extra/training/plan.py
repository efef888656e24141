"""What a run decides by itself where its user does not: starting weights, the first steps' length, and what fits a time."""
import math, os, re, time
from typing import Any
import numpy as np
from tinygrad import Context, Device, GlobalCounters, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet import detectors
from tinydet.config import is_free, set_free
from tinydet.datasets.download import DATASETS
from tinydet.datasets.fit import Fit, seen_shapes
from tinydet.detection.anchor_fit import MISSED, most_missed
from tinydet.detectors import Detector
from tinydet.errors import UserError
from tinydet.runtime.devices import to_devices
from tinydet.runtime.graphs import jit
from tinydet.runtime.memory import available, out_of_memory
from tinydet.runtime.precision import DTYPES
from tinydet.training.run import Run
from tinydet.training.trainer import TrainerConfig, settle_batch

STEADY = 100                # updates of warm-up at least, where the run has ten times as many
WARMING = 0.25              # of the run, which a warm-up that nobody asked for may last at most
SIDES = (640, 512, 416, 320, 256, 192, 128)   # pixels of the longer side that are weighed up, multiples of 32
LARGER = 1.25               # times the median picture's longer side: pixels beyond show nothing
MOST_EPOCHS, ENOUGH = 100, 40   # as `--epochs` goes, for a small data set; a larger picture is worth it while so many are left
SPARE = 0.85                # of the time: the rest is for pictures, checkpoints and the report
COMPILING = 2               # times what compiling the measured passes takes: the update and the evaluation compile too
EVALUATION = 0.5            # of a training step's time, for a picture that is only looked at
EACH_EVALUATION = 3.0       # seconds of an evaluation beside that: suppression, score, pictures, report
EVALUATING, EVALUATIONS = 0.2, 25   # share of the time that evaluations may take, and most of them
MOST_BATCH, FEWEST = 64, 8   # pictures a step that `--bs auto` ends at, and steps an epoch that it leaves at least
GAIN = 0.95                 # of the time a picture took: what twice the batch has to come under
MISSING = 0.1               # share of the boxes of a class that anchors may miss before others are fitted
MOST_FITTED = 5000          # boxes of a class that anchors are fitted to: COCO's persons would make 21 million of its 80 classes
UNITS = {"": 60, "s": 1, "m": 60, "min": 60, "h": 3600}


def seconds(text: str) -> float:
  """Parse "30m", "90s", "2h" or "30" (minutes) into seconds; ValueError otherwise. For `option(parse=seconds, show=show_seconds)`."""
  match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*(s|m|min|h|)", text.strip().lower())
  if match is None: raise ValueError("expected a time such as 30m, 2h or 90s")
  return float(match[1]) * UNITS[match[2]]


def show_seconds(value: float) -> str:
  """Write seconds the way `seconds` reads them."""
  return f"{value / 60:g}m" if value % 1 == 0 and value % 60 == 0 else f"{value:g}s"


def pictures(text: str) -> int:
  """Parse the pictures of a step, where 0 is "auto"; ValueError otherwise. For `option(parse=pictures, show=show_pictures)`."""
  if text.strip().lower() == "auto": return 0
  if not re.fullmatch(r"[1-9]\d{0,5}", text.strip()): raise ValueError("expected a whole number of 1 or more, or auto")
  return int(text)


def show_pictures(value: int) -> str:
  """Write the pictures of a step the way `pictures` reads them."""
  return str(value) if value else "auto"


def choose_weights(config: Any, run: Run, architecture: str) -> None:
  """Settle `--weights auto` for a network's builder name, and print what it came to and why."""
  if config.weights != "auto" or run.resumed: return
  if not (os.path.exists(config.data) or config.data in DATASETS or config.data.startswith("shapes")): return   # `open_splits` says so
  found = run.ranks.broadcast(detectors.best_start(architecture) if run.ranks.rank == 0 else None)
  config.weights, why = found
  print(f"weights: {config.weights}, {why}")


def steady_start(config: Any, run: Run, steps_per_epoch: int) -> None:
  """Settle a warm-up that the user left free: `STEADY` updates, or a tenth of the run, at least, as the first hundred are where it blows up, and
  `WARMING` of the run at most. One that outlasts the run is told of, whoever asked for it."""
  updates = steps_per_epoch / config.accumulate
  if run.resumed or not updates: return
  if is_free(config, "warmup") and config.preset == "folder":
    config.warmup = round(min(max(config.warmup, min(STEADY / updates, config.epochs / 10)), config.epochs * WARMING), 3)
  if config.warmup >= config.epochs:
    print(f"note: --warmup {config.warmup:g} is not over before the run of --epochs {config.epochs} is, so the rate stays below --lr {config.lr:g}")


def choose_anchors(config: Any, run: Run, detector: Detector, dataset: Any, fit: Fit) -> str:
  """With `--anchors auto`, give `detector` anchors for the boxes of `dataset` as it sees them, where its own miss too many. Returns a note, or ""
  where nobody asked; a run that is resumed has those it began with."""
  if config.anchors != "auto" or run.resumed: return ""
  if (own := detector.anchor_shapes()) is None: return f"--anchors auto: {detector.name} has no anchors to fit"
  if not (by_class := seen_shapes(dataset, fit)): return "--anchors auto: there are no boxes to fit them to"
  missed, worst, _ = most_missed(by_class, own)
  if missed <= MISSING: return f"anchors: as they are; of {worst} {missed:.1%} are below an IoU of {MISSED:g} with every shape, of others less"
  count = min(MOST_FITTED, max(map(len, by_class.values())))   # of each class alike, evenly chosen or repeated
  detector.fit_anchors(np.concatenate([shapes[np.arange(count) * len(shapes) // count] for shapes in by_class.values()]))
  after, last, _ = most_missed(by_class, detector.anchor_shapes())
  return (f"anchors: fitted to the boxes; of {worst} {missed:.1%} were below an IoU of {MISSED:g} with every shape, now no more than {after:.1%} "
          f"(of {last})")


def fit_machine(config: Any, run: Run, detector: Detector, data: tuple[Any, Any]) -> None:
  """Settle what the user left to the machine, measuring there: `--bs auto`, then `--budget`."""
  fit_batch(config, run, detector, data[0])
  fit_budget(config, run, detector, data)


def fit_batch(config: Any, run: Run, detector: Detector, train_set: Any) -> None:
  """With `--bs auto`, settle the pictures a step: doubled while they fit into memory, a picture's share of a step still falls, and an epoch has
  `FEWEST` steps. The learning rate, where it is free, goes with them from the batch that it is meant for: by the root for Adam (Malladi et al. 2022),
  in proportion for SGD (Goyal et al. 2017), not at all with `--nominal-bs`."""
  if config.bs: return
  if run.resumed: config.bs = run.resumed["config"]["bs"]
  else:
    print("--bs auto: a step of some pictures is measured, and of twice as many while that pays; each is compiled first", flush=True)
    config.bs, tried = run.ranks.broadcast(_largest_batch(config, run, detector, len(train_set)) if run.ranks.rank == 0 else None)
  settle_batch(config)
  if run.resumed: return
  scale = 1 if config.nominal_bs else config.bs / run.meant_bs if config.optimizer == "sgd" else math.sqrt(config.bs / run.meant_bs)
  if is_free(config, "lr") and scale != 1: config.lr = float(f"{config.lr * scale:.3g}")
  print(f"--bs auto: {config.bs} pictures a step, learning rate {config.lr:g}; {tried}")


def _largest_batch(config: Any, run: Run, detector: Detector, pictures: int) -> tuple[int, str]:
  """The batch, and what was tried, in words."""
  each, size = config.gpus * run.ranks.size, detector.fit(config.size, config.max_size).canvas()[::-1]
  most = max(each, min(MOST_BATCH, pictures // FEWEST))
  host = Device.DEFAULT.partition(":")[0] in ("CPU", "LLVM")   # whose memory ends where the system's does: what is free is asked before
  shares: dict[int, float] = {}   # seconds of a step for a picture, infinite where it does not fit
  batch, needed = each << max(0, (min(TrainerConfig.bs, most) // each).bit_length() - 1), 0
  while each <= batch <= most and batch not in shares:
    share = batch // run.ranks.size
    try: seconds, _, needed = (math.inf, 0, 0) if host and 2 * needed > available() / 2 else step_seconds(config, run, detector, size, share)
    except Exception as e:
      if not out_of_memory(e): raise
      seconds = math.inf
    shares[batch] = seconds / batch
    if seconds == math.inf: batch //= 2
    elif shares[batch] < GAIN * shares.get(batch // 2, math.inf): batch *= 2
  fits = sorted(b for b, share in shares.items() if share < math.inf)
  if not fits: raise UserError(f"--bs auto: a step of {each} at {size[0]}x{size[1]} does not fit into the memory of the device; lower --size")
  best = fits[0]
  for b in fits[1:]:
    if shares[b] < GAIN * shares[best]: best = b
  return best, ", ".join(f"{b}: {share:.2g} s a picture" if share < math.inf else f"{b} do not fit" for b, share in sorted(shares.items()))


def fit_budget(config: Any, run: Run, detector: Detector, data: tuple[Any, Any]) -> None:
  """With `--budget`, settle size and epochs by the time of a step, which is measured, and print the plan. UserError where the time is too short."""
  if not config.budget or run.resumed: return
  train_set, val_set = data
  sizes = _sizes(np.asarray(train_set.sizes)) if is_free(config, "size") else [config.size]
  probe = min(sizes, key=lambda size: abs(max(size) - 256))
  step, compiling, _ = run.ranks.broadcast(step_seconds(config, run, detector, probe, config.bs) if run.ranks.rank == 0 else None)
  per_pixel = step / config.bs / math.prod(probe) * run.ranks.size
  spent = time.monotonic() - run.started
  left = max(config.budget - spent - COMPILING * compiling, (config.budget - spent) / 3) * SPARE   # a busy machine compiles slowly just now
  def epoch_seconds(size: tuple[int, int]) -> float:
    return per_pixel * math.prod(size) / run.ranks.size * (len(train_set) + EVALUATION * len(val_set) / config.eval_every)
  evaluations = max(1, min(EVALUATIONS, int(left * EVALUATING / EACH_EVALUATION)))
  training = max(left - evaluations * EACH_EVALUATION, left / 2)
  def epochs(size: tuple[int, int]) -> int: return int(training / epoch_seconds(size))
  size = next((size for size in sizes if epochs(size) >= ENOUGH), sizes[-1])
  if epochs(size) < 1:
    raise UserError(f"--budget {show_seconds(config.budget)}: an epoch of {len(train_set):,} pictures at {size[0]}x{size[1]} takes "
                    f"{epoch_seconds(size):.0f} s here, and {max(0, left):.0f} s are left after {spent:.0f} s to get ready and measure; give more "
                    f"time, or --train-images")
  set_free(config, {"size": size, "epochs": min(MOST_EPOCHS, epochs(size))}, "--budget")
  set_free(config, {"eval_every": max(1, math.ceil(config.epochs / evaluations)), "close_mosaic": min(config.close_mosaic, config.epochs // 6)},
           "--budget")
  each = epoch_seconds(size)
  print(f"plan for {show_seconds(config.budget)}: {detector.name} at {config.size[0]}x{config.size[1]} for {config.epochs} epochs of "
        f"{round(each) if each >= 10 else round(each, 1)} s, evaluated every {config.eval_every}; "
        f"{step:.3g} s a step of {config.bs} at {probe[0]}x{probe[1]}, measured; done in some "
        f"{max(1, round((config.epochs * each + evaluations * EACH_EVALUATION + COMPILING * compiling + time.monotonic() - run.started) / 60))} min")


def step_seconds(config: Any, run: Run, detector: Detector, size: tuple[int, int], batch: int) -> tuple[float, float, int]:
  """Seconds of forward and backward pass of `batch` pictures at `size` (width, height), at best of three, and of compiling them, and the bytes that
  they hold on the device. No weight changes."""
  width, height = detector.fit(size).canvas()[::-1]
  for constant in detector.constants((height, width)): constant.realize()
  params = [t for t in get_state_dict(detector.network).values() if t.is_param]
  boxes = np.tile(np.array([0.2 * width, 0.2 * height, 0.6 * width, 0.6 * height], np.float32), (batch, 4, 1))
  arrays = (np.zeros((batch, height, width, 3), np.uint8), boxes, np.zeros((batch, 4), np.int32))

  @jit
  def step(images: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    with Context(TRAINING=0):   # running statistics stay
      loss = detector.losses(detector(images, DTYPES[config.dtype]), boxes, labels, images.shape[1:3])["loss"]
      gradients = loss.gradient(*params)
      Tensor.realize(loss, *gradients)
      return loss

  times, held = [], GlobalCounters.mem_used
  for _ in range(5):
    tensors = [to_devices(array, run.gpus) for array in arrays]
    begun = time.monotonic()
    step(*tensors).item()
    times.append(time.monotonic() - begun)
  return min(times[2:]), sum(times[:2]), GlobalCounters.mem_used - held


def _sizes(pictures: np.ndarray) -> list[tuple[int, int]]:
  """(width, height) to weigh up for pictures [N,2] (height, width), largest first: the median's shape, sides in multiples of 32."""
  height, width = np.median(pictures, axis=0)
  longer = max(height, width)
  sides = [side for side in SIDES if side <= LARGER * longer] or [SIDES[-1]]
  def rounded(x: float) -> int: return max(32, round(x / 32) * 32)
  return list(dict.fromkeys((rounded(side * width / longer), rounded(side * height / longer)) for side in sides))
