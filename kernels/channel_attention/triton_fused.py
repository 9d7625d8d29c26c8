"""Triton kernels of the forward pass without a map: statistics of the scores, then attention.

Flash attention with channels as the sequence and tokens as the head dimension. A program holds a tile of query channels
over all tokens and runs over the key channels. The number of tokens is no power of two (196 at 224 pixels), so the
token axis is a tuple of tiles, such as 128 + 64 + 16. A tile's rows may belong to several scales: each row brings its
own temperature, and no kernel here knows the segments.

Programs of one head lie next to each other, so that its keys and values are read from the L2 cache.
"""

from typing import NamedTuple, Self

import triton
import triton.language as tl
from torch import Tensor

from .triton_dropout import keep_mask, row_keys
from .triton_rows import LOG2_E


class HeadMap(NamedTuple):
    """A tensor (B, H, N, C) whose channels are adjacent."""

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_n: int

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Take the strides of a tensor."""
        return cls(tensor, *tensor.stride()[:3])


@triton.jit
def score_statistics_kernel(
    queries,
    keys,
    row_mean_ptr,
    row_variance_ptr,
    row_maximum_ptr,
    heads,
    tokens,
    scale,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write mean, biased variance and maximum of each row of ``scale * Q^T K``: (B, H, C) float32."""
    pid_bh, offs_c = _tile_of_queries(CHANNELS, BLOCK_C)
    mask_c = offs_c < CHANNELS
    key_ptr = _head(keys, pid_bh, heads)
    query = _load_tiles(_head(queries, pid_bh, heads), queries.stride_n, offs_c, mask_c, tokens, TOKEN_TILES)
    mean = tl.zeros([BLOCK_C], tl.float32)
    variance = tl.zeros([BLOCK_C], tl.float32)
    maximum = tl.full([BLOCK_C], float("-inf"), tl.float32)
    for start in range(0, KEY_CHANNELS, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < KEY_CHANNELS
        key = _load_tiles(key_ptr, keys.stride_n, offs_s, mask_s, tokens, TOKEN_TILES)
        scores = _contract(query, key)  # [BLOCK_C, BLOCK_S], zero where there is no key
        # Means and squares of a tile are joined to those of the tiles before it. Nothing cancels, as all are centred.
        count = tl.minimum(KEY_CHANNELS - start, BLOCK_S)
        tile_mean = tl.sum(scores, axis=1) * (scale / count)
        centred = scores * scale - tile_mean[:, None]
        if KEY_CHANNELS % BLOCK_S != 0:
            centred = tl.where(mask_s[None, :], centred, 0.0)
            scores = tl.where(mask_s[None, :], scores, float("-inf"))
        tile_variance = tl.sum(centred * centred, axis=1) / count
        share = count / (start + count)
        difference = tile_mean - mean
        mean += difference * share
        variance += (tile_variance - variance) * share + difference * difference * (share * (1 - share))
        maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    row = pid_bh * CHANNELS + offs_c
    tl.store(row_mean_ptr + row, mean, mask=mask_c)
    tl.store(row_variance_ptr + row, variance, mask=mask_c)
    tl.store(row_maximum_ptr + row, maximum * scale, mask=mask_c)


@triton.jit
def attention_kernel(
    queries,
    keys,
    values,
    temperature_ptr,
    row_maximum_ptr,
    seed_ptr,
    head_output_ptr,
    heads,
    tokens,
    scale,
    threshold,
    keep_factor,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write the output of each head, (B, H, N, C).

    The largest score of each row is known, so the exponentials need no running maximum, and the accumulator is never
    rescaled.
    """
    pid_bh, offs_c = _tile_of_queries(CHANNELS, BLOCK_C)
    mask_c = offs_c < CHANNELS
    key_ptr, value_ptr = _head(keys, pid_bh, heads), _head(values, pid_bh, heads)
    row = pid_bh * CHANNELS + offs_c
    # Exponentials are powers of two, so the temperature takes the factor log2(e).
    temperature = tl.load(temperature_ptr + row, mask=mask_c, other=0.0) * LOG2_E
    ceiling = tl.load(row_maximum_ptr + row, mask=mask_c, other=0.0) * temperature
    factor = temperature * scale
    if seed_ptr is not None:
        first_key, second_key = row_keys(seed_ptr, row)
    query = _load_tiles(_head(queries, pid_bh, heads), queries.stride_n, offs_c, mask_c, tokens, TOKEN_TILES)
    mixed = _zero_tiles(BLOCK_C, TOKEN_TILES)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, KEY_CHANNELS, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < KEY_CHANNELS
        key = _load_tiles(key_ptr, keys.stride_n, offs_s, mask_s, tokens, TOKEN_TILES)
        exponential = tl.exp2(_contract(query, key) * factor[:, None] - ceiling[:, None])  # [BLOCK_C, BLOCK_S]
        if KEY_CHANNELS % BLOCK_S != 0:
            exponential = tl.where(mask_s[None, :], exponential, 0.0)
        total += tl.sum(exponential, axis=1)
        if seed_ptr is not None:
            keep = keep_mask(first_key[:, None], second_key[:, None], offs_s[None, :], threshold)
            exponential = tl.where(keep, exponential, 0.0)
        value = _load_tiles(value_ptr, values.stride_n, offs_s, mask_s, tokens, TOKEN_TILES)
        mixed = _accumulate(mixed, exponential.to(value[0].dtype), value)
    output_ptr = head_output_ptr + pid_bh * tokens * CHANNELS
    _store_tiles(output_ptr, CHANNELS, mixed, keep_factor / total, offs_c, mask_c, tokens, TOKEN_TILES)


@triton.jit
def _tile_of_queries(CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the head of all images, and the channels, that this program works on."""
    tiles = tl.cdiv(CHANNELS, BLOCK_C)
    pid = tl.program_id(0)
    return (pid // tiles).to(tl.int64), pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _head(tensor, pid_bh, heads):
    return tensor.ptr + pid_bh // heads * tensor.stride_b + pid_bh % heads * tensor.stride_h


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return zeros [ROWS, COLUMNS]. A size out of a tuple is constant to Triton only as an argument."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _zero_tiles(ROWS: tl.constexpr, TOKEN_TILES: tl.constexpr):
    """Return zeros as tiles [ROWS, tokens]."""
    tiles = ()
    for t in tl.static_range(len(TOKEN_TILES)):
        tiles = tiles + (_zeros(ROWS, TOKEN_TILES[t]),)
    return tiles


@triton.jit
def _load_tiles(head_ptr, stride_n, offs_c, mask_c, tokens, TOKEN_TILES: tl.constexpr):
    """Load tiles [tokens, channels] of a head, zero outside."""
    tiles = ()
    start = 0
    for t in tl.static_range(len(TOKEN_TILES)):
        offs_n = start + tl.arange(0, TOKEN_TILES[t])
        mask = (offs_n < tokens)[:, None] & mask_c[None, :]
        tile = tl.load(head_ptr + offs_n[:, None] * stride_n + offs_c[None, :], mask=mask, other=0.0)
        tiles = tiles + (tile,)
        start += TOKEN_TILES[t]
    return tiles


@triton.jit
def _store_tiles(head_ptr, stride_n, tiles, factors, offs_c, mask_c, tokens, TOKEN_TILES: tl.constexpr):
    """Write tiles [channels, tokens], each channel times its factor."""
    start = 0
    for t in tl.static_range(len(TOKEN_TILES)):
        offs_n = start + tl.arange(0, TOKEN_TILES[t])
        tile = (tiles[t] * factors[:, None]).to(head_ptr.dtype.element_ty)
        mask = mask_c[:, None] & (offs_n < tokens)[None, :]
        tl.store(head_ptr + offs_c[:, None] + offs_n[None, :] * stride_n, tile, mask=mask)
        start += TOKEN_TILES[t]


@triton.jit
def _contract(left, right):
    """Sum products over the tokens: tiles [tokens, M], tiles [tokens, K] -> [M, K]."""
    product = tl.dot(tl.trans(left[0]), right[0])
    for t in tl.static_range(1, len(left)):
        product = tl.dot(tl.trans(left[t]), right[t], product)
    return product


@triton.jit
def _accumulate(tiles, weights, values):
    """Add products over the channels: tiles [M, tokens], [M, K], tiles [tokens, K] -> tiles [M, tokens]."""
    new_tiles = ()
    for t in tl.static_range(len(tiles)):
        new_tiles = new_tiles + (tl.dot(weights, tl.trans(values[t]), tiles[t]),)
    return new_tiles
