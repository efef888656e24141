"""What a user can mend is one line and exit code 2; what we broke keeps its traceback."""
import contextlib, sys
from collections.abc import Iterator


class UserError(Exception):
  """Bad input from outside: the message is one line that names the file, flag or field, and the mend."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
  """Print a `UserError` as one line on stderr and exit with code 2, and after Ctrl-C with 130; let every other exception through."""
  try: yield
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt: sys.exit(130)
