"""Captured graphs in files of the user's cache folder."""
import contextlib, hashlib, itertools, os, pickle, secrets, zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from tinygrad import UOp
from tinygrad.dtype import DType
from tinydet.cache import belongs_to_user, make_folder
from tinydet.parts import note, take

MOST_BYTES = 2_000_000_000   # of all of them; the ones that were not used for longest go
FIRST = 1_000_000            # number of the first buffer in a file; a graph's inputs have lower ones
Workspace = Callable[[Any, int, DType], UOp]

_parts = take("tinygrad.uop.ops:Ops", *(f"tinygrad.uop.ops:Ops.{op}" for op in ("PARAM", "BUFFER", "PROGRAM", "LINEAR")), "tinygrad:UOp.param",
              instead="captured graphs are not kept for the next run")
if _parts: Ops = _parts[0]


def buffers_of(calls: UOp) -> list[UOp]:
  """The buffers in the arguments of `calls`, in the order in which they come."""
  return _leaves(calls, Ops.BUFFER)


def _leaves(calls: UOp, op: Any) -> list[UOp]:
  arguments = dict.fromkeys(argument for call in calls.src for argument in call.src[1:])
  return list(dict.fromkeys(u for argument in arguments for u in argument.toposort() if u.op is op))


def _replace(linear: UOp, replacements: dict[UOp, UOp]) -> UOp:
  """`linear` with the arguments of its calls replaced; what is inside kernels is not."""
  done = dict(replacements)
  def rebuilt(u: UOp) -> UOp:
    if u not in done: done[u] = u.replace(src=tuple(rebuilt(s) for s in u.src)) if u.src else u
    return done[u]
  return linear.replace(src=tuple(call.replace(src=(call.src[0], *(rebuilt(argument) for argument in call.src[1:]))) for call in linear.src))


def _bare(program: UOp) -> UOp:
  """A compiled kernel without what only its making needs."""
  if program.op is not Ops.PROGRAM: return program
  sink, instructions, source, binary = program.src
  parameters = tuple(u for u in instructions.src if u.op is Ops.PARAM)   # their shapes are the kernel's signature
  return program.replace(src=(sink.replace(src=()), instructions.replace(src=parameters), source, binary))


def save(file: Path, linear: UOp, buffers: list[UOp]) -> None:
  """Keep `linear` with numbers in place of its buffers: those that were given, then those that it works in. A full disk is not worth a word here."""
  if not _parts: return
  own = [u for u in buffers_of(linear) if u not in buffers]
  places = {u: UOp.param(FIRST + i, u.dtype, u.shape, u.device) for i, u in enumerate([*buffers, *own])}
  bare = linear.replace(src=tuple(call.replace(src=(_bare(call.src[0]), *call.src[1:])) for call in linear.src))
  body = zlib.compress(pickle.dumps((file.stem, _replace(bare, places), [(u.device, u.max_numel(), u.dtype) for u in own])), 1)
  partial = file.with_suffix(f".{secrets.token_hex(4)}")
  try:
    make_folder(file.parent)
    if not belongs_to_user(file.parent): return
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f: f.write(hashlib.sha256(body).digest() + body)
    partial.replace(file)
    _make_room(file.parent)
  except OSError:
    with contextlib.suppress(OSError): partial.unlink()


def _make_room(folder: Path) -> None:
  files = sorted(((stat.st_mtime, stat.st_size, file) for file in folder.glob("*.graph") if (stat := file.stat())), reverse=True)
  sizes = itertools.accumulate(size for _, size, _ in files)
  for (_, _, file), total in zip(files, sizes):
    if total > MOST_BYTES: file.unlink(missing_ok=True)


def load(file: Path, workspace: Workspace, buffers: list[UOp]) -> UOp | None:
  """What `save` kept, with `buffers`; None where there is nothing, or not all of it, or where others may have written it: it is code that runs."""
  if not _parts: return None
  try:
    with open(file, "rb") as f:
      if not belongs_to_user(file.parent) or not belongs_to_user(f.fileno()):
        note(f"{file.parent}: it, or a file in it, is another user's or can be written by others, so captured graphs are not kept for the next run; "
             f"mend its owner and chmod -R go-w it, or set XDG_CACHE_HOME to another folder")
        return None
      content = f.read()
    os.utime(file)
  except OSError: return None
  if hashlib.sha256(content[32:]).digest() != content[:32]: return None
  try:
    key, linear, own = pickle.loads(zlib.decompress(content[32:]))
    if key != file.stem or linear.op is not Ops.LINEAR: return None
    all_buffers = [*buffers, *(workspace(*what) for what in own)]
    places = {u: all_buffers[u.arg.slot - FIRST] for u in _leaves(linear, Ops.PARAM) if u.arg.slot >= FIRST}
    return _replace(linear, places)
  except Exception: return None   # whole, but not what is kept today: it could be anything
