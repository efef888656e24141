"""What a network computes in. Weights, optimiser state and losses are always float32; a layer casts its weights to the type of what it is given."""
from tinygrad import dtypes
from tinygrad.dtype import DType

DTYPES: dict[str, DType] = {"float32": dtypes.float32, "bf16": dtypes.bfloat16, "half": dtypes.half}
