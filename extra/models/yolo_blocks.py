"""Blocks of the YOLO family's networks, with the `state_dict` keys of the families' own files.

All take x [B,`in_channels`,H,W] and give [B,`out_channels`,H,W], or half the sides where they have a stride of 2. `in_channels` comes first and
`out_channels` second in each, so that a network can be a list of blocks (see `tinydet.models.yolo`)."""
from collections.abc import Callable, Sequence
from tinygrad import Tensor
from tinydet.nn.layers import BatchNorm, Conv2d, normed, silu
from tinydet.nn.pool import max_pool, max_pool_same, mean_pool_2x2

Activation = Callable[[Tensor], Tensor]
HEAD_WIDTH = 32   # channels of an attention head in YOLOv12


def norm(channels: int) -> BatchNorm:
  """Batch norm as all but darknet's networks have it."""
  return BatchNorm(channels, eps=1e-3, momentum=0.03)


def through(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
  """`x` through `layers`, one after the other."""
  for layer in layers: x = layer(x)
  return x


def joined(*parts: Tensor) -> Tensor:
  """Tensors of the same pictures, channel after channel. Whole in memory, as it is read more than once on the way back."""
  return parts[0].cat(*parts[1:], dim=1).contiguous()


class Conv:
  """Convolution that keeps the picture's size (or divides it by `stride`), batch norm, activation (None: none). `bn` None: folded."""
  def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: Activation | None = silu,
               make_norm: Callable[[int], BatchNorm] = norm, padding: int | None = None):
    self.conv = Conv2d(in_channels, out_channels, kernel, stride, kernel // 2 if padding is None else padding, groups, bias=False)
    self.bn: BatchNorm | None = make_norm(out_channels)
    self.act = act

  def __call__(self, x: Tensor) -> Tensor:
    if self.bn is None and self.act is silu: return self.conv(x, silu=True)
    x = self.conv(x)
    if self.bn is not None: return normed(self.bn, x, self.act).contiguous()
    return (x if self.act is None else self.act(x)).contiguous()


def depthwise(channels: int, kernel: int = 3, stride: int = 1, act: Activation | None = silu) -> Conv:
  """A convolution of each channel alone."""
  return Conv(channels, channels, kernel, stride, channels, act)


class RepConv:
  """A 3x3 and a 1x1 convolution side by side, each with its norm, added up (Ding et al. 2021): YOLOv9's."""
  def __init__(self, in_channels: int, out_channels: int):
    self.conv1, self.conv2 = Conv(in_channels, out_channels, 3, act=None), Conv(in_channels, out_channels, 1, act=None)
    self.act: Activation = silu

  def branches(self) -> tuple: return (self.conv1.conv, self.conv1.bn), (self.conv2.conv, self.conv2.bn)

  def __call__(self, x: Tensor) -> Tensor: return self.act(self.conv1(x) + self.conv2(x)).contiguous()


class RepVGGDW:
  """A 7x7 and a 3x3 depthwise convolution, added up: YOLOv10's large kernel."""
  def __init__(self, channels: int):
    self.conv, self.conv1 = depthwise(channels, 7, act=None), depthwise(channels, 3, act=None)
    self.act: Activation = silu

  def branches(self) -> tuple: return (self.conv.conv, self.conv.bn), (self.conv1.conv, self.conv1.bn)

  def __call__(self, x: Tensor) -> Tensor: return self.act(self.conv(x) + self.conv1(x)).contiguous()


class Bottleneck:
  """Two convolutions, and the input added where `shortcut`. `expansion` is how wide it is between the two."""
  def __init__(self, in_channels: int, out_channels: int, shortcut: bool = True, kernels: tuple[int, int] = (3, 3), expansion: float = 0.5,
               first: Callable | None = None):
    hidden = int(out_channels * expansion)
    self.cv1 = (first or Conv)(in_channels, hidden, *([] if first else [kernels[0]]))
    self.cv2 = Conv(hidden, out_channels, kernels[1])
    self.add = shortcut and in_channels == out_channels

  def __call__(self, x: Tensor) -> Tensor:
    out = self.cv2(self.cv1(x))
    return (x + out).contiguous() if self.add else out


class C3:
  """Two halves, one of them through bottlenecks: CSP with three convolutions (YOLOv5; `kernels` (3, 3): C3k; `first` RepConv: YOLOv9's RepCSP)."""
  def __init__(self, in_channels: int, out_channels: int, repeats: int = 1, shortcut: bool = True, kernels: tuple[int, int] = (1, 3),
               first: Callable | None = None):
    hidden = out_channels // 2
    self.cv1, self.cv2, self.cv3 = Conv(in_channels, hidden), Conv(in_channels, hidden), Conv(2 * hidden, out_channels)
    self.m = [Bottleneck(hidden, hidden, shortcut, kernels, 1.0, first) for _ in range(repeats)]

  def __call__(self, x: Tensor) -> Tensor: return self.cv3(joined(through(self.m, self.cv1(x)), self.cv2(x)))


class C2f:
  """CSP whose bottlenecks' outputs are all kept: two halves, the last through `repeats` blocks, joined (YOLOv8). `make(channels)` is such a block."""
  def __init__(self, in_channels: int, out_channels: int, repeats: int = 1, shortcut: bool = False, expansion: float = 0.5,
               make: Callable[[int], Callable] | None = None):
    self.hidden = int(out_channels * expansion)
    self.cv1, self.cv2 = Conv(in_channels, 2 * self.hidden), Conv((2 + repeats) * self.hidden, out_channels)
    make = make or (lambda channels: Bottleneck(channels, channels, shortcut, expansion=1.0))
    self.m = [make(self.hidden) for _ in range(repeats)]

  def __call__(self, x: Tensor) -> Tensor:
    both = self.cv1(x)
    parts, last = [both], both[:, self.hidden:]
    for block in self.m: parts.append(last := through(block, last) if isinstance(block, list) else block(last))
    return self.cv2(joined(*parts))


def c3k(channels: int) -> C3:
  """YOLO11's C3k: C3 of two bottlenecks of 3x3 convolutions."""
  return C3(channels, channels, 2, kernels=(3, 3))


def c3k2(in_channels: int, out_channels: int, repeats: int, deep: bool, expansion: float = 0.5, attention: bool = False) -> C2f:
  """YOLO11's C2f: of bottlenecks, or of `c3k` where `deep`, or (YOLO26's last) of a bottleneck and an attention each."""
  def make(channels: int) -> object:
    if attention: return [Bottleneck(channels, channels), PSABlock(channels, max(channels // 64, 1))]
    return c3k(channels) if deep else Bottleneck(channels, channels)
  return C2f(in_channels, out_channels, repeats, expansion=expansion, make=make)


class CIB:
  """YOLOv10's compact inverted block: depthwise, to twice the channels, depthwise (7x7 where `large`), back, depthwise; added to the input."""
  def __init__(self, channels: int, shortcut: bool, large: bool):
    self.cv1 = [depthwise(channels), Conv(channels, 2 * channels), RepVGGDW(2 * channels) if large else depthwise(2 * channels),
                Conv(2 * channels, channels), depthwise(channels)]
    self.add = shortcut

  def __call__(self, x: Tensor) -> Tensor:
    out = through(self.cv1, x)
    return (x + out).contiguous() if self.add else out


def c2f_cib(in_channels: int, out_channels: int, repeats: int, shortcut: bool = True, large: bool = False) -> C2f:
  """C2f of `CIB`s."""
  return C2f(in_channels, out_channels, repeats, make=lambda channels: CIB(channels, shortcut, large))


class SCDown:
  """YOLOv10's half-size step: 1x1 to the channels, then depthwise."""
  def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 2):
    self.cv1, self.cv2 = Conv(in_channels, out_channels), depthwise(out_channels, kernel, stride, act=None)

  def __call__(self, x: Tensor) -> Tensor: return self.cv2(self.cv1(x))


class SPPF:
  """The picture at four scales: three 5x5 max pools in a row (Jocher 2021). `plain`: YOLO26's, without a first activation and with a shortcut."""
  def __init__(self, in_channels: int, out_channels: int, plain: bool = False):
    self.cv1 = Conv(in_channels, in_channels // 2, act=None if plain else silu)
    self.cv2 = Conv(in_channels // 2 * 4, out_channels)
    self.add = plain and in_channels == out_channels

  def __call__(self, x: Tensor) -> Tensor:
    out = self.cv2(joined(*pyramid(self.cv1(x))))
    return (x + out).contiguous() if self.add else out


def pyramid(x: Tensor) -> list[Tensor]:
  """`x`, and its 5x5, 9x9 and 13x13 max pools: a 9x9 window is a 5x5 window of 5x5 windows."""
  scales = [x]
  for _ in range(3): scales.append(max_pool_same(scales[-1], 5))
  return scales


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
  """Scaled dot-product attention over pixels: q, k [B,heads,D,N] and v [B,heads,E,N] -> [B,heads,E,N]. The softmax is in float32."""
  weights = ((q.transpose(2, 3) @ k).float() * q.shape[2] ** -0.5).contiguous().softmax(-1).cast(v.dtype)
  return v @ weights.contiguous().transpose(2, 3)


class Attention:
  """Self-attention over all pixels with a depthwise 3x3 as positional code (YOLOv10, 11, 26): keys are half as wide as values."""
  def __init__(self, channels: int, heads: int):
    self.heads, self.wide = heads, channels // heads
    self.narrow = self.wide // 2
    self.qkv = Conv(channels, channels + 2 * self.narrow * heads, act=None)
    self.proj, self.pe = Conv(channels, channels, act=None), depthwise(channels, act=None)

  def __call__(self, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    q, k, v = self.qkv(x).reshape(batch, self.heads, 2 * self.narrow + self.wide, height * width).split([self.narrow, self.narrow, self.wide], 2)
    return self.proj((attend(q, k, v).reshape(x.shape) + self.pe(v.reshape(x.shape).contiguous())).contiguous())


class PSABlock:
  """Attention, then two 1x1 convolutions, each added to its input."""
  def __init__(self, channels: int, heads: int):
    self.attn, self.ffn = Attention(channels, heads), [Conv(channels, 2 * channels), Conv(2 * channels, channels, act=None)]

  def __call__(self, x: Tensor) -> Tensor:
    x = (x + self.attn(x)).contiguous()
    return (x + through(self.ffn, x)).contiguous()


class C2PSA:
  """Two halves, one through `repeats` `PSABlock`s (YOLO11)."""
  def __init__(self, in_channels: int, out_channels: int, repeats: int):
    self.hidden = out_channels // 2
    self.cv1, self.cv2 = Conv(in_channels, 2 * self.hidden), Conv(2 * self.hidden, out_channels)
    self.m = [PSABlock(self.hidden, self.hidden // 64) for _ in range(repeats)]

  def __call__(self, x: Tensor) -> Tensor:
    both = self.cv1(x)
    return self.cv2(joined(both[:, :self.hidden], through(self.m, both[:, self.hidden:])))


class PSA(PSABlock):
  """Two halves, one through a `PSABlock` whose layers are the block's own (YOLOv10)."""
  def __init__(self, in_channels: int, out_channels: int):
    self.hidden = out_channels // 2
    super().__init__(self.hidden, self.hidden // 64)
    self.cv1, self.cv2 = Conv(in_channels, 2 * self.hidden), Conv(2 * self.hidden, out_channels)

  def __call__(self, x: Tensor) -> Tensor:
    both = self.cv1(x)
    return self.cv2(joined(both[:, :self.hidden], super().__call__(both[:, self.hidden:])))


class AreaAttention:
  """Self-attention inside each of `areas` equal bands of rows, with a depthwise 7x7 as positional code (Tian et al. 2025, YOLOv12)."""
  def __init__(self, channels: int, areas: int):
    self.heads, self.areas = channels // HEAD_WIDTH, areas
    self.qkv, self.proj = Conv(channels, 3 * channels, act=None), Conv(channels, channels, act=None)
    self.pe = depthwise(channels, 7, act=None)

  def __call__(self, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    # an area's pixels are neighbours in memory: areas become heads
    qkv = self.qkv(x).reshape(batch, self.heads, 3, HEAD_WIDTH, self.areas, height * width // self.areas).permute(2, 0, 1, 4, 3, 5)
    q, k, v = (part.reshape(batch, self.heads * self.areas, HEAD_WIDTH, -1) for part in qkv.contiguous())
    def picture(y: Tensor) -> Tensor:
      return y.reshape(batch, self.heads, self.areas, HEAD_WIDTH, -1).permute(0, 1, 3, 2, 4).reshape(x.shape).contiguous()
    return self.proj((picture(attend(q, k, v)) + self.pe(picture(v))).contiguous())


class ABlock:
  """Area attention, then two 1x1 convolutions, each added to its input."""
  def __init__(self, channels: int, mlp_ratio: float, areas: int):
    hidden = int(channels * mlp_ratio)
    self.attn, self.mlp = AreaAttention(channels, areas), [Conv(channels, hidden), Conv(hidden, channels, act=None)]

  def __call__(self, x: Tensor) -> Tensor:
    x = (x + self.attn(x)).contiguous()
    return (x + through(self.mlp, x)).contiguous()


class A2C2f:
  """YOLOv12's R-ELAN: blocks of two `ABlock`s (`areas` 0: of one `c3k`), all outputs joined; where `residual`, times gamma [C] and added to x."""
  def __init__(self, in_channels: int, out_channels: int, repeats: int, areas: int, residual: bool = False, mlp_ratio: float = 2.0):
    hidden = out_channels // 2
    self.cv1, self.cv2 = Conv(in_channels, hidden), Conv((1 + repeats) * hidden, out_channels)
    if residual and areas: self.gamma = Tensor.empty(out_channels)
    self.m = [[ABlock(hidden, mlp_ratio, areas) for _ in range(2)] if areas else c3k(hidden) for _ in range(repeats)]

  def __call__(self, x: Tensor) -> Tensor:
    parts = [self.cv1(x)]
    for block in self.m: parts.append(through(block, parts[-1]) if isinstance(block, list) else block(parts[-1]))
    out = self.cv2(joined(*parts))
    return (x + self.gamma.reshape(1, -1, 1, 1) * out).cast(x.dtype).contiguous() if hasattr(self, "gamma") else out


class ELAN:
  """Two halves, the last through two steps, all joined (YOLOv9): `inner` is the first convolution's width, `step` a step's. A step is a 3x3
  convolution, or with `repeats` C3 of that many RepConv bottlenecks and a 3x3 convolution (RepNCSPELAN4; without: ELAN1)."""
  def __init__(self, in_channels: int, out_channels: int, inner: int, step: int, repeats: int = 0):
    def one(channels: int) -> object:
      return [C3(channels, step, repeats, kernels=(3, 3), first=RepConv), Conv(step, step, 3)] if repeats else Conv(channels, step, 3)
    self.half = inner // 2
    self.cv1, self.cv2, self.cv3, self.cv4 = Conv(in_channels, inner), one(self.half), one(step), Conv(inner + 2 * step, out_channels)

  def __call__(self, x: Tensor) -> Tensor:
    both = self.cv1(x)
    parts = [both, both[:, self.half:]]
    for step in (self.cv2, self.cv3): parts.append(through(step if isinstance(step, list) else [step], parts[-1]))
    return self.cv4(joined(both, *parts[2:]))


class SPPELAN:
  """YOLOv9's `SPPF`, of any width inside."""
  def __init__(self, in_channels: int, out_channels: int, hidden: int):
    self.cv1, self.cv5 = Conv(in_channels, hidden), Conv(4 * hidden, out_channels)

  def __call__(self, x: Tensor) -> Tensor: return self.cv5(joined(*pyramid(self.cv1(x))))


class AConv:
  """Half size by a mean of neighbours and a 3x3 convolution (YOLOv9)."""
  def __init__(self, in_channels: int, out_channels: int): self.cv1 = Conv(in_channels, out_channels, 3, 2)

  def __call__(self, x: Tensor) -> Tensor: return self.cv1(mean_pool_2x2(x))


class ADown:
  """Half size (YOLOv9): means of neighbours, of which one half of the channels goes through a 3x3 convolution, the other through a max pool."""
  def __init__(self, in_channels: int, out_channels: int):
    self.cv1, self.cv2 = Conv(in_channels // 2, out_channels // 2, 3, 2), Conv(in_channels // 2, out_channels // 2)

  def __call__(self, x: Tensor) -> Tensor:
    first, second = mean_pool_2x2(x).chunk(2, 1)
    return joined(self.cv1(first), self.cv2(max_pool(second.contiguous())))


class Split:
  """Groups of `widths` channels by one 1x1 convolution (YOLOv9's CBLinear)."""
  def __init__(self, in_channels: int, widths: tuple[int, ...]):
    self.conv, self.widths = Conv2d(in_channels, sum(widths), 1), list(widths)

  def __call__(self, x: Tensor) -> tuple[Tensor, ...]: return self.conv(x).split(self.widths, dim=1)


class Fuse:
  """The last of its inputs, and of each `Split` before it group number `group`, enlarged to that one's size, added up (YOLOv9's CBFuse)."""
  def __init__(self, group: int): self.group = group

  def __call__(self, parts: Sequence) -> Tensor:
    batch, channels, height, width = parts[-1].shape
    def enlarged(x: Tensor) -> Tensor:
      by = height // x.shape[2]
      return x.reshape(batch, channels, height // by, 1, width // by, 1).expand(batch, channels, height // by, by, width // by, by).reshape(
        parts[-1].shape)
    return sum((enlarged(part[self.group]) for part in parts[:-1]), parts[-1]).contiguous()


class SPPCSPC:
  """YOLOv7's `SPPF` inside CSP."""
  def __init__(self, in_channels: int, out_channels: int):
    c = out_channels
    self.cv1, self.cv2, self.cv3, self.cv4 = Conv(in_channels, c), Conv(in_channels, c), Conv(c, c, 3), Conv(c, c)
    self.cv5, self.cv6, self.cv7 = Conv(4 * c, c), Conv(c, c, 3), Conv(2 * c, c)

  def __call__(self, x: Tensor) -> Tensor:
    deep = self.cv6(self.cv5(joined(*pyramid(through([self.cv1, self.cv3, self.cv4], x)))))
    return self.cv7(joined(deep, self.cv2(x)))


class RepConvN:
  """YOLOv7's `RepConv`, whose branches are lists."""
  def __init__(self, in_channels: int, out_channels: int):
    self.rbr_dense, self.rbr_1x1 = ([Conv2d(in_channels, out_channels, k, padding=k // 2, bias=False), norm(out_channels)] for k in (3, 1))
    self.act: Activation = silu

  def branches(self) -> tuple: return tuple(self.rbr_dense), tuple(self.rbr_1x1)

  def __call__(self, x: Tensor) -> Tensor: return self.act(through(self.rbr_dense, x) + through(self.rbr_1x1, x)).contiguous()


class DFL:
  """Keeps the files' constant 0..15, with which a distribution's mean is taken; `tinydet.detection.yolo` needs no parameter for it."""
  def __init__(self, bins: int):
    self.conv = Conv2d(bins, 1, 1, bias=False)
    self.conv.weight.is_param_(False)


class Detect:
  """The anchor-free head over three levels: [B,C_l,h,w] each -> (box [B,4 bins,N], class logits [B,K,N]), float32, levels one after the other.

  `light`: depthwise and 1x1 convolutions in the class branch (YOLOv10 on); `end2end`: a second head of the same kind, whose outputs follow, which
  learns to give one box an object, and sees features whose gradient is not its own. `bins` 1 has no distribution (YOLO26)."""
  def __init__(self, in_channels: Sequence[int], num_classes: int, bins: int = 16, light: bool = False, end2end: bool = False):
    self.num_classes, self.bins = num_classes, bins
    box, classes = max(16, in_channels[0] // 4, 4 * bins), max(in_channels[0], min(num_classes, 100))
    def box_branch(c: int) -> list: return [Conv(c, box, 3), Conv(box, box, 3), Conv2d(box, 4 * bins, 1)]
    def class_branch(c: int) -> list:
      if not light: return [Conv(c, classes, 3), Conv(classes, classes, 3), Conv2d(classes, num_classes, 1)]
      return [[depthwise(c), Conv(c, classes)], [depthwise(classes), Conv(classes, classes)], Conv2d(classes, num_classes, 1)]
    self.cv2, self.cv3 = [box_branch(c) for c in in_channels], [class_branch(c) for c in in_channels]
    if end2end: self.one2one_cv2, self.one2one_cv3 = [box_branch(c) for c in in_channels], [class_branch(c) for c in in_channels]
    if bins > 1: self.dfl = DFL(bins)

  def __call__(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = (branch_outputs(self.cv2, levels), branch_outputs(self.cv3, levels))
    if not hasattr(self, "one2one_cv2"): return outputs
    apart = [x.detach() for x in levels]
    return *outputs, branch_outputs(self.one2one_cv2, apart), branch_outputs(self.one2one_cv3, apart)


def branch_outputs(branches: Sequence[Sequence], levels: Sequence[Tensor]) -> Tensor:
  """f32 [B,C,N] of each level through its branch, levels one after the other, each row by row."""
  outputs = []
  for branch, x in zip(branches, levels):
    for layer in branch: x = through(layer, x) if isinstance(layer, list) else layer(x)
    outputs.append(x.float().contiguous().flatten(2))
  return outputs[0].cat(*outputs[1:], dim=2).contiguous()


class AnchorDetect:
  """The anchor-based head (YOLOv5 classic, v7): levels [B,C_l,h,w] -> of each [B,3*(5+K),h,w], channels anchor by anchor: x, y, w, h, objectness,
  class logits; float32. `anchors` [3,3,2] are in cells of the level; `grid`: with `anchor_grid` in pixels beside them, as YOLOv7's files have it."""
  def __init__(self, in_channels: Sequence[int], num_classes: int, grid: bool):
    self.num_classes = num_classes
    self.m = [Conv2d(c, 3 * (5 + num_classes), 1) for c in in_channels]
    self.anchors = Tensor.empty(len(in_channels), 3, 2).is_param_(False)
    if grid: self.anchor_grid = Tensor.empty(len(in_channels), 1, 3, 1, 1, 2).is_param_(False)

  def __call__(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]: return tuple(conv(x).float().contiguous() for conv, x in zip(self.m, levels))
