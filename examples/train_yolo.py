"""Train a YOLO in tinygrad: v3 to 26, of any size.

With no arguments it fine-tunes the small YOLO that ships with the code to shapes it has never seen: a few minutes on a laptop's processor.
With `--data FOLDER` it trains on yours: COCO, Pascal VOC, YOLO or what an annotation program wrote, whichever is there (docs/layouts.md).
tinygrad's own variables work as ever: DEV=CUDA, BEAM=2, DEBUG=2."""
from dataclasses import dataclass
from tinydet import detectors
from tinydet.config import option
from tinydet.detectors import yolo
from tinydet.training import plan
from tinydet.training.detection import EMBEDDED, DetectionConfig, open_splits, start_from, train_detector
from tinydet.training.run import Run, launch

# ---------------------------------------------------------------------------------------------------------------------------- configuration


@dataclass
class Config(DetectionConfig):
  model: str = option("yolov8n", "the network", choices=yolo.NAMES, group="model")
  auxiliary: bool = option(False, "train YOLOv9 (t, s, m, c) with its auxiliary layers, which are left out of best.safetensors", group="model")


AUGMENT = {"mosaic": 1.0, "zoom": 0.5, "shift": 0.1, "hsv": True}
SHAPES = {"model": "yolov8t", "size": (128, 128), "lr": 4e-3, "target": 0.66}
PRESETS = {
  # The small YOLO that ships with the code, fine-tuned to the six shapes of the second family: the default where --data is no folder.
  "demo": SHAPES | {"data": "shapes:2", "weights": "shapes-yolo", "bs": 16, "train_images": 4000, "epochs": 4, "warmup": 0.2, "eval_every": 2},
  # How that network was made: the first family, from random weights.
  "scratch": SHAPES | {"data": "shapes:1", "bs": 16, "train_images": 6000, "epochs": 10, "log_every": 50, "save_half": True},
  # The default where --data is a folder, meant for a few hundred to some thousand pictures.
  "folder": AUGMENT | {"weights": "auto", "epochs": 60, "lr": 1.5e-3, "weight_decay": 5e-4, "schedule": "linear", "last_lr": 0.01, "warmup": 3.0,
                       "clip_norm": 10.0, "ema": 0.9999, "ema_tau": 2000.0, "eval_every": 5},
}
# The published recipe of YOLOv8, v5u and 11: SGD for 64 pictures an update, mosaics but for the last 10 epochs.
COCO = AUGMENT | {"data": "coco", "size": (640, 640), "bs": 16, "nominal_bs": 64, "epochs": 500, "optimizer": "sgd", "lr": 0.01, "momentum": 0.937,
        "nesterov": True, "weight_decay": 5e-4, "schedule": "linear", "last_lr": 0.01, "warmup": 3.0, "warmup_momentum": 0.8,
        "warmup_bias_lr": 0.1, "clip_norm": 10.0, "ema": 0.9999, "ema_tau": 2000.0, "score_in_background": True, "workers": 8, "log_every": 50}
# darknet's: 64 pictures an update, whose gradients are averaged; sizes from 320 to 640 at random. Batches count as shares of COCO's epochs of 1,848.
DARKNET = {"data": "coco", "size": (480, 480), "multi_scale": 0.33, "bs": 16, "accumulate": 4, "epochs": 271, "optimizer": "sgd", "momentum": 0.9,
           "lr": 1e-3, "weight_decay": 5e-4, "schedule": "step", "milestones": (216, 243), "warmup": 0.54, "zoom": 0.3, "shift": 0.15, "hsv": True,
           "score_in_background": True, "workers": 8, "log_every": 50}
PRESETS |= {
  "coco": COCO,
  "coco-v3": DARKNET | {"model": "yolov3"},
  "coco-v4": DARKNET | {"model": "yolov4", "lr": 1.3e-3, "momentum": 0.949, "mosaic": 1.0, "close_mosaic": 0},
  "coco-v5": COCO | {"model": "yolov5n-classic", "epochs": 300, "close_mosaic": 0},
  "coco-v6": COCO | {"model": "yolov6n", "epochs": 300, "schedule": "cosine"},
  "coco-v7": COCO | {"model": "yolov7", "epochs": 300, "last_lr": 0.1, "zoom": 0.9, "shift": 0.2, "mixup": 0.15, "paste": 0.15, "close_mosaic": 0},
  "coco-v9": COCO | {"model": "yolov9s", "zoom": 0.9, "mixup": 0.15, "paste": 0.3, "close_mosaic": 15,
                      "auxiliary": True},
  "coco-v10": COCO | {"model": "yolov10n", "bs": 256, "nominal_bs": 0},
  "coco-12": COCO | {"model": "yolo12n", "epochs": 600},
  "coco-26": COCO | {"model": "yolo26n"}}   # published with MuSGD, for which SGD stands in: it would triple the kernels of a step

# What a folder and --budget begin with on a device: what learns a few hundred pictures there in half an hour.
NETWORKS = {"processor": {"model": "yolov8t", "lr": 2e-3}, "gpu": {"model": "yolov8s", "size": (640, 640)}}


def main(config: Config, run: Run) -> None:
  plan.choose_weights(config, run, config.model)
  # ---------------------------------------------------------------------------------------------------------------------------- data
  data = train_set, _ = open_splits(config, run.ranks, run.goes_on_in)

  # ---------------------------------------------------------------------------------------------------------------------------- network
  detector = detectors.build(config.model, len(train_set.class_names), seed=config.seed, auxiliary=config.auxiliary)
  notes = start_from(config, detector, train_set.class_names, run)
  plan.fit_machine(config, run, detector, data)
  fit = detector.fit(config.size, config.max_size)

  # ---------------------------------------------------------------------------------------------------------------------------- losses and loop
  # YOLO's losses are in extra/detectors/yolo.py: cells learn the boxes that they already answer for (assigners.py), by what yolo_losses.py says,
  # and anchors what anchor_losses.py says.
  train_detector(run, detector, fit, data, {}, notes)


if __name__ == "__main__": launch(Config, PRESETS, main, EMBEDDED, "model", networks=NETWORKS)
