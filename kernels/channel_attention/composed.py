"""Channel attention in plain PyTorch at its fastest, on any device and in any dtype.

Three things differ from the paper's steps, none of them in the result (docs/design.md has the identities):

- The instance norm is a temperature: softmax ignores its mean, so only one standard deviation a head and scale is needed.
- All scales are rows of one matrix product, one head at a time, so that the map of a head stays in the cache.
- For long token sequences the products associate the other way, ``W_q^T (T^T T) W_k`` instead of ``(T W_q)^T (T W_k)``:
  everything after ``T^T T`` is independent of the number of tokens.
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
    heads = query.shape[1]
    scale = 1 / math.sqrt(key.shape[-1])
    mixed: Tensor | None = None
    for head in range(heads):
        scores = (query[:, head] * scale).transpose(1, 2) @ key[:, head]  # [B, sum C, S]
        attention = F.dropout(_tempered_softmax(scores, segments, eps), dropout_p)
        # One head after another lands in the same sum: the products of single heads are never held side by side.
        contribution = value[:, head] @ attention.transpose(1, 2)  # [B, N, sum C]
        mixed = contribution if mixed is None else mixed + contribution
    return mixed / heads


def project_then_attend(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_weight: Tensor,
    value_weight: Tensor,
    dropout_p: float,
    eps: float,
) -> Tensor:
    """Projections first: one product for keys, one for values, one a scale for the queries of all heads."""
    heads = key_weight.shape[0]
    segments = _segments(query_weights)
    key = F.linear(context, key_weight.flatten(0, 1)).unflatten(-1, (heads, -1)).transpose(1, 2)
    value = F.linear(context, value_weight.flatten(0, 1)).unflatten(-1, (heads, -1)).transpose(1, 2)
    query = torch.cat(
        [
            F.linear(scale_tokens, weights.flatten(0, 1)).unflatten(-1, (heads, -1))
            for scale_tokens, weights in zip(tokens.split(segments, dim=-1), query_weights, strict=True)
        ],
        dim=-1,
    ).transpose(1, 2)
    return channel_attention(query, key, value, segments, dropout_p, eps)


def correlate_then_attend(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_weight: Tensor,
    value_weight: Tensor,
    dropout_p: float,
    eps: float,
) -> Tensor:
    """Token correlation first: ``T^T T`` is shared by all heads, and only it and the last product see the tokens."""
    heads = key_weight.shape[0]
    segments = _segments(query_weights)
    correlation = _correlation(tokens, context)
    mixing: Tensor | None = None
    for head in range(heads):
        scores = _scores_from_correlation(correlation, query_weights, key_weight, head)
        attention = F.dropout(_tempered_softmax(scores, segments, eps), dropout_p)
        contribution = attention @ value_weight[head]  # [B, sum C, S]
        mixing = contribution if mixing is None else mixing + contribution
    return context @ (mixing / heads).transpose(1, 2)


def projected_attention_maps(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_weight: Tensor, eps: float
) -> list[Tensor]:
    """Softmax maps of each scale before dropout, mean over heads: a list of (B, C, S)."""
    heads = key_weight.shape[0]
    segments = _segments(query_weights)
    correlation = _correlation(tokens, context)
    total: Tensor | None = None
    for head in range(heads):
        scores = _scores_from_correlation(correlation, query_weights, key_weight, head)
        attention = _tempered_softmax(scores, segments, eps)
        total = attention if total is None else total + attention
    return list((total / heads).split(segments, dim=1))


def _correlation(tokens: Tensor, context: Tensor) -> Tensor:
    return (tokens / math.sqrt(context.shape[-1])).transpose(1, 2) @ context  # [B, sum C, S]


def _scores_from_correlation(
    correlation: Tensor, query_weights: Sequence[Tensor], key_weight: Tensor, head: int
) -> Tensor:
    blocks = correlation.split(_segments(query_weights), dim=1)
    queried = torch.cat([weights[head] @ block for weights, block in zip(query_weights, blocks, strict=True)], dim=1)
    return queried @ key_weight[head].t()  # [B, sum C, S]


def _tempered_softmax(scores: Tensor, segments: Sequence[int], eps: float) -> Tensor:
    """Softmax of each row over the standard deviation of its segment's map; statistics in at least float32."""
    temperature = [_inverse_deviation(block, eps).expand(-1, block.shape[1]) for block in scores.split(segments, dim=1)]
    return (scores * torch.cat(temperature, dim=1).to(scores.dtype).unsqueeze(-1)).softmax(dim=-1)


def _inverse_deviation(block: Tensor, eps: float) -> Tensor:
    block = block.float() if block.dtype in (torch.float16, torch.bfloat16) else block
    return (block.var(dim=(1, 2), correction=0) + eps).rsqrt().unsqueeze(-1)  # [B, 1]


def _segments(query_weights: Sequence[Tensor]) -> list[int]:
    return [weight.shape[-1] for weight in query_weights]
