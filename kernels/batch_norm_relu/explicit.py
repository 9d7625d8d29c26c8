"""Batch norm, ReLU and their gradients written out in plain PyTorch: the operator where no kernel runs.

It takes and returns what the launchers in ``triton.py`` do, on any device and in any dtype.
"""

import torch
from torch import Tensor

from ..formats import memory_format_of, statistics_dtype


def forward(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, mean and biased variance of the batch (C,), and the running statistics after it (2, C)."""
    exact = feature.to(statistics_dtype(feature))
    count = feature.numel() // max(feature.shape[1], 1)
    if count == 0:
        mean, variance = exact.new_zeros(feature.shape[1]), exact.new_ones(feature.shape[1])
    else:
        mean = exact.mean(dim=(0, 2, 3))
        variance = (exact - _over_pixels(mean)).square().mean(dim=(0, 2, 3))
    output = apply(feature, weight, bias, mean, variance, eps)
    if running_mean is None:
        return output, mean, variance, feature.new_empty(0)
    running = torch.stack([running_mean, running_var])
    if count > 1:
        batch = torch.stack([mean, variance * (count / (count - 1))])
        running = (momentum * batch + (1 - momentum) * running.to(batch.dtype)).to(running.dtype)
    return output, mean, variance, running


def apply(feature: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """The map normalised by the given statistics, then the ReLU."""
    exact = statistics_dtype(feature)
    centred = feature.to(exact) - _over_pixels(mean.to(exact))
    scale = weight.to(exact) * torch.rsqrt(variance.to(exact) + eps)
    output = (centred * _over_pixels(scale) + _over_pixels(bias.to(exact))).relu()
    return output.to(feature.dtype, memory_format=memory_format_of(feature))


def backward(
    gradient: Tensor,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    is_of_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the feature (B, C, H, W), weight and bias (C,)."""
    exact = statistics_dtype(feature)
    count = max(feature.numel() // max(feature.shape[1], 1), 1)
    centred = feature.to(exact) - _over_pixels(mean.to(exact))
    inverse_deviation = torch.rsqrt(variance.to(exact) + eps)
    scale = weight.to(exact) * inverse_deviation
    normalised = centred * _over_pixels(scale) + _over_pixels(bias.to(exact))
    d_normalised = torch.where(normalised <= 0, 0, gradient.to(exact))
    d_bias = d_normalised.sum(dim=(0, 2, 3))
    d_weight = (d_normalised * centred).sum(dim=(0, 2, 3)) * inverse_deviation
    d_feature = d_normalised
    if is_of_batch:
        slope = d_weight * inverse_deviation / count
        d_feature = d_feature - _over_pixels(d_bias / count) - centred * _over_pixels(slope)
    d_feature = (d_feature * _over_pixels(scale)).to(feature.dtype, memory_format=memory_format_of(feature))
    return d_feature, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _over_pixels(channels: Tensor) -> Tensor:
    return channels[:, None, None]
