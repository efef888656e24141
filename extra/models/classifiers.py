"""The classifiers by torchvision's builder names: how they are built, and which one a set of tensors belongs to."""
import functools
from collections.abc import Mapping
from types import ModuleType
from tinygrad.nn.state import get_state_dict
from tinydet.models import (alexnet, convnext, densenet, efficientnet, googlenet, inception, mnasnet, mobilenet, regnet, resnet, shufflenet,
                            squeezenet, vgg)
from tinydet.models.classifier import Classifier
from tinydet.models.layer_list import AUXILIARY
from tinydet.nn import init

# Each has NETWORKS, what makes a network of a number of classes and a kind of norm, and MARK, tensors one of which is in all of its networks and in
# those of no other family (with their shapes, where the names alone do not tell).
FAMILIES: tuple[ModuleType, ...] = (resnet, alexnet, vgg, squeezenet, densenet, inception, googlenet, mobilenet, mnasnet, shufflenet, efficientnet,
                                    regnet, convnext)
NETWORKS = {name: make for family in FAMILIES for name, make in family.NETWORKS.items()}
NAMES = tuple(NETWORKS)
AUXILIARIES = ("AuxLogits.", "aux1.", "aux2.", AUXILIARY)   # how the names begin of what learns beside the classes and may be missing from a file


def made(name: str, num_classes: int | None = 1000, norm: str = "batch") -> Classifier:
  """The network `name`, one of `NAMES`, without values: only names and shapes are sure. KeyError for another name."""
  if name not in NETWORKS: raise KeyError(f"{name!r} is no classifier: choose from {', '.join(NAMES)}")
  return NETWORKS[name](num_classes, norm)


def build(name: str, num_classes: int | None = 1000, norm: str = "batch", seed: int = 0) -> Classifier:
  """The network that torchvision calls `name`, one of `NAMES`, initialised from `seed`: a normalised batch [B,3,H,W] -> logits [B,num_classes].

  `norm`, a key of `nn.layers.NORMS`, says what its batch norms are, with their own constants; layer norms stay. KeyError for another name."""
  model = made(name, num_classes, norm)
  init.initialize(model, model.init_rule, seed)
  return model


@functools.lru_cache(maxsize=len(NAMES))
def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the tensors of `name` without classes, but for those that only belong to norms."""
  return {key: t.shape for key, t in get_state_dict(made(name, None)).items() if not _of_norm(key)}


def _of_norm(key: str) -> bool: return key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """The one of `NAMES` whose tensors, but for the classes, have these names and shapes; None if there is none."""
  for family in FAMILIES:
    if not any(key in shapes and want in (None, shapes[key]) for key, want in family.MARK.items()): continue
    for name in family.NETWORKS:
      wanted = shapes_of(name)
      if all(shapes.get(key) == shape for key, shape in wanted.items()) and not _others(shapes, wanted, name): return name
  return None


def _others(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], name: str) -> bool:
  """Whether there are tensors beside those of `name`, its classes and its norms' statistics."""
  top = (*made_top(name), *AUXILIARIES)
  return any(key not in wanted and not _of_norm(key) and not key.startswith(top) for key in shapes)


def made_top(name: str) -> tuple[str, ...]:
  """How the names of the tensors of `name` begin that only tell classes apart."""
  make = NETWORKS[name]
  network = make.func if isinstance(make, functools.partial) else make
  return getattr(network, "top", resnet.ResNet.top)
