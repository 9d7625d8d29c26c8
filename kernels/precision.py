"""The dtype that means and variances are taken in."""

import torch
from torch import Tensor


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for half-precision tensors, otherwise the tensor's own."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
