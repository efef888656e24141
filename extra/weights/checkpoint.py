"""Checkpoints: one safetensors file, whole or absent, with a checksum over all of it. Numpy only, so any device or none will do."""
import contextlib, hashlib, itertools, json, math, os, re, secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
import numpy as np
from tinydet.errors import UserError

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "|u1", "I8": "|i1", "BOOL": "|b1"}
NAMES = {np.dtype(code): name for name, code in DTYPES.items() if name != "BF16"}
MAX_HEADER, MAX_DIMENSIONS = 100_000_000, 16
CHECKSUM = re.compile(rb'("tinydet_sha256":")([0-9a-f]{64})(")')


def save(path: str | Path, tensors: dict[str, np.ndarray], metadata: Any = None) -> None:
  """Write tensors (float32, float16, int64, int32, uint32, uint8, int8 or bool) and metadata (any JSON value) to path in the safetensors format.

  The file appears whole or not at all: it is written beside path, flushed to the disk, and renamed over it, so whatever stops this leaves the old
  file. UserError where the disk refuses. Format: https://huggingface.co/docs/safetensors, metadata as JSON text under "tinydet".
  """
  path = Path(path)
  arrays = {name: np.asarray(tensor).astype(np.asarray(tensor).dtype.newbyteorder("<"), copy=False) for name, tensor in tensors.items()}
  if odd := {name: str(a.dtype) for name, a in arrays.items() if a.dtype not in NAMES}: raise TypeError(f"no safetensors dtype for {odd}")
  # widest first keeps every tensor aligned to its own size
  arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
  header: dict[str, Any] = {"__metadata__": {"tinydet": json.dumps(metadata), "tinydet_sha256": "0" * 64}}
  end = 0
  for name, a in arrays.items():
    header[name] = {"dtype": NAMES[a.dtype], "shape": list(a.shape), "data_offsets": [end, end := end + a.nbytes]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)

  with whole_file(path) as f:
    digest = hashlib.sha256(text)
    f.write(len(text).to_bytes(8, "little") + text)
    for a in arrays.values():
      data = np.ascontiguousarray(a).reshape(-1).view(np.uint8).data
      digest.update(data)
      f.write(data)
    # the first match is in __metadata__, which is written first, and JSON text inside it has its quotes escaped
    f.seek(8 + CHECKSUM.search(text).start(2))
    f.write(digest.hexdigest().encode())


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
  """A file to write whose content appears at path, flushed to the disk, when the block ends, and not at all if it raises. UserError where the disk
  refuses."""
  path = Path(path)
  partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "xb") as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(partial, path)
    if os.name == "posix":
      folder = os.open(path.parent, os.O_RDONLY)
      try: os.fsync(folder)
      finally: os.close(folder)
  except OSError as e: raise UserError(f"cannot write {path}: {e.strerror or e}") from e
  finally:
    with contextlib.suppress(OSError): partial.unlink(missing_ok=True)


def new_folder(out: Path) -> Path:
  """Make the folder, under a numbered name where it is taken."""
  for number in itertools.count(1):
    folder = out if number == 1 else out.with_name(f"{out.name}-{number}")
    try: folder.mkdir(parents=True)
    except FileExistsError: continue
    except OSError as e: raise UserError(f"--out {out}: cannot be made ({e.strerror})") from e
    return folder


def load(path: str | Path) -> tuple[dict[str, np.ndarray], Any]:
  """Read a safetensors file: (name -> array, the metadata given to `save`, or the raw `__metadata__` of a file from elsewhere).

  bfloat16 comes back as float32. Nothing in the file is executed, and every size in it is checked before use. UserError names the file and what is
  wrong with it: missing, cut short, a header that lies, or (files from `save` only) content that its checksum does not fit.
  """
  path = Path(path)
  try:
    if path.exists() and not path.is_file() and not path.is_dir(): raise ValueError("it is not a regular file")   # a pipe would be waited for
    with open(path, "rb") as f:
      data = bytearray(os.fstat(f.fileno()).st_size)
      if f.readinto(data) != len(data): raise ValueError("it changed while being read")
    return _decode(data)
  except OSError as e: raise UserError(f"cannot read {path}: {e.strerror or e}") from e
  except (ValueError, RecursionError) as e: raise UserError(f"{path} is not a whole safetensors file: {e}") from e


def metadata(path: str | Path) -> dict[str, Any]:
  """The metadata given to `save` for a file, whose tensors and checksum are not looked at; empty where there are none."""
  with open(path, "rb") as f: header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
  return json.loads(header.get("__metadata__", {}).get("tinydet", "{}"))


def newest(folder: str | Path, warn: Callable[[str], None] = print) -> Path | None:
  """The whole `checkpoint-<step>.safetensors` of the highest step in folder, or None. A broken one is reported through warn and passed over."""
  for path in reversed(checkpoints(folder)):
    try: load(path)
    except UserError as e: warn(f"passing over a broken checkpoint: {e}")
    else: return path
  return None


def prune(folder: str | Path, keep: int = 2, step: int | None = None) -> None:
  """Remove all `checkpoint-<step>.safetensors` of folder but the `keep` of the highest steps up to `step`, the one just written. Those of higher
  steps, broken ones that a resumed run passed over, stay and do not count."""
  steps = [path for path in checkpoints(folder) if step is None or _step(path) <= step]
  for old in steps[:-keep]: old.unlink()


def checkpoints(folder: str | Path) -> list[Path]:
  """All `checkpoint-<step>.safetensors` in folder, whole or not, in the order of their steps."""
  steps = {int(match[1]): p for p in Path(folder).glob("checkpoint-*.safetensors") if (match := re.fullmatch(r"checkpoint-([0-9]+)", p.stem))}
  return [steps[step] for step in sorted(steps)]


def _step(path: Path) -> int: return int(path.stem.removeprefix("checkpoint-"))


def _decode(data: bytearray) -> tuple[dict[str, np.ndarray], Any]:
  """Tensors and metadata out of a file's bytes; ValueError says what is wrong."""
  if len(data) < 8: raise ValueError("it is shorter than 8 bytes")
  length = int.from_bytes(data[:8], "little")
  if length > min(MAX_HEADER, len(data) - 8): raise ValueError(f"its header claims {length} bytes of a file of {len(data)}")
  text, start = bytes(data[8:8 + length]), 8 + length
  try: header = json.loads(text.decode(), object_pairs_hook=_unique)
  except RecursionError: raise ValueError("its header is nested too deeply") from None
  if not isinstance(header, dict): raise ValueError("its header is not a JSON object")
  about = header.pop("__metadata__", {})
  if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()): raise ValueError("its __metadata__ is not text to text")
  if "tinydet_sha256" in about or "tinydet" in about:
    zeroed = CHECKSUM.sub(lambda m: m[1] + b"0" * 64 + m[3], text, count=1)
    digest = hashlib.sha256(zeroed)
    digest.update(memoryview(data)[start:])
    if about.get("tinydet_sha256") != digest.hexdigest(): raise ValueError("its content does not fit its checksum")

  tensors, spans = {}, []
  for name, entry in header.items():
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}: raise ValueError(f"tensor {name!r} is described oddly")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
      raise ValueError(f"tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS: raise ValueError(f"tensor {name!r} has shape {shape}")
    if not _counts(offsets) or len(offsets) != 2: raise ValueError(f"tensor {name!r} has offsets {offsets}")
    (begin, end), dtype = offsets, np.dtype(DTYPES[entry["dtype"]])
    if not begin <= end <= len(data) - start: raise ValueError(f"tensor {name!r} ends at byte {end} of {len(data) - start}: the file was cut short")
    if end - begin != math.prod(shape) * dtype.itemsize: raise ValueError(f"tensor {name!r} has {end - begin} bytes for shape {shape}")
    spans.append((begin, end, name))
    array = np.frombuffer(data, dtype, math.prod(shape), start + begin).reshape(shape)
    tensors[name] = (array.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else np.require(array, requirements="A")
  last = 0
  for begin, end, name in sorted(spans):
    if begin != last: raise ValueError(f"tensor {name!r} {'overlaps the one before' if begin < last else 'leaves a gap before it'}")
    last = end
  if last != len(data) - start: raise ValueError(f"it holds {len(data) - start} bytes of tensors and describes {last}")
  return tensors, json.loads(about["tinydet"]) if "tinydet" in about else about


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object that names nothing twice."""
  if len(result := dict(pairs)) != len(pairs): raise ValueError("its header names a tensor twice")
  return result


def _counts(value: Any) -> bool:
  """Whether value is a list of whole numbers from 0."""
  return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
