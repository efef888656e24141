"""Several processes that train as one: the same losses and weights as a single one, and they end together however one of them ends.

Most use the tiny trainer in mpi_program.py, under the mpiexec of PyPI's `mpich`."""
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from tinygrad import Context, Tensor, dtypes
from tinygrad.helpers import DEV
from tinydet.datasets.loader import Loader
from tinydet.datasets.shapes import Shapes
from tinydet.errors import UserError
from tinydet.models.preprocess import normalize
from tinydet.nn import init
from tinydet.weights import checkpoint
from tinydet.runtime import devices as parallel, mpi as module
from tinydet.config import parse
from tinydet.runtime.devices import devices, take_devices
from tinydet.runtime.mpi import ALONE, Exchange, Ranks, started_by_launcher
from tinydet.runtime.signals import Signals, Stopped
from tinydet.training.trainer import TrainerConfig, check_batch_size

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
import mpi_program   # noqa: E402

pytest.importorskip("mpi4py")
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
mpi = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec")


def start(count, program, *arguments):
  environ = {key: os.environ[key] for key in ("PATH", "HOME", "CC", "DEV", "NOOPT", "XDG_CACHE_HOME", "CACHEDB") if key in os.environ}
  return subprocess.Popen([MPIEXEC, "-n", str(count), sys.executable, str(program), *map(str, arguments)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ | {"PYTHONPATH": str(ROOT)})


def end(process, timeout=300):
  """(exit code, stdout, stderr)"""
  try: out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.terminate()   # mpiexec ends its ranks
    raise
  return process.returncode, out, err


def together(count, *runs): return end(start(count, HERE / "mpi_program.py", json.dumps(runs)))


def losses(folder, key="train/loss"):
  return {line["step"]: line[key] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in line}


def state_of(folder): return dict(np.load(folder / "state.npz"))


def assert_equal_runs(folder, expected, state, expected_state, rtol=2e-5, atol=2e-6):
  assert losses(folder).keys() == losses(expected).keys()
  for step, loss in losses(expected).items():
    assert losses(folder)[step] == (None if loss is None else pytest.approx(loss, rel=rtol, abs=atol)), step   # None: not a number
  assert state.keys() == expected_state.keys()
  for key, value in expected_state.items(): np.testing.assert_allclose(state[key], value, rtol=rtol, atol=atol, err_msg=key)


ADDED = {"accumulate": 2, "every_steps": 1}
PLAIN = {"poisoned": [5]}   # one picture an epoch whose loss is not a number


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """Folder and last states of runs of a single process."""
  out = tmp_path_factory.mktemp("alone")
  return out, {name: mpi_program.run(str(out), name, **options)["state"] for name, options in (("plain", PLAIN), ("added", ADDED))}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """Two ranks of which one gets a SIGTERM, between two updates."""
  out = tmp_path_factory.mktemp("stopped")
  return out / "run", together(2, ADDED | {"out": str(out), "name": "run", "at": 3, "who": 1, "what": "SIGTERM"})


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
  """Two ranks of which one is killed."""
  out = tmp_path_factory.mktemp("killed")
  return out / "run", together(2, ADDED | {"out": str(out), "name": "run", "at": 6, "who": 1, "what": "kill"})


# ------------------------------------------------------------------------------------------------------------------------------ equality


def conv_outputs(pictures):
  """What the first layer of `mpi_program.Classifier` makes of `pictures` at the start, f64 [N,8,4,4]."""
  model = mpi_program.Classifier("group")
  init.initialize(model, lambda key, shape: init.normal(0.3) if len(shape) > 1 else init.normalization(key), 0)
  images = np.stack([mpi_program.Pictures((), -1)[i].image for i in pictures])
  x = np.pad(normalize(Tensor(images)).numpy().astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2]
  return np.einsum("nchwij,ocij->nohw", windows, model.conv.weight.numpy().astype(np.float64))


@mpi
def test_two_ranks_equal_one_process(alone, tmp_path):
  out, states = alone
  runs = {"plain": PLAIN | {"at": 3, "who": 1, "what": "SIGUSR1"}, "added": ADDED, "devices": PLAIN | {"gpus": 2}, "half": PLAIN | {"wire": "half"},
          "norm": {"norm": "batch", "every_steps": 1}}
  named = [options | {"out": str(tmp_path), "name": name} for name, options in runs.items()]
  code, said, err = together(2, *named, {"turns": str(tmp_path / "turns")})
  assert code == 0, err
  assert said.count("ranks: 2") == 1, "rank 0 alone prints"
  for name in runs: assert json.loads((tmp_path / name / "same").read_text()), "every rank ends with the same bits"
  for name in ("plain", "added", "devices"):
    expected = "added" if name == "added" else "plain"
    assert_equal_runs(tmp_path / name, out / expected, state_of(tmp_path / name), states[expected])
  assert sum(losses(tmp_path / "plain", "train/skipped").values()) == 2
  assert (tmp_path / "plain" / "checkpoint-3.safetensors").exists(), "a SIGUSR1 to rank 1 has rank 0 save"

  half = state_of(tmp_path / "half")
  assert half.pop("loss_scale").tolist() == [256, 0]   # halved by the third step and the last
  assert_equal_runs(tmp_path / "half", out / "plain", half, states["plain"], rtol=2e-2, atol=2e-3)
  assert any((half[key] != states["plain"][key]).any() for key in half), "halves were sent"

  # running statistics: the mean is that of the batch, the variance the mean of the parts'
  saved, _ = checkpoint.load(tmp_path / "norm" / "checkpoint-1.safetensors")
  parts = [conv_outputs(part) for part in np.random.default_rng((0, 0)).permutation(32)[:8].reshape(2, 4)]
  np.testing.assert_allclose(saved["model.norm.running_mean"], 0.1 * np.mean([part.mean((0, 2, 3)) for part in parts], 0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(saved["model.norm.running_var"], 0.9 + 0.1 * np.mean([part.var((0, 2, 3), ddof=1) for part in parts], 0), rtol=1e-4)

  lines = (tmp_path / "turns").read_text().splitlines()
  assert lines == ["0 begins", "0 ends", "1 begins", "1 ends"]


@pytest.mark.by_hand
@mpi
def test_four_ranks_equal_one_process_and_go_on_with_what_two_began(alone, stopped, killed, tmp_path):
  out, states = alone
  for folder, _ in (stopped, killed): shutil.copytree(folder, tmp_path / folder.parent.name)
  again = [ADDED | {"out": str(tmp_path), "name": folder.parent.name, "resume": True} for folder, _ in (stopped, killed)]
  code, said, err = together(4, PLAIN | {"out": str(tmp_path), "name": "plain"}, *again)
  assert code == 0, err
  assert said.count("ranks: 4") == 1
  assert_equal_runs(tmp_path / "plain", out / "plain", state_of(tmp_path / "plain"), states["plain"])
  for folder, _ in (stopped, killed):
    assert_equal_runs(tmp_path / folder.parent.name, out / "added", state_of(tmp_path / folder.parent.name), states["added"])


@pytest.mark.by_hand
@mpi
def test_the_detectors_trainer(tmp_path):
  """Losses, weights and the score of two ranks are those of one process."""
  flags = ("--data shapes:1 --weights none --norm frozen --backbone resnet10_quarter --size 64 --train-images 16 --overfit --bs 8 --epochs 1 "
           "--lr 0.01 --optimizer sgd --warmup 0 --workers 1 --pictures 1 --log-every 1 --wandb disabled").split()
  program = ROOT / "examples" / "train_retinanet.py"
  for count in (1, 2):
    code, said, err = end(start(count, program, *flags, "--out", tmp_path, "--run-name", count), timeout=600)
    assert code == 0, err[-3000:]
    assert said.count("best mAP") == 1 and f"report: {tmp_path / str(count) / 'report.html'}" in said
  assert [p.name for p in (tmp_path / "2" / "pictures").iterdir()] == [p.name for p in (tmp_path / "1" / "pictures").iterdir()]
  one, two = tmp_path / "1", tmp_path / "2"
  for key in ("train/loss", "train/classification", "train/bbox_regression", "eval/mAP", "eval/AR100"):
    assert losses(two, key) == pytest.approx(losses(one, key), rel=1e-4), key
  (expected, about), (found, _) = (checkpoint.load(folder / "checkpoint-2.safetensors") for folder in (one, two))
  assert about["step"] == 2
  for key, value in expected.items(): np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_shards_are_the_batch():
  """Of each batch, and of the last one that is filled up."""
  def batches(shard): return list(Loader(Shapes("train", 1, 32, 21), 8, lambda sample, rng: sample, seed=1, shuffle=True, shard=shard).epoch(2))
  whole, parts = batches((0, 1)), [batches((rank, 4)) for rank in range(4)]
  assert len(whole) == 3
  for i, batch in enumerate(whole):
    for name, array in vars(batch).items(): np.testing.assert_array_equal(np.concatenate([getattr(part[i], name) for part in parts]), array, name)
  with pytest.raises(UserError, match=r"a batch of 8 cannot be divided evenly among 3 processes"): batches((0, 3))


# ------------------------------------------------------------------------------------------------------------------------------ ends


def nobody_left(folder):
  """Whether the processes of a run in `folder` end within seconds."""
  def command(p):
    try: return (p / "cmdline").read_bytes()
    except OSError: return b""
  until = time.monotonic() + 10
  while any(str(folder).encode() in command(p) for p in Path("/proc").iterdir() if p.name.isdigit()):
    if time.monotonic() > until: return False
    time.sleep(0.1)
  return True


@mpi
def test_a_signal_to_one_stops_all_after_the_same_step(stopped):
  folder, (code, _, err) = stopped
  assert code == 128 + signal.SIGTERM and "SIGTERM: ends after this step with a checkpoint" in err
  assert checkpoint.load(folder / "checkpoint-3.safetensors")[1]["step"] == 3 and max(losses(folder)) == 3
  assert nobody_left(folder.parent)


def test_a_signal_to_a_process_and_its_children(tmp_path):
  """As Slurm and `timeout` send it; without MPI too."""
  run = {"out": str(tmp_path), "name": "run", "at": 3, "who": 0, "what": "SIGTERM"}
  environ = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI", "SLURM"))} | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, str(HERE / "mpi_program.py"), json.dumps([run])], capture_output=True, check=False, timeout=120, env=environ,
                        start_new_session=True)
  assert done.returncode == 128 + signal.SIGTERM and (tmp_path / "run" / "checkpoint-3.safetensors").exists()
  assert nobody_left(tmp_path)


@mpi
def test_a_killed_rank_ends_all(killed):
  folder, (code, _, _) = killed
  assert code != 0 and max(losses(folder)) == 5 and nobody_left(folder.parent)


@mpi
def test_an_exception_ends_all_and_says_where(tmp_path):
  code, _, err = together(2, {"out": str(tmp_path), "name": "run", "at": 2, "who": 1, "what": "raise"})
  assert code == 1 and re.search(r"^error: rank 1 on \S+: ValueError: a bug: ends all 2 ranks$", err, re.MULTILINE)
  assert err.count("Traceback") == 1 and nobody_left(tmp_path)


@mpi
def test_steps_that_are_not_finite_on_one_rank(tmp_path):
  first = np.random.default_rng((0, 0)).permutation(32)[:16].reshape(2, 8)   # the pictures of two batches
  code, _, err = together(2, {"out": str(tmp_path), "name": "run", "poisoned": first[:, 4:].ravel().tolist()})
  message = [line for line in err.splitlines() if line.startswith("error: ")]
  assert code == 2 and len(message) == 1, err
  assert message[0].startswith("error: 2 steps in a row were not finite; the last, 2, had loss nan")
  assert ", ".join(f"picture {i}" for i in first[1]) in message[0], "pictures of all ranks"
  assert "Traceback" not in err


@mpi
def test_data_that_fails_one_rank(tmp_path):
  picture = int(np.random.default_rng((0, 0)).permutation(32)[16 + 7])   # of the third batch, on rank 1
  code, _, err = together(2, {"out": str(tmp_path), "name": "run", "missing": picture})
  message = [line for line in err.splitlines() if line.startswith("error: ")]
  assert code == 2 and len(message) == 1 and re.fullmatch(rf"error: rank 1 on \S+: picture {picture} is gone", message[0]), err
  assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-2.safetensors"]


@mpi
def test_bad_input_is_one_line(tmp_path):
  code, _, err = end(start(2, ROOT / "examples" / "train_retinanet.py", "--bs", "9", "--out", tmp_path))
  assert code == 2 and re.findall("^error: .*", err, re.MULTILINE) == ["error: --bs 9: is not a multiple of 2, --gpus 1 times 2 processes"]
  assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------------------------ launchers


@pytest.mark.parametrize(("environ", "expected"), [
  ({}, 1), ({"PMI_RANK": "0", "PMI_SIZE": "4"}, 4), ({"PMI_RANK": "0", "PMI_SIZE": "1"}, 1), ({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}, 2),
  ({"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "8"}, 8), ({"PMIX_RANK": "0"}, 0), ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),
  ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1)])   # the last is a batch script, which is one process
def test_launchers_are_known_by_their_variables(environ, expected): assert started_by_launcher(environ) == expected


def test_srun_without_mpi():
  with pytest.raises(UserError, match="srun started 8 processes that cannot find each other: add --mpi=pmi2"):
    started_by_launcher({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"})


def test_a_launcher_without_mpi4py(monkeypatch):
  monkeypatch.setitem(sys.modules, "mpi4py", None)
  monkeypatch.setenv("PMI_SIZE", "2")
  with pytest.raises(UserError, match=r"^an MPI launcher started 2 processes, but Python has no MPI to join them .*: pip install mpi4py mpich"), \
    module.join(): pass


@mpi
def test_a_launcher_of_another_mpi():
  environ = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI", "SLURM"))}
  done = subprocess.run([sys.executable, str(HERE / "mpi_program.py"), "[]"], capture_output=True, text=True, check=False, timeout=120,
                        env=environ | {"PYTHONPATH": str(ROOT), "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})
  assert done.returncode == 2 and "but each finds itself alone" in done.stderr and "MPICH" in done.stderr and done.stderr.count("\n") == 1


def test_without_a_launcher_mpi_is_not_loaded():
  code = "import sys, tinydet.runtime.mpi as r\nwith r.join() as ranks: print(ranks.size, 'mpi4py' in sys.modules)"
  environ = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI", "SLURM"))}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
                        env=environ | {"PYTHONPATH": str(ROOT)})
  assert done.stdout == "1 False\n"


# ------------------------------------------------------------------------------------------------------------------------------ parts


class Doubling:
  """Two ranks of the same values."""
  size = 2
  def add(self, array): array *= 2


@pytest.mark.parametrize(("names", "zero_copy"), [(("CPU",), True), (("CPU", "CPU:1"), True), (("CPU",), False)])
def test_an_exchange_is_one_piece_of_memory(names, zero_copy, monkeypatch):
  monkeypatch.setattr(module, "on_host", lambda device: zero_copy)   # without: the way of devices with memory of their own
  exchange = Exchange([((3, 5), dtypes.half), ((7,), dtypes.half), ((1000,), dtypes.float32), ((2, 2), dtypes.float32)], names, Doubling())
  assert [(end - begin) % 512 for begin, end, _ in exchange.runs] == [0, 0] and exchange.nbytes == exchange.runs[-1][1] == len(exchange.host)
  def everywhere(values): return Tensor(values, device=names[0]).realize() if len(names) == 1 else Tensor(values).shard(names).realize()
  rng = np.random.default_rng(0)
  for _ in range(2):
    values = [rng.standard_normal(t.shape).astype(np.float16 if t.dtype == dtypes.half else np.float32) for t in exchange.tensors]
    Tensor.realize(*(t.assign(everywhere(v)) for t, v in zip(exchange.tensors, values)))
    exchange.add()
    for t, v in zip(exchange.tensors, values):
      for copy in [t] if len(names) == 1 else [t.to(name) for name in names]: np.testing.assert_array_equal(copy.numpy(), v * 2)


def test_alone_nothing_happens():
  assert ALONE.broadcast(3) == 3 and ALONE.gather(3) == [3] and ALONE.largest(1, 0) == (1, 0) and ALONE.means([1.5]) == [1.5]
  ALONE.raise_together(None)
  with pytest.raises(UserError, match=r"^x$"): ALONE.raise_together(UserError("x"))
  with ALONE.in_turn(): pass


class Other(Ranks):
  """Two ranks, of which the other is told to stop."""
  def largest(self, *values): return (max(values[0], signal.SIGTERM), *values[1:])


def test_what_another_rank_is_told(capfd):
  signals = Signals(Other())
  signals.save = True
  assert signals.agree(False, True) == (signal.SIGTERM, True, False, True) and not signals.save
  assert "SIGTERM: ends after this step" in capfd.readouterr().err
  before = signal.getsignal(signal.SIGTERM)
  try:
    with pytest.raises(Stopped), signals: signals.raise_if_stopped()
    signal.raise_signal(signal.SIGTERM)   # its own comes late, and is the first
    assert signals.told
  finally: signal.signal(signal.SIGTERM, before)


def test_batch_sizes():
  four = Ranks()
  four.size = 4
  check_batch_size(parse(TrainerConfig, {}, ["--bs", "16", "--gpus", "2"], {}), four)
  with pytest.raises(UserError, match=r"^--bs 12: is not a multiple of 8, --gpus 2 times 4 processes$"):
    check_batch_size(parse(TrainerConfig, {}, ["--bs", "12", "--gpus", "2"], {}), four)


@pytest.mark.parametrize(("shown", "expected"), [(None, ("GPU:4", "GPU:5")), ("0,1,2,3,4,5,6,7", ("GPU:4", "GPU:5")), ("6,7", ("GPU", "GPU:1"))])
def test_each_process_takes_devices_of_its_own(shown, expected, monkeypatch):
  """GPUs in all but the kernels: they are not opened for real."""
  class Devices:
    @property
    def DEFAULT(self): return DEV.device
    def __getitem__(self, name): pass
    def canonicalize(self, name): return name
  monkeypatch.setattr(parallel, "Device", Devices())
  for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"): monkeypatch.delenv(name, raising=False)
  if shown: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
  third = Ranks()
  third.rank, third.local_rank, third.local_size, third.size = 10, 2, 4, 16
  with Context(DEV="GPU:PTX"):
    take_devices(third, 2)
    assert devices(2) == expected
    assert DEV.target("GPU").renderer == "PTX"
