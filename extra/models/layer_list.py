"""Networks as numbered lists of layers, as darknet's cfg files have them and YOLO's have since: the tensors of layer 3 are called `model.3. ...`."""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from tinygrad import Tensor
from tinydet.models.yolo_blocks import AnchorDetect, Detect, joined
from tinydet.nn.pool import max_pool_2x2, upsample

AUXILIARY = "auxiliary."   # how the names of layers for training alone begin


class Layer(NamedTuple):
  """One layer of a list: `make(in_channels)` gives it, `channels` are what it makes (None: all that it takes), `sources` the layers that it takes,
  -1 the one before, `PICTURE` what all begins with. Of several, both the maker and the layer get a list."""
  make: Callable[..., Callable]
  channels: int | None
  sources: tuple[int | None, ...] = (-1,)


def layer(block: Callable, channels: int, *args: Any, source: int | None = -1, **options: Any) -> Layer:
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


PICTURE = None   # as a source
UP, HALVED = Layer(lambda in_channels: Double(), None), Layer(lambda in_channels: Pool(), None)


class LayerList:
  """A picture's batch f32 [B,3,H,W], sides multiples of 32, through a list of layers, of which the last is the head -> its outputs. The first
  `backbone` layers are the backbone. The last is the `whole_head`, or gathers heads that stand among the neck's layers. `auxiliary` are layers for
  training alone, numbered from the last one on, which end in a head too."""
  def __init__(self, layers: Sequence[Layer], backbone: int, whole_head: bool = True, auxiliary: Sequence[Layer] = ()):
    self.ends = {"backbone": backbone, "pyramid": len(layers) - 1 if whole_head else backbone}   # layers before the end of each part
    self.whole_head = whole_head
    self.model: list[Callable] = []
    self.auxiliary: list[Callable] = []
    self.sources = [tuple(PICTURE if s is PICTURE or not i else s % i if s < 0 else s for s in entry.sources)
                    for i, entry in enumerate((*layers, *auxiliary))]
    channels: list[int] = []
    for i, (entry, sources) in enumerate(zip((*layers, *auxiliary), self.sources)):
      taken = [3 if s is PICTURE else channels[s] for s in sources]
      (self.model if i < len(layers) else self.auxiliary).append(entry.make(taken if len(taken) > 1 else taken[0]))
      channels.append(entry.channels or sum(taken))

  def __call__(self, x: Tensor) -> tuple[Tensor, ...]: return self.run(x, len(self.model))[len(self.model) - 1]

  def with_auxiliary(self, x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of the head, then those of the auxiliary one."""
    last = len(self.model) + len(self.auxiliary) - 1
    outputs = self.run(x, last + 1)
    return outputs[len(self.model) - 1] + outputs[last]

  def run(self, x: Tensor, end: int) -> dict[int, Any]:
    """The outputs of the layers before `end`, by number."""
    return self._run({}, 0, end, x)

  def taken(self, end: int) -> list[int]:
    """The numbers of the layers before `end` that layers from there on take."""
    return sorted({s for sources in self.sources[end:len(self.model)] for s in sources if s < end})

  def features(self, x: Tensor, layer: str = "backbone") -> list[Tensor]:
    """What the "backbone", or the "pyramid" behind it where the head is whole, hands on."""
    outputs = self.run(x, self.ends[layer])
    return [outputs[number] for number in self.taken(self.ends[layer])]

  def rest(self, features: Sequence[Tensor], layer: str = "backbone") -> tuple[Tensor, ...]:
    """The head's outputs from the `features` of `layer`."""
    end = self.ends[layer]
    return self._run(dict(zip(self.taken(end), features)), end, len(self.model), None)[len(self.model) - 1]

  @property
  def stages(self) -> list[Any]:
    """The backbone's five, from the picture on: a stage is the layers of a resolution."""
    stages: list[list] = [[] for _ in range(5)]
    outputs = self.run(Tensor.empty(1, 3, 128, 128), self.ends["backbone"])   # only shapes: nothing is computed
    for number, output in outputs.items(): stages[(128 // output.shape[2]).bit_length() - 2].append(self.model[number])
    return stages

  @property
  def parts(self) -> dict[str, tuple[str, ...]]:
    """How the names of tensors begin, from the last part to the first."""
    last, body = len(self.model) - 1, self.ends["backbone"]
    def names(first: int, end: int) -> tuple[str, ...]: return tuple(f"model.{number}." for number in range(first, end))
    beside = {"auxiliary": (AUXILIARY,)} if self.auxiliary else {}
    return beside | ({"head": names(last, last + 1)} if self.whole_head else {}) | {"neck": names(body, last), "backbone": names(0, body)}

  def _run(self, outputs: dict[int, Any], first: int, end: int, x: Tensor | None) -> dict[int, Any]:
    """The outputs of the layers from `first` to before `end`, beside those given."""
    for number in range(first, end):
      taken = [x if s is PICTURE else outputs[s] for s in self.sources[number]]
      module = self.model[number] if number < len(self.model) else self.auxiliary[number - len(self.model)]
      outputs[number] = module(taken if len(taken) > 1 else taken[0])
    return outputs

  @property
  def class_rows(self) -> dict[str, tuple[int, int]]:
    """The tensors with a row for each class: how many times they have all, and how many other rows come before the classes each time."""
    return head_rows({f"{part}.{number}": module for part in ("model", "auxiliary") for number, module in enumerate(getattr(self, part))})

  @property
  def class_branches(self) -> tuple[str, ...]:
    """How the names of tensors begin whose width may follow the number of classes."""
    beside = [f"{AUXILIARY}{len(self.auxiliary) - 1}.cv3."] if self.auxiliary else []
    return (*(f"model.{len(self.model) - 1}.{branch}." for branch in ("cv3", "one2one_cv3")), *beside)


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
