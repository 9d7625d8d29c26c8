"""Batch norm, ReLU and max-pool as published, one PyTorch operation a step: specification, oracle and baseline."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..batch_norm_relu import reference


def batch_norm_relu_pool(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) and the other arguments of ``batch_norm_relu`` -> (B, C, H, W), (B, C, H//2, W//2)."""
    output = reference.batch_norm_relu(feature, *arguments)
    return output, F.max_pool2d(output, 2)
