"""Train a classifier in tinygrad: any of torchvision's CNNs, the networks underneath the detectors.

With no arguments it learns the six shapes, and background, from pictures that it draws itself: a few minutes on a laptop's processor.
With `--data FOLDER` it trains on yours, sorted as ImageNet is: train/<class>/*.jpg and val/<class>/*.jpg.
tinygrad's own variables work as ever: DEV=CUDA, BEAM=2, DEBUG=2."""
from dataclasses import dataclass
from tinydet.config import option
from tinydet.datasets import open_classes
from tinydet.datasets.loader import Loader
from tinydet.datasets.subset import Subset
from tinydet.datasets.transforms import center_crop_resize, compose, horizontal_flip, photometric_jitter, random_resized_crop
from tinydet.errors import UserError
from tinydet.models import classifiers
from tinydet.models.preprocess import MEAN, STD
from tinydet.nn.layers import NORMS
from tinydet.training.classification import train_classifier
from tinydet.training.run import Run, launch
from tinydet.training.trainer import TrainerConfig
from tinydet.weights.weights import fit, open_weights

# ---------------------------------------------------------------------------------------------------------------------------- configuration

EMBEDDED = "crops"   # how the names of embedded data sets begin


@dataclass
class Config(TrainerConfig):
  data: str = option("crops:1", "a folder with train/<class>/ and val/<class>/, or the embedded crops:1, crops:2", group="data")
  size: int = option(224, "pixels, squared, that the network sees", minimum=32, maximum=4096, group="data")
  resize: int = option(0, "shorter side of a validation picture, of which the network sees the middle; 0 is --size / 0.875", minimum=0, maximum=8192,
                       group="data")
  crop_scale: float = option(0.08, "smallest part, by area, of a training picture to show; 1 shows all of it", minimum=0.001, maximum=1, group="data")
  flip: float = option(0.5, "chance of mirroring a training picture", minimum=0, maximum=1, group="data")
  photometric: bool = option(False, "vary brightness, contrast, saturation and hue of training pictures", group="data")
  workers: int = option(2, "processes that load training pictures; 0 loads between steps", minimum=0, maximum=256, group="data")
  train_images: int = option(0, "use only so many training pictures, of all classes; 0 uses all; crops are drawn on demand, any number", minimum=0,
                             group="data")

  backbone: str = option("resnet18", "the network", choices=classifiers.NAMES, group="model")
  norm: str = option("batch", "its norm layers", choices=tuple(NORMS), group="model")
  weights: str = option("none", "where to start: none, or what train_retinanet.py takes for it: the folder of a run, a file, a published name",
                        group="model")
  label_smoothing: float = option(0.0, "share of a label that is spread over all classes", minimum=0, maximum=1, group="model")

  pictures: int = option(8, "validation pictures drawn after each evaluation", minimum=0, group="run")
  project: str = option("tinygrad-resnet", "wandb's project", group="run")


PRESETS = {
  # The backbone of the small detector, on cut-outs of the shapes that it is to find: the default where --data is no folder.
  "demo": {"size": 64, "resize": 64, "crop_scale": 0.5, "backbone": "resnet10_quarter", "bs": 32, "train_images": 12000, "epochs": 5, "lr": 3e-3,
           "warmup": 0.2, "target": 0.9},
  # The default where --data is a folder, meant for some thousand pictures.
  "folder": {"bs": 32, "epochs": 30, "crop_scale": 0.25, "warmup": 1.0, "weight_decay": 0.01, "label_smoothing": 0.1},
  # torchvision's references/classification, the recipe of its V1 weights: 8 GPUs x 32 images, SGD 0.1, 90 epochs
  "imagenet": {"data": "imagenet", "resize": 256, "backbone": "resnet50", "bs": 256, "epochs": 90, "optimizer": "sgd", "lr": 0.1,
               "weight_decay": 1e-4, "norm_weight_decay": 1e-4, "schedule": "step", "milestones": (30, 60), "warmup": 0.0, "target": 0.761,
               "workers": 16, "log_every": 50}}


def main(config: Config, run: Run) -> None:
  resize = config.resize or round(config.size / 0.875)
  if resize < config.size: raise UserError(f"--resize {resize}: is less than --size {config.size}, which is cut out of it")

  # ---------------------------------------------------------------------------------------------------------------------------- data
  if config.data.partition(":")[0] == EMBEDDED:
    train_set, val_set = open_classes(config.data, "train", count=config.train_images or 12000), open_classes(config.data, "val", count=1000)
  else:
    train_set, val_set = open_classes(config.data, "train"), open_classes(config.data, "val")
    if config.train_images: train_set = Subset(train_set, config.train_images)
  if len(train_set.class_names) < 2:
    raise UserError(f"{config.data}: has one class, {train_set.class_names[0]}; to tell pictures apart takes two")
  for warning in [*train_set.warnings, *val_set.warnings]: print(f"note: {warning}")
  augment = [random_resized_crop(config.size, config.size, (config.crop_scale, 1.0)), *[photometric_jitter()] * config.photometric,
             *[horizontal_flip(config.flip)] * (config.flip > 0)]
  share = {"workers": config.workers, "shard": (run.ranks.rank, run.ranks.size), "max_boxes": 1}
  loaders = (Loader(train_set, config.bs, compose(*augment), seed=config.seed, shuffle=True, drop_last=True, **share),
             Loader(val_set, config.bs, center_crop_resize(resize, config.size), **share))

  # ---------------------------------------------------------------------------------------------------------------------------- network
  model = classifiers.build(config.backbone, len(train_set.class_names), config.norm, config.seed)
  notes, known = model.sized(config.size), run.resumed or {}
  if config.weights != "none" and not run.resumed and run.ranks.rank == 0:
    path, tensors, known, more = open_weights(config.weights, config.backbone)
    notes += more + fit(model, tensors, path, train_set.class_names, known.get("class_names"))
  # as the pictures were that the weights learnt from
  pixels = run.ranks.broadcast(known.get("input")) or {"mean": MEAN, "std": STD}

  # ---------------------------------------------------------------------------------------------------------------------------- losses and loop
  # Cross-entropy, top-1 and top-5 are in extra/training/classification.py.
  about = {"model": config.backbone, "norm": config.norm, "resize": resize, "input": {key: list(pixels[key]) for key in ("mean", "std")}}
  train_classifier(run, model, config.backbone, (train_set, val_set), loaders, about, notes)


if __name__ == "__main__": launch(Config, PRESETS, main, EMBEDDED, "backbone", score="top1")
