"""Layer norms over packed tokens as published, one norm a scale and one of their concatenation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_layer_norm(tokens: Tensor, segments: Sequence[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each scale: (B, N, sum C), (sum C,), (sum C,) -> (B, N, sum C)."""
    segments = list(segments)
    scales = zip(tokens.split(segments, dim=-1), weight.split(segments), bias.split(segments), strict=True)
    return torch.cat(
        [
            F.layer_norm(scale, scale.shape[-1:], scale_weight, scale_bias, eps)
            for scale, scale_weight, scale_bias in scales
        ],
        dim=-1,
    )


def cross_layer_norm(
    tokens: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    context_weight: Tensor,
    context_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise each scale, and all together: (B, N, sum C), four (sum C,) -> twice (B, N, sum C)."""
    scale_tokens = packed_layer_norm(tokens, segments, weight, bias, eps)
    return scale_tokens, F.layer_norm(tokens, tokens.shape[-1:], context_weight, context_bias, eps)
