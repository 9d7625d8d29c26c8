"""Launchers of channel attention in Triton: which kernel runs when, on what grid, in which tiles.

Forward: Gram matrices of the keys give the temperatures, then one kernel attends, and the heads are averaged. Backward:
one kernel for the query, one for key and value, then what instance norm subtracts from both.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from ..dropout import WORD, drop_threshold, keep_scale
from ..formats import has_aligned_rows
from ..launch import current_architecture, product_precision
from .saved import Saved, empty_heads_inside, key_and_value
from .triton_attention import (
    attention_forward_kernel,
    head_mean_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
)
from .triton_blocks import (
    AttentionBlocks,
    GramBlocks,
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
from .triton_tiles import map_of

LONGEST_UNALIGNED = 256  # tokens; for more, only rows that start on 16 bytes leave enough registers


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """Launch (B, H, N, sum C), (B, H, N, S), (B, H, N, S) -> (B, N, sum C), and after it :class:`Saved`."""
    batch, heads, tokens, channels = query.shape
    key_channels = key.shape[-1]
    output = query.new_empty(batch, tokens, channels)
    saved = Saved.empty(query, key, dropout_p)
    if batch == 0:
        return output, *saved
    if tokens > LONGEST_UNALIGNED:
        query, key, value = (tensor if has_aligned_rows(tensor) else tensor.clone() for tensor in (query, key, value))
    queries, keys = map_of(query), map_of(key)
    problem = _problem(query, key, value)
    sizes = {"heads": heads, "tokens": tokens}
    scales = _scales(segments)
    precision = product_precision(query.dtype)

    # 1. The mean of each channel over the tokens, which the Gram matrices are centred by.
    for values, means in ((queries, saved.query_token_means), (keys, saved.key_token_means)):
        token_mean_kernel[(triton.cdiv(means.shape[-1], 64), batch * heads)](
            values=values,
            token_mean_ptr=means,
            **sizes,
            CHANNELS=means.shape[-1],
            BLOCK_N=64,
            BLOCK_C=64,
            num_warps=4,
        )
    # 2. Gram matrix of the keys, and each scale's variance of the scores, one share for each pair of token blocks.
    gram = gram_blocks(problem)
    gram_options = {"BLOCK_N": gram.tokens, "BLOCK_K": gram.channels, "PRECISION": precision} | _launch_options(gram)
    token_blocks = triton.cdiv(tokens + 1, gram.tokens)
    pairs = token_blocks * token_blocks
    key_gram_kernel[(pairs, batch * heads)](
        keys=keys,
        token_mean_ptr=saved.key_token_means,
        key_gram_ptr=saved.key_gram,
        key_mean_ptr=saved.key_means,
        **sizes,
        KEY_CHANNELS=key_channels,
        **gram_options,
    )
    partials = query.new_empty(batch * heads, pairs, len(segments), dtype=torch.float32)
    score_variance_kernel[(pairs, len(segments), batch * heads)](
        queries=queries,
        token_mean_ptr=saved.query_token_means,
        key_gram_ptr=saved.key_gram,
        key_mean_ptr=saved.key_means,
        partial_ptr=partials,
        **sizes,
        CHANNELS=channels,
        KEY_CHANNELS=key_channels,
        **scales,
        **gram_options,
    )
    # 3. The temperature of each row, and the keys of its dropout mask.
    block_rows = min(256, triton.next_power_of_2(channels))
    temperature_kernel[(triton.cdiv(channels, block_rows), batch * heads)](
        partial_ptr=partials,
        seed_ptr=seed if dropout_p > 0 else None,
        temperature_ptr=saved.temperatures,
        row_key_ptr=saved.row_keys,
        pairs=pairs,
        rows=batch * heads * channels,
        eps=eps,
        KEY_CHANNELS=key_channels,
        CHANNELS=channels,
        **scales,
        BLOCKS=token_blocks,
        BLOCK_PAIRS=triton.next_power_of_2(pairs),
        BLOCK_C=block_rows,
        num_warps=4,
    )
    # 4. Attention of each head, and the mean over heads.
    blocks = forward_blocks(problem)
    attention_forward_kernel[(triton.cdiv(channels, blocks.own), batch * heads)](
        queries=queries,
        keys=keys,
        values=map_of(value),
        temperature_ptr=saved.temperatures,
        head_output_ptr=saved.head_outputs,
        log_sum_ptr=saved.log_sums,
        **sizes,
        **_dropout(saved, dropout_p),
        CHANNELS=channels,
        KEY_CHANNELS=key_channels,
        **_token_tiles(problem),
        BLOCK_C=blocks.own,
        BLOCK_S=blocks.step,
        PRECISION=precision,
        **_launch_options(blocks),
    )
    elements = tokens * channels
    head_mean_kernel[(triton.cdiv(elements, 1024), batch)](
        saved.head_outputs, output, heads, elements, BLOCK=1024, num_warps=4
    )
    return output, *saved


def forward_packed(query: Tensor, key_value: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    """Run :func:`forward` with key and value in one tensor (B, N, 2, H, S)."""
    return forward(query, *key_and_value(key_value), *settings)


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *saved_and_settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, heads inside the tokens, for a gradient (B, N, sum C)."""
    gradients = empty_heads_inside(query), empty_heads_inside(key), empty_heads_inside(value)
    _write_gradients(gradient, query, key, value, *saved_and_settings, *gradients)
    return gradients


def backward_packed(
    gradient: Tensor, query: Tensor, key_value: Tensor, *saved_and_settings: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query, heads inside the tokens, and of key and value in one tensor (B, N, 2, H, S)."""
    grad_query, grad_key_value = empty_heads_inside(query), key_value.new_empty(key_value.shape)
    gradients = grad_query, *key_and_value(grad_key_value)
    _write_gradients(gradient, query, *key_and_value(key_value), *saved_and_settings, *gradients)
    return grad_query, grad_key_value


def _write_gradients(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> None:
    """Write the gradients into tensors whose channels are adjacent."""
    *saved, segments, dropout_p, grad_query, grad_key, grad_value = arguments
    saved = Saved(*saved)
    batch, heads, tokens, channels = query.shape
    key_channels = key.shape[-1]
    if batch == 0:
        return
    queries, keys, values, gradients = map(map_of, (query, key, value, gradient))
    grad_queries, grad_keys, grad_values = map(map_of, (grad_query, grad_key, grad_value))
    problem = _problem(query, key, value, gradient)
    sizes = {"heads": heads, "tokens": tokens}
    precision = product_precision(query.dtype)
    delta, slopes, row_means, weights, offsets = (torch.empty_like(saved.log_sums) for _ in range(5))

    # 1. The gradients that attention has without its instance norm: of the query, then of key and value.
    blocks = query_gradient_blocks(problem)
    query_gradient_kernel[(triton.cdiv(channels, blocks.own), batch * heads)](
        gradients=gradients,
        queries=queries,
        keys=keys,
        values=values,
        head_output_ptr=saved.head_outputs,
        query_mean_ptr=saved.query_token_means,
        key_mean_ptr=saved.key_means,
        temperature_ptr=saved.temperatures,
        log_sum_ptr=saved.log_sums,
        grad_queries=grad_queries,
        delta_ptr=delta,
        slope_ptr=slopes,
        row_mean_ptr=row_means,
        **sizes,
        **_dropout(saved, dropout_p),
        CHANNELS=channels,
        KEY_CHANNELS=key_channels,
        **_token_tiles(problem),
        BLOCK_C=blocks.own,
        BLOCK_S=blocks.step,
        PRECISION=precision,
        **_launch_options(blocks),
    )
    blocks = key_value_gradient_blocks(problem)
    key_value_gradient_kernel[(triton.cdiv(key_channels, blocks.own), batch * heads)](
        gradients=gradients,
        queries=queries,
        keys=keys,
        values=values,
        temperature_ptr=saved.temperatures,
        log_sum_ptr=saved.log_sums,
        delta_ptr=delta,
        grad_keys=grad_keys,
        grad_values=grad_values,
        **sizes,
        **_dropout(saved, dropout_p),
        CHANNELS=channels,
        KEY_CHANNELS=key_channels,
        ALL_CHANNELS=triton.next_power_of_2(channels),
        **_token_tiles(problem),
        BLOCK_C=blocks.step,
        BLOCK_S=blocks.own,
        PRECISION=precision,
        **_launch_options(blocks),
    )
    # 2. What instance norm subtracts: coefficients of each row, and the weighted Gram matrix of the queries.
    coefficient_kernel[(batch * heads,)](
        temperature_ptr=saved.temperatures,
        slope_ptr=slopes,
        row_mean_ptr=row_means,
        weight_ptr=weights,
        offset_ptr=offsets,
        KEY_CHANNELS=key_channels,
        CHANNELS=channels,
        **_scales(segments),
        BLOCK_C=triton.next_power_of_2(channels),
        num_warps=4,
    )
    gram = gram_blocks(problem)
    gram_precision = _gram_precision(query.dtype)
    query_gram, query_sums = torch.empty_like(saved.key_gram), torch.empty_like(saved.key_means)
    token_blocks = triton.cdiv(tokens + 1, gram.tokens)
    query_gram_kernel[(token_blocks * token_blocks, batch * heads)](
        queries=queries,
        token_mean_ptr=saved.query_token_means,
        weight_ptr=weights,
        offset_ptr=offsets,
        query_gram_ptr=query_gram,
        query_sum_ptr=query_sums,
        **sizes,
        CHANNELS=channels,
        BLOCK_N=gram.tokens,
        BLOCK_K=gram.channels,
        PRECISION=gram_precision,
        **_launch_options(gram),
    )
    # 3. The corrections, in place.
    tile = correction_blocks(problem)
    token_blocks = triton.cdiv(tokens, tile.tokens)
    query_correction_kernel[(triton.cdiv(channels, tile.channels), token_blocks, batch * heads)](
        queries=queries,
        token_mean_ptr=saved.query_token_means,
        key_gram_ptr=saved.key_gram,
        key_mean_ptr=saved.key_means,
        weight_ptr=weights,
        offset_ptr=offsets,
        grad_queries=grad_queries,
        **sizes,
        KEY_CHANNELS=key_channels,
        CHANNELS=channels,
        BLOCK_C=tile.channels,
        BLOCK_N=tile.tokens,
        PRECISION=gram_precision,
        **_launch_options(tile),
    )
    key_correction_kernel[(triton.cdiv(key_channels, tile.channels), token_blocks, batch * heads)](
        keys=keys,
        token_mean_ptr=saved.key_token_means,
        query_gram_ptr=query_gram,
        query_sum_ptr=query_sums,
        key_mean_ptr=saved.key_means,
        grad_keys=grad_keys,
        **sizes,
        KEY_CHANNELS=key_channels,
        BLOCK_S=tile.channels,
        BLOCK_N=tile.tokens,
        PRECISION=gram_precision,
        **_launch_options(tile),
    )


def _problem(query: Tensor, *others: Tensor) -> Problem:
    batch, heads, tokens, channels = query.shape
    return Problem(batch * heads, tokens, channels, query.dtype, has_aligned_rows(query, *others))


def _scales(segments: Sequence[int]) -> dict[str, tuple[int, ...]]:
    starts = tuple(accumulate(segments, initial=0))[:-1]
    return {"SEGMENTS": tuple(segments), "SEGMENT_STARTS": starts}


def _token_tiles(problem: Problem) -> dict[str, tuple[int, ...]]:
    tiles = token_tiles(problem)
    return {"TOKEN_TILES": tiles, "TOKEN_STARTS": tuple(accumulate(tiles, initial=0))[:-1]}


def _dropout(saved: Saved, dropout_p: float) -> dict[str, Any]:
    return {
        "row_key_ptr": saved.row_keys if dropout_p > 0 else None,
        "rows": saved.temperatures.numel(),
        "threshold": drop_threshold(dropout_p) - WORD // 2,  # hash from which on an entry is kept, as int32
        "keep_factor": keep_scale(dropout_p),
    }


def _launch_options(blocks: AttentionBlocks | GramBlocks) -> dict[str, int]:
    return {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}


def _gram_precision(dtype: torch.dtype) -> str:
    """Return tf32 for the float32 Gram matrices of float16 tensors: it has as many digits as float16."""
    if dtype == torch.float16:
        return "tf32" if current_architecture().family == "cuda" else "ieee"
    return product_precision(dtype)
