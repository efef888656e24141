"""Signals from a program's start to its loop."""
import os, signal, subprocess, sys, time
import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signals")
PROGRAM = """
import sys, time
from tinydet.errors import exit_on_user_error
from tinydet.runtime.signals import Signals, before_the_loop
try:
  with exit_on_user_error(), before_the_loop():
    print("started", flush=True)
    sys.stdin.readline()   # as long as a start takes
    with Signals() as signals:
      for step in range(1, 4):
        stop, save = signals.agree()
        print(f"step {step}: stop {stop} save {int(save)}", flush=True)
        if stop: signals.raise_if_stopped()
        if step == 1: sys.stdin.readline()
    sys.stdin.readline()
finally: print("cleaned up", flush=True)
"""


@pytest.fixture
def program():
  process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "started\n"
  yield process
  process.kill()
  process.communicate()


def told(process, number) -> None:
  process.send_signal(number)
  time.sleep(0.3)


def test_a_checkpoint_asked_for_before_the_first_step_is_written_after_it(program):
  told(program, signal.SIGUSR1)
  out, _ = program.communicate("\n\n\n")
  assert out.splitlines() == ["step 1: stop 0 save 1", "step 2: stop 0 save 0", "step 3: stop 0 save 0", "cleaned up"] and program.returncode == 0


def test_sigterm_before_the_loop_ends_with_the_ordinary_code(program):
  told(program, signal.SIGTERM)
  out, _ = program.communicate()
  assert out == "cleaned up\n" and program.returncode == 128 + signal.SIGTERM


def test_in_the_loop_it_is_the_loop_that_acts(program):
  program.stdin.write("\n")
  program.stdin.flush()
  assert program.stdout.readline().startswith("step 1")
  told(program, signal.SIGUSR1)
  told(program, signal.SIGTERM)
  out, _ = program.communicate("\n\n")
  assert out.splitlines() == ["step 2: stop 15 save 1", "cleaned up"] and program.returncode == 128 + signal.SIGTERM


def test_after_the_loop_too(program):
  program.stdin.write("\n\n")
  program.stdin.flush()
  while "step 3" not in program.stdout.readline(): pass
  time.sleep(0.2)
  told(program, signal.SIGUSR1)
  assert program.poll() is None
  told(program, signal.SIGTERM)
  out, _ = program.communicate()
  assert out == "cleaned up\n" and program.returncode == 128 + signal.SIGTERM


def test_handlers_of_before_are_put_back():
  from tinydet.runtime.signals import before_the_loop
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
  with before_the_loop(): os.kill(os.getpid(), signal.SIGUSR1)
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
