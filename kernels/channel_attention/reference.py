"""Channel attention as published, one PyTorch operation a step: the specification, oracle and baseline.

Source: Wang et al., UCTransNet, AAAI 2022, section "CCT: multi-head channel cross-attention", equations 1 to 3, with
the scale ``1/sqrt(S)`` and the mean over heads of the authors' implementation.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def channel_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[int], dropout_p: float, eps: float
) -> Tensor:
    """(B, H, N, sum C), (B, H, N, S), (B, H, N, S) -> (B, N, sum C)."""
    mixed = [_attend_one_scale(queries, key, value, dropout_p, eps) for queries in query.split(list(segments), dim=-1)]
    return torch.cat(mixed, dim=-1)


def projected_channel_attention(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_weight: Tensor,
    value_weight: Tensor,
    dropout_p: float,
    eps: float,
) -> Tensor:
    """(B, N, sum C), (B, N, S), [(H, C, C)], (H, S, S), (H, S, S) -> (B, N, sum C); one projection a head and scale."""
    keys = torch.stack([F.linear(context, weight) for weight in key_weight], dim=1)
    values = torch.stack([F.linear(context, weight) for weight in value_weight], dim=1)
    mixed = []
    for scale_tokens, weights in zip(_split(tokens, query_weights), query_weights, strict=True):
        queries = torch.stack([F.linear(scale_tokens, weight) for weight in weights], dim=1)
        mixed.append(_attend_one_scale(queries, keys, values, dropout_p, eps))
    return torch.cat(mixed, dim=-1)


def projected_attention_maps(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_weight: Tensor, eps: float
) -> list[Tensor]:
    """Softmax maps of each scale before dropout, mean over heads: a list of (B, C, S)."""
    keys = torch.stack([F.linear(context, weight) for weight in key_weight], dim=1)
    maps = []
    for scale_tokens, weights in zip(_split(tokens, query_weights), query_weights, strict=True):
        queries = torch.stack([F.linear(scale_tokens, weight) for weight in weights], dim=1)
        maps.append(_attention_map(queries, keys, eps).mean(dim=1))
    return maps


def _attend_one_scale(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, eps: float) -> Tensor:
    attention = F.dropout(_attention_map(query, key, eps), dropout_p)  # [B, H, C, S]
    mixed = attention @ value.transpose(-1, -2)  # [B, H, C, N]
    # The published sequence moves the heads last in memory before it averages them.
    return mixed.permute(0, 3, 2, 1).contiguous().mean(dim=-1)


def _attention_map(query: Tensor, key: Tensor, eps: float) -> Tensor:
    scores = query.transpose(-1, -2) @ key / math.sqrt(key.shape[-1])  # [B, H, C, S]
    return F.instance_norm(scores, eps=eps).softmax(dim=-1)


def _split(tokens: Tensor, query_weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tokens.split([weight.shape[-1] for weight in query_weights], dim=-1)
