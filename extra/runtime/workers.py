"""The processes that compile kernels beside the program, in place of tinygrad's pool of them.

Python's `multiprocessing.Pool` waits for ever for what a killed process was at, and for the lock that it held. Here each process has a connection
of its own, and a thread that hands it one task after another; what one was at when it died, the program does itself."""
import atexit, contextlib, functools, itertools, multiprocessing, os, pickle, shutil, signal, subprocess, sys, tempfile, threading, traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed
from multiprocessing.connection import Connection, Pipe
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any
from tinydet.parts import note, take
from tinydet.runtime.together import batches, compile_all


MOST_TASKS = 200   # of one process, whose memory grows with them


class Died(Exception):
  """The process that had a task is gone."""


class Workers:
  """`count` processes. `start` gives them a task, `result` waits for what it returned; the other methods are what tinygrad calls on its pool."""
  def __init__(self, count: int):
    self.pid, self._tasks, self._lock, self._ending = os.getpid(), SimpleQueue(), threading.Lock(), False
    self._alive = count
    self._folder = _folder()   # for their files, which outlive a process that is killed
    try: begun = [_begin(self._folder) for _ in range(count)]
    except OSError:
      self._remove()
      raise
    self.processes = [process for process, _ in begun]
    for place, (_, connection) in enumerate(begun):
      threading.Thread(target=self._attend, args=(place, connection), daemon=True, name="compiling").start()
    atexit.register(self.terminate)

  def start(self, function: Callable, argument: Any) -> Future:
    """Have `function(argument)` called by the next process that is free. Both are pickled."""
    future: Future = Future()
    future.task = function, argument
    with self._lock:
      if self._alive: self._tasks.put(future)
      else: future.set_exception(Died())
    return future

  def result(self, future: Future) -> Any:
    """What the task of `start` returned; done here and now where its process died."""
    try: return future.result()
    except Died:
      function, argument = future.task
      return function(argument)

  def imap_unordered(self, function: Callable, arguments: Iterable) -> Iterator:
    if getattr(function, "__name__", "") != "_compile_kernel": return self._results(function, arguments)
    together = self._results(functools.partial(compile_all, function), batches(list(arguments), len(self.processes)))
    return itertools.chain.from_iterable(together)

  def _results(self, function: Callable, arguments: Iterable) -> Iterator:
    futures = [self.start(function, argument) for argument in arguments]
    try:
      for future in as_completed(futures): yield self.result(future)
    finally:
      for future in futures: future.cancel()

  def terminate(self) -> None:
    """End the processes, whatever they are at."""
    if self._ending or self.pid != os.getpid(): return   # in a fork they are not its own
    self._ending = True
    for process in self.processes: process.kill()
    for process in self.processes: process.wait()
    self._remove()

  def _remove(self) -> None:
    if self._folder: shutil.rmtree(self._folder, ignore_errors=True)

  def close(self) -> None: self.terminate()

  def _attend(self, place: int, connection: Connection) -> None:
    process = self.processes[place]
    for done in itertools.count():
      future = self._tasks.get()
      if not future.set_running_or_notify_cancel(): continue
      if done and done % MOST_TASKS == 0:
        with contextlib.suppress(OSError): connection.send_bytes(b"")   # it is gone
        connection.close()
        process.wait()
        process, connection = _begin(self._folder)
        self.processes[place] = process
      try: message = pickle.dumps(future.task)
      except Exception as e:
        future.set_exception(e)
        continue
      try:
        connection.send_bytes(message)
        answer = connection.recv_bytes()
      except (EOFError, OSError): break
      try: returned, value = pickle.loads(answer)
      except Exception as e: returned, value = False, e
      if returned: future.set_result(value)
      else: future.set_exception(value)
    process.kill()   # where it has only closed its end
    code = process.wait()
    if not self._ending:
      how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
      note(f"a process that compiles kernels died ({how}); did memory run out? What it was at is compiled by the program itself")
    with self._lock:
      self._alive -= 1
      lost = [future]
      with contextlib.suppress(Empty):
        while not self._alive: lost.append(self._tasks.get_nowait())
    for future in lost:
      if future.running() or future.set_running_or_notify_cancel(): future.set_exception(Died())


def _folder() -> str | None:
  try: return tempfile.mkdtemp(prefix="tinydet-")
  except OSError: return None


def _begin(folder: str | None) -> tuple[subprocess.Popen, Connection]:
  ours, theirs = Pipe()
  program = f"from tinydet.runtime.workers import serve; serve({theirs.fileno()}, {folder!r})"
  # A process group of its own: signals to the job are the program's to act on. It ends when its connection closes.
  process = subprocess.Popen([sys.executable, "-P", "-c", program], env={**os.environ, **_environment(folder)},
                             stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), process_group=0)
  theirs.close()
  return process, ours


def _environment(folder: str | None) -> dict[str, str]:
  """What a process needs to import what this one imports, and to find the same compiled kernels."""
  found = {"PYTHONPATH": os.pathsep.join(sys.path), "VIZ": "0", "TRACK_MATCH_STATS": "0"} | ({"CACHEDB": parts[1]} if (parts := _parts()) else {})
  return found | ({"TMPDIR": folder} if folder else {})


def _parts() -> tuple[Any, ...] | None:
  return take("tinygrad.helpers:PARALLEL", "tinygrad.helpers:CACHEDB", instead="kernels are compiled one after another")


def serve(connection_file: int, folder: str | None) -> None:
  """The main function of a process: do tasks until an empty one comes, or the connection closes. Then an empty `folder` goes, as the program may have
  been killed."""
  for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    with contextlib.suppress(AttributeError): signal.signal(getattr(signal, name), signal.SIG_IGN)
  from tinygrad import Context, Device   # noqa: F401, while there is nothing to do
  connection = Connection(connection_file)
  with contextlib.suppress(EOFError, OSError), Context(ALLOW_DEVICE_USAGE=0):   # devices are the program's
    while task := connection.recv_bytes():
      try:
        function, argument = pickle.loads(task)
        answer = pickle.dumps((True, function(argument)))
      except Exception as e:
        e.add_note(f"in a process that compiles kernels:\n{traceback.format_exc()}")
        try: answer = pickle.dumps((False, e))
        except Exception: answer = pickle.dumps((False, RuntimeError("".join(traceback.format_exception(e)))))
      connection.send_bytes(answer)
    return
  if folder:
    with contextlib.suppress(OSError): os.rmdir(folder)


_started: list[Workers | None] = []
_lock = threading.Lock()


def workers() -> Workers | None:
  """This process's workers, started at the first call, as many as tinygrad's PARALLEL says; None where that is 0, where they cannot be
  started, in a fork, and on Windows, where files cannot be passed on."""
  if (parts := _parts()) is None or (count := parts[0].value) == 0 or sys.platform == "win32" or multiprocessing.current_process().daemon: return None
  with _lock:
    if not _started:
      try: _started.append(Workers(count))
      except OSError as e:
        _started.append(None)
        note(f"processes that compile kernels cannot be started ({e.strerror}): kernels are compiled one after another")
  return _started[0] if _started[0] is not None and _started[0].pid == os.getpid() else None


def use_in(module: ModuleType) -> None:
  """Let `module`, one of tinygrad's, compile with `workers`."""
  if sys.platform != "win32" and hasattr(module, "get_worker_pool"): module.get_worker_pool = workers
