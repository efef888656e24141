"""Networks as numbered lists of layers, as darknet's cfg files have them and YOLO's have since: the tensors of layer 3 are called `model.3. ...`."""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from tinygrad import Tensor
from tinydet.models.yolo_blocks import AnchorDetect, Detect, joined
from tinydet.nn.pool import max_pool_2x2, upsample


class Layer(NamedTuple):
  """One layer of a list: `make(in_channels)` gives it, `channels` are what it makes (None: all that it takes), `sources` the layers that it takes,
  -1 the one before. Of several, both the maker and the layer get a list."""
  make: Callable[..., Callable]
  channels: int | None
  sources: tuple[int, ...] = (-1,)


def layer(block: Callable, channels: int, *args: Any, source: int = -1, **options: Any) -> Layer:
  """`block(in_channels, channels, *args)` on layer `source`."""
  return Layer(lambda in_channels: block(in_channels, channels, *args, **options), channels, (source,))


def cat(*sources: int) -> Layer:
  """The channels of the layer before, then of `sources`."""
  return Layer(lambda in_channels: Join(), None, (-1, *sources))


class Join:
  """Several tensors, channel after channel."""
  def __call__(self, parts: Sequence[Tensor]) -> Tensor: return joined(*parts)


class Double:
  """Each pixel twice along both sides."""
  def __call__(self, x: Tensor) -> Tensor: return upsample(x, (2 * x.shape[2], 2 * x.shape[3])).contiguous()


class Pool:
  """The largest of 2x2 pixels, one step of `stride` further each."""
  def __init__(self, stride: int = 2): self.stride = stride
  def __call__(self, x: Tensor) -> Tensor: return max_pool_2x2(x, self.stride)


UP, HALVED = Layer(lambda in_channels: Double(), None), Layer(lambda in_channels: Pool(), None)


class LayerList:
  """A picture's batch f32 [B,3,H,W], sides multiples of 32, through a list of layers, of which the last is the head -> its outputs. The first
  `backbone` layers are the backbone."""
  def __init__(self, layers: Sequence[Layer], backbone: int):
    self.backbone = backbone
    self.model: list[Callable] = []
    self.sources = [tuple(s % i if s < 0 and i else s for s in entry.sources) for i, entry in enumerate(layers)]
    channels: list[int] = []
    for entry, sources in zip(layers, self.sources):
      taken = [channels[s] if channels else 3 for s in sources]
      self.model.append(entry.make(taken if len(taken) > 1 else taken[0]))
      channels.append(entry.channels or sum(taken))

  def __call__(self, x: Tensor) -> tuple[Tensor, ...]: return self.run(x, len(self.model))[len(self.model) - 1]

  def run(self, x: Tensor, end: int) -> dict[int, Any]:
    """The outputs of the layers before `end`, by number."""
    return self._run({}, 0, end, x)

  def taken(self, end: int) -> list[int]:
    """The numbers of the layers before `end` that layers from there on take."""
    return sorted({s for sources in self.sources[end:] for s in sources if s < end})

  def features(self, x: Tensor, end: int) -> list[Tensor]:
    """The outputs of `taken(end)`."""
    outputs = self.run(x, end)
    return [outputs[number] for number in self.taken(end)]

  def rest(self, features: Sequence[Tensor], end: int) -> tuple[Tensor, ...]:
    """What the layers from `end` on make of `features`."""
    return self._run(dict(zip(self.taken(end), features)), end, len(self.model), None)[len(self.model) - 1]

  def _run(self, outputs: dict[int, Any], first: int, end: int, x: Tensor | None) -> dict[int, Any]:
    """The outputs of the layers from `first` to before `end`, beside those given."""
    for number in range(first, end):
      taken = [outputs[s] for s in self.sources[number]] if number else [x]
      outputs[number] = self.model[number](taken if len(taken) > 1 else taken[0])
    return outputs

  @property
  def class_rows(self) -> dict[str, tuple[int, int]]:
    """The tensors with a row for each class: how many times they have all, and how many other rows come before the classes each time."""
    return head_rows({f"model.{number}": module for number, module in enumerate(self.model)})

  @property
  def class_branches(self) -> tuple[str, ...]:
    """How the names of tensors begin whose width may follow the number of classes."""
    return tuple(f"model.{len(self.model) - 1}.{branch}." for branch in ("cv3", "one2one_cv3"))


def head_rows(modules: dict[str, Any]) -> dict[str, tuple[int, int]]:
  """`class_rows` of the heads among `modules`, by the beginnings of their tensors' names."""
  rows: dict[str, tuple[int, int]] = {}
  for name, module in modules.items():
    if isinstance(module, Detect):
      places = [f"{name}.{branch}.{i}.2" for branch in ("cv3", "one2one_cv3") for i in range(len(getattr(module, branch, ())))]
      rows |= {f"{place}.{part}": (1, 0) for place in places for part in ("weight", "bias")}
    if isinstance(module, AnchorDetect): rows |= {f"{name}.m.{i}.{part}": (3, 5) for i in range(len(module.m)) for part in ("weight", "bias")}
    if getattr(module, "anchored", False): rows |= {f"{name}.conv.{part}": (3, 5) for part in ("weight", "bias")}
  return rows
