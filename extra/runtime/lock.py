"""One process at a time in the folder of a run."""
import errno
from pathlib import Path
from typing import TextIO
from tinydet.errors import UserError
from tinydet.parts import note

try: import fcntl
except ImportError: fcntl = None   # Windows: nothing keeps a second process out

# how file systems without locks say so: Lustre without -o flock, NFS without its lock daemon, FUSE
LOCKLESS = {getattr(errno, name) for name in ("ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP", "EINVAL") if hasattr(errno, name)}


def claim(folder: Path) -> TextIO:
  """Take the folder of a run for this process, until the file returned is closed or the process ends; UserError where another process has it, or
  where nothing can be written. On a file system without locks nobody is kept out, which a note says."""
  file = None
  try:
    file = open(folder/"run.lock", "a", encoding="utf-8")
    if fcntl is not None: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    if file is not None and e.errno in LOCKLESS:
      note(f"{folder}: files cannot be locked there ({e.strerror}), so nothing keeps a second run out of it; start one at a time")
      return file
    if file is not None: file.close()
    if isinstance(e, BlockingIOError):
      raise UserError(f"{folder}: another process is running there; end it first, or choose another --run-name") from None
    raise UserError(f"{folder}: cannot be written ({e.strerror}); choose another --out, or mend its permissions") from e
  return file
