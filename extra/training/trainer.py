"""The settings that every trainer here has, and the optimiser that they describe."""
from dataclasses import dataclass
from tinygrad import Tensor
from tinydet.errors import UserError
from tinydet.training import optim
from tinydet.config import option
from tinydet.runtime.precision import DTYPES
from tinydet.reporting.tracking import ARTIFACTS
from tinydet.runtime.mpi import WIRES, Ranks


def _numbers(text: str) -> tuple[int, ...]:
  try: return tuple(int(word) for word in text.split(",") if word)
  except ValueError: raise ValueError("expected whole numbers with commas, such as 16,22") from None


def _tags(text: str) -> tuple[str, ...]:
  tags = tuple(word.strip() for word in text.split(",") if word.strip())
  if any(len(tag) > 64 for tag in tags): raise ValueError("expected words with commas, such as baseline,sgd, each of 64 letters at most")
  return () if tags == ("none",) else tags


def _wandb(text: str) -> str:   # tinygrad's examples say WANDB=1
  return {"1": "online", "0": "disabled"}.get(text.strip().lower(), text.strip().lower())


@dataclass
class TrainerConfig:
  """How a run learns and what it leaves behind; a program adds its data and its model."""
  bs: int = option(8, "pictures a step, over all devices and machines", minimum=1, group="training")
  epochs: int = option(24, "passes over the training pictures", minimum=0, group="training")
  optimizer: str = option("adamw", "rule of the update", choices=optim.OPTIMIZERS, group="training")
  lr: float = option(5e-4, "learning rate after the warm-up", minimum=0, group="training")
  momentum: float = option(0.9, "of SGD", minimum=0, maximum=1, group="training")
  nesterov: bool = option(False, "SGD with Nesterov's momentum", group="training")
  weight_decay: float = option(1e-4, "of kernels", minimum=0, group="training")
  norm_weight_decay: float = option(0.0, "of norm layers and biases", minimum=0, group="training")
  schedule: str = option("cosine", "of the learning rate; plateau: it falls where the score does not rise", choices=optim.SCHEDULES, group="training")
  milestones: tuple = option((), "epochs after which the step schedule divides by 10, such as 16,22", parse=_numbers,
                             show=lambda v: ",".join(map(str, v)) or "none", group="training")
  plateau: int = option(5, "epochs without a better score after which the plateau schedule divides by 10", minimum=1, group="training")
  warmup: float = option(0.5, "epochs of linear warm-up from a thousandth of the learning rate", minimum=0, group="training")
  last_lr: float = option(0.0, "where the cosine, linear and plateau schedules end, times the learning rate", minimum=0, maximum=1, group="training")
  warmup_momentum: float | None = option(None, "SGD's momentum where a warm-up begins; none: as ever", minimum=0, maximum=1, group="training")
  warmup_bias_lr: float | None = option(None, "learning rate of biases where a warm-up begins, the others' being 0 there; none: as the others'",
                                        minimum=0, group="training")
  nominal_bs: int = option(0, "pictures an update that rate and decay are meant for: a smaller --bs accumulates so many, and their gradients are "
                           "added up, not averaged; 0: as --bs and --accumulate say", minimum=0, group="training")
  accumulate: int = option(1, "steps whose gradients are averaged before an update", minimum=1, group="training")
  find_lr: int = option(0, "sweep the learning rate over so many updates, 100 say, suggest one, and end; 0 trains", minimum=0, maximum=2000,
                        group="training")
  clip_norm: float = option(0.0, "largest norm of the gradient; 0 does not clip", minimum=0, group="training")
  ema: float = option(0.0, "decay of a moving average of the weights, which is then what is evaluated; 0 keeps none", minimum=0, maximum=1,
                      group="training")
  ema_tau: float = option(0.0, "updates in which that average lengthens to its decay; 0: a tenth of those done", minimum=0, group="training")
  dtype: str = option("float32", "what the network computes in; weights and losses are float32", choices=tuple(DTYPES), group="training")
  gpus: int = option(1, "devices of a process to divide the batch among", minimum=1, group="training")
  wire: str = option("float32", "what gradients travel between processes in (mpirun); half is half the bytes, and brings loss scaling",
                     choices=tuple(WIRES), group="training")
  seed: int = option(0, "of weights, data order and augmentation", minimum=0, group="training")

  eval_every: int = option(1, "epochs between evaluations", minimum=1, group="run")
  target: float | None = option(None, "score to reach, mAP or top-1, as 0.34; drawn beside the curve", minimum=0, maximum=1, group="run")
  patience: int = option(0, "end the run after so many epochs without a better score; 0 does not", minimum=0, group="run")
  stop_at_target: bool = option(False, "end the run at the first evaluation that reaches --target", group="run")
  out: str = option("runs", "folder of all runs", group="run")
  run_name: str | None = option(None, "folder of this run inside it; by default the data's and the backbone's names", group="run")
  save_half: bool = option(False, "write best.safetensors in half precision", group="run")
  resume: str | None = option(None, "go on with the run in this folder; auto: with the run of this name, if there is one", group="run")
  keep: int = option(2, "checkpoints to keep, beside the best weights", minimum=1, group="run")
  save_steps: int = option(0, "steps between checkpoints; 0: as minutes and evaluations say", minimum=0, group="run")
  save_minutes: float = option(10.0, "minutes between checkpoints; 0: as steps and evaluations say", minimum=0, group="run")
  max_skipped: int = option(20, "updates in a row that may be skipped because loss or gradient is not finite", minimum=1, group="run")
  debug_numerics: bool = option(False, "when the run ends over them, name the first layer whose output is not finite", group="run")
  log_every: int = option(10, "steps between lines of metrics.jsonl", minimum=1, group="run")
  wandb: str | None = option(None, "online sends the record, pictures and weights to its server, offline keeps them in the run's folder, disabled "
                             "makes none; by default what WANDB_MODE says, else offline", choices=("online", "offline", "disabled"), parse=_wandb,
                             group="run")
  project: str = option("tinygrad-retinanet", "wandb's project", group="run")
  group: str | None = option(None, "wandb's group of this run, such as the name of an experiment", env="WANDB_RUN_GROUP", group="run")
  tags: tuple = option((), "wandb's tags of this run, such as baseline,sgd", parse=_tags, show=lambda v: ",".join(v) or "none", env="WANDB_TAGS",
                       group="run")
  artifacts: str = option("end", "weights that wandb gets: the best and the last ones at the end, each new best too, or none", choices=ARTIFACTS,
                          group="run")


def check_batch_size(config: TrainerConfig, ranks: Ranks) -> None:
  """UserError where a batch cannot be divided evenly among all devices."""
  if config.bs % (config.gpus * ranks.size):
    of = f"{config.gpus * ranks.size}, --gpus {config.gpus} times {ranks.size} processes" if ranks.size > 1 else f"--gpus {config.gpus}"
    raise UserError(f"--bs {config.bs}: is not a multiple of {of}")


def settle_batch(config: TrainerConfig) -> None:
  """Set `accumulate` to what `nominal_bs` asks for, if it does."""
  if config.nominal_bs and config.accumulate == 1 and config.bs: config.accumulate = max(1, round(config.nominal_bs / config.bs))


def total_updates(config: TrainerConfig, steps_per_epoch: int) -> int:
  """Updates of a whole run, at least 1."""
  return max(1, int(steps_per_epoch / config.accumulate * config.epochs))


def make_optimizer(config: TrainerConfig, params: dict[str, Tensor], steps_per_epoch: int, ranks: int = 1) -> optim.Optimizer:
  """The optimiser that `config` describes, for `params` (name -> realised f32 tensor), whose gradients are means over `ranks`."""
  updates = steps_per_epoch / config.accumulate   # an epoch; those of the run are whole, those of an epoch need not be
  if not int(updates * config.epochs) and config.epochs:
    raise UserError(f"--accumulate {config.accumulate}: the run has {steps_per_epoch * config.epochs} steps, too few for one update; lower it, or "
                    "train for more --epochs")
  warmup, biased = round(config.warmup * updates), config.warmup_bias_lr is not None
  rate, bias_rate = (optim.schedule(config.schedule, config.lr, total_updates(config, steps_per_epoch), warmup_steps=warmup, last=config.last_lr,
                                    milestones=[round(m * updates) for m in config.milestones], first=first)
                     for first in (0.0 if biased else None, config.warmup_bias_lr))
  momentum = config.momentum if config.warmup_momentum is None else optim.ramp(config.warmup_momentum, config.momentum, warmup)
  # A nominal batch's gradients are added up, and its decay is that of so many pictures (YOLOv5 on).
  gain, share = (config.accumulate * ranks, config.bs * config.accumulate / config.nominal_bs) if config.nominal_bs else (1, 1)
  return optim.Optimizer(params, config.optimizer, rate, momentum=momentum, weight_decay=config.weight_decay * share,
                         norm_weight_decay=config.norm_weight_decay, clip_norm=config.clip_norm, ema_decay=config.ema, accumulate=config.accumulate,
                         loss_scale=2.0 ** 14 if "half" in (config.dtype, config.wire) else None, nesterov=config.nesterov,
                         bias_rate=bias_rate if biased else None, ema_tau=config.ema_tau, gain=gain, slows=config.schedule == "plateau")
