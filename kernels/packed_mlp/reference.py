"""The MLPs of all scales step by step, one operation each: specification, oracle and baseline."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_mlp(
    tokens: Tensor,
    residual: Tensor,
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    contract_weights: Sequence[Tensor],
    contract_biases: Sequence[Tensor],
) -> Tensor:
    """Return residual + contract(GELU(expand(tokens))), scale by scale: (B, N, sum C) -> (B, N, sum C)."""
    scales = tokens.split([weight.shape[1] for weight in expand_weights], dim=-1)
    layers = zip(expand_weights, expand_biases, contract_weights, contract_biases, strict=True)
    mixed = []
    for scale, (expand, expand_bias, contract, contract_bias) in zip(scales, layers, strict=True):
        mixed.append(F.linear(F.gelu(F.linear(scale, expand, expand_bias)), contract, contract_bias))
    return residual + torch.cat(mixed, dim=-1)
