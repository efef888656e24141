"""Pictures and videos as a command line names them."""
import glob, os
from collections import Counter
from pathlib import Path
from tinydet.datasets.find_pictures import SUFFIXES
from tinydet.datasets.video import SUFFIXES as VIDEOS
from tinydet.errors import UserError

PICTURES = set(SUFFIXES)
CONVERT = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".psd", ".svg", ".pdf")   # pictures that nothing here reads
RESULTS = ({"detections.json", "images.json"}, {"explanations.json"})   # what marks a folder of results


def expand(sources: tuple[str, ...]) -> tuple[list[Path], list[Path | int]]:
  """Files of pictures, and videos and numbers of cameras, each once, in the order of the sources; a folder's in that of their names."""
  pictures: dict[Path, None] = {}
  videos: dict[Path | int, None] = {}
  for source in sources:
    path = Path(source)
    if not path.exists() and (source == "webcam" or source.isdecimal()):
      videos[0 if source == "webcam" else int(source)] = None
      continue
    matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(source, recursive=True))]
    if not matches: raise UserError(f"{source}: " + ("matches no file" if glob.has_magic(source) else "no such file or folder"))
    for match in matches:
      inside = walk(match) if match.is_dir() else []
      if path.is_dir() and not inside: raise UserError(f"{source}: holds no pictures ({' '.join(sorted(PICTURES))}); name videos one by one")
      if match.is_dir(): pictures |= dict.fromkeys(inside)
      else: (videos if match.suffix.lower() in VIDEOS else pictures)[match] = None
  return list(pictures), list(videos)


def left_unread(sources: tuple[str, ...]) -> list[str]:
  """What in the folders among the sources is not looked at, a line for each folder."""
  lines = []
  for folder in filter(os.path.isdir, sources):
    kinds: Counter = Counter()
    for _, folders, files in os.walk(folder):
      ours = any(left <= set(files) for left in RESULTS)
      folders[:] = [] if ours else [name for name in folders if not name.startswith(".")]
      suffixes = [Path(name).suffix.lower() for name in files if not name.startswith(".")]
      if not ours: kinds.update(suffix or "without suffix" for suffix in suffixes if suffix not in PICTURES)
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
    if convert := sorted(set(kinds).intersection(CONVERT)): said += f"; convert {', '.join(convert)} to JPEG or PNG"
    if kinds: lines.append(f"{folder}: files that are not looked at ({kinds.total():,}): {said}")
  return lines


def walk(folder: Path) -> list[Path]:
  """The pictures in a folder and those below it, but not what a program of this project left there."""
  found = []
  for here, folders, files in os.walk(folder):
    if any(left <= set(files) for left in RESULTS): folders[:] = []
    else: found += [Path(here, name) for name in files if Path(name).suffix.lower() in PICTURES and not name.startswith(".")]
    folders[:] = [name for name in folders if not name.startswith(".")]
  return sorted(found)
