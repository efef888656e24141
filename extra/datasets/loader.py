"""Batches in one or a few shapes from a data set, loaded in this process or by worker processes.

Workers are fresh interpreters that import numpy, Pillow and the data set's own module, nothing else. They are not forked: the fork of a process in
which a device runtime has threads may inherit locks that nobody will release. They are not `multiprocessing` children either, since those import the
main program again, and with it tinygrad, and fail where the main program has no import guard or no file, as in a notebook.
Pixels travel through one block of anonymous shared memory (`memfd`): it has no name, so nothing can be left behind in /dev/shm however the run ends,
and it is not bounded by the size of /dev/shm, which is 64 MB in many containers.
"""
import contextlib, ctypes, functools, math, mmap, os, pickle, signal, subprocess, sys, tempfile, traceback, weakref
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any
import numpy as np
from tinydet.datasets.balance import draw
from tinydet.datasets.buckets import Buckets, Scales
from tinydet.datasets.sample import Batch, Sample
from tinydet.datasets.transforms import Draw, Transform, first_size
from tinydet.errors import UserError


class Loader:
  """Yields the batches of an epoch; what it yields depends on (seed, epoch) only, not on the number of workers.

  `transform` must bring every sample to one size, the canvas; with `buckets`, to one that its batch's canvas holds, to which it is then padded; with
  `Scales`, their transform of the batch's canvas takes its place. The generator of a sample is `Draw((seed, epoch, index), ...)`, the order of a
  shuffled epoch that of `np.random.default_rng((seed, epoch)).permutation`, as `Buckets.batches` divides it. With `factors` f64 [N] a shuffled epoch
  is of as many pictures, each as often as its factor says (`balance.draw`), and its copies are drawn apart. Without `drop_last` the last batch (of a
  canvas) is filled up with all-zero images of image id -1 (their `sizes` are the canvas). `max_boxes` is the length of the box axis, by default the
  data set's own maximum, rounded up to a multiple of 8. With `workers` > 0 that many processes load `prefetch` batches ahead; they start with the
  first epoch, serve all further ones, and end with `close()`, with the loader's life, or with this process, whichever is first. The data set and the
  transform must be picklable then. With `shard` = (rank, ranks) it yields the rank's rows of each batch, a part of `batch_size` / ranks; of a last
  batch that is filled up, that part may be all filling. With `reduced`, for training, a data set of files reads large JPEGs at a lower resolution
  where the transform begins by resizing them to half their size or less (see `image.read_image`). A batch's arrays belong to the caller.
  Raises UserError, naming the image, where one cannot be read or has more than `max_boxes` objects, and when a worker dies.
  """

  def __init__(self, dataset: Any, batch_size: int, transform: Transform, *, seed: int = 0, shuffle: bool = False, drop_last: bool = False,
               workers: int = 0, max_boxes: int | None = None, prefetch: int = 2, buckets: Buckets | Scales | None = None,
               shard: tuple[int, int] = (0, 1), reduced: bool = False, factors: np.ndarray | None = None):
    if len(dataset) < (batch_size if drop_last else 1):
      raise UserError(f"{dataset.name}: its {len(dataset)} images do not fill one batch of {batch_size}; choose a smaller batch size")
    if workers and os.name != "posix": raise UserError("workers: loading in other processes needs Linux or macOS; set workers to 0")
    self.dataset, self.batch_size, self.transform = dataset, batch_size, transform
    self.seed, self.shuffle, self.drop_last, self.workers, self.prefetch = seed, shuffle, drop_last, workers, prefetch
    self.reduced = reduced and hasattr(dataset, "resized")
    self.max_boxes = max(8, -(-dataset.max_boxes // 8) * 8) if max_boxes is None else max_boxes
    self.buckets, self._canvases, self.factors = buckets, buckets.canvases if buckets else None, factors
    rank, ranks = shard
    if batch_size % ranks: raise UserError(f"a batch of {batch_size} cannot be divided evenly among {ranks} processes")
    self.rows = batch_size // ranks
    self._mine = slice(rank * self.rows, (rank + 1) * self.rows)
    self._pool: _Pool | None = None

  def __len__(self) -> int:
    if self.buckets: return len(self._batches(0))
    return len(self.dataset) // self.batch_size if self.drop_last else -(-len(self.dataset) // self.batch_size)

  def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
    """The batches of epoch `epoch` from batch `start` on; the earlier ones are not loaded. Beginning an epoch ends the one before."""
    if self._canvases is None: self._canvases = (self._transformed(epoch, 0).image.shape[:2],)
    batches = [(canvas, pictures[self._mine]) for canvas, pictures in self._batches(epoch)[start:]]
    return self._epoch_in_pool(epoch, batches) if self.workers else self._epoch_in_process(epoch, batches)

  def names(self, epoch: int, batch: int) -> list[str]:
    """The names of the pictures in batch `batch` of an epoch."""
    return [self.image_name(i) for i in self._batches(epoch)[batch][1]]

  def image_name(self, number: int) -> str:
    """The name of a picture, or of the one that this is a copy of."""
    return self.dataset.image_name(number % len(self.dataset))

  def _batches(self, epoch: int) -> list[tuple[tuple[int, int] | None, list[int]]]:
    """Canvas, where it is known, and pictures of each batch of an epoch: i, or i + copy * N for a further copy of picture i."""
    count, rng = len(self.dataset), np.random.default_rng((self.seed, epoch))
    if not self.shuffle: order = np.arange(count)
    elif self.factors is None: order = rng.permutation(count)
    else: order = draw(self.factors, getattr(self.buckets, "of", np.zeros(count, np.int64)), rng)
    if self.buckets:
      batches = self.buckets.batches(order, self.batch_size, self.drop_last, (self.seed, epoch))
      return [(canvas, batch.tolist()) for canvas, batch in batches]
    canvas = self._canvases[0] if self._canvases else None
    return [(canvas, order[i * self.batch_size:(i + 1) * self.batch_size].tolist()) for i in range(len(self))]

  def close(self) -> None:
    """End the workers and free the shared memory; a later epoch starts them again."""
    if self._pool is None: return
    self._pool.run = 0
    self._pool.close()
    self._pool = None

  def _transformed(self, epoch: int, number: int, canvas: tuple[int, int] | None = None) -> Sample:
    copy, index = divmod(number, len(self.dataset))
    rng = Draw((self.seed, epoch, index, *[copy] * (copy > 0)), self.dataset, index, epoch)
    try:
      transform = self.buckets.transform(canvas, self.transform) if self.buckets else self.transform
      size = first_size(transform, tuple(self.dataset.sizes[index])) if self.reduced else None
      sample = transform(self.dataset[index] if size is None else self.dataset.resized(index, size), rng)
      return self.buckets.pad(canvas)(sample, rng) if self.buckets and sample.image.shape[:2] != canvas else sample
    except Exception as e:
      e.add_note(f"while loading {self.dataset.image_name(index)}")
      raise

  def _fill_row(self, batch: Batch, row: int, epoch: int, index: int) -> None:
    sample = self._transformed(epoch, index, batch.images.shape[1:3])
    if sample.image.shape != batch.images.shape[1:]:
      raise ValueError(f"{self.image_name(index)} was transformed to {sample.image.shape}, the first image to {batch.images.shape[1:]}; "
                       "the transform must end with one fixed size")
    if (n := len(sample.boxes)) > self.max_boxes:
      raise UserError(f"{self.image_name(index)} has {n} boxes, but max_boxes is {self.max_boxes}; raise it to {n} or more")
    batch.images[row], batch.sizes[row], batch.origins[row] = sample.image, sample.content_size, sample.origin
    batch.original_sizes[row] = sample.original_size
    batch.boxes[row, :n], batch.boxes[row, n:], batch.labels[row, :n], batch.labels[row, n:] = sample.boxes, 0, sample.labels, -1
    batch.image_ids[row] = sample.image_id

  def _blank_rows(self, batch: Batch, first: int) -> None:
    batch.images[first:], batch.boxes[first:], batch.labels[first:], batch.image_ids[first:] = 0, 0, -1, -1
    batch.origins[first:] = 0
    batch.sizes[first:] = batch.original_sizes[first:] = batch.images.shape[1:3]

  def _epoch_in_process(self, epoch: int, batches: list[tuple[tuple[int, int], list[int]]]) -> Iterator[Batch]:
    keep_memory()
    for canvas, indices in batches:
      batch = _arrays(np.empty(_batch_bytes(self, canvas), np.uint8), self, canvas)
      for row, index in enumerate(indices): self._fill_row(batch, row, epoch, index)
      self._blank_rows(batch, len(indices))
      yield batch

  def _epoch_in_pool(self, epoch: int, batches: list[tuple[tuple[int, int], list[int]]]) -> Iterator[Batch]:
    if self._pool is None: self._pool = _Pool(self)
    pool, waiting, flying = self._pool, deque(batches), deque()
    run = pool.begin_run()
    try:
      while waiting or flying:
        while waiting and pool.free:
          canvas, indices = waiting.popleft()
          flying.append((pool.submit(epoch, canvas, indices), canvas, len(indices)))
        slot, canvas, rows = flying.popleft()
        batch = pool.collect(slot, canvas)
        self._blank_rows(batch, rows)
        if waiting:
          canvas, indices = waiting.popleft()
          flying.append((pool.submit(epoch, canvas, indices), canvas, len(indices)))
        yield batch
        if pool.run != run: raise RuntimeError("this epoch ended when another one began, or when the loader was closed")
    except GeneratorExit: raise
    except BaseException:
      if pool.run == run: self.close()
      raise

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_pool": None}


@functools.cache
def keep_memory() -> None:
  """Let this process keep the memory that a picture needed for the next one, up to 256 MB: by default glibc, where it is the C library, gives it back
  to the system, and up to a third of the time that reading takes goes into getting the same pages again."""
  with contextlib.suppress(OSError, TypeError, AttributeError):
    mallopt = ctypes.CDLL(None).mallopt
    for option, size in ((-1, 1 << 28), (-3, 1 << 25)): mallopt(option, size)   # M_TRIM_THRESHOLD; M_MMAP_THRESHOLD, at its most


class _Pool:
  """The worker processes of a loader, and the ring of batch slots in shared memory that they fill."""

  def __init__(self, loader: Loader):
    self.loader, self.run = weakref.proxy(loader), 0
    slots = max(loader.prefetch, -(-2 * loader.workers // loader.rows)) + 1
    size = 8 * (1 + loader.workers) + slots * _slot_bytes(loader)
    memory_file = os.memfd_create("batches") if hasattr(os, "memfd_create") else os.dup(tempfile.TemporaryFile().fileno())
    os.ftruncate(memory_file, size)
    self.header, self.slots = _shared_arrays(memory_file, slots, loader)
    self.header[1:] = -1
    self.free = list(range(slots))
    self.reports_due, self.images_due = [0] * slots, [0] * loader.workers
    self.errors: dict[int, Exception] = {}
    self.processes: list[subprocess.Popen] = []
    self.connections: list[Connection] = []
    self.close = weakref.finalize(self, _end_workers, self.processes, self.connections)
    try:
      work = pickle.dumps(loader, protocol=pickle.HIGHEST_PROTOCOL)
      environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
      for worker in range(loader.workers):
        ours, theirs = Pipe()
        program = f"from tinydet.datasets.loader import serve; serve({theirs.fileno()}, {memory_file}, {slots}, {worker}, {os.getpid()})"
        # a process group of its own keeps the terminal's Ctrl-C from the workers: they end when this process closes the connection
        self.processes.append(subprocess.Popen([sys.executable, "-P", "-c", program], env=environment, stdin=subprocess.DEVNULL,
                                               pass_fds=(theirs.fileno(), memory_file), process_group=0))
        self.connections.append(ours)
        theirs.close()
      for worker, connection in enumerate(self.connections):
        try: connection.send_bytes(work)
        except OSError: self._raise_dead(worker)
    except BaseException:
      self.close()
      raise
    finally: os.close(memory_file)

  def begin_run(self) -> int:
    """Void what an abandoned run left behind and return the number of the new run."""
    self.run = int(self.header[0]) + 1
    self.header[0] = self.run
    while any(self.reports_due): self._receive()
    self.free, self.errors = list(range(len(self.slots))), {}
    return self.run

  def submit(self, epoch: int, canvas: tuple[int, int], indices: list[int]) -> int:
    """Hand the rows of one batch to the workers that have least to do; returns the slot they will fill."""
    slot = self.free.pop()
    tasks: list[list[tuple[int, int]]] = [[] for _ in self.connections]
    for row, index in enumerate(indices):
      worker = min(range(len(tasks)), key=self.images_due.__getitem__)
      tasks[worker].append((row, index))
      self.images_due[worker] += 1
    for worker, rows in enumerate(tasks):
      if not rows: continue
      try: self.connections[worker].send((self.run, slot, epoch, canvas, rows))
      except OSError: self._raise_dead(worker)
      self.reports_due[slot] += 1
    return slot

  def collect(self, slot: int, canvas: tuple[int, int]) -> Batch:
    """Wait until the slot is full, copy it, and free it."""
    while self.reports_due[slot]: self._receive()
    if slot in self.errors: raise self.errors[slot]
    self.free.append(slot)
    return Batch(*(array.copy() for array in vars(_arrays(self.slots[slot], self.loader, canvas)).values()))

  def _receive(self) -> None:
    ready = wait(self.connections, timeout=5)
    if not ready:  # a dead worker's connection reads as closed, unless some other process has inherited its end
      for worker, process in enumerate(self.processes):
        if process.poll() is not None: self._raise_dead(worker)
    for connection in ready:
      worker = self.connections.index(connection)
      try: run, slot, images, error = connection.recv()
      except (EOFError, OSError): self._raise_dead(worker)
      self.reports_due[slot] -= 1
      self.images_due[worker] -= images
      if error is not None and run == self.run: self.errors.setdefault(slot, error)

  def _raise_dead(self, worker: int) -> None:
    try: code = self.processes[worker].wait(timeout=5)
    except subprocess.TimeoutExpired: code = None
    index = int(self.header[1 + worker])
    place = f"on {self.loader.image_name(index)}" if index >= 0 else "while idle"
    reason = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    raise UserError(f"loader worker {worker} died {place} ({reason}); if memory ran out, lower --workers or --bs") from None


def _end_workers(processes: list[subprocess.Popen], connections: list[Connection]) -> None:
  for connection in connections: connection.close()
  for process in processes:
    try: process.wait(timeout=1)
    except subprocess.TimeoutExpired: process.kill()
    process.wait()


def serve(connection_file: int, memory_file: int, slots: int, worker: int, parent: int) -> None:
  """The main function of worker number `worker`: fill rows of batch slots until the connection closes or the `parent` process is gone."""
  for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)   # sent to all of a job; the program ends its workers
  keep_memory()
  connection = Connection(connection_file)
  loader: Loader | None = None
  failure: Exception | None = None
  try:
    work = connection.recv_bytes()
    try:
      loader = pickle.loads(work)
      header, memory = _shared_arrays(memory_file, slots, loader)
    except Exception as e:
      failure = RuntimeError(f"a loader worker cannot rebuild the data set or the transform ({type(e).__name__}: {e}); "
                             "define them in a module, not in the main program, or set workers to 0")
    while True:
      while not connection.poll(5):
        if os.getppid() != parent: return
      run, slot, epoch, canvas, rows = connection.recv()
      error = failure
      batch = None if failure else _arrays(memory[slot], loader, canvas)
      for row, index in rows:
        if error is not None or header[0] != run: break
        header[1 + worker] = index
        try: loader._fill_row(batch, row, epoch, index)
        except UserError as e: error = UserError(str(e))
        except MemoryError: error = UserError(f"{loader.image_name(index)}: memory ran out while it was loaded; lower --workers or --bs")
        except Exception: error = RuntimeError(f"a loader worker failed on {loader.image_name(index)}:\n{traceback.format_exc()}")
      if failure is None: header[1 + worker] = -1
      connection.send((run, slot, len(rows), error))
  except (EOFError, OSError): return


def _fields(loader: Loader, canvas: tuple[int, int]) -> list[tuple[tuple[int, ...], type]]:
  """Shape and type of a batch's arrays in the order of `Batch`."""
  b, m = loader.rows, loader.max_boxes
  pairs = [((b, 2), np.int32)] * 3   # sizes, origins, original sizes
  return [((b, *canvas, 3), np.uint8), ((b, m, 4), np.float32), ((b, m), np.int32), *pairs, ((b,), np.int64)]


def _batch_bytes(loader: Loader, canvas: tuple[int, int]) -> int:
  return sum(-(-math.prod(shape) * np.dtype(dtype).itemsize // 64) * 64 for shape, dtype in _fields(loader, canvas))


def _slot_bytes(loader: Loader) -> int: return max(_batch_bytes(loader, canvas) for canvas in loader._canvases)


def _arrays(buffer: np.ndarray, loader: Loader, canvas: tuple[int, int]) -> Batch:
  """A batch whose arrays are parts of the u8 `buffer`."""
  arrays, offset = [], 0
  for shape, dtype in _fields(loader, canvas):
    size = math.prod(shape) * np.dtype(dtype).itemsize
    arrays.append(buffer[offset:offset + size].view(dtype).reshape(shape))
    offset += -(-size // 64) * 64
  return Batch(*arrays)


def _shared_arrays(memory_file: int, slots: int, loader: Loader) -> tuple[np.ndarray, list[np.ndarray]]:
  """The header i64 [1 + workers] (number of the current run, then the image each worker is at) and the batch slots u8 of the shared memory."""
  memory = np.frombuffer(mmap.mmap(memory_file, 0), np.uint8)
  head, size = 8 * (1 + loader.workers), _slot_bytes(loader)
  return memory[:head].view(np.int64), [memory[head + i * size:head + (i + 1) * size] for i in range(slots)]
