"""From pixels to what a network trained on ImageNet expects."""
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, RGB, of pixels scaled to 0..1


def normalize(images: Tensor, dtype: DType = dtypes.float32) -> Tensor:
  """u8 [B,H,W,3] RGB -> `dtype` [B,3,H,W], zero mean and unit deviation over ImageNet. `dtype` is what the network then computes in."""
  channels = [(images[..., i].cast(dtypes.float32) - 255 * mean) * (1 / (255 * std)) for i, (mean, std) in enumerate(zip(MEAN, STD))]
  return Tensor.stack(*channels, dim=1).cast(dtype).contiguous()
