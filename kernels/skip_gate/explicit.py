"""The skip path and its gradients written out in plain PyTorch: the operator where no kernel runs.

It takes and returns what the launchers in ``triton.py`` do, on any device and in any dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import memory_format_of, statistics_dtype


def forward(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    decoder_feature: Tensor | None,
    weight_skip: Tensor,
    bias_skip: Tensor,
    weight_decoder: Tensor | None,
    bias_decoder: Tensor | None,
    concatenate: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output in ``dtype``, the gate (B, C) and the means (B, C + D); see the public function."""
    exact = statistics_dtype(encoder_feature)
    size = encoder_feature.shape[2:]
    skip = _skip(encoder_feature, tokens)
    pooled = skip.mean(dim=(2, 3))
    logits = F.linear(pooled, weight_skip.to(exact), bias_skip.to(exact))
    halves = []
    if decoder_feature is not None:
        decoder_mean = decoder_feature.to(exact).mean(dim=(2, 3))
        logits = logits + F.linear(decoder_mean, weight_decoder.to(exact), bias_decoder.to(exact))
        pooled = torch.cat([pooled, decoder_mean], dim=1)
        if concatenate:
            halves.append(_upsample(decoder_feature.to(exact), size))
    gate = torch.sigmoid(0.5 * logits)
    output = torch.cat([_over_pixels(gate) * skip.relu(), *halves], dim=1)
    return output.to(dtype, memory_format=memory_format_of(encoder_feature)), gate, pooled


def backward(
    gradient: Tensor,
    encoder_feature: Tensor,
    tokens: Tensor | None,
    weight_skip: Tensor,
    weight_decoder: Tensor | None,
    gate: Tensor,
    pooled: Tensor,
    d_encoder_feature: Tensor,
    d_tokens: Tensor | None,
    d_decoder_feature: Tensor | None,
    d_weight_skip: Tensor,
    d_bias_skip: Tensor,
    d_weight_decoder: Tensor | None,
    d_bias_decoder: Tensor | None,
) -> None:
    """Write the gradients of all inputs into ``d_*``, from that of the output and from what forward returned."""
    channels = gate.shape[1]
    height, width = encoder_feature.shape[2:]
    gradient = gradient.to(gate.dtype)
    d_gated, d_upsampled = gradient[:, :channels], gradient[:, channels:]
    skip = _skip(encoder_feature, tokens)

    d_gate = (d_gated * skip.relu()).sum(dim=(2, 3))
    slope = 0.5 * gate * (1 - gate) * d_gate  # gradient by the logits before they are halved
    d_weight_skip.copy_(slope.T @ pooled[:, :channels])
    d_bias_skip.copy_(slope.sum(dim=0))
    d_mean = slope @ weight_skip.to(gate.dtype)

    d_skip = _over_pixels(gate) * torch.where(skip > 0, d_gated, 0) + _over_pixels(d_mean) / (height * width)
    d_encoder_feature.copy_(d_skip)
    if d_tokens is not None:
        d_tokens.copy_(_sum_over_cells(d_skip, d_tokens.shape[2:]))
    if d_decoder_feature is not None:
        d_weight_decoder.copy_(slope.T @ pooled[:, channels:])
        d_bias_decoder.copy_(slope.sum(dim=0))
        grid = d_decoder_feature.shape[2:]
        d_decoder_mean = _over_pixels(slope @ weight_decoder.to(gate.dtype)) / (grid[0] * grid[1])
        is_concatenated = d_upsampled.shape[1] > 0
        d_decoder_feature.copy_(d_decoder_mean + (_sum_over_cells(d_upsampled, grid) if is_concatenated else 0))


def _skip(encoder_feature: Tensor, tokens: Tensor | None) -> Tensor:
    exact = statistics_dtype(encoder_feature)
    if tokens is None:
        return encoder_feature.to(exact)
    return encoder_feature.to(exact) + _upsample(tokens.to(exact), encoder_feature.shape[2:])


def _upsample(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(feature, size=size, mode="nearest")


def _over_pixels(channels: Tensor) -> Tensor:
    return channels[:, :, None, None]


def _sum_over_cells(feature: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C, rows, columns): what :func:`_upsample` wrote to each cell, added up."""
    rows, columns = grid
    height, width = feature.shape[2:]
    return feature.unflatten(3, (columns, width // columns)).unflatten(2, (rows, height // rows)).sum(dim=(3, 5))
