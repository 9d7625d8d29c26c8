"""Packed layer norms in plain PyTorch, on any device and in any dtype: torch's own layer norm is its fastest form.

The gradients are written out for the operators, which torch's autograd does not see into.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import cross_layer_norm, packed_layer_norm

__all__ = ["cross_layer_norm", "cross_layer_norm_backward", "packed_layer_norm", "packed_layer_norm_backward"]


def packed_layer_norm_backward(
    gradient: Tensor, tokens: Tensor, segments: Sequence[int], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients by the tokens, and by weight and bias together: (B, N, sum C), (2, sum C)."""
    segments = list(segments)
    scales = zip(gradient.split(segments, dim=-1), tokens.split(segments, dim=-1), weight.split(segments), strict=True)
    d_tokens, d_weight, d_bias = (
        torch.cat(pieces, dim=-1) for pieces in zip(*(_backward(*scale, eps) for scale in scales), strict=True)
    )
    return d_tokens, torch.stack([d_weight, d_bias])


def cross_layer_norm_backward(
    gradient: Tensor,
    context_gradient: Tensor,
    tokens: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    context_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients by the tokens, and by both weights and biases together: (B, N, sum C), (4, sum C)."""
    d_tokens, d_channels = packed_layer_norm_backward(gradient, tokens, segments, weight, eps)
    d_context_tokens, *d_context_channels = _backward(context_gradient, tokens, context_weight, eps)
    return d_tokens + d_context_tokens, torch.cat([d_channels, torch.stack(d_context_channels)])


def _backward(gradient: Tensor, tokens: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(tokens.dtype, weight.dtype)  # they differ under autocast
    rows, shape, weights = tokens.to(dtype), tokens.shape[-1:], weight.to(dtype)
    _, mean, factor = torch.native_layer_norm(rows, shape, weights, None, eps)
    d_tokens, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        gradient.to(dtype), rows, shape, mean, factor, weights, torch.zeros_like(weights), [True, True, True]
    )
    return d_tokens.to(tokens.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype)
