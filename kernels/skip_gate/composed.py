"""The skip path in plain PyTorch at its fastest, on any device and in any dtype.

Means are taken before upsampling (``gap(e + up(r)) = gap(e) + gap(r)``, ``gap(up(d)) = gap(d)``), and the tokens are
added by broadcasting: they never exist at full size.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..precision import statistics_dtype


def skip_gate(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    decoder_feature: Tensor | None,
    weight_skip: Tensor,
    bias_skip: Tensor,
    weight_decoder: Tensor | None,
    bias_decoder: Tensor | None,
    concatenate: bool = True,
) -> Tensor:
    """(B, C, H, W), (B, C, H/p, W/p) or None, (B, D, H/q, W/q) or None -> (B, C + D, H, W) or (B, C, H, W)."""
    pooled_skip = _pool(encoder_feature)
    skip = encoder_feature
    if tokens is not None:
        pooled_skip = pooled_skip + _pool(tokens)
        skip = _add_upsampled(encoder_feature, tokens)
    gate = F.linear(pooled_skip.to(encoder_feature.dtype), weight_skip, bias_skip)
    if decoder_feature is not None:
        pooled_decoder = _pool(decoder_feature).to(decoder_feature.dtype)
        gate = gate + F.linear(pooled_decoder, weight_decoder, bias_decoder)
    gated = (skip * torch.sigmoid(0.5 * gate)[:, :, None, None]).relu_()
    if decoder_feature is None or not concatenate:
        return gated
    return torch.cat([gated, _upsample(decoder_feature, encoder_feature.shape[-2:])], dim=1)


def _pool(feature: Tensor) -> Tensor:
    return feature.mean(dim=(2, 3), dtype=statistics_dtype(feature))


def _add_upsampled(feature: Tensor, tokens: Tensor) -> Tensor:
    rows, columns = tokens.shape[-2:]
    patches = rearrange(feature, "b c (rows p) (columns q) -> b c rows p columns q", rows=rows, columns=columns)
    summed = patches + rearrange(tokens, "b c rows columns -> b c rows 1 columns 1")
    return rearrange(summed, "b c rows p columns q -> b c (rows p) (columns q)")


def _upsample(feature: Tensor, size: tuple[int, int]) -> Tensor:
    if feature.shape[-2:] == size:
        return feature
    return F.interpolate(feature, size=size, mode="nearest")
