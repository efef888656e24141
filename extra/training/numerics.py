"""Where numbers stop being finite."""
from collections.abc import Callable
from typing import Any
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.nn import layers

LAYERS = (layers.Conv2d, layers.Linear, layers.FrozenBatchNorm, layers.BatchNorm, layers.GroupNorm)


def first_not_finite(model: Any, losses: Callable[..., dict[str, Tensor]], *tensors: Tensor) -> str:
  """Run `losses(*tensors)` and its gradient layer by layer and say which weight, layer's output, loss or gradient is the first that is not finite.

  Slow, outside any captured graph, and the running statistics of batch norms move: for a run at its end. Layers are named by their weights' keys in
  `model`'s state dict."""
  params = get_state_dict(model)
  for key, t in params.items():
    if not _finite(t): return f"the weight {key} itself is not finite"
  names = {id(t): key.removesuffix(".weight") for key, t in params.items() if key.endswith(".weight")}
  found: list[str] = []

  def watched(call: Callable) -> Callable:
    def watch(layer: Any, *given: Any, **options: Any) -> Tensor:
      y = call(layer, *given, **options)
      if not found and not _finite(y): found.append(f"the output of {names[id(layer.weight)]} is the first that is not finite")
      return y
    return watch

  calls = {kind: kind.__call__ for kind in LAYERS}
  for kind, call in calls.items(): kind.__call__ = watched(call)
  try:
    with Context(TRAINING=1): losses(*tensors)
  finally:
    for kind, call in calls.items(): kind.__call__ = call
  if found: return found[0]
  learnt = {key: t for key, t in params.items() if t.is_param}
  # Anew, and the gradient before anything is looked at: what tinygrad has realised has none.
  with Context(TRAINING=1): scalars = losses(*tensors)
  gradients = dict(zip(learnt, scalars["loss"].gradient(*learnt.values())))
  for name, value in scalars.items():
    if not _finite(value): return f"all layers are finite, the loss {name} is the first that is not"
  for key, gradient in reversed(gradients.items()):   # from the loss on
    if not _finite(gradient): return f"all layers and losses are finite, the gradient of {key} is not"
  return "layers, losses and gradients are finite when computed again, one by one"


def _finite(tensor: Tensor) -> bool:
  # From memory: of an expression that folds to NaN at compile time, tinygrad says that it equals itself.
  return bool(tensor.contiguous().realize().isfinite().all().item())
