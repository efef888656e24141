"""BEAM, tinygrad's search for faster kernels, where it pays: those that hold most of a captured graph's time, with a word on how long it will take.

tinygrad searches every kernel of a graph, without a word and for minutes, most of them for kernels that take no time. What it finds of a kernel it
keeps in its cache (CACHEDB), also when the search is broken off, and the graph that comes of it is kept as any (see `graphs`). Kernels in C are not
tinygrad's to spell: those that can divide their work in several ways (`kernel_cpu.ways`) are measured in each, and the fastest is kept there too."""
import hashlib, statistics, sys, time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
import numpy as np
from tinygrad import UOp
from tinydet.nn.kernel_cpu import ways
from tinydet.parts import take

_parts = take("tinygrad.engine.realize:time_call", "tinygrad.engine.realize:compile_linear", "tinygrad.uop.ops:Ops",
              "tinygrad.uop.ops:UOp.new_buffer", "tinygrad.uop.ops:UOp.is_bound_var", "tinygrad.engine.jit:compile_linear",
              "tinygrad.helpers:diskcache_get", "tinygrad.helpers:diskcache_put",
              instead="BEAM searches every kernel, and does not say for how long")
if _parts: _time_call, _compile_linear, Ops, *_, _get, _put = _parts
WORKS = bool(_parts)

MOST = 0.9     # of the time of a graph's kernels
TURNS = 3      # a kernel is timed: the least counts
ROUNDS = 7     # of the ways of a kernel in C, each from caches that have forgotten it: in a step all of its memory was used since
GAIN = 0.97    # of its time, above which another way is no faster
FORGET = 8 << 20   # numbers that are changed to make a processor's caches forget


def compile_linear(linear: UOp, beam: int | None = None, **options: Any) -> UOp:
  """tinygrad's function of that name, for a captured graph's kernels. With `beam` those are searched that hold `MOST` of the time and are tinygrad's
  to spell; a kernel that is no faster afterwards stays as it was."""
  if not beam: return _compile_linear(linear, beam=beam, **options)
  plain = _compile_linear(linear, beam=0, **options)
  first = {kernel: i for i, call in reversed(list(enumerate(linear.src))) if (kernel := call.src[0]).op in (Ops.SINK, Ops.PROGRAM)}
  counts = Counter(call.src[0] for call in linear.src)
  seconds = {kernel: _seconds(plain.src[i]) for kernel, i in first.items()}
  longest = _longest({kernel: seconds[kernel] * counts[kernel] for kernel in seconds})
  chosen = [kernel for kernel in longest if kernel.op is Ops.SINK or _ways(kernel)]
  total = sum(seconds[kernel] * counts[kernel] for kernel in seconds)
  held = sum(seconds[kernel] * counts[kernel] for kernel in chosen)
  kept = "; what is found is kept, also after Ctrl-C" if chosen else ""
  print(f"BEAM={beam}: {len(chosen)} of {len(first)} different kernels are searched, with {held * 1e3:.3g} of {total * 1e3:.3g} ms{kept}",
        file=sys.stderr, flush=True)
  faster, saved = {}, 0.0
  for kernel in _with_time_left(chosen):
    call = linear.src[first[kernel]]
    if kernel.op is Ops.PROGRAM:
      found, share = _fastest(call)
      if share < 1:
        faster[kernel] = found
        saved += seconds[kernel] * (1 - share) * counts[kernel]
      continue
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


def _ways(kernel: UOp) -> tuple[str, ...]:
  """Sources of kernels that do what this one in C does, in other ways."""
  return ways.get(kernel.src[2].arg, ()) if kernel.op is Ops.PROGRAM and len(kernel.src) > 2 else ()


def _fastest(call: UOp) -> tuple[UOp, float]:
  """The fastest way of the kernel in C that `call` is of, compiled, and the share of the plain one's time that it takes."""
  kernel, sources = call.src[0], (call.src[0].src[2].arg, *_ways(call.src[0]))
  key = hashlib.sha256("\0".join((*sources, str(kernel.arg.target))).encode()).hexdigest()
  if (kept := _get("tinydet_ways", key)) is None:
    found = _compile_linear(UOp(Ops.LINEAR, src=tuple(call.replace(src=(_by(kernel, source), *call.src[1:])) for source in sources)), beam=0).src
    memory = _own_memory(call)
    turns = [_time_call(way.replace(src=(way.src[0], *memory))) for way in found]
    shares = _shares(turns)
    best = min(range(len(shares)), key=shares.__getitem__)
    share = _shares([turns[0], turns[best]])[1] if best else 1.0   # once more: the best of several is partly the luckiest
    kept = _put("tinydet_ways", key, (best, share) if share < GAIN else (0, 1.0))
  best, share = kept
  return _compile_linear(UOp(Ops.LINEAR, src=(call.replace(src=(_by(kernel, sources[best]), *call.src[1:])),)), beam=0).src[0].src[0], share


def _by(kernel: UOp, source: str) -> UOp:
  """The kernel, not compiled, from another source."""
  return kernel.replace(src=(*kernel.src[:2], kernel.src[2].replace(arg=source)))


def _shares(turns: list[Iterator[float]]) -> list[float]:
  """Of the first one's time, each one's: the medians of `ROUNDS` in turns."""
  times = [[_forgotten(turn) for turn in turns] for _ in range(ROUNDS)]
  return [statistics.median(each[i] / each[0] for each in times) for i in range(len(turns))]


def _forgotten(turn: Iterator[float]) -> float:
  """Seconds of a kernel's next run, whose memory has left the caches."""
  np.add(_forget, 1, out=_forget)
  return next(turn)


_forget = np.zeros(FORGET, np.float32)   # takes no memory before it is changed


def _own_memory(call: UOp) -> list[UOp]:
  """Arguments for a kernel to be timed with: its own are a run's weights, which it may change."""
  own: dict[UOp, UOp] = {}
  for u in call.src[1:]:
    if not u.is_bound_var and u not in own: own[u] = UOp.new_buffer(u.device, u.max_numel(), u.dtype)
  return [own.get(u, u) for u in call.src[1:]]


def _seconds(call: UOp) -> float:
  """Of a compiled kernel."""
  turns = _time_call(call.replace(src=(call.src[0], *_own_memory(call))))
  return min(next(turns) for _ in range(TURNS))
