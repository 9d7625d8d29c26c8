"""Triton kernels of the block-diagonal linear map: all scales and heads in one launch, forward and both gradients.

A scale's weight (H, O, I) is read as a matrix of H * O rows, which are the columns of its part of the output.
Everything is summed in float32, in a fixed order.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import SMALLEST_TILE, add_parts, current_architecture, product_precision
from .triton_products import (
    Packed,
    before_scale,
    head_offsets,
    locate,
    of_scale,
    projected,
    projected_back,
    row_offsets,
)


class Tile(NamedTuple):
    """Block sizes of one program: its part of the result, a step of the contraction, warps and pipeline stages."""

    rows: int
    columns: int
    contraction: int
    num_warps: int
    num_stages: int


# The first tile that makes enough programs is taken. Larger tiles read less: one of 128 x 128 loads half the bytes a
# multiplication of one of 64 x 64. 64 rows are the least that a warp group multiplies at once on Hopper.
HALF_PRECISION_TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 32, 64, 4, 4),
)
# Without tf32 a float32 product is made of scalar multiply-adds on registers; larger tiles than these spill.
FULL_PRECISION_TILES = (Tile(64, 64, 16, 8, 2), Tile(32, 32, 32, 4, 2))

MULTIPROCESSORS = 132  # of an H100 or H200; a constant, so that results do not depend on the GPU's size
ENOUGH_PROGRAMS = 2 * MULTIPROCESSORS  # hides the end of a launch, where some have run out of work
BYTES_A_LAUNCH = 8 << 20  # what memory moves in the two microseconds that one more launch takes
FEWEST_ROWS_A_SPLIT = 128  # below, writing and adding the partial sums costs more than the products
GROUP_ROWS = 8


@triton.jit(do_not_specialize=["rows", "tokens_per_sample"])
def project_kernel(
    tokens,
    weights,
    biases,
    output,
    rows,
    tokens_per_sample,
    HEADS: tl.constexpr,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write output[row, head, start + o] = sum over i of tokens[row, start + i] weight[head, o, i] + bias[head, o]."""
    product, scale, offs_row, offs_column = projected(
        tokens,
        weights,
        biases,
        rows,
        tokens_per_sample,
        HEADS,
        IN_WIDTHS,
        OUT_WIDTHS,
        COLUMN_BLOCKS,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_STEP,
        GROUP,
    )  # [BLOCK_ROWS, BLOCK_COLUMNS]
    out_width = of_scale(OUT_WIDTHS, scale)
    outputs = head_offsets(output, offs_column, out_width, HEADS)
    output_ptrs = output.ptr + before_scale(OUT_WIDTHS, scale) + outputs[None, :]
    output_ptrs += offs_row.to(tl.int64)[:, None] * output.stride_token
    mask = (offs_row < rows)[:, None] & (offs_column < out_width * HEADS)[None, :]
    tl.store(output_ptrs, product.to(output.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens_per_sample"])
def project_back_kernel(
    gradient,
    weights,
    d_tokens,
    rows,
    tokens_per_sample,
    HEADS: tl.constexpr,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write d_tokens[row, start + i] = sum over head and o of gradient[row, head, start + o] weight[head, o, i]."""
    product, scale, offs_row, offs_column = projected_back(
        gradient,
        weights,
        rows,
        tokens_per_sample,
        HEADS,
        IN_WIDTHS,
        OUT_WIDTHS,
        COLUMN_BLOCKS,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_STEP,
        GROUP,
    )  # [BLOCK_ROWS, BLOCK_COLUMNS]
    mask_column = offs_column < of_scale(IN_WIDTHS, scale)
    d_tokens_ptrs = d_tokens.ptr + before_scale(IN_WIDTHS, scale) + offs_column[None, :]
    d_tokens_ptrs += offs_row.to(tl.int64)[:, None] * d_tokens.stride_token
    mask = (offs_row < rows)[:, None] & mask_column[None, :]
    tl.store(d_tokens_ptrs, product.to(d_tokens.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_a_split", "tokens_per_sample"])
def correlate_kernel(
    gradient,
    tokens,
    sums_ptr,
    rows,
    rows_a_split,
    tokens_per_sample,
    HEADS: tl.constexpr,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    WEIGHT_SIZES: tl.constexpr,
    TILES: tl.constexpr,
    BIAS_START: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Write the sums of gradient[row, head, o] tokens[row, i] and of gradient[row, head, o] over a split's rows."""
    pid_split = tl.program_id(1)
    scale, tile = locate(tl.num_programs(0) - 1 - tl.program_id(0), TILES, 1)
    in_width = of_scale(IN_WIDTHS, scale)
    out_width = of_scale(OUT_WIDTHS, scale)
    in_blocks = tl.cdiv(in_width, BLOCK_IN)
    pid_out = tile // in_blocks
    pid_in = tile % in_blocks
    offs_out = pid_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    offs_in = pid_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    mask_out = offs_out < out_width * HEADS
    mask_in = offs_in < in_width
    outputs = head_offsets(gradient, offs_out, out_width, HEADS)
    gradient_ptrs = gradient.ptr + before_scale(OUT_WIDTHS, scale) + outputs[:, None]
    tokens_ptrs = tokens.ptr + before_scale(IN_WIDTHS, scale) + offs_in[None, :]

    end = tl.minimum((pid_split + 1) * rows_a_split, rows)
    d_weight = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)  # [BLOCK_OUT, BLOCK_IN]
    d_bias = tl.zeros([BLOCK_OUT], tl.float32)  # [BLOCK_OUT]
    for first in range(pid_split * rows_a_split, end, BLOCK_ROWS):
        offs_row = first + tl.arange(0, BLOCK_ROWS)
        mask_row = offs_row < end
        gradient_rows = row_offsets(gradient, offs_row, tokens_per_sample)
        tokens_rows = row_offsets(tokens, offs_row, tokens_per_sample)
        mask_gradient = mask_out[:, None] & mask_row[None, :]
        gradient_tile = tl.load(gradient_ptrs + gradient_rows[None, :], mask=mask_gradient, other=0.0)
        mask_tokens = mask_row[:, None] & mask_in[None, :]
        tokens_tile = tl.load(tokens_ptrs + tokens_rows[:, None], mask=mask_tokens, other=0.0)
        # [BLOCK_OUT, BLOCK_ROWS] @ [BLOCK_ROWS, BLOCK_IN]
        d_weight = tl.dot(gradient_tile, tokens_tile, d_weight, input_precision=PRECISION)
        if BIAS_START < TOTAL and pid_in == 0:
            d_bias += tl.sum(gradient_tile.to(tl.float32), axis=1)

    sums_ptr += pid_split.to(tl.int64) * TOTAL
    d_weight_ptrs = sums_ptr + before_scale(WEIGHT_SIZES, scale) + offs_out[:, None] * in_width + offs_in[None, :]
    mask = mask_out[:, None] & mask_in[None, :]
    tl.store(d_weight_ptrs, d_weight.to(sums_ptr.dtype.element_ty), mask=mask)
    if BIAS_START < TOTAL:
        d_bias_ptrs = sums_ptr + BIAS_START + before_scale(OUT_WIDTHS, scale) * HEADS + offs_out
        mask_bias = mask_out & (tl.full([BLOCK_OUT], pid_in, tl.int32) == 0)
        tl.store(d_bias_ptrs, d_bias.to(sums_ptr.dtype.element_ty), mask=mask_bias)


def packed_linear(tokens: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Launch (B, N, sum I), [([H,] O, I)], [([H,] O)] or nothing -> (B, N, [H,] sum O)."""
    heads, in_widths, out_widths = sizes_of(weights)
    output = tokens.new_empty(*tokens.shape[:2], *weights[0].shape[:-2], sum(out_widths))
    columns = [heads * width for width in out_widths]
    launch_by_blocks(
        project_kernel,
        choose_tile(tokens.dtype, rows_of(tokens), columns, max(in_widths)),
        columns,
        tokens,
        weights,
        tokens=packed(tokens),
        biases=contiguous(biases),
        output=packed(output),
        HEADS=heads,
        IN_WIDTHS=in_widths,
        OUT_WIDTHS=out_widths,
    )
    return output


def token_gradient(gradient: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the gradient of the tokens: (B, N, [H,] sum O), [([H,] O, I)] -> (B, N, sum I)."""
    heads, in_widths, out_widths = sizes_of(weights)
    d_tokens = gradient.new_empty(*gradient.shape[:2], sum(in_widths))
    launch_by_blocks(
        project_back_kernel,
        choose_tile(gradient.dtype, rows_of(gradient), in_widths, heads * max(out_widths)),
        in_widths,
        gradient,
        weights,
        gradient=packed(gradient),
        d_tokens=packed(d_tokens),
        HEADS=heads,
        IN_WIDTHS=in_widths,
        OUT_WIDTHS=out_widths,
    )
    return d_tokens


def weight_gradient(
    gradient: Tensor, tokens: Tensor, in_widths: Sequence[int], out_widths: Sequence[int], has_biases: bool
) -> Tensor:
    """Return the gradients of all weights and then of all biases, flattened one behind the other."""
    heads = gradient.shape[2] if gradient.ndim == 4 else 1
    weight_sizes = tuple(heads * out * width for out, width in zip(out_widths, in_widths, strict=True))
    total = sum(weight_sizes) + (heads * sum(out_widths) if has_biases else 0)
    rows = rows_of(tokens)
    if rows == 0:
        return tokens.new_zeros(total)
    tile, tiles, splits = _choose_split(tokens.dtype, rows, [heads * width for width in out_widths], in_widths)
    rows_a_split = triton.cdiv(triton.cdiv(rows, splits), tile.contraction) * tile.contraction
    splits = triton.cdiv(rows, rows_a_split)
    # A single split is the result itself; several are rounded once, after they are added.
    sums = tokens.new_empty(splits, total, dtype=tokens.dtype if splits == 1 else torch.float32)
    correlate_kernel[(sum(tiles), splits)](
        gradient=packed(gradient),
        tokens=packed(tokens),
        sums_ptr=sums,
        rows=rows,
        rows_a_split=rows_a_split,
        tokens_per_sample=tokens.shape[1],
        HEADS=heads,
        IN_WIDTHS=tuple(in_widths),
        OUT_WIDTHS=tuple(out_widths),
        WEIGHT_SIZES=weight_sizes,
        TILES=tiles,
        BIAS_START=sum(weight_sizes),
        TOTAL=total,
        PRECISION=product_precision(tokens.dtype),
        BLOCK_OUT=tile.rows,
        BLOCK_IN=tile.columns,
        BLOCK_ROWS=tile.contraction,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return sums[0] if splits == 1 else add_parts(sums, tokens.dtype)


def launch_by_blocks(
    kernel: Any, tile: Tile, columns: Sequence[int], tokens: Tensor, weights: Sequence[Tensor], /, **arguments: Any
) -> None:
    """Launch a kernel whose programs each make a tile of a result that has one row for each of ``tokens``.

    Args:
        kernel: kernel that is built on the products of :mod:`.triton_products`.
        tile: block sizes.
        columns: columns of the result, by scale.
        tokens: (B, N, ...), which may be empty.
        weights: weight of each scale.
        arguments: other arguments of the kernel.
    """
    rows = rows_of(tokens)
    if rows == 0:
        return
    column_blocks = tuple(triton.cdiv(width, tile.columns) for width in columns)
    kernel[(triton.cdiv(rows, tile.rows) * sum(column_blocks),)](
        **arguments,
        weights=contiguous(weights),
        rows=rows,
        tokens_per_sample=tokens.shape[1],
        COLUMN_BLOCKS=column_blocks,
        PRECISION=product_precision(tokens.dtype),
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_STEP=tile.contraction,
        GROUP=GROUP_ROWS,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def packed(tokens: Tensor) -> Packed:
    """Return (B, N, [H,] channels) for a kernel, copied where its channels are not adjacent."""
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    return Packed(tokens, *tokens.stride()[:2], tokens.stride(2) if tokens.ndim == 4 else 0)


def rows_of(tokens: Tensor) -> int:
    """Return the number of tokens of all samples."""
    return tokens.shape[0] * tokens.shape[1]


def contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors of all scales, each without gaps."""
    return tuple(tensor.contiguous() for tensor in tensors)


def sizes_of(weights: Sequence[Tensor]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return the heads, and the widths in and out of each scale, of ([H,] O, I)."""
    heads = weights[0].shape[0] if weights[0].ndim == 3 else 1
    return heads, tuple(weight.shape[-1] for weight in weights), tuple(weight.shape[-2] for weight in weights)


def choose_tile(
    dtype: torch.dtype, rows: int, columns: Sequence[int], contraction: int, most_bytes: float = math.inf
) -> Tile:
    """Return the largest tile of at most ``most_bytes`` that makes enough programs, or else the smallest."""
    tiles = [tile for tile in _tiles(dtype) if tile.rows * tile.columns * dtype.itemsize <= most_bytes]
    tiles = tiles or _tiles(dtype)[-1:]
    for tile in tiles:
        if triton.cdiv(rows, tile.rows) * sum(triton.cdiv(width, tile.columns) for width in columns) >= ENOUGH_PROGRAMS:
            break
    return _fitted(tile, rows, max(columns), contraction, dtype)


def _choose_split(
    dtype: torch.dtype, rows: int, row_widths: Sequence[int], column_widths: Sequence[int]
) -> tuple[Tile, tuple[int, ...], int]:
    """Return tile, tiles of each scale, and splits of the rows that move the fewest bytes and leave no GPU half idle.

    Large tiles read less, but there are few of them: to occupy a GPU they need splits, whose partial sums are written
    and read again.
    """
    best_cost = math.inf
    for tile in _tiles(dtype):
        tiles = tuple(
            triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
            for height, width in zip(row_widths, column_widths, strict=True)
        )
        programs, splits = sum(tiles), 1
        moved = programs * rows * (tile.rows + tile.columns) * dtype.itemsize
        if programs < MULTIPROCESSORS and rows >= 2 * FEWEST_ROWS_A_SPLIT:
            splits = min(triton.cdiv(ENOUGH_PROGRAMS, programs), rows // FEWEST_ROWS_A_SPLIT)
            partial_sums = sum(height * width for height, width in zip(row_widths, column_widths, strict=True))
            moved += 2 * splits * partial_sums * torch.float32.itemsize + BYTES_A_LAUNCH
        cost = moved * max(1.0, MULTIPROCESSORS / (programs * splits))
        if cost < best_cost:
            best_cost, best = cost, (tile, tiles, splits)
    tile, tiles, splits = best
    return _fitted(tile, max(row_widths), max(column_widths), rows, dtype), tiles, splits


def _tiles(dtype: torch.dtype) -> tuple[Tile, ...]:
    has_matrix_unit = dtype != torch.float32 or product_precision(dtype) != "ieee"
    return HALF_PRECISION_TILES if has_matrix_unit else FULL_PRECISION_TILES


def _fitted(tile: Tile, rows: int, columns: int, contraction: int, dtype: torch.dtype) -> Tile:
    """Return a tile no larger than the problem, with as many stages as fit into shared memory."""
    sizes = [
        max(SMALLEST_TILE, min(block, triton.next_power_of_2(size)))
        for block, size in zip(tile[:3], (rows, columns, contraction), strict=True)
    ]
    bytes_a_stage = (sizes[0] + sizes[1]) * sizes[2] * dtype.itemsize
    stages = min(tile.num_stages, current_architecture().shared_memory // bytes_a_stage)
    return Tile(*sizes, tile.num_warps, max(1, stages))
