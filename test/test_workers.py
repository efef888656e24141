"""The processes that compile: what they are given comes back, and one that is killed costs time at most."""
import os, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest
from by_hand import by_hand
from tinydet.runtime.workers import Died, Workers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are none")
PROGRAM = """
import os, signal, sys, threading, time
import numpy as np
from tinydet.runtime import device, workers
from tinygrad import Context, Tensor
device.require_device()
pool, begun = workers.workers(), []
start = pool.start
def watched(*task):
  begun.append(task)
  return start(*task)
pool.start = watched
def kill():
  while not begun: time.sleep(0.001)
  time.sleep(float(sys.argv[2]))
  for process in pool.processes[:int(sys.argv[1])]: os.kill(process.pid, signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
from tinydet.runtime.graphs import jit
weights = [Tensor(np.full((16 + i, 16 + i), 0.01 * (i + 1), np.float32)).realize() for i in range(10)]
@jit
def sums(x):
  parts = []
  for i, w in enumerate(weights):
    parts.append(((x[:, :16 + i] @ w).tanh() * (i + 1)).sum().contiguous())
    parts[-1].realize()
  return Tensor.stack(*parts)
x = Tensor(np.linspace(-1, 1, 4 * 32, dtype=np.float32).reshape(4, 32)).realize()
print(sums(x).tolist(), flush=True)
Tensor.realize(*[(x[:, :i] * i).contiguous().sum() for i in range(3, 8)])   # tinygrad's own way to the processes
print("done", flush=True)
"""


def run(count: int, delay: float, cache: Path) -> subprocess.CompletedProcess:
  environ, command = os.environ | {"PARALLEL": "2", "XDG_CACHE_HOME": str(cache), "CACHEDB": f"{cache}/cache.db"}, [sys.executable, "-c", PROGRAM]
  return subprocess.run([*command, str(count), str(delay)], env=environ, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> str:
  done = run(0, 0, tmp_path_factory.mktemp("cache"))
  assert done.returncode == 0 and done.stdout.endswith("done\n") and not done.stderr, done.stderr
  return done.stdout


@pytest.mark.parametrize(("count", "delay"), by_hand([(1, 0.0), (1, 0.3), (2, 0.0), (2, 0.3)], (1, 0.0), (2, 0.3)))
def test_a_process_killed_in_mid_compile_costs_no_more_than_time(calm, tmp_path, count, delay):
  done = run(count, delay, tmp_path)
  assert done.returncode == 0 and done.stdout == calm, done.stderr
  assert done.stderr.count("\n") == 1 and "died (killed by SIGKILL)" in done.stderr, done.stderr


def slow(seconds: float) -> float:
  time.sleep(seconds)
  return seconds


def fail(message: str) -> None: raise ValueError(message)


def test_results_errors_and_ends():
  pool = Workers(2)
  assert [pool.result(f) for f in [pool.start(str, i) for i in range(20)]] == [str(i) for i in range(20)]
  with pytest.raises(ValueError, match="gone wrong"): pool.result(pool.start(fail, "gone wrong"))
  assert sorted(pool.imap_unordered(abs, range(-9, 0))) == list(range(1, 10))
  with pytest.raises(Exception, match="pickle"): pool.result(pool.start(lambda x: x, 1))
  pool.start(slow, 60)
  begun = time.monotonic()
  pool.terminate()
  assert time.monotonic() - begun < 5 and all(process.returncode == -signal.SIGKILL for process in pool.processes)
  deadline = time.monotonic() + 5
  while pool._alive and time.monotonic() < deadline: time.sleep(0.01)
  with pytest.raises(Died): pool.start(abs, 1).result()
  assert pool.result(pool.start(abs, -1)) == 1, "done here"


def test_a_process_is_replaced_after_many_tasks(monkeypatch):
  monkeypatch.setattr("tinydet.runtime.workers.MOST_TASKS", 3)
  pool = Workers(1)
  first = pool.processes[0].pid
  assert [pool.result(pool.start(abs, -i)) for i in range(10)] == list(range(10))
  assert pool.processes[0].pid != first
  assert Path(pool._folder).is_dir(), "the others go on in it"
  pool.terminate()
  assert not Path(pool._folder).exists()


def test_the_processes_end_with_the_program_however_it_ends(tmp_path):
  program = ("import os, sys\nfrom tinydet.runtime.workers import Workers\nimport time\npool = Workers(2)\npool.result(pool.start(abs, 1))\n"
             "print(*(p.pid for p in pool.processes), flush=True)\nsys.stdin.read() and sys.exit(0)\nos.kill(os.getpid(), 9)")
  for words in ("end", ""):
    (files := tmp_path / f"files{words}").mkdir()
    done = subprocess.run([sys.executable, "-c", program], input=words, capture_output=True, text=True, check=False, timeout=60,
                          env=os.environ | {"TMPDIR": str(files)})
    assert done.returncode == (0 if words else -9), done.stderr
    deadline = time.monotonic() + 10
    def alive(pid: str) -> bool: return Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    while any(map(alive, done.stdout.split())) and time.monotonic() < deadline: time.sleep(0.05)
    assert not any(map(alive, done.stdout.split())) and not list(files.iterdir()), "and nothing is left of their files"


def test_ctrl_c_while_a_kernel_compiles_ends_at_once(tmp_path):
  program = ("from tests_slow import slow\nfrom tinydet.runtime.workers import Workers\nimport sys\npool = Workers(1)\n"
             "print('begun', flush=True)\npool.result(pool.start(slow, 60))")
  folder = Path(__file__).parent
  program = program.replace("from tests_slow import slow", f"import sys; sys.path.insert(0, {str(folder)!r}); from test_workers import slow")
  process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
                             env=os.environ | {"TMPDIR": str(tmp_path)})
  assert process.stdout.readline() == b"begun\n"
  time.sleep(0.5)
  folder, = tmp_path.iterdir()
  (folder / "0").write_text("of a kernel that is compiled")
  os.killpg(process.pid, signal.SIGINT)
  assert process.wait(timeout=60) != 0 and not list(tmp_path.iterdir()), "nothing is left behind"
  process.stdout.close()


def test_threads_give_tasks_side_by_side():
  pool, results = Workers(2), []
  threads = [threading.Thread(target=lambda i=i: results.append(pool.result(pool.start(abs, -i)))) for i in range(8)]
  for thread in threads: thread.start()
  for thread in threads: thread.join()
  assert sorted(results) == list(range(8))
  pool.terminate()


def test_where_no_process_can_be_started_the_program_compiles():
  program = ("from unittest.mock import patch\nfrom tinydet.runtime import workers\nimport errno\n"
             "def refuse(*_, **__): raise OSError(errno.EAGAIN, 'Resource temporarily unavailable')\n"
             "from tinydet.runtime.device import require_device\nfrom tinygrad import Tensor\n"
             "require_device()\nwith patch.object(workers, '_begin', refuse):\n  "
             "Tensor.realize(*[Tensor.ones(i, 9).contiguous().realize().sum() for i in range(2, 6)])\nprint('done')")
  environ = os.environ | {"DEV": "CPU", "CACHELEVEL": "0"}
  done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
  assert done.stdout == "done\n" and done.stderr.count("\n") == 1 and "cannot be started (Resource temporarily unavailable)" in done.stderr
