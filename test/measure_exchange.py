"""What it costs ranks to add up the gradients of a RetinaNet-ResNet50, for docs/scaling.md.

  mpiexec -n 2 python test/measure_exchange.py

Prints bytes and seconds, the least of several tries, of the all-reduce in float32 and in half, and of one that is begun and then left alone while the
process computes: how much of it goes on by itself."""
import time
import numpy as np
from tinygrad import dtypes
from tinygrad.nn.state import get_state_dict
from tinydet.models import retinanet
from tinydet.runtime.mpi import Exchange, join

TRIES = 7


def least(ranks, action) -> float:
  times = []
  for _ in range(TRIES):
    ranks.barrier()
    begun = time.perf_counter()
    action()
    times.append(ranks.largest(int(1e6 * (time.perf_counter() - begun)))[0] / 1e6)
  return min(times)


def main(ranks) -> None:
  model = retinanet.build("retinanet_resnet50_fpn", 91)
  retinanet.freeze(model, 3)
  shapes = [t.shape for t in get_state_dict(model).values() if t.is_param]
  print(f"{ranks.size} ranks, {sum(map(np.prod, shapes)) / 1e6:.1f} M parameters that learn")
  for dtype in (dtypes.float32, dtypes.half):
    exchange = Exchange([(shape, dtype) for shape in shapes], ("CPU",), ranks)
    seconds = least(ranks, exchange.add)
    print(f"{dtype.name}: {exchange.nbytes / 1e6:.0f} MB, {seconds:.3f} s, {exchange.nbytes / seconds / 1e9:.2f} GB/s")
    if dtype == dtypes.float32: whole, array = seconds, exchange.host.view(np.float32)
  print(f"four numbers: {least(ranks, lambda: ranks.largest(0, 0, 0, 0)) * 1e6:.0f} us")

  matrix = np.ones((1500, 1500), np.float32)
  def compute():
    begun = time.perf_counter()
    while time.perf_counter() - begun < whole: matrix @ matrix
  def both():
    request = ranks.comm.Iallreduce(ranks._mpi.IN_PLACE, array)
    compute()
    request.Wait()
  array[:] = 0
  alone, together = least(ranks, compute), least(ranks, both)
  print(f"begun, then {alone:.3f} s of computing: {together:.3f} s in all, {100 * (1 - (together - alone) / whole):.0f} % of the exchange was hidden")


if __name__ == "__main__":
  with join() as ranks: main(ranks)
