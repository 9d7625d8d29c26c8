"""Batch norm and ReLU in plain PyTorch, on any device and in any dtype: torch's own batch norm is its fastest form.

The ReLU overwrites the normalised map, which nothing reads again: batch norm's gradient needs its input alone.
"""

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
    normalised = F.batch_norm(feature, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.relu(normalised, inplace=True)


def batch_norm_relu_pool(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return :func:`batch_norm_relu` of its arguments, and the pooled map (B, C, H // 2, W // 2)."""
    output = batch_norm_relu(*arguments)
    return output, F.max_pool2d(output, 2)
