"""PyTorch's checkpoint files (.pth, .pt) without PyTorch. A file is data here: no name in it is ever imported, so nothing in it can run."""
import math, os, pickletools, re, struct, sys, zipfile, zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
import numpy as np
from tinydet.errors import UserError
from tinydet.weights.checkpoint import whole_file

MAGIC, PROTOCOL = 0x1950a86a20f9469cfc6c, 1001
MAX_DIMENSIONS, MAX_DEPTH, MAX_MEMBERS, MOST_SHOWN = 16, 64, 1 << 16, 100
# numpy has no bfloat16: V2, a type of its size, stands for it, and V1 for the bytes of a storage without a type
STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "V2", "Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1",
            "Bool": "b1", "ComplexFloat": "c8", "ComplexDouble": "c16"}
DTYPES = {"float32": "f4", "float64": "f8", "float16": "f2", "bfloat16": "V2", "int64": "i8", "int32": "i4", "int16": "i2", "int8": "i1",
          "uint8": "u1", "bool": "b1", "complex64": "c8", "complex128": "c16", "uint16": "u2", "uint32": "u4", "uint64": "u8"}


class _Name(str):
  """A name of TABLE where a pickle mentions it: inert text."""


class _OrderedDict(dict):
  """A dict on which BUILD may set attributes (a state_dict's `_metadata`), which are dropped."""
  __slots__ = ()


class _Namespace(dict):
  """A dict that BUILD may fill."""
  __slots__ = ()


@dataclass(eq=False, slots=True)
class _Storage:
  """Numbers in a row in the file, the array they were read as, which of them belong to a view, and the views."""
  code: str
  nbytes: int
  start: int = 0
  array: np.ndarray | None = None
  used: np.ndarray | None = None
  views: dict[tuple, np.ndarray] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Tensor:
  """A view: storage, type code, offset, size and stride (in elements); None until BUILD tells, in files of torch before 0.4."""
  view: tuple[_Storage, str, int, tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(eq=False, slots=True)
class _Record:
  """An object of a class that only its author has: its name, and what it was to be built from, at which nobody looks but `_module`."""
  name: str
  state: dict | None = None


class Inert(str):
  """The name of a class or function, in place of an object made by it."""
  __slots__ = ()


@dataclass(frozen=True)
class Module:
  """A whole pickled model (`torch.save(model)`): its class's dotted name, its state dict, and of its attributes those in ABOUT that it has."""
  name: str
  tensors: dict[str, np.ndarray]
  about: dict[str, Any]


def load(path: str | Path) -> Any:
  """The object in a file of torch.save's, as dict, list, tuple, set, str, bytes, int, float, bool, None and read-only numpy arrays.

  Reads the zip format (torch 1.6 on), the stream (0.1.10 to 1.5, with many of torchvision's downloads) and the tar before it, told apart by content.
  Arrays keep their strides, and are views of the file's bytes where that is possible; a tensor that occurs twice (tied weights) is one array.
  bfloat16 comes back as float32, a Parameter as its tensor, a Counter or argparse.Namespace as a dict, a torch.device or torch.dtype as text.
  A whole pickled model is a `Module`; only where there is one, other objects may be of unknown classes too, and are `Inert`.

  UserError names the file and what is wrong: a name, call or opcode that tensors do not need (refused, never run), damage, compression, sizes that
  disagree, tensors that overlap, cycles, a TorchScript program instead of its state_dict. Memory stays within about four times the
  file's size and 20 MB. Formats: torch/serialization.py and torch/_utils.py, and Python's pickletools."""
  path = Path(path)
  try:
    with open(path, "rb") as f: data = f.read(os.fstat(f.fileno()).st_size)
    spend = _budget(len(data) // 2 + (17 << 20))
    if data[:4] == b"PK\3\4": return _read_zip(data, spend)
    if data[:1] == b"\x80": return _read_stream(data, spend)
    if data[257:262] == b"ustar": return _read_tar(data, spend)
    raise ValueError(f"is not a PyTorch checkpoint: it begins with {data[:16]!r}" if data else "is empty")
  except OSError as e: raise UserError(f"cannot read {path}: {e.strerror or e}") from e
  except ValueError as e: raise UserError(f"{path}: {e}") from e


def save(path: str | Path, tensors: dict[str, np.ndarray]) -> None:
  """Write tensors (of any dtype with a torch storage type: no uint16 to uint64) so that `torch.load(path, weights_only=True)` reads them as a dict.

  The same tensors give the same bytes. The file appears whole or not at all, as with `checkpoint.save`. UserError where the disk refuses."""
  types = {np.dtype(code): f"{name}Storage" for name, code in STORAGES.items() if code != "V2"}
  arrays = {name: np.asarray(tensor).astype(np.asarray(tensor).dtype.newbyteorder("<"), copy=False) for name, tensor in tensors.items()}
  if odd := {name: str(a.dtype) for name, a in arrays.items() if a.dtype not in types}: raise TypeError(f"no torch storage type for {odd}")
  def text(value: str) -> bytes: return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
  def number(value: int) -> bytes: return b"\x8a\x08" + struct.pack("<q", value)
  def numbers(values: Iterable[int]) -> bytes: return b"(" + b"".join(map(number, values)) + b"t"
  pickle = [b"\x80\x02}("]
  for i, (name, a) in enumerate(arrays.items()):
    storage = b"(" + text("storage") + f"ctorch\n{types[a.dtype]}\n".encode() + text(str(i)) + text("cpu") + number(a.size) + b"tQ"
    layout = number(0) + numbers(a.shape) + numbers(math.prod(a.shape[d + 1:]) for d in range(a.ndim))
    pickle.append(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + layout + b"\x89ccollections\nOrderedDict\n)RtR")

  with whole_file(path) as f:
    with zipfile.ZipFile(f, "w") as archive:
      texts = {"data.pkl": b"".join(pickle) + b"u.", "byteorder": b"little", "version": b"3\n"}
      members = {name: np.frombuffer(text, np.uint8) for name, text in texts.items()} | {f"data/{i}": a for i, a in enumerate(arrays.values())}
      for name, a in members.items():
        info = zipfile.ZipInfo(f"archive/{name}")
        info.create_system = 0
        # torch aligns its storages like this
        gap = -(f.tell() + 30 + len(info.filename) + 4) % 64
        info.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
        archive.writestr(info, np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)


def _budget(left: int) -> Callable[[int], None]:
  """A function that takes a cost in bytes from what is left: one byte of a pickle can make an object of hundreds."""
  def spend(cost: int) -> None:
    nonlocal left
    left -= cost
    if left < 0: raise ValueError("holds more small objects than a checkpoint of its size")
  return spend


def _unpack(fmt: str, data: bytes, at: int) -> tuple:
  if not 0 <= at <= len(data) - struct.calcsize(fmt): raise ValueError("is cut short")
  return struct.unpack_from(fmt, data, at)


def _end(data: bytes, at: int, size: int) -> int:
  """Where size bytes from at end, inside data."""
  if not 0 <= size <= len(data) - at: raise ValueError(f"is cut short: {_shown(size)} bytes should follow byte {at} of {len(data)}")
  return at + size


def _read_zip(data: bytes, spend: Callable) -> Any:
  members = _members(data)
  roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
  if not roots and len(members) == 1:
    (name, (start, _)), = members.items()
    if Path(name).suffix in (".pth", ".pt", ".zip", ".tar") or data[start:start + 4] == b"PK\3\4" or data[start + 257:start + 262] == b"ustar":
      raise ValueError("holds an archive inside; unpack it first")
  if len(roots) != 1: raise ValueError(f"is a zip file with {len(roots)} data.pkl in it; a checkpoint has one")
  def content(name: str) -> bytes: return data[slice(*members.get(roots[0] + name, (0, 0)))]
  if (order := content("byteorder")) not in (b"", b"little", b"big"): raise ValueError(f"has an unknown byte order {order[:9]!r}")
  storages: dict[str, _Storage] = {}
  value, _ = _unpickle(content("data.pkl"), 0, spend, lambda pid: _storage(storages, pid), whole_models=True)
  for key, storage in storages.items():
    storage.start, end = members.get(f"{roots[0]}data/{key}", (0, -1))
    if end - storage.start != storage.nbytes:
      raise ValueError(f"storage {_shown(key)} has {max(0, end - storage.start)} bytes where its type and length make {_shown(storage.nbytes)}")
  return _tree(value, data, ">" if order == b"big" else "<", spend)


def _members(data: bytes) -> dict[str, tuple[int, int]]:
  """Where each member of a zip file begins and ends. ValueError unless all are stored uncompressed, apart from each other, and undamaged."""
  end = len(data) - 22
  magic, count, size, at = _unpack("<4s6xHII2x", data, end)
  if magic != b"PK\5\6": raise ValueError("is cut short: it has no directory of members at its end")
  if count == 0xFFFF or 0xFFFFFFFF in (size, at):
    end, = _unpack("<Q", data, end - 12)
    magic, count, size, at = _unpack("<4s28xQQQ", data, end)
  if magic not in (b"PK\5\6", b"PK\6\6") or at + size > end: raise ValueError("has a damaged directory of members")
  if count > MAX_MEMBERS: raise ValueError(f"claims {count} members, more than {MAX_MEMBERS}")
  directory, members, spans = at, {}, []
  for _ in range(count):
    magic, flags, method, crc, packed, size, name_size, extra_size, comment_size, local = _unpack("<4s4xHH4xIIIHHH8xI", data, at)
    extra = _end(data, at + 46, name_size)
    name, sizes, at = data[at + 46:extra].decode(), [size, packed, local], extra + extra_size + comment_size
    wide = [i for i, v in enumerate(sizes) if v == 0xFFFFFFFF]
    while wide and extra_size >= 4:
      kind, length = _unpack("<HH", data, extra)
      if kind == 1: sizes = [dict(zip(wide, _unpack(f"<{len(wide)}Q", data, extra + 4))).get(i, v) for i, v in enumerate(sizes)]
      extra, extra_size = extra + 4 + length, extra_size - 4 - length
    size, packed, local = sizes
    magic += _unpack("<4s", data, local)[0]
    start = local + 30 + sum(_unpack("<HH", data, local + 26))
    def refuse(why: str, name: str = name): raise ValueError(f"{why} (member {_shown(name)})")
    if magic != b"PK\1\2PK\3\4" or data[local + 30:local + 30 + name_size] != name.encode(): refuse("has a damaged directory of members")
    if name in members: refuse("names a member twice")
    if name.startswith("/") or "\\" in name or ".." in name.split("/"): refuse("has a path that leads out of the archive")
    if name.endswith("/constants.pkl") or "/code/" in name: refuse("is a TorchScript program; torch.save its state_dict() instead")
    if flags & 1: refuse("is encrypted")
    if method: refuse("is compressed, which torch never does; unzip it and zip it anew without compression (zip -0)")
    if packed != size: refuse(f"claims {size} bytes where {packed} are stored")
    if start + size > directory: refuse("is cut short")
    members[name] = start, start + size
    spans.append((local, start, start + size, crc, name))
  last = 0
  for local, start, end, crc, name in sorted(spans):
    if local < last: raise ValueError(f"has members that overlap (member {_shown(name)})")
    if zlib.crc32(memoryview(data)[start:end]) != crc: raise ValueError(f"is damaged: a checksum does not fit (member {_shown(name)})")
    last = end
  return members


def _read_stream(data: bytes, spend: Callable) -> Any:
  storages: dict[str, _Storage] = {}
  magic, at = _unpickle(data, 0, spend)
  if magic != MAGIC: raise ValueError("is a pickle, but not one of torch.save's")
  protocol, at = _unpickle(data, at, spend)
  about, at = _unpickle(data, at, spend)
  if protocol != PROTOCOL or type(about) is not dict: raise ValueError("is of an unknown version of torch's format")
  if about.get("little_endian") is not True: raise ValueError("was written on a big-endian machine; load and save it there with a newer torch")
  value, at = _unpickle(data, at, spend, lambda pid: _storage_or_class(storages, pid), whole_models=True)
  keys, at = _unpickle(data, at, spend)
  if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
    raise ValueError("lists other storages than its tensors have")
  for storage in map(storages.__getitem__, keys):
    (numel,), storage.start = _unpack("<q", data, at), at + 8
    if numel * _itemsize(storage.code) != storage.nbytes: raise ValueError(f"has a storage of {numel} elements where another length was told")
    at = _end(data, at + 8, storage.nbytes)
  if at != len(data): raise ValueError("goes on after its last storage")
  return _tree(value, data, "<", spend)


def _read_tar(data: bytes, spend: Callable) -> Any:
  files, at = {}, 0
  while data[at:at + 1] not in (b"", b"\0"):
    name, size, kind = _unpack("<100s24x12s20xc355x", data, at)
    name, size = name.rstrip(b"\0").decode("latin-1"), size.rstrip(b"\0 ")
    if not re.fullmatch(rb"[0-7]{1,12}", size): raise ValueError("has a damaged tar header")
    end = _end(data, at + 512, int(size, 8))
    # an extended header ("x") of torch's files holds nothing but times
    if kind != b"x":
      if kind not in b"0\0" or name in files: raise ValueError(f"has a member {_shown(name)} that torch's tar files do not have")
      files[name] = at + 512
    at = end + (at - end) % 512
  if missing := {"pickle", "storages", "tensors"} - files.keys(): raise ValueError(f"is a tar file without {min(missing)}: cut short, or not torch's")
  storages, tensors = {}, {}
  def described(at: int) -> tuple[tuple, int]:
    value, at = _unpickle(data, at, spend)
    if type(value) is not tuple or len(value) != 3: raise ValueError("describes a tensor or storage oddly")
    return (_natural(value[0]), *value[1:]), at

  count, at = _unpickle(data, files["storages"], spend)
  for _ in range(_natural(count)):
    (key, _, kind), at = described(at)
    if type(kind) is not _Name or kind not in STORAGE_TYPES: raise ValueError(f"has a storage of {_kind(kind)}")
    numel, = _unpack("<q", data, at)
    storages[key] = _Storage(STORAGE_TYPES[kind], numel * _itemsize(STORAGE_TYPES[kind]), at + 8)
    at = _end(data, at + 8, storages[key].nbytes)
  if _unpickle(data, at, spend)[0] != []: raise ValueError("has storages that are views of others, which are not read")

  count, at = _unpickle(data, files["tensors"], spend)
  for _ in range(_natural(count)):
    (key, storage, _), at = described(at)
    if not 0 <= (ndim := _unpack("<i4x", data, at)[0]) <= MAX_DIMENSIONS: raise ValueError(f"has a tensor of {ndim} dimensions")
    layout, at = _unpack(f"<{2 * ndim + 1}q", data, at + 8), at + 16 + 16 * ndim
    tensors[key] = _tensor(storages.get(_natural(storage)), layout[-1], layout[:ndim], layout[ndim:-1])

  def persistent(pid: Any) -> _Tensor:
    if type(pid) is not str or not re.fullmatch("[0-9]{1,20}", pid) or int(pid) not in tensors: raise ValueError("has a persistent id of no tensor")
    return tensors[int(pid)]
  return _tree(_unpickle(data, files["pickle"], spend, persistent)[0], data, "<", spend)


def _unpickle(data: bytes, at: int, spend: Callable, persistent: Callable[[Any], Any] | None = None,
              whole_models: bool = False) -> tuple[Any, int]:
  """The object pickled at data[at:], with `_Tensor` for tensors, and where the pickle ends. Takes the opcodes of protocols 2 to 5 that data needs.

  With `whole_models` what classes outside of TABLE make is a `_Record`; they are refused all the same where none of them is a module of torch's."""
  unknown, modules = [], 0
  stack, marks, memo, op = [], [], {}, None
  def pop(n: int) -> list: return [stack.pop() for _ in range(n)][::-1]
  def pop_mark() -> list: return pop(max(0, len(stack) - marks.pop()))
  def top(*kinds: type) -> Any: return stack[-1] if type(stack[-1]) in kinds else refuse(f" on {_kind(stack[-1])}")
  def refuse(what: str = "") -> None:
    raise ValueError(f"uses the pickle opcode {op}{what}, which a checkpoint has no use for; refused, nothing in the file was run")
  try:
    while True:
      op, arg, at = OPCODES.get(data[at:at + 1]), b"", at + 1
      if op is None: raise ValueError("is cut short: a pickle has no end" if at > len(data) else "has a damaged pickle: an unknown opcode")
      spend(COSTS.get(op, 50))
      if op in SIZES: (arg,), at = _unpack(SIZES[op], data, at), at + struct.calcsize(SIZES[op])
      if op in COUNTED:
        end = _end(data, at, arg)
        spend(5 * arg)
        arg, at = data[at:end], end
      match op:
        case _ if op in PUSH: stack.append(PUSH[op](arg))
        case "BINGET" | "LONG_BINGET": stack.append(memo[arg])
        case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
          if arg and arg > len(data): raise ValueError(f"has a damaged pickle: memo index {arg}")
          memo[len(memo) if op == "MEMOIZE" else arg] = stack[-1]
        case "MARK": marks.append(len(stack))
        case "TUPLE": stack.append(tuple(pop_mark()))
        case "TUPLE1" | "TUPLE2" | "TUPLE3": stack.append(tuple(pop(int(op[-1]))))
        case "SETITEM" | "SETITEMS":
          items = pop(2) if op == "SETITEM" else pop_mark()
          spend(50 * len(items))
          if len(items) % 2: raise ValueError("has a damaged pickle: a key without a value")
          if type(stack[-1]) is not _Record: _fill(top(dict, _OrderedDict), zip(items[::2], items[1::2]))
        case "APPEND" | "APPENDS":
          items = pop(1) if op == "APPEND" else pop_mark()
          if type(stack[-1]) is not _Record: top(list).extend(items)
        case "ADDITEMS":
          items = pop_mark()
          spend(100 * len(items))
          top(set).update(map(_key, items))
        case "GLOBAL" | "STACK_GLOBAL":
          if op == "GLOBAL":
            lines = data[at:at + 1024].split(b"\n", 2)
            if len(lines) < 3: raise ValueError("has a damaged pickle: a name has no end")
            at += len(lines[0]) + len(lines[1]) + 2
          words = [line.decode() for line in lines[:2]] if op == "GLOBAL" else pop(2)
          if any(type(word) is not str for word in words): refuse(" without text")
          name = _Name(" ".join(words))
          if name not in TABLE:
            if not whole_models or not _may_be_inert(name): raise ValueError(_refusal(name, unknown))
            if len(unknown) < MOST_SHOWN: unknown.append(name)
          stack.append(name)
        case "REDUCE" | "NEWOBJ":
          name, args = pop(2)
          if type(name) is _Name and name not in TABLE and type(args) is tuple:
            stack.append(_Record(name))   # whatever it would have been made of
            continue
          if type(name) is not _Name or name not in CALLS or type(args) is not tuple or len(args) > 8: refuse(f" to call {_kind(name)}")
          spend(350 * sum(len(a) for a in args if type(a) in (list, dict)))
          try: stack.append(CALLS[name](*args))
          except TypeError: raise ValueError(f"calls {_dotted(name)} in a way that torch does not") from None
        case "BUILD":
          state, = pop(1)
          target = top(_OrderedDict, _Namespace, _Tensor, _Record)
          if type(target) is _Record:
            target.state = state if type(state) is dict else None
            modules += _is_module(target)
            continue
          if type(state) is not (tuple if type(target) is _Tensor else dict): refuse(f" on {_kind(target)} with {_kind(state)}")
          if type(target) is _Namespace:
            spend(350 * len(state))
            _fill(target, state.items())
          if type(target) is _Tensor and len(state) == 4: target.view = _tensor(*state).view
          if type(target) is _Tensor and len(state) == 5: target.view = _exact(state[0], _Tensor).view
        case "BINPERSID" if persistent: stack.append(persistent(stack.pop()))
        case "FRAME": pass
        case "PROTO" if 2 <= arg <= 5: pass
        case "STOP":
          value, = pop(1)
          if unknown and not modules: raise ValueError(_refusal(unknown[0]))
          if stack or marks: raise ValueError("has a damaged pickle: it ends in the middle of an object")
          return value, at
        case _: refuse()
  except (IndexError, KeyError): raise ValueError(f"has a damaged pickle: {op} finds nothing on the stack or in the memo") from None


def _storage_or_class(storages: dict[str, _Storage], pid: Any) -> _Storage | _Name:
  """What the stream's persistent id stands for: a storage, or a module's class ("module", class, file, source), whose source is left alone."""
  if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and type(pid[1]) is _Name: return pid[1]
  return _storage(storages, pid)


def _storage(storages: dict[str, _Storage], pid: Any) -> _Storage:
  """The storage of a persistent id ("storage", type, key, device, number of elements); the stream adds None: it is no view of another storage."""
  if type(pid) is not tuple or [type(v) for v in pid[:5]] != [str, _Name, str, str, int] or pid[0] != "storage" or pid[5:] not in ((), (None,)):
    raise ValueError("has a persistent id of an unknown form: views of storages are not read")
  _, name, key, _, numel, *_ = pid
  if name not in STORAGE_TYPES: raise ValueError(f"has a storage of {_dotted(name)}")
  code, nbytes = STORAGE_TYPES[name], _natural(numel) * _itemsize(STORAGE_TYPES[name])
  storage = storages.setdefault(key, _Storage(code, nbytes))
  if (storage.code, storage.nbytes) != (code, nbytes): raise ValueError(f"describes storage {_shown(key)} in two ways")
  return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None, metadata: Any = None) -> _Tensor:
  """A view of a storage, checked: it lies inside, and no two of its elements share memory."""
  if type(storage) is not _Storage: raise ValueError(f"has a tensor on {_kind(storage)} instead of a storage")
  code = DTYPE_NAMES.get(dtype, storage.code)
  if code == "V1" or storage.code not in (code, "V1"): raise ValueError("has a tensor of another type than its storage")
  if metadata: raise ValueError("has a tensor that is a conjugate or negative view")
  if any(type(v) is not tuple or len(v) > MAX_DIMENSIONS for v in (size, stride)) or len(size) != len(stride):
    raise ValueError("has a tensor without a size and stride that fit")
  about, numel = f"a tensor of size {_shown(size)}, stride {_shown(stride)} and offset {_shown(offset)}", storage.nbytes // _itemsize(code)
  if any(type(v) is not int or not 0 <= v < 1 << 62 for v in (offset, *size, *stride)): raise ValueError(f"has {about}")
  last = 0
  for step, n in sorted((s, n) for s, n in zip(stride, size) if n > 1 and 0 not in size):
    if step <= last: raise ValueError(f"has {about}, whose elements share memory")
    last += step * (n - 1)
  if offset + last + (0 not in size) > numel: raise ValueError(f"has {about} in a storage of {_shown(numel)}, which it leaves")
  return _Tensor((storage, code, offset, size, stride))


def _tree(root: Any, data: bytes, order: str, spend: Callable) -> Any:
  """What was pickled, in plain containers and arrays. An object is visited once, however often others refer to it."""
  memo: dict[int, tuple[Any, int]] = {}
  def build(node: Any, depth: int) -> Any:
    kind = type(node)
    if kind in (str, bytes, int, float, bool, type(None)): return node
    if kind is _Name and node in DTYPE_NAMES: return _dotted(node)
    if kind is _Name and node not in TABLE: return Inert(_dotted(node))
    if kind is _Record and not _is_module(node): return Inert(_dotted(node.name))
    value, height = memo.get(id(node), (None, 0))
    if height < 0: raise ValueError("holds a container that holds itself")
    if depth + height > MAX_DEPTH: raise ValueError(f"is nested more than {MAX_DEPTH} deep")
    if height: return value
    memo[id(node)] = None, -1
    parts = node.values() if isinstance(node, dict) else node if kind in (list, tuple, set) else ()
    built = [build(part, depth + 1) for part in parts]
    if kind is _Record: value = _module(node, lambda part: build(part, depth + 1), spend)
    elif kind is _Tensor: value = _array(node, data, order)
    elif isinstance(node, dict): value = dict(zip(node, built))
    elif kind in (list, tuple, set): value = kind(built)
    else: raise ValueError(f"holds {_kind(node)} where data belongs")
    memo[id(node)] = value, 1 + max((memo[id(part)][1] for part in parts if id(part) in memo), default=0)
    return value
  return build(root, 0)


def _is_module(node: Any) -> bool: return type(node) is _Record and node.state is not None and "_modules" in node.state


def _module(root: _Record, build: Callable[[Any], Any], spend: Callable) -> Module:
  """The tensors that torch's `state_dict()` of a pickled module has, under its names. Nothing but modules, parameters and buffers is looked at."""
  tensors: dict[str, np.ndarray] = {}
  def entries(state: dict, part: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(found := state.get(part, {}), dict): raise ValueError(f"has a module whose {part} are {_kind(found)}")
    for key, value in found.items():
      if value is not None: yield _exact(key, str), value
  def walk(state: dict, prefix: str, depth: int) -> None:
    if depth > MAX_DEPTH: raise ValueError(f"has modules nested more than {MAX_DEPTH} deep, or inside themselves")
    hidden = state.get("_non_persistent_buffers_set")
    for part in ("_parameters", "_buffers"):
      for key, tensor in entries(state, part):
        if part == "_buffers" and isinstance(hidden, set) and key in hidden: continue
        spend(200 + len(prefix) + len(key))
        if prefix + key in tensors: raise ValueError(f"has two tensors {_shown(prefix + key)}")
        tensors[prefix + key] = build(_exact(tensor, _Tensor))
    for key, child in entries(state, "_modules"):
      spend(500 + len(prefix) + len(key))   # a module that many refer to is walked as often
      if not _is_module(child): raise ValueError(f"has {_kind(child)} where a module belongs")
      walk(child.state, f"{prefix}{key}.", depth + 1)
  walk(root.state, "", 0)
  return Module(_dotted(root.name), tensors, {key: build(root.state[key]) for key in ABOUT if key in root.state})


def _array(tensor: _Tensor, data: bytes, order: str) -> np.ndarray:
  """A tensor as a view of its storage's array, the same object for the same view. ValueError where it overlaps another view in part."""
  if tensor.view is None: raise ValueError("has a tensor without content")
  storage, code, *view = tensor.view
  if storage.array is None:
    dtype = np.dtype({"V2": "u2", "b1": "u1"}.get(code, code)).newbyteorder(order)
    array = np.frombuffer(data, dtype, storage.nbytes // dtype.itemsize, storage.start)
    array = array != 0 if code == "b1" else array.astype(np.uint32 if code == "V2" else dtype.newbyteorder("="), copy=False)
    if code == "V2": array = np.left_shift(array, 16, out=array).view(np.float32)
    storage.array, storage.code = np.require(array, requirements="A"), code
    storage.array.flags.writeable = False
  if storage.code != code: raise ValueError("has tensors of two types in one storage")
  if 0 in view[1]: return np.empty(view[1], storage.array.dtype)
  if tuple(view) not in storage.views:
    if storage.views:
      if storage.used is None:
        storage.used = np.zeros(storage.array.size, bool)
        _view(storage.used, *next(iter(storage.views)))[...] = True
      mine = _view(storage.used, *view)
      if mine.any(): raise ValueError(f"has a tensor of size {_shown(view[1])} that overlaps another in part")
      mine[...] = True
    storage.views[tuple(view)] = _view(storage.array, *view)
  return storage.views[tuple(view)]


def _view(array: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
  return np.ndarray(size, array.dtype, array, offset * array.itemsize, [s * array.itemsize * (n > 1) for s, n in zip(stride, size)])


def _natural(value: Any) -> int:
  if type(value) is not int or value < 0: raise ValueError(f"has {_kind(value)} or a negative number for a count")
  return value


def _exact(value: Any, kind: type) -> Any:
  if type(value) is not kind: raise ValueError(f"has {_kind(value)} where a {kind.__name__.strip('_')} belongs")
  return value


def _key(key: Any) -> Any:
  """A dict's key or a set's item: of a type that is cheap to hash, and of which few share a hash."""
  if type(key) not in (str, bytes, float, bool, type(None)) and (type(key) is not int or abs(key) >= 1 << 64):
    raise ValueError(f"has {_kind(key)} as a key of a dict or item of a set")
  return key


def _fill(target: dict, pairs: Iterable) -> dict:
  """Put pairs into target, which has none of their keys."""
  for pair in pairs:
    if type(pair) not in (tuple, list) or len(pair) != 2: raise ValueError("has a dict of something other than pairs")
    if _key(pair[0]) in target: raise ValueError(f"has a dict with the key {_shown(pair[0])} twice")
    target[pair[0]] = pair[1]
  return target


def _empty_namespace() -> _Namespace: return _Namespace()
def _empty_tensor() -> _Tensor: return _Tensor()
def _itemsize(code: str) -> int: return np.dtype(code).itemsize
def _shown(value: Any) -> str: return ascii(value)[:100]
def _dotted(name: str) -> str: return ascii(".".join(name.rsplit(" ", 1)))[1:-1][:100]
def _kind(value: Any) -> str: return _dotted(value) if type(value) is _Name else f"a {type(value).__name__.strip('_')}"


def _may_be_inert(name: str) -> bool:
  """Whether `name` may stand in a pickled model: a class of packages that are not Python's own, or one of INERT."""
  module, _, attribute = name.partition(" ")
  top = module.partition(".")[0]
  if name in INERT: return True
  if not name.isascii() or not module.replace(".", "_").isidentifier() or not attribute.isidentifier() or top in sys.stdlib_module_names: return False
  return (attribute[0].isupper() and _why_not(name).startswith("which")) or top in AUTHORS


def _refusal(name: str, unknown: Iterable[str] = ()) -> str:
  beside = next((f", beside {_dotted(other)}" for other in unknown if other in INERT), "")
  return f"refers to {_dotted(name)}, {_why_not(name)}{beside}; refused, nothing in the file was run"


def _why_not(name: str) -> str:
  module, _, attribute = name.partition(" ")
  if name.startswith(("torch._utils _rebuild", "torch float8", "torch Q", "torch q")): return "a kind of tensor (quantised, sparse) not read here"
  if not attribute[:1].isupper() or module.partition(".")[0] in sys.stdlib_module_names: return "which a checkpoint has no use for"
  return "which is code, not data (torch.save the state_dict() of a model)"


OPCODES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
COUNTED = {"BINUNICODE": "<I", "SHORT_BINUNICODE": "<B", "BINUNICODE8": "<Q", "BINSTRING": "<i", "SHORT_BINSTRING": "<B", "LONG1": "<B",
           "BINBYTES": "<I", "SHORT_BINBYTES": "<B", "BINBYTES8": "<Q"}
SIZES = COUNTED | {"BININT": "<i", "BININT1": "<B", "BININT2": "<H", "BINFLOAT": ">d", "BINPUT": "<B", "LONG_BINPUT": "<I", "BINGET": "<B",
                   "LONG_BINGET": "<I", "PROTO": "<B", "FRAME": "<Q"}
# BINSTRING is Python 2's text
PUSH = {"NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False, "EMPTY_TUPLE": lambda _: (), "EMPTY_LIST": lambda _: [],
        "EMPTY_DICT": lambda _: {}, "EMPTY_SET": lambda _: set(), "LONG1": lambda arg: int.from_bytes(arg, "little", signed=True)} | dict.fromkeys(
  ["BININT", "BININT1", "BININT2", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"], lambda arg: arg) | dict.fromkeys(
  ["BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"], bytes.decode)
# about what the object of an opcode costs here in bytes, with its copy in `_tree`; all others cost 50
COSTS = {"EMPTY_SET": 700, "EMPTY_DICT": 350, "EMPTY_LIST": 300, "REDUCE": 350, "NEWOBJ": 350, "BINPERSID": 1000, "BINPUT": 80, "LONG_BINPUT": 80,
         "MEMOIZE": 80, "TUPLE": 250, "TUPLE1": 250, "TUPLE2": 250, "TUPLE3": 250}
STORAGE_TYPES = {f"{module} {name}Storage": code for module in ("torch", "torch.cuda") for name, code in STORAGES.items()}
STORAGE_TYPES["torch.storage UntypedStorage"] = "V1"
DTYPE_NAMES = {f"torch {name}": code for name, code in DTYPES.items()}
# All that a file can call. Counter and Namespace are here for whole training checkpoints, such as those of torchvision's and MLCommons' reference
# programs: the state of a MultiStepLR holds a Counter, and the program's arguments are stored beside the weights.
CALLS: dict[str, Callable] = {
  "collections OrderedDict": lambda *pairs: _fill(_OrderedDict(), *(_exact(p, list) for p in pairs or [[]])),
  "collections Counter": lambda counts: _exact(counts, dict),
  "argparse Namespace": _empty_namespace,
  "builtins set": lambda items: set(map(_key, _exact(items, list))),
  "__builtin__ set": lambda items: set(map(_key, _exact(items, list))),
  "torch Size": lambda sizes: _exact(sizes, tuple),
  "torch device": lambda kind, index=None: _exact(kind, str) + ("" if index is None else f":{_natural(index)}"),
  "torch._utils _rebuild_tensor": lambda *layout: _tensor(*layout[:4]),
  "torch._utils _rebuild_tensor_v2": lambda storage, offset, size, stride, grad, hooks, metadata=None: (
    _tensor(storage, offset, size, stride, None, metadata)),
  "torch._utils _rebuild_tensor_v3": lambda storage, offset, size, stride, grad, hooks, dtype, metadata=None: (
    _tensor(storage, offset, size, stride, dtype, metadata)),
  "torch.nn.parameter Parameter": lambda tensor=None, grad=True: _Tensor() if tensor is None else _exact(tensor, _Tensor),
  "torch._utils _rebuild_parameter": lambda tensor, grad, hooks: _exact(tensor, _Tensor),
  "torch._utils _rebuild_parameter_with_state": lambda tensor, grad, hooks, state: _exact(tensor, _Tensor)}
CALLS |= {f"{module} {name}Tensor": _empty_tensor for module in ("torch", "torch.cuda") for name in STORAGES}
ABOUT = ("names", "nc", "stride", "yaml")   # attributes of a pickled detector: class names, their number, strides, what it was built from
# What pickled YOLO models refer to beside classes, of which nothing is taken: bound methods, numpy's scalars and arrays, paths, times.
INERT = {f"{module} getattr" for module in ("builtins", "__builtin__")} | {"_codecs encode", "numpy dtype", "numpy ndarray", "datetime datetime"} | {
  f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")} | {
  f"pathlib{part} {name}Path" for part in ("", "._local") for name in ("", "Posix", "Windows", "Pure", "PurePosix", "PureWindows")}
AUTHORS = ("ultralytics", "models", "utils", "yolov6")   # packages whose functions those models refer to as well
TABLE = CALLS.keys() | STORAGE_TYPES.keys() | DTYPE_NAMES.keys()
