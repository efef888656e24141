"""Which checkpoint a run goes on from, and that nothing is lost in looking for it."""
import builtins, errno, os
import numpy as np
import pytest
from tinydet.errors import UserError
from tinydet.training.resume import load_newest, open_run
from tinydet.weights import checkpoint


@pytest.fixture
def folder(tmp_path):
  """A run with the checkpoints of steps 1 to 3, and what a killed process left."""
  (tmp_path / "run").mkdir()
  for step in (1, 2, 3): checkpoint.save(tmp_path / "run" / f"checkpoint-{step}.safetensors", {"w": np.full(3, step, np.float32)}, {"step": step})
  (tmp_path / "run" / ".checkpoint-4.safetensors.abcd.partial").write_text("half")
  return tmp_path / "run"


def files(folder) -> list[str]: return sorted(path.name for path in folder.iterdir() if path.name != "run.lock")


def spoil(path) -> None: path.write_bytes(path.read_bytes()[:-1] + b"x")


ALL = ["checkpoint-1.safetensors", "checkpoint-2.safetensors", "checkpoint-3.safetensors"]


def test_the_newest_is_taken_and_only_half_a_file_goes(folder):
  assert load_newest(folder)[1] == {"step": 3} and files(folder) == ALL


@pytest.mark.parametrize("content", [b"", b"x" * 100, None, "dtype"])
def test_a_broken_one_is_passed_over_and_stays(folder, capsys, content):
  newest = folder / ALL[2]
  if content is None: spoil(newest)
  elif content == "dtype": newest.write_bytes(newest.read_bytes().replace(b'"F32"', b'"F9x"'))
  else: newest.write_bytes(content)
  before = newest.read_bytes()
  assert load_newest(folder)[1] == {"step": 2} and files(folder) == ALL and newest.read_bytes() == before
  line, = capsys.readouterr().err.splitlines()
  assert ALL[2] in line and "the checkpoint before it is used" in line


def test_where_none_is_whole_nothing_begins_anew(folder, capsys):
  for name in ALL: spoil(folder / name)
  with pytest.raises(UserError, match="none of its checkpoints is whole; choose another --run-name, or move them away"):
    open_run("auto", str(folder.parent), "run")
  assert files(folder) == ALL and len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_one_that_the_system_does_not_let_be_read_is_an_error(folder, monkeypatch, number):
  real = open
  def refusing(path, *words, **options):
    if str(path).endswith(ALL[2]): raise OSError(number, os.strerror(number), str(path))
    return real(path, *words, **options)
  monkeypatch.setattr(builtins, "open", refusing)
  with pytest.raises(UserError, match=rf"cannot read .*{ALL[2]}: {os.strerror(number)}; mend its permissions or its disk, or move it away"):
    open_run("auto", str(folder.parent), "run")
  assert files(folder) == ALL


def test_a_folder_that_cannot_be_listed_is_an_error(folder, monkeypatch):
  def refused(path): raise PermissionError(errno.EACCES, "Permission denied", str(path))
  monkeypatch.setattr(os, "listdir", refused)
  with pytest.raises(UserError, match=r"cannot read .*run: Permission denied"): open_run("auto", str(folder.parent), "run")


def test_a_run_without_checkpoints_begins(folder):
  for name in ALL: (folder / name).unlink()
  _, lock, tensors, about = open_run("auto", str(folder.parent), "run")
  lock.close()
  assert (tensors, about) == ({}, {})


def test_broken_checkpoints_of_later_steps_do_not_push_out_whole_ones(folder):
  """A run that passed over steps 2 and 3 writes its own 2, and keeps one."""
  spoil(folder / ALL[2])
  checkpoint.prune(folder, 1, step=2)
  assert [path.name for path in checkpoint.checkpoints(folder)] == ALL[1:]
