"""A fork of a process that runs a network is told so in one line; one that was made before runs its own."""
import os, subprocess, sys
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
PROGRAM = """
import os, sys
import numpy as np
from tinygrad import Tensor
from tinydet.errors import exit_on_user_error
from tinydet.runtime.device import require_device
from tinydet.runtime.graphs import jit
import warnings; warnings.simplefilter("ignore")
double = jit(lambda x: (x * 2).contiguous())
def use(what):
  if what == "device": require_device()
  if what == "graph": print(double(Tensor(np.ones(3, np.float32)).realize()).tolist(), flush=True)
  if what == "kernel": print((Tensor(np.ones(4, np.float32)) * 3).tolist(), flush=True)
before, inside = sys.argv[1].split(","), sys.argv[2]
for what in before: use(what)
if (child := os.fork()) == 0:
  code = 0
  try:
    with exit_on_user_error(): use(inside)
  except SystemExit as e: code = e.code
  sys.stderr.flush()
  os._exit(code)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
for what in before: use(what)
"""


def fork(before: str, inside: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-c", PROGRAM, before, inside]
  return subprocess.run(command, env=os.environ | {"DEV": "CPU"}, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.parametrize(("before", "inside"), [("device,graph", "graph"), ("graph", "graph"), ("device,graph", "kernel"),
                                                ("device,kernel", "kernel"), ("device", "device"), ("device,graph", "device")])
def test_a_device_is_not_used_on_both_sides(before, inside):
  done = fork(before, inside)
  assert "child 2" in done.stdout and done.stderr.count("\n") == 1, done.stderr
  assert done.stderr.startswith("error: process ") and "is a fork of" in done.stderr and "spawn" in done.stderr
  prints = {"graph": ["[2.0, 2.0, 2.0]"], "kernel": ["[3.0, 3.0, 3.0, 3.0]"], "device": []}
  whole = [line for word in before.split(",") for line in prints[word]]
  assert done.stdout.splitlines() == [*whole, "child 2", *whole], "the program itself goes on"


@pytest.mark.parametrize("inside", ["graph", "kernel", "device"])
def test_a_fork_made_before_has_its_own(inside):
  done = fork("nothing", inside)
  assert "child 0" in done.stdout and not done.stderr, done.stderr


def test_a_graph_captured_in_a_fork_only_is_the_forks():
  program = PROGRAM.replace("use(inside)", "use(inside); use(inside)")
  command = [sys.executable, "-c", program, "nothing", "graph"]
  done = subprocess.run(command, env=os.environ | {"DEV": "CPU"}, capture_output=True, text=True, check=True)
  assert done.stdout.splitlines() == ["[2.0, 2.0, 2.0]"] * 2 + ["child 0"] and not done.stderr
