"""Checkpoints of a run: what is in them, and how a network starts from one."""
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from extra.errors import UserError
from extra.nn.init import assign
from extra.training import checkpoint
from extra.training.optim import Optimizer

SHIPPED = {"shapes": Path(__file__).parent.parent / "models" / "shapes.safetensors"}


def save_run(path: Path, model: Any, optimizer: Optimizer, metadata: dict) -> None:
  """Write weights (`model.`), optimiser state (`optimizer.`) and `metadata` to `path`: all that `load_run` needs to go on."""
  tensors = {f"model.{k}": t for k, t in get_state_dict(model).items()} | {f"optimizer.{k}": t for k, t in optimizer.state().items()}
  checkpoint.save(path, {k: t.numpy() for k, t in tensors.items()}, metadata)


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict, half: bool = False) -> None:
  """Write weights alone, under torchvision's keys; in half precision where `half` and the tensor is float32."""
  arrays = {k: t.numpy() for k, t in tensors.items()}
  checkpoint.save(path, {k: a.astype(np.float16) if half and a.dtype == np.float32 else a for k, a in arrays.items()}, metadata)


def load_run(path: Path, model: Any, optimizer: Optimizer) -> dict:
  """Put what `save_run` wrote back, and return its metadata; UserError where file and network differ."""
  tensors, metadata = checkpoint.load(path)
  wanted = {f"model.{k}": t for k, t in get_state_dict(model).items()} | {f"optimizer.{k}": t for k, t in optimizer.state().items()}
  if odd := sorted(wanted.keys() ^ tensors.keys()): raise UserError(f"{path}: is of another network or optimiser ({len(odd)} keys differ)")
  for key, tensor in wanted.items():
    if tensors[key].shape != tensor.shape: raise UserError(f"{path}: {key} has shape {tensors[key].shape}, this run needs {tensor.shape}")
  for key, tensor in wanted.items(): assign(tensor, tensors[key])
  return metadata


def load_weights(name: str, model: Any) -> list[str]:
  """Start `model` from the file `name`, or from the one that ships under this name (a key of SHIPPED), as far as keys and shapes agree.

  A run's checkpoint gives its averaged weights if it has them. Returns what a user should know, one line each: tensors left as they were because the
  number of classes differs. UserError names a key that is missing or misshapen otherwise."""
  path = SHIPPED.get(name, Path(name))
  if not path.is_file(): raise UserError(f"--weights {name}: no such file; give none, {', '.join(SHIPPED)}, or a .safetensors file of a run")
  tensors, _ = checkpoint.load(path)
  if any(k.startswith("model.") for k in tensors):
    average = {k.removeprefix("optimizer.ema."): v for k, v in tensors.items() if k.startswith("optimizer.ema.")}
    tensors = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")} | average
  wanted = get_state_dict(model)
  kept = [k for k, t in wanted.items() if "cls_logits" in k and k in tensors and tensors[k].shape != t.shape]
  for key, tensor in wanted.items():
    if key.endswith("num_batches_tracked") or key in kept: continue
    if key not in tensors: raise UserError(f"{path}: has no tensor {key}; is it of another backbone? Its first is {min(tensors)}")
    if tensors[key].shape != tensor.shape: raise UserError(f"{path}: {key} has shape {tensors[key].shape}, this network needs {tensor.shape}")
  for key, tensor in wanted.items():
    if key in tensors and key not in kept: assign(tensor, tensors[key])
  return [f"{path.name} knows other classes: {', '.join(kept)} start anew"] if kept else []
