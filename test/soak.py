"""Train in many short epochs for hours and watch what a leak would show in: memory, open files, threads, shared memory.

  python test/soak.py --minutes 120

Every epoch of the detector's demo network (64x64, two loader workers) evaluates, draws, writes a report, checkpoints and best weights. Prints a line
a minute and a table at the end (docs/reliability.md has one). Exit code 1 where the run fails, or where its memory grows by more than --growth MB an
hour after its first tenth. Linux only: it reads /proc."""
import argparse, os, signal, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np

ROOT = Path(__file__).parents[1]
FLAGS = ("--data shapes:1 --weights none --size 64 --train-images 256 --bs 8 --epochs 100000 --workers 2 --log-every 20 --pictures 2 "
         "--lr 1e-4 --schedule constant").split()


def tree(root: int) -> set[int]:
  """The process and all its descendants."""
  parents = {}
  for folder in Path("/proc").glob("[0-9]*"):
    try: parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError: continue
  found = {root}
  while more := {pid for pid, parent in parents.items() if parent in found} - found: found |= more
  return found


def measure(root: int, shared: set[str]) -> dict[str, float]:
  """What the process holds alone and its descendants hold together; MB of memory, counts otherwise. Adds to `shared` their files in /dev/shm."""
  now: set[str] = set()
  values = {"memory, MB": 0.0, "memory of its workers, MB": 0.0, "open files": 0, "open files of its workers": 0, "threads": 0, "processes": 0}
  for pid in tree(root):
    try:
      status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
      memory, files = int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))
      values["threads"] += int(status["Threads"])
      now |= {line.split()[5] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line}
    except (OSError, KeyError): continue
    own = pid == root
    values["memory, MB" if own else "memory of its workers, MB"] += memory
    values["open files" if own else "open files of its workers"] += files
    values["processes"] += 1
  shared |= now
  return values | {"files in /dev/shm": len(now)}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--minutes", type=float, default=120)
  parser.add_argument("--growth", type=float, default=20, help="MB an hour")
  parser.add_argument("--every", type=float, default=60, help="seconds between two looks")
  options = parser.parse_args()
  folder = Path(tempfile.mkdtemp(prefix="soak-"))
  with open(folder / "soak.log", "w") as log:
    process = subprocess.Popen([sys.executable, str(ROOT / "examples" / "train_retinanet.py"), *FLAGS, "--run-name", "soak", "--out", str(folder)],
                               cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)})
  begun, rows, shared = time.monotonic(), [], set()
  try:
    while (minutes := (time.monotonic() - begun) / 60) < options.minutes:
      time.sleep(options.every)
      if process.poll() is not None: sys.exit(f"the run ended with {process.returncode}: {folder / 'soak.log'}")
      rows.append((minutes, measure(process.pid, shared)))
      print(f"{rows[-1][0]:6.1f} min  " + "  ".join(f"{key} {value:.0f}" for key, value in rows[-1][1].items()), flush=True)
  finally: process.send_signal(signal.SIGTERM)
  code, tail = process.wait(timeout=120), rows[len(rows) // 10:]
  epochs = sum(line.startswith("epoch ") for line in (folder / "soak.log").read_text().splitlines())
  print(f"\n{options.minutes:.0f} minutes, {epochs} epochs with an evaluation each; ended by SIGTERM with exit code {code}\n")
  print("| | after a tenth | median | at the end | most | change an hour |\n| --- | --- | --- | --- | --- | --- |")
  hours, slopes = np.array([minutes for minutes, _ in tail]) / 60, {}
  for key in tail[0][1]:
    values = np.array([row[key] for _, row in tail])
    slopes[key] = np.polyfit(hours, values, 1)[0] if len(values) > 2 else 0.0
    print(f"| {key} | {values[0]:.0f} | {np.median(values):.0f} | {values[-1]:.0f} | {values.max():.0f} | {slopes[key]:+.1f} |")
  left = [file for file in shared if os.path.exists(file)]
  print(f"\nfiles in /dev/shm afterwards: {len(left)}; logs in {folder}")
  sys.exit(code != 143 or bool(left) or any(slopes[key] > options.growth for key in slopes if key.startswith("memory")))


if __name__ == "__main__": main()
