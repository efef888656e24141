"""The parts of tinygrad that no document promises. Each room asks for its own here, once; where one is missing, tinygrad's plain way is taken."""
import importlib, sys, threading
from typing import Any


def take(*places: str, instead: str) -> tuple[Any, ...] | None:
  """What lies at each of `places`, "module:name" or a module. None where one of them is missing: a note on stderr then names it and says what is done
  `instead`."""
  found = []
  for place in places:
    module, _, name = place.partition(":")
    try:
      found.append(importlib.import_module(module))
      for attribute in filter(None, name.split(".")): found[-1] = getattr(found[-1], attribute)
    except (ImportError, AttributeError):
      whole = f"{module}.{name.partition('.')[0]}".rstrip(".")
      note(f"this tinygrad has no {place.replace(':', '.')}: {instead}", about=whole)
      return None
  return tuple(found)


noted: set[str] = set()
_lock = threading.Lock()


def note(text: str, about: str = "") -> None:
  """A line on stderr for what costs a run nothing but speed; only the first one `about` the same in a process."""
  with _lock:
    if (about := about or text) in noted: return
    noted.add(about)
  print(f"note: {text}", file=sys.stderr, flush=True)
