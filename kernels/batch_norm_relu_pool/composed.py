"""Batch norm, ReLU and max-pool in plain PyTorch, on any device and in any dtype."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..batch_norm_relu import composed


def batch_norm_relu_pool(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) and the other arguments of ``batch_norm_relu`` -> (B, C, H, W), (B, C, H//2, W//2)."""
    output = composed.batch_norm_relu(feature, *arguments)
    return output, F.max_pool2d(output, 2)
