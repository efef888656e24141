"""Measure what a RetinaNet over each classifier costs: pictures a second in training, forward and backward pass, and in detection up to the outputs.

    python examples/bench_backbones.py resnet18 mobilenet_v2      (all of them without names)

Random weights, 80 classes, each network from the caches as they are. tinygrad's own variables work as ever: DEV=CUDA, BEAM=2."""
import os, statistics, sys, time
from dataclasses import dataclass
from types import SimpleNamespace
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet import detectors
from tinydet.config import option, parse, show_size, size, split_words
from tinydet.errors import UserError, exit_on_user_error
from tinydet.models import classifiers
from tinydet.runtime.device import require_device
from tinydet.runtime.devices import devices
from tinydet.runtime.graphs import jit
from tinydet.training.plan import step_seconds

TURNS = 5


@dataclass
class Config:
  size: tuple = option((320, 320), "pixels the network sees: 800, or width x height as 192x144", parse=size, show=show_size)
  bs: int = option(4, "pictures of a training step; detection has one", minimum=1)
  classes: int = option(80, "classes of the detector", minimum=1)


def rates(name: str, config: Config) -> tuple[float, float, float]:
  """Of a RetinaNet over the classifier `name`: millions of parameters, pictures a second in training, and in detection."""
  detector = detectors.build(f"retinanet_{name}_fpn", config.classes, norm="batch", exact_strides=True)
  step, _, _ = step_seconds(SimpleNamespace(dtype="float32"), SimpleNamespace(gpus=devices(1)), detector, config.size, config.bs)
  image = Tensor(np.random.default_rng(0).integers(0, 256, (1, *config.size[::-1], 3), dtype=np.uint8)).realize()
  forward, times = jit(detector.infer), []
  for _ in range(2 + TURNS):
    begun = time.perf_counter()
    forward(image)[0].numpy()
    times.append(time.perf_counter() - begun)
  parameters = sum(t.numel() for t in get_state_dict(detector.network).values() if t.is_param)
  return parameters / 1e6, config.bs / step, 1 / statistics.median(times[2:])


def main(config: Config, names: tuple[str, ...]) -> None:
  if odd := [name for name in names if name not in classifiers.NAMES]:
    raise UserError(f"{odd[0]}: no such backbone; docs/networks.md lists them")
  require_device()
  print(f"{show_size(config.size)} pixels, {config.classes} classes, training {config.bs} pictures a step, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}\n")
  print("| network | RetinaNet's parameters, M | training, pictures/s | detection, pictures/s |\n| --- | --- | --- | --- |", flush=True)
  for name in names or classifiers.NAMES:
    parameters, training, detection = rates(name, config)
    print(f"| `{name}` | {parameters:.1f} | {training:.2f} | {detection:.1f} |", flush=True)


if __name__ == "__main__":
  with exit_on_user_error():
    words, flags = split_words(sys.argv[1:])
    main(parse(Config, {}, flags, os.environ), words)
