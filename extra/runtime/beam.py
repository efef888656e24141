"""BEAM, tinygrad's search for faster kernels, where it pays: those that hold most of a captured graph's time, with a word on how long it will take.

tinygrad searches every kernel of a graph, without a word and for minutes, most of them for kernels that take no time. What it finds of a kernel it
keeps in its cache (CACHEDB), also when the search is broken off, and the graph that comes of it is kept as any (see `graphs`)."""
import sys, time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from tinygrad import UOp
from tinydet.parts import take

_parts = take("tinygrad.engine.realize:time_call", "tinygrad.engine.realize:compile_linear", "tinygrad.uop.ops:Ops",
              "tinygrad.uop.ops:UOp.new_buffer", "tinygrad.uop.ops:UOp.is_bound_var", "tinygrad.engine.jit:compile_linear",
              instead="BEAM searches every kernel, and does not say for how long")
if _parts: _time_call, _compile_linear, Ops, *_ = _parts
WORKS = bool(_parts)

MOST = 0.9   # of the time of a graph's kernels
TURNS = 3    # a kernel is timed: the least counts


def compile_linear(linear: UOp, beam: int | None = None, **options: Any) -> UOp:
  """tinygrad's function of that name, for a captured graph's kernels. With `beam` those are searched that hold `MOST` of the time and are tinygrad's
  to spell; a kernel that is no faster afterwards stays as it was."""
  if not beam: return _compile_linear(linear, beam=beam, **options)
  plain = _compile_linear(linear, beam=0, **options)
  first = {kernel: i for i, call in reversed(list(enumerate(linear.src))) if (kernel := call.src[0]).op in (Ops.SINK, Ops.PROGRAM)}
  counts = Counter(call.src[0] for call in linear.src)
  seconds = {kernel: _seconds(plain.src[i]) for kernel, i in first.items()}
  chosen = [kernel for kernel in _longest({kernel: seconds[kernel] * counts[kernel] for kernel in seconds}) if kernel.op is Ops.SINK]
  total = sum(seconds[kernel] * counts[kernel] for kernel in seconds)
  held = sum(seconds[kernel] * counts[kernel] for kernel in chosen)
  kept = "; what is found is kept, also after Ctrl-C" if chosen else ""
  print(f"BEAM={beam}: {len(chosen)} of {len(first)} different kernels are searched, with {held * 1e3:.3g} of {total * 1e3:.3g} ms{kept}",
        file=sys.stderr, flush=True)
  faster, saved = {}, 0.0
  for kernel in _with_time_left(chosen):
    call = linear.src[first[kernel]]
    call = call.replace(src=(kernel.replace(arg=replace(kernel.arg, beam=beam)), *call.src[1:]))
    found = _compile_linear(UOp(Ops.LINEAR, src=(call,)), beam=0).src[0]
    if (now := _seconds(found)) < seconds[kernel]:
      faster[kernel] = found.src[0]
      saved += (seconds[kernel] - now) * counts[kernel]
  if chosen: print(f"BEAM={beam}: {len(faster)} of them are faster, by {saved * 1e3:.3g} ms in all", file=sys.stderr, flush=True)
  return plain.replace(src=tuple(call.replace(src=(faster[kernel.src[0]], *call.src[1:])) if kernel.src[0] in faster else call
                                 for kernel, call in zip(linear.src, plain.src, strict=True)))


def _longest(seconds: dict[UOp, float]) -> list[UOp]:
  """The kernels that hold `MOST` of all `seconds`, the longest first."""
  left, chosen = MOST * sum(seconds.values()), []
  for kernel in sorted(seconds, key=lambda kernel: -seconds[kernel]):
    if left <= 0: break
    left -= seconds[kernel]
    chosen.append(kernel)
  return chosen


def _with_time_left(kernels: list[UOp], clock: Callable[[], float] = time.monotonic) -> Iterator[UOp]:
  """`kernels`, with a line every half a minute or so on how many are done, and how long the others may take."""
  begun = said = clock()
  for done, kernel in enumerate(kernels):
    if done and (done == 1 or clock() - said > 30):
      said = clock()
      left = (said - begun) / done * (len(kernels) - done)
      print(f"BEAM: {done} of {len(kernels)} kernels searched, some {left:.0f} s left", file=sys.stderr, flush=True)
    yield kernel


def _seconds(call: UOp) -> float:
  """Of a compiled kernel, run on memory of its own: its arguments are a run's weights, which it may change."""
  own: dict[UOp, UOp] = {}
  for u in call.src[1:]:
    if not u.is_bound_var and u not in own: own[u] = UOp.new_buffer(u.device, u.max_numel(), u.dtype)
  turns = _time_call(call.replace(src=(call.src[0], *(own.get(u, u) for u in call.src[1:]))))
  return min(next(turns) for _ in range(TURNS))
