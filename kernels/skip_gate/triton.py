"""Launchers of the skip path on Triton: every map is read once for what the gate needs, and once more for the result.

Forward averages the maps over their pixels, computes the gate, and writes both halves of the output. Backward sums what
the loss tells each gate, takes that through the gate to the weights and the means, and writes the gradients of the
maps. Neither ``e + up(r)`` nor anything else upsampled is in memory, and nothing depends on the order of programs.
"""

import math

import torch
import triton
from torch import Tensor

from ..formats import empty_map, memory_format_of
from . import triton_gate, triton_maps
from .triton_maps import Grid, Map

NUM_WARPS = 4
TILE = 1024  # elements; in half precision 16 bytes a thread, the longest load
MOST_CHANNELS = 128  # of a tile in channels-last memory
MOST_PIXELS = 256  # of a row of a tile in contiguous memory
PROGRAM_ELEMENTS = 8 * TILE  # of the full map: enough to hide a program's start, few enough to fill a GPU evenly

# Programs that sum leave parts that others add: long ones, and few, as every reader adds them all. The limits are
# constants, so that results do not depend on the GPU.
PART_ELEMENTS = 32 * TILE
MOST_PARTS = 128

# A program of the gate has a few results of one image and walks along what they are sums of. At each step it waits for
# memory, with nothing to hide it, so steps are long: 16 elements a thread of weights, and 8 of parts.
GATE_WARPS = 8
GATE_RESULTS = 16
LONGEST_GATE_STEP = 256
PARTS_ELEMENTS = 2048
WEIGHT_GRADIENT_TILES = {"BLOCK_BATCH": 16, "BLOCK_OUT": 16, "BLOCK_IN": 64}

CELL = (16, TILE // MOST_CHANNELS)  # rows and columns, of a map without tokens: no wider than any tile
LARGEST_UNIT = 16  # a larger divisor of the width is of no use to the compiler
LARGEST_OFFSET = 2**31 - 1  # between channels of a tile, which are counted in 32 bits


Tiles = dict[str, int]


def forward(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    decoder_feature: Tensor | None,
    weight_skip: Tensor,
    bias_skip: Tensor,
    weight_decoder: Tensor | None,
    bias_decoder: Tensor | None,
    concatenate: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output in ``dtype``, the gate (B, C) and the means (B, C + D) in float32; see the public function."""
    batch, channels, height, width = encoder_feature.shape
    decoder_channels = 0 if decoder_feature is None else decoder_feature.shape[1]
    columns = channels + decoder_channels
    written = columns if concatenate else channels
    output = empty_map(encoder_feature, written, height, width, dtype)
    gate, pooled = (torch.empty(batch, size, device=output.device) for size in (channels, columns))
    if batch == 0:
        return output, gate, pooled
    encoder, decoder = _map(encoder_feature), _map(decoder_feature, memory_format_of(encoder_feature))
    token_map = _map(tokens)
    weights = [_contiguous(tensor) for tensor in (weight_skip, bias_skip, weight_decoder, bias_decoder)]
    with torch.cuda.device_of(output):
        parts = _mean_parts(encoder_feature, encoder, token_map, decoder, columns)
        step, block_parts = _gate_step(max(channels, decoder_channels), parts)
        triton_gate.gate_kernel[(triton.cdiv(channels, GATE_RESULTS), batch)](
            parts,
            *weights,
            gate,
            pooled,
            parts.shape[1],
            channels,
            columns,
            BLOCK_PARTS=block_parts,
            BLOCK_OUT=GATE_RESULTS,
            BLOCK_IN=step,
            num_warps=GATE_WARPS,
        )
        halves = [_map(half) for half in output.split([channels, written - channels], dim=1)]
        grid, tiles = _cut(encoder_feature, tokens, channels, encoder, token_map, halves[0])
        grid = _in_groups(grid, PROGRAM_ELEMENTS // _row_elements(tiles))
        triton_maps.gate_skip_kernel[_programs(grid, tiles, batch, channels)](
            encoder, token_map, gate, halves[0], grid, **tiles, num_warps=NUM_WARPS
        )
        if written > channels:
            grid, tiles = _cut(encoder_feature, decoder_feature, decoder_channels, decoder, halves[1])
            triton_maps.upsample_kernel[_programs(grid, tiles, batch, decoder_channels)](
                decoder, halves[1], grid, **tiles, num_warps=NUM_WARPS
            )
    return output, gate, pooled


def backward(
    gradient: Tensor,
    encoder_feature: Tensor,
    tokens: Tensor | None,
    weight_skip: Tensor,
    weight_decoder: Tensor | None,
    gate: Tensor,
    pooled: Tensor,
    d_encoder_feature: Tensor,
    d_tokens: Tensor | None,
    d_decoder_feature: Tensor | None,
    d_weight_skip: Tensor,
    d_bias_skip: Tensor,
    d_weight_decoder: Tensor | None,
    d_bias_decoder: Tensor | None,
) -> None:
    """Write the gradients of all inputs into ``d_*``, from that of the output and from what forward returned."""
    batch, channels = gate.shape
    columns = pooled.shape[1]
    if batch == 0:
        for weight in (d_weight_skip, d_bias_skip, d_weight_decoder, d_bias_decoder):
            if weight is not None:
                weight.zero_()
        return
    memory_format = memory_format_of(encoder_feature)
    encoder, token_map = _map(encoder_feature), _map(tokens)
    upstream = _map(gradient[:, :channels], memory_format)
    written = _map(d_encoder_feature), _map(d_tokens)
    slope, d_means = torch.empty_like(gate), torch.empty_like(pooled)
    with torch.cuda.device_of(gate):
        cut, tiles = _cut(encoder_feature, tokens, channels, encoder, token_map, upstream, *written)
        parts_across = triton.cdiv(cut.across, tiles["BLOCK_CELLS"])
        fewest_rows = triton.cdiv(cut.height * parts_across, MOST_PARTS)
        grid = _in_groups(cut, max(PROGRAM_ELEMENTS // _row_elements(tiles), fewest_rows))
        parts = torch.empty(batch, grid.groups * parts_across, channels, device=gate.device)
        triton_maps.gate_gradient_kernel[_programs(grid, tiles, batch, channels)](
            upstream, encoder, token_map, parts, grid, **tiles, num_warps=NUM_WARPS
        )
        step, block_parts = _gate_step(channels, parts)
        triton_gate.mean_gradient_kernel[(_blocks(channels, columns, GATE_RESULTS), batch)](
            parts,
            gate,
            _contiguous(weight_skip),
            _contiguous(weight_decoder),
            slope,
            d_means,
            parts.shape[1],
            channels,
            columns,
            BLOCK_PARTS=block_parts,
            BLOCK_OUT=step,
            BLOCK_IN=GATE_RESULTS,
            num_warps=GATE_WARPS,
        )
        programs = _blocks(channels, columns, WEIGHT_GRADIENT_TILES["BLOCK_IN"])
        triton_gate.weight_gradient_kernel[(programs, triton.cdiv(channels, WEIGHT_GRADIENT_TILES["BLOCK_OUT"]))](
            slope,
            pooled,
            d_weight_skip,
            d_bias_skip,
            d_weight_decoder,
            d_bias_decoder,
            batch,
            channels,
            columns,
            **WEIGHT_GRADIENT_TILES,
            num_warps=NUM_WARPS,
        )
        triton_maps.skip_gradient_kernel[_programs(cut, tiles, batch, channels)](
            upstream,
            encoder,
            token_map,
            gate,
            d_means,
            *written,
            columns,
            cut,
            **tiles,
            num_warps=NUM_WARPS,
        )
        if d_decoder_feature is not None:
            is_concatenated = gradient.shape[1] > channels
            upstream = _map(gradient[:, channels:], memory_format) if is_concatenated else None
            d_decoder = _map(d_decoder_feature)
            cut, tiles = _cut(encoder_feature, d_decoder_feature, columns - channels, upstream, d_decoder)
            triton_maps.decoder_gradient_kernel[_programs(cut, tiles, batch, columns - channels)](
                upstream,
                d_means[:, channels:],
                d_decoder,
                columns,
                cut,
                **tiles,
                num_warps=NUM_WARPS,
            )


def _mean_parts(encoder_feature: Tensor, encoder: Map, tokens: Map | None, decoder: Map | None, columns: int) -> Tensor:
    """Parts of the means over pixels: (B, parts, C + D)."""
    if memory_format_of(encoder_feature) == torch.channels_last:
        block_c = min(triton.next_power_of_2(encoder.channels), MOST_CHANNELS)
        block_c = min(block_c, _most_channels(encoder, tokens, decoder))
        block_pixels = TILE // block_c
    else:
        block_pixels = min(triton.next_power_of_2(encoder.pixels), MOST_PIXELS)
        block_c = min(triton.next_power_of_2(encoder.channels), TILE // block_pixels)
        block_c = min(block_c, _most_channels(encoder, tokens, decoder))
    batch = encoder_feature.shape[0]
    count = min(triton.cdiv(encoder.pixels * block_c, PART_ELEMENTS), MOST_PARTS)
    parts = torch.empty(batch, count, columns, device=encoder_feature.device)
    programs = batch * count * _blocks(encoder.channels, columns, block_c)
    triton_maps.pool_kernel[(programs,)](
        encoder, tokens, decoder, parts, count, columns, block_pixels, block_c, num_warps=NUM_WARPS
    )
    return parts


def _gate_step(length: int, parts: Tensor) -> tuple[int, int]:
    """How many of ``length`` summands a program of the gate takes at once, and of how many of their parts."""
    step = min(triton.next_power_of_2(length), LONGEST_GATE_STEP)
    return step, min(triton.next_power_of_2(parts.shape[1]), PARTS_ELEMENTS // step)


def _blocks(channels: int, columns: int, block: int) -> int:
    """Blocks of the skip's columns, and behind them of the decoder's."""
    return triton.cdiv(channels, block) + triton.cdiv(columns - channels, block)


def _map(feature: Tensor | None, memory_format: torch.memory_format | None = None) -> Map | None:
    """What kernels see of ``feature``; a copy of it where pixels are not at one distance, or not in the format."""
    if feature is None:
        return None
    batch, channel, row, column = feature.stride()
    height, width = feature.shape[2:]
    pixel = column if width > 1 else row
    follows = height == 1 or width == 1 or row == width * column
    # A stride of 0, as in the gradient of a sum, reads one element again and again: as good as any format.
    is_in_format = memory_format is None or (channel if memory_format == torch.channels_last else pixel) <= 1
    if not follows or not is_in_format:
        return _map(feature.contiguous(memory_format=memory_format or memory_format_of(feature)))
    return Map(feature, batch, channel, pixel, feature.shape[1], height * width)


def _most_channels(*maps: Map | None) -> int:
    """The largest power of two of channels that lie within :data:`LARGEST_OFFSET` in every map."""
    stride = max(feature.stride_channel for feature in maps if feature is not None)
    return 1 << (LARGEST_OFFSET // max(stride, 1) + 1).bit_length() - 1


def _cut(full: Tensor, coarse: Tensor | None, channels: int, *maps: Map | None) -> tuple[Grid, Tiles]:
    """The cells that pixels of ``coarse`` are on the map ``full``, and the tiles of ``channels`` wide ``maps``.

    A group of rows is a row of cells. Without a coarse map the cells are of one size and may end outside.
    """
    height, width = full.shape[2:]
    most_channels = _most_channels(*maps)
    cell_height, cell_width = CELL if coarse is None else (height // coarse.shape[2], width // coarse.shape[3])
    across = triton.cdiv(width, cell_width)
    if memory_format_of(full) == torch.channels_last:
        block_c = min(triton.next_power_of_2(channels), MOST_CHANNELS, most_channels)
        block_columns = math.gcd(cell_width, TILE // block_c)
        block_cells = min(triton.next_power_of_2(across), TILE // (block_c * block_columns))
    else:
        block_columns = math.gcd(cell_width, MOST_PIXELS)
        block_cells = min(triton.next_power_of_2(across), MOST_PIXELS // block_columns)
        block_c = min(triton.next_power_of_2(channels), TILE // (block_columns * block_cells), most_channels)
    unit = math.gcd(width, LARGEST_UNIT)
    grid = Grid(height, width // unit, across, cell_height, triton.cdiv(height, cell_height), cell_height)
    sizes = {"BLOCK_CELLS": block_cells, "BLOCK_COLUMNS": block_columns, "BLOCK_C": block_c}
    return grid, {"WIDTH_UNIT": unit, "CELL_WIDTH": cell_width} | sizes


def _in_groups(grid: Grid, rows: int) -> Grid:
    """The same cells, with ``rows`` rows of pixels for a program, at least one."""
    rows = max(rows, 1)
    return grid._replace(groups=triton.cdiv(grid.height, rows), rows_a_group=rows)


def _row_elements(tiles: Tiles) -> int:
    """Elements that a program works through in a row of pixels."""
    return tiles["BLOCK_CELLS"] * tiles["CELL_WIDTH"] * tiles["BLOCK_C"]


def _programs(grid: Grid, tiles: Tiles, batch: int, channels: int) -> tuple[int]:
    cell_blocks = triton.cdiv(grid.across, tiles["BLOCK_CELLS"])
    return (batch * grid.groups * cell_blocks * triton.cdiv(channels, tiles["BLOCK_C"]),)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
