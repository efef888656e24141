"""Where files lie that can be made again."""
import os, sys
from pathlib import Path


def cache_folder(kind: str) -> Path:
  """The user's own folder for files of this `kind`, such as "weights". It need not exist."""
  cache = os.environ.get("XDG_CACHE_HOME") or Path.home()/("Library/Caches" if sys.platform == "darwin" else ".cache")
  return Path(cache).absolute()/"tinydet"/kind
