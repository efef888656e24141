"""What a user can mend is one line and exit code 2; what we broke keeps its traceback."""
import contextlib, io, os, sys
from collections.abc import Iterator


class UserError(Exception):
  """Bad input from outside: the message is one line that names the file, flag or field, and the mend."""


class _Pipe(io.TextIOWrapper):
  """A stream whose reader may leave: what is written after that is dropped, and the work goes on.

  Nothing below it is written in Python, where a signal between a write and its being known would have a line written twice."""
  def write(self, text: str) -> int:
    try: return super().write(text)
    except BrokenPipeError: return self._drop(len(text))

  def flush(self) -> None:
    try: super().flush()
    except BrokenPipeError: self._drop(0)

  def _drop(self, length: int) -> int:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, self.fileno())   # what is left in the buffers goes there too
    os.close(nowhere)
    return length


def print_anything() -> None:
  """From now on no `print` ends the program: neither for a character that the terminal's encoding lacks, nor for a closed pipe (`| head`)."""
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if hasattr(stream, "reconfigure"): stream.reconfigure(errors="backslashreplace")
    try: number = stream.fileno()
    except (AttributeError, OSError, ValueError): continue   # not a file: a test's, a notebook's
    if number not in (1, 2) or stream.isatty(): continue
    stream.flush()
    pipe = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    setattr(sys, name, _Pipe(pipe, stream.encoding, "backslashreplace", line_buffering=True))


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
  """Print a `UserError` as one line on stderr and exit with code 2, and after Ctrl-C with 130; let every other exception through."""
  print_anything()
  try: yield
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt: sys.exit(130)
