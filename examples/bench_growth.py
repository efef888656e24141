"""Measure how the cost of a RetinaNet training step grows with the pictures' size, the batch, the classes and the boxes on a picture, and that of
post-processing with the classes.

Each row is measured by `bench_retinanet.py` in a process of its own, from cold caches. tinygrad's own variables work as ever: DEV=CUDA, BEAM=2."""
import json, os, subprocess, sys, tempfile
from dataclasses import dataclass
from pathlib import Path
from tinydet.errors import exit_on_user_error
from tinydet.models import classifiers
from tinydet.nn.layers import NORMS
from tinydet.config import new_file, option, parse

BASE = {"size": 128, "bs": 2, "classes": 10, "boxes": 10}
SWEEPS = {"size": (128, 192, 256, 320), "bs": (1, 2, 4, 8), "classes": (10, 91, 264, 1000), "boxes": (1, 10, 100, 1000)}
STEP = {"step_median_s": "step, s", "first_step_s": "first step, s", "kernels": "kernels", "gflop": "GFLOP", "peak_device_mb": "device, MB"}


@dataclass
class Config:
  backbone: str = option("resnet10_quarter", "the classifier underneath", choices=classifiers.NAMES)
  norm: str = option("frozen", "the backbone's norm layers", choices=tuple(NORMS))
  steps: int = option(3, "steps to time after the first", minimum=1)
  postprocess_size: int = option(800, "pixels, of the picture whose outputs become detections; 0 skips it", minimum=0)
  json: str | None = option(None, "file to write the numbers to", parse=new_file)


def measure(config: Config, settings: dict[str, int], with_postprocess: bool) -> dict[str, float] | None:
  """The numbers of a step with `settings`, and with `with_postprocess` the milliseconds in which outputs for as many classes become detections; None
  where it failed."""
  post = config.postprocess_size if with_postprocess else 0
  flags = {"backbone": config.backbone, "norm": config.norm, "steps": config.steps, **settings, "loader-images": 0, "postprocess-size": post,
           "postprocess-classes": settings["classes"]}
  with tempfile.TemporaryDirectory(prefix="bench-") as folder:
    file = Path(folder) / "out.json"
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    program = str(Path(__file__).with_name("bench_retinanet.py"))
    done = subprocess.run([sys.executable, program, *words, "--json", str(file)], stdout=subprocess.DEVNULL, check=False)
    if done.returncode: return None
    results = json.loads(file.read_text())
  return results["step"] | {f"post-processing, {kind}, ms": 1000 / rate for kind, rate in results["postprocess"].items()}


def table(name: str, rows: dict[int, dict[str, float] | None]) -> str:
  """A row for each value of the setting `name`: the figures, and how many times those of the first row they are."""
  found = [row for row in rows.values() if row is not None]
  if not found: return f"{name}: all failed"
  columns = STEP | {key: key for key in found[0] if key.startswith("post-processing")}
  lines = [f"{name:>8}" + "".join(f"{words:>{max(15, len(words) + 2)}}" for words in columns.values())]
  for value, row in rows.items():
    cells = ["failed"] if row is None else [f"{row[key]:.4g} x{row[key] / found[0][key]:.2f}" for key in columns]
    lines.append(f"{value:>8}" + "".join(f"{cell:>{max(15, len(words) + 2)}}" for cell, words in zip(cells, columns.values())))
  return "\n".join(lines)


def main(config: Config) -> None:
  print(f"{config.backbone}, norm {config.norm}; where a table does not say otherwise: " + ", ".join(f"{k} {v}" for k, v in BASE.items()))
  print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}", flush=True)
  results: dict[str, dict[int, dict[str, float] | None]] = {}
  for name, values in SWEEPS.items():
    results[name] = {value: measure(config, BASE | {name: value}, name == "classes") for value in values}
    print(table(name, results[name]), flush=True)
    if config.json is not None: Path(config.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  with exit_on_user_error(): main(parse(Config, {}, sys.argv[1:], os.environ))
