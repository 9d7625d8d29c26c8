"""Batch norm and ReLU as published, one PyTorch operation a step: the specification, oracle and baseline."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F


def batch_norm_relu(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """(B, C, H, W), four (C,) -> (B, C, H, W); in training the running statistics are updated in place."""
    return F.relu(F.batch_norm(feature, running_mean, running_var, weight, bias, training, momentum, eps))


def batch_norm_relu_pool(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return :func:`batch_norm_relu` of its arguments, and the pooled map (B, C, H // 2, W // 2)."""
    output = batch_norm_relu(*arguments)
    return output, F.max_pool2d(output, 2)
