"""Files of weights in the formats of YOLO's authors, written without their programs: stand-ins under the names of their classes, pickled."""
import io, pickle, sys, types, zipfile
from contextlib import contextmanager
from pathlib import PurePosixPath
import numpy as np

STORAGES = {np.dtype("f2"): "HalfStorage", np.dtype("f4"): "FloatStorage", np.dtype("i8"): "LongStorage"}


class Tensor:
  """Stands for a torch tensor in `write`."""
  def __init__(self, array, parameter=False): self.array, self.parameter = np.ascontiguousarray(array), parameter


def stand_in(dotted):
  """A class that a pickle calls `dotted`."""
  module, _, name = dotted.rpartition(".")
  return type(name, (), {"__module__": module, "__qualname__": name, "__init__": lambda self, **state: self.__dict__.update(state)})


@contextmanager
def importable(*made):
  """Under their names while something is pickled, whatever else has these names."""
  saved, modules = dict(sys.modules), {}
  for thing in made:
    parts = thing.__module__.split(".")
    for i in range(len(parts)): modules.setdefault(name := ".".join(parts[:i + 1]), types.ModuleType(name))
    setattr(modules[thing.__module__], thing.__qualname__, thing)
  sys.modules.update(modules)
  try: yield
  finally:
    sys.modules.clear()
    sys.modules.update(saved)


def function(module, name):
  def made(*_): raise AssertionError("a pickle's function was run")
  made.__module__, made.__qualname__, made.__name__ = module, name, name
  return made


REBUILD = function("torch._utils", "_rebuild_tensor_v2")
PARAMETER = function("torch._utils", "_rebuild_parameter")
STORAGE_TYPES = {name: type(name, (), {"__module__": "torch", "__qualname__": name}) for name in STORAGES.values()}


class Storage:
  """What a tensor's persistent id refers to."""
  def __init__(self, array): self.array = array


def write(path, value, classes):
  """`value` as torch.save's zip format has it: `Tensor`s in storages of their own, objects of `classes` (see `stand_in`) by their names."""
  from collections import OrderedDict
  arrays = []

  class Pickler(pickle.Pickler):
    def persistent_id(self, thing):
      if not isinstance(thing, Storage): return None
      arrays.append(thing.array)
      return ("storage", STORAGE_TYPES[STORAGES[thing.array.dtype]], str(len(arrays) - 1), "cpu", thing.array.size)

    def reducer_override(self, thing):
      if not isinstance(thing, Tensor): return NotImplemented
      a = thing.array
      if thing.parameter: return PARAMETER, (Tensor(a), True, OrderedDict())
      strides = tuple(s // a.itemsize for s in a.strides)
      return REBUILD, (Storage(a.reshape(-1)), 0, a.shape, strides, False, OrderedDict())

  with importable(REBUILD, PARAMETER, *STORAGE_TYPES.values(), *classes):
    Pickler(out := io.BytesIO(), 2).dump(value)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", out.getvalue())
    archive.writestr("archive/version", b"3\n")
    for i, a in enumerate(arrays): archive.writestr(f"archive/data/{i}", a.tobytes())
  return path


class Models:
  """Whole models of stand-in modules; `root` is the dotted name of the model's class, which tells the family, `block` that of all blocks."""
  def __init__(self, root, block):
    self.root, self.block = stand_in(root), stand_in(block)
    self.leaf, self.silu = stand_in("torch.nn.modules.conv.Conv2d"), stand_in("torch.nn.modules.activation.SiLU")
    self.namespace, self.loss = stand_in("ultralytics.utils.IterableSimpleNamespace"), stand_in("ultralytics.utils.loss.v8DetectionLoss")
    self.classes = [self.root, self.block, self.leaf, self.silu, self.namespace, self.loss]
    self.act = self.silu(**self.state({}, {}, {}))   # one for all, as YOLO's modules share it

  @staticmethod
  def state(parameters, buffers, modules, **more):
    hooks = {f"_{kind}_hooks": {} for kind in ("backward_pre", "backward", "forward", "forward_pre", "state_dict", "state_dict_pre",
                                               "load_state_dict_pre", "load_state_dict_post")}
    return {"training": False, "_parameters": parameters, "_buffers": buffers, "_non_persistent_buffers_set": set(), **hooks,
            "_modules": modules, **more}

  def module(self, tensors, kind=None, **attributes):
    """A module whose state dict `tensors` is."""
    parameters, buffers, children = {}, {}, {}
    for key, value in tensors.items():
      name, _, rest = key.partition(".")
      if rest: children.setdefault(name, {})[rest] = value
      elif name.startswith(("running_", "num_batches", "anchor")): buffers[name] = Tensor(value)
      else: parameters[name] = Tensor(value, True)
    modules = {name: self.module(part) for name, part in children.items()}
    if modules: modules["act"] = self.act
    else: parameters.setdefault("bias", None)
    return (kind or (self.block if modules else self.leaf))(**self.state(parameters, buffers, modules, **attributes))

  def checkpoint(self, tensors, names, half=True):
    """A released file's dict around the model: `tensors` are its state dict in float32, stored in half precision, or as they are."""
    if half: tensors = {key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in tensors.items()}
    yaml = {"nc": len(names), "backbone": [[-1, 1, "Conv", [64, 3, 2]]]}
    model = self.module(tensors, self.root, names=dict(enumerate(names)), stride=Tensor(np.float32([8, 16, 32])), yaml=yaml,
                        args=self.namespace(box=7.5))
    model.criterion = self.loss(model=model, device="cpu")   # refers to the model that it is part of
    model.forward_again = BoundMethod(model, "forward")
    return {"epoch": -1, "best_fitness": np.float64(0.37), "model": model, "ema": None, "updates": None, "optimizer": None,
            "train_args": {"data": PurePosixPath("coco.yaml")}, "date": "2024-01-01", "opt": self.namespace(lr0=0.01)}

  def write(self, path, tensors, names, half=True): return write(path, self.checkpoint(tensors, names, half), self.classes)


class BoundMethod:
  """Pickled as a bound method is: a call of getattr."""
  def __init__(self, thing, name): self.call = thing, name
  def __reduce__(self): return getattr, self.call
