"""The large public data sets, downloaded: `python -m tinydet.datasets.download coco FOLDER`, or on first use by `--data coco`."""
import argparse, os, shlex, signal, sys
from collections.abc import Sequence
from pathlib import Path
from tinydet.cache import cache_folder
from tinydet.datasets.coco2017 import get_coco
from tinydet.datasets.openimages import get_openimages
from tinydet.errors import UserError, exit_on_user_error

DATASETS = {"coco": get_coco, "openimages-mlperf": get_openimages}   # a call completes a folder


def local_folder(data: str, data_dir: str | None = None, splits: Sequence[str] = ("train", "val"), download: bool = True) -> str:
  """`data` as `open_dataset` takes it: a name in `DATASETS` becomes its folder in `data_dir`, by default the user's cache, downloaded where it is
  not there; everything else, a folder of that name included, stays as it is. UserError as the downloads raise it, and for a folder that is not there
  where it is not to be downloaded."""
  if data not in DATASETS or os.path.isdir(data): return data
  folder = (Path(data_dir).expanduser() if data_dir else cache_folder("data"))/data
  if download: complete(data, folder, splits)
  elif not folder.is_dir():
    raise UserError(f"{data}: {folder} is not there; python -m tinydet.datasets.download {shlex.join([data, str(folder)])} downloads it")
  return str(folder)


def complete(name: str, folder: Path, splits: Sequence[str] = ("train", "val"), subset: int = 0, workers: int = 32) -> None:
  """Bring what a data set of `DATASETS` lacks into `folder`; see there. UserError."""
  try: DATASETS[name](folder, splits, subset, workers)
  except OSError as e: raise UserError(f"{name}: {e.filename or folder}: {e.strerror or e}; mend that, or choose another folder") from e


def main(argv: list[str]) -> None:
  """The program; see the module."""
  parser = argparse.ArgumentParser("python -m tinydet.datasets.download", description="Download a data set, or go on where that broke off.",
                                   epilog="TINYDET_MIRROR names a folder or URL that has the files instead.")
  parser.add_argument("name", choices=DATASETS)
  parser.add_argument("folder", nargs="?", type=Path, help="by default where --data finds it: in TINYDET_DATA_DIR, or else the user's cache folder")
  parser.add_argument("--subset", type=_count, default=0, help="only the first so many pictures of each split, for trying")
  parser.add_argument("--workers", type=_count, default=32, help="pictures to fetch at once, where they come one by one (default 32)")
  args = parser.parse_args(argv)
  home = Path(os.environ["TINYDET_DATA_DIR"]).expanduser() if os.environ.get("TINYDET_DATA_DIR") else cache_folder("data")
  folder = args.folder or home/(args.name + f"-{args.subset}" * bool(args.subset))
  complete(args.name, folder, subset=args.subset, workers=args.workers)
  print(f"{args.name} is complete in {folder}; train on it with --data {folder}")


def _count(text: str) -> int:
  if not text.isdecimal() or not 0 < int(text) < 10 ** 7: raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
  return int(text)


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # ends as Ctrl-C does
  with exit_on_user_error(): main(sys.argv[1:])
