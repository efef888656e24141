"""torch and torchvision for the tests that compare with them, which are skipped where they are not installed."""
import pytest

torch = pytest.importorskip("torch")
try: import torchvision
except ImportError: pass
except RuntimeError:
  # beside a torch for processors only, PyPI's torchvision has no operators of its own, and its import stumbles over these two
  for operator in ("nms", "qnms"): torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torchvision = pytest.importorskip("torchvision")
