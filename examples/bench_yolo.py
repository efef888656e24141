"""Measure YOLOv8n on this processor: its forward pass against torch eager and onnxruntime, in turns, and the first detection of a second process; or
with --train a step of training against torch eager.

Each contender has a process of its own and waits while the others run. All compute the raw outputs of the same network, its norms folded, from
the same pictures f32 [B,3,H,W], or train the same weights on the same u8 pictures and boxes; before anything is timed their numbers are compared.
Needs pip install -e '.[onnx,torch]'."""
import math, multiprocessing, os, platform, statistics, subprocess, sys, tempfile, time
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
from tinydet.training import optim
from tinydet.training.loop import make_step
from tinydet.weights import checkpoint

NAME, CLASSES, STRIDES, BINS = "yolov8n", 80, (8, 16, 32), 16
LR, WEIGHT_DECAY, CLIP_NORM, EMA = 1e-3, 5e-4, 10.0, 0.9999   # of a training step
PAUSE = 0.3   # seconds between turns: threads of torch spin for a while after their work


@dataclass
class Config:
  size: int = option(640, "pixels, of square pictures", minimum=32)
  bs: tuple = option((1, 8), "batch sizes", parse=lambda text: tuple(map(int, text.split(","))), show=lambda sizes: ",".join(map(str, sizes)))
  rounds: int = option(15, "turns of each contender", minimum=3)
  train: bool = option(False, "measure a training step: forward and backward pass, AdamW, clipping and the weights' average")
  boxes: int = option(24, "of each picture, with --train", minimum=1)
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
  def call(x: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode(): return [t.numpy() for t in torch_forward(torch.from_numpy(x), w, conv)]
  return call


def torch_forward(x: Any, w: dict[str, Any], conv: Callable[..., Any]) -> list[Any]:
  """YOLOv8n's box and class logits [B,64,N] and [B,K,N] by torch, `conv(x, key, stride)` being a convolution with what follows it."""
  import torch
  from torch.nn import functional as F

  def c2f(x: torch.Tensor, key: str, shortcut: bool, depth: int) -> torch.Tensor:
    parts = list(conv(x, f"{key}.cv1").chunk(2, 1))
    for i in range(depth):
      y = conv(conv(parts[-1], f"{key}.m.{i}.cv1"), f"{key}.m.{i}.cv2")
      parts.append(parts[-1] + y if shortcut else y)
    return conv(torch.cat(parts, 1), f"{key}.cv2")

  def branch(x: torch.Tensor, key: str) -> torch.Tensor:
    return F.conv2d(conv(conv(x, f"{key}.0"), f"{key}.1"), w[f"{key}.2.weight"], w[f"{key}.2.bias"])

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


CONTENDERS = {"this program": ours, "torch eager": torch, "onnxruntime": onnxruntime}

# ---------------------------------------------------------------------------------------------------------------------------- training steps


def our_step(folder: Path) -> Callable[..., list[np.ndarray]]:
  detector = network(folded=False)
  tensors = get_state_dict(detector.network)
  optimizer = optim.Optimizer({key: t for key, t in tensors.items() if t.is_param}, "adamw", optim.schedule("constant", LR, 1),
                              weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM, ema_decay=EMA)
  def losses(images: Any, boxes: Any, labels: Any) -> dict[str, Any]: return detector.losses(detector(images), boxes, labels, images.shape[1:3])
  step = make_step(losses, optimizer, [t for t in tensors.values() if not t.is_param])
  def call(*batch: np.ndarray) -> list[np.ndarray]: return [np.float32(step(*(to_devices(a, (Device.DEFAULT,)) for a in batch))()["loss"])]
  return call


def torch_step(folder: Path) -> Callable[..., list[np.ndarray]]:
  import torch
  from torch.nn import functional as F
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  tensors = get_state_dict(network(folded=False).network)
  w = {key: torch.from_numpy(t.numpy()) for key, t in tensors.items()}
  params = [w[key].requires_grad_() for key, t in tensors.items() if t.is_param]
  average = [p.detach().clone() for p in params]
  optimizer = torch.optim.AdamW([{"params": [p for p in params if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
                                 {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}], LR, foreach=True)

  def conv(x: torch.Tensor, key: str, stride: int = 1) -> torch.Tensor:
    weight = w[f"{key}.conv.weight"]
    x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
    norm = [w[f"{key}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.silu(F.batch_norm(x, *norm, training=True, momentum=0.03, eps=1e-3), inplace=True)

  def call(images: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    loss = torch_loss(*torch_forward(x, w, conv), torch.from_numpy(boxes), torch.from_numpy(labels).long(), images.shape[1])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, CLIP_NORM, foreach=True)
    optimizer.step()
    torch._foreach_lerp_(average, [p.detach() for p in params], 1 - EMA)
    return [np.float32(loss.item())]
  return call


def torch_loss(box: Any, classes: Any, boxes: Any, labels: Any, side: int) -> Any:
  """YOLOv8's loss of square pictures by torch: task alignment (10 best, score^0.5 CIoU^6); CIoU 7.5, cross-entropy 0.5, distribution focal 1.5."""
  import torch
  from torch.nn import functional as F
  batch, _, n = box.shape
  grids = [torch.cartesian_prod(torch.arange(side // s), torch.arange(side // s)).flip(1) + 0.5 for s in STRIDES]
  centre, stride = torch.cat(grids), torch.cat([torch.full((len(grid), 1), float(s)) for s, grid in zip(STRIDES, grids)])
  sides = box.view(batch, 4, BINS, n).permute(0, 3, 1, 2)
  mean = sides.softmax(3) @ torch.arange(BINS).float()
  found = torch.cat([centre - mean[..., :2], centre + mean[..., 2:]], -1)
  with torch.no_grad():
    points = centre * stride
    margin = torch.cat([points - boxes[:, :, None, :2], boxes[:, :, None, 2:] - points], -1).amin(-1)
    inside = (margin > 1e-9) & (labels >= 0)[..., None]
    overlap = torch_ciou(boxes[:, :, None], (found * stride)[:, None]).clamp(0) * inside
    score = classes.sigmoid().gather(1, labels.clamp(0)[..., None].expand(-1, -1, n))
    aligned = score.sqrt() * overlap ** 6 * inside
    wanted = torch.zeros_like(inside).scatter_(2, aligned.topk(10, 2).indices, True) & inside
    first = F.one_hot(overlap.argmax(1), boxes.shape[1]).transpose(1, 2).bool()
    wanted = torch.where(wanted.sum(1, keepdim=True) > 1, first, wanted)
    scale = (overlap * wanted).amax(2, keepdim=True) / ((aligned * wanted).amax(2, keepdim=True) + 1e-9)
    quality, known, index = (aligned * wanted * scale).amax(1), wanted.any(1), wanted.int().argmax(1)
    own = boxes.gather(1, index[..., None].expand(-1, -1, 4)) / stride
    goal = F.one_hot(labels.clamp(0).gather(1, index), classes.shape[1]) * quality[..., None]
    total = quality.sum().clamp(1)
  weight = quality[known]
  terms = 7.5 * ((1 - torch_ciou(found[known], own[known])) * weight).sum()
  terms = terms + 0.5 * F.binary_cross_entropy_with_logits(classes.transpose(1, 2), goal.float(), reduction="sum")
  place = torch.cat([centre - own[..., :2], own[..., 2:] - centre], -1).clamp(0, BINS - 1.01)[known]
  low, logits = place.long(), sides[known].flatten(0, 1)
  near = [F.cross_entropy(logits, bin_.flatten(), reduction="none").view(place.shape) for bin_ in (low, low + 1)]
  share = place - low
  return (terms + 1.5 * ((near[0] * (1 - share) + near[1] * share).mean(-1) * weight).sum()) / total * batch


def torch_ciou(a: Any, b: Any, eps: float = 1e-7) -> Any:
  """CIoU of boxes [...,4] by torch (Zheng et al. 2019)."""
  import torch
  low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
  (aw, ah), (bw, bh) = ((t[..., 2:] - t[..., :2]).unbind(-1) for t in (a, b))
  shared = (high - low).clamp(0).prod(-1)
  iou = shared / (aw * ah + bw * bh - shared + eps)
  hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).square().sum(-1) + eps
  away = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(-1) / 4
  shape = 4 / math.pi ** 2 * (torch.atan(bw / (bh + eps)) - torch.atan(aw / (ah + eps))).square()
  with torch.no_grad(): alpha = shape / (shape - iou + 1 + eps)
  return iou - away / hull - alpha * shape


TRAINERS = {"this program": our_step, "torch eager": torch_step}

# ------------------------------------------------------------------------------------------------------------------------------- turns


def serve(name: str, folder: Path, boxes: int, line: Connection) -> None:
  """Answer each batch with the seconds that it took, or with the numbers that came out; `boxes` a picture train, 0 does not."""
  call = (TRAINERS if boxes else CONTENDERS)[name](folder)
  while (asked := line.recv()) is not None:
    batch = labelled(asked[1:], boxes) if boxes else (pictures(asked[1:]),)
    started = time.perf_counter()
    out = call(*batch)
    line.send(out if asked[0] == "numbers" else time.perf_counter() - started)


def pictures(shape: tuple[int, ...]) -> np.ndarray: return np.random.default_rng(1).random(shape, np.float32)


def labelled(shape: tuple[int, ...], boxes: int) -> tuple[np.ndarray, ...]:
  """Pictures u8 [B,S,S,3] and so many boxes each, of a twentieth to a third of their side."""
  rng, (batch, _, side, _) = np.random.default_rng(1), shape
  extent = rng.uniform(0.05, 0.35, (batch, boxes, 2)) * side
  corner = rng.random((batch, boxes, 2)) * (side - extent)
  return (rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8), np.concatenate([corner, corner + extent], 2).astype(np.float32),
          rng.integers(0, CLASSES, (batch, boxes), dtype=np.int32))


def measure(config: Config, folder: Path) -> None:
  lines, context = {}, multiprocessing.get_context("spawn")
  processes = []
  for name in (TRAINERS if config.train else CONTENDERS):
    lines[name], other = context.Pipe()
    processes.append(process := context.Process(target=serve, args=(name, folder, config.boxes * config.train, other), daemon=True))
    process.start()
  for size in config.bs:
    shape = (size, 3, config.size, config.size)
    numbers = {name: ask(line, "numbers", shape) for name, line in lines.items()}
    wanted = numbers["torch eager"]
    for name, found in numbers.items():
      for a, b in zip(found, wanted, strict=True): np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max(), err_msg=name)
    turns = [{name: ask(line, "time", shape) for name, line in lines.items()} for _ in range(config.rounds + 1)][1:]
    what = f"a step of {NAME}, {config.boxes} boxes a picture" if config.train else NAME
    print(f"\n| {what}, {config.size}x{config.size}, batch {size} | seconds, median of {config.rounds} turns | pictures/s | this program against it "
          "|")
    print("| --- | --- | --- | --- |")
    for name in lines:
      ratios, seconds = sorted(turn[name] / turn["this program"] for turn in turns), statistics.median(turn[name] for turn in turns)
      print(f"| {name} | {seconds:.3f} | {size / seconds:.1f} | x{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
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
    folder, detector = Path(name), network()
    detector.fit((config.size,) * 2)   # says so where the network cannot have that size
    if not config.train:
      with write_onnx(folder / "network.onnx", detector, (config.size,) * 2, {}, outputs="raw", preprocess=False): pass
    measure(config, folder)
    if config.second_process and not config.train: first_detection(folder)


def processor() -> str:
  try: text = Path("/proc/cpuinfo").read_text()
  except OSError: return platform.processor()
  name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor())
  return f"{name} ({'AVX-512' if 'avx512f' in text else 'AVX2' if 'avx2' in text else 'no AVX2'})"


if __name__ == "__main__":
  with exit_on_user_error(): main(parse(Config, {}, sys.argv[1:], os.environ))
