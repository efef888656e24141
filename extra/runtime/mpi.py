"""The processes of one run, started by mpirun or srun on one machine or many: who they are, and what they say to each other.

A rank is a process with a part of each batch. Rank 0 alone writes and prints. MPI (`pip install mpi4py mpich`) is imported only where a launcher
started more than one process; `ALONE` is the run of a single one, for which everything here does nothing."""
import contextlib, itertools, math, os, socket, sys, time, traceback, warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
import numpy as np
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinydet.runtime.workers import workers
from tinydet.errors import UserError
from tinydet.nn.init import set_values
from tinydet.nn.kernel_cpu import on_host
from tinydet.parts import take
from tinydet.runtime.cpu import share_cores

HINT = "pip install mpi4py mpich brings both"
PATIENCE, FORWARDED = 3, 0.2   # seconds that rank 0 has to report an error that others have too, and a launcher to pass on what was printed
WIRES = {"float32": dtypes.float32, "half": dtypes.half}
NUMPY = {dtypes.float32: np.float32, dtypes.half: np.float16}

_parts = take("tinygrad.device:Buffer", "tinygrad.device:MultiBuffer", "tinygrad:UOp.from_buffer", instead="ranks add up their gradients one by one")
if _parts: Buffer, MultiBuffer, _ = _parts


class Ranks:
  """The processes of this run: this one is number `rank` of `size`, and `local_rank` of `local_size` on machine `host`.

  Methods marked "all" must be called by every rank at the same point; they return when all have come."""
  def __init__(self, comm: Any = None):
    self.comm, self.host, self.rank, self.size, self.local_rank, self.local_size = comm, socket.gethostname(), 0, 1, 0, 1
    self.ending = False   # whether all are about to exit
    if comm is None: return
    from mpi4py import MPI
    self._mpi, machine = MPI, comm.Split_type(MPI.COMM_TYPE_SHARED)
    self.rank, self.size, self.local_rank, self.local_size = comm.rank, comm.size, machine.rank, machine.size

  def barrier(self) -> None:
    """All: wait for each other."""
    if self.comm is not None: self.comm.Barrier()

  def broadcast(self, value: Any) -> Any:
    """All: rank 0's `value`."""
    return value if self.comm is None else self.comm.bcast(value)

  def gather(self, value: Any) -> list:
    """All: on rank 0 every rank's `value`, in order; on the others nothing."""
    return [value] if self.comm is None else self.comm.gather(value) or []

  def largest(self, *values: int) -> tuple[int, ...]:
    """All: the largest of each of the `values` on any rank."""
    if self.comm is None: return values
    self.comm.Allreduce(self._mpi.IN_PLACE, numbers := np.array(values, np.int64), self._mpi.MAX)
    return tuple(numbers.tolist())

  def means(self, values: Sequence[float]) -> list[float]:
    """All: the mean of each of the `values` over the ranks; one that is not finite anywhere is not finite."""
    if self.comm is None: return list(values)
    self.comm.Allreduce(self._mpi.IN_PLACE, numbers := np.array(values, np.float64))
    return (numbers / self.size).tolist()

  def add(self, array: np.ndarray) -> None:
    """All: put the sum over the ranks into `array`, f32 or f16 [n]. Halves, n being a multiple of `size`, travel as halves and are added as f32: each
    rank adds up one part of them."""
    if array.dtype == np.float32:
      self.comm.Allreduce(self._mpi.IN_PLACE, array)
      return
    parts, words = np.empty((self.size, array.size // self.size), np.float16), array.view(np.uint16)
    self.comm.Alltoall(words, parts.view(np.uint16))
    total = parts[0].astype(np.float32)
    for part in parts[1:]: total += part
    with np.errstate(over="ignore"): mine = total.astype(np.float16)
    self.comm.Allgather(mine.view(np.uint16), words)

  def average(self, tensor: Tensor) -> None:
    """All: put the mean over the ranks into the f32 `tensor`, in place. In f64, so that what is equal everywhere stays what it is."""
    if self.comm is None: return
    self.comm.Allreduce(self._mpi.IN_PLACE, values := tensor.numpy().astype(np.float64))
    new = Tensor((values / self.size).astype(np.float32).reshape(-1), device="CPU").reshape(tensor.shape)
    tensor.assign(new.to(tensor.device) if isinstance(tensor.device, str) else new.shard(tensor.device)).realize()

  def spread(self, tensors: Sequence[Tensor]) -> None:
    """All: give each tensor, on one device, rank 0's values."""
    if self.comm is None: return
    for tensor in tensors:
      values = np.array(tensor.numpy()).reshape(-1)
      self.comm.Bcast(values)
      if self.rank: set_values(tensor, values.reshape(tensor.shape))

  def raise_together(self, error: UserError | None) -> None:
    """All: where any rank has an error, end: rank 0 with the UserError, the others silently with the same exit code."""
    if self.comm is None:
      if error is not None: raise error
      return
    if not self.largest(error is not None)[0]: return
    self.ending = True
    found = self.gather(None if error is None else f"{self._place()}{error}")
    if self.rank: sys.exit(2)
    raise UserError(next(text for text in found if text is not None)) from error

  @contextlib.contextmanager
  def in_turn(self) -> Iterator[None]:
    """All: run the block on rank 0 first, then on the first rank of each machine, then on the others: what it downloads or unpacks is done once, or
    once a machine where they have no common disk."""
    turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
    for _ in range(turn): self.barrier()
    yield
    for _ in range(2 - turn): self.barrier()

  def _place(self) -> str: return f"rank {self.rank} on {self.host}: " if self.rank else ""

  def report(self, e: BaseException) -> int:
    """Say what ended this rank, past what silences it, and return the exit code for that."""
    if isinstance(e, KeyboardInterrupt): return 130
    # An error that all have, a mistyped flag say, is rank 0's to report: it ends the others while they wait.
    if self.rank: time.sleep(PATIENCE)
    if isinstance(e, UserError): message = f"{'' if self.ending else self._place()}{e}"
    else:
      traceback.print_exception(e, file=sys.__stderr__)
      message = f"rank {self.rank} on {self.host}: {type(e).__name__}: {e}: ends all {self.size} ranks"
    print(f"error: {message}", file=sys.__stderr__, flush=True)
    return 2 if isinstance(e, UserError) else 1


ALONE = Ranks()


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
  """The ranks of this run, for the length of the program. Inside, all but rank 0 are silent; an exception on one rank is reported with its name and
  ends them all, a `SystemExit` is taken to happen on all. UserError where a launcher started this process and MPI does not work."""
  if (launched := started_by_launcher(os.environ)) == 1 or (comm := _connect(launched)) is None:
    yield ALONE
    return
  ranks = Ranks(comm)
  share_cores(ranks.local_size)
  workers()
  with contextlib.ExitStack() as stack:
    if ranks.rank:
      nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
      stack.enter_context(contextlib.redirect_stdout(nowhere))
      stack.enter_context(contextlib.redirect_stderr(nowhere))
    try: yield ranks
    except SystemExit as e:
      if getattr(e, "alone", False): ranks.comm.Abort(e.code)   # others may be waiting for this one
      _leave(ranks, e.code)
    except BaseException as e:
      code = ranks.report(e)
      if ranks.ending: _leave(ranks, code)
      sys.stdout.flush()
      time.sleep(FORWARDED)
      ranks.comm.Abort(code)
    _leave(ranks, 0)


def started_by_launcher(environ: Mapping[str, str]) -> int:
  """How many processes the launcher that `environ` tells of has started: 1 without any, 0 where it does not say. UserError for srun without MPI."""
  for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
    if environ.get(name, "").isdigit(): return int(environ[name])
  steps = environ.get("SLURM_STEP_NUM_TASKS", "1")
  tasks = int(steps) if steps.isdigit() else 1
  if "PMIX_RANK" in environ or "PMI_RANK" in environ: return tasks if tasks > 1 else 0
  if tasks > 1: raise UserError(f"srun started {tasks} processes that cannot find each other: add --mpi=pmi2 or --mpi=pmix (srun --mpi=list has all)")
  return 1


def _connect(launched: int) -> Any:
  """All ranks' communicator; None where this process is the only one."""
  count = f"{launched} processes" if launched else "this process"
  try:
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning): from mpi4py import MPI   # it suspects, below we know
  except (ImportError, RuntimeError) as e:   # RuntimeError: no MPI library
    reason = (str(e) or type(e).__name__).splitlines()[0]
    raise UserError(f"an MPI launcher started {count}, but Python has no MPI to join them ({reason}): {HINT}") from e
  if MPI.COMM_WORLD.size == 1 and launched > 1:
    name = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].split())
    raise UserError(f"an MPI launcher started {count}, but each finds itself alone: the launcher is not of the MPI that mpi4py uses here, "
                    f"which is {name}; take the mpirun that came with that ({HINT})")
  return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


def _leave(ranks: Ranks, code: Any) -> None:
  """All: exit, none before all are done: a launcher ends the others when one exits with an error."""
  sys.stdout.flush()
  if code: time.sleep(FORWARDED)
  ranks.barrier()
  sys.exit(code)


class Exchange:
  """Tensors whose values are to be added up over the ranks: `tensors`, in storage that is one piece on each of the `devices`.

  Args: `parts` are shape and dtype (one of WIRES) of each, those of a dtype together; each run of one dtype takes one all-reduce."""
  def __init__(self, parts: Sequence[tuple[tuple[int, ...], DType]], devices: tuple[str, ...], ranks: Ranks):
    self.ranks, places, self.runs, end = ranks, [], [], 0
    for dtype, same in itertools.groupby(parts, key=lambda part: part[1]):
      begin = end
      for shape, _ in same:
        places.append((end, shape, dtype))
        end = _round_up(end + math.prod(shape) * dtype.itemsize, 256)   # aligned for vector instructions
      end = begin + _round_up(end - begin, 256 * ranks.size)            # a whole number of equal pieces for `Ranks.add`
      self.runs.append((begin, end, dtype))
    self.nbytes = end
    if not _parts:
      self.tensors = [_zeros(shape, dtype, devices) for _, shape, dtype in places]
      return
    self.flats = [Buffer(name, end, dtypes.uint8, preallocate=True) for name in devices]
    # A processor's memory is the host's: MPI works on it where it lies.
    if on_host(devices[0]): self.host, self._staging = np.frombuffer(self.flats[0].as_memoryview(force_zero_copy=True), np.uint8), None
    else:
      self.host = np.zeros(end, np.uint8)
      self._staging = Buffer("PYTHON", end, dtypes.uint8, opaque=memoryview(self.host))
    self.tensors = [_view(self.flats, *place) for place in places]

  def add(self) -> None:
    """All: each tensor becomes the sum over the ranks. Waits for the device."""
    if not _parts:
      for tensor in self.tensors: _add(tensor, self.ranks)
      return
    if self._staging is None: Device[self.flats[0].device].synchronize()
    else: self._staging.copy_from(self.flats[0])
    for begin, end, dtype in self.runs: self.ranks.add(self.host[begin:end].view(NUMPY[dtype]))
    if self._staging is not None: self.flats[0].copy_from(self._staging)
    for other in self.flats[1:]: other.copy_from(self.flats[0])


def _round_up(number: int, step: int) -> int: return -(-number // step) * step


def _zeros(shape: tuple[int, ...], dtype: DType, devices: tuple[str, ...]) -> Tensor:
  zeros = Tensor(np.zeros(math.prod(shape), NUMPY[dtype]), device=devices[0]).reshape(shape)
  return (zeros if len(devices) == 1 else zeros.shard(devices)).is_param_(False).realize()


def _add(tensor: Tensor, ranks: Ranks) -> None:
  """All: the tensor becomes the sum over the ranks, by way of the host."""
  values = tensor.numpy().reshape(-1)
  array = np.zeros(_round_up(values.size, ranks.size), values.dtype)
  array[:values.size] = values
  ranks.add(array)
  new = Tensor(array[:values.size], device="CPU").reshape(tensor.shape)
  tensor.assign(new.to(tensor.device) if isinstance(tensor.device, str) else new.shard(tensor.device)).realize()


def _view(flats: list[Any], offset: int, shape: tuple[int, ...], dtype: DType) -> Tensor:
  """A tensor of `shape` that lies `offset` bytes into each of the buffers."""
  views = [flat.view(math.prod(shape), dtype, offset).allocate() for flat in flats]
  if len(views) == 1: return Tensor(UOp.from_buffer(views[0])).reshape(shape).is_param_(False)
  together = MultiBuffer.__new__(MultiBuffer)   # its own constructor allocates
  together.bufs = views
  return Tensor(UOp.from_buffer(together, tuple(flat.device for flat in flats))).reshape(shape).is_param_(False)
