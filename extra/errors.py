"""What a user can mend is one line and exit code 2; what we broke keeps its traceback."""
import contextlib, io, sys
from collections.abc import Iterator


class UserError(Exception):
  """Bad input from outside: the message is one line that names the file, flag or field, and the mend."""


class _Pipe(io.FileIO):
  """A stream whose reader may leave: what is written after that is dropped, and the work goes on."""
  def write(self, data) -> int:
    try: return super().write(data)
    except BrokenPipeError: return len(data)


def print_anything() -> None:
  """From now on no `print` ends the program: neither for a character that the terminal's encoding lacks, nor for a closed pipe (`| head`)."""
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if hasattr(stream, "reconfigure"): stream.reconfigure(errors="backslashreplace")
    try: number = stream.fileno()
    except (AttributeError, OSError, ValueError): continue   # not a file: a test's, a notebook's
    if number not in (1, 2) or stream.isatty(): continue
    stream.flush()
    pipe = io.BufferedWriter(_Pipe(number, "w", closefd=False))
    setattr(sys, name, io.TextIOWrapper(pipe, stream.encoding, "backslashreplace", line_buffering=True))


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
  """Print a `UserError` as one line on stderr and exit with code 2, and after Ctrl-C with 130; let every other exception through."""
  print_anything()
  try: yield
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt: sys.exit(130)
