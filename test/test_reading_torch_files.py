import copyreg, io, os, pickle, pickletools, struct, tarfile, time, tracemalloc, zipfile, zlib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tinydet.errors import UserError
from tinydet.weights import torch_file
from by_hand import by_hand

RNG = np.random.default_rng(0)
TENSORS = {"half": RNG.standard_normal(3).astype(np.float16), "weight": RNG.standard_normal((4, 3, 1)).astype(np.float32), "steps": np.array(7),
           "double": RNG.standard_normal((2, 2)), "small": RNG.integers(0, 99, (2, 2), np.int32), "short": np.array([-3], np.int16),
           "signed": np.array([-1], np.int8), "bytes": np.arange(5, dtype=np.uint8), "mask": np.array([True, False]), "complex": np.array([1 + 2j]),
           "empty": np.zeros((0, 4), np.float32), "turned": RNG.standard_normal((4, 3)).astype(np.float32).T, "other": np.arange(3, dtype=">i4")}
FLOATS = np.arange(12, dtype=np.float32)


# ---- an assembler of pickles and of the three containers
def text(s): return b"X" + struct.pack("<I", len(s.encode())) + s.encode()
def name(module, attribute): return f"c{module}\n{attribute}\n".encode()
def number(n): return b"\x8a" + bytes([n.bit_length() // 8 + 1]) + n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
def numbers(*values): return b"(" + b"".join(v if isinstance(v, bytes) else number(v) for v in values) + b"t"
def call(module, attribute, *args): return name(module, attribute) + b"(" + b"".join(args) + b"tR"
def mapping(*items): return b"}(" + b"".join(text(k) + v for k, v in items) + b"u"
def persistent(*parts): return b"(" + b"".join(parts) + b"tQ"


def storage(key="0", numel=12, kind="FloatStorage", module="torch", stream=False):
  return persistent(text("storage"), name(module, kind), text(key), text("cpu"), number(numel), b"N" if stream else b"")


def tensor(size=(12,), stride=(1,), offset=0, where=None, stream=False):
  size, stride = (v if isinstance(v, bytes) else numbers(*v) for v in (size, stride))
  return call("torch._utils", "_rebuild_tensor_v2", where or storage(stream=stream), offset if isinstance(offset, bytes) else number(offset), size,
              stride, b"\x89", call("collections", "OrderedDict"))


def entry(name, content, flags=0, method=0, claim=None, packed=None):
  """A zip member as (local header with content, the same fields for the directory)."""
  size, crc = len(content) if claim is None else claim, zlib.crc32(content)
  fields = struct.pack("<HHHHHIIIH", 20, flags, method, 0, 0x21, crc, len(content) if packed is None else packed, size, len(name.encode()))
  return b"PK\3\4" + fields + b"\0\0" + name.encode() + content, (fields, name.encode())


def zipped(*entries, places=None, count=None):
  body, directory = b"", b""
  for i, (local, (fields, name)) in enumerate(entries):
    directory += b"PK\1\2\x14\0" + fields + struct.pack("<HHHHII", 0, 0, 0, 0, 0, len(body) if places is None else places[i]) + name
    body += local
  n = len(entries) if count is None else count
  return body + directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, n, n, len(directory), len(body), 0)


def zip_file(pickled, storages=None, order=b"little"):
  data = {"0": FLOATS.tobytes()} if storages is None else storages
  return zipped(entry("a/data.pkl", pickled), entry("a/byteorder", order), *(entry(f"a/data/{k}", v) for k, v in data.items()),
                entry("a/version", b"3\n"))


def stream_parts(pickled, storages=None, keys=None, little=b"\x88"):
  data = {"0": FLOATS} if storages is None else storages
  keys = b"]" + b"".join(text(k) + b"a" for k in data) if keys is None else keys
  return [b"\x80\x02" + number(torch_file.MAGIC) + b".", b"\x80\x02" + number(1001) + b".", b"\x80\x02" + mapping(("little_endian", little)) + b".",
          pickled, b"\x80\x02" + keys + b".", *(struct.pack("<q", a.size) + a.tobytes() for a in data.values())]


def stream_file(pickled, **options): return b"".join(stream_parts(pickled, **options))


def tar_file(pickled, storages=None, tensors=None, members=tarfile.REGTYPE, views=b"]", extra=()):
  """The format before torch 0.1.10; one float storage (key 5) and one tensor on it (key 7) unless told otherwise."""
  one = b"\x80\x02K\1.\x80\x02"
  data = b"(" + number(5) + text("cpu") + name("torch", "FloatStorage") + b"t." + struct.pack("<q", 12) + FLOATS.tobytes()
  layout = b"(" + number(7) + number(5) + name("torch", "FloatTensor") + b"t." + struct.pack("<iiqqqqq", 2, 0, 3, 2, 1, 3, 4)
  storages, tensors = one + data + b"\x80\x02" + views + b"." if storages is None else storages, one + layout if tensors is None else tensors
  with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:", format=tarfile.PAX_FORMAT) as tar:
    for member, content in [("sys_info", b"\x80\x02}."), ("pickle", pickled), ("tensors", tensors), ("storages", storages), *extra]:
      info = tarfile.TarInfo(member)
      info.size, info.type, info.mtime = len(content), members, 1.5
      tar.addfile(info, io.BytesIO(content))
  return out.getvalue()


TAR_TENSOR = np.lib.stride_tricks.as_strided(FLOATS[4:], (3, 2), (4, 12))
HALF = b"G" + struct.pack(">d", .5)
MIXED = b"](" + tensor((2, 3), (1, 2), 3, storage("1", 9, "LongStorage")) + b"K\x05\x88N" + HALF + b"e"
WHOLE = b"\x80\x02" + mapping(("a", tensor()), ("b", MIXED), ("c", b"\x80\x02)" + text("é") + b"\x86")) + b"."
NUMBERS = np.arange(9, dtype=np.int64)
GOOD = {"zip": zip_file(WHOLE, {"0": FLOATS.tobytes(), "1": NUMBERS.tobytes()}),
        "stream": stream_file(WHOLE.replace(number(12) + b"tQ", number(12) + b"NtQ").replace(number(9) + b"tQ", number(9) + b"NtQ"),
                              storages={"0": FLOATS, "1": NUMBERS}),
        "tar": tar_file(b"\x80\x02" + mapping(("a", b"U\x017Q"), ("b", b"](" + text("7") + b"QK\x05\x88N" + HALF + b"e")) + b".")}
# a whole model, which refers to itself in a bound method, and beside it an object and a class that say nothing
NOTHING = (("_parameters", b"}"), ("_buffers", b"}"))
LEAF = name("torch.nn.modules.conv", "Conv2d") + b")\x81" + mapping(
  ("_parameters", mapping(("weight", tensor((3, 4), (4, 1))), ("bias", b"N"))), ("_buffers", b"}"), ("_modules", b"}"), ("stride", b"K\1")) + b"b"
WHOLE_MODEL = mapping(("model", name("models.yolo", "Model") + b")\x81q\0" + mapping(
  *NOTHING, ("_modules", mapping(("0", LEAF))), ("names", b"](" + text("cat") + text("dog") + b"e"), ("nc", b"K\2"),
  ("call", call("__builtin__", "getattr", b"h\0", text("forward")))) + b"b"), ("opt", name("ultralytics.utils", "Space") + b")\x81}b"),
  ("kind", name("models.yolo", "Detect")), ("fitness", call("numpy.core.multiarray", "scalar", name("numpy", "dtype") + b")R", b"C\0")))
GOOD["model"] = zip_file(b"\x80\x02" + WHOLE_MODEL + b".")


def load(tmp_path, content):
  (path := tmp_path / "x.pth").write_bytes(content)
  return torch_file.load(path)


def refused(tmp_path, content, reason=""):
  """Load content, which must be refused in one line that names the file and holds reason, in bounded memory and time."""
  (path := tmp_path / "x.pth").write_bytes(content)
  begin = time.monotonic()
  tracemalloc.start()
  try:
    with pytest.raises(UserError) as error: torch_file.load(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally: tracemalloc.stop()
  message = str(error.value)
  assert str(path) in message and reason in message and message.isprintable() and len(message) < len(str(path)) + 400, message
  assert peak < 4 * len(content) + (20 << 20) and time.monotonic() - begin < 60
  return message


def same(a, b): return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)


# ---- what is read and written
def test_round_trip_aligned_and_the_same_every_time(tmp_path):
  torch_file.save(path := tmp_path / "a" / "b.pth", TENSORS)
  tensors = torch_file.load(path)
  assert list(tensors) == list(TENSORS) and all(same(tensors[k], t.astype(t.dtype.newbyteorder("="))) for k, t in TENSORS.items())
  assert os.listdir(tmp_path / "a") == ["b.pth"] and tensors["steps"].shape == ()
  content = path.read_bytes()
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist(): assert (info.header_offset + 30 + len(info.filename) + len(info.extra)) % 64 == 0
    assert archive.testzip() is None
    pickletools.dis(archive.read("archive/data.pkl"), out=io.StringIO())
  torch_file.save(path, TENSORS)
  assert path.read_bytes() == content
  torch_file.save(path, {})
  assert torch_file.load(path) == {}


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(TypeError, match="uint16"): torch_file.save(tmp_path / "x.pth", {"z": np.zeros(2, np.uint16)})
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch, fails):
  torch_file.save(path := tmp_path / "x.pth", TENSORS)
  def crash(*_): raise OSError(28, "No space left on device")
  monkeypatch.setattr(os, fails, crash)
  with pytest.raises(UserError, match=r"x\.pth: No space left"): torch_file.save(path, {"w": np.zeros(3, np.float32)})
  assert torch_file.load(path).keys() == TENSORS.keys() and os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("form", ["zip", "stream"])
def test_zip_and_stream(tmp_path, form):
  value = load(tmp_path, GOOD[form])
  assert list(value) == ["a", "b", "c"] and same(value["a"], FLOATS) and same(value["b"][0], NUMBERS[3:9].reshape(3, 2).T)
  assert value["b"][1:] == [5, True, None, .5] and value["c"] == ((), "é") and value["b"][0].strides == (8, 16)


def test_tar(tmp_path):
  value = load(tmp_path, GOOD["tar"])
  assert same(value["a"], TAR_TENSOR) and value["b"][0] is value["a"] and value["b"][1:] == [5, True, None, .5]


@pytest.mark.parametrize("form", [zip_file, stream_file])
def test_a_whole_model_is_its_tensors(tmp_path, form):
  pickled = b"\x80\x02" + WHOLE_MODEL + b"."
  value = load(tmp_path, form(pickled if form is zip_file else pickled.replace(number(12) + b"tQ", number(12) + b"NtQ")))
  model = value.pop("model")
  assert (model.name, list(model.tensors), model.about) == ("models.yolo.Model", ["0.weight"], {"names": ["cat", "dog"], "nc": 2})
  assert same(model.tensors["0.weight"], FLOATS.reshape(3, 4))
  assert value == {"opt": "ultralytics.utils.Space", "kind": "models.yolo.Detect", "fitness": "numpy.core.multiarray.scalar"}
  assert {type(v) for v in value.values()} == {torch_file.Inert}


@pytest.mark.parametrize("opcodes, reason", [
  (WHOLE_MODEL + name("os", "system") + b"\x86", "refers to os.system, which a checkpoint has no use for, beside __builtin__.getattr"),
  (WHOLE_MODEL + call("torch", "load", text("x")) + b"\x86", "refers to torch.load"),
  (LEAF.replace(b"Conv2d", b"os.path"), "refers to torch.nn.modules.conv.os.path")])
def test_models_are_no_way_in(tmp_path, opcodes, reason):
  refused(tmp_path, zip_file(b"\x80\x02" + opcodes + b"."), reason)


def test_the_suffix_means_nothing_and_odd_files_are_named(tmp_path):
  (path := tmp_path / "model.tar").write_bytes(GOOD["zip"])
  assert same(torch_file.load(path)["a"], FLOATS)
  for content, reason in [(b"", "is empty"), (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE"),
                          (b"version https://git-lfs", "begins with b'version https:/"),
                          (pickle.dumps({"a": 1}, 2), "not one of torch.save's"), (b"\x80\x02", "cut short"),
                          (b"\x93NUMPY", "begins with")]: refused(tmp_path, content, reason)
  for path in (tmp_path / "none.pth", tmp_path):
    with pytest.raises(UserError, match=path.name): torch_file.load(path)


@pytest.mark.parametrize("kind, dtype",
                         [("DoubleStorage", "f8"), ("HalfStorage", "f2"), ("LongStorage", "i8"), ("IntStorage", "i4"), ("ShortStorage", "i2"),
                          ("CharStorage", "i1"), ("ByteStorage", "u1"), ("BoolStorage", "b1"), ("ComplexFloatStorage", "c8"),
                          ("ComplexDoubleStorage", "c16")])
@pytest.mark.parametrize("order", ["little", "big"])
def test_dtypes_in_both_byte_orders(tmp_path, kind, dtype, order):
  values = np.array([0, 1, 1, 0, 3], "i4").astype(dtype)
  data = values.astype(values.dtype.newbyteorder("<" if order == "little" else ">")).tobytes()
  for module in ("torch", "torch.cuda"):
    assert same(load(tmp_path, zip_file(b"\x80\x02" + tensor((5,), where=storage("0", 5, kind, module)) + b".", {"0": data}, order.encode())), values)


@pytest.mark.parametrize("order", ["little", "big"])
def test_bfloat16_becomes_float32(tmp_path, order):
  values = np.array([1.0, -2.5, 3.140625, np.inf], np.float32)
  data = (values.view(np.uint32) >> 16).astype("<u2" if order == "little" else ">u2").tobytes()
  assert same(load(tmp_path, zip_file(b"\x80\x02" + tensor((4,), where=storage("0", 4, "BFloat16Storage")) + b".", {"0": data}, order.encode())),
              values)


def test_tied_tensors_are_one_array_and_disjoint_ones_share_a_storage(tmp_path):
  parts = [tensor((6,)), tensor((6,)), tensor((3,), (2,), 6), tensor((3,), (2,), 7), tensor((0, 5), (5, 1), 12), tensor((), (), 0, storage("1", 1))]
  content = zip_file(b"\x80\x02](" + b"".join(parts) + b"e.", {"0": FLOATS.tobytes(), "1": FLOATS[3:4].tobytes()})
  tied, again, even, odd, empty, scalar = load(tmp_path, content)
  assert tied is again and same(tied, FLOATS[:6]) and same(even, FLOATS[6::2]) and same(odd, FLOATS[7::2])
  assert empty.shape == (0, 5) and scalar.shape == () and scalar == 3 and not tied.flags.writeable


def test_containers_of_training_checkpoints(tmp_path):
  state = b"}(" + text("_metadata") + call("collections", "OrderedDict") + b"u"
  items = [("ordered", call("collections", "OrderedDict") + text("w") + tensor() + b"s" + state + b"b"),
           ("pairs", call("collections", "OrderedDict", b"](](" + text("k") + b"K\1eae")),
           ("milestones", call("collections", "Counter", b"}K\x10K\1s")),
           ("args", name("argparse", "Namespace") + b")\x81" + mapping(("lr", b"K\2")) + b"b"),
           ("set", call("__builtin__", "set", b"](K\1K\2e")), ("set4", b"\x8f(K\1\x90"), ("size", call("torch", "Size", numbers(2, 3))),
           ("dtype", name("torch", "float16")), ("device", call("torch", "device", text("cuda"), b"K\1")),
           ("cpu", call("torch", "device", text("cpu"))), ("bytes", b"C\2\xff\0"), ("long", number(1 << 100)),
           ("parameter", call("torch._utils", "_rebuild_parameter", tensor(), b"\x88", call("collections", "OrderedDict"))),
           ("uint16", call("torch._utils", "_rebuild_tensor_v3", storage("1", 6, "UntypedStorage", "torch.storage"), b"K\1", numbers(2), numbers(1),
                           b"\x89", call("collections", "OrderedDict"), name("torch", "uint16")))]
  value = load(tmp_path, zip_file(b"\x80\x02" + mapping(*items) + b".", {"0": FLOATS.tobytes(), "1": np.arange(3, dtype=np.uint16).tobytes()}))
  assert same(value["ordered"].pop("w"), FLOATS) and same(value.pop("parameter"), FLOATS) and same(value.pop("uint16"), np.array([1, 2], np.uint16))
  assert value == {"ordered": {}, "pairs": {"k": 1}, "milestones": {16: 1}, "args": {"lr": 2}, "set": {1, 2}, "set4": {1}, "size": (2, 3),
                   "dtype": "torch.float16", "device": "cuda:1", "cpu": "cpu", "bytes": b"\xff\0", "long": 1 << 100}
  assert {type(v) for v in value.values()} == {dict, set, tuple, str, bytes, int}


def test_tensors_and_parameters_of_the_first_torches(tmp_path):
  parameter, hooks = name("torch.nn.parameter", "Parameter"), call("collections", "OrderedDict")
  plain = call("torch", "FloatTensor") + b"(" + storage(stream=True) + b"K\2" + numbers(3) + numbers(1) + b"tb"
  rebuilt = call("torch._utils", "_rebuild_tensor", storage(stream=True), b"K\5", numbers(2), numbers(1))
  forms = [plain, rebuilt, parameter + b"(" + rebuilt + b"tR(\x88\x89" + hooks + b"tb", parameter + b")\x81(" + plain + b"N" + hooks + b"\x88\x89tb"]
  value = load(tmp_path, stream_file(b"\x80\x02](" + b"".join(forms) + b"e."))
  assert same(value[0], FLOATS[2:5]) and same(value[1], FLOATS[5:7]) and value[2] is value[1] and value[3] is value[0]
  value = load(tmp_path, tar_file(b"\x80\x02" + parameter + b")\x81(" + text("7") + b"QN" + hooks + b"\x88\x89tb."))
  assert same(value, TAR_TENSOR)


def test_shared_lists_cost_nothing(tmp_path):
  laughs = b"](K\1K\2eq\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(50))
  value = load(tmp_path, zip_file(b"\x80\x02(" + laughs + b"t."))[-1]
  for _ in range(50): value = value[0] if value[0] is value[1] else None
  assert value == [1, 2]


# ---- what would run, elsewhere
class Marks:
  """Leaves its mark when unpickled."""
  def __init__(self, path): self.path = path
  def __setstate__(self, state): open(state["path"], "w").close()


class Calls:
  def __init__(self, function, *args): self.call = function, args
  def __reduce__(self): return self.call


def code(mark): return f"open({mark!r}, 'w').close()"
def chain(first, *rest): return b"\x80\x04" + first + b"".join(rest) + b"."
def imported(module): return call("importlib", "import_module", text(module))


def numpy_load(mark):
  inner = pickle.dumps(Calls(eval, code(mark)))
  header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
  with open(path := f"{mark}.npy", "wb") as f: f.write(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + inner)
  return pickle.dumps(Calls(np.load, path, None, True), 2)


def by_name(module, attribute, *args): return lambda mark: chain(call(module, attribute, *(a(mark) if callable(a) else a for a in args)))


PAYLOADS = {
  "posix.system": lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}"), 2),
  "nt.system or os.system": by_name("os", "system", lambda mark: text(f"touch {mark}")),
  "builtins.eval": lambda mark: pickle.dumps(Calls(eval, code(mark)), 4),
  "__builtin__.eval": lambda mark: pickle.dumps(Calls(eval, code(mark)), 2),
  "builtins.exec": by_name("builtins", "exec", lambda mark: text(code(mark))),
  "subprocess.Popen": by_name("subprocess", "Popen", lambda mark: b"](" + text("touch") + text(mark) + b"e"),
  "numpy.testing._private.utils.runstring": by_name("numpy.testing._private.utils", "runstring", lambda mark: text(code(mark)), b"}"),
  "numpy.f2py.crackfortran.myeval": by_name("numpy.f2py.crackfortran", "myeval", lambda mark: text(code(mark)), b"}", b"}"),
  "numpy.load": numpy_load,
  "timeit.timeit": by_name("timeit", "timeit", lambda mark: text(code(mark)), text("pass"), lambda mark: name("time", "time"), b"K\1"),
  "builtins.getattr": lambda mark: chain(name("builtins", "getattr"), b"(", imported("os"), text("system"), b"tR(", text(f"touch {mark}"), b"tR"),
  "operator.attrgetter": lambda mark: (
    chain(call("operator", "attrgetter", text("system")), b"(", imported("os"), b"tR(", text(f"touch {mark}"), b"tR")),
  "operator.methodcaller": lambda mark: chain(call("operator", "methodcaller", text("system"), text(f"touch {mark}")), b"(", imported("os"), b"tR"),
  "functools.partial": lambda mark: chain(call("functools", "partial", name("os", "system"), text(f"touch {mark}")), b")R"),
  "os.path.os.system": lambda mark: b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93(" + text(f"touch {mark}") + b"tR.",
  "os.system": lambda mark: b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\0h\1\x93(" + text(f"touch {mark}") + b"tR.",
  "collections.OrderedDict.fromkeys.__self__.__class__": lambda mark: (
    b"\x80\x04" + b"\x8c\x0bcollections\x8c\x27OrderedDict.fromkeys.__self__.__class__\x93" + call("os", "system", text(f"touch {mark}")) + b"."),
  f"{Marks.__module__}.Marks": lambda mark: pickle.dumps(Marks(mark), 2),
  "_reconstructor": lambda mark: pickle.dumps(Marks(mark), 1),
  "EXT1": lambda mark: b"\x80\x02\x82\xf0(" + text(f"touch {mark}") + b"tR.",
  "INST": lambda mark: b"(" + text(f"touch {mark}") + b"ios\nsystem\n.",
  "OBJ or os.system": lambda mark: b"(" + name("os", "system") + text(f"touch {mark}") + b"o.",
  "deep inside: posix.system": lambda mark: pickle.dumps({"model": [{"w": (1, Calls(os.system, f"touch {mark}"))}]}, 2),
}


def containers(payload):
  """The payload wherever a file of one of the three formats holds a pickle."""
  if payload[:1] == b"\x80": yield payload
  yield zip_file(payload)
  parts = stream_parts(payload)
  yield b"".join(parts)
  for i in (1, 2, 4): yield b"".join([*parts[:i], payload, *parts[i + 1:]])
  yield from (tar_file(payload), tar_file(b"\x80\x02N.", storages=payload), tar_file(b"\x80\x02N.", tensors=payload))
  yield tar_file(b"\x80\x02N.", storages=b"\x80\x02K\1." + payload)


@pytest.mark.parametrize("refusal", PAYLOADS)
def test_nothing_in_a_file_runs(tmp_path, refusal):
  mark = tmp_path / "mark"
  payload = PAYLOADS[refusal](str(mark))
  copyreg.add_extension("os", "system", 0xF0)
  try:
    try: pickle.loads(payload)
    except Exception: pass
    for _ in range(500):
      if mark.exists(): break
      time.sleep(0.01)
    assert mark.exists(), "the payload does nothing, so this test could not fail"
    mark.unlink()
    for content in containers(payload):
      message = refused(tmp_path, content)
      assert any(word in message for word in refusal.replace("deep inside: ", "").split(" or ")) and "nothing in the file was run" in message, message
  finally: copyreg.remove_extension("os", "system", 0xF0)
  time.sleep(0.05)
  assert not mark.exists()


@pytest.mark.parametrize("module, attribute", [
  ("torch", "load"), ("torch.hub", "load"), ("torch.jit", "load"), ("torch.jit._script", "RecursiveScriptModule"),
  ("torch._utils", "_rebuild_qtensor"),
  ("torch._utils", "_rebuild_sparse_tensor"), ("torch._utils", "_rebuild_wrapper_subclass"), ("torch._tensor", "_rebuild_from_type_v2"),
  ("torch", "float8_e4m3fn"),
  ("torch", "QInt8Storage"), ("torch.storage", "_load_from_bytes"), ("torch.serialization", "os.system"), ("torch", "os.system"),
  ("torch", "serialization.os"),
  ("torch.utils.data", "DataLoader"), ("torch._dynamo", "compile"), ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
  ("numpy", "dtype"),
  ("numpy._core._multiarray_umath", "_load_from_filelike"), ("numpy.ctypeslib", "load_library"), ("_codecs", "encode"),
  ("collections", "defaultdict"),
  ("collections", "OrderedDict.__init__"), ("argparse", "ArgumentParser"), ("argparse", "_sys.modules"), ("__main__", "Net"),
  ("torchvision.models.resnet", "ResNet"), ("os", ""),
  ("", ""), ("COLLECTIONS", "OrderedDict"), ("collections ", "OrderedDict"), ("torch\u00a0", "Size"), ("a\x1b[31m", "b\r")])
def test_names_outside_the_table_are_refused_by_name(tmp_path, module, attribute):
  shown = ascii(f"{module}.{attribute}")[1:-1]
  for opcodes in (name(module, attribute), text(module) + text(attribute) + b"\x93"):
    assert f"refers to {shown}, " in refused(tmp_path, zip_file(b"\x80\x02" + opcodes + b"."), "nothing in the file was run")


def test_advice_for_a_whole_model_and_for_torchscript(tmp_path):
  assert "state_dict()" in refused(tmp_path, zip_file(b"\x80\x02" + name("torchvision.models.resnet", "ResNet") + b")\x81."),
                                   "torchvision.models.resnet.ResNet")
  refused(tmp_path, zipped(entry("a/data.pkl", b"\x80\x02N."), entry("a/constants.pkl", b"\x80\x02)."), entry("a/code/x.py", b"")), "TorchScript")


def test_archives_inside_archives(tmp_path):
  inner = zip_file(PAYLOADS["posix.system"](str(tmp_path / "mark")))
  for member in ("model.pth", "a/weights", "data.pkl"): refused(tmp_path, zipped(entry(member, inner)), "holds an archive inside; unpack it first")
  refused(tmp_path, zipped(entry("model.pth", GOOD["stream"])), "holds an archive inside")
  refused(tmp_path, zipped(entry("x", GOOD["tar"])), "holds an archive inside")
  refused(tmp_path, zipped(entry("x", b"hello")), "0 data.pkl")
  refused(tmp_path, zipped(entry("a/data.pkl", b"\x80\x02N."), entry("b/data.pkl", b"\x80\x02N.")), "2 data.pkl")
  refused(tmp_path, zipped(), "begins with b'PK")
  assert not (tmp_path / "mark").exists()


ORDERED, EMPTY_TENSOR = call("collections", "OrderedDict"), call("torch", "FloatTensor")
@pytest.mark.parametrize("opcodes, reason", [
  (ORDERED + b")R", "REDUCE to call a OrderedDict"), (tensor() + b")R", "REDUCE to call a Tensor"),
  (text("os.system") + b")R", "REDUCE to call a str"),
  (name("torch", "FloatStorage") + b")R", "to call torch.FloatStorage"), (name("torch", "float32") + b")\x81", "NEWOBJ to call torch.float32"),
  (name("collections", "OrderedDict") + b"]R", "REDUCE"), (name("collections", "OrderedDict") + b"(]]tR", "calls collections.OrderedDict in a way"),
  (call("collections", "OrderedDict", b"K\1"), "a int where a list"), (call("collections", "OrderedDict", b"]K\1a"), "other than pairs"),
  (call("argparse", "Namespace", b"}"), "calls argparse.Namespace in a way"), (call("torch", "Size", b"]"), "a list where a tuple"),
  (call("torch", "device", b"N"), "NoneType"),
  (call("torch", "FloatTensor", numbers(3)), "calls torch.FloatTensor"), (call("torch.nn.parameter", "Parameter", b"K\1"), "a int where a Tensor"),
  (call("torch._utils", "_rebuild_parameter", b"NNN"), "a NoneType where a Tensor"),
  (call("torch._utils", "_rebuild_tensor", b"NNNN"), "NoneType instead of a storage"),
  (call("torch._utils", "_rebuild_tensor_v3", storage(), b"K\0", numbers(12), numbers(1), b"\x89", ORDERED, b"]"),
  "calls torch._utils._rebuild_tensor_v3"),
  (b"}}b", "BUILD on a dict"), (b"]}b", "BUILD on a list"), (ORDERED + b"]b", "BUILD on a OrderedDict with a list"),
  (ORDERED + b"N}\x86b", "with a tuple"),
  (name("collections", "OrderedDict") + b"}b", "BUILD on collections.OrderedDict"), (tensor() + b"}b", "BUILD on a Tensor with a dict"),
  (EMPTY_TENSOR, "without content"), (EMPTY_TENSOR + b"(NNNNNtb", "a NoneType where a Tensor"),
  (storage(), "holds a Storage where data belongs"), (name("torch", "FloatStorage"), "holds torch.FloatStorage where data"),
  (b"}" + name("torch", "float32") + b"Ns", "as a key"),
  (b"})" + b"Ns", "a tuple as a key"), (b"}" + number(1 << 64) + b"Ns", "a int as a key"), (b"\x8f(]\x90", "a list as a key"),
  (b"}K\1NsK\1Ns", "key 1 twice"),
  (b"]K\1s", "finds nothing"), (b"]K\1K\2s", "SETITEM on a list"), (b"}K\1a", "APPEND on a dict"), (b"](K\1\x90", "ADDITEMS on a list"),
  (b"}(K\1u", "key without a value"),
  (b"K\1Q", "persistent id of an unknown form"), (persistent(text("module"), b"NNN"), "unknown form"),
  (persistent(text("storage"), text("torch FloatStorage"), text("0"), text("cpu"), b"K\1"), "unknown"),
  (persistent(text("storage"), name("torch", "float32"), text("0"), text("cpu"), b"K\1"), "storage of torch.float32"),
  (storage(numel=-1), "negative"), (storage("../../etc/passwd"), "0 bytes"),
  (persistent(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x0c" + numbers(1, 2, 3)), "views of storages"),
  (b"P0\n", "PERSID"), (b"]2\x86", "DUP"), (b"N0", "POP"), (b"(l", "LIST"), (b"(d", "DICT"), (b"I1\n", "INT"), (b"S'a'\n", "STRING"),
  (b"Va\n", "UNICODE"), (b"F1\n", "FLOAT"),
  (b"\x8b\1\0\0\0\1", "LONG4"), (b"\x84\1\0\0\0", "EXT4"), (b"\x92", "NEWOBJ_EX"), (b"\x96" + bytes(8), "BYTEARRAY8"), (b"\x97", "NEXT_BUFFER"),
  (b"p0\n", "PUT"), (b"g0\n", "GET"),
  (b"\x93", "finds nothing"), (b"K\1K\2\x93", "STACK_GLOBAL"), (b"R", "finds nothing"), (b"e", "finds nothing"), (b"h\0", "finds nothing"),
  (b"q\0", "finds nothing"), (b"NN", "middle"), (b"(N", "middle"),
  (b"", "finds nothing"), (b"\x80\x09N", "PROTO"), (b"\xff", "unknown opcode"), (b"Nr\xff\xff\xff\xff", "memo index 4294967295"),
  (b"X\xff\xff\xff\x7f", "cut short"),
  (b"\x8d" + b"\xff" * 8, "cut short"), (b"T\xff\xff\xff\xff", "cut short"), (b"X\2\0\0\0\xed\xa0", "decode"), (b"U\1\xff", "decode"),
  (b"cos", "a name has no end"), (b"cos\nsys" + b"m" * 9999, "no end"),
])
def test_tricks_are_refused_with_the_opcode_or_reason(tmp_path, opcodes, reason): refused(tmp_path, zip_file(b"\x80\x02" + opcodes + b"."), reason)


def test_persistent_ids_of_the_other_formats(tmp_path):
  for opcodes in (text("7") + b"Q", persistent(text("module"), b"NNN")): refused(tmp_path, stream_file(b"\x80\x02" + opcodes + b"."), "unknown form")
  for opcodes in (text("8") + b"Q", text("-1") + b"Q", text("٧") + b"Q", b"K\7Q", storage(), persistent(name("torch", "Size"), b"NN")):
    refused(tmp_path, tar_file(b"\x80\x02" + opcodes + b"."), "persistent id of no tensor")
  parts = stream_parts(b"\x80\x02N.")
  for i in (0, 1, 2, 4): refused(tmp_path, b"".join([*parts[:i], b"\x80\x02K\1Q.", *parts[i + 1:]]), "BINPERSID")


# ---- lies about tensors
def untyped(numel, dtype):
  return call("torch._utils", "_rebuild_tensor_v3", storage("0", 48, "UntypedStorage", "torch.storage"), b"K\0", numbers(numel), numbers(1), b"\x89",
              ORDERED, name("torch", dtype))


@pytest.mark.parametrize("opcodes, reason", [
  (tensor((13,)), "which it leaves"), (tensor((4,), (4,)), "which it leaves"), (tensor(offset=1), "which it leaves"),
  (tensor((0,), offset=13), "which it leaves"), (tensor(offset=-1), "offset -1"),
  (tensor((-1,)), "size (-1,)"), (tensor((2,), (-1,)), "stride (-1,)"), (tensor((1 << 70,)), "size (1180591"),
  (tensor((1 << 40, 1 << 40), (1 << 40, 1)), "which it leaves"),
  (tensor((1 << 61, 1 << 61, 0), (1, 1, 1)), ""), (tensor((1 << 61,), (0,)), "share memory"), (tensor((3, 4), (0, 1)), "share memory"),
  (tensor((3, 4), (3, 1)), "share memory"),
  (tensor((2, 2, 2), (1, 1, 4)), "share memory"), (tensor((12,), ()), "size and stride that fit"),
  (tensor((1,) * 17, (1,) * 17), "size and stride that fit"), (tensor(b"]", b"]"), "size and stride that fit"),
  (tensor((b"\x88",), (1,)), "size (True,)"), (tensor((b"G" + bytes(8),), (1,)), "size (0.0,)"), (tensor(offset=b"\x88"), "offset True"),
  (tensor(offset=text("0")), "offset '0'"),
  (tensor(where=storage(numel=11)), "which it leaves"), (tensor((11,), where=storage(numel=11)), "has 48 bytes where its type and length make 44"),
  (tensor(where=storage(numel=13)), "48 bytes"),
  (tensor(where=storage("9")), "has 0 bytes"), (tensor((6,), where=storage(numel=12, kind="DoubleStorage")), "has 48 bytes"),
  (tensor(where=storage(numel=1 << 70)), "has 48 bytes"),
  (b"](" + tensor((6,)) + tensor((6,), where=storage(numel=6, kind="DoubleStorage")) + b"e", "in two ways"),
  (b"](" + tensor() + tensor(offset=1, size=(11,)) + b"e", "overlaps another in part"),
  (b"](" + tensor() + tensor((3, 4), (4, 1)) + b"e", "overlaps another in part"),
  (b"](" + tensor((6,), (2,)) + tensor((2,), (4,), 4) + b"e", "overlaps another in part"),
  (tensor(where=storage(numel=48, kind="UntypedStorage", module="torch.storage")), "another type than its storage"),
  (tensor(where=storage(kind="QInt8Storage")), "torch.QInt8Storage, a kind of tensor"),
  (call("torch._utils", "_rebuild_tensor_v2", storage(), b"K\0", numbers(12), numbers(1), b"\x89", ORDERED, b"}" + text("conj") + b"\x88s"),
  "conjugate"),
  (b"](" + untyped(12, "float32") + untyped(24, "uint16") + b"e", "two types in one storage")])
def test_lies_about_tensors(tmp_path, opcodes, reason): refused(tmp_path, zip_file(b"\x80\x02" + opcodes + b"."), reason)


TAR_STORAGE = b"\x80\x02K\1.\x80\x02(" + number(5) + text("cpu") + name("torch", "FloatStorage") + b"t."
def tar_layout(storage, *layout):
  return (b"\x80\x02K\1.\x80\x02(" + number(7) + number(storage) + name("torch", "FloatTensor") + b"t." +
          struct.pack(f"<ii{len(layout) - 2}q", *layout))


@pytest.mark.parametrize("content, reason", [
  (stream_file(b"\x80\x02" + tensor(stream=True) + b".", storages={"0": FLOATS[:11]}), "storage of 11 elements"),
  (stream_file(b"\x80\x02N."), "other storages"),
  (stream_file(b"\x80\x02" + tensor(stream=True) + b".", storages={}), "other storages"),
  (stream_file(b"\x80\x02" + tensor(stream=True) + b".", keys=b"](" + text("0") * 2 + b"e"), "other storages"),
  (stream_file(b"\x80\x02" + tensor(stream=True) + b".", keys=b"]]a"), "other storages"),
  (stream_file(b"\x80\x02" + tensor(stream=True) + b".", little=b"\x89"), "big-endian"),
  (stream_file(b"\x80\x02" + tensor(stream=True) + b".") + b"\0", "goes on after"),
  (b"\x80\x02" + number(torch_file.MAGIC) + b".\x80\x02K\1.\x80\x02}.", "unknown version"),
  (tar_file(b"\x80\x02N.", storages=b"\x80\x02" + number(1 << 62) + b"."), "damaged pickle"),
  (tar_file(b"\x80\x02N.", storages=b"\x80\x02N."), "a NoneType or a negative number for a count"),
  (tar_file(b"\x80\x02N.", views=b"](" + numbers(1, 5, 0, 2) + b"e"), "views of others"),
  (tar_file(b"\x80\x02N.", members=tarfile.SYMTYPE), "that torch's tar files do not have"),
  (tar_file(b"\x80\x02N.", members=tarfile.GNUTYPE_SPARSE), "that torch's tar files do not have"),
  (tar_file(b"\x80\x02N.", extra=[("pickle", b"")]), "torch's tar files do not"),
  (tar_file(b"\x80\x02N.", storages=TAR_STORAGE + struct.pack("<q", 1 << 60)), "cut short"),
  (tar_file(b"\x80\x02N.", storages=TAR_STORAGE + struct.pack("<q", -1)), "cut short"),
  (tar_file(b"\x80\x02N.", tensors=tar_layout(5, 1, 0, 13, 1, 0)), "which it leaves"),
  (tar_file(b"\x80\x02N.", tensors=tar_layout(5, 1, 0, 12, 0, 0)), "share memory"),
  (tar_file(b"\x80\x02N.", tensors=tar_layout(6, 1, 0, 3, 1, 0)), "instead of a storage"),
  (tar_file(b"\x80\x02N.", tensors=tar_layout(5, 1 << 30, 0)), "1073741824 dimensions"),
  (tar_file(b"\x80\x02N.", tensors=tar_layout(5, -1, 0)), "-1 dimensions"),
  (GOOD["tar"].replace(b"storages", b"somethin"), "without storages"), (GOOD["tar"][:124] + b"99999999999" + GOOD["tar"][135:], "tar header"),
  (GOOD["tar"][:700], "cut short")])
def test_lies_in_the_stream_and_the_tar(tmp_path, content, reason): refused(tmp_path, content, reason)


# ---- lies about archives, and bombs
def member(**lies): return zipped(entry("a/data.pkl", b"\x80\x02N."), entry("a/data/0", bytes(100), **lies))


def deflated(size):
  with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a/data.pkl", b"\x80\x02N.")
    archive.writestr("a/data/0", bytes(size))
  return out.getvalue()


INNER = entry("a/data/1", b"x" * 9)
@pytest.mark.parametrize("content, reason", [
  (deflated(30_000_000), "is compressed"), (member(method=8), "is compressed"), (member(flags=1), "is encrypted"),
  (member(claim=1 << 30), "claims 1073741824 bytes where 100"),
  (member(claim=1 << 30, packed=1 << 30), "cut short"), (member(claim=99), "claims 99 bytes where 100"),
  (member(claim=0xFFFFFFFF), "claims 4294967295"), (member(claim=10, packed=10), "checksum"),
  (zipped(entry("a/data.pkl", b"N."), entry("a/data.pkl", b"N.")), "twice"),
  (zipped(entry("a/data.pkl", b"N."), entry("../x", b"")), "out of the archive"),
  (zipped(entry("a/data.pkl", b"N."), entry("a/../../x", b"")), "out of the archive"), (zipped(entry("/etc/x", b"")), "out of the archive"),
  (zipped(entry("a\\x", b"")), "out of the archive"),
  (zipped(entry("a/data.pkl", b"N."), entry("a/data/0", INNER[0] + bytes(9)), (b"", INNER[1]), places=[0, 42, 42 + 38]), "overlap"),
  (zipped(entry("a/data.pkl", b"N."), entry("a/data/0", b"xy"), places=[0, 0]), "damaged directory"),
  (zipped(entry("a/data.pkl", b"N."), count=2), "cut short"),
  (zipped(entry("a/data.pkl", b"N."), count=0xFFFF), ""), (GOOD["zip"][:-1], "cut short"), (GOOD["zip"] + b"\0", "cut short"),
  (zip_file(b"N.", order=b"middle"), "byte order"),
  (b"PK\3\4" + b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2), ""), (zip_file(b"N.")[:-6] + b"\xff\xff\xff\x7f\0\0", "")])
def test_lies_about_zip_members(tmp_path, content, reason): refused(tmp_path, content, reason)


def wide_end(content, count=None):
  """content with the directory's end as zip64 writes it."""
  entries, size, at = struct.unpack("<HII", content[-12:-2])
  count = entries if count is None else count
  end = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, at) + b"PK\6\7" + struct.pack("<IQI", 0, len(content) - 22, 1)
  return content[:-22] + end + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def test_zip64(tmp_path):
  assert same(load(tmp_path, wide_end(GOOD["zip"]))["a"], FLOATS)
  refused(tmp_path, wide_end(GOOD["zip"], count=70_000), "claims 70000 members")
  refused(tmp_path, wide_end(GOOD["zip"]).replace(b"PK\6\6", b"PK\6\5"), "damaged directory")
  body, fields = zipped(entry("a/data.pkl", b"\x80\x02K\5."))[:-22], struct.pack("<II", 5, 5)
  at, extra = body.rindex(b"PK\1\2"), struct.pack("<HHBHHQQ", 9, 1, 0, 1, 16, 5, 5)
  directory = body[at:at + 20] + b"\xff" * 8 + body[at + 28:at + 30] + struct.pack("<H", len(extra)) + body[at + 32:] + extra
  assert body[at + 20:at + 28] == fields
  assert load(tmp_path, body[:at] + directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(directory), at, 0)) == 5


MANY = 1 << 19
REFERENCES = 30_000
BOMBS = {
  "sets": b"\x8f" * MANY, "lists": b"]" * MANY, "dicts": b"}" * MANY, "marks": b"(" * MANY, "nothing": b"N" * MANY, "memos": b"N" + b"\x94" * MANY,
  "memo indices": b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(MANY)), "tuples": b"N" + b"\x85" * MANY,
  "list of lists": b"](" + b"]" * MANY + b"e.", "ordered dicts": name("collections", "OrderedDict") + b"q\0(" + b"h\0)R" * MANY,
  "floats": b"](" + b"G01234567" * MANY + b"e.", "wide text": text("x" * (10 * MANY) + "\U0001F600"),
  "copies of a list": name("builtins", "set") + b"q\0](" + b"".join(b"M" + struct.pack("<H", i) for i in range(REFERENCES)) + b"e\x85q\1(" +
                      b"h\0h\1R" * REFERENCES,
  "copies of a dict": mapping(*((str(i), b"N") for i in range(REFERENCES))) + b"q\0" + name("argparse", "Namespace") + b"q\1(" +
                      b"h\1)\x81h\0b" * REFERENCES,
  "storages": b"](" + b"".join(storage(str(i), 0) for i in range(REFERENCES)) + b"e.",
  "deep lists": b"]" * 9_999 + b"a" * 9_998 + b".", "deep tuples": b")" + b"\x85" * 9_999 + b".",
  "deep by reference": b"(]q\0" + b"]h\0aq\0" * 999 + b"t.",
  "tuples as keys": b"}q\xff)q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(50)) + b"h\xffh\x32Ns.",
  "cycle": b"]q\0h\0a.", "cycle of a dict": b"}q\0" + text("a") + b"h\0s.", "cycle through a tuple": b"]q\0h\0\x85a.",
  "cycle of arguments": name("argparse", "Namespace") + b")\x81q\0}" + text("a") + b"h\0sb."}
REASONS = {"deep": "nested more than 64 deep", "cycle": "holds itself", "tuples as keys": "a tuple as a key"}


@pytest.mark.parametrize("bomb", by_hand(BOMBS, "ordered dicts", "memos", "floats", "marks"))
def test_bombs_stay_small(tmp_path, bomb):
  reason = next((REASONS[key] for key in REASONS if bomb.startswith(key)), "more small objects")
  refused(tmp_path, zip_file(b"\x80\x02" + BOMBS[bomb]), reason)


def test_many_members_and_long_numbers_stay_small(tmp_path):
  assert settled(tmp_path, zipped(entry("a/data.pkl", b"\x80\x02K\5."), *(entry(f"{i}", b"") for i in range(20_000)))) == 5
  refused(tmp_path, zip_file(b"\x80\x02" + b"\x8b" + struct.pack("<I", MANY) + b"\xff" * MANY + b"."), "LONG4")


def test_overlapping_views_are_found_without_a_walk_of_each(tmp_path):
  views = b"".join(tensor((1000,), (1,), 1000 * i, storage("0", 1_000_000)) for i in range(1000))
  value = load(tmp_path, zip_file(b"\x80\x02](" + views + b"e.", {"0": bytes(4_000_000)}))
  assert len(value) == 1000 and value[7].shape == (1000,)


# ---- chance
def settled(tmp_path, content):
  """A tree of plain types or a UserError, in bounded memory; never anything else."""
  (path := tmp_path / "fuzz.pth").write_bytes(content)
  tracemalloc.start()
  try: value = torch_file.load(path)
  except UserError as e:
    assert str(path) in str(e) and "\n" not in str(e)
    return None
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(content) + (20 << 20)
  def plain(node):
    if type(node) is torch_file.Module: node = {**node.tensors, **node.about}
    assert type(node) in (torch_file.Inert, dict, list, tuple, set, str, bytes, int, float, bool, type(None), np.ndarray)
    for part in [*node, *node.values()] if isinstance(node, dict) else node if isinstance(node, (list, tuple, set)) else (): plain(part)
  plain(value)
  return value


@pytest.mark.parametrize("form", GOOD)
def test_every_cut(tmp_path, form):
  for length in range(0, len(GOOD[form]), 41 if form == "tar" else 3):
    (path := tmp_path / "x.pth").write_bytes(GOOD[form][:length])
    try: value = torch_file.load(path)
    except UserError: continue
    # a tar ends in blocks of zeros
    assert form == "tar" and not any(GOOD[form][length:]) and same(value["a"], TAR_TENSOR)


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("form", GOOD)
@FUZZ
@given(data=st.data())
def test_mutations(tmp_path, form, data):
  content = bytearray(GOOD[form])
  for _ in range(data.draw(st.integers(1, 4))):
    at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    match data.draw(st.sampled_from(["flip", "cut", "insert", "splice", "number"])):
      case "flip": content[at:at + 1] = bytes([data.draw(st.integers(0, 255))])
      case "cut": del content[at:end]
      case "insert": content[at:at] = data.draw(st.binary(max_size=9))
      case "splice": content[at:at] = GOOD[data.draw(st.sampled_from(sorted(GOOD)))][at:end]
      case "number": content[at:at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(4), b"\0\0\0\x80"]))
  settled(tmp_path, bytes(content))


FRAGMENTS = [bytes([o]) for o in b"()]}\x8f.NRQbtueas0\x81\x85\x86\x87\x88\x89\x90\x93\x94"] + [
  b"K\0", b"K\1", b"h\0", b"h\1", b"q\0", b"q\1", b"U\x017", number(12), number(1 << 63), numbers(12), numbers(1), numbers(3, 4), numbers(4, 1),
  text("0"), text("storage"), text("_metadata"), text("torch"), storage(), storage(stream=True), tensor(), tensor((3, 4), (4, 1)), ORDERED,
  name("torch", "FloatStorage"), name("torch", "FloatTensor"), name("torch", "Size"), name("torch", "device"), name("torch", "float32"),
  name("torch._utils", "_rebuild_tensor_v2"), name("torch.nn.parameter", "Parameter"), name("collections", "OrderedDict"), name("builtins", "set"),
  name("collections", "Counter"), name("argparse", "Namespace"), name("os", "system"),
  name("models.yolo", "Model") + b")\x81", LEAF, text("_modules"),
  name("builtins", "getattr"), mapping(*NOTHING, ("_modules", mapping(("0", LEAF)))) + b"b"]


@FUZZ
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=40), form=st.sampled_from([zip_file, stream_file, tar_file]))
def test_random_opcodes(tmp_path, parts, form): settled(tmp_path, form(b"\x80\x02" + b"".join(parts) + b"."))


LEAVES = [b"N", b"K\1", b"h\1", text("a"), b"]", b"}", ORDERED, tensor(), name("torch", "float32"), numbers(3), number(1 << 70)]
JOINTS = [b"a", b"\x85", b"\x86", b"\x87", b"s", b"q\1", b"e", b"("]


@FUZZ
@given(parts=st.lists(st.sampled_from(LEAVES + JOINTS), max_size=24))
def test_random_structures(tmp_path, parts): settled(tmp_path, zip_file(b"\x80\x02(]q\1" + b"".join(parts) + b"t."))
