"""Networks as numbered lists of layers, as darknet's cfg files have them and YOLO's have since: the tensors of layer 3 are called `model.3. ...`."""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from tinygrad import Tensor
from tinydet.models.yolo_blocks import joined
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
  """A picture's batch f32 [B,3,H,W], sides multiples of 32, through a list of layers, of which the last is the head -> its outputs."""
  def __init__(self, layers: Sequence[Layer]):
    self.model: list[Callable] = []
    self.sources = [tuple(s % i if s < 0 and i else s for s in entry.sources) for i, entry in enumerate(layers)]
    channels: list[int] = []
    for entry, sources in zip(layers, self.sources):
      taken = [channels[s] if channels else 3 for s in sources]
      self.model.append(entry.make(taken if len(taken) > 1 else taken[0]))
      channels.append(entry.channels or sum(taken))

  def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
    outputs: list[Any] = []
    for module, sources in zip(self.model, self.sources):
      taken = [outputs[s] for s in sources] if outputs else [x]
      outputs.append(module(taken if len(taken) > 1 else taken[0]))
    return outputs[-1]
