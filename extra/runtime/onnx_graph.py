"""A function of tensors as an ONNX graph, from the expression that tinygrad makes of it.

Any network comes out so, whatever it is written in. What has an operator of its own in ONNX (convolution, pooling, softmax, ...) is noted when it is
called, and is a leaf of the expression; the rest, reshapes and arithmetic, is translated operation by operation, and what does not depend on the
input is computed here and stored. The batch is traced with BATCH pictures, a size that nothing else has, and stays open in the graph."""
import contextlib, math, sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch
import numpy as np
from tinygrad import Context, Tensor, UOp, dtypes
from tinygrad.dtype import _to_np_dtype
from tinygrad.uop.ops import Ops
from tinydet.nn import conv, pool

BATCH = 4999   # a prime
OPSET = 17
UNARY = {Ops.SQRT: "Sqrt", Ops.RECIPROCAL: "Reciprocal", Ops.SIN: "Sin", Ops.NEG: "Neg"}
BINARY = {Ops.ADD: "Add", Ops.SUB: "Sub", Ops.MUL: "Mul", Ops.MAX: "Max", Ops.CMPLT: "Less", Ops.CMPEQ: "Equal", Ops.AND: "And", Ops.OR: "Or"}
REDUCE = {Ops.ADD: "ReduceSum", Ops.MAX: "ReduceMax", Ops.MUL: "ReduceProd"}
PASSED = (Ops.CONTIGUOUS, Ops.CONTIGUOUS_BACKWARD, Ops.DETACH)


class Graph:
  """ONNX nodes of a traced function; `inputs` are the tensors that it is a function of, by name."""
  def __init__(self, inputs: dict[str, Tensor]):
    import onnx
    self.helper, self.numpy_helper, self.types = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    self.nodes: list[Any] = []
    self.stored: dict[str, Any] = {}
    self.values: dict[UOp, str] = {}                            # what stands for each part of the expression
    self.noted: dict[UOp, tuple[str, list[Tensor], dict]] = {}   # the buffer that stands for an operator's result
    self.inputs = {_base(tensor.uop): name for name, tensor in inputs.items()}
    self.batch = next(iter(inputs))
    self.depends: dict[UOp, bool] = {}

  def note(self, operator: str, inputs: Sequence[Tensor], shape: Sequence[int], **attributes: Any) -> Tensor:
    """A tensor of `shape` that stands for the result of an ONNX operator."""
    result = Tensor.empty(*shape, dtype=inputs[0].dtype)
    self.noted[_base(result.uop)] = operator, list(inputs), attributes
    return result

  def store(self, array: np.ndarray) -> str:
    """The name of a constant."""
    array = np.ascontiguousarray(array)
    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in self.stored: self.stored[key] = f"c{len(self.stored)}"
    return self.stored[key]

  def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
    """Append a node of one output, and return that output's name."""
    self.nodes.append(self.helper.make_node(operator, list(inputs), [name := f"v{len(self.nodes)}"], **attributes))
    return name

  def moves(self, u: UOp) -> bool:
    """Whether a part of the expression depends on the input."""
    if u not in self.depends:
      for part in u.toposort():
        if part in self.depends: continue
        noted = self.noted.get(part)
        self.depends[part] = part in self.inputs or any(self.depends[s] for s in part.src) or (noted is not None and any(
          self.moves(t.uop) for t in noted[1]))
    return self.depends[u]

  def value(self, u: UOp) -> str:
    """The name of what stands for `u`, appending the nodes that it takes."""
    for part in u.toposort():   # sources first, so that nothing recurses deeply
      if part not in self.values and self.moves(part): self.values[part] = self._translate(part)
    return self.values[u] if self.moves(u) else self.constant(u)

  def constant(self, u: UOp) -> str:
    """The name of what does not depend on the input, computed now."""
    if u not in self.values:
      if u.op is Ops.CONST: array = np.array(u.arg, _numpy_type(u))
      else:
        if BATCH in u.shape and u.op is Ops.EXPAND: return self.constant(u.src[0])   # the same for all pictures
        if BATCH in u.shape: u = UOp.shrink(u, tuple((0, 1) if side == BATCH else None for side in u.shape)) if hasattr(u, "shrink") else u
        array = Tensor(u).numpy()
      self.values[u] = self.store(array.astype(np.float32) if array.dtype.kind == "f" else array)
    return self.values[u]

  def full(self, u: UOp) -> str:
    """As `value`, with the shape that it has: broadcasting is left to ONNX elsewhere."""
    if u.op is not Ops.EXPAND: return self.value(u)
    name = self.full(u.src[0])
    return self.node("Expand", [name, self.shape(u.shape)])

  def shape(self, sides: Sequence[int]) -> str:
    """A shape for Expand, whose first side may be the batch."""
    if BATCH not in sides: return self.store(np.array(sides, np.int64))
    batch = self.node("Slice", [self.node("Shape", [self.batch]), *(self.store(np.array([i], np.int64)) for i in (0, 1))])
    pieces = [batch if side == BATCH else self.store(np.array([side], np.int64)) for side in sides]
    return self.node("Concat", pieces, axis=0)

  def _translate(self, u: UOp) -> str:
    if u in self.inputs: return self.inputs[u]
    if u in self.noted:
      operator, tensors, attributes = self.noted[u]
      if operator == "Resize":   # each pixel twice
        return self.node("Resize", [self.full(tensors[0].uop), "", self.store(np.float32([1, 1, 2, 2]))], mode="nearest", nearest_mode="floor",
                         coordinate_transformation_mode="asymmetric")
      return self.node(operator, [self.full(t.uop) for t in tensors], **attributes)
    source = u.src[0]
    if u.op in PASSED: return self.value(source)
    if u.op is Ops.RESHAPE:
      if source in self.noted or source in self.inputs: return self.values[source]   # which have their own shape already
      sides = [-1 if side % BATCH == 0 and side else side for side in u.shape]
      return self.node("Reshape", [self.full(source), self.store(np.array(sides, np.int64))])
    if u.op is Ops.EXPAND: return self.value(source)   # see `full`
    if u.op is Ops.PERMUTE: return self.node("Transpose", [self.full(source)], perm=list(u.arg))
    if u.op is Ops.FLIP:
      axes = [axis for axis, turned in enumerate(u.arg) if turned]
      ends = [np.full(len(axes), n, np.int64) for n in (-1, -2 ** 62)]
      return self.node("Slice", [self.full(source), *map(self.store, ends), self.store(np.array(axes, np.int64)),
                                 self.store(np.full(len(axes), -1, np.int64))])
    if u.op is Ops.PAD:
      begin, sides = _numbers(u.src[1]), u.shape
      after = [new - old - low for new, old, low in zip(sides, source.shape, begin)]
      return self.node("Pad", [self.full(source), self.store(np.array([*begin, *after], np.int64))])
    if u.op is Ops.SHRINK:
      begin = _numbers(u.src[1])
      axes = [axis for axis, (new, old) in enumerate(zip(u.shape, source.shape)) if new != old]
      return self.node("Slice", [self.full(source), *(self.store(np.array(values, np.int64)) for values in (
        [begin[a] for a in axes], [begin[a] + u.shape[a] for a in axes], axes))])
    if u.op is Ops.STACK:
      first = self.store(np.array([0], np.int64))
      return self.node("Concat", [self.node("Unsqueeze", [self.full(s), first]) for s in u.src], axis=0)
    if u.op is Ops.REDUCE: return self._reduce(u)
    if u.op is Ops.CAST: return self._cast(u)
    return self._arithmetic(u)

  def _reduce(self, u: UOp) -> str:
    kind, count = u.arg
    return self.node(REDUCE[kind], [self.full(u.src[0]), *([self.store(np.arange(count, dtype=np.int64))] if kind is Ops.ADD else [])], keepdims=0,
                     **({} if kind is Ops.ADD else {"axes": list(range(count))}))

  def _cast(self, u: UOp) -> str:
    number = self.types.FLOAT if dtypes.is_float(u.dtype) else self.types.INT64
    return self.node("Cast", [self.value(u.src[0])], to={dtypes.bool: self.types.BOOL, dtypes.uint8: self.types.UINT8}.get(u.dtype, number))

  def _arithmetic(self, u: UOp) -> str:
    if u.op in UNARY: return self.node(UNARY[u.op], [self.value(u.src[0])])
    if u.op is Ops.EXP2: return self.node("Exp", [self.node("Mul", [self.value(u.src[0]), self.store(np.float32(math.log(2)))])])
    if u.op is Ops.LOG2: return self.node("Mul", [self.node("Log", [self.value(u.src[0])]), self.store(np.float32(1 / math.log(2)))])
    if u.op is Ops.WHERE: return self.node("Where", [self._as(s, u.dtype if i else None) for i, s in enumerate(u.src)])
    kinds = [s for s in u.src if self.moves(s)]   # a constant takes the type of what it meets
    operands = [self._as(s, kinds[0].dtype) for s in u.src]
    if u.op is Ops.CMPNE: return self.node("Not", [self.node("Equal", operands)])
    if u.op in BINARY: return self.node(BINARY[u.op], operands)
    raise NotImplementedError(f"{u.op} has no ONNX operator here")

  def _as(self, u: UOp, dtype: Any) -> str:
    """The name of `u`; of a constant, as a value of `dtype`."""
    if self.moves(u) or dtype is None: return self.value(u)
    array = Tensor(u).numpy() if u.op is not Ops.CONST else np.array(u.arg)
    return self.store(array.astype(np.float32 if dtypes.is_float(dtype) else np.bool_ if dtype is dtypes.bool else np.int64))


def to_onnx(function: Callable[[Tensor], dict[str, Tensor]], shape: tuple[int, int, int], dtype: Any,
            name: str = "images") -> tuple[Graph, dict[str, str]]:
  """Trace `function` of a batch of the `shape` (less the batch): the graph, and the names of its results in it."""
  images = Tensor.empty(BATCH, *shape, dtype=dtype)
  graph = Graph({name: images})
  with _operators(graph), Context(TRAINING=0): results = function(images)
  return graph, {key: graph.full(tensor.uop) for key, tensor in results.items()}


def model_of(graph: Graph, inputs: dict[str, tuple[Any, list]], outputs: dict[str, tuple[str, Any, list]], metadata: dict[str, str]) -> Any:
  """The ONNX model of a graph: `inputs` name -> (type, shape), `outputs` name -> (name in the graph, type, shape); a side may be a word."""
  helper = graph.helper
  nodes = [*graph.nodes, *(helper.make_node("Identity", [inner], [name]) for name, (inner, _, _) in outputs.items())]
  stored = [graph.numpy_helper.from_array(np.frombuffer(data, np.dtype(kind)).reshape(shape).copy(), name)
            for (kind, shape, data), name in graph.stored.items()]
  values = [[helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in group.items()]
            for group in (inputs, {name: (kind, shape) for name, (_, kind, shape) in outputs.items()})]
  model = helper.make_model(helper.make_graph(nodes, "detector", *values, stored), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
  helper.set_model_props(model, metadata)
  return model


def _base(u: UOp) -> UOp:
  """The buffer that a fresh tensor lies in."""
  while u.op is Ops.RESHAPE: u = u.src[0]
  return u


def _numbers(u: UOp) -> list[int]:
  """The whole numbers of an operation's argument."""
  return [int(s.arg) for s in u.src] if u.op is Ops.STACK else [int(u.arg)]


def _numpy_type(u: UOp) -> np.dtype:
  if dtypes.is_float(u.dtype): return np.dtype(np.float32)
  return np.dtype(np.bool_) if u.dtype is dtypes.bool else np.dtype(np.int64) if "weak" in str(u.dtype) else np.dtype(_to_np_dtype(u.dtype))


@contextlib.contextmanager
def _operators(graph: Graph) -> Iterator[None]:
  """Inside, what has an operator of its own in ONNX is noted in `graph`."""
  note = graph.note

  def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, groups: int = 1, dtype: Any = None,
             silu: bool = False) -> Tensor:
    kernel = weight.shape[2:]
    sides = [(side + 2 * padding - k) // stride + 1 for side, k in zip(x.shape[2:], kernel)]
    tensors = [x, weight, *([] if bias is None else [bias.reshape(-1)])]
    out = note("Conv", tensors, (x.shape[0], weight.shape[0], *sides), strides=[stride] * 2, pads=[padding] * 4, group=groups,
               kernel_shape=list(kernel))
    return out * sigmoid(out) if silu else out

  def max_pool2d(x: Tensor, kernel_size: Any = (2, 2), stride: Any = None, dilation: int = 1, padding: Any = 0, ceil_mode: bool = False,
                 return_indices: bool = False) -> Tensor:
    k = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
    s = k if stride is None else (stride,) * 2 if isinstance(stride, int) else tuple(stride)
    pads = (padding,) * 2 if isinstance(padding, int) else tuple(padding)
    left, right, top, bottom = pads if len(pads) == 4 else (pads[1], pads[1], pads[0], pads[0])
    sides = [(side + low + high - size) // step + 1 for side, low, high, size, step in zip(x.shape[2:], (top, left), (bottom, right), k, s)]
    return note("MaxPool", [x], (*x.shape[:2], *sides), kernel_shape=list(k), strides=list(s), pads=[top, left, bottom, right])

  def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    doubled = note("Resize", [x], (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
    return doubled.shrink((None, None, (0, size[0]), (0, size[1])))

  def sigmoid(x: Tensor) -> Tensor: return note("Sigmoid", [x], x.shape)
  def relu(x: Tensor) -> Tensor: return note("Relu", [x], x.shape)
  def softmax(x: Tensor, axis: int = -1, dtype: Any = None, **_: Any) -> Tensor: return note("Softmax", [x], x.shape, axis=axis % x.ndim)
  def cat(x: Tensor, *others: Tensor, dim: int = 0) -> Tensor:
    parts, axis = [x, *others], dim % x.ndim
    shape = [sum(p.shape[a] for p in parts) if a == axis else side for a, side in enumerate(x.shape)]
    return note("Concat", parts, shape, axis=axis) if any(graph.moves(p.uop) for p in parts) else kept["cat"](x, *others, dim=dim)
  def dot(x: Tensor, w: Tensor, dtype: Any = None) -> Tensor:
    if min(x.ndim, w.ndim) < 2 or not (graph.moves(x.uop) or graph.moves(w.uop)): return kept["dot"](x, w, dtype)
    return note("MatMul", [x, w], (*np.broadcast_shapes(x.shape[:-2], w.shape[:-2]), x.shape[-2], w.shape[-1]))

  methods = {"max_pool2d": max_pool2d, "sigmoid": sigmoid, "relu": relu, "softmax": softmax, "cat": cat, "dot": dot}
  kept = {name: getattr(Tensor, name) for name in methods}
  plain = lambda function, grad_fxn=None: function   # no gradient is asked for
  with contextlib.ExitStack() as stack:
    for name, method in methods.items(): stack.enter_context(patch.object(Tensor, name, method))
    for old, new in ((conv.conv2d, conv2d), (pool.upsample, upsample), (conv.function, plain)):
      for module in [m for n, m in sys.modules.items() if n.startswith("tinydet.")]:
        for name in [n for n, value in vars(module).items() if value is old]: stack.enter_context(patch.object(module, name, new))
    yield
