"""Write a detector for other programs: an ONNX file, a C file, or its weights alone.

  python examples/export.py --weights runs/mine --out mine.onnx
  python examples/export.py --weights runs/mine --out mine.onnx --outputs detections --no-preprocess
  python examples/export.py --weights runs/mine --out mine.c        then: cc -O3 -march=native mine.c -o mine -lm && ./mine picture.ppm
  python examples/export.py --weights runs/mine --out mine.pth

The file's name says which. An ONNX file takes any number of pictures of one size; it is run once in onnxruntime on a picture (--check) and compared
before it gets its name (pip install -e '.[onnx]'). It takes images u8 [batch,H,W,3] RGB, or without pre-processing f32 [batch,3,H,W] as the network
does, and gives what the network says (raw), boxes [batch,N,4] xyxy pixels and scores [batch,N,K] of all candidates (decoded), or rows of picture,
x1, y1, x2, y2, score, class (detections), after non-maximum suppression where the detector needs any.

A C file needs a compiler and nothing else. It takes one picture of one size and gives decoded candidates; what the network learned lies beside it in
a .bin. Its program prints the objects on a picture in the PPM format, which every converter of pictures writes.

For torch, of the network that this program names (K classes):

  model = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=K)
  model.load_state_dict(torch.load("mine.pth", weights_only=True), strict=True)"""
import os, sys
from dataclasses import dataclass
from pathlib import Path
from tinydet.config import named_sources, option, parse, show_size, size as parse_size
from tinydet.datasets.shapes import Shapes
from tinydet.detectors import open_detector
from tinydet.errors import UserError, exit_on_user_error
from tinydet.export import compare, write_c, write_onnx
from tinydet.predict import read_picture
from tinydet.weights.weights import WRITERS, export_weights


@dataclass
class Config:
  weights: str = option("shapes", "shapes (ships with the code), coco, mlperf, a file or the folder of a run; for weights alone imagenet too",
                        group="model")
  variant: str = option("v1", "which of torchvision's networks --weights coco is: RetinaNet v1 or v2, or FCOS", choices=("v1", "v2", "fcos"),
                       group="model")
  architecture: str = option("retinanet_resnet50_fpn", "for weights alone: which network, for a published name", group="model")
  size: tuple | None = option(None, "pixels the network sees: 800, or width x height as 192x144; by default what the weights were trained with",
                              parse=parse_size, show=show_size, group="model")
  out: str = option("detector.onnx", f"file to write: .onnx, .c, {', '.join(WRITERS)}", group="file")
  half: bool = option(False, "for weights alone: write float16", group="file")
  outputs: str = option("decoded", "what the file computes", choices=("raw", "decoded", "detections"), group="file")
  preprocess: bool = option(True, "take pictures as bytes, rather than what the network takes", group="file")
  score_threshold: float = option(0.05, "with --outputs detections, drop what scores less", minimum=0, maximum=1, group="file")
  nms_threshold: float | None = option(None, "with --outputs detections, drop what overlaps a better one of its class with an IoU above this; by "
                                       "default the detector's own", minimum=0, maximum=1, group="file")
  max_detections: int = option(300, "with --outputs detections, most of a class on a picture", minimum=1, group="file")
  check: str | None = option(None, "picture to compare on; by default an embedded one", group="file")


def main(config: Config) -> None:
  suffix = Path(config.out).suffix.lower()
  if suffix in WRITERS:
    name, tensors, notes = export_weights(config.weights, config.architecture, config.out, config.half)
    for note in notes: print(f"note: {note}")
    return print(f"{config.out}: {name}, {len(tensors)} tensors, {sum(v.nbytes for v in tensors.values()) / 1e6:.1f} MB")
  if suffix not in (".onnx", ".c"): raise UserError(f"--out {config.out}: end it with .onnx or .c or {' or '.join(WRITERS)}")
  if suffix == ".c" and config.outputs != "decoded": raise UserError(f"--outputs {config.outputs}: a C file gives decoded candidates")
  if suffix == ".c" and not config.preprocess: raise UserError("--no-preprocess: a C file takes pictures as bytes")
  detector, about, notes = open_detector(config.weights, config.variant)
  for note in notes: print(f"note: {note}")
  size = config.size or about.get("size")
  if size is None: raise UserError(f"{about['weights']}: does not say what size it was trained at; give --size")
  fit = detector.fit(tuple(size))
  picture = read_picture(config.check) if config.check else Shapes("val", 1, size=128, count=1)[0].image
  image = fit.place(picture).image
  if suffix == ".c":
    worst = write_c(config.out, detector, image, config.nms_threshold)
    checked = "not tried: there is no compiler here" if worst is None else f"within {worst:.1g} of this program's"
    return print(f"{config.out} and {Path(config.out).with_suffix('.bin').name}: {detector.name}, pictures of {fit}; {checked}")
  options = {"score_threshold": config.score_threshold, "nms_threshold": config.nms_threshold, "max_detections": config.max_detections}
  with write_onnx(config.out, detector, fit.canvas(), about, outputs=config.outputs, preprocess=config.preprocess, **options) as partial:
    worst = compare(partial, detector, image, outputs=config.outputs, preprocess=config.preprocess, **options)
  print(f"{config.out}: {detector.name}, {Path(config.out).stat().st_size / 1e6:.1f} MB, pictures of {fit}; {config.outputs} outputs, within "
        f"{worst:.1g} of this program's in onnxruntime")


if __name__ == "__main__":
  with exit_on_user_error(), named_sources(config := parse(Config, {}, sys.argv[1:], os.environ)): main(config)
