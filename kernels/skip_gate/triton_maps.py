"""Triton kernels that read and write whole maps: their means, both halves of the output, and the maps' gradients.

Tokens and decoder feature are grids of cells over the full map. A program holds a few cells of one grid row side by
side, [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C], and walks down rows of pixels, so that no pixel looks for its cell by
division; BLOCK_COLUMNS divides the width of a cell. Maps are read through their strides, so that one kernel serves
contiguous and channels-last memory with blocks of other sizes. All arithmetic is float32.
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


class Tiles(NamedTuple):
    """Sizes of tiles, known when a kernel is compiled."""

    WIDTH_UNIT: int  # divides the width of the full map
    CELL_WIDTH: int
    BLOCK_CELLS: int
    BLOCK_COLUMNS: int
    BLOCK_C: int


class Grid(NamedTuple):
    """Cells of the full map, and groups of its rows, one for a program."""

    height: int
    width_units: int  # of WIDTH_UNIT pixels: the compiler sees what divides the width, and loads whole vectors
    across: int  # cells in a row
    cell_height: int
    groups: int
    rows_a_group: int


@triton.jit
def _at(map, sample, first_channel, first_pixel):
    """Return a pointer to the first channel and pixel of a block of one image."""
    ptr = map.ptr + sample.to(tl.int64) * map.stride_batch
    ptr += first_channel.to(tl.int64) * map.stride_channel
    return ptr + first_pixel.to(tl.int64) * map.stride_pixel


@triton.jit
def _mean_part(map, sample, part, parts, first_channel, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Compute one part of the means over the pixels of an image."""
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
def pool_kernel(encoder, tokens, decoder, parts, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write parts of the means [gap(e) + gap(r), gap(d)]; a program has channels of e and r, or of d."""
    skip_blocks = tl.cdiv(encoder.channels, BLOCK_C)
    blocks = skip_blocks + tl.cdiv(parts.columns - encoder.channels, BLOCK_C)
    pid_block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks % parts.count
    sample = tl.program_id(0) // blocks // parts.count
    parts_ptr = parts.ptr + (sample * parts.count + part).to(tl.int64) * parts.columns
    if pid_block < skip_blocks:
        first_channel = pid_block * BLOCK_C
        mean = _mean_part(encoder, sample, part, parts.count, first_channel, BLOCK_PIXELS, BLOCK_C)
        if tokens is not None:
            mean += _mean_part(tokens, sample, part, parts.count, first_channel, BLOCK_PIXELS, BLOCK_C)
        offs_c = first_channel + tl.arange(0, BLOCK_C)
        tl.store(parts_ptr + offs_c, mean, mask=offs_c < encoder.channels)
    elif decoder is not None:
        first_decoder_channel = (pid_block - skip_blocks) * BLOCK_C
        decoder_mean = _mean_part(decoder, sample, part, parts.count, first_decoder_channel, BLOCK_PIXELS, BLOCK_C)
        offs_d = first_decoder_channel + tl.arange(0, BLOCK_C)
        tl.store(parts_ptr + encoder.channels + offs_d, decoder_mean, mask=offs_d < decoder.channels)


@triton.jit
def _place(pid, cut, channels, TILES: tl.constexpr):
    """Return a program's image, group of rows, first cell, and first channel."""
    channel_blocks = tl.cdiv(channels, TILES.BLOCK_C)
    cell_blocks = tl.cdiv(cut.across, TILES.BLOCK_CELLS)
    first_channel = pid % channel_blocks * TILES.BLOCK_C
    first_cell = pid // channel_blocks % cell_blocks * TILES.BLOCK_CELLS
    group = pid // channel_blocks // cell_blocks
    return group // cut.groups, group % cut.groups, first_cell, first_channel


@triton.jit
def _zeros(TILES: tl.constexpr):
    """Return zeros for each pixel of a block of cells: [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C]."""
    BLOCK_CELLS: tl.constexpr = TILES.BLOCK_CELLS
    BLOCK_COLUMNS: tl.constexpr = TILES.BLOCK_COLUMNS
    BLOCK_C: tl.constexpr = TILES.BLOCK_C
    return tl.zeros([BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C], tl.float32)


@triton.jit
def _pixels_of_cells(first_cell, first_column, width, mask_c, TILES: tl.constexpr):
    """Return the pixels of a row that belong to a block of cells [BLOCK_CELLS, BLOCK_COLUMNS, 1], and their mask."""
    offs_cell = first_cell + tl.arange(0, TILES.BLOCK_CELLS)
    offs_column = first_column + tl.arange(0, TILES.BLOCK_COLUMNS)
    offs_pixel = (offs_cell[:, None] * TILES.CELL_WIDTH + offs_column[None, :])[:, :, None]
    return offs_pixel, (offs_pixel < width) & mask_c[None, None, :]


@triton.jit
def _load(map, row_ptr, offs_pixel, mask, TILES: tl.constexpr):
    """Load pixels of a row as float32: [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C]."""
    offs = offs_pixel * map.stride_pixel + tl.arange(0, TILES.BLOCK_C)[None, None, :] * map.stride_channel
    return tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(map, row_ptr, offs_pixel, values, mask, TILES: tl.constexpr):
    """Store pixels of a row in the dtype of ``map``."""
    offs = offs_pixel * map.stride_pixel + tl.arange(0, TILES.BLOCK_C)[None, None, :] * map.stride_channel
    tl.store(row_ptr + offs, values.to(map.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _cells(map, sample, row, first_cell, cut, first_channel, TILES: tl.constexpr):
    """Return pointers to cells of a row of a coarse map [BLOCK_CELLS, BLOCK_C], and their mask."""
    offs_cell = first_cell + tl.arange(0, TILES.BLOCK_CELLS)
    offs_c = tl.arange(0, TILES.BLOCK_C)
    ptrs = _at(map, sample, first_channel, row * cut.across)
    ptrs += offs_cell[:, None] * map.stride_pixel + offs_c[None, :] * map.stride_channel
    return ptrs, (offs_cell < cut.across)[:, None] & (first_channel + offs_c < map.channels)[None, :]


@triton.jit
def _load_cells(map, sample, row, first_cell, cut, first_channel, TILES: tl.constexpr):
    """Load cells of a row of a coarse map so that they meet their pixels: [BLOCK_CELLS, 1, BLOCK_C]; zero without."""
    BLOCK_CELLS: tl.constexpr = TILES.BLOCK_CELLS
    BLOCK_C: tl.constexpr = TILES.BLOCK_C
    cells = tl.zeros([BLOCK_CELLS, BLOCK_C], tl.float32)
    if map is not None:
        ptrs, mask = _cells(map, sample, row, first_cell, cut, first_channel, TILES)
        cells += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return cells[:, None, :]


@triton.jit
def gate_skip_kernel(encoder, tokens, output, gate_ptr, cut, TILES: tl.constexpr):
    """Write the gated half of the output, ``s relu(e + up(r))``."""
    # From last to first: the cache still holds the end of the map, which was averaged last.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, group, first_cell, first_channel = _place(pid, cut, encoder.channels, TILES)
    width = cut.width_units * TILES.WIDTH_UNIT
    mask_c = first_channel + tl.arange(0, TILES.BLOCK_C) < encoder.channels
    gate_ptr += sample.to(tl.int64) * encoder.channels + first_channel
    gate = tl.load(gate_ptr + tl.arange(0, TILES.BLOCK_C), mask=mask_c, other=0.0)  # [BLOCK_C]
    first_row = group * cut.rows_a_group
    encoder_ptr = _at(encoder, sample, first_channel, first_row * width)
    output_ptr = _at(output, sample, first_channel, first_row * width)
    for row in range(first_row, tl.minimum(first_row + cut.rows_a_group, cut.height)):
        token = _load_cells(tokens, sample, row // cut.cell_height, first_cell, cut, first_channel, TILES)
        for first_column in range(0, TILES.CELL_WIDTH, TILES.BLOCK_COLUMNS):
            offs_pixel, mask = _pixels_of_cells(first_cell, first_column, width, mask_c, TILES)
            skip = _load(encoder, encoder_ptr, offs_pixel, mask, TILES) + token
            # NaN must not become zero; minus infinity times a gate of zero is NaN.
            gated = tl.maximum(skip * gate[None, None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
            _store(output, output_ptr, offs_pixel, gated, mask, TILES)
        encoder_ptr += width * encoder.stride_pixel
        output_ptr += width * output.stride_pixel


@triton.jit
def upsample_kernel(decoder, output, cut, TILES: tl.constexpr):
    """Write the other half of the output, ``up(d)``."""
    pid = tl.program_id(0)
    sample, grid_row, first_cell, first_channel = _place(pid, cut, decoder.channels, TILES)
    width = cut.width_units * TILES.WIDTH_UNIT
    mask_c = first_channel + tl.arange(0, TILES.BLOCK_C) < decoder.channels
    cell = _load_cells(decoder, sample, grid_row, first_cell, cut, first_channel, TILES)
    values = tl.broadcast_to(cell, _zeros(TILES).shape)
    output_ptr = _at(output, sample, first_channel, grid_row * cut.cell_height * width)
    for _ in range(cut.cell_height):
        for first_column in range(0, TILES.CELL_WIDTH, TILES.BLOCK_COLUMNS):
            offs_pixel, mask = _pixels_of_cells(first_cell, first_column, width, mask_c, TILES)
            _store(output, output_ptr, offs_pixel, values, mask, TILES)
        output_ptr += width * output.stride_pixel


@triton.jit
def gate_gradient_kernel(gradient, encoder, tokens, parts_ptr, cut, TILES: tl.constexpr):
    """Write parts of the gradient by the gate, the sum of ``g relu(e + up(r))`` over pixels: (B, parts, C)."""
    sample, group, first_cell, first_channel = _place(tl.program_id(0), cut, encoder.channels, TILES)
    width = cut.width_units * TILES.WIDTH_UNIT
    offs_c = first_channel + tl.arange(0, TILES.BLOCK_C)
    mask_c = offs_c < encoder.channels
    first_row = group * cut.rows_a_group
    encoder_ptr = _at(encoder, sample, first_channel, first_row * width)
    gradient_ptr = _at(gradient, sample, first_channel, first_row * width)
    total = _zeros(TILES)
    for row in range(first_row, tl.minimum(first_row + cut.rows_a_group, cut.height)):
        token = _load_cells(tokens, sample, row // cut.cell_height, first_cell, cut, first_channel, TILES)
        for first_column in range(0, TILES.CELL_WIDTH, TILES.BLOCK_COLUMNS):
            offs_pixel, mask = _pixels_of_cells(first_cell, first_column, width, mask_c, TILES)
            skip = _load(encoder, encoder_ptr, offs_pixel, mask, TILES) + token
            upstream = _load(gradient, gradient_ptr, offs_pixel, mask, TILES)
            total += upstream * tl.maximum(skip, 0.0)  # [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C]
        encoder_ptr += width * encoder.stride_pixel
        gradient_ptr += width * gradient.stride_pixel
    parts_across = tl.cdiv(cut.across, TILES.BLOCK_CELLS)
    part = (sample * cut.groups + group) * parts_across + first_cell // TILES.BLOCK_CELLS
    BLOCK_PIXELS: tl.constexpr = TILES.BLOCK_CELLS * TILES.BLOCK_COLUMNS
    BLOCK_C: tl.constexpr = TILES.BLOCK_C
    sums = tl.sum(tl.reshape(total, [BLOCK_PIXELS, BLOCK_C]), axis=0)  # [BLOCK_C]
    tl.store(parts_ptr + part.to(tl.int64) * encoder.channels + offs_c, sums, mask=mask_c)


@triton.jit
def _load_mean_gradient(d_mean_ptr, map, sample, columns, first_channel, mask_c, TILES: tl.constexpr):
    """Load what each pixel of ``map`` gets of the gradient by the mean over its pixels: [BLOCK_C]."""
    d_mean_ptr += sample.to(tl.int64) * columns + first_channel
    return tl.load(d_mean_ptr + tl.arange(0, TILES.BLOCK_C), mask=mask_c, other=0.0) / map.pixels


@triton.jit
def skip_gradient_kernel(
    gradient, encoder, tokens, d_encoder, d_tokens, gate_ptr, d_mean_ptr, columns, cut, TILES: tl.constexpr
):
    """Write the gradients by encoder feature and tokens: ``s g`` where ``e + up(r)`` is positive, plus the mean's."""
    # From last to first: the cache still holds the end of both maps, which was summed last.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, grid_row, first_cell, first_channel = _place(pid, cut, encoder.channels, TILES)
    width = cut.width_units * TILES.WIDTH_UNIT
    mask_c = first_channel + tl.arange(0, TILES.BLOCK_C) < encoder.channels
    gate_ptr += sample.to(tl.int64) * encoder.channels + first_channel
    gate = tl.load(gate_ptr + tl.arange(0, TILES.BLOCK_C), mask=mask_c, other=0.0)  # [BLOCK_C]
    d_mean = _load_mean_gradient(d_mean_ptr, encoder, sample, columns, first_channel, mask_c, TILES)
    token = _load_cells(tokens, sample, grid_row, first_cell, cut, first_channel, TILES)
    first_row = grid_row * cut.cell_height
    encoder_ptr = _at(encoder, sample, first_channel, first_row * width)
    gradient_ptr = _at(gradient, sample, first_channel, first_row * width)
    d_encoder_ptr = _at(d_encoder, sample, first_channel, first_row * width)
    total = _zeros(TILES)
    for _ in range(first_row, tl.minimum(first_row + cut.rows_a_group, cut.height)):
        for first_column in range(0, TILES.CELL_WIDTH, TILES.BLOCK_COLUMNS):
            offs_pixel, mask = _pixels_of_cells(first_cell, first_column, width, mask_c, TILES)
            skip = _load(encoder, encoder_ptr, offs_pixel, mask, TILES) + token
            upstream = _load(gradient, gradient_ptr, offs_pixel, mask, TILES)
            d_gated = tl.where(skip > 0.0, upstream, 0.0)  # [BLOCK_CELLS, BLOCK_COLUMNS, BLOCK_C]
            d_skip = d_gated * gate[None, None, :] + d_mean[None, None, :]
            _store(d_encoder, d_encoder_ptr, offs_pixel, d_skip, mask, TILES)
            total += d_gated
        encoder_ptr += width * encoder.stride_pixel
        gradient_ptr += width * gradient.stride_pixel
        d_encoder_ptr += width * d_encoder.stride_pixel
    if d_tokens is not None:
        d_token = tl.sum(total, axis=1) * gate[None, :] + d_mean[None, :] * (cut.cell_height * TILES.CELL_WIDTH)
        ptrs, mask_cells = _cells(d_tokens, sample, grid_row, first_cell, cut, first_channel, TILES)
        tl.store(ptrs, d_token.to(d_tokens.ptr.dtype.element_ty), mask=mask_cells)


@triton.jit
def decoder_gradient_kernel(gradient, d_decoder, d_mean_ptr, columns, cut, TILES: tl.constexpr):
    """Write the gradient by the decoder feature: the sum over each cell, where there is one, plus the mean's."""
    pid = tl.program_id(0)
    sample, grid_row, first_cell, first_channel = _place(pid, cut, d_decoder.channels, TILES)
    width = cut.width_units * TILES.WIDTH_UNIT
    mask_c = first_channel + tl.arange(0, TILES.BLOCK_C) < d_decoder.channels
    d_mean = _load_mean_gradient(d_mean_ptr, d_decoder, sample, columns, first_channel, mask_c, TILES)
    total = _zeros(TILES)
    if gradient is not None:
        gradient_ptr = _at(gradient, sample, first_channel, grid_row * cut.cell_height * width)
        for _ in range(cut.cell_height):
            for first_column in range(0, TILES.CELL_WIDTH, TILES.BLOCK_COLUMNS):
                offs_pixel, mask = _pixels_of_cells(first_cell, first_column, width, mask_c, TILES)
                total += _load(gradient, gradient_ptr, offs_pixel, mask, TILES)
            gradient_ptr += width * gradient.stride_pixel
    ptrs, mask_cells = _cells(d_decoder, sample, grid_row, first_cell, cut, first_channel, TILES)
    d_cell = tl.sum(total, axis=1) + d_mean[None, :]  # [BLOCK_CELLS, BLOCK_C]
    tl.store(ptrs, d_cell.to(d_decoder.ptr.dtype.element_ty), mask=mask_cells)
