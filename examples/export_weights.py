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
from tinydet.weights.weights import WRITERS, export_weights


@dataclass
class Config:
  weights: str = option("shapes", "shapes (ships with the code), imagenet, imagenet_v2, coco, mlperf, a file or the folder of a run")
  architecture: str = option("retinanet_resnet50_fpn", "which network, for a published name, as retinanet_resnet50_fpn_v2")
  out: str = option("weights.pth", "file to write: .pth, .pt or .safetensors")
  half: bool = option(False, "write float16")


def main(config: Config) -> None:
  if Path(config.out).suffix.lower() not in WRITERS: raise UserError(f"--out {config.out}: end it with {' or '.join(WRITERS)}")
  name, tensors, notes = export_weights(config.weights, config.architecture, config.out, config.half)
  for note in notes: print(f"note: {note}")
  print(f"{config.out}: {name}, {len(tensors)} tensors, {sum(v.nbytes for v in tensors.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
  with exit_on_user_error(), named_sources(config := parse(Config, {}, sys.argv[1:], os.environ)): main(config)
