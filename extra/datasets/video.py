"""Videos and cameras frame by frame, and back into a file, by PyAV (FFmpeg), which is asked for when it is needed."""
import os, sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
import numpy as np
from tinydet.errors import UserError

SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")


def require_av() -> Any:
  """The module `av`; UserError with the mend where it is not installed."""
  try: import av
  except ImportError: raise UserError("videos and cameras need PyAV: pip install av") from None
  return av


class Video:
  """A file or, by its number, a camera. `name` is for messages, `rate` frames a second, `frames_expected` 0 where it is not known, `has_sound`.

  UserError where it cannot be opened or holds no pictures; `close` it in the end."""
  def __init__(self, source: Path | int):
    self.av, is_camera = require_av(), isinstance(source, int)
    self.name = f"camera {source}" if is_camera else str(source)
    try: self.container = self._camera(source) if is_camera else self.av.open(self.name)
    except (OSError, ValueError) as e:
      mend = "is one connected, and may you use it?" if is_camera else "is it a video?"
      raise UserError(f"{self.name}: cannot be opened ({getattr(e, 'strerror', None) or e}); {mend}") from e
    if not self.container.streams.video:
      self.container.close()
      raise UserError(f"{self.name}: holds no pictures")
    self.track, self.has_sound = self.container.streams.video[0], bool(self.container.streams.audio)
    self.track.thread_type = "AUTO"
    self.rate, self.time_base = self.track.average_rate or self.track.guessed_rate or Fraction(25), self.track.time_base
    self.frames_expected = self.track.frames or round(float((self.track.duration or 0) * self.time_base * self.rate))

  def frames(self) -> Iterator[Any]:
    """The frames as they are shown, for `pixels`; UserError where the file is broken, after those before it."""
    try: yield from self.container.decode(self.track)
    except self.av.error.FFmpegError as e: raise UserError(f"{self.name}: is broken ({e.strerror})") from e

  def close(self) -> None: self.container.close()

  def _camera(self, number: int) -> Any:
    if sys.platform.startswith("linux"): return self.av.open(f"/dev/video{number}", format="v4l2")
    if sys.platform == "darwin": return self.av.open(str(number), format="avfoundation", options={"framerate": "30"})
    raise ValueError("cameras are read on Linux and macOS")


def pixels(frame: Any) -> np.ndarray:
  """u8 [H,W,3] RGB of a frame, turned as the file says: phones record sideways."""
  return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


class VideoWriter:
  """An MP4 file at `path`, H.264 where this FFmpeg can write it, which appears when it is finished.

  Its frames are of `height` x `width` pixels, made even, as 4:2:0 needs; `rate` is frames a second, `time_base` the unit of `write`'s times.
  UserError where the file cannot be written."""
  def __init__(self, path: Path, height: int, width: int, rate: Fraction, time_base: Fraction):
    self.av, self.path, self.partial, self.time_base = require_av(), path, path.with_name(f".{path.name}.partial"), time_base
    self.step, self.start, self.last = max(1, round(1 / rate / time_base)), None, -1   # times: of a frame, of the first, and of the latest
    self.padding = ((0, height % 2), (0, width % 2), (0, 0))
    h264 = "libx264" in self.av.codecs_available
    try: self.container = self.av.open(str(self.partial), "w", format="mp4")
    except OSError as e: raise UserError(f"cannot write {path}: {e.strerror}") from e
    self.track = self.container.add_stream("libx264" if h264 else "mpeg4", rate=rate, options={"crf": "20", "preset": "veryfast"} if h264 else {})
    self.track.height, self.track.width, self.track.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
    self.track.time_base = self.track.codec_context.time_base = time_base
    if not h264: self.track.bit_rate = 8 * height * width

  def write(self, image: np.ndarray, pts: int | None) -> None:
    """Add a frame u8 [H,W,3] RGB, to be shown at the time `pts`; None is one frame after the last."""
    if self.start is None: self.start = pts or 0
    self.last = self.last + self.step if pts is None else max(self.last + 1, pts - self.start)
    frame = self.av.VideoFrame.from_ndarray(np.pad(image, self.padding, "edge"), format="rgb24")
    frame.pts, frame.time_base, frame.duration = self.last, self.time_base, self.step
    self._mux(frame)

  def finish(self) -> None:
    """Write what is left, and give the file its name."""
    self._mux(None)
    self.container.close()
    os.replace(self.partial, self.path)

  def abandon(self) -> None:
    """Leave nothing behind of a file that is not finished."""
    self.container.close()
    self.partial.unlink(missing_ok=True)

  def _mux(self, frame: Any) -> None:
    try: self.container.mux(self.track.encode(frame))
    except self.av.error.FFmpegError as e: raise UserError(f"cannot write {self.path}: {e.strerror}") from e
