"""Triton kernels of channel attention: scores, softmax, dropout and mixing in one, no map in memory.

A program owns a tile of query channels (or of key channels, for the gradients of key and value) and runs over the
channels of the other side, as flash attention runs over a sequence; the tokens are its head dimension.
Their number is no power of two (196 at 224 pixels), so the token axis is a tuple of tiles, such as 128 + 64 + 16, and
every tensor with that axis is a tuple of tiles as well.

A tile's rows may belong to several scales: each row brings its own temperature, and no kernel here knows the segments.

B batch, H heads, N tokens, C query channels of all scales, S key channels; programs of one head lie next to each other,
so that its keys and values are read from the L2 cache.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    accumulate_transposed,
    contract,
    inner_products,
    keep_columns,
    keep_rows,
    load_columns,
    load_rows,
    shrink_and_accumulate,
    store_rows,
    subtract_outer,
    weighted_sums,
    zero_tiles,
)


@triton.jit
def attention_forward_kernel(
    queries,
    keys,
    values,
    temperature_ptr,
    row_key_ptr,
    head_output_ptr,
    log_sum_ptr,
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
    """Write the output of one head for a tile of query channels, and the logarithms of its softmax's sums."""
    pid_c, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    query_ptr = queries.ptr + batch * queries.stride_b + head * queries.stride_h
    key_ptr = keys.ptr + batch * keys.stride_b + head * keys.stride_h
    value_ptr = values.ptr + batch * values.stride_b + head * values.stride_h
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid_bh * CHANNELS + offs_c
    # Exponentials are powers of two, so the temperature takes the factor log2(e).
    scale = tl.load(temperature_ptr + row, mask=offs_c < CHANNELS, other=1.0) * 1.4426950408889634
    query = load_rows(
        query_ptr, queries.stride_c, queries.stride_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_C, tokens]
    mixed = zero_tiles(BLOCK_C, TOKEN_TILES)
    maximum = tl.full([BLOCK_C], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, KEY_CHANNELS, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        key = load_columns(
            key_ptr, keys.stride_c, keys.stride_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_S]
        scores = contract(query, key, PRECISION)  # [BLOCK_C, BLOCK_S]
        if KEY_CHANNELS % BLOCK_S != 0:
            scores = tl.where((offs_s < KEY_CHANNELS)[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
        exponential = tl.exp2(scores * scale[:, None] - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(exponential, axis=1)
        maximum = new_maximum
        if row_key_ptr is not None:
            keep = keep_rows(row_key_ptr, row, offs_c < CHANNELS, offs_s, rows, threshold)
            exponential = tl.where(keep, exponential, 0.0)
        value = load_rows(
            value_ptr, values.stride_c, values.stride_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [BLOCK_S, tokens]
        mixed = shrink_and_accumulate(mixed, shrink, exponential.to(value[0].dtype), value, PRECISION)
    tl.store(log_sum_ptr + row, maximum + tl.log2(total), mask=offs_c < CHANNELS)
    store_rows(
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
    """Take the mean over heads: (B, H, elements) -> (B, elements)."""
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
    gradients,
    queries,
    keys,
    values,
    head_output_ptr,
    query_mean_ptr,
    key_mean_ptr,
    temperature_ptr,
    log_sum_ptr,
    row_key_ptr,
    grad_queries,
    delta_ptr,
    slope_ptr,
    row_mean_ptr,
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
    """Write the keys mixed by the gradient of the scores, and vectors that later kernels need, for query channels.

    ``delta``: inner product of a row of the softmax with its gradient. ``slope``: inner product of a row's scores with
    their gradient. ``row_mean``: mean score of a row.
    """
    pid_c, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    gradient_ptr = gradients.ptr + batch * gradients.stride_b
    query_ptr = queries.ptr + batch * queries.stride_b + head * queries.stride_h
    key_ptr = keys.ptr + batch * keys.stride_b + head * keys.stride_h
    value_ptr = values.ptr + batch * values.stride_b + head * values.stride_h
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    row = pid_bh * CHANNELS + offs_c
    temperature = tl.load(temperature_ptr + row, mask=mask_c, other=0.0)
    scale = temperature * 1.4426950408889634
    log_sum = tl.load(log_sum_ptr + row, mask=mask_c, other=0.0)
    query = load_rows(
        query_ptr, queries.stride_c, queries.stride_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_C, tokens]
    gradient = load_rows(
        gradient_ptr, gradients.stride_c, gradients.stride_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_C, tokens]
    head_output = load_rows(
        head_output_ptr + pid_bh * tokens * CHANNELS, 1, CHANNELS, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_C, tokens]
    delta = inner_products(gradient, head_output) / heads  # [BLOCK_C]
    mixed_keys = zero_tiles(BLOCK_C, TOKEN_TILES)
    excess = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, KEY_CHANNELS, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        key = load_columns(
            key_ptr, keys.stride_c, keys.stride_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_S]
        value = load_columns(
            value_ptr, values.stride_c, values.stride_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_S]
        softmax = tl.exp2(contract(query, key, PRECISION) * scale[:, None] - log_sum[:, None])  # [BLOCK_C, BLOCK_S]
        if KEY_CHANNELS % BLOCK_S != 0:
            softmax = tl.where((offs_s < KEY_CHANNELS)[None, :], softmax, 0.0)
        softmax_gradient = contract(gradient, value, PRECISION) * (keep_factor / heads)
        if row_key_ptr is not None:
            keep = keep_rows(row_key_ptr, row, mask_c, offs_s, rows, threshold)
            softmax_gradient = tl.where(keep, softmax_gradient, 0.0)
        logit_gradient = (softmax * (softmax_gradient - delta[:, None])).to(key[0].dtype)
        mixed_keys = accumulate_transposed(mixed_keys, logit_gradient, key, PRECISION)
        excess += tl.sum(logit_gradient.to(tl.float32), axis=1)
    # A row of the logits' gradient sums to zero but for rounding, which keys far from zero would multiply.
    key_mean_ptr += pid_bh * (tokens + 1)
    mean_key_mean = tl.load(key_mean_ptr + tokens)
    share = mean_key_mean / tl.sqrt(tokens * 1.0)
    mixed_keys = subtract_outer(mixed_keys, excess, key_mean_ptr, share, tokens, TOKEN_TILES, TOKEN_STARTS)
    tl.store(delta_ptr + row, delta, mask=mask_c)
    tl.store(slope_ptr + row, inner_products(mixed_keys, query), mask=mask_c)
    query_mean = tl.load(query_mean_ptr + row, mask=mask_c, other=0.0)
    row_mean = weighted_sums(query, query_mean, key_mean_ptr, tokens, TOKEN_TILES, TOKEN_STARTS)
    row_mean += query_mean * tl.sqrt(tokens * 1.0) * mean_key_mean
    tl.store(row_mean_ptr + row, row_mean, mask=mask_c)
    store_rows(
        grad_queries.ptr + batch * grad_queries.stride_b + head * grad_queries.stride_h,
        grad_queries.stride_n,
        mixed_keys,
        temperature,
        offs_c,
        tokens,
        CHANNELS,
        TOKEN_TILES,
        TOKEN_STARTS,
    )


@triton.jit
def key_value_gradient_kernel(
    gradients,
    queries,
    keys,
    values,
    temperature_ptr,
    log_sum_ptr,
    delta_ptr,
    row_key_ptr,
    grad_keys,
    grad_values,
    heads,
    tokens,
    rows,
    threshold,
    keep_factor,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    ALL_CHANNELS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    TOKEN_STARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of value, and queries mixed by the gradient of the scaled logits, for a tile of key channels.

    Scores are computed transposed, ``K^T Q``: transposing a product just made has been miscompiled on Hopper.
    """
    pid_s, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    gradient_ptr = gradients.ptr + batch * gradients.stride_b
    query_ptr = queries.ptr + batch * queries.stride_b + head * queries.stride_h
    key_ptr = keys.ptr + batch * keys.stride_b + head * keys.stride_h
    value_ptr = values.ptr + batch * values.stride_b + head * values.stride_h
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    key = load_rows(
        key_ptr, keys.stride_c, keys.stride_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_S, tokens]
    value = load_rows(
        value_ptr, values.stride_c, values.stride_n, offs_s, tokens, KEY_CHANNELS, TOKEN_TILES, TOKEN_STARTS
    )  # tiles [BLOCK_S, tokens]
    # In float16 a temperature may round a gradient to nothing, so the largest is left out until the sum is made.
    offs_all = tl.arange(0, ALL_CHANNELS)
    all_temperatures = tl.load(temperature_ptr + pid_bh * CHANNELS + offs_all, mask=offs_all < CHANNELS, other=0.0)
    largest_temperature = tl.max(all_temperatures, axis=0)
    grad_key = zero_tiles(BLOCK_S, TOKEN_TILES)
    grad_value = zero_tiles(BLOCK_S, TOKEN_TILES)
    for start in range(0, CHANNELS, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < CHANNELS
        row = pid_bh * CHANNELS + offs_c
        query = load_columns(
            query_ptr, queries.stride_c, queries.stride_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_C]
        gradient = load_columns(
            gradient_ptr, gradients.stride_c, gradients.stride_n, offs_c, tokens, CHANNELS, TOKEN_TILES, TOKEN_STARTS
        )  # tiles [tokens, BLOCK_C]
        log_sum = tl.load(log_sum_ptr + row, mask=mask_c, other=0.0)
        temperature = tl.load(temperature_ptr + row, mask=mask_c, other=0.0)
        scores = contract(key, query, PRECISION)  # [BLOCK_S, BLOCK_C]
        softmax = tl.exp2(scores * (temperature * 1.4426950408889634)[None, :] - log_sum[None, :])
        softmax_gradient = contract(value, gradient, PRECISION) * (keep_factor / heads)
        attention = softmax
        if row_key_ptr is not None:
            keep = keep_columns(row_key_ptr, row, mask_c, offs_s, rows, threshold)
            attention = tl.where(keep, softmax, 0.0)
            softmax_gradient = tl.where(keep, softmax_gradient, 0.0)
        grad_value = accumulate_transposed(grad_value, attention.to(gradient[0].dtype), gradient, PRECISION)
        delta = tl.load(delta_ptr + row, mask=mask_c, other=0.0)
        relative = temperature * (1.0 / largest_temperature)
        score_gradient = softmax * (softmax_gradient - delta[None, :]) * relative[None, :]
        grad_key = accumulate_transposed(grad_key, score_gradient.to(query[0].dtype), query, PRECISION)
    ones = tl.full([BLOCK_S], 1.0, tl.float32)
    store_rows(
        grad_keys.ptr + batch * grad_keys.stride_b + head * grad_keys.stride_h,
        grad_keys.stride_n,
        grad_key,
        ones * largest_temperature,
        offs_s,
        tokens,
        KEY_CHANNELS,
        TOKEN_TILES,
        TOKEN_STARTS,
    )
    store_rows(
        grad_values.ptr + batch * grad_values.stride_b + head * grad_values.stride_h,
        grad_values.stride_n,
        grad_value,
        ones * (keep_factor / heads),
        offs_s,
        tokens,
        KEY_CHANNELS,
        TOKEN_TILES,
        TOKEN_STARTS,
    )
