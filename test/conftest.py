"""What holds for all tests."""
import gc, os
import pytest

# Compiling is most of a test's time. tinygrad's kernels are ready in half of it as plain loops; `NOOPT=0 python -m pytest` tests them as users have
# them, as CI does with those against torch.
os.environ.setdefault("NOOPT", "1")

# Files of a minute or more. They go first: with one of them at the end, one of two processes has nothing to do.
LONG = [f"test_{name}.py" for name in (
  "train_yolo resume wiring faults export weights yolo_networks yolo_facts yolo_losses train_resnet mpi parts train assigners loop").split()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


if os.environ.get("DEV") == "CL":   # pocl is one device; as CL:1, CL:2 and CL:3 it has contexts of its own, whose memory is not shared
  from tinygrad import Device
  from tinygrad.runtime.ops_cl import CLDevice, cl
  Device["CL"]   # finds the devices there are
  if len(CLDevice.device_ids) == 1: CLDevice.device_ids = (cl.cl_device_id * 4)(*[CLDevice.device_ids[0]] * 4)


@pytest.fixture(scope="module", autouse=True)
def nothing_stays():
  """What a file of tests leaves behind is freed: tinygrad looks through all tensors there are whenever it computes something."""
  yield
  gc.collect()
