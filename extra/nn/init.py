"""Weight initialisation, drawn with numpy: the same values on every device, and no kernel to compile for any of them."""
import math, zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
import numpy as np
from tinygrad import Device, Tensor, UOp
from tinygrad.nn.state import get_state_dict
from tinydet.parts import take

_numpy = take("tinygrad.dtype:_to_np_dtype", "tinygrad.dtype:_from_np_dtype", "tinygrad:UOp.new_buffer",
              instead="weights are put on the device as they come, and cast there")
TOGETHER = 256   # tensors that get their values at a time
THREADS = 2      # that draw and copy them
LARGE = 1 << 16  # numbers whose copy is worth another thread
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def constant(value: float) -> Draw:
  """Every element is `value`."""
  return lambda rng, shape: np.full(shape, value)


def normal(std: float) -> Draw:
  """Normal with mean 0."""
  return lambda rng, shape: rng.standard_normal(shape) * std


def truncated_normal(std: float) -> Draw:
  """Normal with mean 0, drawn again where it is more than two deviations away (torch `trunc_normal_` with bounds at those)."""
  def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape)
    while (far := abs(values) > 2).any(): values[far] = rng.standard_normal(np.count_nonzero(far))
    return values * std
  return draw


def uniform(bound: float) -> Draw:
  """Uniform in [-bound, bound)."""
  return lambda rng, shape: rng.uniform(-bound, bound, shape)


def kaiming_normal_fan_out(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """He et al. 2015 for a convolution before a ReLU, scaled by its outputs (torch `kaiming_normal_(mode="fan_out")`)."""
  return rng.standard_normal(shape) * math.sqrt(2 / (shape[0] * math.prod(shape[2:])))


def kaiming_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Bound sqrt(3 / fan_in) (torch `kaiming_uniform_(a=1)`)."""
  return uniform(math.sqrt(3 / math.prod(shape[1:])))(rng, shape)


def normalization(key: str) -> Draw:
  """What a norm layer starts from: identity."""
  return constant(1.0 if key.endswith(("weight", "running_var")) else 0.0)


def initialize(model: object, rule: Callable[[str, tuple[int, ...]], Draw], seed: int = 0) -> None:
  """Fill every tensor of `model`'s state dict with what `rule(key, shape)` draws, each from a generator of its own (seed, key): adding a layer leaves
  the others as they were."""
  def draw(named: tuple[str, Tensor]) -> tuple[Tensor, np.ndarray]:
    key, tensor = named
    values = rule(key, tensor.shape)(np.random.default_rng((seed, zlib.crc32(key.encode()))), tensor.shape)
    return tensor, _typed(values, tensor)
  set_all(_ahead(draw, get_state_dict(model).items()))


def _ahead(function: Callable[[Any], Any], items: Iterable) -> Iterator:
  """`map`, computed by threads a few items ahead, which costs no more memory than those: numpy draws and copies beside Python."""
  with ThreadPoolExecutor(THREADS) as pool:
    waiting: deque[Future] = deque()
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > 2 * THREADS: yield waiting.popleft().result()
    while waiting: yield waiting.popleft().result()


def set_values(tensor: Tensor, values: np.ndarray) -> None:
  """Put host `values` of the same shape into `tensor`, which keeps its dtype and whether it is learnt."""
  set_all([(tensor, values)])


def set_all(pairs: Iterable[tuple[Tensor, np.ndarray]]) -> None:
  """`set_values` of many, `TOGETHER` at a time: whenever something is realised, tinygrad looks through all tensors there are."""
  waiting: list[Tensor] = []
  with ThreadPoolExecutor(THREADS) as pool:   # all is copied when it ends
    for tensor, values in pairs:
      values = _typed(values, tensor).reshape(-1)
      is_param = tensor.is_param
      # Flat, then shaped: from an array of no dimensions tinygrad makes a constant, which a captured graph cannot change.
      new = on_device(values, tensor.device or Device.DEFAULT, pool.submit if values.size > LARGE else None)
      waiting.append(tensor.replace((new if _numpy else new.cast(tensor.dtype)).reshape(tensor.shape)).is_param_(is_param))
      if len(waiting) == TOGETHER:
        Tensor.realize(*waiting)
        waiting.clear()
  if waiting: Tensor.realize(*waiting)


def _typed(values: np.ndarray, tensor: Tensor) -> np.ndarray:
  """`values` in the dtype of `tensor`, in one piece; as they are where that is so already."""
  return np.ascontiguousarray(values, _numpy[0](tensor.dtype) if _numpy else None)


def put(values: np.ndarray, device: str | tuple[str, ...]) -> Tensor:
  """A realised tensor of host `values` on `device`."""
  return on_device(values, device).realize()


def zeros(shapes: Iterable[tuple[int, ...]]) -> list[Tensor]:
  """Tensors of zeros, f32, on the default device."""
  if not _numpy or Device.DEFAULT != "CPU": return [Tensor(np.zeros(shape, np.float32)) for shape in shapes]
  tensors = []
  with ThreadPoolExecutor(THREADS) as pool:
    for shape in shapes:
      tensor, memory = _in_memory(shape, np.dtype(np.float32))
      pool.submit(memory.fill, 0)
      tensors.append(tensor)
  return tensors


def on_device(values: np.ndarray, device: str | tuple[str, ...], start: Callable[..., Any] | None = None) -> Tensor:
  """`values` on `device` once they are realised. On the CPU they are copied to its memory, by `start(function, to, from)` if that is given: tinygrad
  would schedule the copy, which takes several times as long as it."""
  if not _numpy or device != "CPU" or not values.size: return Tensor(values, device=device)
  tensor, memory = _in_memory(values.shape, values.dtype)
  if start: start(np.copyto, memory, values)
  else: np.copyto(memory, values)
  return tensor


def _in_memory(shape: tuple[int, ...], dtype: np.dtype) -> tuple[Tensor, np.ndarray]:
  """A tensor on the CPU of whatever was there, and its memory."""
  flat = UOp.new_buffer("CPU", math.prod(shape), _numpy[1](dtype))   # `Tensor.empty` takes four times as long
  memory = flat.buffer.ensure_allocated().as_memoryview(force_zero_copy=True)
  return Tensor(flat) if len(shape) == 1 else Tensor(flat).reshape(shape), np.frombuffer(memory, dtype).reshape(shape)
