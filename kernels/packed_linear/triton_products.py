"""Shared parts of the kernels of block-diagonal linear maps: where a program's tile lies, and the products of its tile.

The programs of a launch are numbered scale by scale; a scale's programs walk down groups of rows, column by column, so
that the tokens of a group and the weights come from the L2 cache.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Packed(NamedTuple):
    """Packed tokens (B, N, channels), or (B, N, H, channels); channels are adjacent."""

    ptr: Tensor
    stride_sample: int
    stride_token: int
    stride_head: int  # 0 without heads


@triton.jit
def of_scale(values, scale):
    """Return the entry of a tuple that belongs to a scale known only at run time."""
    chosen = values[0]
    for place in tl.static_range(1, len(values)):
        chosen = tl.where(scale == place, values[place], chosen)
    return chosen


@triton.jit
def before_scale(values, scale):
    """Return the sum of a tuple's entries that belong to earlier scales."""
    total = scale * 0
    for place in tl.static_range(len(values) - 1):
        total += tl.where(scale > place, values[place], 0)
    return total


@triton.jit
def locate(tile, TILES: tl.constexpr, multiple):
    """Return a tile's scale and its number there; each scale has ``multiple`` times its entry of ``TILES``."""
    scale = tile * 0
    end = tile * 0
    for place in tl.static_range(len(TILES) - 1):
        end += TILES[place] * multiple
        scale += (tile >= end).to(tl.int32)
    return scale, tile - before_scale(TILES, scale) * multiple


@triton.jit
def locate_block(rows, COLUMN_BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Return the scale, row block and column block of this program."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    # Backwards: the last scale, as a rule the widest, has the longest programs, and they start first.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    scale, local = locate(pid, COLUMN_BLOCKS, row_blocks)
    group_programs = GROUP * of_scale(COLUMN_BLOCKS, scale)
    first_row_block = local // group_programs * GROUP
    group_rows = tl.minimum(row_blocks - first_row_block, GROUP)
    in_group = local % group_programs
    return scale, first_row_block + in_group % group_rows, in_group // group_rows


@triton.jit
def row_offsets(tokens, offs_row, tokens_per_sample):
    """Return where rows of (B, N) begin, numbered through all samples."""
    sample = offs_row // tokens_per_sample
    token = offs_row % tokens_per_sample
    return sample.to(tl.int64) * tokens.stride_sample + token.to(tl.int64) * tokens.stride_token


@triton.jit
def head_offsets(tokens, offs_channel, width, HEADS: tl.constexpr):
    """Return where the channels of a scale of ``width`` lie in a token, numbered through all heads."""
    return offs_channel if HEADS == 1 else offs_channel // width * tokens.stride_head + offs_channel % width


@triton.jit
def projected(
    tokens,
    weights,
    biases,
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
    """Return a tile of sum over i of tokens[row, start + i] weight[head, o, i] + bias[head, o], in float32.

    Also return the tile's scale, rows and columns; the columns of a scale are numbered through all heads.
    """
    scale, pid_row, pid_column = locate_block(rows, COLUMN_BLOCKS, BLOCK_ROWS, GROUP)
    in_width = of_scale(IN_WIDTHS, scale)
    columns = of_scale(OUT_WIDTHS, scale) * HEADS
    offs_row = pid_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_column = pid_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offs_in = tl.arange(0, BLOCK_STEP)
    # Past the end the last row and column are computed again, and not stored.
    clamped_row = tl.minimum(offs_row, rows - 1)
    clamped_column = tl.minimum(offs_column, columns - 1)
    offsets = row_offsets(tokens, clamped_row, tokens_per_sample)
    tokens_ptrs = tokens.ptr + before_scale(IN_WIDTHS, scale) + offsets[:, None] + offs_in[None, :]
    weight_ptrs = of_scale(weights, scale) + clamped_column[None, :] * in_width + offs_in[:, None]

    output = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    for first in range(0, in_width, BLOCK_STEP):
        mask_in = first + offs_in < in_width
        rows_in = tl.load(tokens_ptrs, mask=mask_in[None, :], other=0.0)  # [BLOCK_ROWS, BLOCK_STEP]
        weight = tl.load(weight_ptrs, mask=mask_in[:, None], other=0.0)  # [BLOCK_STEP, BLOCK_COLUMNS]
        output = tl.dot(rows_in, weight, output, input_precision=PRECISION)
        tokens_ptrs += BLOCK_STEP
        weight_ptrs += BLOCK_STEP
    if len(biases) > 0:
        output += tl.load(of_scale(biases, scale) + clamped_column).to(tl.float32)[None, :]
    return output, scale, offs_row, offs_column


@triton.jit
def projected_back(
    gradient,
    weights,
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
    """Return a tile of sum over head and o of gradient[row, head, start + o] weight[head, o, i], in float32.

    Also return the tile's scale, rows and columns.
    """
    scale, pid_row, pid_column = locate_block(rows, COLUMN_BLOCKS, BLOCK_ROWS, GROUP)
    in_width = of_scale(IN_WIDTHS, scale)
    out_width = of_scale(OUT_WIDTHS, scale)
    length = out_width * HEADS
    offs_row = pid_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_column = pid_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    # Past the end the last row is computed again, and not stored. Columns are masked instead: the compiler would not
    # know that clamped ones are adjacent, and would load them one by one.
    clamped_row = tl.minimum(offs_row, rows - 1)
    mask_column = offs_column < in_width
    offsets = row_offsets(gradient, clamped_row, tokens_per_sample)
    gradient_ptrs = gradient.ptr + before_scale(OUT_WIDTHS, scale) + offsets[:, None]
    weight_ptrs = of_scale(weights, scale) + offs_column[None, :]

    d_tokens = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    for first in range(0, length, BLOCK_STEP):
        offs_out = first + tl.arange(0, BLOCK_STEP)
        mask_out = offs_out < length
        outputs = head_offsets(gradient, offs_out, out_width, HEADS)
        rows_in = tl.load(gradient_ptrs + outputs[None, :], mask=mask_out[None, :], other=0.0)
        mask_weight = mask_out[:, None] & mask_column[None, :]
        weight = tl.load(weight_ptrs + offs_out[:, None] * in_width, mask=mask_weight, other=0.0)
        # [BLOCK_ROWS, BLOCK_STEP] @ [BLOCK_STEP, BLOCK_COLUMNS]
        d_tokens = tl.dot(rows_in, weight, d_tokens, input_precision=PRECISION)
    return d_tokens, scale, offs_row, offs_column
