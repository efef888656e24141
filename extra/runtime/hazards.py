"""A quick answer to what tinygrad asks of every store of a graph: whether what is stored reads where it is stored.

It walks all of the graph for each, a tenth of the time that a training step takes to be scheduled, a fifth of a large forward pass's. Here each node
remembers which buffers it comes from, as bits of their addresses, and the graph is only walked where the bits agree."""
from typing import Any
from tinydet.parts import take

BITS, NAME = 4096, "_tinydet_sources"


def use() -> None:
  """Let tinygrad's scheduler, imported by now, ask here first."""
  parts = take("tinygrad.schedule.rangeify", "tinygrad.schedule.indexing", "tinygrad.schedule.rangeify:earliest_rewrites",
               "tinygrad.schedule.rangeify:fix_store_hazard", "tinygrad.schedule.indexing:pm_generate_realize_map",
               "tinygrad.schedule.indexing:realize_store_after_src",
               *(f"tinygrad.uop.ops:Ops.{op}" for op in ("BUFFER", "PARAM", "CALL", "FUNCTION")), instead="large graphs take longer to be scheduled")
  if not parts: return
  global fix, realize, leaves, calls   # what a pattern calls may not have a closure
  rangeify, indexing, rewrites, fix, realize_map, realize, *kinds = parts
  leaves, calls = tuple(kinds[:2]), tuple(kinds[2:])
  rangeify.earliest_rewrites = _replaced(rewrites, fix, fix_store_hazard)
  indexing.pm_generate_realize_map = _replaced(realize_map, realize, realize_store_after_src)


def _replaced(matcher: Any, old: Any, new: Any) -> Any:
  return type(matcher)([(pattern, new if rule is old else rule) for pattern, rule in matcher.patterns])


def fix_store_hazard(target: Any, src: Any) -> Any: return fix(target, src) if may_read(src, target.base) else None


def realize_store_after_src(ctx: Any, dest: Any, src: Any) -> None:
  if may_read(src, dest.base): realize(ctx, dest, src)


def may_read(value: Any, buffer: Any) -> bool:
  """Whether the node `value` may come from `buffer`; False is sure."""
  return buffer.op not in leaves or bool(sources(value) & _bit(buffer))


def sources(value: Any) -> int:
  """The bits of all buffers that the node `value` comes from; bodies of calls have names of their own. Each node keeps its bits: what it comes from
  lives as long as it does, so addresses stay true."""
  stack = [value]
  while stack:
    node = stack[-1]
    if NAME in vars(node):
      stack.pop()
      continue
    taken = node.src[1:] if node.op in calls else node.src
    if waiting := [source for source in taken if NAME not in vars(source)]: stack.extend(waiting)
    else:
      bits = _bit(node) if node.op in leaves else 0
      for source in taken: bits |= vars(source)[NAME]
      vars(stack.pop())[NAME] = bits
  return vars(value)[NAME]


def _bit(buffer: Any) -> int: return 1 << (id(buffer) >> 4) % BITS
