"""Train FCOS in tinygrad, on any of torchvision's CNNs.

With no arguments it learns six shapes, from random weights, on pictures that it draws itself: a few minutes on a laptop's processor.
With `--data FOLDER` it trains on yours: COCO, Pascal VOC, YOLO or what an annotation program wrote, whichever is there (docs/layouts.md).
tinygrad's own variables work as ever: DEV=CUDA, BEAM=2, DEBUG=2."""
from dataclasses import dataclass
from tinydet import detectors
from tinydet.config import option
from tinydet.models import classifiers
from tinydet.nn.layers import NORMS
from tinydet.training import plan
from tinydet.training.detection import EMBEDDED, DetectionConfig, open_splits, start_from, train_detector
from tinydet.training.run import Run, launch

# ---------------------------------------------------------------------------------------------------------------------------- configuration


@dataclass
class Config(DetectionConfig):
  backbone: str = option("resnet18", "the classifier underneath", choices=classifiers.NAMES, group="model")
  norm: str = option("auto", "the backbone's norm layers; auto is batch where --weights is none and frozen otherwise", choices=("auto", *NORMS),
                     group="model")
  fpn_channels: int = option(0, "width of pyramid and heads; 0 is as the backbone has it: 256, 128 of a light one", minimum=0, maximum=1024,
                             group="model")


PRESETS = {
  # Shapes from random weights: the default where --data is no folder.
  "demo": {"data": "shapes:1", "size": (128, 128), "backbone": "resnet10_quarter", "norm": "batch", "lr": 3e-3, "bs": 16, "train_images": 6000,
           "epochs": 4, "eval_every": 2},
  # The default where --data is a folder, meant for a few hundred to some thousand pictures.
  "folder": {"weights": "auto", "clip_norm": 10.0},
  # torchvision's references/detection: 8 GPUs x 2 images, SGD 0.01, 26 epochs
  "coco": {"data": "coco", "size": (800, 800), "max_size": 1333, "backbone": "resnet50", "weights": "imagenet", "trainable_layers": 3, "bs": 16,
           "epochs": 26, "optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4, "norm_weight_decay": 1e-4, "schedule": "step", "milestones": (16, 22),
           "warmup": 0.136, "target": 0.392, "score_in_background": True, "workers": 8, "log_every": 50}}


# What a folder and --budget begin with on a device: what learns a few hundred pictures there in half an hour.
NETWORKS = {"processor": {"backbone": "mobilenet_v2", "fpn_channels": 64, "lr": 1e-3, "warmup": 1.0, "ema": 0.998},
            "gpu": {"backbone": "resnet50", "trainable_layers": 3, "lr": 1e-4}}


def main(config: Config, run: Run) -> None:
  plan.choose_weights(config, run, network := f"fcos_{config.backbone}_fpn")

  # ---------------------------------------------------------------------------------------------------------------------------- data
  data = train_set, _ = open_splits(config, run.ranks, run.goes_on_in)

  # ---------------------------------------------------------------------------------------------------------------------------- network
  norm = config.norm if config.norm != "auto" else "batch" if config.weights == "none" else "frozen"
  # Places lie where the cells are, but for weights that learnt torchvision's.
  detector = detectors.build(network, len(train_set.class_names), norm=norm, seed=config.seed, exact_strides=True,
                             channels=config.fpn_channels or None)
  notes = start_from(config, detector, train_set.class_names, run)
  plan.fit_machine(config, run, detector, data)
  fit = detector.fit(config.size, config.max_size)

  # ---------------------------------------------------------------------------------------------------------------------------- losses and loop
  # FCOS's losses are in extra/detectors/fcos.py: places near the middle of a box learn it (assigners.py), by focal loss, GIoU and centreness.
  train_detector(run, detector, fit, data, {}, notes)


if __name__ == "__main__": launch(Config, PRESETS, main, EMBEDDED, "backbone", networks=NETWORKS)
