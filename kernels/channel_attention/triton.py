"""Launchers of channel attention in Triton: which kernel runs when, on what grid, in which tiles.

Forward: Gram matrices of the keys give the temperatures, then one kernel attends, and the heads are averaged. Backward:
one kernel for the query, one for key and value, then what instance norm takes out of the two.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..dropout import WORD, drop_threshold, keep_scale
from ..launch import current_architecture, product_precision
from .dispatch import has_aligned_rows
from .explicit import Saved, gram_dtype
from .triton_attention import (
    attention_forward_kernel,
    head_mean_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
)
from .triton_blocks import (
    Problem,
    correction_blocks,
    forward_blocks,
    gram_blocks,
    key_value_gradient_blocks,
    query_gradient_blocks,
    token_tiles,
)
from .triton_statistics import (
    coefficient_kernel,
    key_correction_kernel,
    key_gram_kernel,
    query_correction_kernel,
    query_gram_kernel,
    score_variance_kernel,
    temperature_kernel,
    token_mean_kernel,
)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> tuple[Tensor, Saved]:
    """(B, H, N, sum C), (B, H, N, S), (B, H, N, S) -> (B, N, sum C) and what backward needs."""
    batch, heads, tokens, channels = query.shape
    key_channels = key.shape[-1]
    rows = batch * heads * channels
    output = query.new_empty(batch, tokens, channels)
    statistic = {"dtype": torch.float32, "device": query.device}
    saved = Saved(
        head_outputs=query.new_empty(batch, heads, tokens, channels),
        temperatures=torch.empty(batch, heads, channels, **statistic),
        log_sums=torch.empty(batch, heads, channels, **statistic),
        query_token_means=torch.empty(batch, heads, channels, **statistic),
        key_token_means=torch.empty(batch, heads, key_channels, **statistic),
        key_gram=query.new_empty(batch, heads, tokens + 1, tokens + 1, dtype=gram_dtype(query.dtype)),
        key_means=torch.empty(batch, heads, tokens + 1, **statistic),
        row_keys=torch.empty(
            (2, batch, heads, channels) if dropout_p > 0 else 0, dtype=torch.int32, device=query.device
        ),
    )
    if rows == 0:
        return output, saved
    problem = _problem(query, key, value)
    shape = _segment_arguments(segments, channels, key_channels)
    precision = product_precision(query.dtype)

    for tensor, means in ((query, saved.query_token_means), (key, saved.key_token_means)):
        token_mean_kernel[(triton.cdiv(means.shape[-1], 64), batch * heads)](
            tensor,
            means,
            *tensor.stride(),
            heads,
            tokens,
            CHANNELS=means.shape[-1],
            BLOCK_N=64,
            BLOCK_C=64,
            num_warps=4,
        )
    gram = gram_blocks(problem)
    token_blocks = triton.cdiv(tokens + 1, gram.tokens)
    pairs = token_blocks * token_blocks
    partials = torch.empty(batch * heads, pairs, len(segments), **statistic)
    gram_tiles = {"BLOCK_N": gram.tokens, "BLOCK_K": gram.channels, "PRECISION": precision}
    gram_launch = {"num_warps": gram.num_warps, "num_stages": gram.num_stages}
    key_gram_kernel[(pairs, batch * heads)](
        key,
        saved.key_token_means,
        saved.key_gram,
        saved.key_means,
        *key.stride(),
        heads,
        tokens,
        KEY_CHANNELS=key_channels,
        **gram_tiles,
        **gram_launch,
    )
    score_variance_kernel[(pairs, len(segments), batch * heads)](
        query,
        saved.query_token_means,
        saved.key_gram,
        saved.key_means,
        partials,
        *query.stride(),
        heads,
        tokens,
        CHANNELS=channels,
        KEY_CHANNELS=key_channels,
        SEGMENTS=shape["SEGMENTS"],
        SEGMENT_STARTS=shape["SEGMENT_STARTS"],
        **gram_tiles,
        **gram_launch,
    )
    block_rows = min(256, triton.next_power_of_2(channels))
    temperature_kernel[(triton.cdiv(channels, block_rows), batch * heads)](
        partials,
        seed if dropout_p > 0 else None,
        saved.temperatures,
        saved.row_keys,
        pairs,
        rows,
        eps,
        **shape,
        BLOCKS=token_blocks,
        BLOCK_PAIRS=triton.next_power_of_2(pairs),
        BLOCK_C=block_rows,
        num_warps=4,
    )

    blocks = forward_blocks(problem)
    attention_forward_kernel[(triton.cdiv(channels, blocks.own), batch * heads)](
        query,
        key,
        value,
        saved.temperatures,
        saved.row_keys if dropout_p > 0 else None,
        saved.head_outputs,
        saved.log_sums,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        heads,
        tokens,
        rows,
        *_dropout_arguments(dropout_p),
        CHANNELS=channels,
        KEY_CHANNELS=key_channels,
        **_token_arguments(problem),
        BLOCK_C=blocks.own,
        BLOCK_S=blocks.step,
        PRECISION=precision,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    elements = tokens * channels
    head_mean_kernel[(triton.cdiv(elements, 1024), batch)](
        saved.head_outputs, output, heads, elements, BLOCK=1024, num_warps=4
    )
    return output, saved


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    segments: Sequence[int],
    dropout_p: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Gradient of (B, N, sum C) -> gradients of query, key and value, written into tensors whose channels are adjacent.

    ``grad_key`` and ``grad_value`` have the same strides.
    """
    batch, heads, tokens, channels = query.shape
    key_channels = key.shape[-1]
    rows = batch * heads * channels
    if rows == 0:
        return
    problem = _problem(query, key, value, gradient)
    shape = _segment_arguments(segments, channels, key_channels)
    precision = product_precision(query.dtype)
    row_keys = saved.row_keys if dropout_p > 0 else None
    delta, slopes, row_means, weights, offsets = (torch.empty_like(saved.log_sums) for _ in range(5))

    blocks = query_gradient_blocks(problem)
    query_gradient_kernel[(triton.cdiv(channels, blocks.own), batch * heads)](
        gradient,
        query,
        key,
        value,
        saved.head_outputs,
        saved.query_token_means,
        saved.key_means,
        saved.temperatures,
        saved.log_sums,
        row_keys,
        grad_query,
        delta,
        slopes,
        row_means,
        *gradient.stride(),
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *grad_query.stride()[:3],
        heads,
        tokens,
        rows,
        *_dropout_arguments(dropout_p),
        CHANNELS=channels,
        KEY_CHANNELS=key_channels,
        **_token_arguments(problem),
        BLOCK_C=blocks.own,
        BLOCK_S=blocks.step,
        PRECISION=precision,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    blocks = key_value_gradient_blocks(problem)
    key_value_gradient_kernel[(triton.cdiv(key_channels, blocks.own), batch * heads)](
        gradient,
        query,
        key,
        value,
        saved.temperatures,
        saved.log_sums,
        delta,
        row_keys,
        grad_key,
        grad_value,
        *gradient.stride(),
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *grad_key.stride()[:3],
        heads,
        tokens,
        rows,
        *_dropout_arguments(dropout_p),
        CHANNELS=channels,
        KEY_CHANNELS=key_channels,
        ALL_CHANNELS=triton.next_power_of_2(channels),
        **_token_arguments(problem),
        BLOCK_C=blocks.step,
        BLOCK_S=blocks.own,
        PRECISION=precision,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    coefficient_kernel[(batch * heads,)](
        saved.temperatures,
        slopes,
        row_means,
        weights,
        offsets,
        **shape,
        BLOCK_C=triton.next_power_of_2(channels),
        num_warps=4,
    )
    gram = gram_blocks(problem)
    gram_precision = _gram_precision(query.dtype)
    query_gram = torch.empty_like(saved.key_gram)
    query_sums = torch.empty_like(saved.key_means)
    token_blocks = triton.cdiv(tokens + 1, gram.tokens)
    query_gram_kernel[(token_blocks * token_blocks, batch * heads)](
        query,
        saved.query_token_means,
        weights,
        offsets,
        query_gram,
        query_sums,
        *query.stride(),
        heads,
        tokens,
        CHANNELS=channels,
        BLOCK_N=gram.tokens,
        BLOCK_K=gram.channels,
        PRECISION=gram_precision,
        num_warps=gram.num_warps,
        num_stages=gram.num_stages,
    )
    tile = correction_blocks(problem)
    query_correction_kernel[(triton.cdiv(channels, tile.channels), triton.cdiv(tokens, tile.tokens), batch * heads)](
        query,
        saved.query_token_means,
        saved.key_gram,
        saved.key_means,
        weights,
        offsets,
        grad_query,
        *query.stride(),
        *grad_query.stride(),
        heads,
        tokens,
        KEY_CHANNELS=key_channels,
        CHANNELS=channels,
        BLOCK_C=tile.channels,
        BLOCK_N=tile.tokens,
        PRECISION=gram_precision,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    key_correction_kernel[(triton.cdiv(key_channels, tile.channels), triton.cdiv(tokens, tile.tokens), batch * heads)](
        key,
        saved.key_token_means,
        query_gram,
        query_sums,
        saved.key_means,
        grad_key,
        *key.stride(),
        *grad_key.stride(),
        heads,
        tokens,
        KEY_CHANNELS=key_channels,
        BLOCK_S=tile.channels,
        BLOCK_N=tile.tokens,
        PRECISION=gram_precision,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _segment_arguments(segments: Sequence[int], channels: int, key_channels: int) -> dict[str, Any]:
    starts = [sum(segments[:place]) for place in range(len(segments))]
    return {
        "KEY_CHANNELS": key_channels,
        "CHANNELS": channels,
        "SEGMENTS": tuple(segments),
        "SEGMENT_STARTS": tuple(starts),
    }


def _problem(query: Tensor, *others: Tensor) -> Problem:
    batch, heads, tokens, channels = query.shape
    is_aligned = has_aligned_rows(query, *others)
    return Problem(batch * heads, tokens, channels, query.dtype, is_aligned)


def _token_arguments(problem: Problem) -> dict[str, tuple[int, ...]]:
    tiles = token_tiles(problem)
    return {"TOKEN_TILES": tiles, "TOKEN_STARTS": tuple(sum(tiles[:place]) for place in range(len(tiles)))}


def _gram_precision(dtype: torch.dtype) -> str:
    """Gram matrices of float16 tensors are float32, and are multiplied as tf32, which has as many digits as float16."""
    if dtype == torch.float16:
        return "tf32" if current_architecture().family == "cuda" else "ieee"
    return product_precision(dtype)


def _dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """The hash from which on an entry is kept, in the range of int32, and what kept entries are multiplied by."""
    return drop_threshold(dropout_p) - WORD // 2, keep_scale(dropout_p)
