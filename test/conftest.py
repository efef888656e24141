"""What holds for all tests."""
import os

# Compiling is most of a test's time. tinygrad's kernels are ready in half of it as plain loops; `NOOPT=0 python -m pytest` tests them as users have
# them, as CI does with those against torch.
os.environ.setdefault("NOOPT", "1")
