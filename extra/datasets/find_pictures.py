"""Where the pictures are that annotations name: as they say it, or as near as tools and moved folders leave it."""
import contextlib, os, re, unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from tinydet.datasets.problems import Problems, shown

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")   # in any case
UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")   # what Label Studio puts before the name of an uploaded file
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}   # our name -> names met in folders
UNSAFE_PATH = re.compile(r"^$|^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)|[\0-\x1f\x7f\ud800-\udfff]")   # empty, absolute, climbing, not a name


def is_picture(name: str) -> bool: return name.lower().endswith(SUFFIXES)


def folders_in(folder: str | Path) -> dict[str, Path]:
  """The folders in `folder` that are not hidden, by their names in small letters."""
  def is_folder(entry: os.DirEntry) -> bool:
    with contextlib.suppress(OSError): return entry.is_dir()   # a link to itself
    return False
  return {e.name.lower(): Path(e.path) for e in sorted(os.scandir(folder), key=lambda e: e.name) if not e.name.startswith(".") and is_folder(e)}


def walk_files(folder: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
  """Files below `folder` with one of `suffixes` (any case), as sorted paths relative to it with "/"; a folder that is called like one is among them,
  for its reader to report. Hidden ones, and links to folders, are passed over."""
  found = []
  for here, folders, files in os.walk(folder):
    inside, wrong = os.path.relpath(here, folder), [name for name in folders if name.lower().endswith(suffixes)]
    folders[:] = [name for name in folders if not name.startswith(".") and name not in wrong]
    names = [name for name in [*files, *wrong] if not name.startswith(".") and name.lower().endswith(suffixes)]
    found += names if inside == "." else [f"{inside}/{name}".replace(os.sep, "/") for name in names]
  return sorted(found)


def of_another_split(path: str, split: str) -> bool:
  """Whether a relative path leads through a folder of another split than `split`, "train", "val" or "test"; never for any other."""
  others = {name for ours, names in SPLIT_NAMES.items() if split in SPLIT_NAMES and ours != split for name in names}
  return any(re.sub(r"\d{4}$", "", part.lower()) in others for part in path.split("/")[:-1])


def find_files(folder: str | Path, names: Sequence[str]) -> tuple[list[str | None], list[str]]:
  """Where each of `names`, relative paths, is in `folder`, and the files beside them that no name stands for.

  A name that is not there stands for a file that differs in the case of its suffix, the Unicode form or the direction of the slashes only, if there
  is one such file; None otherwise. OSError where `folder` itself cannot be opened.
  """
  def spelling(name: str) -> str:
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name.replace("\\", "/")))
    return os.path.normpath(stem + suffix.lower())
  present = {entry.name for entry in os.scandir(folder)}
  for sub in {os.path.dirname(n) for name in names for n in (name, name.replace("\\", "/"))} - {""}:
    with contextlib.suppress(OSError): present.update(os.path.join(sub, entry.name) for entry in os.scandir(os.path.join(folder, sub)))
  found: list[str | None] = [name if name in present else None for name in names]
  if None in found:
    similar: dict[str, list[str]] = {}
    for name in present: similar.setdefault(spelling(name), []).append(name)
    for i, name in enumerate(names):
      if found[i] is None and len(candidates := similar.get(spelling(name), [])) == 1: found[i] = candidates[0]
  return found, sorted(present.difference(found))


def find_pictures(problems: Problems, folder: str | Path, names: Sequence[str | None], roots: Sequence[str | Path], field: str,
                  split: str = "") -> tuple[list[str | None], list[str]]:
  """Where each of `names` is, as a path relative to `folder` (None where it is not found, which is reported), and what `find_files` says is unused.

  `names` are what `field` of the annotations says. One that is not in `folder` is looked for from `roots` too, without what an address, a web server
  or another machine put before it, and at last by its own name below `roots`, if one file alone has the most folders of the path in common: tools
  write absolute paths, addresses, and paths from where they were started. Whatever is not found as it is written is an oddity. Folders of other
  splits than `split` are not looked into: pictures of one name are other pictures there.
  """
  unsafe = {name for name in set(names) - {None} if UNSAFE_PATH.search(name)}
  safe = [i for i, name in enumerate(names) if name is not None and name not in unsafe]
  found: list[str | None] = [None] * len(names)
  there, unused = find_files(folder, [names[i] for i in safe])
  for i, file in zip(safe, there): found[i] = file
  problems.odd(f"{field} found in another spelling", [names[i] for i, file in zip(safe, there) if file not in (None, names[i])], shown)
  lost = [i for i, name in enumerate(names) if name is not None and found[i] is None]
  elsewhere = _Elsewhere(folder, roots, split) if lost else None
  as_written, moved, several = [], [], []
  for i in lost:
    file, candidates = elsewhere.find(names[i])
    if file is not None: found[i] = file
    kind = several if candidates else [] if file is None else as_written if elsewhere.as_written(names[i]) else moved
    kind.append((names[i], file or " and ".join(sorted(candidates)[:2])))
  problems.note(f"{field} that begin at another folder than {folder}", as_written, lambda pair: f"{shown(pair[0])} is {shown(pair[1])}")
  problems.odd(f"{field} found elsewhere", moved, lambda pair: f"{shown(pair[0])} is {shown(pair[1])}")
  missing = [names[i] for i in lost if found[i] is None]
  problems.error(f"{field} is no path inside the image folder", sorted(unsafe.intersection(missing)), lambda n: shown(n) or "''")
  alike = {name: f"{shown(name)} ({files} are both called so)" for name, files in several}
  problems.error(f"{field} missing in {folder}", [name for name in missing if name not in unsafe], lambda n: alike.get(n) or shown(n))
  return found, [name for name in unused if name not in set(found)] if lost else unused


class _Elsewhere:
  """The pictures below some folders, to be found by what is left of a path."""
  def __init__(self, folder: str | Path, roots: Sequence[str | Path], split: str):
    self.folder, self.roots, self.split = folder, list(dict.fromkeys(map(Path, roots))), split
    self._by_name: dict[str, set[str]] | None = None   # made when it is needed: own name -> paths relative to `folder`

  def find(self, name: str) -> tuple[str | None, set[str]]:
    """The file, relative to the folder, that `name` stands for, or None and the files that it may be."""
    paths = list(dict.fromkeys(_meant(name)))
    for path in paths:
      if UNSAFE_PATH.search(path): continue
      for root in (Path(self.folder), *self.roots):
        if os.path.isfile(root/path): return self._relative(root/path), set()
    for path in paths:
      if (file := self._by_own_name(path))[0] or file[1]: return file
    return None, set()

  def as_written(self, name: str) -> bool:
    """Whether one of the folders has `name`, as it is."""
    return not UNSAFE_PATH.search(name) and any(os.path.isfile(root/name) for root in self.roots)

  def _by_own_name(self, path: str) -> tuple[str | None, set[str]]:
    if self._by_name is None:
      self._by_name = {}
      for root in self.roots:
        for file in walk_files(root):
          if not of_another_split(file, self.split): self._by_name.setdefault(_key(file), set()).add(self._relative(root/file))
    parts = [unicodedata.normalize("NFC", part) for part in path.split("/") if part]
    candidates = self._by_name.get(_key(path), set()) if parts else set()
    common = {file: _common(parts[:-1], file.split("/")[:-1]) for file in candidates}
    best = {file for file, count in common.items() if count == max(common.values())}
    return (next(iter(best)), set()) if len(best) == 1 else (None, best)

  def _relative(self, path: Path) -> str: return os.path.relpath(path, self.folder).replace(os.sep, "/")


def _meant(name: str) -> Iterator[str]:
  """The paths that a name may mean: as it is, without percent signs, an address without its server, an upload without its prefix."""
  plain = name.replace("\\", "/")
  yield plain
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", plain) or "?" in plain:
    with contextlib.suppress(ValueError):
      parts = urlsplit(plain)
      yield from parse_qs(parts.query).get("d", [])   # Label Studio's local files
      yield unquote(parts.path).lstrip("/")
  elif "%" in plain: yield unquote(plain)
  for path in [*([unquote(plain)] if "%" in plain else []), plain]:
    folder, own = os.path.split(path.partition("?")[0])
    if UPLOAD.match(own): yield f"{folder}/{UPLOAD.sub('', own)}".lstrip("/")


def _key(path: str) -> str:
  stem, suffix = os.path.splitext(unicodedata.normalize("NFC", path.rsplit("/", 1)[-1]))
  return stem + suffix.lower()


def _common(one: list[str], other: list[str]) -> int:
  """How many folders two paths have in common, counted from their ends."""
  count = 0
  while count < min(len(one), len(other)) and one[-1 - count] == unicodedata.normalize("NFC", other[-1 - count]): count += 1
  return count
