"""The score of an evaluation, at once or in a process of its own while the training goes on. numpy and pycocotools only.

The process is a fresh interpreter, for the reasons that the loader's workers are (extra/datasets/loader.py)."""
import contextlib, os, signal, subprocess, sys, threading, time, traceback, weakref
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Any
from tinydet.scoring.analysis import analyse
from tinydet.scoring.coco_metric import CocoMetric, CocoResult
from tinydet.errors import UserError

NICENESS = 5   # of the process: those that feed and run the device come first

Then = Callable[[CocoResult | None, Callable[[], dict[str, Any]]], bool]


def score(metric: CocoMetric, then: Then, *, background: bool = False, here: bool = True, **options: Any) -> "bool | Pending | Elsewhere":
  """Score what `metric` holds and return what `then(result, analysis)` makes of it; in the `background`, on Linux and macOS, the `Pending` that will.

  `analysis()` is `analyse(metric, result, **options)`, or raises what that raised. Where another process has the detections of all, not `here`,
  `then` gets None for the result, at the same time as there."""
  background = background and os.name == "posix"
  if not here: return Elsewhere(then) if background else then(None, dict)
  if background: return Pending(metric, then, options)
  result = metric.compute()
  return then(result, partial(analyse, metric, result, **options))


class Elsewhere:
  """A score that another process of the run has `Pending`."""
  def __init__(self, then: Then): self._then = then
  def ready(self) -> bool: return False
  def finish(self) -> bool: return self._then(None, dict)


class Pending:
  """A score that another process is at."""

  def __init__(self, metric: CocoMetric, then: Then, options: dict[str, Any]):
    self._then = then
    self._connection, theirs = Pipe()
    program = f"from tinydet.scoring.background import serve; serve({theirs.fileno()}, {os.getpid()})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # a process group of its own keeps the terminal's Ctrl-C from it
    self._process = subprocess.Popen([sys.executable, "-P", "-c", program], env=environment, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                                     process_group=0)
    theirs.close()
    self._close = weakref.finalize(self, _end, self._process, self._connection)
    with contextlib.suppress(OSError): self._connection.send((metric, options))   # where it has died, finish() says so

  def ready(self) -> bool:
    """Whether `finish` would not wait."""
    return self._connection.poll()

  def finish(self) -> bool:
    """Wait for the score and return what `then` makes of it; UserError where the process died, as it does when memory runs out."""
    try: answer = self._connection.recv()
    except (EOFError, OSError):
      code = self._process.wait()
      reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
      raise UserError(f"the process that scored the evaluation died ({reason}); if memory ran out, resume with --no-score-in-background") from None
    finally: self._close()
    if isinstance(answer, str): raise RuntimeError(f"the process that scored the evaluation failed:\n{answer}")
    result, analysis = answer
    def give() -> dict[str, Any]:
      if isinstance(analysis, str): raise RuntimeError(analysis)
      return analysis
    return self._then(result, give)


def serve(connection_file: int, parent: int) -> None:
  """The main function of the process: score what comes, send it back, end. It ends when its `parent` does, and not at a signal to both."""
  for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
  def watch() -> None:
    while os.getppid() == parent: time.sleep(1)
    os._exit(1)
  threading.Thread(target=watch, daemon=True).start()
  os.nice(NICENESS)
  connection = Connection(connection_file)
  try:
    metric, options = connection.recv()
    try: answer: Any = metric.compute()
    except Exception: answer = traceback.format_exc()
    else:
      try: answer = answer, analyse(metric, answer, **options)
      except Exception as e: answer = answer, f"{type(e).__name__}: {e}"
    connection.send(answer)
  except (EOFError, OSError): return


def _end(process: subprocess.Popen, connection: Connection) -> None:
  connection.close()
  process.kill()
  process.wait()
