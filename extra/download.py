"""Files from the net, one large or many small: resumed where they broke off, verified, whole or absent."""
import base64, contextlib, hashlib, os, re, shutil, ssl, sys, threading, time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import (HTTPDefaultErrorHandler, HTTPErrorProcessor, HTTPHandler, HTTPRedirectHandler, HTTPSHandler, OpenerDirector, ProxyHandler,
                            Request, url2pathname)
from tinydet.cache import cache_folder   # noqa: F401, beside fetch, which it is for
from tinydet.errors import UserError
try: import fcntl
except ImportError: fcntl = None   # Windows: two processes at one file are not kept apart there; no more than a failed download comes of it

PATIENCE = 20.0   # seconds without a byte, all tries together, until a host counts as out of reach
PAUSES = 0.5, 1.0, 2.0   # seconds before each further try
LARGE = 10 ** 9   # bytes whose checksum takes seconds
CHECKSUM = re.compile("sha256:[0-9a-f]{8,64}|md5:[0-9a-f]{32}|unknown:")


class Unreachable(Exception):
  """Why no further bytes come; `final` where asking again would not help."""
  def __init__(self, reason: str, final: bool = False): super().__init__(reason); self.final = final


def fetch(url: str, checksum: str, folder: Path) -> Path:
  """The verified file that `url` ends in, in `folder`, downloaded where it is not there yet.

  `checksum` is "sha256:" and the first 8 to 64 hexadecimal digits, "md5:" and all 32, or "unknown:" where none is published. A file that is there is
  verified each time and makes no request. Otherwise bytes come from the url or, where the environment names one in TINYDET_MIRROR, from a mirror: a
  folder, file:// or http(s):// under which files lie by their names. They go into `<name>.partial`, locked (another process waits and then finds the
  file), which the next call goes on from. UserError, with the mend, where the file is out of reach, is another one or does not fit the disk: what was
  there before stays, and where not one byte came nothing new stays."""
  if CHECKSUM.fullmatch(checksum) is None: raise ValueError(f"{checksum!r} is no checksum")
  name, mirror, algorithm = unquote(urlsplit(url).path).rsplit("/", 1)[-1], os.environ.get("TINYDET_MIRROR", ""), checksum.partition(":")[0]
  path, partial, tag = (folder/f"{name}{suffix}" for suffix in ("", ".partial", ".partial.tag"))
  source, missing = _on_mirror(mirror, name) if mirror else url, [p for p in (folder, *folder.parents) if not p.exists()]
  def found(file: Path) -> str:
    if algorithm == "unknown": return checksum
    if (size := file.stat().st_size) > LARGE: print(f"verifying {name} ({size_text(size)})", file=sys.stderr)
    with open(file, "rb") as f: return f"{algorithm}:{hashlib.file_digest(f, algorithm).hexdigest()}"
  try:
    if path.is_file():
      if found(path).startswith(checksum): return path
      print(f"{path} is broken, {checksum} does not fit it: fetching it again", file=sys.stderr)
    with _locked(partial, tag) as f:
      if path.is_file() and found(path).startswith(checksum): return path   # the other process was faster
      for again in (True, False):
        resumed = _download(source, f, tag)
        if (digest := found(partial)).startswith(checksum): break
        f.truncate(0)
        # bytes of an earlier call may be what spoilt it: then once more, from the start
        if not (resumed and again): raise UserError(f"{source}: its checksum is {digest}, expected {checksum}; removed, name another mirror in "
                                                    "TINYDET_MIRROR" + f" or fetch {url} elsewhere and put it into {folder}{os.sep}" * bool(mirror))
      os.fsync(f.fileno())
      if fcntl is None: f.close()
      os.replace(partial, path)
      tag.unlink(missing_ok=True)
    return path
  except Unreachable as e:
    where, another = (f" from TINYDET_MIRROR={mirror}", "another") if mirror else ("", "a")
    kept = f"; the {size_text(partial.stat().st_size)} that came are kept, the next try goes on from there" if partial.exists() else ""
    raise UserError(f"{name} cannot be downloaded{where} ({e}): fetch {url} elsewhere and put it into {folder}{os.sep}, or name {another} mirror in "
                    f"TINYDET_MIRROR{kept}") from e
  except OSError as e: raise UserError(f"cannot write {path}: {e.strerror or e}; mend that, or fetch {url} elsewhere and put it there") from e
  finally:
    with contextlib.suppress(OSError):
      for p in missing: p.rmdir()   # a folder that holds something stays


def fetch_many(name: str, base: str, files: Iterable[tuple[str, Path]], count: int, workers: int,
               accept: Callable[[Path, bytes], None]) -> list[tuple[str, str]]:
  """Download `count` small files, (name below `base`, path), by `workers` threads; returns (url, reason) of those that did not come.

  Each is held against the length and the MD5 that its server states, if it does (Amazon's and Google's storage do), and given to `accept`, called in
  the threads, whose ValueError says what is wrong with it; then it appears under its path, whole. A mirror in TINYDET_MIRROR takes the place of
  `base`. UserError where too many in a row fail or the disk refuses: what came stays."""
  import requests   # here, for it takes a tenth of a second
  mirror, files, lock, stop = os.environ.get("TINYDET_MIRROR", ""), iter(files), threading.Lock(), threading.Event()
  failures, fatal, done, in_a_row = [], [], 0, 0

  def work() -> None:
    nonlocal done, in_a_row
    with requests.Session() as session:
      session.headers.update({"User-Agent": "tinydet", "Accept-Encoding": "identity"})
      while not stop.is_set():
        with lock: file, path = next(files, ("", None))
        if path is None: return
        source, reason = _on_mirror(mirror, file) if mirror else base + file, ""
        try:
          accept(path, data := _get(session, source, stop))
          write_whole(path, data)
        except (Unreachable, ValueError) as e: reason = str(e)
        with lock:
          if reason: failures.append((source, reason))
          done, in_a_row = done + 1, in_a_row + 1 if reason else 0
          if in_a_row >= max(8, 2 * workers):
            raise UserError(f"{name}: {in_a_row} files in a row cannot be downloaded, the last {source} ({reason}): run it again later, what came is "
                            f"kept, or name a{'nother' * bool(mirror)} mirror in TINYDET_MIRROR")

  def guarded() -> None:
    try: work()
    except BaseException as e:
      fatal.append(e)
      stop.set()

  threads = [threading.Thread(target=guarded, daemon=True) for _ in range(min(workers, count))]
  with progress(name, 0, count, lambda n: f"{n:,}", 1, "files/s") as show:
    try:
      for thread in threads: thread.start()
      while any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
        show(done)
    finally:
      stop.set()
      ended = time.monotonic() + 2   # after Ctrl-C a thread may sit in a request for longer, and ends with the process
      for thread in threads: thread.join(max(0.0, ended - time.monotonic()))
  if fatal: raise fatal[0]
  return sorted(failures)


def write_whole(path: Path, data: bytes) -> None:
  """Write a file that appears whole or not at all; UserError where the disk refuses. A killed process may leave `.<name>.partial`."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    partial.write_bytes(data)
    os.replace(partial, path)
  except OSError as e:
    partial.unlink(missing_ok=True)
    raise UserError(f"cannot write {path}: {e.strerror or e}; mend that and run it again, what came is kept") from e


@contextlib.contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
  """Let one process at a time, on this machine, work on `name` in `folder`, which is made, and removed again if nothing came into it."""
  missing = [p for p in (folder, *folder.parents) if not p.exists()]
  try:
    with contextlib.ExitStack() as stack:
      try: stack.enter_context(_locked(folder/f"{name}.lock", folder/f"{name}.lock.tag"))
      except OSError as e: raise UserError(f"cannot write into {folder}: {e.strerror or e}; mend that, or choose another folder") from e
      yield
  finally:
    with contextlib.suppress(OSError):
      for p in missing: p.rmdir()


def free_bytes(folder: Path) -> int:
  """Bytes that are free where `folder` is or would be made."""
  return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


def _on_mirror(mirror: str, name: str) -> str:
  """Where the file lies on the mirror: an http(s) url, or a path."""
  scheme = urlsplit(mirror).scheme if "://" in mirror else ""
  if scheme in ("http", "https"): return f"{mirror.rstrip('/')}/{quote(name)}"
  if scheme not in ("", "file"): raise UserError(f"TINYDET_MIRROR={mirror}: is neither http://, https://, file:// nor a folder")
  return str(Path(url2pathname(urlsplit(mirror).path) if scheme else mirror).expanduser().absolute()/name)


@contextlib.contextmanager
def _locked(partial: Path, tag: Path) -> Iterator[BinaryIO]:
  """The partial file open for appending and locked for this process alone; removed at the end, with its tag, if it is empty."""
  def ours() -> bool:
    try: return os.path.samestat(os.stat(partial), os.fstat(f.fileno()))
    except FileNotFoundError: return False
  while True:
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as f:
      if fcntl is not None:
        try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          print(f"waiting for another process that downloads {partial.stem}", file=sys.stderr)
          fcntl.flock(f, fcntl.LOCK_EX)
        except OSError: pass   # a file system without locks: as on Windows
      if not ours(): continue   # finished or given up while this process waited
      try: yield f
      finally:
        if not f.closed and ours() and not os.fstat(f.fileno()).st_size:
          partial.unlink()
          tag.unlink(missing_ok=True)
      return


def _download(source: str, f: BinaryIO, tag: Path) -> bool:
  """Append to `f` what it lacks, trying again as long as tries bring more; whether a server was asked to go on. Unreachable where it ends short."""
  most, tries, since, resumed = os.fstat(f.fileno()).st_size, 0, time.monotonic(), False
  while True:
    resumed |= os.fstat(f.fileno()).st_size > 0
    try:
      _attempt(source, f, tag, since + PATIENCE - time.monotonic())
      return resumed
    except Unreachable as e:
      if (size := os.fstat(f.fileno()).st_size) > most: most, tries, since = size, 0, time.monotonic()
      if e.final or tries == len(PAUSES) or time.monotonic() + PAUSES[tries] > since + PATIENCE: raise
      time.sleep(PAUSES[tries])
      tries += 1


def _attempt(source: str, f: BinaryIO, tag: Path, seconds: float) -> None:
  """One request, for what `f` lacks or, where the server cannot go on or has another file by now, for all of it. `tag` keeps which file it was."""
  size = os.fstat(f.fileno()).st_size
  known = tag.read_text(errors="replace") if size and tag.is_file() else ""
  with contextlib.ExitStack() as stack:
    with _network():
      try: stream, start, total, version = _open(source, size, known, seconds)
      except HTTPError as e:
        if e.code == 416 and size: return   # nothing after `size`: the checksum tells whether this is the whole file
        raise
      stack.enter_context(stream)
    if start != size or known != version:
      f.truncate(size := 0)
      if start: raise Unreachable("the file has changed on the server")
    if total is not None and (free := shutil.disk_usage(tag.parent).free) < total - size:
      raise UserError(f"{source}: {size_text(total - size)} do not fit into {tag.parent}, where {size_text(free)} are free: make room there")
    with progress(unquote(source.rsplit("/", 1)[-1]), size, total) as show:
      try:
        while chunk := _read(stream):
          if not size: tag.write_text(version)
          f.write(chunk)
          show(size := size + len(chunk))
      finally: f.flush()
    if total is not None and size < total: raise Unreachable(f"the connection broke off after {size_text(size)} of {size_text(total)}")


def _read(stream: Any) -> bytes:
  with _network(): return stream.read1(1 << 20)


def _open(source: str, size: int, known: str, seconds: float) -> tuple[Any, int, int | None, str]:
  """`(stream, the byte it starts at, size of the whole file or None, what marks this version of it)`; it starts at `size` where it can."""
  if "://" not in source: return (stream := open(source, "rb")), 0, os.fstat(stream.fileno()).st_size, ""
  headers = {"User-Agent": "tinydet", "Accept-Encoding": "identity"}
  if size: headers |= {"Range": f"bytes={size}-"} | ({"If-Range": known} if known else {})
  opener, answer = OpenerDirector(), Future()
  for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler(context=ssl.create_default_context()), HTTPErrorProcessor(), HTTPDefaultErrorHandler(),
                  _Redirects()): opener.add_handler(handler)
  def ask() -> None:
    try: answer.set_result(opener.open(Request(source, headers=headers), timeout=PATIENCE))
    except Exception as e: answer.set_exception(e)
  # a thread, since neither the lookup of a name nor a host of many dead addresses heeds a socket's timeout
  threading.Thread(target=ask, daemon=True).start()
  r = answer.result(max(1.0, seconds))
  version, length, part = r.headers.get("ETag", "W/"), r.headers.get("Content-Length", ""), r.headers.get("Content-Range", "")
  if version.startswith("W/"): version = r.headers.get("Last-Modified", "")   # a weak tag does not promise the same bytes
  if r.status == 206: return r, *((int(m[1]), int(m[2])) if (m := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", part)) else (-1, None)), version
  return r, 0, int(length) if length.isdecimal() else None, version


class _Redirects(HTTPRedirectHandler):
  """Follows a redirect, but never from https to anything else."""
  def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
    if urlsplit(newurl).scheme not in (("https",) if req.type == "https" else ("http", "https")):
      raise HTTPError(req.full_url, code, f"sends to {newurl}, which is not https", headers, fp)
    return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def _network() -> Iterator[None]:
  """Give the many ways in which a host or mirror fails one name, which trouble with the disk does not have."""
  try: yield
  except HTTPError as e: raise Unreachable(f"HTTP {e.code} {e.reason}", e.code < 500 and e.code not in (408, 429)) from e
  except (OSError, HTTPException) as e:
    cause = e.reason if isinstance(getattr(e, "reason", None), Exception) else e
    if isinstance(cause, ssl.SSLCertVerificationError): raise Unreachable(f"its certificate is refused: {cause.verify_message}", True) from e
    reason = "no answer" if isinstance(cause, TimeoutError) else getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    raise Unreachable(" ".join(reason.split()), isinstance(cause, FileNotFoundError | NotADirectoryError | PermissionError)) from e


def _get(session: Any, source: str, stop: threading.Event) -> bytes:
  """The whole content of `source`, an http(s) url or a path, tried as often as `_download` does; Unreachable."""
  import requests
  for pause in (*PAUSES, None):
    try:
      if "://" not in source:
        with _network(): return Path(source).read_bytes()
      try: r = session.get(source, timeout=PATIENCE)
      except (requests.RequestException, OSError) as e: raise Unreachable(_cause(e)) from e
      if source.startswith("https:") and not r.url.startswith("https:"): raise Unreachable(f"sends to {r.url}, which is not https", True)
      if r.status_code != 200: raise Unreachable(f"HTTP {r.status_code} {r.reason}", r.status_code < 500 and r.status_code not in (408, 429))
      if (stated := _stated_md5(r.headers)) and hashlib.md5(r.content).hexdigest() != stated:
        raise Unreachable(f"its MD5 is not {stated}, which the server states")
      return r.content
    except Unreachable as e:
      if e.final or pause is None or stop.wait(pause): raise
  raise AssertionError("the last try returns or raises")


def _stated_md5(headers: Any) -> str | None:
  """The MD5 of the content, in hexadecimal, where it is Google's or Amazon's storage that answers."""
  if (google := re.search(r"md5=([A-Za-z0-9+/]{22}==)", headers.get("x-goog-hash", ""))): return base64.b64decode(google[1]).hex()
  plain = headers.get("Server") == "AmazonS3" and headers.get("x-amz-server-side-encryption", "AES256") == "AES256"
  return etag[1] if plain and (etag := re.fullmatch('"([0-9a-f]{32})"', headers.get("ETag", ""))) else None   # "...-3" is one of several parts


def _cause(error: BaseException) -> str:
  """What lies at the bottom of a failed request, in short."""
  while (inner := getattr(error, "reason", None)) is not None and isinstance(inner, BaseException): error = inner
  while (inner := error.__cause__ or error.__context__ or next((a for a in error.args if isinstance(a, BaseException)), None)) is not None:
    error = inner
  if isinstance(error, TimeoutError): return "no answer"
  if type(error).__name__ == "IncompleteRead": return f"the connection broke off ({error})"
  return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]


def size_text(count: int) -> str:
  """Bytes for a reader: "4 bytes", "2.3 MB", "19.3 GB"."""
  return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


@contextlib.contextmanager
def progress(name: str, start: int, total: int | None, text: Callable[[int], str] = size_text, unit: float = 1e6,
             rate: str = "MB/s") -> Iterator[Callable[[int], None]]:
  """A function to call with how much there is: one line on stderr that grows where that is a terminal, else a line for each tenth (or 100 MB)."""
  terminal, begun, shown = sys.stderr.isatty(), time.monotonic(), None
  def show(done: int) -> None:
    nonlocal shown
    seconds = max(1e-3, time.monotonic() - begun)
    # ten times a second on a terminal
    if (mark := (done == total, int(seconds * 10)) if terminal else done * 10 // (total or 10 ** 9)) == shown: return
    shown = mark
    share = f" of {text(total)} [{'#' * (20 * done // total):20}] {100 * done // total}%" if total else ""
    minutes = (total - done) * seconds / (done - start) / 60 if total and done > start else 0.0
    left = f", {minutes:.0f} min left" if minutes >= 2 else ""
    print("\r" * terminal + f"{name}: {text(done)}{share}, {(done - start) / seconds / unit:.1f} {rate}{left}", end="\033[K" if terminal else "\n",
          file=sys.stderr, flush=True)
  try: yield show
  finally:
    if terminal and shown is not None: print(file=sys.stderr)
