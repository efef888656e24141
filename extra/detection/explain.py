"""What in a picture a detection rests on: class activation maps, and the checks that tell an explanation from a pretty picture.

The score of a detection is the logit of its anchor and class. The network comes as functions, so that a map can be taken wherever it has feature
maps. Gradients and scores are tinygrad's; a map is a few thousand numbers, which numpy makes without a kernel to compile for each level's shape.

Grad-CAM averages the gradient over the picture. That suits a classifier; a detection's gradient is anything but even, and the average lights up other
objects too. HiResCAM, which does not average, is the one of the four that tells detections of one picture apart.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
import numpy as np
from tinygrad import Tensor

STEPS = 16                            # pictures of a deletion or insertion curve
SSIM_C1, SSIM_C2 = 0.01 ** 2, 0.03 ** 2   # of Wang et al. 2004, for values in 0..1


# ---- maps

def gradients(head: Callable[[list[Tensor]], Tensor], activations: list[Tensor], entry: Tensor) -> list[Tensor]:
  """Gradients of one score with respect to `activations`, in their shapes; each is taken as an input of its own.

  Args: `head` makes class logits [1,A,K] of the `activations` [1,C,h,w]; `entry` is i32 [1], anchor * K + label of the score."""
  logits = head(activations).float()
  return (Tensor.arange(logits.numel()) == entry).where(logits.reshape(-1), 0).sum().gradient(*activations)


def grad_cam(activations: np.ndarray, gradient: np.ndarray) -> np.ndarray:
  """Map f32 [h,w] of `activations` and `gradient` [C,h,w]: channels weighted by their mean gradient (Selvaraju et al. 2017, equations 1 and 2)."""
  return np.maximum(np.tensordot(gradient.mean((1, 2)), activations, 1), 0)


def grad_cam_plus_plus(activations: np.ndarray, gradient: np.ndarray) -> np.ndarray:
  """Map f32 [h,w] of `activations` and `gradient` [C,h,w]: channels weighted by their positive gradients, each place by a closed form of higher
  derivatives of exp(score) (Chattopadhay et al. 2018, equations 10 and 19). Places where that form divides by nothing weigh nothing."""
  square = gradient ** 2
  denominator = 2 * square + activations.sum((1, 2), keepdims=True) * square * gradient
  alpha = np.divide(square, denominator, out=np.zeros_like(square), where=denominator > 0)
  return np.maximum(np.tensordot((alpha * np.maximum(gradient, 0)).sum((1, 2)), activations, 1), 0)


def eigen_cam(activations: np.ndarray, gradient: np.ndarray | None = None) -> np.ndarray:
  """Map f32 [h,w] of `activations` [C,h,w]: their projection on their first principal direction (Muhammad & Yeasin 2020, section III). It knows
  nothing of a class or a score: `gradient` is not used. Of the direction's two signs it takes the one in which the larger part is positive."""
  _, scale, directions = np.linalg.svd(activations.reshape(len(activations), -1), full_matrices=False)
  projection = scale[0] * directions[0].reshape(activations.shape[1:])
  return np.maximum(projection if projection.sum() > 0 else -projection, 0)


def hires_cam(activations: np.ndarray, gradient: np.ndarray) -> np.ndarray:
  """Map f32 [h,w] of `activations` and `gradient` [C,h,w]: their product at each place (Draelos & Carin 2020, equation 5; for detections Zhao & Chan
  2023, here without their smoothing)."""
  return np.maximum((activations * gradient).sum(0), 0)


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
  "hirescam": hires_cam, "gradcam": grad_cam, "gradcam++": grad_cam_plus_plus, "eigencam": eigen_cam}


def level_maps(method: str, activations: Sequence[np.ndarray], gradient: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
  """The map f32 [h,w] of each level, and the share of each level in the score, f64 [levels], which sum to 1.

  A level's share is its part of the sum of |gradient * activation|: a level that the score does not depend on has none, whatever its map shows."""
  effects = np.array([np.abs(a * g).sum() for a, g in zip(activations, gradient)], np.float64)
  return [METHODS[method](a, g) for a, g in zip(activations, gradient)], effects / (effects.sum() or 1)


def resample(level_map: np.ndarray, stride: int, content_size: tuple[int, int], size: tuple[int, int],
             origin: tuple[int, int] = (0, 0)) -> np.ndarray:
  """A level's map [h,w] over the picture, [H,W] = `size`, bilinear, the edges held.

  The picture fills `content_size` (height, width) of the network input, from `origin` (row, column). Cell (i, j) belongs to pixel (stride * i,
  stride * j) of that input: with its kernels and paddings that is the middle of what the cell sees, and where its anchors are, not the middle of a
  tile."""
  def weights(cells: int, content: int, pixels: int, start: int) -> np.ndarray:
    position = np.clip(((np.arange(pixels) + 0.5) * content / pixels - 0.5 + start) / stride, 0, cells - 1)
    return np.maximum(1 - np.abs(position[:, None] - np.arange(cells)), 0).astype(np.float32)
  rows, columns = (weights(*sides) for sides in zip(level_map.shape, content_size, size, origin))
  return rows @ level_map.astype(np.float32) @ columns.T


def combine(maps: Sequence[np.ndarray], shares: np.ndarray, strides: Sequence[int], content_size: tuple[int, int],
            size: tuple[int, int], origin: tuple[int, int] = (0, 0)) -> np.ndarray:
  """f32 [levels,H,W], what each level adds to the map over the picture, which is their sum over axis 0 and has a maximum of 1 (or is all 0).

  Each level's map (see `level_maps` and `resample`) sums to its share in the score, be it sharp or blurred."""
  parts = np.stack([resample(m, stride, content_size, size, origin) for m, stride in zip(maps, strides)])
  parts *= (shares / np.maximum(parts.sum((1, 2), dtype=np.float64), 1e-30)).reshape(-1, 1, 1)
  return (parts / (parts.sum(0).max() or 1)).astype(np.float32)


def inside(heat: np.ndarray, box: np.ndarray) -> float:
  """The part of the map's sum that lies in the box, xyxy in pixels of `heat` [H,W] (Wang et al. 2020, energy-based pointing game); 0 for no map."""
  x1, y1, x2, y2 = np.round(box).astype(int)
  return float(heat[y1:y2, x1:x2].sum() / (heat.sum() or 1))


# ---- checks

def blend(picture: np.ndarray, other: np.ndarray, heat: np.ndarray, seed: int = 0) -> np.ndarray:
  """u8 [STEPS,H,W,3] from all of `picture` to all of `other`, both u8 [H,W,3], in equal steps: the hottest pixels of `heat` [H,W] change first, equal
  ones in a random order."""
  order = np.lexsort((np.random.default_rng(seed).random(heat.size), -heat.reshape(-1)))
  rank = np.empty(heat.size, np.int64)
  rank[order] = np.arange(heat.size)
  changed = rank.reshape(1, *heat.shape, 1) < np.linspace(0, heat.size, STEPS).round().reshape(-1, 1, 1, 1)
  return np.where(changed, other, picture)


def deletion_and_insertion(score: Callable[[np.ndarray], np.ndarray], picture: np.ndarray, blurred: np.ndarray, grey: np.ndarray,
                           heat: np.ndarray) -> tuple[float, float]:
  """Areas in 0..1 under the score as the hottest pixels go and as they come (Petsiuk et al. 2018, section 4.2): a good map has a small first and a
  large second number.

  Deletion goes from `picture` to `grey`, insertion from `blurred` to `picture`, all u8 [H,W,3]; `score` takes u8 [N,H,W,3] and gives [N] in 0..1."""
  curves = [np.asarray(score(pictures), np.float64) for pictures in (blend(picture, grey, heat), blend(blurred, picture, heat))]
  return tuple(float((curve[1:] + curve[:-1]).mean() / 2) for curve in curves)


def cascade(stages: Mapping[str, Mapping[str, Tensor]], draw: Callable[[str, tuple[int, ...]], np.ndarray]) -> Iterator[str]:
  """Randomise a network from its output down (Adebayo et al. 2018, section 3.1): yields each name of `stages` once its tensors, and those of the
  stages before, hold what `draw(key, shape)` gives. At the end, or when the caller stops, all have their own values again.

  Tensors are written in place: captured graphs see the change."""
  kept = {name: {key: tensor.numpy() for key, tensor in tensors.items()} for name, tensors in stages.items()}
  try:
    for name, tensors in stages.items():
      for key, tensor in tensors.items(): _write(tensor, draw(key, tensor.shape))
      yield name
  finally:
    for name, tensors in stages.items():
      for key, tensor in tensors.items(): _write(tensor, kept[name][key])


def _write(tensor: Tensor, values: np.ndarray) -> None:
  tensor.assign(Tensor(np.ascontiguousarray(values, np.float32), device=tensor.device).cast(tensor.dtype)).realize()


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Spearman's rank correlation of two maps of one shape, equal values at their mean rank; 0 where one map is flat, which ranks nothing."""
  def centred_ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)]
    return ranks - ranks.mean()
  x, y = centred_ranks(a), centred_ranks(b)
  norm = np.sqrt((x @ x) * (y @ y))
  return float(x @ y / norm) if norm > 0 else 0.0


def ssim(a: np.ndarray, b: np.ndarray) -> float:
  """Mean structural similarity of two maps [H,W] in 0..1, sides of at least 11 (Wang et al. 2004: an 11x11 Gaussian window of deviation 1.5)."""
  window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  window /= window.sum()
  def smooth(x: np.ndarray) -> np.ndarray:
    for axis in (0, 1): x = np.lib.stride_tricks.sliding_window_view(x, 11, axis) @ window
    return x
  a, b = np.float64(a), np.float64(b)
  mean_a, mean_b = smooth(a), smooth(b)
  var_a, var_b, covariance = smooth(a * a) - mean_a ** 2, smooth(b * b) - mean_b ** 2, smooth(a * b) - mean_a * mean_b
  return float((((2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)) /
                ((mean_a ** 2 + mean_b ** 2 + SSIM_C1) * (var_a + var_b + SSIM_C2))).mean())
