"""Channel attention in plain PyTorch at its fastest, on any device and in any dtype.

Three things differ from the paper's steps, none of them in the result (README.md has the identities):

- The instance norm is a temperature: softmax ignores its mean, so it takes one standard deviation a head and scale.
- All scales are rows of one matrix product, one head at a time, so that the map of a head stays in the cache.
- For long token sequences the products associate the other way, ``W_q^T (T^T T) W_k`` instead of ``(T W_q)^T (T W_k)``:
  everything after ``T^T T`` is independent of the number of tokens.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import LEVELS, drop_threshold, keep_mask, keep_scale, row_keys
from ..formats import statistics_dtype

LANES = 4  # of 16 bits, in a 64-bit draw of dropout


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
    heads = query.shape[1]
    drop = Dropout(dropout_p, seed, heads)
    scale = 1 / math.sqrt(key.shape[-1])
    mixed: Tensor | None = None
    # unbind, not an index: its backward writes each head's gradient once, an index pads it with zeros for all heads.
    for head, (head_query, head_key, head_value) in enumerate(
        zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)
    ):
        scores = (head_query * scale).transpose(1, 2) @ head_key  # [B, sum C, S]
        attention = drop(_tempered_softmax(scores, segments, eps), head)
        # One head after another lands in the same sum: the products of single heads are never held side by side.
        contribution = head_value @ attention.transpose(1, 2)  # [B, N, sum C]
        mixed = contribution if mixed is None else mixed + contribution
    return mixed * (drop.rescale / heads)


def project_then_attend(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_value_weight: Tensor,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> Tensor:
    """Project first: one product for keys and values, one a scale for queries, each for all heads."""
    heads = key_value_weight.shape[1]
    segments = _segments(query_weights)
    key_value = F.linear(context, key_value_weight.flatten(0, 2)).unflatten(-1, (2, heads, -1))
    key, value = key_value.transpose(1, 3).unbind(2)
    query = torch.cat(
        [
            F.linear(scale_tokens, weights.flatten(0, 1)).unflatten(-1, (heads, -1))
            for scale_tokens, weights in zip(tokens.split(segments, dim=-1), query_weights, strict=True)
        ],
        dim=-1,
    ).transpose(1, 2)
    return channel_attention(query, key, value, segments, dropout_p, eps, seed)


def correlate_then_attend(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_value_weight: Tensor,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> Tensor:
    """Correlate the tokens first: ``T^T T`` is shared by all heads; only it and the last product see the tokens."""
    heads = key_value_weight.shape[1]
    segments = _segments(query_weights)
    drop = Dropout(dropout_p, seed, heads)
    correlation = _correlation(tokens, context)
    mixing: Tensor | None = None
    key_weight, value_weight = key_value_weight.unbind(0)
    head_weights = zip(_by_head(query_weights), key_weight.unbind(0), value_weight.unbind(0), strict=True)
    for head, (head_query_weights, head_key_weight, head_value_weight) in enumerate(head_weights):
        scores = _scores_from_correlation(correlation, head_query_weights, head_key_weight)
        attention = drop(_tempered_softmax(scores, segments, eps), head)
        contribution = attention @ head_value_weight  # [B, sum C, S]
        mixing = contribution if mixing is None else mixing + contribution
    return context @ (mixing * (drop.rescale / heads)).transpose(1, 2)


def projected_attention_maps(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_weight: Tensor, eps: float
) -> list[Tensor]:
    """Return the softmax maps of each scale before dropout, mean over heads: a list of (B, C, S)."""
    heads = key_weight.shape[0]
    segments = _segments(query_weights)
    correlation = _correlation(tokens, context)
    total: Tensor | None = None
    for head_query_weights, head_key_weight in zip(_by_head(query_weights), key_weight.unbind(0), strict=True):
        scores = _scores_from_correlation(correlation, head_query_weights, head_key_weight)
        attention = _tempered_softmax(scores, segments, eps)
        total = attention if total is None else total + attention
    return list((total / heads).split(segments, dim=1))


def _correlation(tokens: Tensor, context: Tensor) -> Tensor:
    return (tokens / math.sqrt(context.shape[-1])).transpose(1, 2) @ context  # [B, sum C, S]


def _scores_from_correlation(correlation: Tensor, query_weights: Sequence[Tensor], key_weight: Tensor) -> Tensor:
    blocks = correlation.split(_segments(query_weights), dim=1)
    # bmm reads an expanded weight as it is; a broadcasting matmul would transpose and copy the block instead.
    queried = [
        torch.bmm(weight.expand(block.shape[0], -1, -1), block)
        for weight, block in zip(query_weights, blocks, strict=True)
    ]
    return torch.cat(queried, dim=1) @ key_weight.t()  # [B, sum C, S]


def _tempered_softmax(scores: Tensor, segments: Sequence[int], eps: float) -> Tensor:
    """Return the softmax of each row over its segment's standard deviation; statistics in at least float32.

    Means and squares are taken row by row and then summed over the rows of a segment, so that the map is read as one
    tensor. It is centred before it is squared: squares of uncentred scores would cancel where their offset is large.
    """
    width = scores.shape[-1]
    row_means = scores.mean(dim=-1, dtype=statistics_dtype(scores))  # [B, sum C]
    centred = scores - _segment_means(row_means, segments).to(scores.dtype).unsqueeze(-1)
    row_norms = torch.linalg.vector_norm(centred, dim=-1, dtype=statistics_dtype(scores))
    variance = _segment_means(row_norms.square() / width, segments) + eps
    if eps == 0:
        variance = variance.masked_fill(variance == 0, math.inf)  # a constant map attends evenly
    return (centred * variance.rsqrt().to(scores.dtype).unsqueeze(-1)).softmax(dim=-1)


def _segment_means(rows: Tensor, segments: Sequence[int]) -> Tensor:
    """Replace every row's value by the mean over its segment: (B, sum C) -> (B, sum C)."""
    return torch.cat([block.mean(dim=1, keepdim=True).expand_as(block) for block in rows.split(segments, dim=1)], dim=1)


class Dropout:
    """Zeroes entries of maps (B, sum C, S) with probability ``dropout_p``; ``rescale``, not applied, keeps the mean.

    With a seed the mask is that of every other backend. Without one, four 16-bit lanes come out of one 64-bit draw, a
    third of the time of ``torch.nn.functional.dropout`` on a CPU.
    """

    def __init__(self, dropout_p: float, seed: Tensor | None, heads: int):
        self.dropout_p = dropout_p
        self.seed = seed
        self.heads = heads
        self.rescale = keep_scale(dropout_p)

    def __call__(self, attention: Tensor, head: int) -> Tensor:
        """Apply the mask of a head."""
        if self.dropout_p == 0.0:
            return attention
        if self.seed is not None:
            batch, channels, key_channels = attention.shape
            keys = row_keys(self.seed, batch * self.heads * channels).view(2, batch, self.heads, channels)
            return attention * keep_mask(keys[:, :, head], key_channels, self.dropout_p)
        draws = torch.randint(-(2**63), 2**63 - 1, (-(-attention.numel() // LANES),), device=attention.device)
        lanes = draws.view(torch.int16)[: attention.numel()].view(attention.shape)
        return attention * (lanes >= drop_threshold(self.dropout_p) - LEVELS // 2)


def _by_head(query_weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(weight.unbind(0) for weight in query_weights), strict=True)


def _segments(query_weights: Sequence[Tensor]) -> list[int]:
    return [weight.shape[-1] for weight in query_weights]
