"""Measure a detector on this processor against torch eager and onnxruntime, in turns: YOLOv8n's forward pass, with --detect from bytes to boxes,
with --train a training step; and the first detection of a second process. Any other detector of this project against onnxruntime.

Each contender has a process of its own and waits while the others run. All compute from the same drawn weights and pictures, norms folded unless they
train; before anything is timed their numbers are compared. Needs pip install -e '.[onnx,torch]'."""
import json, multiprocessing, os, platform, re, statistics, subprocess, sys, tempfile, time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
import numpy as np
from PIL import Image
from tinygrad import Context, Device
from tinygrad.nn.state import get_state_dict
from tinydet import detectors
from tinydet.config import new_file, option, parse
from tinydet.detectors.detector import Detector
from tinydet.errors import UserError, exit_on_user_error
from tinydet.export import write_onnx
from tinydet.nn.init import set_values
from tinydet.runtime.devices import to_devices, to_host
from tinydet.runtime.graphs import jit
from tinydet.training import optim
from tinydet.training.loop import make_step
from tinydet.weights import checkpoint

IN_TORCH, CLASSES = "yolov8n", 80   # the network that `yolo_in_torch.py` has
LR, WEIGHT_DECAY, CLIP_NORM, EMA = 1e-3, 5e-4, 10.0, 0.9999   # of a training step
LAST_LAYERS = {r"cv3\.\d\.2\.": 0.25, r"cls_logits\.": 2e-5, r"bbox_reg\.": 4e-6}   # what makes logits of about 1 of what the drawn weights give
AGREE = 0.95   # of the rows that two contenders detect
FOUND, NMS, MOST = 100, 0.5, 300   # pairs of cell and class above the score threshold, with --detect; IoU; boxes kept
PAUSE = 0.3   # seconds between turns: threads of torch spin for a while after their work


def peers(text: str) -> tuple[str, ...]:
  """Parse the names of those that this program is measured against. For `option(parse=peers, show=",".join)`."""
  names = tuple(text.split(","))
  for name in names:
    if name not in ("torch", "onnxruntime"): raise ValueError(f"{name}: expected some of torch, onnxruntime")
  return names


@dataclass
class Config:
  network: str = option(IN_TORCH, "the detector by name, such as retinanet_resnet50_fpn", parse=detectors.known)
  against: tuple = option(("torch", "onnxruntime"), "whom to measure against: torch, onnxruntime", parse=peers, show=",".join)
  size: int = option(640, "pixels, of square pictures", minimum=32)
  bs: tuple = option((1, 8), "batch sizes", parse=lambda text: tuple(map(int, text.split(","))), show=lambda sizes: ",".join(map(str, sizes)))
  rounds: int = option(15, "turns of each contender", minimum=3)
  detect: bool = option(False, "measure detection end to end: from bytes to boxes after NMS")
  train: bool = option(False, "measure a training step: forward and backward pass, AdamW, clipping and the weights' average")
  boxes: int = option(24, "of each picture, with --train", minimum=1)
  second_process: bool = option(True, "time detect.py in a second process too")
  json: str | None = option(None, "file to write the turns to", parse=new_file)


class Task(NamedTuple):
  """What all contenders do, with files in `folder`: the "forward" pass, "detect", or "train"."""
  kind: str
  network: str
  folder: Path
  boxes: int
  threshold: float = 0.0   # of scores


def network(name: str, folded: bool = True, detect: bool = False) -> Detector:
  """The detector with drawn weights, the same in every process; to `detect`, last layers whose scores are not all 1."""
  detector, rng = detectors.build(name, CLASSES), np.random.default_rng(0)
  for key, tensor in sorted(get_state_dict(detector.network).items()):
    by = next((by for last, by in LAST_LAYERS.items() if detect and re.search(last, key)), 1.0)
    if "dfl" not in key and "num_batches" not in key: set_values(tensor, drawn(key, tensor.shape, rng) * np.float32(by))
  if folded: detector.fold()
  return detector


def drawn(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
  """Weights that keep activations near 1, norms that have something to fold."""
  if len(shape) == 4: return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
  low = 0.5 if key.endswith(("weight", "running_var")) else -0.5
  return rng.uniform(low, low + 1, shape).astype(np.float32)

# ------------------------------------------------------------------------------------------------------------------------------- contenders


def ours(task: Task) -> Callable[..., list[np.ndarray]]:
  if task.kind == "train": return our_step(task)
  detect = task.kind == "detect"
  detector = network(task.network, detect=detect)
  def outputs(x: Any) -> tuple[Any, ...]:
    return tuple(t.contiguous() for t in detector.head(detector.features(detector.prepare(x) if detect else x)))
  run = jit(outputs)
  def call(x: np.ndarray) -> list[np.ndarray]:
    with Context(TRAINING=0):
      found = run(to_devices(x, (Device.DEFAULT,)))
      if not detect: return [to_host(t) for t in found]
      rows = detector.detect(found, x.shape[1:3], np.tile(x.shape[1:3], (len(x), 1)), score_threshold=task.threshold, nms_threshold=NMS,
                             max_detections=MOST)
      return [np.column_stack([rows.boxes[i, :n], rows.scores[i, :n], rows.labels[i, :n]]) for i, n in enumerate(rows.counts)]
  return call


def onnxruntime(task: Task) -> Callable[[np.ndarray], list[np.ndarray]]:
  """The file that `examples/export.py` writes."""
  from onnxruntime import InferenceSession, SessionOptions
  options = SessionOptions()
  options.intra_op_num_threads = len(os.sched_getaffinity(0))
  session = InferenceSession(str(task.folder / "network.onnx"), options, providers=["CPUExecutionProvider"])
  def call(x: np.ndarray) -> list[np.ndarray]:
    found = session.run(None, {"images": x})
    if task.kind == "forward": return found
    own = [found[0][found[0][:, 0] == i, 1:] for i in range(len(x))]
    return [rows[np.argsort(-rows[:, 4], kind="stable")] for rows in own]
  return call


def torch(task: Task) -> Callable[..., list[np.ndarray]]:
  """The same layers in torch, one operator after the other."""
  import torch, yolo_in_torch
  from torch.nn import functional as F
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if task.kind == "train": return torch_step(task)
  w = {key: torch.from_numpy(t.numpy()) for key, t in get_state_dict(network(task.network, detect=task.kind == "detect").network).items()}
  def conv(x: torch.Tensor, key: str, stride: int = 1) -> torch.Tensor:
    weight = w[f"{key}.conv.weight"]
    return F.silu(F.conv2d(x, weight, w[f"{key}.conv.bias"], stride, weight.shape[-1] // 2), inplace=True)
  def call(x: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode():
      images = torch.from_numpy(x)
      if task.kind == "forward": return [t.numpy() for t in yolo_in_torch.forward(images, w, conv)]
      found = yolo_in_torch.forward(images.permute(0, 3, 1, 2).float() / 255, w, conv)
      return [rows.numpy() for rows in yolo_in_torch.detections(*found, x.shape[1], task.threshold, NMS, MOST)]
  return call


CONTENDERS = {"torch": torch, "onnxruntime": onnxruntime}

# ---------------------------------------------------------------------------------------------------------------------------- training steps


def our_step(task: Task) -> Callable[..., list[np.ndarray]]:
  detector = network(task.network, folded=False)
  tensors = get_state_dict(detector.network)
  optimizer = optim.Optimizer({key: t for key, t in tensors.items() if t.is_param}, "adamw", optim.schedule("constant", LR, 1),
                              weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM, ema_decay=EMA)
  def losses(images: Any, boxes: Any, labels: Any) -> dict[str, Any]: return detector.losses(detector(images), boxes, labels, images.shape[1:3])
  step = make_step(losses, optimizer, [t for t in tensors.values() if not t.is_param])
  def call(*batch: np.ndarray) -> list[np.ndarray]: return [np.float32(step(*(to_devices(a, (Device.DEFAULT,)) for a in batch))()["loss"])]
  return call


def torch_step(task: Task) -> Callable[..., list[np.ndarray]]:
  import torch, yolo_in_torch
  from torch.nn import functional as F
  tensors = get_state_dict(network(task.network, folded=False).network)
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
    loss = yolo_in_torch.loss(*yolo_in_torch.forward(x, w, conv), torch.from_numpy(boxes), torch.from_numpy(labels).long(), images.shape[1])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, CLIP_NORM, foreach=True)
    optimizer.step()
    torch._foreach_lerp_(average, [p.detach() for p in params], 1 - EMA)
    return [np.float32(loss.item())]
  return call

# ------------------------------------------------------------------------------------------------------------------------------- turns


def serve(name: str, task: Task, line: Connection) -> None:
  """Answer each batch with the seconds that it took, or with the numbers that came out."""
  call = (CONTENDERS | {"ours": ours})[name](task)
  while (asked := line.recv()) is not None:
    batch = inputs(task, *asked[1:])
    started = time.perf_counter()
    out = call(*batch)
    line.send(out if asked[0] == "numbers" else time.perf_counter() - started)


def inputs(task: Task, batch: int, side: int) -> tuple[np.ndarray, ...]:
  """Pictures f32 [B,3,S,S], or as bytes u8 [B,S,S,3]; to train also boxes of a twentieth to a third of their side, and labels."""
  rng = np.random.default_rng(1)
  if task.kind == "forward": return (rng.random((batch, 3, side, side), np.float32),)
  images = rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
  if task.kind == "detect": return (images,)
  extent = rng.uniform(0.05, 0.35, (batch, task.boxes, 2)) * side
  corner = rng.random((batch, task.boxes, 2)) * (side - extent)
  return images, np.concatenate([corner, corner + extent], 2).astype(np.float32), rng.integers(0, CLASSES, (batch, task.boxes), dtype=np.int32)


def measure(config: Config, task: Task) -> None:
  lines, context, measured = {}, multiprocessing.get_context("spawn"), {}
  processes = []
  for name in ("ours", *config.against):
    lines[name], other = context.Pipe()
    processes.append(process := context.Process(target=serve, args=(name, task, other), daemon=True))
    process.start()
  for batch in config.bs:
    numbers = {name: ask(line, "numbers", batch, config.size) for name, line in lines.items()}
    for name, found in numbers.items():
      if task.kind == "detect":
        shared = agree(found, numbers["ours"])
        assert shared >= AGREE, f"{name} and this program agree on {shared:.0%} of what they detect"
      else:
        for a, b in zip(found, numbers["ours"], strict=True): np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max(), err_msg=name)
    turns = [{name: ask(line, "time", batch, config.size) for name, line in lines.items()} for _ in range(config.rounds + 1)][1:]
    measured[batch] = turns
    print(table(f"{WHAT[task.kind].format(task.boxes)} of {task.network}, {config.size}x{config.size}, batch {batch}", batch, turns))
  for line, process in zip(lines.values(), processes):
    line.send(None)
    process.join()
  if config.json: Path(config.json).write_text(json.dumps(measured), encoding="utf-8")


def agree(these: list[np.ndarray], those: list[np.ndarray]) -> float:
  """The share of the rows of two lists of detections, one a picture, that are in both: near a threshold a rounding decides."""
  limits = 1e-3 * np.abs(np.concatenate(those)).max(0) + 1e-3
  same = [(np.abs(a[:, None] - b) <= limits).all(2) for a, b in zip(these, those, strict=True)]
  return min(np.concatenate([rows.any(axis) for rows in same]).mean() for axis in (0, 1))


WHAT = {"forward": "the forward pass", "detect": "detection", "train": "a training step, {} boxes a picture,"}


def table(what: str, batch: int, turns: list[dict[str, float]]) -> str:
  """Medians of `turns`, seconds by contender, and how many times as fast this program is."""
  lines = [f"\n| {what} | seconds, median of {len(turns)} turns | pictures/s | this program against it |", "| --- | --- | --- | --- |"]
  for name in turns[0]:
    ratios, seconds = sorted(turn[name] / turn["ours"] for turn in turns), statistics.median(turn[name] for turn in turns)
    lines.append(f"| {name} | {seconds:.3f} | {batch / seconds:.1f} | x{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
  return "\n".join(lines)


def ask(line: Connection, what: str, batch: int, side: int) -> Any:
  time.sleep(PAUSE)
  line.send((what, batch, side))
  return line.recv()


def first_detection(name: str, folder: Path) -> None:
  """Time `detect.py` on a photograph of 640x480 twice, a process each, from nothing in the caches."""
  checkpoint.save(folder / "network.safetensors", {key: t.numpy() for key, t in get_state_dict(network(name, folded=False).network).items()})
  Image.fromarray(np.random.default_rng(2).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(folder / "picture.jpg")
  environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "CACHEDB": str(folder / "cache" / "cache.db")}
  (folder / "cache").mkdir()
  program = [sys.executable, str(Path(__file__).with_name("detect.py")), str(folder / "picture.jpg"), "--out", str(folder / "out"),
             "--weights", str(folder / "network.safetensors")]
  for name in ("first", "second"):
    started = time.perf_counter()
    subprocess.run(program, env=environment, check=True, capture_output=True)
    print(f"detect.py on one picture, {name} process: {time.perf_counter() - started:.1f} s from its start to its end")


def threshold(detector: Detector, batch: tuple[np.ndarray, ...]) -> float:
  """A score that `FOUND` pairs of cell and class of the first picture are above, halfway to the next."""
  with Context(TRAINING=0):
    images = to_devices(batch[0][:1], (Device.DEFAULT,))
    _, scores = detector.decoded(detector.head(detector.features(detector.prepare(images))), batch[0].shape[1:3])
    best = np.sort(scores.numpy().reshape(-1))[::-1]
  return float((best[FOUND - 1] + best[FOUND]) / 2)


def main(config: Config) -> None:
  kind = "train" if config.train else "detect" if config.detect else "forward"
  against = config.against if kind != "train" else tuple(name for name in config.against if name != "onnxruntime")
  if config.network != IN_TORCH and "torch" in against:
    raise UserError(f"--network {config.network}: torch has {IN_TORCH} here and no other; add --against onnxruntime")
  if not against: raise UserError(f"--against {','.join(config.against)}: trains nothing; --train is measured against torch")
  config.against = against
  print(f"{processor()}, {len(os.sched_getaffinity(0))} of its cores, load {os.getloadavg()[0]:.1f}")
  with tempfile.TemporaryDirectory(prefix="bench-") as name:
    task, detector, canvas = Task(kind, config.network, Path(name), config.boxes), network(config.network, detect=config.detect), (config.size,) * 2
    detector.fit(canvas)   # says so where the network cannot have that size
    if kind == "detect": task = task._replace(threshold=threshold(detector, inputs(task, 1, config.size)))
    if "onnxruntime" in against:
      options = {"outputs": "raw", "preprocess": False} if kind == "forward" else {
        "outputs": "detections", "score_threshold": task.threshold, "nms_threshold": NMS, "max_detections": MOST}
      with write_onnx(task.folder / "network.onnx", detector, canvas, {}, **options): pass
    measure(config, task)
    if config.second_process and kind != "train": first_detection(config.network, task.folder)


def processor() -> str:
  try: text = Path("/proc/cpuinfo").read_text()
  except OSError: return platform.processor()
  name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor())
  return f"{name} ({'AVX-512' if 'avx512f' in text else 'AVX2' if 'avx2' in text else 'no AVX2'})"


if __name__ == "__main__":
  with exit_on_user_error(): main(parse(Config, {}, sys.argv[1:], os.environ))
