"""The skip path as published, one PyTorch operation a step: the specification, oracle and baseline.

Source: Wang et al., UCTransNet, AAAI 2022, section "CCA: channel-wise cross-attention", with the factor 1/2 before the
sigmoid of the authors' implementation.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    size = encoder_feature.shape[-2:]
    skip = encoder_feature
    if tokens is not None:
        skip = _upsample(tokens, size) + skip
    gate = F.linear(_pool(skip), weight_skip, bias_skip)
    if decoder_feature is not None:
        decoder_feature = _upsample(decoder_feature, size)
        gate = gate + F.linear(_pool(decoder_feature), weight_decoder, bias_decoder)
    gate = torch.sigmoid(gate / 2.0).unsqueeze(-1).unsqueeze(-1).expand_as(skip)
    gated = F.relu(skip * gate)
    if decoder_feature is None or not concatenate:
        return gated
    return torch.cat([gated, decoder_feature], dim=1)


def _pool(feature: Tensor) -> Tensor:
    return F.avg_pool2d(feature, feature.shape[-2:]).flatten(1)


def _upsample(feature: Tensor, size: tuple[int, int]) -> Tensor:
    if feature.shape[-2:] == size:
        return feature
    return F.interpolate(feature, size=size, mode="nearest")
