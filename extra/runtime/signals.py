"""What the outside asks of a running loop: to end, or to write a checkpoint. It is done between two steps, where the state is whole."""
import contextlib, os, signal, sys
from collections.abc import Iterator
from types import FrameType
from tinydet.runtime.mpi import ALONE, Ranks


class Stopped(SystemExit):
  """A run that a signal ended; the process exits with 128 and the signal's number, as shells count. `alone`: other ranks do not know of it."""
  def __init__(self, number: int, alone: bool = False):
    super().__init__(128 + number)
    self.number, self.alone = number, alone


_asked: list[bool] = []   # a checkpoint, before there was a loop to write one


@contextlib.contextmanager
def before_the_loop() -> Iterator[None]:
  """For a program from its very start: until it is inside `Signals`, SIGUSR1 is remembered, and the loop then writes a checkpoint after its first
  step; SIGTERM raises `Stopped`. Main thread only."""
  def stop(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)   # a second one does not wait for what the first one cleans up
    raise Stopped(number, alone=True)
  handlers = {"SIGTERM": stop, "SIGUSR1": lambda *_: _asked.append(True)}
  before = {number: signal.signal(number, handler) for name, handler in handlers.items() if (number := getattr(signal, name, None))}
  try: yield
  finally:
    for number, handler in before.items(): signal.signal(number, handler)
    _asked.clear()


class Signals:
  """Inside the block SIGTERM and SIGINT set `stop` to their number, and a second one ends the process at once; SIGUSR1, Slurm's warning, sets `save`.
  Main thread only. What one of the `ranks` is told holds for all of them from the next time they `agree`."""
  def __init__(self, ranks: Ranks = ALONE):
    self.stop: int | None = None
    self.told, self.save, self.ranks = False, False, ranks   # told: by a signal to this process

  def agree(self, *flags: bool) -> tuple[int, ...]:
    """All ranks: the number of the signal that is to end the run or 0, whether a checkpoint was asked for since the last time, and of each of `flags`
    whether any rank has it set."""
    wanted, self.save = self.save, False
    agreed = self.ranks.largest(self.stop or 0, wanted, *flags)
    self._learn(agreed[0])
    return agreed

  def raise_if_stopped(self) -> None:
    """All ranks: raise `Stopped` where a signal asked for it: between the batches of an evaluation, say."""
    stop, = self.ranks.largest(self.stop or 0)
    self._learn(stop)
    if stop: raise Stopped(stop)

  def __enter__(self) -> "Signals":
    handlers = {"SIGTERM": self._stop, "SIGINT": self._stop, "SIGUSR1": self._save}
    # the handlers first: what comes between is theirs
    self._before = {number: signal.signal(number, handler) for name, handler in handlers.items() if (number := getattr(signal, name, None))}
    self.save = self.save or bool(_asked)
    _asked.clear()
    return self

  def __exit__(self, *_: object) -> None:
    # A launcher signals all ranks, and this one may yet be in the midst of its checkpoint when its turn comes.
    if self.stop is not None and not self.told: return
    for number, handler in self._before.items(): signal.signal(number, handler)

  def _stop(self, number: int, _: FrameType | None) -> None:
    if self.told: os._exit(128 + number)
    self.told = True
    self._learn(number)

  def _learn(self, number: int) -> None:
    if not number or self.stop is not None: return
    self.stop = number
    # no print: its lock may be held by what was interrupted
    os.write(sys.stderr.fileno(), f"\n{signal.Signals(number).name}: ends after this step with a checkpoint; once more ends it at once\n".encode())

  def _save(self, _number: int, _frame: FrameType | None) -> None: self.save = True
