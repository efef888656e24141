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
      note(f"this tinygrad has no {place.replace(':', '.')}: {instead}")
      return None
  return tuple(found)


noted: set[str] = set()
_lock = threading.Lock()


def note(text: str) -> None:
  """A line on stderr, once in a process, for what costs a run nothing but speed."""
  with _lock:
    if text in noted: return
    noted.add(text)
  print(f"note: {text}", file=sys.stderr, flush=True)
