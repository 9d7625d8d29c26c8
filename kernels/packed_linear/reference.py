"""The block-diagonal linear map step by step, one product a scale and head: specification, oracle and baseline."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_linear(tokens: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Map (B, N, sum I) by [(O, I)] -> (B, N, sum O), or with heads by [(H, O, I)] -> (B, N, H, sum O)."""
    scales = tokens.split([weight.shape[-1] for weight in weights], dim=-1)
    if weights[0].ndim == 2:
        return _map_scales(scales, weights, biases)
    heads = [
        _map_scales(scales, [weight[head] for weight in weights], [bias[head] for bias in biases])
        for head in range(weights[0].shape[0])
    ]
    return torch.stack(heads, dim=2)


def _map_scales(scales: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    mapped = [
        F.linear(scale, weight, biases[place] if biases else None)
        for place, (scale, weight) in enumerate(zip(scales, weights, strict=True))
    ]
    return torch.cat(mapped, dim=-1)
