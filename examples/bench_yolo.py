"""Measure YOLOv8n's forward pass on this processor against torch eager and onnxruntime, in turns, and the first detection of a second process.

Each contender has a process of its own and waits while the others run. All compute the raw outputs of the same network, its norms folded, from
the same pictures f32 [B,3,H,W]; before anything is timed their numbers are compared. Needs pip install -e '.[onnx,torch]'."""
import multiprocessing, os, platform, statistics, subprocess, sys, tempfile, time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
import numpy as np
from PIL import Image
from tinygrad import Context, Device
from tinygrad.nn.state import get_state_dict
from tinydet import detectors
from tinydet.config import option, parse
from tinydet.detectors.detector import Detector
from tinydet.errors import exit_on_user_error
from tinydet.export import write_onnx
from tinydet.nn.init import set_values
from tinydet.runtime.devices import to_devices, to_host
from tinydet.runtime.graphs import jit
from tinydet.weights import checkpoint

NAME, CLASSES = "yolov8n", 80
PAUSE = 0.3   # seconds between turns: threads of torch spin for a while after their work


@dataclass
class Config:
  size: int = option(640, "pixels, of square pictures", minimum=32)
  bs: tuple = option((1, 8), "batch sizes", parse=lambda text: tuple(map(int, text.split(","))), show=lambda sizes: ",".join(map(str, sizes)))
  rounds: int = option(15, "turns of each contender", minimum=3)
  second_process: bool = option(True, "time detect.py in a second process too")


def network(folded: bool = True) -> Detector:
  """The detector with drawn weights, the same in every process."""
  detector, rng = detectors.build(NAME, CLASSES), np.random.default_rng(0)
  for key, tensor in sorted(get_state_dict(detector.network).items()):
    if "dfl" not in key and "num_batches" not in key: set_values(tensor, drawn(key, tensor.shape, rng))
  if folded: detector.fold()
  return detector


def drawn(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
  """Weights that keep activations near 1, norms that have something to fold."""
  if len(shape) == 4: return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
  low = 0.5 if key.endswith(("weight", "running_var")) else -0.5
  return rng.uniform(low, low + 1, shape).astype(np.float32)

# ------------------------------------------------------------------------------------------------------------------------------- contenders


def ours(folder: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
  detector = network()
  run = jit(lambda x: tuple(t.contiguous() for t in detector.head(detector.features(x))))
  def call(x: np.ndarray) -> list[np.ndarray]:
    with Context(TRAINING=0): return [to_host(t) for t in run(to_devices(x, (Device.DEFAULT,)))]
  return call


def onnxruntime(folder: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
  """The file that `examples/export.py` writes."""
  from onnxruntime import InferenceSession, SessionOptions
  options = SessionOptions()
  options.intra_op_num_threads = len(os.sched_getaffinity(0))
  session = InferenceSession(str(folder / "network.onnx"), options, providers=["CPUExecutionProvider"])
  return lambda x: session.run(None, {"images": x})


def torch(folder: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
  """The same layers in torch, one operator after the other."""
  import torch
  from torch.nn import functional as F
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  w = {key: torch.from_numpy(t.numpy()) for key, t in get_state_dict(network().network).items()}

  def conv(x: torch.Tensor, key: str, stride: int = 1) -> torch.Tensor:
    weight = w[f"{key}.conv.weight"]
    return F.silu(F.conv2d(x, weight, w[f"{key}.conv.bias"], stride, weight.shape[-1] // 2), inplace=True)

  def c2f(x: torch.Tensor, key: str, shortcut: bool, depth: int) -> torch.Tensor:
    parts = list(conv(x, f"{key}.cv1").chunk(2, 1))
    for i in range(depth):
      y = conv(conv(parts[-1], f"{key}.m.{i}.cv1"), f"{key}.m.{i}.cv2")
      parts.append(parts[-1] + y if shortcut else y)
    return conv(torch.cat(parts, 1), f"{key}.cv2")

  def branch(x: torch.Tensor, key: str) -> torch.Tensor:
    return F.conv2d(conv(conv(x, f"{key}.0"), f"{key}.1"), w[f"{key}.2.weight"], w[f"{key}.2.bias"])

  def forward(x: torch.Tensor) -> list[torch.Tensor]:
    x = c2f(conv(conv(x, "model.0", 2), "model.1", 2), "model.2", True, 1)
    p3 = c2f(conv(x, "model.3", 2), "model.4", True, 2)
    p4 = c2f(conv(p3, "model.5", 2), "model.6", True, 2)
    pooled = [conv(c2f(conv(p4, "model.7", 2), "model.8", True, 1), "model.9.cv1")]
    for _ in range(3): pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
    p5 = conv(torch.cat(pooled, 1), "model.9.cv2")
    p4 = c2f(torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1), "model.12", False, 1)
    n3 = c2f(torch.cat([F.interpolate(p4, scale_factor=2.0), p3], 1), "model.15", False, 1)
    n4 = c2f(torch.cat([conv(n3, "model.16", 2), p4], 1), "model.18", False, 1)
    n5 = c2f(torch.cat([conv(n4, "model.19", 2), p5], 1), "model.21", False, 1)
    return [torch.cat([branch(n, f"model.22.{kind}.{i}").flatten(2) for i, n in enumerate((n3, n4, n5))], 2) for kind in ("cv2", "cv3")]

  def call(x: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode(): return [t.numpy() for t in forward(torch.from_numpy(x))]
  return call


CONTENDERS = {"this program": ours, "torch eager": torch, "onnxruntime": onnxruntime}

# ------------------------------------------------------------------------------------------------------------------------------- turns


def serve(name: str, folder: Path, line: Connection) -> None:
  """Answer each batch with the seconds that it took, and each seed and shape with the numbers that came out."""
  call = CONTENDERS[name](folder)
  while (asked := line.recv()) is not None:
    x = pictures(asked[1:])
    started = time.perf_counter()
    out = call(x)
    line.send(out if asked[0] == "numbers" else time.perf_counter() - started)


def pictures(shape: tuple[int, ...]) -> np.ndarray: return np.random.default_rng(1).random(shape, np.float32)


def measure(config: Config, folder: Path) -> None:
  lines, context = {}, multiprocessing.get_context("spawn")
  processes = []
  for name in CONTENDERS:
    lines[name], other = context.Pipe()
    processes.append(process := context.Process(target=serve, args=(name, folder, other), daemon=True))
    process.start()
  for size in config.bs:
    shape = (size, 3, config.size, config.size)
    numbers = {name: ask(line, "numbers", shape) for name, line in lines.items()}
    wanted = numbers["torch eager"]
    for name, found in numbers.items():
      for a, b in zip(found, wanted, strict=True): np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max(), err_msg=name)
    turns = [{name: ask(line, "time", shape) for name, line in lines.items()} for _ in range(config.rounds + 1)][1:]
    print(f"\n| {NAME}, {config.size}x{config.size}, batch {size} | pictures/s, median of {config.rounds} turns | this program against it |")
    print("| --- | --- | --- |")
    for name in lines:
      ratios = sorted(turn[name] / turn["this program"] for turn in turns)
      print(f"| {name} | {size / statistics.median(turn[name] for turn in turns):.1f} | "
            f"x{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
  for line, process in zip(lines.values(), processes):
    line.send(None)
    process.join()


def ask(line: Connection, what: str, shape: tuple[int, ...]) -> Any:
  time.sleep(PAUSE)
  line.send((what, *shape))
  return line.recv()


def first_detection(folder: Path) -> None:
  """Time `detect.py` on a photograph of 640x480 twice, a process each, from nothing in the caches."""
  checkpoint.save(folder / "network.safetensors", {key: t.numpy() for key, t in get_state_dict(network(folded=False).network).items()})
  Image.fromarray(np.random.default_rng(2).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(folder / "picture.jpg")
  environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "CACHEDB": str(folder / "cache" / "cache.db")}
  (folder / "cache").mkdir()
  program = [sys.executable, str(Path(__file__).with_name("detect.py")), str(folder / "picture.jpg"), "--out", str(folder / "out"),
             "--weights", str(folder / "network.safetensors")]
  for name in ("first", "second"):
    started = time.perf_counter()
    subprocess.run(program, env=environment, check=True, capture_output=True)
    print(f"detect.py on one picture, {name} process: {time.perf_counter() - started:.1f} s from its start to its end")


def main(config: Config) -> None:
  print(f"{processor()}, {len(os.sched_getaffinity(0))} of its cores, load {os.getloadavg()[0]:.1f}")
  with tempfile.TemporaryDirectory(prefix="bench-") as name:
    folder = Path(name)
    with write_onnx(folder / "network.onnx", network(), (config.size,) * 2, {}, outputs="raw", preprocess=False): pass
    measure(config, folder)
    if config.second_process: first_detection(folder)


def processor() -> str:
  try: text = Path("/proc/cpuinfo").read_text()
  except OSError: return platform.processor()
  name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor())
  return f"{name} ({'AVX-512' if 'avx512f' in text else 'AVX2' if 'avx2' in text else 'no AVX2'})"


if __name__ == "__main__":
  with exit_on_user_error(): main(parse(Config, {}, sys.argv[1:], os.environ))
