"""Tuples of tiles along the tokens, and the dropout mask of a tile.

The tiles of a tuple cover the token axis side by side: ``TILES`` are their numbers of tokens, ``STARTS`` their first.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class HeadMap(NamedTuple):
    """A tensor (B, H, N, C), or (B, N, C) without heads, of any strides."""

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_n: int
    stride_c: int


def map_of(tensor: Tensor) -> HeadMap:
    """Return a tensor and its strides for a kernel; without heads every head reads the same memory."""
    batch, *head, token, channel = tensor.stride()
    return HeadMap(tensor, batch, *(head or [0]), token, channel)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return zeros [ROWS, COLUMNS]. A size out of a tuple is constant to Triton only as an argument."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, TOKEN_TILES: tl.constexpr):
    """Return zeros as tiles [ROWS, tokens]."""
    tiles = ()
    for t in tl.static_range(len(TOKEN_TILES)):
        tiles = tiles + (zeros(ROWS, TOKEN_TILES[t]),)
    return tiles


@triton.jit
def load_rows(
    base_ptr, stride_c, stride_n, offs_c, tokens, CHANNELS: tl.constexpr, TILES: tl.constexpr, STARTS: tl.constexpr
):
    """Load tiles [channels, tokens], zero outside."""
    tiles = ()
    for t in tl.static_range(len(TILES)):
        offs_n = STARTS[t] + tl.arange(0, TILES[t])
        mask = (offs_c < CHANNELS)[:, None] & (offs_n < tokens)[None, :]
        tile = tl.load(base_ptr + offs_c[:, None] * stride_c + offs_n[None, :] * stride_n, mask=mask, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_columns(
    base_ptr, stride_c, stride_n, offs_c, tokens, CHANNELS: tl.constexpr, TILES: tl.constexpr, STARTS: tl.constexpr
):
    """Load tiles [tokens, channels], zero outside."""
    tiles = ()
    for t in tl.static_range(len(TILES)):
        offs_n = STARTS[t] + tl.arange(0, TILES[t])
        mask = (offs_n < tokens)[:, None] & (offs_c < CHANNELS)[None, :]
        tile = tl.load(base_ptr + offs_n[:, None] * stride_n + offs_c[None, :] * stride_c, mask=mask, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def store_rows(
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
def contract(rows, columns, PRECISION: tl.constexpr):
    """Sum products over the tokens: tiles [M, tokens], tiles [tokens, K] -> [M, K]."""
    product = tl.dot(rows[0], columns[0], input_precision=PRECISION)
    for t in tl.static_range(1, len(rows)):
        product = tl.dot(rows[t], columns[t], product, input_precision=PRECISION)
    return product


@triton.jit
def shrink_and_accumulate(tiles, shrink, weights, values, PRECISION: tl.constexpr):
    """Return ``tiles * shrink + weights values``: tiles [M, tokens], [M, K], tiles [K, tokens]."""
    new_tiles = ()
    for t in tl.static_range(len(tiles)):
        tile = tl.dot(weights, values[t], tiles[t] * shrink[:, None], input_precision=PRECISION)
        new_tiles = new_tiles + (tile,)
    return new_tiles


@triton.jit
def accumulate_transposed(tiles, weights, columns, PRECISION: tl.constexpr):
    """Return ``tiles + weights columns^T``: tiles [M, tokens], [M, K], tiles [tokens, K]."""
    new_tiles = ()
    for t in tl.static_range(len(tiles)):
        new_tiles = new_tiles + (tl.dot(weights, tl.trans(columns[t]), tiles[t], input_precision=PRECISION),)
    return new_tiles


@triton.jit
def inner_products(rows, other_rows):
    """Multiply and sum row by row over the tokens: two tuples of tiles [M, tokens] -> [M]."""
    total = tl.sum(rows[0].to(tl.float32) * other_rows[0].to(tl.float32), axis=1)
    for t in tl.static_range(1, len(rows)):
        total += tl.sum(rows[t].to(tl.float32) * other_rows[t].to(tl.float32), axis=1)
    return total


@triton.jit
def subtract_outer(tiles, rows, vector_ptr, shift, tokens, TILES: tl.constexpr, STARTS: tl.constexpr):
    """Subtract from tiles [M, tokens] the products of [M] with a vector in memory plus ``shift`` [tokens]."""
    new_tiles = ()
    for t in tl.static_range(len(TILES)):
        offs_n = STARTS[t] + tl.arange(0, TILES[t])
        vector = tl.load(vector_ptr + offs_n, mask=offs_n < tokens, other=0.0) + shift
        new_tiles = new_tiles + (tiles[t] - rows[:, None] * vector[None, :],)
    return new_tiles


@triton.jit
def weighted_sums(rows, shifts, weight_ptr, tokens, TILES: tl.constexpr, STARTS: tl.constexpr):
    """Sum tiles [M, tokens] over the tokens, each row less its shift, each token times its weight -> [M]."""
    total = tl.zeros([rows[0].shape[0]], tl.float32)
    for t in tl.static_range(len(TILES)):
        offs_n = STARTS[t] + tl.arange(0, TILES[t])
        weights = tl.load(weight_ptr + offs_n, mask=offs_n < tokens, other=0.0)
        total += tl.sum((rows[t].to(tl.float32) - shifts[:, None]) * weights[None, :], axis=1)
    return total


@triton.jit
def keep_rows(row_key_ptr, row, mask, offs_column, rows, threshold):
    """Return the dropout mask [rows, columns]."""
    first, second = load_row_keys(row_key_ptr, row, mask, rows)
    return hash(first[:, None], second[:, None], offs_column[None, :]) >= threshold


@triton.jit
def keep_columns(row_key_ptr, row, mask, offs_column, rows, threshold):
    """Return the same mask transposed, [columns, rows]."""
    first, second = load_row_keys(row_key_ptr, row, mask, rows)
    return hash(first[None, :], second[None, :], offs_column[:, None]) >= threshold


@triton.jit
def load_row_keys(row_key_ptr, row, mask, rows):
    """Load both keys of each row of the dropout mask."""
    first = tl.load(row_key_ptr + row, mask=mask, other=0).to(tl.uint32, bitcast=True)
    second = tl.load(row_key_ptr + rows + row, mask=mask, other=0).to(tl.uint32, bitcast=True)
    return first, second


@triton.jit
def hash(first, second, column):
    """Return the 32-bit hash of an entry (kernels/dropout.py), moved to the range of int32 in its order."""
    word = column.to(tl.uint32) * 0x9E3779B9 + first
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15) ^ second) * 0xD35A2D97
    return (word ^ 0x80000000).to(tl.int32, bitcast=True)
