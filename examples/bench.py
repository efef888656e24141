"""The table of docs/benchmarks.md: training and detection on this processor against torch and onnxruntime, in one command.

Each row is `bench_retinanet.py` or `bench_yolo.py` with settings of its own. A RetinaNet's step is measured in pairs of processes, ours and then
torch's; YOLO's and detection in turns of processes that wait for each other. Nothing else should be at work. `--isa avx2` keeps this program and
torch from AVX-512 where the processor has it; onnxruntime cannot be kept from it. Needs pip install -e '.[onnx,torch]'."""
import json, os, statistics, subprocess, sys, tempfile
from dataclasses import dataclass
from pathlib import Path
from tinydet.config import option, parse
from tinydet.errors import UserError, exit_on_user_error
from bench_yolo import peers, processor

# What keeps a program from AVX-512: tinygrad's CPU device is named with what its compiler may use.
VARIABLES = {"native": {}, "avx2": {"DEV": "CPU:CLANG:x86_64,native,-avx512f", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
STEPS = {"training step, RetinaNet-ResNet18, 128x128, batch 2": ["--steps", "8"],
         "training step, RetinaNet-ResNet50, 320x320, batch 4": ["--backbone", "resnet50", "--size", "320", "--bs", "4", "--steps", "3"]}
TURNS = {"training step, YOLOv8n, 320x320, batch 8": ["--train", "--size", "320", "--bs", "8", "--rounds", "7"],
         "detection, YOLOv8n, 640x640, batch 1": ["--detect", "--bs", "1", "--rounds", "15"],
         "detection, YOLOv8n, 640x640, batch 8": ["--detect", "--bs", "8", "--rounds", "5"],
         "detection, RetinaNet-ResNet50, 800x800, batch 1": ["--detect", "--network", "retinanet_resnet50_fpn", "--size", "800", "--bs", "1",
                                                             "--rounds", "5"]}


@dataclass
class Config:
  against: tuple = option(("torch", "onnxruntime"), "whom to measure against", parse=peers, show=",".join)
  isa: str = option("native", "native is what the processor has", choices=tuple(VARIABLES))
  pairs: int = option(3, "processes of ours and of torch's for a RetinaNet's step", minimum=1)


def measured(program: str, flags: list[str], isa: str, folder: str) -> dict:
  """What a benchmark wrote to its JSON file. UserError where it fails."""
  file = Path(folder) / "measured.json"
  file.unlink(missing_ok=True)
  done = subprocess.run([sys.executable, Path(__file__).with_name(program), *flags, "--json", file], env=os.environ | VARIABLES[isa],
                        capture_output=True, text=True, check=False)
  if done.returncode or not file.is_file():
    raise UserError(f"{program} {' '.join(flags)}: {(done.stderr.strip().splitlines() or ['it ended without a word'])[-1]}")
  return json.loads(file.read_text(encoding="utf-8"))


def row(what: str, peer: str, ours: list[float], theirs: list[float]) -> str:
  """Medians in seconds and the ratio of times, ours to the peer's; in brackets the least and the largest."""
  ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
  return f"| {what} | {statistics.median(ours):.3f} | {peer} {statistics.median(theirs):.3f} | {statistics.median(ratios):.2f} " \
         f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |"


def main(config: Config) -> None:
  print(f"{processor()}, {len(os.sched_getaffinity(0))} of its cores, load {os.getloadavg()[0]:.1f}; --isa {config.isa}\n")
  print("| what | ours, s | the peer, s | ours / the peer's time |\n| --- | --- | --- | --- |", flush=True)
  with tempfile.TemporaryDirectory(prefix="bench-") as folder:
    for what, flags in STEPS.items():
      found = [measured("bench_retinanet.py", [*flags, "--loader-images", "0", "--postprocess-size", "0", *["--torch"] * ("torch" in config.against)],
                        config.isa, folder) for _ in range(config.pairs)]
      if "torch" in config.against:
        print(row(what, "torch", [f["step"]["step_median_s"] for f in found], [f["torch"]["step_median_s"] for f in found]))
      first = sorted(f["step"]["captured_step_s"] for f in found)
      print(f"| the same, start to first captured step, cold | {statistics.median(first):.1f} ({first[0]:.1f} to {first[-1]:.1f}) | | |", flush=True)
    for what, flags in TURNS.items():
      against = [peer for peer in config.against if peer == "torch" or "--train" not in flags]
      if "--network" in flags: against = [peer for peer in against if peer != "torch"]
      if not against: continue
      (turns,) = measured("bench_yolo.py", [*flags, "--no-second-process", "--against", ",".join(against)], config.isa, folder).values()
      for peer in against: print(row(what, peer, [turn["ours"] for turn in turns], [turn[peer] for turn in turns]), flush=True)


if __name__ == "__main__":
  with exit_on_user_error(): main(parse(Config, {}, sys.argv[1:], os.environ))
