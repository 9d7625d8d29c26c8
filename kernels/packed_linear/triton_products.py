"""What kernels of block-diagonal linear maps share: where a program's tile lies, and the products of its tile.

The programs of a launch are numbered scale by scale; a scale's programs walk down groups of rows, column by column, so
that the tokens of a group and the weights come from the L2 cache.
"""

import triton
import triton.language as tl


@triton.jit
def of_scale(values, scale):
    """The entry of a tuple that belongs to a scale known at run time only."""
    chosen = values[0]
    for place in tl.static_range(1, len(values)):
        chosen = tl.where(scale == place, values[place], chosen)
    return chosen


@triton.jit
def before_scale(values, scale):
    """The sum of a tuple's entries that belong to earlier scales."""
    total = scale * 0
    for place in tl.static_range(len(values) - 1):
        total += tl.where(scale > place, values[place], 0)
    return total


@triton.jit
def locate(tile, TILES: tl.constexpr, multiple):
    """Scale and number within the scale of a tile, where each scale has ``multiple`` times ``TILES`` of them."""
    scale = tile * 0
    end = tile * 0
    for place in tl.static_range(len(TILES) - 1):
        end += TILES[place] * multiple
        scale += (tile >= end).to(tl.int32)
    return scale, tile - before_scale(TILES, scale) * multiple


@triton.jit
def locate_block(rows, COLUMN_BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Scale, row block and column block of this program."""
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
def row_offsets(offs_row, tokens_per_sample, stride_sample, stride_token):
    """Where rows of (B, N) begin, numbered through all samples."""
    sample = offs_row // tokens_per_sample
    return sample.to(tl.int64) * stride_sample + (offs_row % tokens_per_sample).to(tl.int64) * stride_token


@triton.jit
def projected(
    tokens_ptr,
    weights,
    biases,
    rows,
    tokens_per_sample,
    stride_sample,
    stride_token,
    HEADS: tl.constexpr,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """This program's tile of sum over i of tokens[row, start + i] weight[head, o, i] + bias[head, o], in float32.

    With it the tile's scale, rows and columns (head by head, those of a scale).
    """
    scale, pid_row, pid_column = locate_block(rows, COLUMN_BLOCKS, BLOCK_ROWS, GROUP)
    in_width = of_scale(IN_WIDTHS, scale)
    columns = of_scale(OUT_WIDTHS, scale) * HEADS
    offs_row = pid_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_column = pid_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offs_in = tl.arange(0, BLOCK_IN)
    # Past the end the last row and column are computed once more, and not stored.
    clamped_row = tl.minimum(offs_row, rows - 1)
    clamped_column = tl.minimum(offs_column, columns - 1)
    offsets = row_offsets(clamped_row, tokens_per_sample, stride_sample, stride_token)
    tokens_ptrs = tokens_ptr + before_scale(IN_WIDTHS, scale) + offsets[:, None] + offs_in[None, :]
    weight_ptrs = of_scale(weights, scale) + clamped_column[None, :] * in_width + offs_in[:, None]

    output = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    for first in range(0, in_width, BLOCK_IN):
        mask_in = first + offs_in < in_width
        tokens = tl.load(tokens_ptrs, mask=mask_in[None, :], other=0.0)  # [BLOCK_ROWS, BLOCK_IN]
        weight = tl.load(weight_ptrs, mask=mask_in[:, None], other=0.0)  # [BLOCK_IN, BLOCK_COLUMNS]
        output = tl.dot(tokens, weight, output, input_precision=PRECISION)
        tokens_ptrs += BLOCK_IN
        weight_ptrs += BLOCK_IN
    if len(biases) > 0:
        output += tl.load(of_scale(biases, scale) + clamped_column).to(tl.float32)[None, :]
    return output, scale, offs_row, offs_column


@triton.jit
def projected_back(
    gradient_ptr,
    weights,
    rows,
    tokens_per_sample,
    stride_sample,
    stride_token,
    stride_head,
    HEADS: tl.constexpr,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """This program's tile of sum over head and o of gradient[row, head, start + o] weight[head, o, i], in float32.

    With it the tile's scale, rows and columns.
    """
    scale, pid_row, pid_column = locate_block(rows, COLUMN_BLOCKS, BLOCK_ROWS, GROUP)
    in_width = of_scale(IN_WIDTHS, scale)
    out_width = of_scale(OUT_WIDTHS, scale)
    length = out_width * HEADS
    offs_row = pid_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_column = pid_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    # Past the end the last row is computed once more, and not stored. (Columns are masked: clamped ones would no longer
    # be known to lie side by side in memory, and be loaded one by one.)
    clamped_row = tl.minimum(offs_row, rows - 1)
    mask_column = offs_column < in_width
    offsets = row_offsets(clamped_row, tokens_per_sample, stride_sample, stride_token)
    gradient_ptrs = gradient_ptr + before_scale(OUT_WIDTHS, scale) + offsets[:, None]
    weight_ptrs = of_scale(weights, scale) + offs_column[None, :]

    d_tokens = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    for first in range(0, length, BLOCK_OUT):
        offs_out = first + tl.arange(0, BLOCK_OUT)
        mask_out = offs_out < length
        head_offsets = offs_out // out_width * stride_head + offs_out % out_width
        gradient = tl.load(gradient_ptrs + head_offsets[None, :], mask=mask_out[None, :], other=0.0)
        mask_weight = mask_out[:, None] & mask_column[None, :]
        weight = tl.load(weight_ptrs + offs_out[:, None] * in_width, mask=mask_weight, other=0.0)
        # [BLOCK_ROWS, BLOCK_OUT] @ [BLOCK_OUT, BLOCK_COLUMNS]
        d_tokens = tl.dot(gradient, weight, d_tokens, input_precision=PRECISION)
    return d_tokens, scale, offs_row, offs_column
