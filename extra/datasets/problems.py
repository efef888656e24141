"""What is wrong with a data set: gathered while it is read, and told all at once."""
import os, stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
import numpy as np
from tinydet.errors import UserError

MAX_BOXES = 10_000   # on one image; the most on any image is the length of every batch's box axis
FIRST = 10           # of a kind, so many are named


class Problems:
  """Three lists of kinds, each with its count and the first names.

  Errors make the data set meaningless: `finish` raises them all. Oddities are mended and counted; `strict` makes them errors. Notes are no faults.
  """

  def __init__(self, where: str | Path, strict: bool):
    self.where, self.strict = where, strict
    self._errors: dict[str, tuple[int, list[str]]] = {}
    self._warnings: dict[str, tuple[int, list[str]]] = {}

  def error(self, what: str, rows: Sequence, name: Callable[[Any], str] = str) -> None:
    """Add `rows` to the kind of error `what`; `name` tells what to call one of them, "" not to."""
    _add(self._errors, what, rows, name)

  def odd(self, what: str, rows: Sequence, name: Callable[[Any], str] = str) -> None:
    """Add `rows` to the kind of oddity `what`, which says how it is mended."""
    _add(self._errors if self.strict else self._warnings, what, rows, name)

  def note(self, what: str, rows: Sequence, name: Callable[[Any], str] = str) -> None:
    """Add `rows` to what a user may want to know and need not mend."""
    _add(self._warnings, what, rows, name)

  def take(self, other: "Problems") -> None:
    """Add what `other` found."""
    for mine, theirs in ((self._errors, other._errors), (self._warnings, other._warnings)):
      for what, (count, names) in theirs.items():
        before, first = mine.get(what, (0, []))
        mine[what] = before + count, [*first, *(n for n in names if n not in first)][:FIRST]

  def finish(self) -> list[str]:
    """The oddities and notes, one line a kind; UserError with all errors if there is one, in one line if they are of one kind."""
    lines = _lines(self._errors)
    if len(lines) == 1: raise UserError(f"{self.where}: {lines[0]}")
    if lines:
      total = sum(count for count, _ in self._errors.values())
      strict = ", oddities among them as --strict asks" if self.strict else ""
      raise UserError("\n  ".join([f"{self.where}: {total} problems of {len(lines)} kinds{strict}", *lines]))
    return [f"{self.where}: {line}" for line in _lines(self._warnings)]


def shown(text: Any, most: int = 120) -> str:
  """Text from a file as a part of a message: one line, bounded, nothing that moves a terminal's cursor."""
  text = repr(str(text))[1:-1]
  return text if len(text) <= most else f"{text[:most]}..."


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
  """The content of a regular file of at most `most` bytes; OSError or ValueError, saying why, for anything else (a pipe would never end)."""
  about = os.stat(path)
  if not stat.S_ISREG(about.st_mode): raise ValueError("it is not a regular file")
  if not about.st_size: raise ValueError("it is empty, zero bytes")
  if most is not None and about.st_size > most: raise ValueError(f"its {about.st_size:,} bytes are more than {most:,}")
  return Path(path).read_bytes()


def reason(error: Exception) -> str:
  """Why something could not be read, in short."""
  if isinstance(error, UnicodeDecodeError): return f"it is not {error.encoding.removesuffix('-sig').upper()} text, see byte {error.start}"
  if isinstance(error, OSError) and error.strerror: return error.strerror
  if isinstance(error, RecursionError): return "it is nested too deeply"
  return shown(error) if isinstance(error, (OSError, ValueError)) and str(error) else f"{type(error).__name__} {shown(error)}".strip()


def check_class_names(problems: Problems, names: Sequence[str]) -> None:
  """Class names are printed in tables and written to logs: text, without control characters or halves of characters."""
  problems.error("class names empty or with control characters", [n for n in names if not n.strip() or not _plain(n)], lambda n: repr(n)[:60])
  alike: dict[str, list[str]] = {}
  for name in names: alike.setdefault(" ".join(name.lower().split()), []).append(name)
  problems.odd("class names that differ in case or blanks alone, each taken as a class of its own",
               [", ".join(map(shown, several)) for several in alike.values() if len(several) > 1])


def check_boxes(problems: Problems, corners: np.ndarray, labels: np.ndarray, images: np.ndarray, sizes: np.ndarray, flat: np.ndarray,
                image_name: Callable[[int], str], box_name: Callable[[int], str]) -> np.ndarray:
  """Judge all boxes of a data set; returns bool [N], the boxes to keep.

  corners f64 [N,4] xyxy pixels; labels int [N]; images int [N], their images' indices; sizes int [I,2] (height, width) of the images; flat bool [N],
  boxes that have no area to begin with. A box written twice stays: the official score counts it twice, and in training it changes nothing.
  """
  limits = sizes[images][:, [1, 0, 1, 0]]
  clipped = corners.clip(0, limits).astype(np.float32)
  empty = flat | (clipped[:, 2:] <= clipped[:, :2]).any(1)
  outside = ~empty & (np.abs(clipped - corners).max(1, initial=0) > 1)
  order = np.lexsort([*corners.T, labels, images])
  again = np.zeros(len(order), bool)
  again[order[1:]] = True
  for column in (images, labels, *corners.T): again[order[1:]] &= column[order[1:]] == column[order[:-1]]
  beyond = empty & ~flat
  if beyond.sum() > len(beyond) / 2:
    problems.error("boxes outside their pictures, more than half of all; were they drawn on pictures of another size?", np.flatnonzero(beyond),
                   box_name)
  problems.odd("boxes without area inside their image, dropped", np.flatnonzero(empty), box_name)
  problems.odd("boxes more than 1 pixel over the border of their image, clipped", np.flatnonzero(outside), box_name)
  problems.odd("boxes written again, same image, class and corners, kept", np.flatnonzero(again & ~empty), box_name)
  counts = np.bincount(images[~empty], minlength=len(sizes))
  problems.error(f"images with more than {MAX_BOXES:,} boxes", np.flatnonzero(counts > MAX_BOXES), lambda i: f"{image_name(i)} has {counts[i]:,}")
  problems.note("images without objects, which are background", np.flatnonzero(counts == 0), image_name)
  return ~empty


def refuse_empty(dataset: Any) -> None:
  """UserError where no picture of a data set to learn from has an object."""
  if dataset.object_counts().any(): return
  passed = sum(1 for a in dataset.ground_truth()["annotations"] if a["iscrowd"] or a.get("difficult"))
  flagged = f"all {passed:,} boxes are crowd regions (iscrowd 1) or difficult objects; set those flags to 0 where an object is to be learnt"
  raise UserError(f"{dataset.name}: nothing is left to learn: {flagged if passed else 'no picture has a box; label some, or correct --data'}")


def _add(kinds: dict[str, tuple[int, list[str]]], what: str, rows: Sequence, name: Callable[[Any], str]) -> None:
  if not len(rows): return
  count, names = kinds.get(what, (0, []))
  for row in rows[:FIRST]:
    if len(names) < FIRST and (text := name(row)) and text not in names: names.append(text)
  kinds[what] = (count + len(rows), names)


def _lines(kinds: dict[str, tuple[int, list[str]]]) -> list[str]:
  return [f"{what} ({count:,})" + f": {', '.join(names)}{', ...' * (count > len(names))}" * bool(names) for what, (count, names) in kinds.items()]


def _plain(text: str) -> bool:
  return not any(c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" for c in text)
