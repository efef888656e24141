"""Optimisers and learning-rate schedules as tensor expressions: a whole update is part of the jitted step, with no number from the host in it."""
import contextlib, math
from collections.abc import Callable, Iterator
import numpy as np
from tinygrad import Tensor, dtypes
from tinydet.nn import update_cpu
from tinydet.nn.init import on_device, zeros
from tinydet.nn.kernel_cpu import fits
from tinydet.runtime.devices import to_host

Schedule = Callable[[Tensor], Tensor]  # the number of updates done, f32 [1] -> the learning rate, f32 [1]
SMALL, SCALE_STEPS = 2048, 2000   # numbers in a gradient that is not worth a kernel of its own; finite updates before the loss scale grows
WARMUP_FACTOR = 1e-3   # of the learning rate, where a warm-up begins
SCHEDULES, OPTIMIZERS = ("constant", "step", "cosine", "linear", "plateau"), ("sgd", "adam", "adamw")


def schedule(kind: str, lr: float, total_steps: int, *, warmup_steps: int = 0, warmup_factor: float = WARMUP_FACTOR,
             milestones: list[int] | None = None, gamma: float = 0.1, last: float = 0.0, first: float | None = None) -> Schedule:
  """Linear warm-up from `warmup_factor * lr`, or from the rate `first`, times one of SCHEDULES: "constant", and "plateau", which `Optimizer.slow`
  lowers; "step", times `gamma` at each of
  `milestones` (steps); "cosine" (Loshchilov & Hutter 2016) and "linear", down to `last` times the rate at `total_steps`."""
  def rate(step: Tensor) -> Tensor:
    factor = step.ones_like()   # on the devices that the count is on
    if kind == "step":
      for milestone in milestones or []: factor = factor * (step >= milestone).where(gamma, 1.0)
    if kind == "cosine": factor = 0.5 * (1 + ((step / total_steps).minimum(1) * math.pi).cos())
    if kind == "linear": factor = 1 - (step / total_steps).minimum(1)
    if last and kind in ("cosine", "linear"): factor = last + (1 - last) * factor
    if warmup_steps and first is not None: return first + (lr * factor - first) * (step / warmup_steps).minimum(1)
    if warmup_steps: factor = factor * (warmup_factor + (1 - warmup_factor) * (step / warmup_steps).minimum(1))
    return lr * factor
  return rate


def ramp(low: float, high: float, steps: int) -> Schedule:
  """From `low` to `high` in equal steps over `steps` updates, and `high` from there on."""
  return lambda step: low + (high - low) * (step / max(1, steps)).minimum(1)


def exponential(low: float, high: float, steps: int) -> Schedule:
  """From `low` at the first to `high` at the last of `steps` updates, each the same factor above the one before (for `find_lr`)."""
  growth = math.log(high / low) / max(1, steps - 1)
  return lambda step: low * (step * growth).exp()


class Optimizer:
  """SGD with momentum, as it is or Nesterov's, Adam or AdamW with torch's update rules, gradient clipping, and an optional average of the weights.

  An update whose gradient, loss or rate is not finite leaves everything as it was.

  Args: `params` name -> realised f32 tensor; `kind` one of OPTIMIZERS; `rate` from `schedule`; `weight_decay` for tensors of two dimensions and more,
  `norm_weight_decay` for the others (norms and biases); `clip_norm` bounds the norm of the whole gradient, 0 leaves it; `ema_decay` > 0 keeps an
  exponential moving average in `ema`, which starts short and lengthens to that decay; `accumulate` > 1 keeps `sums` for that many gradients to be
  added up in; `loss_scale` is what the loss starts out multiplied by where the network computes in half precision: halved by an update that is not
  finite, doubled after 2,000 that are. `momentum` of SGD may be a schedule; `bias_rate` is the rate of what is called "bias", where it is another;
  with `ema_tau` the average starts short as that many updates say: its decay is `ema_decay` (1 - exp(-updates / tau)); `gain` is what a gradient is
  multiplied by; `slows` keeps the factor of the rate that `slow` lowers.
  Sharded parameters (`parallel.replicate`) need their optimiser's `state()` replicated likewise."""
  def __init__(self, params: dict[str, Tensor], kind: str, rate: Schedule, *, momentum: float | Schedule = 0.9,
               betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
               norm_weight_decay: float = 0.0, clip_norm: float = 0.0, ema_decay: float = 0.0, accumulate: int = 1, loss_scale: float | None = None,
               nesterov: bool = False, bias_rate: Schedule | None = None, ema_tau: float = 0.0, gain: float = 1.0,
               slows: bool = False):
    self.params, self.kind, self.rate, self.momentum, self.betas, self.eps = params, kind, rate, momentum, betas, eps
    self.decay = {name: weight_decay if p.ndim > 1 else norm_weight_decay for name, p in params.items()}
    self.clip_norm, self.ema_decay, self.ema_tau = clip_norm, ema_decay, ema_tau
    self.nesterov, self.bias_rate, self.gain = nesterov, bias_rate, gain
    def fresh() -> dict[str, Tensor]: return dict(zip(params, zeros(p.shape for p in params.values())))
    self.steps, = zeros([(1,)])
    self.first = fresh()                               # momentum, or the mean gradient
    self.second = fresh() if kind != "sgd" else {}     # the mean squared gradient
    self.ema = {name: _copy(p) for name, p in params.items()} if ema_decay else {}
    self.sums = fresh() if accumulate > 1 else {}
    self.slowed = Tensor(np.ones(1, np.float32)) if slows else None   # a tensor, as captured graphs read it
    self.idle: set[str] = set()   # names of parameters that the loss does not depend on
    # the factor, and how many finite updates it has seen
    self.loss_scale = None if loss_scale is None else Tensor(np.array([loss_scale, 0], np.float32))

  def state(self) -> dict[str, Tensor]:
    """Everything but the parameters that the next update depends on, by name."""
    groups = {"first": self.first, "second": self.second, "ema": self.ema, "sum": self.sums}
    scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale}
    slowed = {} if self.slowed is None else {"slowed": self.slowed}
    return {"steps": self.steps} | scale | slowed | {f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}

  def update(self, gradients: list[Tensor], loss: Tensor | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Assign the next values, given the gradients of `params` in order (of the loss times `loss_scale`, where there is one), and the loss, a scalar,
    unless a loss that is not finite shows in the gradients. Those of `idle` stay as they are, without decay, as torch leaves what has no gradient.
    Returns the tensors to realise, and scalars to log: `lr`, `gradient_norm`, `skipped` (1 where nothing was changed) and `loss_scale`."""
    taught = {name: g for name, g in zip(self.params, gradients, strict=True) if name not in self.idle}
    norm = total_norm(list(taught.values()))
    if self.gain != 1: norm = norm * self.gain
    if self.loss_scale is not None: norm = norm / self.loss_scale[:1]
    lr = self._slowed(self.rate(self.steps))
    finite = norm.isfinite() & lr.isfinite()
    ok = (finite if loss is None else finite & loss.isfinite()).contiguous()
    logs = {"lr": lr, "gradient_norm": norm, "skipped": ok.where(0.0, 1.0)}
    def keep(tensor: Tensor, new: Tensor) -> None: tensor.assign(ok.where(new, tensor))
    factor = None if self.loss_scale is None else 1 / self.loss_scale[:1]
    if self.gain != 1: factor = norm.full_like(self.gain) if factor is None else factor * self.gain
    if self.clip_norm: factor = (self.clip_norm / (norm + 1e-6)).minimum(1) * (1 if factor is None else factor)
    if factor is not None: factor = factor.contiguous()
    if self.loss_scale is not None:
      logs["loss_scale"], (scale, good) = self.loss_scale[:1], self.loss_scale.split(1)
      grown = (good + 1 >= SCALE_STEPS)
      self.loss_scale.assign(ok.where(grown.where(scale * 2, scale).cat(grown.where(0, good + 1)), (scale / 2).maximum(1).cat(good * 0)))
    t = self.steps + 1
    correction1, correction2 = (1 - (t * math.log(beta)).exp() for beta in self.betas)
    momentum = self.momentum(self.steps).contiguous() if callable(self.momentum) else self.momentum
    bias_lr = None if self.bias_rate is None else self._slowed(self.bias_rate(self.steps)).contiguous()
    lr_adam, root = (lr / correction1).contiguous(), correction2.sqrt().contiguous()
    average = self.ema_decay * (1 - (t / -self.ema_tau).exp()) if self.ema_tau else (t / (t + 9)).minimum(self.ema_decay)
    if fits(*self.params.values(), self.steps): self._update_in_c(taught, (factor, lr, bias_lr, momentum, lr_adam, root, average, ok))
    else:
      for name, g in taught.items():
        p = self.params[name]
        if factor is not None: g = g * factor
        first, decay, g = self.first[name], self.decay[name], g.cast(dtypes.float32)
        if decay and self.kind != "adamw": g = g + decay * p
        if self.kind == "sgd":
          keep(first, momentum * first + g)
          new = p - (lr if bias_lr is None or not name.endswith("bias") else bias_lr) * (g + momentum * first if self.nesterov else first)
        else:
          second, (beta1, beta2) = self.second[name], self.betas
          g = g.contiguous()   # both moments read it
          keep(first, beta1 * first + (1 - beta1) * g)
          keep(second, beta2 * second + (1 - beta2) * g * g)
          new = p * (1 - lr * decay) if decay and self.kind == "adamw" else p
          new = new - lr_adam * first / (second.sqrt() / root + self.eps)
        keep(p, new)
        if self.ema_decay: keep(self.ema[name], average * self.ema[name] + (1 - average) * p)
    keep(self.steps, t)
    return [*self.params.values(), *self.state().values()], logs

  def _update_in_c(self, gradients: dict[str, Tensor], now: tuple) -> None:
    """The same on a processor; `now` are factor, rate, that of biases, momentum, Adam's rate and root, the average's decay, and whether to change."""
    lr = now[1]
    numbers = [lr.ones_like() if v is None and i == 0 else lr if v is None else v if isinstance(v, Tensor) else lr.full_like(v)
               for i, v in enumerate(now)]
    row = numbers[0].cat(*numbers[1:]).cast(dtypes.float32).contiguous()
    kept = [group for group in (self.params, self.first, self.second, self.ema) if group]
    entries = [update_cpu.Entry(tuple(group[name] for group in kept), g.cast(dtypes.float32).contiguous(), self.decay[name], name.endswith("bias"))
               for name, g in gradients.items()]
    update_cpu.update(entries, row, {
      "ADAM": int(self.kind != "sgd"), "DECOUPLED": int(self.kind == "adamw"), "NESTEROV": int(self.nesterov), "EMA": int(bool(self.ema)),
      "EPSILON": f"{self.eps!r}f", **{f"BETA{i}": f"{beta!r}f" for i, beta in enumerate(self.betas, 1)},
      **{f"REST{i}": f"{1 - beta!r}f" for i, beta in enumerate(self.betas, 1)}})

  def _slowed(self, rate: Tensor) -> Tensor: return rate if self.slowed is None else rate * self.slowed

  def slow(self, factor: float, last: float = 0.0) -> float:
    """Multiply the rate of all further updates by `factor`, down to `last` of the schedule's; returns what it then is of that."""
    self.slowed.assign((self.slowed * factor).maximum(last)).realize()
    return float(self.slowed.numpy()[0])

  @contextlib.contextmanager
  def averaged(self) -> Iterator[None]:
    """Inside, the parameters hold their moving average, if one is kept."""
    learnt = {name: self.params[name].clone() for name in self.ema}
    def hold(values: dict[str, Tensor]) -> None:   # all at once: tinygrad looks through all tensors there are each time
      if values: Tensor.realize(*(self.params[name].assign(value) for name, value in values.items()))
    if learnt: Tensor.realize(*learnt.values())
    hold(self.ema)
    try: yield
    finally: hold(learnt)


def total_norm(gradients: list[Tensor]) -> Tensor:
  """The Euclidean norm, f32 [1], of all gradients taken as one vector."""
  if fits(*gradients): return update_cpu.sum_of_squares([g.cast(dtypes.float32) for g in gradients]).sqrt()
  # The small ones together, as a kernel for each costs more than its work. In rounds, because a CPU kernel takes at most 63 buffers.
  small = [g.cast(dtypes.float32).reshape(-1) for g in gradients if g.numel() <= SMALL]
  squares = [g.cast(dtypes.float32).square().sum().reshape(1) for g in gradients if g.numel() > SMALL]
  squares += [small[i].cat(*small[i + 1:i + 32]).square().sum().reshape(1).contiguous() for i in range(0, len(small), 32)]
  while len(squares) > 1: squares = [squares[i].cat(*squares[i + 1:i + 32]).sum().reshape(1).contiguous() for i in range(0, len(squares), 32)]
  return squares[0].sqrt()


def _copy(tensor: Tensor) -> Tensor: return on_device(to_host(tensor), "CPU") if tensor.device == "CPU" else tensor.clone()
