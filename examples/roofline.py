"""What a training step, or detection, comes to on a GPU that is not here: its kernels, what each multiplies and moves, and the least time of each.

    python examples/roofline.py --model retinanet_resnet50_fpn --size 800 --bs 16

tinygrad's NULL device makes every kernel as for an H100 and runs none. With NVIDIA's compiler, which needs no GPU, each is compiled too:

    pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12

A kernel takes at least as long as the processor for its arithmetic, the memory for each byte that it touches, counted once, and the second cache for
every byte that it asks for; and a launch. What is printed is no measurement."""
import importlib.util, os, sys
from pathlib import Path
if __name__ == "__main__":   # before tinygrad is imported, which reads these once
  os.environ |= {"DEV": "NULL:CUDA:sm_90", "JIT": "2", "CACHELEVEL": "0"}
  nvidia = [Path(folder) for spec in [importlib.util.find_spec("nvidia")] if spec for folder in spec.submodule_search_locations]
  if libraries := [file for folder in nvidia for file in sorted(folder.glob("cuda_nvrtc/lib/libnvrtc.so.*[0-9]"))]:
    os.environ |= {"NVRTC_PATH": str(libraries[0]), "CUDA_PATH": str(libraries[0].parents[2]/"cuda_runtime")}
  if "NVRTC_PATH" not in os.environ: os.environ["PARALLEL"] = "0"   # without the compiler no process is needed to run it
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from unittest.mock import patch
import numpy as np
from tinygrad import Tensor
from tinygrad.device import Compiler
from tinygrad.engine.realize import estimate_uop
from tinygrad.helpers import ansistrip
from tinygrad.nn.state import get_state_dict
from tinygrad.runtime.support import compiler_cuda
from tinygrad.uop.ops import Ops, UOp
from tinydet import detectors
from tinydet.config import new_file, option, parse, show_size, size
from tinydet.errors import exit_on_user_error
from tinydet.runtime import compiling
from tinydet.runtime.device import require_device
from tinydet.runtime.graphs import jit
from tinydet.runtime.precision import DTYPES
from tinydet.training.loop import make_step
from tinydet.training.optim import Optimizer, schedule

BOXES = 100   # a picture


@dataclass
class Config:
  model: str = option("retinanet_resnet50_fpn", "any detector, by the name of its weights: retinanet_resnet18_fpn, yolov8n", parse=detectors.known)
  size: tuple = option((800, 800), "pixels the network sees: 800, or width x height as 192x144", parse=size, show=show_size)
  bs: int = option(16, "pictures a step", minimum=1)
  classes: int = option(91, "classes of the detector", minimum=1)
  dtype: str = option("bf16", "what the network computes in", choices=tuple(DTYPES))
  detection: bool = option(False, "the forward pass of detection, in place of a training step")
  matrix: float = option(790.0, "TFLOP/s of the GPU's matrix units, as an H100's in bf16", minimum=0.001)
  vector: float = option(67.0, "TFLOP/s of everything else, as an H100's in float32", minimum=0.001)
  memory: float = option(3350.0, "GB/s of its memory", minimum=0.001)
  cache: float = option(5500.0, "GB/s of its second cache", minimum=0.001)
  launch: float = option(1.5, "microseconds between two kernels of a captured graph", minimum=0.0)
  top: int = option(10, "kernels to list", minimum=0)
  json: str | None = option(None, "file to write all kernels to", parse=new_file)


@dataclass
class Kernel:
  """One kernel of a graph, and how often it runs. `flop`, `bytes` (each address once) and `asked` (bytes of all loads and stores) are of one run."""
  name: str
  flop: int
  bytes: int
  asked: int
  matrix: bool          # whether it uses the matrix units
  arguments: str        # elements and type of what it writes and reads
  runs: int = 1

  def least(self, config: Config) -> tuple[float, str]:
    """Seconds of one run at the rates of `config`, and what it waits for."""
    limits = {"matrix" if self.matrix else "arithmetic": self.flop / (config.matrix if self.matrix else config.vector) / 1e12,
              "memory": self.bytes / config.memory / 1e9, "cache": self.asked / config.cache / 1e9, "launch": config.launch / 1e6}
    limit = max(limits, key=limits.__getitem__)
    return limits[limit], limit


def kernels_of(linear: UOp) -> list[Kernel]:
  """The kernels of a captured graph, the same ones counted together, in the order in which they come first."""
  kernels: dict[UOp, Kernel] = {}
  for call in linear.src:
    if (program := call.src[0]) in kernels:
      kernels[program].runs += 1
      continue
    estimates, compiled = estimate_uop(call), program.op is Ops.PROGRAM
    name = ansistrip(program.src[0].arg.name) if compiled else program.op.name.lower()
    matrix = compiled and any(u.op is Ops.WMMA for u in program.src[1].src)
    arguments = ", ".join(f"{dtype} {'+'.join(counts)}" for dtype, counts in _arguments(call).items())
    kernels[program] = Kernel(name, int(estimates.ops), int(estimates.mem), int(estimates.lds), matrix, arguments)
  return list(kernels.values())


def _arguments(call: UOp) -> dict[str, list[str]]:
  """How many elements of each type a kernel's buffers have, in their order."""
  counts: dict[str, list[str]] = {}
  for buffer in call.src[1:]: counts.setdefault(buffer.dtype.name, []).append(f"{buffer.max_numel():,}")
  return counts


def capture(config: Config) -> list[Kernel]:
  """The kernels of the step that `config` asks for."""
  graphs: list[UOp] = []
  def kept(*args, make=compiling.make) -> UOp:
    graphs.append(make(*args))
    return graphs[-1]
  detector, bs, dtype = detectors.build(config.model, config.classes), config.bs, DTYPES[config.dtype]
  canvas = detector.fit(config.size).canvas()
  Tensor.realize(*get_state_dict(detector.network).values(), *detector.constants(canvas))
  images = Tensor(np.zeros((bs, *canvas, 3), np.uint8)).realize()
  with patch.object(compiling, "make", kept):
    if config.detection:
      detector.fold()
      jit(lambda x: detector.infer(x, dtype))(images)
    else:
      tensors = get_state_dict(detector.network)
      params = {key: t for key, t in tensors.items() if t.is_param}
      optimizer = Optimizer(params, "sgd", schedule("constant", 1e-3, 1), momentum=0.9, weight_decay=1e-4)
      step = make_step(lambda x, boxes, labels: detector.losses(detector(x, dtype), boxes, labels, canvas), optimizer,
                       [t for t in tensors.values() if not t.is_param])
      step(images, Tensor(np.zeros((bs, BOXES, 4), np.float32)).realize(), Tensor(np.zeros((bs, BOXES), np.int32)).realize())
  return kernels_of(graphs[-1])


class NoCompiler(Compiler):
  """Stands in for NVIDIA's."""
  def __init__(self, arch: str, **_): super().__init__(None)
  def compile(self, src: str) -> bytes: return b""


def main(config: Config) -> None:
  compiles = "NVRTC_PATH" in os.environ
  with nullcontext() if compiles else patch.object(compiler_cuda, "NVRTCCompiler", NoCompiler):
    require_device()
    kernels = capture(config)
  seconds = [kernel.runs * kernel.least(config)[0] for kernel in kernels]
  waits: Counter[str] = Counter()
  for kernel, s in zip(kernels, seconds): waits[kernel.least(config)[1]] += s
  runs, flop, moved, asked = (sum(k.runs * v for k, v in zip(kernels, values)) for values in (
    [1] * len(kernels), [k.flop for k in kernels], [k.bytes for k in kernels], [k.asked for k in kernels]))
  what = "detection" if config.detection else "a training step"
  on_units = sum(k.runs * k.flop for k in kernels if k.matrix) / max(flop, 1)
  print(f"{what} of {config.model}, {show_size(config.size)}, batch {config.bs}, {config.dtype}, for an H100 (sm_90): {runs} kernels, {len(kernels)} "
        f"different ones{', each compiled' * compiles}; {flop / 1e12:.2f} TFLOP, {on_units:.0%} of it on matrix units; {moved / 1e9:.1f} GB touched, "
        f"{asked / 1e9:.1f} GB asked for")
  print(f"at least {sum(seconds) * 1e3:.1f} ms, {config.bs / sum(seconds):.0f} pictures/s; "
        + ", ".join(f"{s * 1e3:.1f} ms for the {limit}" for limit, s in waits.most_common()))
  if config.top: print("\n| kernel | runs | GFLOP | MB touched | MB asked for | waits for | ms in all | buffers |\n" + "| --- " * 8 + "|")
  for s, kernel in sorted(zip(seconds, kernels), key=lambda pair: -pair[0])[:config.top]:
    numbers = f"{kernel.flop / 1e9:.2f} | {kernel.bytes / 1e6:.1f} | {kernel.asked / 1e6:.1f}"
    print(f"| {kernel.name} | {kernel.runs} | {numbers} | {kernel.least(config)[1]} | {s * 1e3:.2f} | {kernel.arguments} |")
  if config.json is not None:
    with open(config.json, "w") as file: json.dump([asdict(k) | {"least_s": k.least(config)[0]} for k in kernels], file, indent=1)


if __name__ == "__main__":
  with exit_on_user_error(): main(parse(Config, {}, sys.argv[1:], os.environ))
