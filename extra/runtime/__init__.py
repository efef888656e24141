"""How tinygrad is run, and every use of its private parts."""
import importlib
from typing import Any


def __getattr__(name: str) -> Any:
  """`tinydet.runtime.device` without a further import."""
  if name == "device": return importlib.import_module("tinydet.runtime.device")
  raise AttributeError(f"module 'tinydet.runtime' has no attribute {name!r}")
