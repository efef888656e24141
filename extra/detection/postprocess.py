"""From raw head outputs to detections: score threshold, top-k a level, decode, clip, class-wise NMS (torchvision `RetinaNet.postprocess_detections`).

Two forms give the same detections. The device form is tinygrad only, in fixed shapes, so that logits never leave the GPU. The host form is numpy,
several times faster than the device form where the device is the CPU anyway.

Candidates rank by their float32 logit, the higher first, and equal logits by position (level, then anchor, then class; the lower first). The sigmoid
never falls, so this ranks scores too, and a device's own rounding of `exp` cannot reorder them. -0.0 equals 0.0.
"""
import functools, itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
import numpy as np
from tinygrad import Tensor, TinyJit, dtypes
from tinydet.detection import boxes as box_ops

CHUNK = 128              # keys counted together when compacting: longer chunks cost work in each, shorter ones cost work across them
DIGIT_BITS = 4           # bits of the k-th key found by one pass over all keys
CROWDED = 5              # classes of an anchor above the threshold, on average, from where the host looks for a level's best anchors first
SUPPRESS_STEPS = 8       # NMS iterations between two looks at convergence from the host
MOST_ON_DEVICE = 5000    # candidates of a picture there: each is compared with each


@dataclass
class Detections:
  """Detections of a batch, best first, padded to the D of `max_detections`; numpy arrays."""
  boxes: np.ndarray   # f32 [B,D,4] xyxy in pixels of the network input; 0 where padded
  scores: np.ndarray  # f32 [B,D]; 0 where padded
  labels: np.ndarray  # i32 [B,D] in 0..K-1; -1 where padded
  counts: np.ndarray  # i32 [B] detections of each image
  anchors: np.ndarray | None = None  # i32 [B,D], the row of the head outputs that each came from; -1 where padded


def select(logits: Tensor, boxes: Tensor, anchors: Tensor | None, level_sizes: Sequence[int], sizes: np.ndarray, *, origins: np.ndarray | None = None,
           score_threshold: float = 0.05, topk: int = 1000, nms_threshold: float = 0.5, max_detections: int = 300, agnostic: bool = False,
           sigmoid: bool = True, clip: bool = True, on_host: bool | None = None) -> Detections:
  """Detections of a batch from the outputs of a head (torchvision `RetinaNet.postprocess_detections`).

  An image's candidates are, of each pyramid level, the best `topk` (anchor, class) pairs whose float32 score exceeds `score_threshold`. Their boxes
  are decoded and clipped to the picture; a box that overlaps a better one of its class with an IoU above `nms_threshold` goes; the best
  `max_detections` stay. Boxes that clipping left without area overlap nothing.

  Args:
    logits: float [B,A,K], class scores before the sigmoid, or without `sigmoid` the scores themselves; on any device, or sharded on axis 0.
    boxes: float [B,A,4], xyxy in pixels of the network input, or deltas of `anchors`; placed as `logits`.
    anchors: f32 [A,4] xyxy in pixels of the network input, levels one after the other; None where `boxes` need no decoding.
    level_sizes: anchors of each level; they sum to A.
    sizes: int [B,2], height and width of the picture inside the padded canvas.
    origins: int [B,2], row and column of its top left corner there; by default the canvas's.
    nms_threshold: 1 or more keeps all.
    agnostic: a box suppresses those of other classes too.
    clip: cut boxes to the picture before they are compared.
    topk: on a device at most MOST_ON_DEVICE of all levels together.
    on_host: True for the numpy form, False for the device form; by default numpy where the device is the CPU.
  """
  assert sum(level_sizes) == logits.shape[1], f"{level_sizes=} do not sum to the {logits.shape[1]} anchors"
  device = logits.device
  if on_host is None: on_host = (device if isinstance(device, str) else device[0]).startswith("CPU")
  rejected = highest_rejected_logit(score_threshold) if sigmoid else float(np.float32(score_threshold))
  corners = np.zeros_like(sizes) if origins is None else np.asarray(origins)
  windows = np.concatenate([corners, corners + sizes], 1).astype(np.float32)   # top, left, bottom, right
  if not clip: windows[:] = np.float32([-np.inf, -np.inf, np.inf, np.inf])
  if on_host:
    values, raw = (_values(t.float().contiguous().realize()) for t in (logits, boxes))
    places = None if anchors is None else anchors.numpy()
    found = [_detect_on_host(v, r, places, level_sizes, w, rejected, topk, nms_threshold, max_detections, agnostic)
             for v, r, w in zip(values, raw, windows)]
    return _pad(*zip(*found), max_detections, sigmoid)
  topk = min(topk, MOST_ON_DEVICE // len(level_sizes))
  candidates, suppress = _graphs(tuple(level_sizes), logits.shape, logits.dtype, boxes.dtype, device, anchors is None, rejected, topk, nms_threshold,
                                 max_detections, agnostic)
  pictures = Tensor(windows).shard_like(logits)
  placed = [] if anchors is None else [anchors.to(device).contiguous()]
  *state, keep = candidates(logits.contiguous(), boxes.contiguous(), pictures, *placed)
  while True:
    keep, converged, *result = suppress(*state, keep)
    if converged.numpy().all(): break
  *parts, counts = (t.numpy() for t in result)
  return _pad(*([x[:n] for x, n in zip(part, counts)] for part in parts), max_detections, sigmoid)


def to_original(detections: Detections, sizes: np.ndarray, original_sizes: np.ndarray, origins: np.ndarray | None = None) -> Detections:
  """`detections` with boxes in pixels of the original pictures, and inside them.

  `sizes` int [B,2] are the heights and widths of the pictures inside the network input, `origins` int [B,2] the rows and columns of their top left
  corners there (by default 0), `original_sizes` int [B,2] the heights and widths of their files."""
  ratio = np.asarray(original_sizes, np.float32) / np.asarray(sizes, np.float32)
  boxes = detections.boxes
  if origins is not None and np.any(origins):
    there = detections.labels >= 0   # padding stays 0
    boxes = np.where(there[..., None], boxes - np.asarray(origins, np.float32)[:, None, [1, 0, 1, 0]], 0)
  limits = np.asarray(original_sizes, np.float32)[:, None, [1, 0, 1, 0]]
  return replace(detections, boxes=np.clip(boxes * ratio[:, None, [1, 0, 1, 0]], 0, limits))


@functools.cache
def highest_rejected_logit(score_threshold: float) -> float:
  """The float32 logit that a logit must exceed for its float32 score to exceed float32(`score_threshold`); at least -inf, at most inf."""
  low, high = _keys(np.float32([-np.inf, np.inf])).tolist()
  while low < high:
    middle = (low + high + 1) // 2
    if _scores(_from_key(middle)) > np.float32(score_threshold): high = middle - 1
    else: low = middle
  return float(_from_key(low))


def _keys(x: np.ndarray) -> np.ndarray:
  """Integers, int64, in the order of the float32 `x`, one step for each representable number."""
  bits = x.view(np.int32).astype(np.int64)
  return np.where(bits < 0, -(bits & 0x7fffffff), bits)


def _from_key(key: int) -> np.float32:
  return np.copysign(np.int32(abs(key)).view(np.float32), np.float32(key))


def _scores(logits: np.ndarray) -> np.ndarray:
  """Correctly rounded sigmoid of float32 `logits`, so that every device reports the same scores."""
  with np.errstate(over="ignore"): return (1 / (1 + np.exp(-np.float64(logits)))).astype(np.float32)


def _pad(boxes: list[np.ndarray], logits: list[np.ndarray], labels: list[np.ndarray], anchors: list[np.ndarray], max_detections: int,
         sigmoid: bool) -> Detections:
  counts = np.array([len(x) for x in logits], np.int32)
  padded = Detections(np.zeros((len(counts), max_detections, 4), np.float32), np.zeros((len(counts), max_detections), np.float32),
                      np.full((len(counts), max_detections), -1, np.int32), counts, np.full((len(counts), max_detections), -1, np.int32))
  for i, n in enumerate(counts):
    padded.boxes[i, :n], padded.labels[i, :n], padded.anchors[i, :n] = boxes[i], labels[i], anchors[i]
    padded.scores[i, :n] = _scores(logits[i]) if sigmoid else logits[i]
  return padded


# ---- host form

def _values(tensor: Tensor) -> np.ndarray:
  """The values of a realised f32 tensor on the CPU. They are the tensor's own memory, not to be used after it, unless it is sharded."""
  if isinstance(tensor.device, tuple): return tensor.numpy()
  return np.frombuffer(tensor.uop.buffer.as_memoryview(allow_zero_copy=True), np.float32).reshape(tensor.shape)


def _detect_on_host(logits: np.ndarray, raw: np.ndarray, anchors: np.ndarray | None, level_sizes: Sequence[int], window: np.ndarray, rejected: float,
                    topk: int, nms_threshold: float, max_detections: int, agnostic: bool) -> tuple[np.ndarray, ...]:
  """One image: boxes [n,4], logits [n], labels [n] and anchors [n] of its detections. `logits` [A,K], `raw` [A,4], `window` (top, left, bottom,
  right)."""
  num_classes, start, found = logits.shape[1], 0, []
  for n in level_sizes:
    level = logits[start:start + n].reshape(-1)
    candidates = np.flatnonzero(level > rejected)
    if len(candidates) > CROWDED * n:   # the best k entries lie in the k rows with the best maxima, which are sooner found than ranked
      maxima = level.reshape(n, -1).max(1)
      rows = _largest(maxima, np.flatnonzero(maxima > rejected), topk)
      candidates = (rows[:, None] * num_classes + np.arange(num_classes)).reshape(-1)
      candidates = candidates[level[candidates] > rejected]
    found.append(start * num_classes + _largest(level, candidates, topk))
    start += n
  index = np.concatenate(found)
  index = index[np.argsort(-logits.reshape(-1)[index], kind="stable")]
  anchor, labels = index // num_classes, index % num_classes
  boxes = _decode_and_clip(raw[anchor], None if anchors is None else anchors[anchor], window)
  keep = _nms(boxes, labels * (not agnostic), nms_threshold, max_detections)
  return boxes[keep], logits.reshape(-1)[index[keep]], labels[keep], anchor[keep]


def _largest(x: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
  """Of `candidates`, ascending positions in `x` [n], the `k` with the largest x, the earlier among equals; ascending."""
  if len(candidates) <= k: return candidates
  values = x[candidates]
  kth = np.partition(values, -k)[-k]
  better, equal = np.flatnonzero(values > kth), np.flatnonzero(values == kth)
  return candidates[np.sort(np.concatenate([better, equal[:k - len(better)]]))]


def _decode_and_clip(raw: np.ndarray, anchors: np.ndarray | None, window: np.ndarray) -> np.ndarray:
  """numpy twin of `boxes.decode` and `boxes.clip`; `window` f32 (top, left, bottom, right)."""
  if anchors is not None:
    anchor_size = anchors[:, 2:] - anchors[:, :2]
    center = raw[:, :2] * anchor_size + (anchors[:, :2] + np.float32(0.5) * anchor_size)
    half = np.exp(np.minimum(raw[:, 2:], np.float32(box_ops.MAX_LOG_SCALE))) * anchor_size * np.float32(0.5)
    raw = np.concatenate([center - half, center + half], 1)
  return np.minimum(np.maximum(raw, window[[1, 0, 1, 0]]), window[[3, 2, 3, 2]])


def _nms(boxes: np.ndarray, labels: np.ndarray, threshold: float, limit: int) -> np.ndarray:
  """Positions of the first `limit` of `boxes` [n,4], best first, that overlap no earlier kept one of their label with an IoU above `threshold`."""
  by_label = np.argsort(labels, kind="stable")  # each label's boxes side by side, best first
  place = np.argsort(by_label)                  # inverse: where a box went
  ends = np.searchsorted(labels[by_label], labels, side="right")
  x1, y1, x2, y2 = boxes[by_label].T.copy()
  area, alive, keep = (x2 - x1) * (y2 - y1), np.ones(len(boxes), bool), []
  for i in range(len(boxes)):
    p = place[i]
    if not alive[p]: continue
    keep.append(i)
    if len(keep) == limit: break
    rest = slice(p + 1, ends[i])
    intersection = np.maximum(np.minimum(x2[p], x2[rest]) - np.maximum(x1[p], x1[rest]), 0) * \
                   np.maximum(np.minimum(y2[p], y2[rest]) - np.maximum(y1[p], y1[rest]), 0)
    with np.errstate(invalid="ignore"): alive[rest] &= ~(intersection / (area[p] + area[rest] - intersection) > threshold)  # 0/0 exceeds nothing
  return np.array(keep, np.int64)


# ---- device form

@functools.lru_cache(maxsize=32)
def _graphs(level_sizes: tuple[int, ...], shape: tuple[int, int, int], logits_dtype: object, boxes_dtype: object, device: str | tuple[str, ...],
            decoded: bool, rejected: float, topk: int, nms_threshold: float, max_detections: int, agnostic: bool) -> tuple[TinyJit, TinyJit]:
  """Captured graphs of `_candidates` and `_suppress`; the arguments are all that shapes them."""
  candidates = TinyJit(functools.partial(_candidates, level_sizes=level_sizes, rejected=rejected, topk=topk, nms_threshold=nms_threshold,
                                         agnostic=agnostic))
  suppress = TinyJit(functools.partial(_suppress, max_detections=max_detections))
  candidates.cnt = suppress.cnt = 1  # capture on the first call: every input is realized, so there is nothing to warm up
  return candidates, suppress


def _candidates(cls_logits: Tensor, raw: Tensor, windows: Tensor, anchors: Tensor | None = None, *, level_sizes: tuple[int, ...], rejected: float,
                topk: int, nms_threshold: float, agnostic: bool) -> tuple[Tensor, ...]:
  """All images' candidates, best first, N = levels * topk rounded up to whole words of 32. `windows` f32 [B,4] are top, left, bottom, right.

  Returns boxes f32 [B,N,4], logits f32 [B,N], labels i32 [B,N] (-1: no candidate), anchors i32 [B,N], suppressors u32 [B,N,N/32] (bit j of row i: j
  suppresses i if j is kept) and keep bool [B,N], where NMS starts: all of them."""
  B, A, K = cls_logits.shape
  L, logits = len(level_sizes), cls_logits.float()
  # a level's best k entries lie in the k rows with the best maxima (equal maxima: the earlier row), so only those rows are ever ranked
  row_keys = _ordered_keys(logits.max(-1), rejected).contiguous()
  longest = max(*level_sizes, topk)
  rows = Tensor.stack(*[x.pad((None, (0, longest - x.shape[1]))) for x in row_keys.split(list(level_sizes), dim=1)], dim=1)
  row = _largest_keys(rows, topk)    # [B,L,k] within its level; a short level is padded with rows that are none
  in_level = Tensor.stack(*[row[:, l] < n for l, n in enumerate(level_sizes)], dim=1)
  starts = (0, *itertools.accumulate(level_sizes[:-1]))
  anchor = Tensor.stack(*[(row[:, l] + start).minimum(A - 1) for l, start in enumerate(starts)], dim=1).contiguous()
  row_logits = logits.gather(1, anchor.reshape(B, L * topk, 1).expand(B, L * topk, K)).reshape(B, L, topk, K)
  keys = in_level.unsqueeze(-1).where(_ordered_keys(row_logits, rejected), 0).reshape(B, L, topk * K).contiguous()
  entry = _largest_keys(keys, topk)  # [B,L,k] in topk * K
  N = (L * topk + 31) // 32 * 32
  flat = lambda x: x.reshape(B, L * topk).pad((None, (0, N - L * topk))).contiguous()
  key, anchor, label = flat(keys.gather(2, entry)), flat(anchor.gather(2, entry // K)), flat(entry % K)

  position = Tensor.arange(N)
  later, earlier = key.unsqueeze(2), key.unsqueeze(1)
  rank = ((earlier > later) | ((earlier == later) & (position.reshape(1, 1, N) < position.reshape(1, N, 1)))).sum(-1, dtype=dtypes.int32).contiguous()
  order = (rank.unsqueeze(1) == position.reshape(1, N, 1)).where(position.reshape(1, 1, N), 0).sum(-1, dtype=dtypes.int32).contiguous()
  key, anchor, label = (x.gather(1, order).contiguous() for x in (key, anchor, label))
  valid = (key > 0).contiguous()

  index = anchor.unsqueeze(-1).expand(B, N, 4)
  boxes = raw.float().gather(1, index)
  if anchors is not None: boxes = box_ops.decode(boxes, anchors.float().unsqueeze(0).expand(B, A, 4).gather(1, index))
  boxes = box_ops.clip(boxes, *(windows[:, side:side + 1] for side in (2, 3, 0, 1))).contiguous()
  suppresses = (box_ops.iou(boxes, boxes) > nms_threshold) & (position.reshape(1, 1, N) < position.reshape(1, N, 1))
  if not agnostic: suppresses = suppresses & (label.unsqueeze(2) == label.unsqueeze(1))
  magnitude = key.bitwise_xor(1 << 31).bitcast(dtypes.int32)
  score_logits = (magnitude < 0).where(-(-magnitude).bitcast(dtypes.float32), magnitude.bitcast(dtypes.float32))
  return boxes, score_logits.contiguous(), valid.where(label, -1).contiguous(), anchor, _pack(suppresses).contiguous(), valid


def _suppress(boxes: Tensor, logits: Tensor, labels: Tensor, anchors: Tensor, suppressors: Tensor, keep: Tensor, *,
              max_detections: int) -> tuple[Tensor, ...]:
  """A few steps of keep_i = no kept j suppresses i, from the state `_candidates` made.

  Suppression only points from better to worse, so the step has one fixed point, greedy NMS, and each step settles at least one more candidate.
  Returns keep [B,N], converged bool [B], and of the kept best boxes [B,D,4], logits, labels and anchors [B,D], counts i32 [B]."""
  for _ in range(SUPPRESS_STEPS):
    before, keep = keep, ((labels >= 0) & ((suppressors & _pack(keep).contiguous().unsqueeze(1)) != 0).any(-1).logical_not()).contiguous()
  B, N = keep.shape
  kept_so_far = keep.cumsum(1).contiguous()
  slot = Tensor.arange(max_detections).reshape(1, max_detections, 1)
  index = (kept_so_far.unsqueeze(1) <= slot).sum(-1, dtype=dtypes.int32).minimum(N - 1).contiguous()
  return (keep, (keep == before).all(-1), boxes.gather(1, index.unsqueeze(-1).expand(B, max_detections, 4)), logits.gather(1, index),
          labels.gather(1, index), anchors.gather(1, index), kept_so_far[:, -1].minimum(max_detections).cast(dtypes.int32))


def _ordered_keys(x: Tensor, rejected: float) -> Tensor:
  """uint32 keys in the order of the float32 `x`; 0, which no number has, where `x` is not above `rejected`."""
  bits = x.bitcast(dtypes.int32)
  signed = (bits < 0).where(-(bits & 0x7fffffff), bits)
  return (x > rejected).where(signed.bitcast(dtypes.uint32).bitwise_xor(1 << 31), 0)


def _largest_keys(keys: Tensor, k: int) -> Tensor:
  """Ascending positions i32 [B,L,k] of the `k` largest of `keys` u32 [B,L,n], the earlier among equals; n >= k."""
  B, L, n = keys.shape
  chunks = (n + CHUNK - 1) // CHUNK
  keys = keys.pad((None, None, (0, chunks * CHUNK - n))).contiguous()
  # the k-th largest key, digit by digit from the top: the largest number that at least k keys reach
  kth = Tensor.zeros(B, L, dtype=dtypes.uint32, device=keys.device)
  for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
    trial = (kth.unsqueeze(-1) + Tensor.arange(1, 1 << DIGIT_BITS).cast(dtypes.uint32) * (1 << shift)).contiguous()
    reached = (keys.unsqueeze(2) >= trial.unsqueeze(-1)).sum(-1, dtype=dtypes.int32) >= k
    kth = (kth + reached.sum(-1, dtype=dtypes.uint32) * (1 << shift)).contiguous()
  # running counts of the keys above and equal to it, inside each chunk and over the chunks before it
  keys, kth = keys.reshape(B, L, chunks, CHUNK), kth.reshape(B, L, 1, 1)
  above, equal = (keys > kth).cast(dtypes.int32), (keys == kth).cast(dtypes.int32)
  inside = (above + equal * (CHUNK * 2)).cumsum(-1).contiguous()  # both counts in one integer
  above_inside, equal_inside = inside % (CHUNK * 2), inside // (CHUNK * 2)
  above_through, equal_through = above_inside[..., -1].cumsum(-1).contiguous(), equal_inside[..., -1].cumsum(-1).contiguous()
  ties = (k - above_through[..., -1:]).contiguous()
  chosen_through = (above_through + equal_through.minimum(ties)).contiguous()  # [B,L,chunks]
  # slot s takes the first key by which s + 1 are chosen: first its chunk, then its place in the chunk
  slot = Tensor.arange(k).reshape(1, 1, k, 1)
  chunk = (chosen_through.unsqueeze(2) <= slot).sum(-1, dtype=dtypes.int32).contiguous()  # [B,L,k]
  before = lambda through: (chunk > 0).where(through.gather(2, (chunk - 1).maximum(0)), 0).unsqueeze(-1)
  counts = inside.gather(2, chunk.unsqueeze(-1).expand(B, L, k, CHUNK))
  chosen = before(above_through) + counts % (CHUNK * 2) + (before(equal_through) + counts // (CHUNK * 2)).minimum(ties.unsqueeze(-1))
  return (chunk * CHUNK + (chosen <= slot).sum(-1, dtype=dtypes.int32)).contiguous()


def _pack(bits: Tensor) -> Tensor:
  """bool [...,n] -> u32 [...,n/32]."""
  return (bits.reshape(*bits.shape[:-1], -1, 32).cast(dtypes.uint32) << Tensor.arange(32).cast(dtypes.uint32)).sum(-1, dtype=dtypes.uint32)
