"""Channel attention as published, one PyTorch operation a step: the specification, oracle and baseline.

Source: Wang et al., UCTransNet, AAAI 2022, section "CCT: multi-head channel cross-attention", equations 1 to 3, with
the scale ``1/sqrt(S)`` and the mean over heads of the authors' implementation.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..dropout import keep_mask, keep_scale, row_keys


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> Tensor:
    """Attend (B, H, N, sum C), (B, H, N, S), (B, H, N, S) -> (B, N, sum C)."""
    masks = _dropout_masks(query.shape[0], query.shape[1], segments, key.shape[-1], dropout_p, seed)
    mixed = [
        _attend_one_scale(queries, key, value, dropout_p, eps, mask)
        for queries, mask in zip(query.split(list(segments), dim=-1), masks, strict=True)
    ]
    return torch.cat(mixed, dim=-1)


def projected_channel_attention(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_value_weight: Tensor,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> Tensor:
    """Project each head and scale, attend: (B, N, sum C), (B, N, S), [(H, C, C)], (2, H, S, S) -> (B, N, sum C)."""
    key_weights, value_weights = key_value_weight
    keys = torch.stack([F.linear(context, weight) for weight in key_weights], dim=1)
    values = torch.stack([F.linear(context, weight) for weight in value_weights], dim=1)
    segments = [weight.shape[-1] for weight in query_weights]
    masks = _dropout_masks(tokens.shape[0], len(key_weights), segments, context.shape[-1], dropout_p, seed)
    mixed = []
    for scale_tokens, weights, mask in zip(_split(tokens, query_weights), query_weights, masks, strict=True):
        queries = torch.stack([F.linear(scale_tokens, weight) for weight in weights], dim=1)
        mixed.append(_attend_one_scale(queries, keys, values, dropout_p, eps, mask))
    return torch.cat(mixed, dim=-1)


def projected_attention_maps(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_weight: Tensor, eps: float
) -> list[Tensor]:
    """Return the softmax maps of each scale before dropout, mean over heads: a list of (B, C, S)."""
    keys = torch.stack([F.linear(context, weight) for weight in key_weight], dim=1)
    maps = []
    for scale_tokens, weights in zip(_split(tokens, query_weights), query_weights, strict=True):
        queries = torch.stack([F.linear(scale_tokens, weight) for weight in weights], dim=1)
        maps.append(_attention_map(queries, keys, eps).mean(dim=1))
    return maps


def _attend_one_scale(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, eps: float, mask: Tensor | None
) -> Tensor:
    attention = _attention_map(query, key, eps)  # [B, H, C, S]
    attention = F.dropout(attention, dropout_p) if mask is None else attention * mask * keep_scale(dropout_p)
    mixed = attention @ rearrange(value, "b h n s -> b h s n")  # [B, H, C, N]
    # The published sequence moves the heads last in memory before it averages them.
    return rearrange(mixed, "b h c n -> b n c h").contiguous().mean(dim=-1)


def _dropout_masks(
    batch: int, heads: int, segments: Sequence[int], key_channels: int, dropout_p: float, seed: Tensor | None
) -> Sequence[Tensor | None]:
    """Return the mask (B, H, C, S) of each scale that every backend draws from ``seed``; ``None`` without a seed."""
    if seed is None or dropout_p == 0:
        return [None] * len(segments)
    keys = row_keys(seed, batch * heads * sum(segments)).view(2, batch, heads, sum(segments))
    return keep_mask(keys, key_channels, dropout_p).split(list(segments), dim=2)


def _attention_map(query: Tensor, key: Tensor, eps: float) -> Tensor:
    scores = rearrange(query, "b h n c -> b h c n") @ key / math.sqrt(key.shape[-1])  # [B, H, C, S]
    return F.instance_norm(scores, eps=eps).softmax(dim=-1)


def _split(tokens: Tensor, query_weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tokens.split([weight.shape[-1] for weight in query_weights], dim=-1)
