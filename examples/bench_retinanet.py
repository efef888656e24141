"""Measure a RetinaNet training step, the loader and the post-processing on this machine.

Caches are cold: whatever tinygrad or the GPU's driver compiled before is not used, so the time to the first step is a new user's; `--second-run` adds
that of the next run. With `--baseline` the same network, batch and optimiser also run in the form that comes to mind first in tinygrad, with
`--torch` as torchvision's RetinaNet on torch, and they are compared.
tinygrad's own variables work as ever: DEV=CUDA, BEAM=2, DEBUG=2."""
import os, sys, tempfile, time
if __name__ == "__main__":   # before tinygrad is imported, which reads these once
  STARTED, CACHE = time.time(), tempfile.TemporaryDirectory(prefix="bench-")
  CACHES = os.environ.get("BENCH_CACHES", CACHE.name)   # a second run is given those of the first
  os.environ |= {"XDG_CACHE_HOME": CACHES, "CACHEDB": f"{CACHES}/cache.db", "CUDA_CACHE_PATH": f"{CACHES}/cuda"}
import functools, gc, importlib.util, json, math, platform, re, resource, secrets, shlex, subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch
import numpy as np
from PIL import Image
from tinydet.runtime.device import require_device
from tinydet.errors import UserError, exit_on_user_error
from tinydet.config import as_dict, describe, new_file, option, parse, show_size, size
from tinygrad import Context, Device, GlobalCounters, Tensor, TinyJit
from tinygrad.nn import optim as tinygrad_optim
from tinygrad.nn.state import get_state_dict
from tinygrad.runtime.ops_cpu import CPUProgram
from tinydet import detectors
from tinydet.datasets import open_dataset
from tinydet.datasets.loader import Loader
from tinydet.datasets.shapes import Shapes
from tinydet.datasets.subset import Subset
from tinydet.datasets.transforms import compose, horizontal_flip, resize
from tinydet.detection import losses as detection_losses
from tinydet.detection.anchors import anchors, level_sizes
from tinydet.detection.matcher import match
from tinydet.detection.postprocess import select
from tinydet.models import classifiers, resnet, retinanet
from tinydet.models.preprocess import MEAN, STD
from tinydet.nn import init, layers
from tinydet.training import optim
from tinydet.training.loop import make_step
from tinydet.runtime.devices import devices, replicate, to_devices
from tinydet.runtime.precision import DTYPES

LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4
READING_ROUNDS = 7           # of ours and of PIL alone, in turns
TORCH_WARMUP = 2             # steps after its first that are not timed
TORCH_BACKBONES = tuple(name for name in resnet.BACKBONES if name != "resnet10_quarter")
DRAWN = "drawn 1024x768"       # data set of JPEGs
POSTPROCESS_MEANS = {"trained": -6.5, "untrained": -4.6}

# ---------------------------------------------------------------------------------------------------------------------------- configuration


@dataclass
class Config:
  backbone: str = option("resnet18", "the classifier underneath", choices=classifiers.NAMES, group="step")
  variant: str = option("v1", "torchvision's RetinaNet v1 or v2", choices=("v1", "v2"), group="step")
  norm: str = option("frozen", "the backbone's norm layers", choices=tuple(layers.NORMS), group="step")
  size: tuple = option((128, 128), "pixels the network sees: 800, or width x height as 192x144", parse=size, show=show_size, group="step")
  bs: int = option(2, "pictures a step, over all devices", minimum=1, group="step")
  classes: int = option(10, "classes of the detector", minimum=1, group="step")
  boxes: int = option(8, "boxes on each picture", minimum=1, group="step")
  dtype: str = option("float32", "what the network computes in", choices=tuple(DTYPES), group="step")
  gpus: int = option(1, "devices to divide the batch among", minimum=1, group="step")
  steps: int = option(8, "steps to time after the first", minimum=1, group="step")
  plain: bool = option(False, "measure the plain form instead", group="step")
  second_run: bool = option(False, "measure a second run too, which finds what the first left in the caches", group="step")
  baseline: bool = option(False, "measure the plain form too, afterwards, in a process of its own", group="step")
  only_torch: bool = option(False, "measure torchvision's RetinaNet instead, on torch (pip install -e '.[torch]')", group="step")
  torch: bool = option(False, "measure torchvision's RetinaNet too, afterwards, in a process of its own", group="step")

  loader_images: int = option(256, "pictures to load, in this process; 0 skips it", minimum=0, group="the rest")
  loader_size: tuple = option((800, 800), "pixels that pictures from files are resized to, as --size", parse=size, show=show_size, group="the rest")
  data: str | None = option(None, "a folder in COCO or Pascal VOC layout to load from, besides drawn pictures", group="the rest")
  postprocess_size: int = option(800, "pixels, of the picture whose outputs become detections; 0 skips it", minimum=0, group="the rest")
  postprocess_classes: int = option(91, "classes of those outputs, by default COCO's", minimum=1, group="the rest")
  json: str | None = option(None, "file to write the numbers to", parse=new_file, group="the rest")


# ---------------------------------------------------------------------------------------------------------------------------- step


def our_step(config: Config, gpus: tuple[str, ...]) -> Callable[..., float]:
  """A step as `train_retinanet.py` runs it: (images, boxes, labels) -> loss. Its first call captures."""
  canvas = config.size[::-1]
  detector = detectors.build(detector_name(config), config.classes, norm=config.norm)
  tensors = get_state_dict(detector.network)
  params, buffers = {key: t for key, t in tensors.items() if t.is_param}, [t for t in tensors.values() if not t.is_param]
  optimizer = optim.Optimizer(params, "sgd", optim.schedule("constant", LR, 1), momentum=MOMENTUM, weight_decay=WEIGHT_DECAY,
                              norm_weight_decay=WEIGHT_DECAY)
  replicate([*tensors.values(), *optimizer.state().values(), *detector.constants(canvas)], gpus)

  def losses(images: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return detector.losses(detector(images, DTYPES[config.dtype]), boxes, labels, canvas)

  step = make_step(losses, optimizer, buffers)
  return lambda *batch: step(*batch)()["loss"]


def detector_name(config: Config) -> str: return f"retinanet_{config.backbone}_fpn" + "_v2" * (config.variant == "v2")

# ---------------------------------------------------------------------------------------------------------------------------- the plain form


def plain_step(config: Config, gpus: tuple[str, ...]) -> Callable[..., float]:
  """The same step with tinygrad's own random numbers, convolution, gradients, optimiser and jit. Its second call captures."""
  width, height = config.size
  if Device.DEFAULT == "CPU": Device["CPU"].runtime_t, Device["CPU"].graph = CPUProgram, None   # not `tinydet.runtime.cpu`
  with patch.object(init, "initialize", plain_initialize): model = retinanet.build(detector_name(config), config.classes, config.norm)
  level_anchors = Tensor(anchors(height, width))
  replicate([*get_state_dict(model).values(), level_anchors], gpus)
  optimizer = tinygrad_optim.SGD(list(get_state_dict(model).values()), LR, MOMENTUM, WEIGHT_DECAY)

  @TinyJit
  def step(images: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    with Context(TRAINING=1):
      optimizer.zero_grad()
      loss = plain_loss(model, images, level_anchors, *match(level_anchors, boxes, labels), config)
      loss.backward()
      optimizer.step()
    return loss.realize()

  return lambda *batch: step(*batch).item()


def plain_loss(model: retinanet.RetinaNet, images: Tensor, level_anchors: Tensor, classes: Tensor, matched: Tensor, config: Config) -> Tensor:
  """The scalar loss, all of it for tinygrad to differentiate, with no `contiguous` anywhere in the network."""
  mean, std = (Tensor(values, device=images.device).reshape(1, 3, 1, 1) for values in (MEAN, STD))
  images = ((images.permute(0, 3, 1, 2) / 255 - mean) / std).cast(DTYPES[config.dtype])
  with ExitStack() as plainly:
    plainly.enter_context(patch.object(Tensor, "contiguous", lambda tensor: tensor))
    plainly.enter_context(patch.object(layers, "conv2d", lambda x, weight, bias, stride, padding, groups, dtype:
                                       x.conv2d(weight, bias, groups=groups, stride=stride, padding=padding).cast(dtype or x.dtype)))
    plainly.enter_context(patch.object(detection_losses, "sigmoid_focal_loss", plain_focal_loss))
    plainly.enter_context(patch.object(retinanet._Head, "__call__", plain_head))
    classification, regression = detection_losses.detection_losses(*model(images), level_anchors, classes, matched)
  return classification + regression


def plain_head(head: retinanet._Head, levels: list[Tensor]) -> Tensor:
  """The head on one level after the other."""
  outputs = []
  for x in levels:
    for block in head.conv: x = x.sequential(block).relu()
    outputs.append(getattr(head, head.output)(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, head.per_anchor))
  return outputs[0].cat(*outputs[1:], dim=1)


def plain_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
  """`losses.sigmoid_focal_loss` as its paper writes it."""
  p = logits.sigmoid()
  weight, p_t = targets.where(alpha, 1 - alpha), targets.where(p, 1 - p)
  return weight * (1 - p_t) ** gamma * logits.binary_crossentropy_logits(targets.cast(logits.dtype), reduction="none")


def plain_initialize(model: retinanet.RetinaNet, rule: Callable, seed: int) -> None:
  """`init.initialize` by tinygrad's random operations, one a tensor."""
  Tensor.manual_seed(seed)
  for key, tensor in (tensors := get_state_dict(model)).items():
    if tensor.ndim == 4: values = Tensor.normal(*tensor.shape, std=0.01) if key.startswith("head.") else Tensor.kaiming_normal(*tensor.shape)
    elif key.endswith("cls_logits.bias"): values = Tensor.full(tensor.shape, -math.log((1 - retinanet.PRIOR) / retinanet.PRIOR))
    else: values = Tensor.full(tensor.shape, 1 if key.endswith(("weight", "running_var")) else 0, dtype=tensor.dtype)
    is_param = tensor.is_param
    tensor.replace(values.clone()).is_param_(is_param)
  Tensor.realize(*tensors.values())


# ---------------------------------------------------------------------------------------------------------------------------- torchvision


def torch_step(config: Config, weights: dict[str, np.ndarray], device: str) -> Callable[..., float]:
  """The same step by torchvision's RetinaNet from the same `weights` (name -> values): (images, boxes, labels), torch tensors on `device`, -> loss.

  The images go past torchvision's own resizing: as in ours, the step begins with their normalisation. A `dtype` other than float32 is autocast's."""
  import torch, torchvision
  from torch import nn
  from torchvision.models.detection.anchor_utils import ImageList
  from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
  from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
  from torchvision.ops.feature_pyramid_network import LastLevelP6P7
  from torchvision.ops.misc import FrozenBatchNorm2d

  norms = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(min(32, channels // 4), channels)}
  body = getattr(torchvision.models, config.backbone)(norm_layer=norms[config.norm])
  v2 = config.variant == "v2"
  backbone = _resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(body.fc.in_features if v2 else 256, 256))
  model = RetinaNet(backbone, config.classes, head=RetinaNetHead(256, 9, config.classes, functools.partial(nn.GroupNorm, 32)) if v2 else None)
  model.load_state_dict({key: torch.from_numpy(values) for key, values in weights.items()})
  model.train().to(device, memory_format=torch.channels_last)
  torch.backends.cudnn.benchmark = True
  optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
  mean, std = (255 * torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (MEAN, STD))
  autocast = torch.autocast(device, {"bf16": torch.bfloat16, "half": torch.half}.get(config.dtype), enabled=config.dtype != "float32")

  def step(images: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor) -> float:
    optimizer.zero_grad()
    with autocast:
      x = ((images.permute(0, 3, 1, 2) - mean) / std).contiguous(memory_format=torch.channels_last)
      features = list(model.backbone(x).values())
      outputs = model.head(features)
    anchors = model.anchor_generator(ImageList(x, [config.size[::-1]] * config.bs), features)
    targets = [{"boxes": b, "labels": l} for b, l in zip(boxes, labels.long())]
    loss = sum(model.compute_loss(targets, {name: values.float() for name, values in outputs.items()}, anchors).values())
    loss.backward()
    optimizer.step()
    if device == "cuda": torch.cuda.synchronize()   # the loss is there before the update is
    return loss.item()

  return step


def import_torch() -> None:
  """Import torch, and torchvision or what its next import lacks."""
  import torch
  try: importlib.import_module("torchvision")
  except RuntimeError:
    # beside a torch for processors only, PyPI's torchvision has no operators of its own, and its import stumbles over these two
    for operator in ("nms", "qnms"): torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# ---------------------------------------------------------------------------------------------------------------------------- measurements


def measure_step(config: Config) -> dict[str, float]:
  """Numbers of one training step; `peak_device_mb` is what tinygrad holds after a step, when a captured step's buffers are all allocated."""
  numbers = run_steps(config, gpus := devices(config.gpus))
  gc.collect()   # a second run beside this one would have to wait for memory of its own
  for gpu in gpus: Device[gpu].allocator.free_cache()
  return numbers


def run_steps(config: Config, gpus: tuple[str, ...]) -> dict[str, float]:
  """`measure_step`, whose tensors go when it returns."""
  step = (plain_step if config.plain else our_step)(config, gpus)
  batch, device_bytes = [to_devices(array, gpus) for array in random_batch(config)], [0]

  def counted() -> float:
    GlobalCounters.reset()
    loss = step(*batch)
    device_bytes.append(GlobalCounters.mem_used)
    return loss

  since_start, seconds = timed_steps(counted, 2 if config.plain else 1, config.steps, STARTED)
  kernels, gflop, median = GlobalCounters.kernel_count, GlobalCounters.global_ops / 1e9, float(np.median(seconds))
  return {"first_step_s": since_start[0], "captured_step_s": since_start[-1], "step_median_s": median, "step_min_s": min(seconds),
          "images_per_s": config.bs / median, "kernels": kernels, "gflop": gflop, "gflop_per_s": gflop / median,
          "peak_device_mb": max(device_bytes) / 1e6, "peak_process_mb": peak_process_bytes() / 1e6}


def timed_steps(step: Callable[[], float], first: int, steps: int, started: float) -> tuple[list[float], list[float]]:
  """Seconds from the time `started` to the end of each of the `first` steps, which compile or warm up, and the seconds of each of `steps` others."""
  since_start, seconds = [], []
  for i in range(1, first + steps + 1):
    begun = time.perf_counter()
    loss = step()
    elapsed = time.perf_counter() - begun
    if i <= first: since_start.append(time.time() - started)
    else: seconds.append(elapsed)
    print(f"step {i}: loss {loss:.4f}, {elapsed:.3f} s" + f", done {since_start[-1]:.1f} s after the start" * (i <= first), flush=True)
  return since_start, seconds


def measure_torch(config: Config) -> dict[str, float | str]:
  """Numbers of one training step of torchvision's RetinaNet, on the GPU where tinygrad's device is one that torch can use.

  The clock starts when torch is imported. Device memory is known on a GPU only."""
  weights = {key: tensor.numpy() for key, tensor in get_state_dict(retinanet.build(detector_name(config), config.classes, config.norm)).items()}
  started = time.time()
  import_torch()
  import torch
  device = "cuda" if Device.DEFAULT.partition(":")[0] in ("CUDA", "NV") and torch.cuda.is_available() else "cpu"
  batch = [torch.from_numpy(array).to(device) for array in random_batch(config)]
  step = torch_step(config, weights, device)
  since_start, seconds = timed_steps(lambda: step(*batch), 1 + TORCH_WARMUP, config.steps, started)
  median = float(np.median(seconds))
  memory = {"peak_device_mb": torch.cuda.max_memory_allocated() / 1e6} if device == "cuda" else {}
  return {"first_step_s": since_start[0], "step_median_s": median, "step_min_s": min(seconds), "images_per_s": config.bs / median, **memory,
          "peak_process_mb": peak_process_bytes() / 1e6, "threads": torch.get_num_threads(), "device": device,
          "versions": {name: version(name) for name in ("torch", "torchvision")}}


def peak_process_bytes() -> int:
  """The most memory of the host that this process has held."""
  # On Linux ru_maxrss starts from the parent's, which would count our step's memory for the plain form.
  if (status := Path("/proc/self/status")).exists(): return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def random_batch(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """images u8 [B,H,W,3], boxes f32 [B,M,4] and labels i32 [B,M], as a loader gives them."""
  rng, canvas = np.random.default_rng(0), np.tile(np.float32(config.size), 2)
  corners = np.sort(rng.random((config.bs, config.boxes, 2, 2), np.float32), axis=2)
  boxes = (0.05 + 0.9 * corners + np.float32([[-0.05], [0.05]])).reshape(config.bs, config.boxes, 4) * canvas
  images = rng.integers(0, 256, (config.bs, *config.size[::-1], 3), np.uint8)
  return images, boxes, rng.integers(0, config.classes, (config.bs, config.boxes), np.int32)


def measure_drawing(config: Config) -> float:
  """Training pictures a second that one process draws and flips."""
  width, height = config.size
  dataset = Subset(open_dataset("shapes:2", "train", size=max(config.size)), config.loader_images)
  return loading_rate(Loader(dataset, config.bs, compose(resize(height, width), horizontal_flip()), shuffle=True))


def loading_rate(loader: Loader) -> float:
  """Pictures a second of the loader's first epoch."""
  begun = time.perf_counter()
  images = sum(int((batch.image_ids >= 0).sum()) for batch in loader.epoch(0))
  return images / (time.perf_counter() - begun)


def measure_reading(config: Config, folder: str | Path) -> dict[str, float]:
  """Training pictures a second that are read from `folder`, resized and flipped by the loader in this process, by one worker, and by Pillow alone:
  medians of several rounds in which they take turns, and those of the rounds' ratios to Pillow's."""
  width, height = config.loader_size
  dataset = Subset(open_dataset(folder, "train"), config.loader_images)
  loaders = [Loader(dataset, config.bs, compose(resize(height, width), horizontal_flip()), reduced=True, workers=workers) for workers in (0, 1)]
  files = [dataset.image_name(i) for i in range(len(dataset))]
  with ProcessPoolExecutor(1, get_context("spawn")) as pillow:   # a process of its own, for the loader sets up the memory of its processes
    rounds = [[*map(loading_rate, loaders), pillow.submit(pillow_rate, files, config.bs, width, height).result()] for _ in range(1 + READING_ROUNDS)]
  for loader in loaders: loader.close()
  rounds = rounds[1:]   # the first one warms up
  ratios = [[rate / row[-1] for rate in row[:-1]] for row in rounds]
  return dict(zip(READING, [*np.median(rounds, axis=0).tolist(), *np.median(ratios, axis=0).tolist()]))


def pillow_rate(files: list[str], batch_size: int, width: int, height: int) -> float:
  """Pictures a second, from `files` to u8 [batch_size,height,width,3], in the way of torchvision's references: decode, flip, resize, stack."""
  flips = [np.random.default_rng((0, 0, i)).random() < 0.5 for i in range(len(files))]   # the pictures that the loader mirrors
  begun = time.perf_counter()
  for first in range(0, len(files), batch_size):
    pictures = []
    for file, flip in zip(files[first:first + batch_size], flips[first:]):
      with Image.open(file) as picture: rgb = picture.convert("RGB")
      if flip: rgb = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
      pictures.append(np.asarray(rgb.resize((width, height), Image.Resampling.BILINEAR)))
    np.stack(pictures)
  return len(files) / (time.perf_counter() - begun)


def draw_folder(folder: Path, count: int) -> Path:
  """A data set in COCO layout of `count` JPEGs of 1024x768 pixels with drawn shapes, the same each time."""
  width, height = 1024, 768
  shapes = Shapes("train", 2, size=width, count=count)
  truth = shapes.ground_truth()
  (folder / "train").mkdir(parents=True)
  (folder / "annotations").mkdir()
  for i, image in enumerate(truth["images"]):
    image |= {"file_name": f"{i}.jpg", "height": height}
    Image.fromarray(shapes[i].image[:height]).save(folder / "train" / image["file_name"], quality=90)
  truth["annotations"] = [a for a in truth["annotations"] if a["bbox"][1] + a["bbox"][3] <= height]
  (folder / "annotations" / "instances_train.json").write_text(json.dumps(truth))
  return folder


def measure_postprocess(side: int, classes: int, repeats: int = 5) -> dict[str, float]:
  """Pictures a second, one at a time, from head outputs to detections, with logits drawn from normal distributions of deviation 1.

  At 800 pixels there are 120,087 anchors. With the mean of "trained" some 2,000 of the 10.9 million scores of 91 classes exceed the threshold of
  0.05; with that of "untrained", the bias that the class logits start from, half a million do, so that the largest levels have their full thousand
  candidates."""
  level_anchors, levels = anchors(side, side), level_sizes(side, side)
  rng, sizes, rates = np.random.default_rng(0), np.array([[side, side]], np.int32), {}
  noise = rng.standard_normal((1, len(level_anchors), classes), np.float32)
  deltas = Tensor(rng.standard_normal((1, len(level_anchors), 4), np.float32) * np.float32(0.2)).realize()
  for kind, mean in POSTPROCESS_MEANS.items():
    logits, seconds = Tensor(noise + np.float32(mean)).realize(), []
    for _ in range(1 + repeats):
      begun = time.perf_counter()
      select(logits, deltas, Tensor(level_anchors), levels, sizes)
      seconds.append(time.perf_counter() - begun)
    rates[kind] = 1 / float(np.median(seconds[1:]))   # the first one warms up
  return rates


def measure_apart(form: str, flags: list[str], **variables: str) -> dict[str, float] | None:
  """What the flag `form` measures, with the other `flags`, in a process of its own with these `variables`; None if it fails."""
  file = Path(CACHE.name) / f"{form.strip('-')}.json"
  rest = ["--no-baseline", "--no-torch", "--no-second-run", form, "--loader-images", "0", "--postprocess-size", "0", "--json", str(file)]
  done = subprocess.run([sys.executable, __file__, *flags, *rest], env={"DEV": Device.DEFAULT} | os.environ | variables, check=False)
  return json.loads(file.read_text())["step"] if done.returncode == 0 else None


# ---------------------------------------------------------------------------------------------------------------------------- report

ROWS = {"first_step_s": "start to first step, s", "captured_step_s": "start to first captured step, s", "step_median_s": "step, median, s",
        "step_min_s": "step, least, s", "images_per_s": "images/s", "kernels": "kernels a step", "gflop": "GFLOP a step",
        "gflop_per_s": "GFLOP/s", "peak_device_mb": "device memory, MB", "peak_process_mb": "process memory, MB", "threads": "threads"}
READING = {"ours": "in process", "worker": "a worker", "pillow": "Pillow", "ratio": "ours/Pillow", "worker_ratio": "worker/Pillow"}


def table(results: dict) -> str:
  """The numbers as text, one a line; beside them those of the plain form and of torchvision, where they were measured, and the ratios to ours."""
  columns = {"ours": results["step"]}
  if "second" in results: columns |= {"second run": results["second"]}
  if "plain" in results: columns |= {"plain": results["plain"], "plain/ours": results["ratios"]}
  if "torch" in results: columns |= {"torch": results["torch"], "ours/torch": results["torch_ratios"]}
  lines = [" " * 32 + "".join(f"{name:>12}" for name in columns)] if len(columns) > 1 else []
  for key, words in ROWS.items():
    if not any(key in column for column in columns.values()): continue
    cells = (" " * 12 if key not in column else f"{column[key]:12.{'2f' if '/' in name else '4g'}}" for name, column in columns.items())
    lines.append(f"{words:32}{''.join(cells)}".rstrip())
  lines += [f"{'loader, ' + spec + ', images/s':32}{rate:12.4g}" for spec, rate in results["loader"].items()]
  if reading := results["reading"]:
    lines.append(f"{'read at ' + show_size(results['config']['loader_size']):32}" + "".join(f"{words:>14}" for words in READING.values()))
    lines += [f"{Path(spec).name + ', images/s':32}" + "".join(f"{rates[key]:14.4g}" for key in READING) for spec, rates in reading.items()]
  lines += [f"{'postprocess, ' + kind + ', images/s':32}{rate:12.4g}" for kind, rate in results["postprocess"].items()]
  return "\n".join(lines)


def check_torch(config: Config) -> None:
  """UserError where torchvision cannot be compared with."""
  if config.backbone not in TORCH_BACKBONES:
    raise UserError(f"--backbone {config.backbone}: torchvision has none of that name to compare with, choose one of {', '.join(TORCH_BACKBONES)}")
  if config.gpus > 1: raise UserError(f"--gpus {config.gpus}: torchvision is measured on one device, choose 1 to compare")
  missing = [name for name in ("torch", "torchvision") if importlib.util.find_spec(name) is None]
  if missing: raise UserError(f"--torch: {' and '.join(missing)} not installed: pip install torch==2.13.0 torchvision, or pip install -e '.[torch]'")


def save(file: str | None, results: dict) -> None:
  """Write `results` to `file`, whole or not at all."""
  if file is None: return
  partial = Path(f"{file}.{secrets.token_hex(4)}")
  try:
    partial.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
  finally: partial.unlink(missing_ok=True)


def main(config: Config) -> None:
  if config.bs % config.gpus: raise UserError(f"--bs {config.bs}: is not a multiple of --gpus {config.gpus}")
  if config.plain + config.only_torch + (config.baseline or config.torch or config.second_run) > 1:
    raise UserError("--plain, --only-torch: each is measured instead of ours, --baseline, --torch, --second-run beside it: choose one of the three")
  if config.torch or config.only_torch: check_torch(config)
  if config.data is not None and config.data.startswith("shapes"): raise UserError(f"--data {config.data}: give a folder of files to read")
  if config.data is not None: open_dataset(config.data, "train")
  about = {"command": shlex.join([Path(__file__).name, *sys.argv[1:]]), "config": as_dict(config), "device": Device.DEFAULT,
           "machine": f"{platform.machine()}, {os.cpu_count()} cores", "load_average": os.getloadavg()[0],
           "date": datetime.now(UTC).isoformat(timespec="seconds"),
           "versions": {"python": platform.python_version(), "tinygrad": version("tinygrad"), "numpy": np.__version__}}
  form = " (plain)" if config.plain else " (torchvision)" if config.only_torch else ""
  print(f"{detector_name(config)}{form}, norm {config.norm}, {show_size(config.size)} pixels, {config.bs} pictures a step, "
        f"{config.classes} classes, {config.dtype}\n"
        f"on {config.gpus} x {Device.DEFAULT}; {about['machine']}, load average {about['load_average']:.1f}")
  print(f"settings: {describe(config) or 'the defaults'}", flush=True)

  results = about | {"step": (measure_torch if config.only_torch else measure_step)(config), "loader": {}, "reading": {}, "postprocess": {}}
  if config.loader_images:
    results["loader"]["shapes:2"] = measure_drawing(config)
    results["reading"][DRAWN] = measure_reading(config, draw_folder(Path(CACHE.name) / "drawn", min(24, config.loader_images)))
    if config.data is not None: results["reading"][config.data] = measure_reading(config, config.data)
  if config.postprocess_size: results["postprocess"] = measure_postprocess(config.postprocess_size, config.postprocess_classes)
  save(config.json, results)
  if config.second_run:
    print("the second run:", flush=True)
    if (second := measure_apart("--no-plain", sys.argv[1:], BENCH_CACHES=CACHES)) is not None:
      results["second"] = second
      save(config.json, results)
    else: print("the second run failed")
  if config.baseline:
    print("the plain form:", flush=True)
    if (plain := measure_apart("--plain", sys.argv[1:])) is not None:
      results |= {"plain": plain, "ratios": {key: plain[key] / value for key, value in results["step"].items()}}
      save(config.json, results)
    else: print("the plain form failed: no comparison")
  if config.torch:
    print("torchvision:", flush=True)
    if (theirs := measure_apart("--only-torch", sys.argv[1:])) is not None:
      results |= {"torch": theirs, "torch_ratios": {key: value / theirs[key] for key, value in results["step"].items() if key in theirs}}
      save(config.json, results)
    else: print("torchvision failed: no comparison")
  print(table(results))


if __name__ == "__main__":
  with exit_on_user_error():
    config = parse(Config, {}, sys.argv[1:], os.environ)
    if not config.only_torch: require_device()
    main(config)
