"""Each part of tinygrad that no document promises is taken away in turn: the plain way then gives the same numbers, and one line says so."""
import json, os, subprocess, sys
import numpy as np
import pytest
from by_hand import by_hand

MAIN = """
import importlib, json, sys, types
place = sys.argv[1]
if place != "-":
  module_name, _, name = place.partition(":")
  module = importlib.import_module(module_name)
  class Without(types.ModuleType):   # for ours; not for tinygrad itself, nor for pickle, which calls from the files named below
    def __getattribute__(self, attribute):
      asking = sys._getframe(1).f_globals.get("__name__", "")
      if attribute == name.split('.')[0] and asking.startswith("tinydet") and not asking.endswith(("workers", "graph_file")):
        raise AttributeError(f"no {attribute}")
      return getattr(module, attribute)
    def __setattr__(self, attribute, value): setattr(module, attribute, value)
  sys.modules[module_name] = Without(module_name)
  if "." in module_name: setattr(sys.modules[module_name.rpartition(".")[0]], module_name.rpartition(".")[2], sys.modules[module_name])
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.nn import init
from tinydet.nn.layers import Conv2d, Linear
from tinydet.runtime.device import require_device
from tinydet.runtime import mpi, random
from tinydet.training.loop import make_step
from tinydet.training.optim import Optimizer, schedule
require_device()
class Net:
  def __init__(self): self.conv, self.fc = Conv2d(3, 8, 3, 2, 1, bias=False), Linear(8, 4)
  def __call__(self, x): return self.fc(self.conv(x).relu().dropout(0.0).contiguous().mean((2, 3)))
net = Net()
init.initialize(net, lambda key, shape: init.normal(0.3))
params = get_state_dict(net)
random.seed(1)
step = make_step(lambda x, y: {"loss": (net(x) - y).square().mean()}, Optimizer(params, "adamw", schedule("constant", 0.01, 10)), [])
rng, losses = np.random.default_rng(0), []
for _ in range(3):
  x, y = rng.standard_normal((2, 3, 16, 16)).astype(np.float32), rng.standard_normal((2, 4)).astype(np.float32)
  losses.append(step(Tensor(x).realize(), Tensor(y).realize())()["loss"])
class Doubling(mpi.Ranks):
  size = 2
  def __init__(self): pass
  def add(self, array): array *= 2
from tinygrad import dtypes
exchange = mpi.Exchange([((3,), dtypes.half), ((2, 2), dtypes.float32)], ("CPU",), Doubling())
for t in exchange.tensors: t.assign(t.full_like(1.5)).realize()
exchange.add()
print(json.dumps(losses + [t.numpy().sum().item() for t in exchange.tensors] + [t.numpy().sum().item() for t in params.values()]))
"""
HELPERS = "diskcache_put DEBUG NUM_CPU_THREADS PARALLEL BEAM JIT CACHELEVEL CACHEDB db_connection PCONTIG TC_OPT ContextVar DEV".split()
REALIZE = "capturing to_program_cache to_program_key _get_call_to_compile _compile_kernel time_call compile_linear".split()
PLACES = [*(f"tinygrad.helpers:{name}" for name in HELPERS), *(f"tinygrad.engine.realize:{name}" for name in REALIZE),
          *(f"tinygrad.engine.jit:{name}" for name in ("jit_lower", "graph_split_rewrite", "GraphRunner")), "tinygrad.engine.worker:get_worker_pool",
          "tinygrad.tensor:create_linear_with_vars", "tinygrad.tensor:all_tensors",
          "tinygrad.schedule.rangeify:fix_store_hazard", "tinygrad.schedule.indexing:pm_generate_realize_map",
          "tinygrad.schedule.memory:UOp", *(f"tinygrad.uop.ops:{name}" for name in ("Ops", "CallInfo", "KernelInfo", "ProgramInfo")),
          "tinygrad.dtype:_to_np_dtype", "tinygrad.dtype:AddrSpace", "tinygrad.renderer:Estimates", "tinygrad.renderer.cstyle:ClangRenderer",
          "tinygrad.runtime.ops_cpu:CPUProgram", "tinygrad.device:MultiBuffer", "tinygrad.codegen.opt:Opt",
          "tinygrad.codegen.opt.postrange:Scheduler"]
SILENT = {"tinygrad.engine.worker:get_worker_pool"}   # what stands in for it is not asked for then


def run(place: str, cache: str) -> tuple[list[float], str]:
  environ = os.environ | {"DEV": "CPU", "XDG_CACHE_HOME": cache}
  if place.startswith("tinygrad.codegen"): environ |= {"NOOPT": "0", "PARALLEL": "0"}   # the processes that compile have all parts
  done = subprocess.run([sys.executable, "-c", MAIN, place], env=environ, capture_output=True, text=True, check=False, timeout=120)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[float], str]:
  cache = str(tmp_path_factory.mktemp("cache"))
  numbers, notes = run("-", cache)
  assert not notes
  return numbers, cache


# of those that the same code asks for together one is left to CI
TOGETHER = ("NUM_CPU_THREADS PARALLEL JIT db_connection PCONTIG to_program_key _get_call_to_compile _compile_kernel compile_linear jit_lower "
           "graph_split_rewrite create_linear_with_vars pm_generate_realize_map KernelInfo ProgramInfo Estimates").split()


@pytest.mark.parametrize("place", by_hand(PLACES, *(place for place in PLACES if place.partition(":")[2] in TOGETHER)))
def test_without_it_a_network_learns_the_same(whole, place):
  numbers, notes = run(place, whole[1])
  np.testing.assert_allclose(numbers, whole[0], rtol=2e-4, atol=1e-5)
  assert notes.count("\n") == (place not in SILENT), notes
  if place not in SILENT: assert notes.startswith(f"note: this tinygrad has no {place.replace(':', '.')}"), notes
