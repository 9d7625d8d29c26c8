"""Triton kernels of the instance norm in attention: temperatures before it, corrections of gradients after it.

The map of scores is never formed for them. All follows from Gram matrices, products of pairs of tokens summed
over channels: ``sum of squares of Q^T K`` is the inner product of ``Q Q^T`` and ``K K^T``. Far from zero that inner
product would cancel, so the tokens of each channel are centred and their mean becomes one token more: with ``m`` the
mean, ``[q - m, sqrt(N) m]`` has the scores of ``q``. Gram matrices are of these N + 1 tokens.

B batch, H heads, N tokens, C query channels of all scales, S key channels; a segment is one scale's range of C. Pairs
of token blocks (i, j) with i > j are left out: Gram matrices are symmetric.
"""

import triton
import triton.language as tl


@triton.jit
def token_mean_kernel(
    values,
    token_mean_ptr,
    heads,
    tokens,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Take the mean of each channel over the tokens: (B, H, N, C) -> (B, H, C).

    Summed in float64, which takes no longer than the reading: a mean near zero may be multiplied by keys far from it.
    """
    pid_bh = tl.program_id(1).to(tl.int64)
    values_ptr = values.ptr + (pid_bh // heads) * values.stride_b + (pid_bh % heads) * values.stride_h
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    total = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, tokens, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < tokens)[:, None] & mask_c[None, :]
        tile_ptrs = values_ptr + offs_n[:, None] * values.stride_n + offs_c[None, :] * values.stride_c
        tile = tl.load(tile_ptrs, mask=mask, other=0.0)
        total += tl.sum(tile.to(tl.float64), axis=0)
    tl.store(token_mean_ptr + pid_bh * CHANNELS + offs_c, (total / tokens).to(tl.float32), mask=mask_c)


@triton.jit
def key_gram_kernel(
    keys,
    token_mean_ptr,
    key_gram_ptr,
    key_mean_ptr,
    heads,
    tokens,
    KEY_CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of the covariance of the keys over channels, and on the diagonal their means."""
    pid_pair, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(tokens + 1, BLOCK_N)
    pid_i, pid_j = pid_pair // blocks, pid_pair % blocks
    if pid_i > pid_j:
        return
    key_ptr = keys.ptr + (pid_bh // heads) * keys.stride_b + (pid_bh % heads) * keys.stride_h
    token_mean_ptr += pid_bh * KEY_CHANNELS
    offs_i, offs_j = pid_i * BLOCK_N + tl.arange(0, BLOCK_N), pid_j * BLOCK_N + tl.arange(0, BLOCK_N)
    gram, sums_i, sums_j, shift_i, _shift_j = _shifted_gram(
        key_ptr, token_mean_ptr, keys.stride_n, keys.stride_c, offs_i, offs_j, tokens, KEY_CHANNELS, BLOCK_K, PRECISION
    )
    means_i, means_j = sums_i / KEY_CHANNELS, sums_j / KEY_CHANNELS
    covariance = gram / KEY_CHANNELS - means_i[:, None] * means_j[None, :]  # [BLOCK_N, BLOCK_N]
    size = tokens + 1
    _store_symmetric(key_gram_ptr + pid_bh * size * size, covariance, offs_i, offs_j, size, pid_i != pid_j)
    if pid_i == pid_j:
        tl.store(key_mean_ptr + pid_bh * size + offs_i, shift_i + means_i, mask=offs_i < size)


@triton.jit
def score_variance_kernel(
    queries,
    token_mean_ptr,
    key_gram_ptr,
    key_mean_ptr,
    partial_ptr,
    heads,
    tokens,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_STARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the share that a pair of token blocks has in the variance of a segment's scores ``Q^T K / sqrt(S)``."""
    pid_pair, pid_segment, pid_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    size = tokens + 1
    blocks = tl.cdiv(size, BLOCK_N)
    pid_i, pid_j = pid_pair // blocks, pid_pair % blocks
    if pid_i > pid_j:
        return
    start, width = 0, 0
    for segment in tl.static_range(len(SEGMENTS)):
        if segment == pid_segment:
            start, width = SEGMENT_STARTS[segment], SEGMENTS[segment]
    query_ptr = (
        queries.ptr
        + (pid_bh // heads) * queries.stride_b
        + (pid_bh % heads) * queries.stride_h
        + start * queries.stride_c
    )
    token_mean_ptr += pid_bh * CHANNELS + start
    offs_i, offs_j = pid_i * BLOCK_N + tl.arange(0, BLOCK_N), pid_j * BLOCK_N + tl.arange(0, BLOCK_N)
    gram, sums_i, sums_j, shift_i, shift_j = _shifted_gram(
        query_ptr, token_mean_ptr, queries.stride_n, queries.stride_c, offs_i, offs_j, tokens, width, BLOCK_K, PRECISION
    )
    gram, means_i, means_j = gram / width, sums_i / width, sums_j / width
    mask_i, mask_j = offs_i < size, offs_j < size
    tile = key_gram_ptr + pid_bh * size * size + offs_i[:, None] * size + offs_j[None, :]
    covariance = tl.load(tile, mask=mask_i[:, None] & mask_j[None, :], other=0.0).to(tl.float32)
    key_mean_i = tl.load(key_mean_ptr + pid_bh * size + offs_i, mask=mask_i, other=0.0) / KEY_CHANNELS
    key_mean_j = tl.load(key_mean_ptr + pid_bh * size + offs_j, mask=mask_j, other=0.0)
    # Within the map's rows the variance is that of products of the queries as they are; between the means of the rows,
    # that of products of queries centred over the segment's channels.
    plain = gram + means_i[:, None] * shift_j[None, :] + shift_i[:, None] * (means_j + shift_j)[None, :]
    centred = gram - means_i[:, None] * means_j[None, :]
    share = tl.sum(plain * (covariance / KEY_CHANNELS) + centred * (key_mean_i[:, None] * key_mean_j[None, :]))
    pairs_per_share = tl.where(pid_i == pid_j, 1.0, 2.0)  # the pair (j, i) has the same share
    place = (pid_bh * blocks * blocks + pid_pair) * len(SEGMENTS) + pid_segment
    tl.store(partial_ptr + place, share * pairs_per_share)


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
    """Write 1 / (sqrt(S) sigma) of each row's map, and with a seed the keys of its dropout mask."""
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
    # Rounding may leave a constant map just below zero; what is not zero keeps the temperature of eps = 0 finite.
    temperature = 1.0 / (tl.sqrt(KEY_CHANNELS * 1.0) * tl.sqrt(tl.maximum(tl.maximum(variance, 0.0) + eps, 1e-36)))
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
    """Write the ``weight`` and ``offset`` of each row.

    Instance norm subtracts ``weight * (scores - mean of the map)`` from the gradient of a row; ``offset`` is the row's
    mean score less the mean of its map.
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
    queries,
    token_mean_ptr,
    weight_ptr,
    offset_ptr,
    query_gram_ptr,
    query_sum_ptr,
    heads,
    tokens,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of the sum over channels of ``weight q q^T``, and on the diagonal that of ``weight offset q``."""
    pid_pair, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    size = tokens + 1
    blocks = tl.cdiv(size, BLOCK_N)
    pid_i, pid_j = pid_pair // blocks, pid_pair % blocks
    if pid_i > pid_j:
        return
    query_ptr = queries.ptr + (pid_bh // heads) * queries.stride_b + (pid_bh % heads) * queries.stride_h
    token_mean_ptr += pid_bh * CHANNELS
    offs_i, offs_j = pid_i * BLOCK_N + tl.arange(0, BLOCK_N), pid_j * BLOCK_N + tl.arange(0, BLOCK_N)
    gram = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        offs_c = start + tl.arange(0, BLOCK_K)
        mask_c = offs_c < CHANNELS
        tile_i = _centred_rows(
            query_ptr, token_mean_ptr, queries.stride_n, queries.stride_c, offs_i, offs_c, tokens, CHANNELS
        )
        tile_j = _centred_columns(
            query_ptr, token_mean_ptr, queries.stride_n, queries.stride_c, offs_j, offs_c, tokens, CHANNELS
        )
        weight = tl.load(weight_ptr + pid_bh * CHANNELS + offs_c, mask=mask_c, other=0.0)
        offset = tl.load(offset_ptr + pid_bh * CHANNELS + offs_c, mask=mask_c, other=0.0)
        weighted = tile_i * weight[None, :]
        sums += tl.sum(weighted * offset[None, :], axis=1)
        operand = query_gram_ptr.dtype.element_ty
        gram = tl.dot(weighted.to(operand), tile_j.to(operand), gram, input_precision=PRECISION)
    _store_symmetric(query_gram_ptr + pid_bh * size * size, gram, offs_i, offs_j, size, pid_i != pid_j)
    if pid_i == pid_j:
        tl.store(query_sum_ptr + pid_bh * size + offs_i, sums, mask=offs_i < size)


@triton.jit
def query_correction_kernel(
    queries,
    token_mean_ptr,
    key_gram_ptr,
    key_mean_ptr,
    weight_ptr,
    offset_ptr,
    grad_queries,
    heads,
    tokens,
    KEY_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Turn mixed keys into ``dQ = mixed keys - weight S (key covariance Q + offset key means)``, in place."""
    pid_c, pid_n, pid_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    query_ptr = queries.ptr + batch * queries.stride_b + head * queries.stride_h
    token_mean_ptr += pid_bh * CHANNELS
    size = tokens + 1
    key_gram_ptr += pid_bh * size * size
    key_mean_ptr += pid_bh * size
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c, mask_n = offs_c < CHANNELS, offs_n < tokens
    along_keys = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    along_mean_key = tl.zeros([BLOCK_C], tl.float32)  # the same of the token that holds the means
    for start in range(0, size, BLOCK_N):
        offs_m = start + tl.arange(0, BLOCK_N)
        mask_m = offs_m < size
        covariance_tile = key_gram_ptr + offs_n[:, None] * size + offs_m[None, :]
        covariance = tl.load(covariance_tile, mask=mask_n[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_N, BLOCK_N]
        of_mean_key = tl.load(key_gram_ptr + tokens * size + offs_m, mask=mask_m, other=0.0).to(tl.float32)
        query = _centred_rows(
            query_ptr, token_mean_ptr, queries.stride_n, queries.stride_c, offs_m, offs_c, tokens, CHANNELS
        )  # [BLOCK_N, BLOCK_C]
        along_mean_key += tl.sum(of_mean_key[:, None] * query, axis=0)
        along_keys = tl.dot(covariance, query.to(covariance.dtype), along_keys, input_precision=PRECISION)
    weight = tl.load(weight_ptr + pid_bh * CHANNELS + offs_c, mask=mask_c, other=0.0)
    offset = tl.load(offset_ptr + pid_bh * CHANNELS + offs_c, mask=mask_c, other=0.0)
    # A token's key is its centred key plus its share, 1 / sqrt(N), of the token that holds the means.
    share = 1.0 / tl.sqrt(tokens * 1.0)
    key_mean = tl.load(key_mean_ptr + offs_n, mask=mask_n, other=0.0) + tl.load(key_mean_ptr + tokens) * share
    along_keys += (along_mean_key * share)[None, :] + key_mean[:, None] * offset[None, :]
    tile = batch * grad_queries.stride_b + head * grad_queries.stride_h
    tile += offs_n[:, None] * grad_queries.stride_n + offs_c[None, :] * grad_queries.stride_c
    mask = mask_n[:, None] & mask_c[None, :]
    mixed_keys = tl.load(grad_queries.ptr + tile, mask=mask, other=0.0).to(tl.float32)
    gradient = mixed_keys - (weight * KEY_CHANNELS)[None, :] * along_keys
    tl.store(grad_queries.ptr + tile, gradient.to(grad_queries.ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_correction_kernel(
    keys,
    token_mean_ptr,
    query_gram_ptr,
    query_sum_ptr,
    key_mean_ptr,
    grad_keys,
    heads,
    tokens,
    KEY_CHANNELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Turn mixed queries into ``dK = mixed queries - (query Gram (K - key means) + query sums)``, in place."""
    pid_s, pid_n, pid_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head = pid_bh // heads, pid_bh % heads
    key_ptr = keys.ptr + batch * keys.stride_b + head * keys.stride_h
    token_mean_ptr += pid_bh * KEY_CHANNELS
    size = tokens + 1
    query_gram_ptr += pid_bh * size * size
    query_sum_ptr += pid_bh * size
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_s, mask_n = offs_s < KEY_CHANNELS, offs_n < tokens
    along_queries = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    along_mean_query = tl.zeros([BLOCK_S], tl.float32)  # the same of the token that holds the means
    for start in range(0, size, BLOCK_N):
        offs_m = start + tl.arange(0, BLOCK_N)
        mask_m = offs_m < size
        gram_tile = query_gram_ptr + offs_n[:, None] * size + offs_m[None, :]
        gram = tl.load(gram_tile, mask=mask_n[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_N, BLOCK_N]
        of_mean_query = tl.load(query_gram_ptr + tokens * size + offs_m, mask=mask_m, other=0.0).to(tl.float32)
        key_mean = tl.load(key_mean_ptr + pid_bh * size + offs_m, mask=mask_m, other=0.0)
        key = _centred_rows(
            key_ptr, token_mean_ptr, keys.stride_n, keys.stride_c, offs_m, offs_s, tokens, KEY_CHANNELS
        )  # [BLOCK_N, BLOCK_S]
        centred = key - key_mean[:, None]
        along_mean_query += tl.sum(of_mean_query[:, None] * centred, axis=0)
        along_queries = tl.dot(gram, centred.to(gram.dtype), along_queries, input_precision=PRECISION)
    # A token's query is its centred query plus its share, 1 / sqrt(N), of the token that holds the means.
    share = 1.0 / tl.sqrt(tokens * 1.0)
    query_sum = tl.load(query_sum_ptr + offs_n, mask=mask_n, other=0.0) + tl.load(query_sum_ptr + tokens) * share
    along_queries += (along_mean_query * share)[None, :] + query_sum[:, None]
    tile = batch * grad_keys.stride_b + head * grad_keys.stride_h
    tile += offs_n[:, None] * grad_keys.stride_n + offs_s[None, :] * grad_keys.stride_c
    mask = mask_n[:, None] & mask_s[None, :]
    mixed_queries = tl.load(grad_keys.ptr + tile, mask=mask, other=0.0).to(tl.float32)
    gradient = mixed_queries - along_queries
    tl.store(grad_keys.ptr + tile, gradient.to(grad_keys.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shifted_gram(
    base_ptr,
    token_mean_ptr,
    stride_n,
    stride_k,
    offs_i,
    offs_j,
    tokens,
    channels,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return sums over channels of pairs of tokens' values, each less its token's shift; sums of both; both shifts.

    The shift is the token's mean over the first block of channels. Sums that are centred later then cancel by no more
    than the ratio of all channels to those of a block, however far from zero the values are.
    """
    offs_first = tl.arange(0, BLOCK_K)
    count = min(channels, BLOCK_K)
    first_rows = _centred_rows(base_ptr, token_mean_ptr, stride_n, stride_k, offs_i, offs_first, tokens, channels)
    shift_i = tl.sum(first_rows, axis=1) / count
    first_columns = _centred_columns(base_ptr, token_mean_ptr, stride_n, stride_k, offs_j, offs_first, tokens, channels)
    shift_j = tl.sum(first_columns, axis=0) / count
    gram = tl.zeros([offs_i.shape[0], offs_j.shape[0]], tl.float32)
    sums_i, sums_j = tl.zeros_like(shift_i), tl.zeros_like(shift_j)
    dtype = base_ptr.dtype.element_ty
    for start in range(0, channels, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        rows = _centred_rows(base_ptr, token_mean_ptr, stride_n, stride_k, offs_i, offs_k, tokens, channels)
        rows = tl.where((offs_k < channels)[None, :], rows - shift_i[:, None], 0.0).to(dtype)  # [BLOCK_N, BLOCK_K]
        columns = _centred_columns(base_ptr, token_mean_ptr, stride_n, stride_k, offs_j, offs_k, tokens, channels)
        columns = tl.where((offs_k < channels)[:, None], columns - shift_j[None, :], 0.0).to(
            dtype
        )  # [BLOCK_K, BLOCK_N]
        gram = tl.dot(rows, columns, gram, input_precision=PRECISION)
        sums_i += tl.sum(rows.to(tl.float32), axis=1)
        sums_j += tl.sum(columns.to(tl.float32), axis=0)
    return gram, sums_i, sums_j, shift_i, shift_j


@triton.jit
def _centred_rows(base_ptr, token_mean_ptr, stride_n, stride_k, offs_n, offs_k, tokens, channels):
    """Load [tokens, channels] in float32, centred over the tokens; token N is sqrt(N) times the means; then zero."""
    mask_k = offs_k < channels
    mask = (offs_n < tokens)[:, None] & mask_k[None, :]
    tile = tl.load(base_ptr + offs_n[:, None] * stride_n + offs_k[None, :] * stride_k, mask=mask, other=0.0)
    mean = tl.load(token_mean_ptr + offs_k, mask=mask_k, other=0.0)
    is_mean = tl.where(offs_n == tokens, tl.sqrt(tokens * 1.0), 0.0)
    return tl.where((offs_n < tokens)[:, None], tile.to(tl.float32) - mean[None, :], is_mean[:, None] * mean[None, :])


@triton.jit
def _centred_columns(base_ptr, token_mean_ptr, stride_n, stride_k, offs_n, offs_k, tokens, channels):
    """Load the same transposed, [channels, tokens]."""
    mask_k = offs_k < channels
    mask = (offs_n < tokens)[None, :] & mask_k[:, None]
    tile = tl.load(base_ptr + offs_n[None, :] * stride_n + offs_k[:, None] * stride_k, mask=mask, other=0.0)
    mean = tl.load(token_mean_ptr + offs_k, mask=mask_k, other=0.0)
    is_mean = tl.where(offs_n == tokens, tl.sqrt(tokens * 1.0), 0.0)
    return tl.where((offs_n < tokens)[None, :], tile.to(tl.float32) - mean[:, None], is_mean[None, :] * mean[:, None])


@triton.jit
def _store_symmetric(base_ptr, tile, offs_i, offs_j, size, is_off_diagonal):
    """Write a tile of a symmetric (size, size) matrix, and its mirror image."""
    tile = tile.to(base_ptr.dtype.element_ty)
    mask = (offs_i < size)[:, None] & (offs_j < size)[None, :]
    tl.store(base_ptr + offs_i[:, None] * size + offs_j[None, :], tile, mask=mask)
    tl.store(base_ptr + offs_j[None, :] * size + offs_i[:, None], tile, mask=mask & is_off_diagonal)


@triton.jit
def _mix(word):
    """Mix a 32-bit word as kernels/dropout.py does."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0xD35A2D97
    return word ^ (word >> 15)
