"""Kill a training run at random moments, checkpoint writes among them, resume it each time, and compare it with one that nobody disturbed.

  python test/kill_and_resume.py --kills 20

Prints a table (docs/reliability.md has one). Exit code 1 where a resume failed or where a weight or metric differs in a single bit. The device must
be deterministic: a processor is."""
import argparse, contextlib, json, os, random, signal, subprocess, sys, tempfile, time
from collections.abc import Callable
from pathlib import Path
from tinydet.weights import checkpoint

ROOT = Path(__file__).parents[1]
FLAGS = ("--data shapes:1 --weights none --norm batch --size 64 --train-images 64 --bs 8 --epochs 4 --workers 1 --ema 0.9 --log-every 3 --pictures 1 "
         "--wandb disabled --accumulate 3 --save-steps 1 --resume auto").split()
CLOCK = {"seconds", "train/images_per_s", "train/memory", "eval/seconds"}   # differs between any two runs


def start(folder: Path, name: str) -> subprocess.Popen:
  with open(folder / f"{name}.log", "a") as log:
    return subprocess.Popen([sys.executable, str(ROOT / "examples" / "train_retinanet.py"), *FLAGS, "--run-name", name, "--out", str(folder)],
                            cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)})


def wait_until(process: subprocess.Popen, happens: Callable[[], bool]) -> None:
  """Return when `happens()`, when the process has ended, or after four minutes."""
  end = time.monotonic() + 240
  while process.poll() is None and time.monotonic() < end and not happens(): time.sleep(0.0005)


def writing(run: Path) -> bool:
  """Whether a checkpoint or the best weights are being written."""
  return any(".safetensors." in p.name and p.name.endswith(".partial") for p in run.glob(".*"))


def newest_step(run: Path) -> int:
  return max((int(p.stem.split("-")[1]) for p in checkpoint.checkpoints(run)), default=0)


def metrics(run: Path) -> list[dict]:
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def differences(one: Path, other: Path) -> list[str]:
  found = [] if metrics(one) == metrics(other) else ["metrics.jsonl"]
  last = f"checkpoint-{newest_step(one)}.safetensors"
  for name in ("best.safetensors", last):
    (a, _), (b, _) = checkpoint.load(one / name), checkpoint.load(other / name)
    if a.keys() != b.keys(): found.append(f"{name}: its keys")
    else: found += [f"{name}: {key}" for key in a if a[key].dtype != b[key].dtype or a[key].tobytes() != b[key].tobytes()]
  return found


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  rng, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
  if (code := start(folder, "calm").wait()) != 0: sys.exit(f"the undisturbed run failed with {code}: {folder / 'calm.log'}")
  steps = newest_step(folder / "calm")
  print(f"undisturbed: {steps} steps\n\n| kill | moment | steps saved before | and after | half-written files |", flush=True)
  print("| --- | --- | --- | --- | --- |", flush=True)
  run, killed, during = folder / "killed", 0, 0
  while killed < options.kills:
    before, kind, process = newest_step(run), rng.choice(["start", "step", "step", "write"]), start(folder, "killed")
    if kind == "start": delay, moment = rng.uniform(0, 30), "{:.1f} s after the start"
    else:
      wait_until(process, lambda before=before: newest_step(run) > before)
      delay, moment = rng.uniform(0, 8), "{:.1f} s after its first step"
    with contextlib.suppress(subprocess.TimeoutExpired): process.wait(timeout=delay)
    if kind == "write":
      wait_until(process, lambda: writing(run))
      moment = "while a file was written"
    moment = moment.format(delay)
    if (code := process.poll()) is not None:   # it came to its end before the kill: begin once more, further kills are due
      if code != 0: sys.exit(f"a resumed run failed with {code}: {folder / 'killed.log'}")
      if found := differences(folder / "calm", run): sys.exit(f"differs after {killed} kills: {', '.join(found[:5])}")
      print(f"| | ended by itself, equal to the undisturbed one; begun anew | {steps} | 0 | |", flush=True)
      run.rename(folder / f"whole-{killed}")
      continue
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed += 1
    partial = sorted(p.name.split(".")[1] for p in run.glob(".*.partial"))
    during += bool(partial)
    print(f"| {killed} | {moment} | {before} | {newest_step(run)} | {', '.join(partial) or '-'} |", flush=True)
  if (code := start(folder, "killed").wait()) != 0: sys.exit(f"the last resume failed with {code}: {folder / 'killed.log'}")
  found = differences(folder / "calm", run)
  verdict = f"DIFFERENT: {', '.join(found[:9])}" if found else "equal bit for bit"
  print(f"\n{killed} kills, {during} of them within a write: {verdict}; logs in {folder}")
  sys.exit(bool(found))


if __name__ == "__main__": main()
