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
    decoder_feature: Tensor,
    weight_skip: Tensor,
    bias_skip: Tensor,
    weight_decoder: Tensor,
    bias_decoder: Tensor,
) -> Tensor:
    """(B, C, H, W), (B, C, H/p, W/p) or None, (B, D, H/q, W/q) -> (B, C + D, H, W)."""
    size = encoder_feature.shape[-2:]
    skip = encoder_feature
    if tokens is not None:
        skip = _upsample(tokens, size) + skip
    decoded = _upsample(decoder_feature, size)
    pooled_skip = F.avg_pool2d(skip, size).flatten(1)
    pooled_decoded = F.avg_pool2d(decoded, size).flatten(1)
    gate = F.linear(pooled_skip, weight_skip, bias_skip) + F.linear(pooled_decoded, weight_decoder, bias_decoder)
    gate = torch.sigmoid(gate / 2.0).unsqueeze(-1).unsqueeze(-1).expand_as(skip)
    return torch.cat([F.relu(skip * gate), decoded], dim=1)


def _upsample(feature: Tensor, size: tuple[int, int]) -> Tensor:
    if feature.shape[-2:] == size:
        return feature
    return F.interpolate(feature, size=size, mode="nearest")
