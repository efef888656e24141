"""Files on a local HTTP server that keeps what was asked of it and misbehaves as told; for the tests of downloads."""
import hashlib, http.server, io, re, threading
from collections import Counter
import numpy as np
from PIL import Image


def jpeg(seed, width=40, height=30):
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(file, "JPEG")
  return file.getvalue()


class FileServer:
  """Serves `files`, path -> bytes, with ranges and Amazon's headers."""
  def __init__(self):
    self.files, self.requests, self.sent = {}, [], 0
    self.cuts = {}        # path -> bytes after which each of its next answers breaks off
    self.statuses = {}    # path, or "" for all -> status of every answer
    self.etags = {}       # path -> another ETag than the content's MD5
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      server_version, sys_version = "AmazonS3", ""
      def version_string(self): return "AmazonS3"
      def log_message(self, *args): pass
      def do_GET(self): outer.answer(self)
    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
    self.base = f"http://127.0.0.1:{self.http.server_port}/"

  def answer(self, h):
    path = h.path.lstrip("/")
    self.requests.append((path, h.headers.get("Range")))
    data, start, status = self.files.get(path, b""), 0, self.statuses.get(path, self.statuses.get("", 200 if path in self.files else 404))
    etag = self.etags.get(path, f'"{hashlib.md5(data).hexdigest()}"')
    if status == 200 and (part := re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range", ""))) and h.headers.get("If-Range") in (None, etag):
      start, status = int(part[1]), 206
    h.send_response(status)
    h.send_header("ETag", etag)
    if status == 206: h.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    body = data[start:] if status in (200, 206) else b"not the file"
    h.send_header("Content-Length", str(len(body)))
    h.end_headers()
    cut = self.cuts[path].pop(0) if self.cuts.get(path) else None
    h.wfile.write(body[:cut])
    self.sent += len(body[:cut])
    h.close_connection = True

  def asked(self) -> Counter: return Counter(path for path, _ in self.requests)

  def close(self):
    self.http.shutdown()
    self.http.server_close()
