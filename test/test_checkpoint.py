import json, os, struct
import numpy as np
import pytest
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import safe_load, safe_save
from tinydet.errors import UserError
from tinydet.weights import checkpoint

RNG = np.random.default_rng(0)
TENSORS = {"half": RNG.standard_normal(3).astype(np.float16), "weight": RNG.standard_normal((4, 3, 1)).astype(np.float32), "step": np.array(7),
           "small": RNG.integers(0, 99, (2, 2), np.int32), "bytes": np.arange(5, dtype=np.uint8), "mask": np.array([True, False, True]),
           "signed": np.array([-1, 2], np.int8), "empty": np.zeros((0, 4), np.float32), "turned": RNG.standard_normal((4, 3)).astype(np.float32).T}
METADATA = {"step": 7, "classes": ["a", 'quote " and "tinydet_sha256":"' + "0" * 64], "best": None, "nested": {"x": [1.5]}}


def same(a, b): return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def raw(header, payload=b""): return struct.pack("<Q", len(header)) + header + payload


def test_round_trip(tmp_path):
  checkpoint.save(tmp_path/"a"/"b.safetensors", TENSORS, METADATA)
  tensors, metadata = checkpoint.load(tmp_path/"a"/"b.safetensors")
  assert same(tensors, TENSORS) and metadata == METADATA and tensors["step"].shape == ()
  assert os.listdir(tmp_path/"a") == ["b.safetensors"]
  tensors["weight"] += 1


def test_tinygrad_reads_ours_and_we_read_tinygrads(tmp_path):
  checkpoint.save(path := tmp_path/"x.safetensors", TENSORS, METADATA)
  assert same({k: t.to("PYTHON").numpy() for k, t in safe_load(path).items() if k != "empty"}, {k: t for k, t in TENSORS.items() if k != "empty"})
  ours = {k: t for k, t in TENSORS.items() if t.size}
  safe_save({k: Tensor(t.copy(), device="PYTHON") for k, t in ours.items()}, str(path), {"note": "hello"})
  tensors, metadata = checkpoint.load(path)
  assert same(tensors, ours) and metadata == {"note": "hello"}


def test_bfloat16_becomes_float32(tmp_path):
  values = np.array([1.0, -2.5, 3.140625], np.float32)
  safe_save({"x": Tensor(values, device="PYTHON").cast(dtypes.bfloat16)}, str(tmp_path/"x.safetensors"))
  assert same(checkpoint.load(tmp_path/"x.safetensors")[0], {"x": values})


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
  checkpoint.save(path := tmp_path/"x.safetensors", {"w": np.arange(3, dtype=np.float32)}, {"step": 1})
  good = path.read_bytes()
  for bit in range(len(good) * 8):
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    with pytest.raises(UserError, match=r"x\.safetensors"): checkpoint.load(path)
  for length in range(len(good)):
    path.write_bytes(good[:length])
    with pytest.raises(UserError, match=r"x\.safetensors"): checkpoint.load(path)
  path.write_bytes(good + b"\0")
  with pytest.raises(UserError, match="checksum"): checkpoint.load(path)


def lie(payload, **changes): return raw(json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} | changes}).encode(), payload)


TWO = b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"%s":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
@pytest.mark.parametrize("content, reason", [
  (b"abc", "shorter than 8"), (struct.pack("<Q", 2**63) + b"{}", "header claims 9223372036854775808 bytes"), (raw(b"[" * 99999), "nested too deeply"),
  (raw(b"[]"), "not a JSON object"), (raw(b"{"), ""), (raw(b'{"\xff":1}'), ""), (raw(b'{"a":1}'), "described oddly"),
  (raw(b'{"__metadata__":{"a":1}}'), "not text to text"), (raw(b'{"__metadata__":{"tinydet":"1"}}'), "checksum"),
  (lie(b"ab", dtype="F8"), "dtype 'F8'"), (lie(b"ab", dtype=[]), "dtype"), (lie(b"ab", more=1), "described oddly"),
  (lie(b"ab", shape=[-2]), "shape"), (lie(b"ab", shape=[True, 2]), "shape"), (lie(b"ab", shape=[2.0]), "shape"), (lie(b"ab", shape=[1] * 99), "sha"),
  (lie(b"ab", shape=[3]), "has 2 bytes for shape"), (lie(b"ab", shape=[2**40, 2**40]), "has 2 bytes for shape"),
  (lie(b"ab", data_offsets=[2, 0]), "cut short"), (lie(b"a"), "cut short"), (lie(b"ab", data_offsets=[0]), "offsets"),
  (lie(b"abc", data_offsets=[1, 3]), "gap"), (lie(b"abc"), "describes 2"),
  (raw(b"{" + TWO % b"b" + b"}", b"ab"), "overlaps"), (raw(b"{" + TWO % b"a" + b"}", b"ab"), "twice")])
def test_lying_files_are_refused_with_the_reason(tmp_path, content, reason):
  (path := tmp_path/"liar.safetensors").write_bytes(content)
  with pytest.raises(UserError, match=rf"liar\.safetensors.*{reason}"): checkpoint.load(path)


def test_missing_file_and_folder_are_named(tmp_path):
  for path in (tmp_path/"none.safetensors", tmp_path):
    with pytest.raises(UserError, match=path.name): checkpoint.load(path)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch, fails):
  checkpoint.save(path := tmp_path/"x.safetensors", TENSORS, {"step": 1})
  def crash(*_): raise OSError(28, "No space left on device")
  monkeypatch.setattr(os, fails, crash)
  with pytest.raises(UserError, match=r"x\.safetensors: No space left"): checkpoint.save(path, {"w": np.zeros(3, np.float32)}, {"step": 2})
  assert checkpoint.load(path)[1] == {"step": 1} and os.listdir(tmp_path) == ["x.safetensors"]


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(TypeError, match="complex"): checkpoint.save(tmp_path/"x", {"z": np.zeros(2, np.complex64)})
  with pytest.raises(TypeError): checkpoint.save(tmp_path/"x", {}, {"object": object()})
  assert not os.listdir(tmp_path)


def test_newest_falls_back_past_broken_files(tmp_path):
  warnings = []
  assert checkpoint.newest(tmp_path, warnings.append) is None and checkpoint.newest(tmp_path/"nowhere") is None
  for step in (9, 100, 20): checkpoint.save(tmp_path/f"checkpoint-{step}.safetensors", TENSORS, step)
  (tmp_path/"checkpoint-x.safetensors").write_bytes(b"")
  assert checkpoint.newest(tmp_path, warnings.append) == tmp_path/"checkpoint-100.safetensors" and not warnings
  broken = bytearray((tmp_path/"checkpoint-100.safetensors").read_bytes())
  broken[-1] ^= 1
  (tmp_path/"checkpoint-100.safetensors").write_bytes(broken)
  assert checkpoint.newest(tmp_path, warnings.append) == tmp_path/"checkpoint-20.safetensors"
  assert len(warnings) == 1 and "checkpoint-100.safetensors" in warnings[0]
