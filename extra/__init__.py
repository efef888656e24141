"""Single-stage object detectors in tinygrad. `detect` finds objects on pictures, `detectors.build` makes a detector; README.md maps the rooms."""
import importlib
from typing import Any
from tinydet.runtime.imports import change_tinygrad

change_tinygrad()


def __getattr__(name: str) -> Any:
  """`detect`, and the rooms, once they are asked for: importing this package imports neither tinygrad nor numpy."""
  if name == "detect": return importlib.import_module("tinydet.predict").detect
  if name in ("config", "datasets", "detection", "detectors", "export", "models", "nn", "predict", "reporting", "runtime", "scoring", "training",
              "weights"):
    return importlib.import_module(f"tinydet.{name}")
  raise AttributeError(f"module 'tinydet' has no attribute {name!r}")
