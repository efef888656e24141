"""What each network makes of eight pictures that it is shown again and again: a detector that learns knows them by heart. By hand, not in CI:

  python test/overfit.py path/to/coco yolov8n yolov4-tiny@5e-4 ...   # or retinanet:mobilenet_v2, fcos:resnet18, retinanet:resnet18:atss; @ a rate

The folder is in COCO's layout; of the pictures whose boxes all have sides of 30 pixels at least, those with most boxes are taken. A line for each
network: mAP, AP50, epochs (of one step), seconds with compiling."""
import json, re, subprocess, sys, tempfile, time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMON = ["--size", "224", "--bs", "8", "--weights", "none", "--overfit", "--train-images", "8", "--eval-every", "25", "--warmup", "10",
          "--flip", "0", "--ema", "0", "--workers", "0", "--wandb", "disabled", "--target", "0.9", "--stop-at-target", "--pictures", "0"]
YOLO = ["--epochs", "300", "--schedule", "constant", "--lr", "2e-3", "--mosaic", "0", "--zoom", "0", "--shift", "0", "--no-hsv"]
PYRAMID = ["--epochs", "300", "--schedule", "constant", "--lr", "1e-3", "--anchors", "auto"]


def eight(folder: Path, out: Path) -> None:
  """Write eight pictures of a data set in COCO's layout as one of their own."""
  file = next((folder / "annotations").glob("instances_train*.json"))
  data, boxes = json.loads(file.read_text()), defaultdict(list)
  for annotation in data["annotations"]: boxes[annotation["image_id"]].append(annotation)
  fit = [image for image in data["images"] if (own := boxes[image["id"]]) and all(min(a["bbox"][2:]) >= 30 and not a["iscrowd"] for a in own)]
  chosen = sorted(fit, key=lambda image: (-len(boxes[image["id"]]), image["file_name"]))[:8]
  wanted = [a for image in chosen for a in boxes[image["id"]]]
  used = {a["category_id"] for a in wanted}
  (out / "annotations").mkdir(parents=True)
  for split in ("train", "val"):
    (out / split).mkdir()
    for image in chosen: (out / split / image["file_name"]).symlink_to((folder / "train2017" / image["file_name"]).resolve())
    (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(
      {"images": chosen, "annotations": wanted, "categories": [c for c in data["categories"] if c["id"] in used]}))
  print(f"{len(chosen)} pictures, {len(wanted)} boxes, {len(used)} classes", flush=True)


def learn(name: str, data: Path, out: Path) -> str:
  """Train one network and say what came of it."""
  begun = time.monotonic()
  name, _, rate = name.partition("@")
  family, _, rest = name.partition(":")
  backbone, _, assigner = rest.partition(":")
  own = ["--backbone", backbone, *PYRAMID, *(["--assigner", assigner] if assigner else [])] if backbone else ["--model", name, *YOLO]
  own += ["--lr", rate] if rate else []   # of a repeated flag the last one counts
  program = ROOT / "examples" / f"train_{family if backbone else 'yolo'}.py"
  done = subprocess.run([sys.executable, program, "--data", data, *COMMON, *own, "--out", out, "--run-name", name.replace(":", "-")],
                        capture_output=True, text=True, check=False)
  scores = re.findall(r"^epoch (\d+): mAP ([\d.]+)  mAP50 ([\d.]+)", done.stdout, re.MULTILINE)
  if done.returncode or not scores: return f"{name}: exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
  epoch, mean, half = max(scores, key=lambda row: float(row[2]))
  return f"{name}: mAP {mean}, AP50 {half} at epoch {epoch}; {time.monotonic() - begun:.0f} s"


def main() -> None:
  folder, *names = sys.argv[1:]
  with tempfile.TemporaryDirectory() as work:
    eight(Path(folder), Path(work) / "eight")
    for name in names: print(learn(name, Path(work) / "eight", Path(work) / "runs"), flush=True)


if __name__ == "__main__": main()
