"""Channel attention in plain PyTorch at its fastest, on any device and in any dtype.

Three things differ from the paper's steps, none of them in the result (README.md has the identities):

- The instance norm is a temperature: softmax ignores its mean, so it takes one standard deviation a head and scale.
  Small maps keep the norm.
- All scales are rows of one matrix product, one head at a time, so that the map of a head stays in the cache. Small
  maps of all heads are one product.
- For long token sequences the products associate the other way, ``W_q^T (T^T T) W_k`` instead of ``(T W_q)^T (T W_k)``:
  everything after ``T^T T`` is independent of the number of tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import LEVELS, drop_threshold, keep_mask, keep_scale, row_keys
from ..formats import statistics_dtype

SMALL_MAP, CACHED_MAP = 2**15, 2**18  # entries of the maps of one head; see _choose_steps
LANES = 4  # of 16 bits, in a 64-bit draw of dropout
Softmax = Callable[[Tensor, Sequence[int], float], Tensor]


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
    batch, heads, _, channels = query.shape
    drop = Dropout(dropout_p, seed, heads)
    scale = 1 / math.sqrt(key.shape[-1])
    at_once, softmax = _choose_steps(heads, batch * channels * key.shape[-1])
    # split, not an index: its backward writes each head's gradient once, an index pads it with zeros for all heads.
    parts = (tensor.split(at_once, dim=1) for tensor in (query, key, value))
    mixed: Tensor | None = None
    for place, (part_query, part_key, part_value) in enumerate(zip(*parts, strict=True)):
        scores = (part_query * scale).transpose(2, 3) @ part_key  # [B, heads at once, sum C, S]
        attention = drop(softmax(scores, segments, eps), place * at_once)
        # Products of single heads are never held side by side: a contraction adds up heads at once, a sum the parts.
        contribution = part_value.transpose(1, 2).flatten(2) @ attention.transpose(2, 3).flatten(1, 2)  # [B, N, sum C]
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
    drop = Dropout(dropout_p, seed, heads)
    key_weight, value_weight = key_value_weight.unbind(0)
    at_once, softmax = _choose_steps(heads, tokens.shape[0] * tokens.shape[2] * context.shape[2])
    scores = _scores_by_correlation(tokens, context, query_weights, key_weight, at_once)
    mixing: Tensor | None = None
    for place, (part_scores, part_values) in enumerate(zip(scores, value_weight.split(at_once), strict=True)):
        attention = drop(softmax(part_scores, _segments(query_weights), eps), place * at_once)
        contribution = attention.transpose(1, 2).flatten(2) @ part_values.flatten(0, 1)  # [B, sum C, S]
        mixing = contribution if mixing is None else mixing + contribution
    return context @ (mixing * (drop.rescale / heads)).transpose(1, 2)


def projected_attention_maps(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_weight: Tensor, eps: float
) -> list[Tensor]:
    """Return the softmax maps of each scale before dropout, mean over heads: a list of (B, C, S)."""
    segments = _segments(query_weights)
    scores = _scores_by_correlation(tokens, context, query_weights, key_weight, at_once=1)
    total = sum(_tempered_softmax(part, segments, eps) for part in scores)
    return list((total.squeeze(1) / key_weight.shape[0]).split(segments, dim=1))


def _scores_by_correlation(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_weight: Tensor, at_once: int
) -> Iterator[Tensor]:
    """Yield the scores of ``at_once`` heads at a time: (B, at_once, sum C, S)."""
    correlation = (tokens / math.sqrt(context.shape[-1])).transpose(1, 2) @ context  # [B, sum C, S]
    blocks = correlation.split(_segments(query_weights), dim=1)
    parts = (weight.split(at_once) for weight in (key_weight, *query_weights))
    for part_keys, *part_queries in zip(*parts, strict=True):
        # bmm reads an expanded weight as it is; a broadcasting matmul would transpose and copy the block instead.
        queried = [
            torch.bmm(weight.flatten(0, 1).expand(block.shape[0], -1, -1), block).unflatten(1, weight.shape[:2])
            for weight, block in zip(part_queries, blocks, strict=True)
        ]
        yield torch.einsum("bhcs,hts->bhct", torch.cat(queried, dim=2), part_keys)


def _choose_steps(heads: int, entries: int) -> tuple[int, Softmax]:
    """Return how many heads to compute at once, all or one, and the softmax, for maps of ``entries`` a head.

    The products are the same. Each step reads and writes the map, so that on a CPU its place in memory decides, and for
    small maps the number of calls:

    - Up to ``SMALL_MAP`` a pass over the map takes less time than its call, 5 us: all heads at once take a quarter of
      the calls.
    - Up to ``CACHED_MAP``, 1 MiB in float32, the map of a head stays in the cache of a core. The published norm copies
      the scales there, and has fewer passes in backward.
    - Beyond, every pass reads memory, and the temperature has the fewest.

    An exported program runs for sizes that are open when it is traced, and takes the last.
    """
    if torch.compiler.is_exporting() or entries > CACHED_MAP:
        return 1, _tempered_softmax
    return heads if entries <= SMALL_MAP else 1, _published_softmax


def _published_softmax(scores: Tensor, segments: Sequence[int], eps: float) -> Tensor:
    """Return the softmax of the instance norm of each head and scale: (B, heads, sum C, S) -> the same."""
    blocks = scores.split(list(segments), dim=-2)
    return torch.cat([F.instance_norm(block, eps=eps).softmax(dim=-1) for block in blocks], dim=-2)


def _tempered_softmax(scores: Tensor, segments: Sequence[int], eps: float) -> Tensor:
    """Return the softmax of each row over its segment's standard deviation; statistics in at least float32.

    Means and squares are taken row by row and then summed over the rows of a segment, so that the map is read as one
    tensor. It is centred before it is squared: squares of uncentred scores would cancel where their offset is large.
    """
    width = scores.shape[-1]
    row_means = scores.mean(dim=-1, dtype=statistics_dtype(scores))  # [..., sum C]
    centred = scores - _segment_means(row_means, segments).to(scores.dtype).unsqueeze(-1)
    row_norms = torch.linalg.vector_norm(centred, dim=-1, dtype=statistics_dtype(scores))
    variance = _segment_means(row_norms.square() / width, segments) + eps
    if eps == 0:
        variance = variance.masked_fill(variance == 0, math.inf)  # a constant map attends evenly
    return (centred * variance.rsqrt().to(scores.dtype).unsqueeze(-1)).softmax(dim=-1)


def _segment_means(rows: Tensor, segments: Sequence[int]) -> Tensor:
    """Replace every row's value by the mean over its segment: (..., sum C) -> the same."""
    blocks = rows.split(list(segments), dim=-1)
    return torch.cat([block.mean(dim=-1, keepdim=True).expand_as(block) for block in blocks], dim=-1)


class Dropout:
    """Zeroes entries of maps (B, H, sum C, S) with probability ``dropout_p``; ``rescale``, not applied, keeps the mean.

    With a seed the mask is that of every other backend. Without one, four 16-bit lanes come out of one 64-bit draw, a
    third of the time of ``torch.nn.functional.dropout`` on a CPU.
    """

    def __init__(self, dropout_p: float, seed: Tensor | None, heads: int):
        self.dropout_p = dropout_p
        self.seed = seed
        self.heads = heads
        self.rescale = keep_scale(dropout_p)

    def __call__(self, attention: Tensor, first_head: int) -> Tensor:
        """Apply the masks of adjacent heads: (B, heads, sum C, S) -> the same."""
        if self.dropout_p == 0.0:
            return attention
        if self.seed is not None:
            batch, heads, channels, key_channels = attention.shape
            keys = row_keys(self.seed, batch * self.heads * channels).view(2, batch, self.heads, channels)
            part = keys[:, :, first_head : first_head + heads]
            return attention * keep_mask(part, key_channels, self.dropout_p)
        draws = torch.randint(-(2**63), 2**63 - 1, (-(-attention.numel() // LANES),), device=attention.device)
        lanes = draws.view(torch.int16)[: attention.numel()].view(attention.shape)
        return attention * (lanes >= drop_threshold(self.dropout_p) - LEVELS // 2)


def _segments(query_weights: Sequence[Tensor]) -> list[int]:
    return [weight.shape[-1] for weight in query_weights]
