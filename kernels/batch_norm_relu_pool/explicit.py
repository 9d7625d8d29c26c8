"""Batch norm, ReLU, max-pool and their gradients written out in plain PyTorch: the operator where no kernel runs.

It takes and returns what the launchers in ``triton.py`` do, on any device and in any dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..batch_norm_relu import explicit
from ..formats import empty_map, statistics_dtype


def forward(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output and its windows' maxima, mean and variance of the batch (C,), running statistics after it (2, C)."""
    output, *statistics = explicit.forward(feature, *arguments)
    return output, _pooled(output, feature), *statistics


def apply(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The map normalised by the given statistics, then the ReLU; and the maximum of each of its windows."""
    output = explicit.apply(feature, *arguments)
    return output, _pooled(output, feature)


def backward(
    gradient: Tensor | None, d_pooled: Tensor, feature: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the feature (B, C, H, W), weight and bias (C,), of both results; of the map's there may be none."""
    *normalisation, _ = arguments
    output = explicit.apply(feature, *normalisation)
    _, winners = F.max_pool2d(output, 2, return_indices=True)
    of_pool = torch.zeros_like(output, dtype=statistics_dtype(feature), memory_format=torch.contiguous_format)
    of_pool.flatten(2).scatter_(2, winners.flatten(2), d_pooled.to(of_pool.dtype).flatten(2))
    return explicit.backward(of_pool if gradient is None else of_pool + gradient, feature, *arguments)


def _pooled(output: Tensor, feature: Tensor) -> Tensor:
    pooled = F.max_pool2d(output, 2)
    return empty_map(feature, *pooled.shape[1:], feature.dtype).copy_(pooled)
