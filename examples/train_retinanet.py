"""Train RetinaNet in tinygrad.

With no arguments it fine-tunes the small detector that ships with the code to shapes it has never seen: a few minutes on a laptop's processor.
With `--data FOLDER` it trains on yours: COCO, Pascal VOC, YOLO or what an annotation program wrote, whichever is there (docs/layouts.md).
tinygrad's own variables work as ever: DEV=CUDA, BEAM=2, DEBUG=2."""
from dataclasses import dataclass
from tinydet import detectors
from tinydet.config import option
from tinydet.detection.losses import BOX_LOSSES
from tinydet.detectors.retinanet import ASSIGNERS
from tinydet.models import classifiers
from tinydet.nn.layers import NORMS
from tinydet.reporting.mlperf import MLPerfLog
from tinydet.training import plan
from tinydet.training.detection import EMBEDDED, DetectionConfig, open_splits, start_from, train_detector
from tinydet.training.optim import WARMUP_FACTOR
from tinydet.training.run import Run, launch

# ---------------------------------------------------------------------------------------------------------------------------- configuration


@dataclass
class Config(DetectionConfig):
  backbone: str = option("resnet18", "the classifier underneath", choices=classifiers.NAMES, group="model")
  variant: str = option("v1", "torchvision's RetinaNet v1, or v2: P6 from C5, group norm in the heads", choices=("v1", "v2"), group="model")
  norm: str = option("auto", "the backbone's norm layers; auto is batch where --weights is none and frozen otherwise", choices=("auto", *NORMS),
                     group="model")
  fpn_channels: int = option(0, "width of pyramid and heads; 0 is as the backbone has it: 256, 128 of a light one", minimum=0, maximum=1024,
                             group="model")
  box_loss: str = option("l1", "how boxes are compared", choices=tuple(BOX_LOSSES), group="model")
  assigner: str = option("iou", "which anchor learns which box: that of most overlap, ATSS, task-aligned, SimOTA (extra/detection/assigners.py)",
                         choices=ASSIGNERS, group="model")
  mlperf_log: bool = option(False, "write mlperf.log for MLCommons' compliance checker (pip install -e '.[mlperf]')", group="run")


SHAPES = {"size": (128, 128), "backbone": "resnet10_quarter", "norm": "batch", "box_loss": "giou", "lr": 3e-3, "target": 0.6}
PRESETS = {
  # The small detector that ships with the code, fine-tuned to the six shapes of the second family: the default where --data is no folder.
  "demo": SHAPES | {"data": "shapes:2", "weights": "shapes", "trainable_layers": 3, "bs": 16, "train_images": 4000, "epochs": 4,
                    "warmup": 0.2, "eval_every": 2},
  # How that detector was made: the first family, from random weights.
  "scratch": SHAPES | {"data": "shapes:1", "bs": 16, "train_images": 6000, "epochs": 8, "log_every": 50},
  # The default where --data is a folder: the defaults above, meant for a few hundred to some thousand pictures.
  "folder": {"weights": "auto", "clip_norm": 10.0},
  # torchvision's references/detection: 8 GPUs x 2 images, SGD 0.01, 26 epochs
  "coco": {"data": "coco", "size": (800, 800), "max_size": 1333, "backbone": "resnet50", "weights": "imagenet", "trainable_layers": 3, "bs": 16,
           "epochs": 26, "optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4, "norm_weight_decay": 1e-4, "schedule": "step", "milestones": (16, 22),
           "warmup": 0.136, "target": 0.364, "score_in_background": True, "workers": 8, "log_every": 50},
  # MLCommons' single_stage_detector: 800x800, mirrored, Adam 1e-4 after an epoch of warm-up, evaluated every epoch, until mAP 0.34
  "mlperf": {"data": "openimages-mlperf", "size": (800, 800), "flip": 0.5, "backbone": "resnext50_32x4d", "norm": "frozen", "weights": "imagenet",
             "trainable_layers": 3, "box_loss": "l1", "bs": 256, "epochs": 10, "optimizer": "adam", "lr": 1e-4, "weight_decay": 0.0,
             "schedule": "constant", "warmup": 1.0, "dtype": "bf16", "eval_every": 1, "target": 0.34, "stop_at_target": True,
             "score_in_background": True, "workers": 8, "log_every": 50, "mlperf_log": True}}


# What a folder and --budget begin with on a device: what learns a few hundred pictures there in half an hour.
NETWORKS = {"processor": {"backbone": "resnet10_quarter", "box_loss": "giou", "lr": 2e-3, "warmup": 1.0},
            "gpu": {"backbone": "resnet50", "trainable_layers": 3, "lr": 1e-4}}


def main(config: Config, run: Run) -> None:
  plan.choose_weights(config, run, network := f"retinanet_{config.backbone}_fpn" + "_v2" * (config.variant == "v2"))
  recipes = {name: Config(**preset) for name, preset in PRESETS.items()}
  mlperf = MLPerfLog(config, recipes["mlperf"], WARMUP_FACTOR, config.mlperf_log and run.ranks.rank == 0)

  # ---------------------------------------------------------------------------------------------------------------------------- data
  data = train_set, _ = open_splits(config, run.ranks, run.goes_on_in)

  # ---------------------------------------------------------------------------------------------------------------------------- network
  norm = config.norm if config.norm != "auto" else "batch" if config.weights == "none" else "frozen"
  # Anchors lie where the cells are, but for weights that learnt torchvision's places.
  detector = detectors.build(network, len(train_set.class_names), norm=norm, seed=config.seed, box_loss=config.box_loss, exact_strides=True,
                             channels=config.fpn_channels or None, assigner=config.assigner)
  notes = start_from(config, detector, train_set.class_names, run)
  plan.fit_machine(config, run, detector, data)
  fit = detector.fit(config.size, config.max_size)

  # ---------------------------------------------------------------------------------------------------------------------------- losses and loop
  # RetinaNet's losses are in extra/detectors/retinanet.py: each anchor learns the box it overlaps most (matcher.py), or what --assigner gives it, by
  # focal loss and --box-loss.
  train_detector(run, detector, fit, data, recipes, notes, observers=[mlperf])


if __name__ == "__main__": launch(Config, PRESETS, main, EMBEDDED, "backbone", networks=NETWORKS)
