"""The lock on a run's folder, and file systems that have none."""
import errno, os
import pytest
from tinydet import parts
from tinydet.errors import UserError
from tinydet.runtime import lock
from tinydet.runtime.lock import claim

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="no locks here at all")


@pytest.fixture(autouse=True)
def fresh(): parts.noted.clear()


def failing(monkeypatch, number: int) -> None:
  def flock(file, how): raise OSError(number, os.strerror(number))
  monkeypatch.setattr(lock.fcntl, "flock", flock)


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch, capsys, name):
  failing(monkeypatch, getattr(errno, name))
  for _ in range(2): claim(tmp_path).close()
  line, = capsys.readouterr().err.splitlines()
  assert line.startswith(f"note: {tmp_path}: files cannot be locked there ({os.strerror(getattr(errno, name))})")


def test_another_process_is_kept_out(tmp_path):
  held = claim(tmp_path)
  with pytest.raises(UserError, match="another process is running there; end it first, or choose another --run-name"): claim(tmp_path)
  held.close()
  claim(tmp_path).close()


def test_what_cannot_be_written_is_an_error(tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r"gone: cannot be written \(No such file"): claim(tmp_path / "gone")
  failing(monkeypatch, errno.EIO)
  with pytest.raises(UserError, match=r"cannot be written \(Input/output error\)"): claim(tmp_path)
