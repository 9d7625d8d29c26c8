"""Triton kernels of what instance norm adds to attention: temperatures before it, corrections of gradients after it.

The map of scores is never formed for them. All of it follows from Gram matrices, products of pairs of tokens summed
over channels: ``sum of squares of Q^T K`` is the inner product of ``Q Q^T`` and ``K K^T``.

B batch, H heads, N tokens, C query channels of all scales, S key channels; a segment is one scale's range of C. Pairs
of token blocks (i, j) with i > j are left out: Gram matrices are symmetric.
"""

import triton
import triton.language as tl


@triton.jit
def key_gram_kernel(
    key_ptr,
    key_gram_ptr,
    key_mean_ptr,
    stride_key_b,
    stride_key_h,
    stride_key_n,
    stride_key_s,
    heads,
    tokens,
    KEY_CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pair of token blocks: its tile of the Gram matrix of centred keys; on the diagonal also the keys' means."""
    pid_pair, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(tokens, BLOCK_N)
    pid_i, pid_j = pid_pair // blocks, pid_pair % blocks
    if pid_i > pid_j:
        return
    key_ptr += (pid_bh // heads) * stride_key_b + (pid_bh % heads) * stride_key_h
    offs_i, offs_j = pid_i * BLOCK_N + tl.arange(0, BLOCK_N), pid_j * BLOCK_N + tl.arange(0, BLOCK_N)
    gram, sums_i, sums_j, shift_i, _shift_j = _shifted_gram(
        key_ptr, stride_key_n, stride_key_s, offs_i, offs_j, tokens, KEY_CHANNELS, BLOCK_K, PRECISION
    )
    centred = gram - sums_i[:, None] * (sums_j / KEY_CHANNELS)[None, :]  # [BLOCK_N, BLOCK_N]
    _store_symmetric(key_gram_ptr + pid_bh * tokens * tokens, centred, offs_i, offs_j, tokens, pid_i != pid_j)
    if pid_i == pid_j:
        tl.store(key_mean_ptr + pid_bh * tokens + offs_i, shift_i + sums_i / KEY_CHANNELS, mask=offs_i < tokens)


@triton.jit
def score_variance_kernel(
    query_ptr,
    key_gram_ptr,
    key_mean_ptr,
    partial_ptr,
    stride_query_b,
    stride_query_h,
    stride_query_n,
    stride_query_c,
    heads,
    tokens,
    KEY_CHANNELS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_STARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pair of token blocks: its share of the variance of one segment's map of raw scores ``Q^T K``."""
    pid_pair, pid_segment, pid_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(tokens, BLOCK_N)
    pid_i, pid_j = pid_pair // blocks, pid_pair % blocks
    if pid_i > pid_j:
        return
    start, width = 0, 0
    for segment in tl.static_range(len(SEGMENTS)):
        if segment == pid_segment:
            start, width = SEGMENT_STARTS[segment], SEGMENTS[segment]
    query_ptr += (pid_bh // heads) * stride_query_b + (pid_bh % heads) * stride_query_h + start * stride_query_c
    offs_i, offs_j = pid_i * BLOCK_N + tl.arange(0, BLOCK_N), pid_j * BLOCK_N + tl.arange(0, BLOCK_N)
    gram, sums_i, sums_j, shift_i, shift_j = _shifted_gram(
        query_ptr, stride_query_n, stride_query_c, offs_i, offs_j, tokens, width, BLOCK_K, PRECISION
    )
    mask_i, mask_j = offs_i < tokens, offs_j < tokens
    tile = key_gram_ptr + pid_bh * tokens * tokens + offs_i[:, None] * tokens + offs_j[None, :]
    key_gram = tl.load(tile, mask=mask_i[:, None] & mask_j[None, :], other=0.0).to(tl.float32) / KEY_CHANNELS
    mean_i = tl.load(key_mean_ptr + pid_bh * tokens + offs_i, mask=mask_i, other=0.0)
    mean_j = tl.load(key_mean_ptr + pid_bh * tokens + offs_j, mask=mask_j, other=0.0)
    mean_products = mean_i[:, None] * mean_j[None, :]
    # Within the map's rows the variance is that of products of the queries as they are; between the means of the rows,
    # that of products of queries centred over the segment's channels.
    shift_products = sums_i[:, None] * shift_j[None, :] + shift_i[:, None] * (sums_j + width * shift_j)[None, :]
    centring_products = sums_i[:, None] * (sums_j / width)[None, :]
    share = tl.sum((gram + shift_products) * key_gram + (gram - centring_products) * mean_products)
    pairs_per_share = tl.where(pid_i == pid_j, 1.0, 2.0)  # the pair (j, i) has the same share
    place = (pid_bh * blocks * blocks + pid_pair) * len(SEGMENTS) + pid_segment
    tl.store(partial_ptr + place, share * (pairs_per_share / width))


@triton.jit
def temperature_kernel(
    partial_ptr,
    seed_ptr,
    temperature_ptr,
    row_key_ptr,
    pairs,
    rows,
    eps,
    KEY_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_STARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """1 / (sqrt(S) sigma) of each row's map, and with a seed the keys of its dropout mask."""
    pid_bh = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_pair = tl.arange(0, BLOCK_PAIRS)
    is_upper = (offs_pair < pairs) & (offs_pair // BLOCKS <= offs_pair % BLOCKS)
    partial_ptr += pid_bh.to(tl.int64) * pairs * len(SEGMENTS)
    variance = tl.zeros([BLOCK_C], tl.float32)
    for segment in tl.static_range(len(SEGMENTS)):
        shares = tl.load(partial_ptr + offs_pair * len(SEGMENTS) + segment, mask=is_upper, other=0.0)
        is_own = (offs_c >= SEGMENT_STARTS[segment]) & (offs_c < SEGMENT_STARTS[segment] + SEGMENTS[segment])
        variance = tl.where(is_own, tl.sum(shares, axis=0), variance)
    # Rounding may leave a constant map just below zero.
    temperature = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps * KEY_CHANNELS)
    row = pid_bh * CHANNELS + offs_c
    tl.store(temperature_ptr + row, temperature, mask=offs_c < CHANNELS)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
        mixed_seed = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ _mix((seed >> 32).to(tl.uint32)))
        first = _mix(_mix(row.to(tl.uint32)) + mixed_seed)
        second = _mix(first + 0x9E3779B9)
        tl.store(row_key_ptr + row, first.to(tl.int32, bitcast=True), mask=offs_c < CHANNELS)
        tl.store(row_key_ptr + rows + row, second.to(tl.int32, bitcast=True), mask=offs_c < CHANNELS)


@triton.jit
def coefficient_kernel(
    temperature_ptr,
    slope_ptr,
    row_mean_ptr,
    weight_ptr,
    offset_ptr,
    KEY_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_STARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per row, what instance norm takes out of its gradient is ``weight * (scores - mean of the map)``.

    Also the row's ``offset``: its mean score less the mean of its map.
    """
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < CHANNELS
    row = tl.program_id(0).to(tl.int64) * CHANNELS + offs_c
    temperature = tl.load(temperature_ptr + row, mask=mask, other=0.0)
    slope = tl.load(slope_ptr + row, mask=mask, other=0.0)
    row_mean = tl.load(row_mean_ptr + row, mask=mask, other=0.0)
    slope_mean, score_mean = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for segment in tl.static_range(len(SEGMENTS)):
        is_own = (offs_c >= SEGMENT_STARTS[segment]) & (offs_c < SEGMENT_STARTS[segment] + SEGMENTS[segment])
        slope_mean = tl.where(is_own, tl.sum(tl.where(is_own, slope, 0.0), axis=0) / SEGMENTS[segment], slope_mean)
        # Centred on the segment's first row: the rows may share an offset far above their spread.
        anchor = tl.sum(tl.where(offs_c == SEGMENT_STARTS[segment], row_mean, 0.0), axis=0)
        mean = anchor + tl.sum(tl.where(is_own, row_mean - anchor, 0.0), axis=0) / SEGMENTS[segment]
        score_mean = tl.where(is_own, mean, score_mean)
    weight = temperature * temperature * (temperature * slope_mean / KEY_CHANNELS)
    tl.store(weight_ptr + row, weight, mask=mask)
    tl.store(offset_ptr + row, row_mean - score_mean, mask=mask)


@triton.jit
def query_gram_kernel(
    query_ptr,
    weight_ptr,
    offset_ptr,
    query_gram_ptr,
    query_sum_ptr,
    stride_query_b,
    stride_query_h,
    stride_query_n,
    stride_query_c,
    heads,
    tokens,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pair of token blocks: sum over channels of ``weight q q^T``; on the diagonal also of ``weight offset q``."""
    pid_pair, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(tokens, BLOCK_N)
    pid_i, pid_j = pid_pair // blocks, pid_pair % blocks
    if pid_i > pid_j:
        return
    query_ptr += (pid_bh // heads) * stride_query_b + (pid_bh % heads) * stride_query_h
    offs_i, offs_j = pid_i * BLOCK_N + tl.arange(0, BLOCK_N), pid_j * BLOCK_N + tl.arange(0, BLOCK_N)
    gram = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        offs_c = start + tl.arange(0, BLOCK_K)
        mask_c = offs_c < CHANNELS
        rows = query_ptr + offs_i[:, None] * stride_query_n + offs_c[None, :] * stride_query_c
        columns = query_ptr + offs_j[None, :] * stride_query_n + offs_c[:, None] * stride_query_c
        tile_i = tl.load(rows, mask=(offs_i < tokens)[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        tile_j = tl.load(columns, mask=(offs_j < tokens)[None, :] & mask_c[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        weight = tl.load(weight_ptr + pid_bh * CHANNELS + offs_c, mask=mask_c, other=0.0)
        offset = tl.load(offset_ptr + pid_bh * CHANNELS + offs_c, mask=mask_c, other=0.0)
        weighted = tile_i * weight[None, :]  # float32
        sums += tl.sum(weighted * offset[None, :], axis=1)
        gram = tl.dot(weighted.to(tile_j.dtype), tile_j, gram, input_precision=PRECISION)
    _store_symmetric(query_gram_ptr + pid_bh * tokens * tokens, gram, offs_i, offs_j, tokens, pid_i != pid_j)
    if pid_i == pid_j:
        tl.store(query_sum_ptr + pid_bh * tokens + offs_i, sums, mask=offs_i < tokens)


@triton.jit
def query_correction_kernel(
    query_ptr,
    key_gram_ptr,
    key_mean_ptr,
    temperature_ptr,
    weight_ptr,
    offset_ptr,
    grad_query_ptr,
    stride_query_b,
    stride_query_h,
    stride_query_n,
    stride_query_c,
    stride_grad_b,
    stride_grad_h,
    stride_grad_n,
    stride_grad_c,
    heads,
    tokens,
    KEY_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """In place, mixed keys become ``dQ = temperature * mixed keys - weight * (key Gram Q + S offset key means)``."""
    pid_c, pid_n, pid_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    query_ptr += batch * stride_query_b + head * stride_query_h
    key_gram_ptr += pid_bh * tokens * tokens
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c, mask_n = offs_c < CHANNELS, offs_n < tokens
    along_keys = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        offs_m = start + tl.arange(0, BLOCK_N)
        mask_m = offs_m < tokens
        gram_tile = key_gram_ptr + offs_n[:, None] * tokens + offs_m[None, :]
        gram = tl.load(gram_tile, mask=mask_n[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_N, BLOCK_N]
        query_tile = query_ptr + offs_m[:, None] * stride_query_n + offs_c[None, :] * stride_query_c
        query = tl.load(query_tile, mask=mask_m[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_N, BLOCK_C]
        along_keys = tl.dot(gram, query.to(gram.dtype), along_keys, input_precision=PRECISION)
    row = pid_bh * CHANNELS + offs_c
    temperature = tl.load(temperature_ptr + row, mask=mask_c, other=0.0)
    weight = tl.load(weight_ptr + row, mask=mask_c, other=0.0)
    offset = tl.load(offset_ptr + row, mask=mask_c, other=0.0)
    key_mean = tl.load(key_mean_ptr + pid_bh * tokens + offs_n, mask=mask_n, other=0.0)
    along_keys += key_mean[:, None] * (KEY_CHANNELS * offset)[None, :]
    tile = batch * stride_grad_b + head * stride_grad_h
    tile += offs_n[:, None] * stride_grad_n + offs_c[None, :] * stride_grad_c
    mask = mask_n[:, None] & mask_c[None, :]
    mixed_keys = tl.load(grad_query_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    gradient = temperature[None, :] * mixed_keys - weight[None, :] * along_keys
    tl.store(grad_query_ptr + tile, gradient.to(grad_query_ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_correction_kernel(
    key_ptr,
    query_gram_ptr,
    query_sum_ptr,
    key_mean_ptr,
    grad_key_ptr,
    stride_key_b,
    stride_key_h,
    stride_key_n,
    stride_key_s,
    stride_grad_b,
    stride_grad_h,
    stride_grad_n,
    stride_grad_s,
    heads,
    tokens,
    KEY_CHANNELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """In place, mixed queries become ``dK = mixed queries - (query Gram (K - key means) + query sums)``."""
    pid_s, pid_n, pid_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    key_ptr += batch * stride_key_b + head * stride_key_h
    query_gram_ptr += pid_bh * tokens * tokens
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_s, mask_n = offs_s < KEY_CHANNELS, offs_n < tokens
    along_queries = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        offs_m = start + tl.arange(0, BLOCK_N)
        mask_m = offs_m < tokens
        gram_tile = query_gram_ptr + offs_n[:, None] * tokens + offs_m[None, :]
        gram = tl.load(gram_tile, mask=mask_n[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_N, BLOCK_N]
        key_tile = key_ptr + offs_m[:, None] * stride_key_n + offs_s[None, :] * stride_key_s
        key = tl.load(key_tile, mask=mask_m[:, None] & mask_s[None, :], other=0.0)  # [BLOCK_N, BLOCK_S]
        key_mean = tl.load(key_mean_ptr + pid_bh * tokens + offs_m, mask=mask_m, other=0.0)
        centred = (key.to(tl.float32) - key_mean[:, None]).to(gram.dtype)
        along_queries = tl.dot(gram, centred, along_queries, input_precision=PRECISION)
    query_sum = tl.load(query_sum_ptr + pid_bh * tokens + offs_n, mask=mask_n, other=0.0)
    tile = batch * stride_grad_b + head * stride_grad_h
    tile += offs_n[:, None] * stride_grad_n + offs_s[None, :] * stride_grad_s
    mask = mask_n[:, None] & mask_s[None, :]
    mixed_queries = tl.load(grad_key_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    gradient = mixed_queries - (along_queries + query_sum[:, None])
    tl.store(grad_key_ptr + tile, gradient.to(grad_key_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shifted_gram(
    base_ptr,
    stride_n,
    stride_k,
    offs_i,
    offs_j,
    tokens,
    channels,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over channels of pairs of tokens' values, each less a shift of its token; sums of both; both shifts.

    The shift is the token's mean over the first block of channels. Sums that are centred later then cancel by no more
    than the ratio of all channels to those of a block, however far from zero the values are.
    """
    shift_i = _first_block_mean(base_ptr, stride_n, stride_k, offs_i, tokens, channels, BLOCK_K)
    shift_j = _first_block_mean(base_ptr, stride_n, stride_k, offs_j, tokens, channels, BLOCK_K)
    gram = tl.zeros([offs_i.shape[0], offs_j.shape[0]], tl.float32)
    sums_i, sums_j = tl.zeros_like(shift_i), tl.zeros_like(shift_j)
    for start in range(0, channels, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_i = (offs_i < tokens)[:, None] & (offs_k < channels)[None, :]
        mask_j = (offs_j < tokens)[None, :] & (offs_k < channels)[:, None]
        tile_i = tl.load(base_ptr + offs_i[:, None] * stride_n + offs_k[None, :] * stride_k, mask=mask_i, other=0.0)
        tile_j = tl.load(base_ptr + offs_j[None, :] * stride_n + offs_k[:, None] * stride_k, mask=mask_j, other=0.0)
        dtype = tile_i.dtype
        tile_i = tl.where(mask_i, tile_i.to(tl.float32) - shift_i[:, None], 0.0).to(dtype)  # [BLOCK_N, BLOCK_K]
        tile_j = tl.where(mask_j, tile_j.to(tl.float32) - shift_j[None, :], 0.0).to(dtype)  # [BLOCK_K, BLOCK_N]
        gram = tl.dot(tile_i, tile_j, gram, input_precision=PRECISION)
        sums_i += tl.sum(tile_i.to(tl.float32), axis=1)
        sums_j += tl.sum(tile_j.to(tl.float32), axis=0)
    return gram, sums_i, sums_j, shift_i, shift_j


@triton.jit
def _first_block_mean(base_ptr, stride_n, stride_k, offs_n, tokens, channels, BLOCK_K: tl.constexpr):
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_n < tokens)[:, None] & (offs_k < channels)[None, :]
    tile = tl.load(base_ptr + offs_n[:, None] * stride_n + offs_k[None, :] * stride_k, mask=mask, other=0.0)
    return tl.sum(tile.to(tl.float32), axis=1) / min(channels, BLOCK_K)  # [BLOCK_N]


@triton.jit
def _store_symmetric(base_ptr, tile, offs_i, offs_j, tokens, is_off_diagonal):
    """Write a tile of a symmetric (tokens, tokens) matrix, and its mirror image."""
    tile = tile.to(base_ptr.dtype.element_ty)
    mask = (offs_i < tokens)[:, None] & (offs_j < tokens)[None, :]
    tl.store(base_ptr + offs_i[:, None] * tokens + offs_j[None, :], tile, mask=mask)
    tl.store(base_ptr + offs_j[None, :] * tokens + offs_i[:, None], tile, mask=mask & is_off_diagonal)


@triton.jit
def _mix(word):
    """The bijection of 32-bit words of kernels/dropout.py."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0xD35A2D97
    return word ^ (word >> 15)
