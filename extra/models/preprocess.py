"""From pixels to what a network trained on ImageNet expects."""
from collections.abc import Sequence
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, RGB, of pixels scaled to 0..1


def normalize(images: Tensor, dtype: DType = dtypes.float32, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
  """u8 [B,H,W,3] RGB -> `dtype` [B,3,H,W], less `mean` and over `std`, both of pixels in 0..1. `dtype` is what the network then computes in."""
  channels = [(images[..., i].cast(dtypes.float32) - 255 * m) * (1 / (255 * s)) for i, (m, s) in enumerate(zip(mean, std))]
  return Tensor.stack(*channels, dim=1).cast(dtype).contiguous()
