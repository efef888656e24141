"""YOLO weights that their authors published, all trained on COCO's 80 classes: `--weights yolov8n` and so on. The one table is `PUBLISHED`."""
from pathlib import Path
from typing import Any, NamedTuple
from tinydet.cache import cache_folder
from tinydet.class_names import COCO80
from tinydet.download import fetch

AGPL, GPL, FREE = "AGPL-3.0", "GPL-3.0", "public domain"


class Published(NamedTuple):
  """One file. `score` is its authors' AP50-95 in % on val2017 (darknet's: AP50) at `size` pixels, `checksum` as `download.fetch` takes it."""
  url: str
  score: float
  licence: str
  checksum: str = "unknown:"
  size: int = 640


def _all(base: str, names: str, scores: str, licence: str) -> dict[str, Published]:
  return {name: Published(f"{base}/{name}.pt", float(score), licence) for name, score in zip(names.split(), scores.split(), strict=True)}


_ASSETS = "https://github.com/ultralytics/assets/releases/download"
_V5 = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
_DARKNET, _ALEXEY = "https://pjreddie.com/media/files", "https://github.com/AlexeyAB/darknet/releases/download"
# SHA-256 of darknet's files: several public repositories state the same; for the others none is published.
PUBLISHED: dict[str, Published] = {
  "yolov3": Published(f"{_DARKNET}/yolov3.weights", 57.9, FREE, "sha256:523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297", 608),
  "yolov3-spp": Published(f"{_DARKNET}/yolov3-spp.weights", 60.6, FREE,
                          "sha256:87a1e8c85c763316f34e428f2295e1db9ed4abcec59dd9544f8052f50de327b4", 608),
  "yolov3-tiny": Published(f"{_DARKNET}/yolov3-tiny.weights", 33.1, FREE,
                           "sha256:dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c", 416),
  "yolov4": Published(f"{_ALEXEY}/darknet_yolo_v3_optimal/yolov4.weights", 65.7, FREE,
                      "sha256:e8a4f6c62188738d86dc6898d82724ec0964d0eb9d2ae0f0a9d53d65d108d562", 608),
  "yolov4-tiny": Published(f"{_ALEXEY}/yolov4/yolov4-tiny.weights", 40.2, FREE,
                           "sha256:cf9fbfd0f6d4869b35762f56100f50ed05268084078805f0e7989efe5bb8ca87", 416),
  **{f"{name}-classic": entry for name, entry in
     _all(_V5, "yolov5n yolov5s yolov5m yolov5l yolov5x", "28.0 37.4 45.4 49.0 50.7", AGPL).items()},
  **{name.removesuffix("u"): entry for name, entry in   # the files have the u, which here is the usual one
     _all(f"{_ASSETS}/v8.3.0", "yolov5nu yolov5su yolov5mu yolov5lu yolov5xu", "34.3 43.0 49.0 52.2 53.2", AGPL).items()},
  **_all("https://github.com/meituan/YOLOv6/releases/download/0.4.0", "yolov6n yolov6s yolov6m yolov6l", "37.5 45.0 50.0 52.8", GPL),
  **_all("https://github.com/WongKinYiu/yolov7/releases/download/v0.1", "yolov7", "51.2", GPL),
  **_all(f"{_ASSETS}/v8.3.0", "yolov8n yolov8s yolov8m yolov8l yolov8x", "37.3 44.9 50.2 52.9 53.9", AGPL),
  **_all(f"{_ASSETS}/v8.3.0", "yolov9t yolov9s yolov9m yolov9c", "38.3 46.8 51.4 53.0", AGPL),
  **_all(f"{_ASSETS}/v8.3.0", "yolov10n yolov10s yolov10m yolov10b yolov10l yolov10x", "38.5 46.3 51.1 52.5 53.2 54.4", AGPL),
  **_all(f"{_ASSETS}/v8.3.0", "yolo11n yolo11s yolo11m yolo11l yolo11x", "39.5 47.0 51.5 53.4 54.7", AGPL),
  **_all(f"{_ASSETS}/v8.3.0", "yolo12n yolo12s yolo12m yolo12l yolo12x", "40.6 48.0 52.5 53.7 55.2", AGPL),
  **_all(f"{_ASSETS}/v8.4.0", "yolo26n yolo26s yolo26m yolo26l yolo26x", "40.9 48.6 53.1 55.0 57.5", AGPL)}


def fetch_published(name: str) -> tuple[Path, list[str]]:
  """The file of the weights `name`, a key of PUBLISHED, in the user's cache, downloaded where it is not there yet (see `download.fetch`); and, when
  it comes for the first time, what its licence asks of who uses it, in a line."""
  entry, folder = PUBLISHED[name], cache_folder("weights")
  first = not (folder / entry.url.rpartition("/")[2]).exists()
  path = fetch(entry.url, entry.checksum, folder)
  bound = first and entry.licence != FREE
  return path, [f"{path.name}: its authors give it under {entry.licence}, which binds what is made with it and passed on or served"] * bound


def about(name: str) -> dict[str, Any]:
  """What is known of published weights, in the words of a run's metadata."""
  entry = PUBLISHED[name]
  return {"model": name, "num_classes": 80, "class_names": list(COCO80), "size": [entry.size, entry.size], "licence": entry.licence,
          "AP50" if entry.licence == FREE else "mAP": round(entry.score / 100, 6)}
