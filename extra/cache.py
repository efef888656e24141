"""Where files lie that can be made again."""
import os, stat, sys
from pathlib import Path


def cache_folder(kind: str) -> Path:
  """The user's own folder for files of this `kind`, such as "weights". It need not exist."""
  cache = os.environ.get("XDG_CACHE_HOME") or Path.home()/("Library/Caches" if sys.platform == "darwin" else ".cache")
  return Path(cache).absolute()/"tinydet"/kind


def make_folder(folder: Path) -> None:
  """Make a `cache_folder` that is the user's alone, and what is above it; OSError where that fails."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  folder.mkdir(mode=0o700, exist_ok=True)


def belongs_to_user(file: Path | int, group: bool = False) -> bool:
  """Whether a file (a path or an open one's number) or folder is this user's, and nobody else may write to it, or nobody but its `group`, which on
  many systems is the user's alone. OSError where there is none."""
  if not hasattr(os, "getuid"): return True   # Windows keeps the folders of users apart itself
  about = os.stat(file)
  return about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWOTH if group else stat.S_IWGRP | stat.S_IWOTH)
