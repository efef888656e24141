"""What the outside asks of a running loop: to end, or to write a checkpoint. It is done between two steps, where the state is whole."""
import os, signal, sys
from types import FrameType
from tinydet.runtime.mpi import ALONE, Ranks


class Stopped(SystemExit):
  """A run that a signal ended; the process exits with 128 and the signal's number, as shells count."""
  def __init__(self, number: int):
    super().__init__(128 + number)
    self.number = number


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
    self._before = {number: signal.signal(number, handler) for name, handler in handlers.items() if (number := getattr(signal, name, None))}
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
