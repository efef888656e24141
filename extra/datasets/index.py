"""Arrays that take long to make, kept in one file of the user's cache and mapped into memory: processes that use them share its pages."""
import contextlib, hashlib, json, mmap, os, secrets, sys, time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
import numpy as np
try: import fcntl
except ImportError: fcntl = None   # Windows: two processes may make the same file, and the later one stays

MAGIC = b"tinydet\n"
ALIGNMENT = 64
DIGEST = 32                # bytes of a SHA-256
HEAD = len(MAGIC) + DIGEST + 8
UNUSED = 30 * 24 * 3600    # seconds after which a file that nobody opened is removed

Arrays = dict[str, np.ndarray]


def write(path: Path, arrays: Arrays, about: dict[str, Any]) -> str:
  """Put `arrays` and `about` (JSON values) into the file and return its digest. It appears whole or not at all; OSError where the disk refuses. Files
  of its folder that nobody opened for a month are removed.

  The file: magic, SHA-256 of all that follows it, length of the header, header, arrays, each at a multiple of 64 bytes."""
  spans, end = {}, 0
  for name, array in arrays.items():
    spans[name] = [array.dtype.str, array.shape, end]
    end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
  header = json.dumps({"about": about, "arrays": spans, "bytes": end}).encode()
  header += b" " * (-(HEAD + len(header)) % ALIGNMENT)
  parts = [len(header).to_bytes(8, "little"), header]
  for array in arrays.values(): parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, bytes(-array.nbytes % ALIGNMENT)]
  digest = hashlib.sha256()
  for part in parts: digest.update(part)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
  try:
    with open(partial, "xb") as f:
      for part in [MAGIC, digest.digest(), *parts]: f.write(part)
      f.flush()
      os.fsync(f.fileno())
    os.replace(partial, path)
  finally: partial.unlink(missing_ok=True)
  for old in path.parent.iterdir():
    with contextlib.suppress(OSError):
      if time.time() - old.stat().st_mtime > UNUSED: old.unlink()
  return digest.hexdigest()


def read(path: Path, expected: str | None = None) -> tuple[Arrays, dict[str, Any], str] | None:
  """Arrays, which cannot be written to, `about` and the digest of a file that `write` made; None where it is missing or not whole.

  All of it is read to see that. With `expected`, the digest that another process found, it is not: what has that digest in its head is that file."""
  try:
    with open(path, "rb") as f: content = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError): return None   # ValueError: it is empty
  digest, length = content[len(MAGIC):len(MAGIC) + DIGEST].hex(), int.from_bytes(content[HEAD - 8:HEAD], "little")
  if content[:len(MAGIC)] != MAGIC or digest != (expected or hashlib.sha256(memoryview(content)[len(MAGIC) + DIGEST:]).hexdigest()): return None
  header, start = json.loads(content[HEAD:HEAD + length]), HEAD + length
  if len(content) != start + header["bytes"]: return None
  arrays = {name: np.frombuffer(content, dtype, int(np.prod(shape)), start + offset).reshape(shape)
            for name, (dtype, shape, offset) in header["arrays"].items()}
  with contextlib.suppress(OSError): os.utime(path)
  return arrays, header["about"], digest


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
  """Keep other processes from entering the block with the same `path` until this one has left it; where files cannot be locked, nobody is kept."""
  with contextlib.ExitStack() as stack:
    if fcntl is not None:
      with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(open(path.with_suffix(".lock"), "a"))
        try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          print("waiting for another process that reads the same annotations", file=sys.stderr)
          fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def digest_of(*values: Any) -> str:
  """A short name for `values` (JSON values)."""
  return hashlib.sha256(json.dumps(values).encode("utf-8", "surrogatepass")).hexdigest()[:24]
