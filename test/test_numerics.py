"""The first layer whose numbers are not finite is named."""
import math
import numpy as np, pytest
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.nn import init
from tinydet.nn.layers import BatchNorm, Conv2d
from tinydet.training.numerics import first_not_finite


class Net:
  def __init__(self): self.layers = [Conv2d(1, 2, 1), BatchNorm(2), Conv2d(2, 2, 1)]
  def __call__(self, x): return x.sequential(self.layers)


@pytest.mark.parametrize(("key", "value", "loss", "words"), [
  (None, 0, lambda y: y.sum(), "are finite when computed again"),
  ("layers.2.bias", math.nan, lambda y: y.sum(), "the weight layers.2.bias itself is not finite"),
  ("layers.0.weight", 3e38, lambda y: y.sum(), "the output of layers.0 is the first that is not finite"),
  ("layers.1.weight", 3e38, lambda y: y.sum(), "the output of layers.2 is the first that is not finite"),
  ("layers.2.weight", 3e38, lambda y: y.sum(), "the output of layers.2 is the first that is not finite"),
  (None, 0, lambda y: y.sum() * math.inf, "the loss loss is the first that is not"),
  # d sqrt(x) / dx at 0
  (None, 0, lambda y: (y * 0).sum().sqrt(), "losses are finite, the gradient of layers.2.")])
def test_the_first_is_named(key, value, loss, words):
  model = Net()
  init.initialize(model, lambda name, shape: init.constant(0 if name.endswith("running_mean") else 1))
  tensors = get_state_dict(model)
  if key: init.set_values(tensors[key], np.full(tensors[key].shape, value))
  x = Tensor(np.array([[[[-4.0, 5.0]]]], np.float32))
  before = [layer.__call__ for layer in (Conv2d, BatchNorm)]
  assert words in first_not_finite(model, lambda x: {"loss": loss(model(x))}, x)
  assert [layer.__call__ for layer in (Conv2d, BatchNorm)] == before, "nothing stays watched"
