"""COCO 2017 as it is published (https://cocodataset.org/#download): three archives, fetched and unpacked into a folder that `Coco` reads."""
import contextlib, json, os, re, shutil, zipfile, zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tinydet.datasets.image import jpeg_size
from tinydet.datasets.subset import subset_of
from tinydet.download import alone, fetch, fetch_many, free_bytes, progress, size_text, write_whole
from tinydet.errors import UserError

BASE = "http://images.cocodataset.org/"   # https there shows the certificate of another name; the checksums vouch for the files
BLOCK = 4096                              # bytes that a small file takes more than it has, at most


@dataclass(frozen=True)
class Archive:
  """A zip file below `BASE`, and what is wanted of it."""
  name: str
  checksum: str   # as `fetch` takes it
  size: int       # bytes
  members: str    # regular expression of the files wanted, as paths in the finished folder
  files: int      # so many are
  unpacked: int   # bytes that they take on a disk, about


# Several public repositories state these sizes and SHA-256 independently, and the MD5 that go with them: cced6f7f, 442b8da7 and f4bbac64.
ANNOTATIONS = Archive("annotations/annotations_trainval2017.zip", "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
                      252_907_541, r"annotations/instances_(train|val)2017\.json", 2, 489_773_314)
PICTURES = {
  "train": Archive("zips/train2017.zip", "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", 19_336_861_798,
                   r"train2017/\d{12}\.jpg", 118_287, 19_336_861_798 + 118_287 * BLOCK),
  "val": Archive("zips/val2017.zip", "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", 815_585_330,
                 r"val2017/\d{12}\.jpg", 5_000, 815_585_330 + 5_000 * BLOCK)}


def get_coco(folder: Path, splits: Sequence[str] = ("train", "val"), subset: int = 0, workers: int = 32) -> None:
  """Complete `folder` to COCO 2017's `splits`: `annotations/instances_{train,val}2017.json`, `train2017/`, `val2017/`.

  Archives go to `folder`/downloads, from where they are unpacked and then removed; what is there already is neither fetched nor written again. With
  `subset`, the first so many pictures of each split in the order of their ids, one by one, and the annotations of these. UserError, before anything
  starts where there is too little room; what came stays, and the next call goes on from there."""
  if not subset and not _wanted(folder, splits): return
  with alone(folder, "coco"):
    if subset: return _get_subset(folder, splits, subset, workers)
    wanted = _wanted(folder, splits)   # another process may have been faster
    _check_room(folder, wanted)
    for archive in wanted:
      path = fetch(BASE + archive.name, archive.checksum, folder/"downloads")
      unpack(path, archive, folder)
      path.unlink()
    with contextlib.suppress(OSError): (folder/"downloads").rmdir()


def _wanted(folder: Path, splits: Sequence[str]) -> list[Archive]:
  """The archives of which files are missing, smallest first; one that is still in `downloads` was not unpacked to the end."""
  archives = sorted([ANNOTATIONS, *(PICTURES[s] for s in splits)], key=lambda archive: archive.size)
  return [a for a in archives if _present(folder, a) < a.files or (folder/"downloads"/Path(a.name).name).exists()]


def _present(folder: Path, archive: Archive) -> int:
  """How many of the files wanted are there; the annotations of a subset do not count."""
  top = archive.members.partition("/")[0]
  try: names = [entry.name for entry in os.scandir(folder/top) if re.fullmatch(archive.members, f"{top}/{entry.name}")]
  except FileNotFoundError: return 0
  return len(names) if archive != ANNOTATIONS else sum(subset_of(folder/top/name) == 0 for name in names)


def _check_room(folder: Path, archives: list[Archive]) -> None:
  """Say what is ahead; UserError where the disk has no room for it. An archive and what it unpacks to are there at once."""
  used = peak = fetched = 0
  for archive in archives:
    name, left = Path(archive.name).name, archive.unpacked * (archive.files - min(_present(folder, archive), archive.files)) // archive.files
    here = sum(p.stat().st_size for p in (folder/"downloads"/name, folder/"downloads"/f"{name}.partial") if p.exists())
    fetched += max(0, archive.size - here)
    peak = max(peak, used + archive.size - here + left)
    used += left - here
  free, need = free_bytes(folder), f"{size_text(fetched)} to download into {folder}, {size_text(peak)} of disk at most while unpacking"
  if peak > free: raise UserError(f"coco: {need}, where {size_text(free)} are free: make room there, or choose another folder")
  print(f"coco: {need}; {size_text(free)} are free", flush=True)


def unpack(path: Path, archive: Archive, folder: Path) -> None:
  """Write the files wanted out of the zip file `path` that are not in `folder` with the same content; each is there whole or not at all.

  UserError where the zip file has not so many of them or is broken, and where the disk refuses."""
  partial = None
  try:
    with zipfile.ZipFile(path) as z:
      members = [info for info in z.infolist() if re.fullmatch(archive.members, info.filename)]
      if len(members) != archive.files: raise UserError(f"{path}: has {len(members):,} files like {archive.members}, expected {archive.files:,}")
      (target := folder/Path(members[0].filename).parent).mkdir(exist_ok=True)
      for left_over in target.glob(".*.partial"): left_over.unlink()
      with progress(f"unpacking {path.name}", 0, len(members), lambda n: f"{n:,}", 1, "files/s") as show:
        for done, info in enumerate(members, 1):
          file = folder/info.filename
          if not (file.is_file() and file.stat().st_size == info.file_size and _crc(file) == info.CRC):
            partial = file.with_name(f".{file.name}.partial")
            with z.open(info) as source, open(partial, "wb") as f: shutil.copyfileobj(source, f, 1 << 20)   # raises where the CRC differs
            os.replace(partial, file)
          show(done)
    if hasattr(os, "sync"): os.sync()   # before the archive goes
  except OSError as e: raise UserError(f"cannot unpack {path} into {folder}: {e.strerror or e}; mend that and run it again, what came is kept") from e
  except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as e:
    raise UserError(f"{path}: is broken ({e}); remove it to have it fetched again") from e
  finally:
    if partial is not None: partial.unlink(missing_ok=True)


def _crc(path: Path) -> int:
  value = 0
  with open(path, "rb") as f:
    while chunk := f.read(1 << 20): value = zlib.crc32(chunk, value)
  return value


def _get_subset(folder: Path, splits: Sequence[str], count: int, workers: int) -> None:
  files = {s: folder/"annotations"/f"instances_{s}2017.json" for s in splits}
  missing = [s for s in splits if (have := subset_of(files[s])) is None or 0 < have < count]
  if not missing: return
  print(f"coco: {size_text(ANNOTATIONS.size)} of annotations and {count:,} pictures of {' and '.join(missing)} to download into {folder}", flush=True)
  archive = fetch(BASE + ANNOTATIONS.name, ANNOTATIONS.checksum, folder/"downloads")
  for split in missing:
    with zipfile.ZipFile(archive) as z, z.open(f"annotations/{files[split].name}") as f: truth = json.load(f)
    images = sorted(truth["images"], key=lambda image: image["id"])[:count]
    kept, pictures = {image["id"] for image in images}, folder/f"{split}2017"
    pictures.mkdir(exist_ok=True)
    names = [image["file_name"] for image in images if not (pictures/image["file_name"]).exists()]
    failures = fetch_many(f"{split} pictures", BASE, ((f"{split}2017/{n}", pictures/n) for n in names), len(names),
                          workers, lambda _, data: jpeg_size(data))
    if failures: raise UserError(f"coco: {len(failures):,} of {len(names):,} {split} pictures cannot be downloaded, the first "
                                 f"{' '.join(failures[0])}: run it again, what came is kept")
    files[split].parent.mkdir(exist_ok=True)
    content = {"info": {"subset": count} | truth.get("info", {}), "images": images, "categories": truth["categories"],
               "annotations": [a for a in truth["annotations"] if a["image_id"] in kept]}
    write_whole(files[split], json.dumps(content).encode())
