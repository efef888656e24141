import argparse, collections, io, struct, tarfile
import numpy as np
import pytest
torch = pytest.importorskip("torch")
from tinydet.errors import UserError  # noqa: E402
from tinydet.weights import torch_file  # noqa: E402

NEW_AND_OLD = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
torch.manual_seed(0)


def through(path, value, zipped=True, **options):
  torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
  return torch_file.load(path)


def same(ours, theirs):
  """Whether ours is the tree theirs with arrays for tensors, equal to the last bit."""
  if isinstance(theirs, torch.Tensor):
    wanted = (theirs.detach().float() if theirs.dtype == torch.bfloat16 else theirs.detach()).numpy()
    return type(ours) is np.ndarray and (ours.dtype, ours.shape, ours.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
  if isinstance(theirs, argparse.Namespace): theirs = vars(theirs)
  if isinstance(theirs, dict): return type(ours) is dict and list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in ours)
  if isinstance(theirs, (list, tuple)): return type(ours) in (list, tuple) and len(ours) == len(theirs) and all(map(same, ours, theirs))
  return type(ours) is type(theirs) and ours == theirs


def network(): return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 2))


@NEW_AND_OLD
def test_dtypes(tmp_path, zipped):
  values = torch.tensor([[0., 1.5, -2.25], [float("inf"), 3e-5, 1e30]])
  dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
            torch.complex64, torch.complex128] + ([torch.uint16, torch.uint32, torch.uint64] if zipped else [])
  value = {str(dtype): values.clamp(-2, 99).to(dtype) if not dtype.is_floating_point else values.to(dtype) for dtype in dtypes}
  assert same(through(tmp_path / "x.pth", value, zipped), value)


@NEW_AND_OLD
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers(tmp_path, zipped, protocol):
  value = {"text": "é\U0001F600", "number": -7, "long": 1 << 80, "wide": 1 << 40, "float": 0.1, "nothing": None, "yes": True, "list": [1, [2, ()]],
           3: (4, 5, 6, 7), "set": {1, 2}, "ordered": collections.OrderedDict(b=1, a=2), "counter": collections.Counter([30, 40, 40]),
           "args": argparse.Namespace(lr=0.1, milestones=[1, 2]), "long list": [*range(3000)]}
  if protocol > 2: value["bytes"] = b"\xff\0"
  assert same(through(tmp_path / "x.pth", value, zipped, pickle_protocol=protocol), value)
  names = through(tmp_path / "x.pth", [torch.Size((1, 2)), torch.device("cuda:1"), torch.device("cpu"), torch.float16], zipped)
  assert names == [(1, 2), "cuda:1", "cpu", "torch.float16"]


@NEW_AND_OLD
def test_views_ties_and_shapes(tmp_path, zipped):
  base, strided = torch.arange(24.), torch.randn(4, 3, 2)
  value = {"turned": torch.randn(3, 4).T, "permuted": torch.randn(2, 3, 4, 5).permute(3, 0, 2, 1),
           "channels": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
           "first": base[:8].view(2, 4), "second": base[8:16], "even": base[16::2], "odd": base[17::2], "every second": strided[:, ::2, 1],
           "empty": torch.zeros(0, 3), "scalar": torch.tensor(5), "one": torch.ones(1, 1, 1), "parameter": torch.nn.Parameter(torch.randn(2, 2)),
           "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False)}
  ours = through(tmp_path / "x.pth", value, zipped)
  assert same(ours, value)
  for k in ("turned", "permuted", "channels", "even", "every second"): assert ours[k].strides == tuple(s * 4 for s in value[k].stride())
  tied = torch.nn.Linear(3, 3)
  twice = through(tmp_path / "x.pth", {"a": tied.weight, "b": tied.weight, "c": tied.weight.T.detach().T, "d": tied.weight.detach()}, zipped)
  assert twice["a"] is twice["b"] is twice["c"] is twice["d"] and same(twice["a"], tied.weight)


@NEW_AND_OLD
def test_parameters_with_attributes_and_buffers(tmp_path, zipped):
  (parameter := torch.nn.Parameter(torch.randn(3))).decay = False
  assert same(through(tmp_path / "x.pth", {"p": parameter}, zipped), {"p": parameter.detach()})


@NEW_AND_OLD
def test_a_state_dict_keeps_its_order_and_loses_its_metadata(tmp_path, zipped):
  state = network().state_dict()
  assert hasattr(state, "_metadata") and same(through(tmp_path / "x.pth", state, zipped), state)
  assert through(tmp_path / "x.pth", network().half().state_dict(), zipped)["0.weight"].dtype == np.float16


@NEW_AND_OLD
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_whole_training_checkpoint(tmp_path, zipped, optimizer):
  model = network()
  optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9) if optimizer == "sgd" else torch.optim.AdamW(model.parameters())
  multi, warm = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 2]), torch.optim.lr_scheduler.LinearLR(optimizer)
  parts = [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 3)]
  sequence = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [2])
  scaler, ema = torch.amp.GradScaler("cpu"), torch.optim.swa_utils.AveragedModel(model)
  model(torch.randn(2, 3, 4, 4)).sum().backward()
  optimizer.step()
  multi.step()
  checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": multi.state_dict(), "warm": warm.state_dict(),
                "sequence": sequence.state_dict(), "scaler": scaler.state_dict(), "model_ema": ema.state_dict(), "epoch": 3,
                "args": argparse.Namespace(lr=0.1, data_path="/coco", aspect_ratios=(0.5, 1), amp=False, resume=None)}
  assert same(through(tmp_path / "x.pth", checkpoint, zipped), checkpoint)


@NEW_AND_OLD
def test_a_whole_model_is_the_tensors_of_its_state_dict(tmp_path, zipped):
  model = network()
  model.register_buffer("hidden", torch.ones(2), persistent=False)   # state_dict leaves it out
  ours = through(tmp_path / "x.pth", model, zipped)
  assert ours.name == "torch.nn.modules.container.Sequential" and same(ours.tensors, dict(model.state_dict()))


def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path):
  sparse = torch.tensor([[0., 1.], [0., 0.]]).to_sparse()
  quantised = torch._empty_affine_quantized([2], scale=1., zero_point=0, dtype=torch.qint8)
  for value, word in [(sparse, "torch._utils._rebuild_sparse_tensor"), (torch.zeros(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
                      (quantised, "torch._utils._rebuild_qtensor"), (torch.zeros(2).untyped_storage(), "a Storage where data belongs"),
                      (torch.ones(2, dtype=torch.complex64).conj(), "conjugate"), (torch.ones(1).expand(5), "share memory"),
                      ([b := torch.arange(4.), b[1:]], "overlaps another in part")]:
    for zipped in (True, False):
      if not zipped and word == "torch.float8_e4m3fn": continue
      with pytest.raises(UserError, match=rf"x\.pth: .*{word}"): through(tmp_path / "x.pth", value, zipped)
  torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pth")
  with pytest.raises(UserError, match=r"x\.pth.*TorchScript"): torch_file.load(tmp_path / "x.pth")


# ---- the tar format, which torch reads and no longer writes
def tar_file(pickled, floats, tensors):
  """tensors: (key, offset, size, stride) on one float storage of key 5."""
  def name(module, attribute): return f"c{module}\n{attribute}\n".encode()
  storages = b"\x80\x02K\1.\x80\x02(K\5X\3\0\0\0cpu" + name("torch", "FloatStorage") + b"t." + struct.pack("<q", floats.size)
  storages += floats.tobytes() + b"\x80\x02]."
  described = b"\x80\x02K" + bytes([len(tensors)]) + b"."
  for key, offset, size, stride in tensors:
    described += b"\x80\x02(K" + bytes([key]) + b"K\5" + name("torch", "FloatTensor") + b"t."
    described += struct.pack(f"<ii{2 * len(size) + 1}q", len(size), 0, *size, *stride, offset)
  with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:", format=tarfile.PAX_FORMAT) as tar:
    for member, content in [("sys_info", b"\x80\x02}."), ("pickle", pickled), ("tensors", described), ("storages", storages)]:
      info = tarfile.TarInfo(member)
      info.size, info.mtime = len(content), 1.5
      tar.addfile(info, io.BytesIO(content))
  return out.getvalue()


def test_tar(tmp_path):
  floats = np.random.default_rng(0).standard_normal(20).astype(np.float32)
  parameter = b"ctorch.nn.parameter\nParameter\n"
  hooks = b"ccollections\nOrderedDict\n)R"
  pickled = b"\x80\x02ccollections\nOrderedDict\n](](U\1aU\0017Qe](U\1bU\0018Qe](U\1cU\0019Qe](U\1dK\3ee\x85R."
  (path := tmp_path / "old.pth").write_bytes(tar_file(pickled, floats, [(7, 2, (2, 3), (1, 2)), (8, 10, (4,), (1,)), (9, 19, (), ())]))
  ours, theirs = torch_file.load(path), torch.load(path, weights_only=False)
  assert list(ours) == ["a", "b", "c", "d"] and same(ours, theirs) and ours["a"].shape == (2, 3)
  # a Parameter as torch 0.1.6 pickled it, and as 0.1.12 did
  for opcodes in (b")\x81(U\0017QN" + hooks + b"\x88\x89tb", b"(U\0017QtR(\x88\x89" + hooks + b"tb"):
    path.write_bytes(tar_file(b"\x80\x02" + parameter + opcodes + b".", floats, [(7, 2, (2, 3), (1, 2))]))
    assert same(torch_file.load(path), torch.load(path, weights_only=False).data)


# ---- what we write
def test_torch_reads_ours(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {"weight": rng.standard_normal((4, 3, 2)).astype(np.float32), "bn.num_batches_tracked": np.array(7), "double": rng.standard_normal(3),
             "half": rng.standard_normal(5).astype(np.float16), "int": np.array([-1, 1 << 30], np.int32), "short": np.array([-3], np.int16),
             "signed": np.array([-1], np.int8), "bytes": np.arange(5, dtype=np.uint8), "mask": np.array([True, False]), "é": np.zeros(1, np.float32),
             "empty": np.zeros((0, 4), np.float32), "turned": rng.standard_normal((4, 3)).astype(np.float32).T,
             "big-endian": np.arange(3, dtype=">f4"), "complex": np.array([1 + 2j], np.complex64)}
  torch_file.save(path := tmp_path / "x.pth", tensors)
  for mmap in (False, True):
    theirs = torch.load(path, weights_only=True, mmap=mmap)
    ours = {k: v.astype(v.dtype.newbyteorder("="), order="C") for k, v in tensors.items()}
    assert isinstance(theirs, dict) and same(ours, theirs)
    assert all(t.device.type == "cpu" and t.is_contiguous() and not t.requires_grad for t in theirs.values())
    assert theirs["bn.num_batches_tracked"].dtype == torch.int64
  torch_file.save(path, {})
  assert torch.load(path, weights_only=True) == {}


def test_torch_reads_our_weights_into_a_network(tmp_path):
  one, two = network(), network()
  torch_file.save(tmp_path / "x.pth", {k: v.numpy() for k, v in one.state_dict().items()})
  assert two.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))
  assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
