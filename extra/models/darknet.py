"""YOLOv3 (Redmon & Farhadi 2018) and YOLOv4 (Bochkovskiy et al. 2020) with their small kin: darknet's networks, layers in the order of its cfg files.

Outputs are [B,3*(5+K),h,w] float32 of each level, the finest first; channels anchor by anchor: x, y, w, h, objectness, class logits.
`tensors_in_order` is what a `.weights` file holds one after the other."""
import functools
from collections.abc import Callable, Sequence
from tinygrad import Tensor
from tinydet.models.layer_list import HALVED, UP, Join, Layer, LayerList, Pool, cat, layer
from tinydet.models.yolo_blocks import Activation, Conv, joined, pyramid
from tinydet.nn.layers import BatchNorm, Conv2d, leaky_relu, mish


class Add:
  """Two tensors' sum."""
  def __call__(self, parts: Sequence[Tensor]) -> Tensor: return (parts[0] + parts[1]).contiguous()


class Half:
  """The second half of the channels."""
  def __call__(self, x: Tensor) -> Tensor: return x[:, x.shape[1] // 2:].contiguous()


class Scales:
  """The 13x13, 9x9 and 5x5 max pools of x and x itself, joined (SPP)."""
  def __call__(self, x: Tensor) -> Tensor: return joined(*pyramid(x)[::-1])


class Output:
  """A level's last convolution, of which nothing but the result in float32 follows."""
  anchored = True   # its rows are three anchors' x, y, w, h, objectness, classes
  def __init__(self, in_channels: int, out_channels: int): self.conv = Conv2d(in_channels, out_channels, 1)
  def __call__(self, x: Tensor) -> Tensor: return self.conv(x).float().contiguous()


SPP = Layer(lambda c: Scales(), 4 * 512)


def _conv(channels: int, kernel: int = 1, stride: int = 1, act: Activation = leaky_relu, source: int = -1) -> Layer:
  return layer(Conv, channels, kernel, stride, act=act, make_norm=lambda c: BatchNorm(c, 1e-5, 0.03), source=source)


def _residual(hidden: int, channels: int, times: int, act: Activation = leaky_relu) -> list[Layer]:
  """1x1 to `hidden`, 3x3 back to `channels`, added to the input, again and again."""
  return [_conv(hidden, act=act), _conv(channels, 3, act=act), Layer(lambda c: Add(), channels, (-1, -3))] * times


def _pairs(channels: int, times: int) -> list[Layer]:
  """1x1 to `channels`, 3x3 to twice as many, again and again."""
  return [_conv(channels), _conv(2 * channels, 3)] * times


class Outputs:
  """The levels that a network returns."""
  def __call__(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]: return tuple(levels)


def _result(*sources: int) -> Layer: return Layer(lambda c: Outputs(), None, sources)
def _output(num_classes: int) -> Layer: return layer(Output, 3 * (5 + num_classes))


def _v3(num_classes: int, spp: bool = False) -> list[Layer]:
  layers, stages, results = [_conv(32, 3)], [], []
  for channels, times in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
    layers += [_conv(channels, 3, 2), *_residual(channels // 2, channels, times)]
    stages.append(len(layers) - 1)
  for width, stage in ((512, None), (256, 3), (128, 2)):
    if stage: layers += [_conv(width, source=-3), UP, cat(stages[stage])]
    layers += [*_pairs(width, 1), _conv(width), SPP, *_pairs(width, 1), _conv(width)] if spp and not stage else [*_pairs(width, 2), _conv(width)]
    layers += [_conv(2 * width, 3), _output(num_classes)]
    results.append(len(layers) - 1)
  return [*layers, _result(*results[::-1])]


def _v3_tiny(num_classes: int) -> list[Layer]:
  return [_conv(16, 3), HALVED, _conv(32, 3), HALVED, _conv(64, 3), HALVED, _conv(128, 3), HALVED, _conv(256, 3), HALVED, _conv(512, 3),
          Layer(lambda c: Pool(1), None), _conv(1024, 3), _conv(256), _conv(512, 3), _output(num_classes),                          # 11
          _conv(128, source=13), UP, cat(8), _conv(256, 3), _output(num_classes), _result(20, 15)]                                  # 16


def _v4(num_classes: int) -> list[Layer]:
  conv = functools.partial(_conv, act=mish)
  layers, stages = [conv(32, 3)], []
  for channels, times in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
    half = max(64, channels // 2)   # the first stage does not halve
    layers += [conv(channels, 3, 2), conv(half), conv(half, source=-2), *_residual(channels // 2, half, times, mish), conv(half),
               cat(-3 * times - 3), conv(channels)]
    stages.append(len(layers) - 1)
  layers += [*_pairs(512, 1), _conv(512), SPP, *_pairs(512, 1), _conv(512)]
  levels = [len(layers) - 1]
  for width, stage in ((256, 3), (128, 2)):
    # the finer level comes first
    layers += [_conv(width), UP, _conv(width, source=stages[stage]), cat(-2), *_pairs(width, 2), _conv(width)]
    levels.append(len(layers) - 1)
  layers += [_conv(256, 3), _output(num_classes)]
  results = [len(layers) - 1]
  for width, level in ((256, 1), (512, 0)):
    layers += [_conv(width, 3, 2, source=-3), cat(levels[level]), *_pairs(width, 2), _conv(width), _conv(2 * width, 3), _output(num_classes)]
    results.append(len(layers) - 1)
  return [*layers, _result(*results)]


def _v4_tiny(num_classes: int) -> list[Layer]:
  layers = [_conv(32, 3, 2), _conv(64, 3, 2)]
  for c in (64, 128, 256):
    layers += [_conv(c, 3), Layer(lambda c: Half(), c // 2), _conv(c // 2, 3), _conv(c // 2, 3), cat(-2), _conv(c),
               Layer(lambda c: Join(), None, (-6, -1)), HALVED]
  fine = len(layers) - 3
  layers += [_conv(512, 3), _conv(256), _conv(512, 3), _output(num_classes)]
  coarse = len(layers) - 1
  layers += [_conv(128, source=coarse - 2), UP, cat(fine), _conv(256, 3), _output(num_classes)]
  return [*layers, _result(len(layers) - 1, coarse)]


NETWORKS: dict[str, Callable[[int], list[Layer]]] = {
  "yolov3": _v3, "yolov3-spp": functools.partial(_v3, spp=True), "yolov3-tiny": _v3_tiny, "yolov4": _v4, "yolov4-tiny": _v4_tiny}


def tensors_in_order(network: LayerList) -> list[tuple[str, Tensor]]:
  """(key, tensor) in the order of a `.weights` file: of each convolution its norm's bias, weight, mean and variance, or its own bias, then weight."""
  tensors: list[tuple[str, Tensor]] = []
  for number, module in enumerate(network.model):
    if isinstance(module, Conv) and module.bn is not None:
      tensors += [(f"model.{number}.bn.{part}", getattr(module.bn, part)) for part in ("bias", "weight", "running_mean", "running_var")]
    if isinstance(module, Output): tensors.append((f"model.{number}.conv.bias", module.conv.bias))
    if isinstance(module, Conv | Output): tensors.append((f"model.{number}.conv.weight", module.conv.weight))
  return tensors
