"""Where there is no CUDA device, Triton's kernels run in its interpreter, on CPU tensors."""

import os

import torch

if not torch.cuda.is_available():
    # Read when the kernels are decorated, so it is set before any test imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")
