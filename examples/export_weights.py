"""Write the weights of a run, or any weights that --weights takes, as one plain file: a .pth for torch or a .safetensors for everything else.

  python examples/export_weights.py --weights runs/mine --out mine.pth

In torch, for the network that this program names (K classes):

  model = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=K)
  model.load_state_dict(torch.load("mine.pth", weights_only=True), strict=True)"""
import os, sys
from dataclasses import dataclass
from pathlib import Path
from tinydet.errors import UserError, exit_on_user_error
from tinydet.config import named_sources, option, parse
import numpy as np
from tinydet import models
from tinydet.weights import checkpoint, torch_file
from tinydet.weights.weights import open_weights

WRITERS = {".pth": lambda path, tensors, about: torch_file.save(path, tensors), ".pt": lambda path, tensors, about: torch_file.save(path, tensors),
           ".safetensors": checkpoint.save}


@dataclass
class Config:
  weights: str = option("shapes", "shapes (ships with the code), imagenet, imagenet_v2, coco, mlperf, a file or the folder of a run")
  architecture: str = option("retinanet_resnet50_fpn", "which network, for a published name, as retinanet_resnet50_fpn_v2")
  out: str = option("weights.pth", "file to write: .pth, .pt or .safetensors")
  half: bool = option(False, "write float16")


def main(config: Config) -> None:
  if (suffix := Path(config.out).suffix.lower()) not in WRITERS: raise UserError(f"--out {config.out}: end it with {' or '.join(WRITERS)}")
  path, tensors, about, notes = open_weights(config.weights, config.architecture)
  shapes = {key: tensor.shape for key, tensor in tensors.items()}
  if (name := models.recognise(shapes)) is None: raise UserError(f"{path}: is no network of this project")
  # torch's batch norms count their batches, and its strict loading asks for the count; frozen norms ignore it
  for key in [k for k in tensors if k.endswith("running_var")]: tensors.setdefault(key.replace("running_var", "num_batches_tracked"), np.array(0))
  if config.half: tensors = {k: v.astype(np.float16) if v.dtype.kind == "f" else v for k, v in tensors.items()}
  WRITERS[suffix](Path(config.out), tensors, about | {"model": name})
  for note in notes: print(f"note: {note}")
  print(f"{config.out}: {name}, {len(tensors)} tensors, {sum(v.nbytes for v in tensors.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
  with exit_on_user_error(), named_sources(config := parse(Config, {}, sys.argv[1:], os.environ)): main(config)
