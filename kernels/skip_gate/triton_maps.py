"""Triton kernels that read and write whole maps: their means, both halves of the output, and the maps' gradients.

Tokens and decoder feature are grids of cells over the full map. A program holds a few cells of one grid row side by
side, [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C], and walks down rows of pixels, so that no pixel looks for its cell by
division; BLOCK_COLUMNS divides the width of a cell. Maps are read through their strides: one kernel serves contiguous
and channels-last memory, and only block sizes know the difference. All arithmetic is float32.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Map(NamedTuple):
    """A map (B, C, H, W); pixels follow each other at one distance, row after row."""

    ptr: Tensor
    stride_batch: int
    stride_channel: int
    stride_pixel: int
    channels: int
    pixels: int


class Grid(NamedTuple):
    """How the full map is cut into cells, and its rows into groups, one for a program."""

    height: int
    width_units: int  # of WIDTH_UNIT pixels: the compiler sees what divides the width, and loads whole vectors
    across: int  # cells in a row
    cell_height: int
    groups: int
    rows_a_group: int


@triton.jit
def _at(map, sample, first_channel, first_pixel):
    """Where a block of channels and pixels of one image starts."""
    ptr = map.ptr + sample.to(tl.int64) * map.stride_batch
    ptr += first_channel.to(tl.int64) * map.stride_channel
    return ptr + first_pixel.to(tl.int64) * map.stride_pixel


@triton.jit
def _mean_part(map, sample, part, parts, first_channel, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """One part of the means over the pixels of an image."""
    # Whole blocks, as a part that starts or ends anywhere would be read element by element.
    pixels_a_part = tl.cdiv(tl.cdiv(map.pixels, parts), BLOCK_PIXELS) * BLOCK_PIXELS
    first_pixel = part * pixels_a_part
    offs_pixel = first_pixel + tl.arange(0, BLOCK_PIXELS)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = first_channel + offs_c < map.channels
    ptr = _at(map, sample, first_channel, first_pixel)
    offs = tl.arange(0, BLOCK_PIXELS)[:, None] * map.stride_pixel + offs_c[None, :] * map.stride_channel
    total = tl.zeros([BLOCK_PIXELS, BLOCK_C], tl.float32)
    for start in range(0, pixels_a_part, BLOCK_PIXELS):
        mask = (start + offs_pixel < map.pixels)[:, None] & mask_c[None, :]
        total += tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_PIXELS, BLOCK_C]
        ptr += BLOCK_PIXELS * map.stride_pixel
    return tl.sum(total, axis=0) / map.pixels  # [BLOCK_C]


@triton.jit
def pool_kernel(encoder, tokens, decoder, parts_ptr, parts, columns, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Parts of the means [gap(e) + gap(r), gap(d)]: (B, parts, C + D). A program has channels of e and r, or of d."""
    skip_blocks = tl.cdiv(encoder.channels, BLOCK_C)
    blocks = skip_blocks + tl.cdiv(columns - encoder.channels, BLOCK_C)
    pid_block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks % parts
    sample = tl.program_id(0) // blocks // parts
    parts_ptr += (sample * parts + part).to(tl.int64) * columns
    if pid_block < skip_blocks:
        first_channel = pid_block * BLOCK_C
        mean = _mean_part(encoder, sample, part, parts, first_channel, BLOCK_PIXELS, BLOCK_C)
        if tokens is not None:
            mean += _mean_part(tokens, sample, part, parts, first_channel, BLOCK_PIXELS, BLOCK_C)
        offs_c = first_channel + tl.arange(0, BLOCK_C)
        tl.store(parts_ptr + offs_c, mean, mask=offs_c < encoder.channels)
    elif decoder is not None:
        first_decoder_channel = (pid_block - skip_blocks) * BLOCK_C
        decoder_mean = _mean_part(decoder, sample, part, parts, first_decoder_channel, BLOCK_PIXELS, BLOCK_C)
        offs_d = first_decoder_channel + tl.arange(0, BLOCK_C)
        tl.store(parts_ptr + encoder.channels + offs_d, decoder_mean, mask=offs_d < decoder.channels)


@triton.jit
def _place(pid, grid, channels, BLOCK_CELLS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which image, group of rows, first cell and first channel are a program's."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    cell_blocks = tl.cdiv(grid.across, BLOCK_CELLS)
    first_channel = pid % channel_blocks * BLOCK_C
    first_cell = pid // channel_blocks % cell_blocks * BLOCK_CELLS
    group = pid // channel_blocks // cell_blocks
    return group // grid.groups, group % grid.groups, first_cell, first_channel


@triton.jit
def _pixels_of_cells(
    first_cell,
    first_column,
    width,
    mask_c,
    CELL_WIDTH: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Pixels of a row that belong to a block of cells [BLOCK_CELLS, BLOCK_COLUMNS, 1], and which are there."""
    offs_cell = first_cell + tl.arange(0, BLOCK_CELLS)
    offs_column = first_column + tl.arange(0, BLOCK_COLUMNS)
    offs_pixel = (offs_cell[:, None] * CELL_WIDTH + offs_column[None, :])[:, :, None]
    return offs_pixel, (offs_pixel < width) & mask_c[None, None, :]


@triton.jit
def _offsets(map, offs_pixel, BLOCK_C: tl.constexpr):
    """Elements of a row of ``map``: [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C]."""
    return offs_pixel * map.stride_pixel + tl.arange(0, BLOCK_C)[None, None, :] * map.stride_channel


@triton.jit
def _cells(map, sample, row, first_cell, grid, first_channel, BLOCK_CELLS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to cells of a row of a coarse map [BLOCK_CELLS, BLOCK_C], and which are there."""
    offs_cell = first_cell + tl.arange(0, BLOCK_CELLS)
    offs_c = tl.arange(0, BLOCK_C)
    ptrs = _at(map, sample, first_channel, row * grid.across)
    ptrs += offs_cell[:, None] * map.stride_pixel + offs_c[None, :] * map.stride_channel
    return ptrs, (offs_cell < grid.across)[:, None] & (first_channel + offs_c < map.channels)[None, :]


@triton.jit
def _load_cells(map, sample, row, first_cell, grid, first_channel, BLOCK_CELLS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Cells of a row of a coarse map, beside the pixels of theirs: [BLOCK_CELLS, 1, BLOCK_C]; zero without a map."""
    cells = tl.zeros([BLOCK_CELLS, BLOCK_C], tl.float32)
    if map is not None:
        ptrs, mask = _cells(map, sample, row, first_cell, grid, first_channel, BLOCK_CELLS, BLOCK_C)
        cells += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return cells[:, None, :]


@triton.jit
def gate_skip_kernel(
    encoder,
    tokens,
    gate_ptr,
    output,
    grid,
    WIDTH_UNIT: tl.constexpr,
    CELL_WIDTH: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gated half of the output, ``s relu(e + up(r))``."""
    # Last to first: what was averaged last is still in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, group, first_cell, first_channel = _place(pid, grid, encoder.channels, BLOCK_CELLS, BLOCK_C)
    width = grid.width_units * WIDTH_UNIT
    mask_c = first_channel + tl.arange(0, BLOCK_C) < encoder.channels
    gate_ptr += sample.to(tl.int64) * encoder.channels + first_channel
    gate = tl.load(gate_ptr + tl.arange(0, BLOCK_C), mask=mask_c, other=0.0)  # [BLOCK_C]
    first_row = group * grid.rows_a_group
    encoder_ptr = _at(encoder, sample, first_channel, first_row * width)
    output_ptr = _at(output, sample, first_channel, first_row * width)
    for row in range(first_row, tl.minimum(first_row + grid.rows_a_group, grid.height)):
        token = _load_cells(
            tokens, sample, row // grid.cell_height, first_cell, grid, first_channel, BLOCK_CELLS, BLOCK_C
        )
        for first_column in range(0, CELL_WIDTH, BLOCK_COLUMNS):
            offs_pixel, mask = _pixels_of_cells(
                first_cell, first_column, width, mask_c, CELL_WIDTH, BLOCK_CELLS, BLOCK_COLUMNS
            )
            encoder_ptrs = encoder_ptr + _offsets(encoder, offs_pixel, BLOCK_C)
            skip = tl.load(encoder_ptrs, mask=mask, other=0.0).to(tl.float32) + token
            # What is no number must not become zero; minus infinity times a gate of zero is none.
            gated = tl.maximum(skip * gate[None, None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
            output_ptrs = output_ptr + _offsets(output, offs_pixel, BLOCK_C)
            tl.store(output_ptrs, gated.to(output.ptr.dtype.element_ty), mask=mask)
        encoder_ptr += width * encoder.stride_pixel
        output_ptr += width * output.stride_pixel


@triton.jit
def upsample_kernel(
    decoder,
    output,
    grid,
    WIDTH_UNIT: tl.constexpr,
    CELL_WIDTH: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The other half of the output, ``up(d)``."""
    pid = tl.program_id(0)
    sample, grid_row, first_cell, first_channel = _place(pid, grid, decoder.channels, BLOCK_CELLS, BLOCK_C)
    width = grid.width_units * WIDTH_UNIT
    mask_c = first_channel + tl.arange(0, BLOCK_C) < decoder.channels
    cell = _load_cells(decoder, sample, grid_row, first_cell, grid, first_channel, BLOCK_CELLS, BLOCK_C)
    values = tl.broadcast_to(cell, [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C]).to(output.ptr.dtype.element_ty)
    first_row = grid_row * grid.cell_height
    output_ptr = _at(output, sample, first_channel, first_row * width)
    for _ in range(grid.cell_height):
        for first_column in range(0, CELL_WIDTH, BLOCK_COLUMNS):
            offs_pixel, mask = _pixels_of_cells(
                first_cell, first_column, width, mask_c, CELL_WIDTH, BLOCK_CELLS, BLOCK_COLUMNS
            )
            tl.store(output_ptr + _offsets(output, offs_pixel, BLOCK_C), values, mask=mask)
        output_ptr += width * output.stride_pixel


@triton.jit
def gate_gradient_kernel(
    gradient,
    encoder,
    tokens,
    parts_ptr,
    grid,
    WIDTH_UNIT: tl.constexpr,
    CELL_WIDTH: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Parts of the gradient by the gate, the sum of ``g relu(e + up(r))`` over pixels: (B, parts, C)."""
    sample, group, first_cell, first_channel = _place(tl.program_id(0), grid, encoder.channels, BLOCK_CELLS, BLOCK_C)
    width = grid.width_units * WIDTH_UNIT
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < encoder.channels
    first_row = group * grid.rows_a_group
    encoder_ptr = _at(encoder, sample, first_channel, first_row * width)
    gradient_ptr = _at(gradient, sample, first_channel, first_row * width)
    total = tl.zeros([BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C], tl.float32)
    for row in range(first_row, tl.minimum(first_row + grid.rows_a_group, grid.height)):
        token = _load_cells(
            tokens, sample, row // grid.cell_height, first_cell, grid, first_channel, BLOCK_CELLS, BLOCK_C
        )
        for first_column in range(0, CELL_WIDTH, BLOCK_COLUMNS):
            offs_pixel, mask = _pixels_of_cells(
                first_cell, first_column, width, mask_c, CELL_WIDTH, BLOCK_CELLS, BLOCK_COLUMNS
            )
            encoder_ptrs = encoder_ptr + _offsets(encoder, offs_pixel, BLOCK_C)
            skip = tl.load(encoder_ptrs, mask=mask, other=0.0).to(tl.float32) + token
            gradient_ptrs = gradient_ptr + _offsets(gradient, offs_pixel, BLOCK_C)
            upstream = tl.load(gradient_ptrs, mask=mask, other=0.0).to(tl.float32)
            total += upstream * tl.maximum(skip, 0.0)  # [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C]
        encoder_ptr += width * encoder.stride_pixel
        gradient_ptr += width * gradient.stride_pixel
    parts_across = tl.cdiv(grid.across, BLOCK_CELLS)
    part = (sample * grid.groups + group) * parts_across + first_cell // BLOCK_CELLS
    sums = tl.sum(tl.reshape(total, [BLOCK_CELLS * BLOCK_COLUMNS, BLOCK_C]), axis=0)  # [BLOCK_C]
    tl.store(parts_ptr + part.to(tl.int64) * encoder.channels + offs_c, sums, mask=mask_c)


@triton.jit
def skip_gradient_kernel(
    gradient,
    encoder,
    tokens,
    gate_ptr,
    d_mean_ptr,
    d_encoder,
    d_tokens,
    columns,
    grid,
    WIDTH_UNIT: tl.constexpr,
    CELL_WIDTH: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients by encoder feature and tokens: ``s g`` where ``e + up(r)`` is positive, plus the mean's."""
    # Last to first: what the gate's gradient was summed of last is still in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, grid_row, first_cell, first_channel = _place(pid, grid, encoder.channels, BLOCK_CELLS, BLOCK_C)
    width = grid.width_units * WIDTH_UNIT
    mask_c = first_channel + tl.arange(0, BLOCK_C) < encoder.channels
    gate_ptr += sample.to(tl.int64) * encoder.channels + first_channel
    gate = tl.load(gate_ptr + tl.arange(0, BLOCK_C), mask=mask_c, other=0.0)  # [BLOCK_C]
    d_mean_ptr += sample.to(tl.int64) * columns + first_channel
    d_mean = tl.load(d_mean_ptr + tl.arange(0, BLOCK_C), mask=mask_c, other=0.0) / encoder.pixels  # [BLOCK_C]
    token = _load_cells(tokens, sample, grid_row, first_cell, grid, first_channel, BLOCK_CELLS, BLOCK_C)
    first_row = grid_row * grid.cell_height
    encoder_ptr = _at(encoder, sample, first_channel, first_row * width)
    gradient_ptr = _at(gradient, sample, first_channel, first_row * width)
    d_encoder_ptr = _at(d_encoder, sample, first_channel, first_row * width)
    total = tl.zeros([BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C], tl.float32)
    for _ in range(first_row, tl.minimum(first_row + grid.rows_a_group, grid.height)):
        for first_column in range(0, CELL_WIDTH, BLOCK_COLUMNS):
            offs_pixel, mask = _pixels_of_cells(
                first_cell, first_column, width, mask_c, CELL_WIDTH, BLOCK_CELLS, BLOCK_COLUMNS
            )
            encoder_ptrs = encoder_ptr + _offsets(encoder, offs_pixel, BLOCK_C)
            skip = tl.load(encoder_ptrs, mask=mask, other=0.0).to(tl.float32) + token
            gradient_ptrs = gradient_ptr + _offsets(gradient, offs_pixel, BLOCK_C)
            upstream = tl.load(gradient_ptrs, mask=mask, other=0.0).to(tl.float32)
            d_gated = tl.where(skip > 0.0, upstream, 0.0)  # [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C]
            d_skip = d_gated * gate[None, None, :] + d_mean[None, None, :]
            d_encoder_ptrs = d_encoder_ptr + _offsets(d_encoder, offs_pixel, BLOCK_C)
            tl.store(d_encoder_ptrs, d_skip.to(d_encoder.ptr.dtype.element_ty), mask=mask)
            total += d_gated
        encoder_ptr += width * encoder.stride_pixel
        gradient_ptr += width * gradient.stride_pixel
        d_encoder_ptr += width * d_encoder.stride_pixel
    if d_tokens is not None:
        d_token = tl.sum(total, axis=1) * gate[None, :] + d_mean[None, :] * (grid.cell_height * CELL_WIDTH)
        ptrs, mask_cells = _cells(d_tokens, sample, grid_row, first_cell, grid, first_channel, BLOCK_CELLS, BLOCK_C)
        tl.store(ptrs, d_token.to(d_tokens.ptr.dtype.element_ty), mask=mask_cells)


@triton.jit
def decoder_gradient_kernel(
    gradient,
    d_mean_ptr,
    d_decoder,
    columns,
    grid,
    WIDTH_UNIT: tl.constexpr,
    CELL_WIDTH: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient by the decoder feature: the sum over each cell, where it was written, plus the mean's."""
    sample, grid_row, first_cell, first_channel = _place(
        tl.program_id(0), grid, d_decoder.channels, BLOCK_CELLS, BLOCK_C
    )
    width = grid.width_units * WIDTH_UNIT
    mask_c = first_channel + tl.arange(0, BLOCK_C) < d_decoder.channels
    d_mean_ptr += sample.to(tl.int64) * columns + first_channel
    d_mean = tl.load(d_mean_ptr + tl.arange(0, BLOCK_C), mask=mask_c, other=0.0) / d_decoder.pixels  # [BLOCK_C]
    total = tl.zeros([BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C], tl.float32)
    if gradient is not None:
        first_row = grid_row * grid.cell_height
        gradient_ptr = _at(gradient, sample, first_channel, first_row * width)
        for _ in range(grid.cell_height):
            for first_column in range(0, CELL_WIDTH, BLOCK_COLUMNS):
                offs_pixel, mask = _pixels_of_cells(
                    first_cell, first_column, width, mask_c, CELL_WIDTH, BLOCK_CELLS, BLOCK_COLUMNS
                )
                gradient_ptrs = gradient_ptr + _offsets(gradient, offs_pixel, BLOCK_C)
                total += tl.load(gradient_ptrs, mask=mask, other=0.0).to(tl.float32)
            gradient_ptr += width * gradient.stride_pixel
    ptrs, mask_cells = _cells(d_decoder, sample, grid_row, first_cell, grid, first_channel, BLOCK_CELLS, BLOCK_C)
    d_cell = tl.sum(total, axis=1) + d_mean[None, :]  # [BLOCK_CELLS, BLOCK_C]
    tl.store(ptrs, d_cell.to(d_decoder.ptr.dtype.element_ty), mask=mask_cells)
