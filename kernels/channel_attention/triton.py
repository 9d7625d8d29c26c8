"""Channel attention in Triton: scores, softmax, dropout and mixing in one kernel, no map in memory.

A program owns a tile of query channels (or of key channels, for the gradients of key and value) and runs over the
channels of the other side, as flash attention runs over a sequence; the tokens are what it calls the head dimension.
Their number is no power of two (196 at 224 pixels), so the token axis is a tuple of tiles, such as 128 + 64 + 16, and
every tensor with that axis is a tuple of tiles as well.

A tile's rows may belong to several scales: each row brings its own temperature, and no kernel here knows the segments.

B batch, H heads, N tokens, C query channels of all scales, S key channels; programs of one head lie next to each other,
so that its keys and values are read from the L2 cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import WORD, drop_threshold, keep_scale
from ..launching import product_precision
from .explicit import Saved, gram_dtype
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
)

ALIGNMENT = 16  # bytes that one thread reads at once


@triton.jit
def attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    temperature_ptr,
    row_key_ptr,
    head_output_ptr,
    log_sum_ptr,
    stride_query_b,
    stride_query_h,
    stride_query_n,
    stride_query_c,
    stride_key_b,
    stride_key_h,
    stride_key_n,
    stride_key_s,
    stride_value_b,
    stride_value_h,
    stride_value_n,
    stride_value_s,
    heads,
    tokens,
    rows,
    threshold,
    keep_factor,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    TOKEN_STARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output of one head for a tile of query channels, and the logarithms of its softmax's sums."""
    pid_c, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    query_ptr += batch * stride_query_b + head * stride_query_h
    key_ptr += batch * stride_key_b + head * stride_key_h
    value_ptr += batch * stride_value_b + head * stride_value_h
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid_bh * CHANNELS + offs_c
    # Exponentials are powers of two, so the temperature takes the factor log2(e).
    scale = tl.load(temperature_ptr + row, mask=offs_c < CHANNELS, other=1.0) * 1.4426950408889634
    query = _load_rows(
        query_ptr, stride_query_c, stride_query_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_C, tokens]
    mixed = _zero_tiles(BLOCK_C, TOKEN_TILES)
    maximum = tl.full([BLOCK_C], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, KEY_CHANNELS, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        key = _load_columns(
            key_ptr, stride_key_s, stride_key_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_S]
        scores = _contract(query, key, PRECISION)  # [BLOCK_C, BLOCK_S]
        if KEY_CHANNELS % BLOCK_S != 0:
            scores = tl.where((offs_s < KEY_CHANNELS)[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
        exponential = tl.exp2(scores * scale[:, None] - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(exponential, axis=1)
        maximum = new_maximum
        if row_key_ptr is not None:
            keep = _keep_rows(row_key_ptr, row, offs_c < CHANNELS, offs_s, rows, threshold)
            exponential = tl.where(keep, exponential, 0.0)
        value = _load_rows(
            value_ptr, stride_value_s, stride_value_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [BLOCK_S, tokens]
        mixed = _shrink_and_accumulate(mixed, shrink, exponential.to(value[0].dtype), value, PRECISION)
    tl.store(log_sum_ptr + row, maximum + tl.log2(total), mask=offs_c < CHANNELS)
    _store_rows(
        head_output_ptr + pid_bh * tokens * CHANNELS,
        CHANNELS,
        mixed,
        keep_factor / total,
        offs_c,
        tokens,
        CHANNELS,
        TOKEN_TILES,
        TOKEN_STARTS,
    )


@triton.jit
def head_mean_kernel(head_output_ptr, output_ptr, heads, elements, BLOCK: tl.constexpr):
    """Mean over heads: (B, H, elements) -> (B, elements)."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    batch = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(heads):
        total += tl.load(head_output_ptr + (batch * heads + head) * elements + offs, mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(output_ptr + batch * elements + offs, (total / heads).to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def query_gradient_kernel(
    gradient_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    head_output_ptr,
    key_mean_ptr,
    temperature_ptr,
    log_sum_ptr,
    row_key_ptr,
    mixed_key_ptr,
    delta_ptr,
    slope_ptr,
    row_mean_ptr,
    stride_gradient_b,
    stride_gradient_n,
    stride_gradient_c,
    stride_query_b,
    stride_query_h,
    stride_query_n,
    stride_query_c,
    stride_key_b,
    stride_key_h,
    stride_key_n,
    stride_key_s,
    stride_value_b,
    stride_value_h,
    stride_value_n,
    stride_value_s,
    stride_mixed_b,
    stride_mixed_h,
    stride_mixed_n,
    heads,
    tokens,
    rows,
    threshold,
    keep_factor,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    TOKEN_STARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For a tile of query channels: keys mixed by the gradient of the logits, and what the later kernels need by row.

    ``delta``: inner product of a row of the softmax with its gradient. ``slope``: inner product of a row's scores with
    their gradient. ``row_mean``: mean score of a row.
    """
    pid_c, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    gradient_ptr += batch * stride_gradient_b
    query_ptr += batch * stride_query_b + head * stride_query_h
    key_ptr += batch * stride_key_b + head * stride_key_h
    value_ptr += batch * stride_value_b + head * stride_value_h
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    row = pid_bh * CHANNELS + offs_c
    scale = tl.load(temperature_ptr + row, mask=mask_c, other=0.0) * 1.4426950408889634
    log_sum = tl.load(log_sum_ptr + row, mask=mask_c, other=0.0)
    query = _load_rows(
        query_ptr, stride_query_c, stride_query_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_C, tokens]
    gradient = _load_rows(
        gradient_ptr, stride_gradient_c, stride_gradient_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_C, tokens]
    head_output = _load_rows(
        head_output_ptr + pid_bh * tokens * CHANNELS, 1, CHANNELS, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_C, tokens]
    delta = _inner_products(gradient, head_output) / heads  # [BLOCK_C]
    mixed_keys = _zero_tiles(BLOCK_C, TOKEN_TILES)
    for start in range(0, KEY_CHANNELS, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        key = _load_columns(
            key_ptr, stride_key_s, stride_key_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_S]
        value = _load_columns(
            value_ptr, stride_value_s, stride_value_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_S]
        softmax = tl.exp2(_contract(query, key, PRECISION) * scale[:, None] - log_sum[:, None])  # [BLOCK_C, BLOCK_S]
        if KEY_CHANNELS % BLOCK_S != 0:
            softmax = tl.where((offs_s < KEY_CHANNELS)[None, :], softmax, 0.0)
        softmax_gradient = _contract(gradient, value, PRECISION) * (keep_factor / heads)
        if row_key_ptr is not None:
            keep = _keep_rows(row_key_ptr, row, mask_c, offs_s, rows, threshold)
            softmax_gradient = tl.where(keep, softmax_gradient, 0.0)
        logit_gradient = (softmax * (softmax_gradient - delta[:, None])).to(key[0].dtype)
        mixed_keys = _accumulate_transposed(mixed_keys, logit_gradient, key, PRECISION)
    tl.store(delta_ptr + row, delta, mask=mask_c)
    tl.store(slope_ptr + row, _inner_products(mixed_keys, query), mask=mask_c)
    row_mean = _weighted_sums(query, key_mean_ptr + pid_bh * tokens, tokens, TOKEN_TILES, TOKEN_STARTS)
    tl.store(row_mean_ptr + row, row_mean, mask=mask_c)
    _store_rows(
        mixed_key_ptr + batch * stride_mixed_b + head * stride_mixed_h,
        stride_mixed_n,
        mixed_keys,
        tl.full([BLOCK_C], 1.0, tl.float32),
        offs_c,
        tokens,
        CHANNELS,
        TOKEN_TILES,
        TOKEN_STARTS,
    )


@triton.jit
def key_value_gradient_kernel(
    gradient_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    temperature_ptr,
    log_sum_ptr,
    delta_ptr,
    row_key_ptr,
    grad_key_ptr,
    grad_value_ptr,
    stride_gradient_b,
    stride_gradient_n,
    stride_gradient_c,
    stride_query_b,
    stride_query_h,
    stride_query_n,
    stride_query_c,
    stride_key_b,
    stride_key_h,
    stride_key_n,
    stride_key_s,
    stride_value_b,
    stride_value_h,
    stride_value_n,
    stride_value_s,
    stride_grad_b,
    stride_grad_h,
    stride_grad_n,
    heads,
    tokens,
    rows,
    threshold,
    keep_factor,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    TOKEN_STARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For a tile of key channels: gradient of value, and queries mixed by the gradient of the scaled logits.

    Scores are computed transposed, ``K^T Q``: transposing a product just made has been miscompiled on Hopper.
    """
    pid_s, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    gradient_ptr += batch * stride_gradient_b
    query_ptr += batch * stride_query_b + head * stride_query_h
    key_ptr += batch * stride_key_b + head * stride_key_h
    value_ptr += batch * stride_value_b + head * stride_value_h
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    key = _load_rows(
        key_ptr, stride_key_s, stride_key_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_S, tokens]
    value = _load_rows(
        value_ptr, stride_value_s, stride_value_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_S, tokens]
    grad_key = _zero_tiles(BLOCK_S, TOKEN_TILES)
    grad_value = _zero_tiles(BLOCK_S, TOKEN_TILES)
    for start in range(0, CHANNELS, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < CHANNELS
        row = pid_bh * CHANNELS + offs_c
        temperature = tl.load(temperature_ptr + row, mask=mask_c, other=0.0)
        log_sum = tl.load(log_sum_ptr + row, mask=mask_c, other=0.0)
        delta = tl.load(delta_ptr + row, mask=mask_c, other=0.0)
        query = _load_columns(
            query_ptr, stride_query_c, stride_query_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_C]
        gradient = _load_columns(
            gradient_ptr, stride_gradient_c, stride_gradient_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_C]
        scores = _contract(key, query, PRECISION)  # [BLOCK_S, BLOCK_C]
        softmax = tl.exp2(scores * (temperature * 1.4426950408889634)[None, :] - log_sum[None, :])
        softmax_gradient = _contract(value, gradient, PRECISION) * (keep_factor / heads)
        attention = softmax
        if row_key_ptr is not None:
            keep = _keep_columns(row_key_ptr, row, mask_c, offs_s, rows, threshold)
            attention = tl.where(keep, softmax, 0.0)
            softmax_gradient = tl.where(keep, softmax_gradient, 0.0)
        grad_value = _accumulate_transposed(grad_value, attention.to(gradient[0].dtype), gradient, PRECISION)
        score_gradient = softmax * (softmax_gradient - delta[None, :]) * temperature[None, :]
        grad_key = _accumulate_transposed(grad_key, score_gradient.to(query[0].dtype), query, PRECISION)
    place = batch * stride_grad_b + head * stride_grad_h
    ones = tl.full([BLOCK_S], 1.0, tl.float32)
    _store_rows(
        grad_key_ptr + place, stride_grad_n, grad_key, ones, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )
    _store_rows(
        grad_value_ptr + place,
        stride_grad_n,
        grad_value,
        ones * (keep_factor / heads),
        offs_s,
        tokens,
        KEY_CHANNELS,
        TOKEN_TILES,
        TOKEN_STARTS,
    )


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _zero_tiles(ROWS: tl.constexpr, TOKEN_TILES: tl.constexpr):
    tiles = ()
    for t in tl.static_range(len(TOKEN_TILES)):
        tiles = tiles + (_zeros(ROWS, TOKEN_TILES[t]),)
    return tiles


@triton.jit
def _load_rows(
    base_ptr, stride_c, stride_n, offs_c, tokens, CHANNELS: tl.constexpr, TILES: tl.constexpr, STARTS: tl.constexpr
):
    """Tiles [channels, tokens], zero outside."""
    tiles = ()
    for t in tl.static_range(len(TILES)):
        offs_n = STARTS[t] + tl.arange(0, TILES[t])
        mask = (offs_c < CHANNELS)[:, None] & (offs_n < tokens)[None, :]
        tile = tl.load(base_ptr + offs_c[:, None] * stride_c + offs_n[None, :] * stride_n, mask=mask, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _load_columns(
    base_ptr, stride_c, stride_n, offs_c, tokens, CHANNELS: tl.constexpr, TILES: tl.constexpr, STARTS: tl.constexpr
):
    """Tiles [tokens, channels], zero outside."""
    tiles = ()
    for t in tl.static_range(len(TILES)):
        offs_n = STARTS[t] + tl.arange(0, TILES[t])
        mask = (offs_n < tokens)[:, None] & (offs_c < CHANNELS)[None, :]
        tile = tl.load(base_ptr + offs_n[:, None] * stride_n + offs_c[None, :] * stride_c, mask=mask, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _store_rows(
    base_ptr,
    stride_n,
    tiles,
    factors,
    offs_c,
    tokens,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    STARTS: tl.constexpr,
):
    """Write tiles [channels, tokens], each row times its factor, where channels lie next to each other."""
    for t in tl.static_range(len(TILES)):
        offs_n = STARTS[t] + tl.arange(0, TILES[t])
        mask = (offs_c < CHANNELS)[:, None] & (offs_n < tokens)[None, :]
        tile = (tiles[t] * factors[:, None]).to(base_ptr.dtype.element_ty)
        tl.store(base_ptr + offs_c[:, None] + offs_n[None, :] * stride_n, tile, mask=mask)


@triton.jit
def _contract(rows, columns, PRECISION: tl.constexpr):
    """Sum of products over the tokens: tiles [M, tokens], tiles [tokens, K] -> [M, K]."""
    product = tl.dot(rows[0], columns[0], input_precision=PRECISION)
    for t in tl.static_range(1, len(rows)):
        product = tl.dot(rows[t], columns[t], product, input_precision=PRECISION)
    return product


@triton.jit
def _shrink_and_accumulate(tiles, shrink, weights, values, PRECISION: tl.constexpr):
    """``tiles * shrink + weights values``: tiles [M, tokens], [M, K], tiles [K, tokens]."""
    new_tiles = ()
    for t in tl.static_range(len(tiles)):
        tile = tl.dot(weights, values[t], tiles[t] * shrink[:, None], input_precision=PRECISION)
        new_tiles = new_tiles + (tile,)
    return new_tiles


@triton.jit
def _accumulate_transposed(tiles, weights, columns, PRECISION: tl.constexpr):
    """``tiles + weights columns^T``: tiles [M, tokens], [M, K], tiles [tokens, K]."""
    new_tiles = ()
    for t in tl.static_range(len(tiles)):
        new_tiles = new_tiles + (tl.dot(weights, tl.trans(columns[t]), tiles[t], input_precision=PRECISION),)
    return new_tiles


@triton.jit
def _inner_products(rows, other_rows):
    """Row by row over the tokens: two tuples of tiles [M, tokens] -> [M]."""
    total = tl.sum(rows[0].to(tl.float32) * other_rows[0].to(tl.float32), axis=1)
    for t in tl.static_range(1, len(rows)):
        total += tl.sum(rows[t].to(tl.float32) * other_rows[t].to(tl.float32), axis=1)
    return total


@triton.jit
def _weighted_sums(rows, weight_ptr, tokens, TILES: tl.constexpr, STARTS: tl.constexpr):
    """Sum over the tokens of tiles [M, tokens], each token times its weight in memory -> [M]."""
    total = tl.zeros([rows[0].shape[0]], tl.float32)
    for t in tl.static_range(len(TILES)):
        offs_n = STARTS[t] + tl.arange(0, TILES[t])
        weights = tl.load(weight_ptr + offs_n, mask=offs_n < tokens, other=0.0)
        total += tl.sum(rows[t].to(tl.float32) * weights[None, :], axis=1)
    return total


@triton.jit
def _keep_rows(row_key_ptr, row, mask, offs_column, rows, threshold):
    """Dropout mask [rows, columns]."""
    first, second = _load_row_keys(row_key_ptr, row, mask, rows)
    return _hash(first[:, None], second[:, None], offs_column[None, :]) >= threshold


@triton.jit
def _keep_columns(row_key_ptr, row, mask, offs_column, rows, threshold):
    """The same mask transposed, [columns, rows]."""
    first, second = _load_row_keys(row_key_ptr, row, mask, rows)
    return _hash(first[None, :], second[None, :], offs_column[:, None]) >= threshold


@triton.jit
def _load_row_keys(row_key_ptr, row, mask, rows):
    first = tl.load(row_key_ptr + row, mask=mask, other=0).to(tl.uint32, bitcast=True)
    second = tl.load(row_key_ptr + rows + row, mask=mask, other=0).to(tl.uint32, bitcast=True)
    return first, second


@triton.jit
def _hash(first, second, column):
    """The 32-bit word of an entry, see kernels/dropout.py, moved to the range of int32 in its order."""
    word = column.to(tl.uint32) * 0x9E3779B9 + first
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15) ^ second) * 0xD35A2D97
    return (word ^ 0x80000000).to(tl.int32, bitcast=True)


def forward(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[int], dropout_p: float, eps: float, seed: Tensor
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
        key_gram=query.new_empty(batch, heads, tokens, tokens, dtype=gram_dtype(query.dtype)),
        key_means=torch.empty(batch, heads, tokens, **statistic),
        row_keys=torch.empty(
            (2, batch, heads, channels) if dropout_p > 0 else 0, dtype=torch.int32, device=query.device
        ),
    )
    if rows == 0:
        return output, saved
    problem = _problem(query, key, value)
    shape = _segment_arguments(segments, channels, key_channels)
    precision = product_precision(query.dtype)

    gram = gram_blocks(problem)
    token_blocks = triton.cdiv(tokens, gram.tokens)
    pairs = token_blocks * token_blocks
    partials = torch.empty(batch * heads, pairs, len(segments), **statistic)
    gram_tiles = {"BLOCK_N": gram.tokens, "BLOCK_K": gram.channels, "PRECISION": precision}
    gram_launch = {"num_warps": gram.num_warps, "num_stages": gram.num_stages}
    key_gram_kernel[(pairs, batch * heads)](
        key,
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
        saved.key_gram,
        saved.key_means,
        partials,
        *query.stride(),
        heads,
        tokens,
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
    token_blocks = triton.cdiv(tokens, gram.tokens)
    query_gram_kernel[(token_blocks * token_blocks, batch * heads)](
        query,
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
        PRECISION=precision,
        num_warps=gram.num_warps,
        num_stages=gram.num_stages,
    )
    tile = correction_blocks(problem)
    query_correction_kernel[(triton.cdiv(channels, tile.channels), triton.cdiv(tokens, tile.tokens), batch * heads)](
        query,
        saved.key_gram,
        saved.key_means,
        saved.temperatures,
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
    is_aligned = all(
        (tensor.storage_offset() * tensor.itemsize) % ALIGNMENT == 0
        and tensor.stride(-1) == 1
        and all((stride * tensor.itemsize) % ALIGNMENT == 0 for stride in tensor.stride()[:-1])
        for tensor in (query, *others)
    )
    return Problem(batch * heads, tokens, channels, query.dtype, is_aligned)


def _token_arguments(problem: Problem) -> dict[str, tuple[int, ...]]:
    tiles = token_tiles(problem)
    return {"TOKEN_TILES": tiles, "TOKEN_STARTS": tuple(sum(tiles[:place]) for place in range(len(tiles)))}


def _gram_precision(dtype: torch.dtype) -> str:
    """Gram matrices of float16 tensors are float32, and are multiplied as tf32, which has as many digits as float16."""
    return "tf32" if dtype == torch.float16 else product_precision(dtype)


def _dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """The hash from which on an entry is kept, in the range of int32, and what kept entries are multiplied by."""
    return drop_threshold(dropout_p) - WORD // 2, keep_scale(dropout_p)
