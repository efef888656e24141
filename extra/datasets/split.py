"""Training and validation pictures of a data set that does not say which are which: by a hash of their names, and as a run kept it."""
import hashlib, json, os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from tinydet.datasets.find_pictures import UPLOAD
from tinydet.datasets.problems import shown
from tinydet.datasets.subset import Part
from tinydet.download import write_whole
from tinydet.errors import UserError

VAL_SHARE = 0.2
FILE = "split.json"   # in the folder of a run


@dataclass(frozen=True)
class Rule:
  """How a data set without splits is divided: `val_share` of its pictures are "val", or else the names are `kept`, {"train": [...], "val": [...]}."""
  val_share: float = VAL_SHARE
  kept: dict[str, list[str]] | None = None


def val_names(names: Sequence[str], share: float) -> set[str]:
  """The names that are "val": those of the smallest hashes, as many as make `share` of all, at least one and not all.

  The hash is the SHA-256 of the name without folders and suffix, so that one picture more moves at most one other, and neither the machine nor the
  tool that wrote the labels matters. What Roboflow made of one picture, `name_jpg.rf.<hash>.jpg`, stays together."""
  groups: dict[str, list[str]] = {}
  for name in sorted(names): groups.setdefault(os.path.splitext(name)[0].partition(".rf.")[0], []).append(name)
  def rank(key: str) -> tuple[bytes, str]:
    own = UPLOAD.sub("", key.rsplit("/", 1)[-1])
    return hashlib.sha256(own.encode("utf-8", "surrogatepass")).digest(), key
  ranked = sorted(groups, key=rank)
  wanted, chosen = max(1, round(share * len(names))), set()
  for key in ranked[:max(1, len(ranked) - 1)]:
    if len(chosen) >= wanted: break
    chosen.update(groups[key])
  return chosen


def part_of(dataset: Any, split: str, rule: Rule, what: str) -> Part:
  """The "train" or "val" pictures of `dataset`, whose `warnings` then say how they were chosen; `what` says why they had to be. UserError where there
  are too few."""
  names = [dataset.file_name(i) for i in range(len(dataset))]
  kept = rule.kept if rule.kept and {*rule.kept["train"], *rule.kept["val"]} & set(names) else None
  if kept: val, line = set(kept["val"]), "training and validation pictures as the run has kept them"
  else:
    if len(names) < 2: raise UserError(f"{dataset.name}: one picture cannot be divided into training and validation pictures; add others")
    val = val_names(names, rule.val_share)
    line = f"{what}, so a share of {rule.val_share:g} (--val-share), by a hash of the names, is val: {len(names) - len(val)} train, {len(val)} val"
  train = set(kept["train"]) if kept else set(names) - val
  part = Part(dataset, [i for i, name in enumerate(names) if name in (val if split == "val" else train)])
  part.warnings = [*dataset.warnings, f"{dataset.name}: {line}"]
  if new := [name for name in names if name not in val and name not in train]:
    part.warnings.append(f"{dataset.name}: pictures that were not there when the run began, left out ({len(new)}): {', '.join(map(shown, new[:10]))}")
  if not len(part): raise UserError(f"{dataset.name}: no picture is left for the split '{split}'")
  part.names_by_split = {"train": sorted(train), "val": sorted(val)}
  return part


def save(folder: Path, dataset: Any, val_share: float) -> None:
  """Keep in a run's folder how `dataset`, one that `part_of` made, was divided; nothing for others, or where it was kept before."""
  while not hasattr(dataset, "names_by_split"):
    if (dataset := getattr(dataset, "dataset", None)) is None: return
  if not (folder/FILE).exists():
    write_whole(folder/FILE, json.dumps({"val_share": val_share, **dataset.names_by_split}, ensure_ascii=True, indent=1).encode())


def recall(weights: str | Path, val_share: float | None = None) -> Rule:
  """The rule of the run that made `weights`, its folder or a file in it, where it kept one; else that of `val_share`. UserError for a broken file."""
  place = Path(weights)
  file = (place if place.is_dir() else place.parent)/FILE
  if not file.is_file() or not place.exists(): return Rule(VAL_SHARE if val_share is None else val_share)
  try: kept = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as e: raise UserError(f"{file}: cannot be read ({e}); remove it to divide the pictures anew") from e
  lists = [kept.get(split) for split in ("train", "val")] if isinstance(kept, dict) else [None]
  if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
    raise UserError(f"{file}: has no lists of names 'train' and 'val'; remove it to divide the pictures anew")
  if val_share is not None and val_share != kept.get("val_share", val_share): return Rule(val_share)
  return Rule(VAL_SHARE if val_share is None else val_share, {"train": lists[0], "val": lists[1]})
