"""Break the code in small ways, one at a time, and see whether the nearest tests notice.

  python test/sabotage.py            # all of them, on a copy of the code; lists the survivors, exit code 1 if there are any
  python test/sabotage.py labels     # those whose words have "labels" in them

Each is a line of the code, what it becomes, and the tests that should fail. By hand, not in CI: some 20 minutes on two cores."""
import os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SABOTAGES = [   # what is broken; file; old and new text; tests
  # ---- trainers
  ("labels shifted by one in training", "extra/training/detection.py", "(batch.images, batch.boxes, batch.labels))",
   "(batch.images, batch.boxes, batch.labels + (batch.labels >= 0)))", "test_wiring.py"),
  ("the last, partial validation batch dropped", "extra/training/detection.py", "fit.resize(), buckets=val_buckets,",
   "fit.resize(), drop_last=True, buckets=val_buckets,", "test_wiring.py"),
  ("no shuffling", "extra/training/detection.py", "seed=config.seed, shuffle=True", "seed=config.seed, shuffle=False", "test_wiring.py"),
  ("no mirroring", "extra/training/detection.py", "[horizontal_flip(config.flip)] * (config.flip > 0)", "[]", "test_wiring.py"),
  ("no colours varied", "extra/training/detection.py", "[photometric_jitter()] * config.photometric", "[]", "test_wiring.py"),
  ("--scale-jitter ignored", "extra/training/detection.py", "if config.scale_jitter and not", "if False and not", "test_wiring.py"),
  ("validation pictures augmented", "extra/training/detection.py", "Loader(val_set, config.bs, fit.resize(),",
   "Loader(val_set, config.bs, compose(*augment),", "test_wiring.py"),
  ("no freezing of stages", "extra/training/detection.py", "detector.freeze(config.trainable_layers)", "detector.freeze(5)", "test_wiring.py"),
  ("--assigner ignored", "examples/train_retinanet.py", "assigner=config.assigner", "assigner=\"iou\"", "test_wiring.py"),
  ("--box-loss ignored", "examples/train_retinanet.py", "box_loss=config.box_loss", "box_loss=\"l1\"", "test_wiring.py"),
  ("--dtype ignored", "extra/training/detection.py", "detector(images, DTYPES[config.dtype])", "detector(images)", "test_wiring.py"),
  ("no warm-up", "extra/training/trainer.py", "warmup_steps=warmup, last", "warmup_steps=0, last", "test_wiring.py"),
  ("the two weight decays swapped", "extra/training/trainer.py",
   "weight_decay=config.weight_decay * share,\n                         norm_weight_decay=config.norm_weight_decay",
   "weight_decay=config.norm_weight_decay * share,\n                         norm_weight_decay=config.weight_decay", "test_wiring.py"),
  ("raw weights scored", "extra/training/detection.py", "with self.averaged():", "if True:", "test_wiring.py"),
  ("--weights ignored", "extra/training/detection.py", "notes = detectors.start(detector, config.weights, class_names)", "pass", "test_wiring.py"),
  ("--seed not for the weights", "examples/train_retinanet.py", "seed=config.seed, ", "", "test_wiring.py"),
  ("--stop-at-target ignored", "extra/training/run.py", "return self.config.stop_at_target and self.reached", "return False", "test_wiring.py"),
  ("the worst weights kept", "extra/training/run.py", "if not value > self.best: return", "if value > self.best >= 0: return",
   "test_wiring.py test_resume.py"),
  ("updates counted for each epoch", "extra/training/trainer.py", "updates = steps_per_epoch / config.accumulate",
   "updates = steps_per_epoch // config.accumulate", "test_resume.py"),
  ("a resumed run takes other classes", "extra/training/run.py", "if known and list(known) != now:", "if False:", "test_resume.py"),
  ("a resumed run takes another length of epochs", "extra/training/run.py", "if length != steps_per_epoch:", "if False:", "test_resume.py"),
  ("a finished run's settings rewritten", "extra/training/run.py", "None if finished else as_dict(config)", "as_dict(config)", "test_resume.py"),
  ("gradients added up without their mean", "extra/training/loop.py", "total + g / self.accumulate", "total + g", "test_loop.py"),
  ("a step in evaluation mode", "extra/training/loop.py", "with Context(TRAINING=1):\n      scalars = parts.losses(*tensors)",
   "with Context(TRAINING=0):\n      scalars = parts.losses(*tensors)", "test_loop.py test_train.py"),
  ("no checkpoint after an epoch", "extra/training/loop.py", "if ends is not None: self.save()", "pass", "test_loop.py"),
  ("momentum forgotten", "extra/training/optim.py", "momentum * first + g)\n        new", "g)\n        new", "test_optim.py"),
  ("no bias correction", "extra/training/optim.py", "(lr / correction1)", "(lr / 1)", "test_optim.py"),
  # ---- predict, scoring
  ("boxes not scaled back", "extra/detection/postprocess.py", "np.clip(boxes * ratio[:, None, [1, 0, 1, 0]], 0, limits)", "boxes",
   "test_postprocess.py"),
  ("the letterbox's border not taken off", "extra/detection/postprocess.py", "if origins is not None and np.any(origins):", "if False:",
   "test_protocol.py"),
  ("NMS at >= on the host", "extra/detection/postprocess.py", "- intersection) > threshold)", "- intersection) >= threshold)", "test_postprocess.py"),
  ("NMS at >= on the device", "extra/detection/postprocess.py", "(box_ops.iou(boxes, boxes) > nms_threshold)",
   "(box_ops.iou(boxes, boxes) >= nms_threshold)",
   "test_postprocess.py"),
  ("NMS over all classes", "extra/detection/postprocess.py", "labels * (not agnostic)", "labels * 0", "test_postprocess.py"),
  ("a worse box suppresses a better one", "extra/detection/tiles.py", "& (scores[kept] >= scores[i])", "", "test_detect.py"),
  ("difficult boxes are to be found", "extra/scoring/coco_metric.py", "again = crowd | difficult", "again = crowd", "test_coco_metric.py"),
  ("detections of an image not ranked", "extra/scoring/coco_metric.py", "order = np.lexsort((-scores, images, categories))",
   "order = np.lexsort((scores, images, categories))", "test_coco_metric.py"),
  ("crowds are to be found by the analysis", "extra/scoring/analysis.py", "~self.crowd\n", "np.ones_like(self.crowd)\n", "test_analysis.py"),
  # ---- detectors, weights
  ("classes compared by number alone", "extra/weights/weights.py", "if class_names is not None and known is not None and len(known) == there:",
   "if False:", "test_resume.py"),
  ("a misshapen tensor is let through", "extra/weights/weights.py", "if missing or unknown or misshapen:", "if missing or unknown:",
   "test_weights.py"),
  ("the constant of norms forgotten", "extra/weights/weights.py", "v + np.float32(shift)", "v", "test_weights.py"),
  ("a checksum not looked at", "extra/weights/checkpoint.py", "if about.get(\"tinydet_sha256\") != digest.hexdigest():", "if False:",
   "test_checkpoint.py"),
  ("classes of a data set taken in the file's order", "extra/detectors/__init__.py", "found = weights.match_names(wanted, known)",
   "found = list(range(len(wanted)))", "test_weights.py"),
  ("pictures prepared as ever, whatever the weights say", "extra/detectors/detector.py", "if isinstance(given, dict): self.preprocessing",
   "if False: self.preprocessing", "test_protocol.py"),
  # ---- data
  ("boxes not mirrored", "extra/datasets/transforms.py", "boxes[:, [0, 2]] = edges - sample.boxes[:, [2, 0]]", "pass", "test_transforms.py"),
  ("boxes not resized", "extra/datasets/transforms.py", "boxes=resized_boxes(sample.boxes, (h, w), (height, width))", "boxes=sample.boxes",
   "test_transforms.py"),
  ("boxes not clipped by a crop", "extra/datasets/transforms.py", "* np.array(scale * 2, np.float32)).clip(0, limits)",
   "* np.array(scale * 2, np.float32))", "test_transforms.py"),
  ("crowds in the samples", "extra/datasets/coco.py", "objects = ~self.crowd[mine]", "objects = self.crowd[mine] | True", "test_datasets.py"),
  ("VOC counted from 0", "extra/datasets/voc.py", "boxes[:, :2] -= 1", "pass", "test_datasets.py"),
  ("an orientation passed over", "extra/datasets/image.py", "upright and _untold(stored, _turn(picture))", "False", "test_datasets.py"),
  ("the same random numbers for every picture", "extra/datasets/loader.py", "Draw((self.seed, epoch, index)", "Draw((self.seed, epoch, 0)",
   "test_loader.py"),
  ("the same order in every epoch", "extra/datasets/loader.py", "np.random.default_rng((self.seed, epoch)).permutation",
   "np.random.default_rng((self.seed, 0)).permutation",
   "test_loader.py"),
  # ---- networks, mathematics
  ("frozen norms learn", "extra/nn/layers.py", "(Tensor.empty(channels).is_param_(False) for _ in range(4))",
   "(Tensor.empty(channels) for _ in range(4))",
   "test_layers.py test_models.py"),
  ("the biased variance kept", "extra/nn/layers.py", "count / max(count - 1, 1) * variance", "variance", "test_layers.py"),
  ("gradients of a stride's phases mixed", "extra/nn/conv.py", ".flip((3, 5))", "", "test_conv.py"),
  ("a box claims no anchor below half", "extra/detection/matcher.py", "(best.squeeze(1) >= FOREGROUND) | claimed", "(best.squeeze(1) >= FOREGROUND)",
   "test_detection_math.py"),
  ("no division by the positives", "extra/detection/losses.py", "(focal / positives).mean()", "focal.mean()",
   "test_detection_math.py test_models.py"),
  ("anchors where torchvision has them", "extra/detection/anchors.py", "down, right = (2 ** level,) * 2 if exact_strides else", "down, right =",
   "test_detection_math.py"),
  ("P6 from P5 always", "extra/models/fpn.py", "features[-1] if self.p6_from == \"c5\" else levels[-1]", "levels[-1]", "test_models.py"),
  # ---- settings
  ("everyday variables are settings", "extra/config.py", "(\"\" if field.name in BARE else PREFIX)", "\"\"", "test_resume.py test_config.py"),
]


def copy_of(folder: Path) -> Path:
  """The code and its tests, importable as the package without being installed: a link of its name leads to the folder."""
  for part in ("extra", "examples", "test", "docs"): shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "runs"))
  for part in ("pyproject.toml", "README.md", "setup.py"): shutil.copy(ROOT / part, folder / part)
  (folder / "tinydet").symlink_to("extra")
  return folder


def noticed(folder: Path, tests: str) -> bool:
  """Whether any of `tests` fails; an error where they cannot be run."""
  environ = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
  files = [f"test/{name}" for name in tests.split()]
  done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", *files], cwd=folder, env=environ,
                        capture_output=True, text=True, check=False, timeout=900)
  if done.returncode not in (0, 1): sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
  return done.returncode == 1


def main() -> None:
  words, survivors, count = " ".join(sys.argv[1:]), [], 0
  with tempfile.TemporaryDirectory() as work:
    folder = copy_of(Path(work))
    for what, name, old, new, tests in SABOTAGES:
      if words not in what: continue
      file, begun = folder / name, time.monotonic()
      text = file.read_text(encoding="utf-8")
      if text.count(old) < 1: sys.exit(f"{what}: {name} no longer has {old!r}; mend the list")
      file.write_text(text.replace(old, new), encoding="utf-8")
      count += 1
      caught = noticed(folder, tests)
      file.write_text(text, encoding="utf-8")
      print(f"{'noticed' if caught else 'SURVIVED'}  {time.monotonic() - begun:4.0f} s  {what}   ({name}; {tests})", flush=True)
      if not caught: survivors.append(what)
  print(f"{count} tried, {len(survivors)} survived{': ' if survivors else ''}{', '.join(survivors)}")
  sys.exit(bool(survivors))


if __name__ == "__main__": main()
