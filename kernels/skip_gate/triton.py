"""Launchers of the skip path on Triton: every map is read once for what the gate needs, and once more for the result.

Forward averages the maps over their pixels, computes the gate, and writes both halves of the output. Backward sums the
gradient by each gate, takes it through the gate to the weights and the means, and writes the gradients of the maps.
Neither ``e + up(r)`` nor anything upsampled is in memory, and no result depends on the order of programs.
"""

import math

import torch
import triton
from torch import Tensor

from ..formats import empty_map, memory_format_of
from . import triton_gate, triton_maps
from .triton_gate import Linear, Parts, Weight
from .triton_maps import Grid, Map, Tiles

NUM_WARPS = 4
TILE = 1024  # elements; in half precision 16 bytes a thread, the longest load
MOST_CHANNELS = 128  # of a tile in channels-last memory
MOST_PIXELS = 256  # of a row of a tile in contiguous memory
PROGRAM_ELEMENTS = 8 * TILE  # of the full map: enough to hide a program's start, few enough to fill a GPU evenly

# Parts of sums are long and few, because every reader adds them all. The limits are constants, so that results do not
# depend on the GPU.
PART_ELEMENTS = 32 * TILE
MOST_PARTS = 128

# A program of the gate has a few results of one image and walks along their summands. At each step it waits for memory,
# with nothing to hide it, so steps are long: 16 elements a thread of weights, and 8 of parts.
GATE_WARPS = 8
GATE_RESULTS = 16
LONGEST_GATE_STEP = 256
PARTS_ELEMENTS = 2048
WEIGHT_GRADIENT_TILES = {"BLOCK_BATCH": 16, "BLOCK_OUT": 16, "BLOCK_IN": 64}

CELL = (16, TILE // MOST_CHANNELS)  # rows and columns, of a map without tokens: no wider than any tile
LARGEST_UNIT = 16  # the compiler makes no use of a larger divisor of the width
LARGEST_OFFSET = 2**31 - 1  # between channels of a tile, which are counted in 32 bits


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
    """Return the output in ``dtype``, the gate (B, C) and the means (B, C + D) in float32."""
    batch, channels, height, width = encoder_feature.shape
    decoder_channels = 0 if decoder_feature is None else decoder_feature.shape[1]
    columns = channels + decoder_channels
    written = columns if concatenate else channels
    output = empty_map(encoder_feature, written, height, width, dtype)
    gate, pooled = (torch.empty(batch, size, device=output.device) for size in (channels, columns))
    if batch == 0:
        return output, gate, pooled
    encoder, token_map = _map(encoder_feature), _map(tokens)
    decoder = _map(decoder_feature, memory_format_of(encoder_feature))
    parts = _mean_parts(encoder_feature, encoder, token_map, decoder, columns)
    step, block_parts = _gate_step(max(channels, decoder_channels), parts)
    triton_gate.gate_kernel[(batch, triton.cdiv(channels, GATE_RESULTS))](
        parts=parts,
        skip=_linear(weight_skip, bias_skip),
        decoder=None if weight_decoder is None else _linear(weight_decoder, bias_decoder),
        gate_ptr=gate,
        pooled_ptr=pooled,
        BLOCK_PARTS=block_parts,
        BLOCK_OUT=GATE_RESULTS,
        BLOCK_IN=step,
        num_warps=GATE_WARPS,
    )
    halves = [_map(half) for half in output.split([channels, written - channels], dim=1)]
    grid, tiles = _cut(encoder_feature, tokens, channels, encoder, token_map, halves[0])
    grid = _in_groups(grid, PROGRAM_ELEMENTS // _row_elements(tiles))
    triton_maps.gate_skip_kernel[_programs(grid, tiles, batch, channels)](
        encoder=encoder,
        tokens=token_map,
        output=halves[0],
        gate_ptr=gate,
        cut=grid,
        TILES=tiles,
        num_warps=NUM_WARPS,
    )
    if written > channels:
        grid, tiles = _cut(encoder_feature, decoder_feature, decoder_channels, decoder, halves[1])
        triton_maps.upsample_kernel[_programs(grid, tiles, batch, decoder_channels)](
            decoder=decoder, output=halves[1], cut=grid, TILES=tiles, num_warps=NUM_WARPS
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
    decoder_grid: list[int],
) -> list[Tensor]:
    """Return the gradients by the inputs that are there, in their order."""
    batch, channels = gate.shape
    columns = pooled.shape[1]
    maps = [encoder_feature] if tokens is None else [encoder_feature, tokens]
    d_maps = [empty_map(feature, *feature.shape[1:], feature.dtype) for feature in maps]
    if decoder_grid:
        d_maps.append(empty_map(encoder_feature, columns - channels, *decoder_grid, encoder_feature.dtype))
    weights = [weight_skip] if weight_decoder is None else [weight_skip, weight_decoder]
    d_weights = [weight.new_empty(size) for weight in weights for size in (weight.shape, weight.shape[:1])]
    if batch == 0:
        return d_maps + [d_weight.zero_() for d_weight in d_weights]
    memory_format = memory_format_of(encoder_feature)
    encoder, token_map = _map(encoder_feature), _map(tokens)
    upstream = _map(gradient[:, :channels], memory_format)
    d_encoder, d_tokens = _map(d_maps[0]), None if tokens is None else _map(d_maps[1])
    slope, d_means = torch.empty_like(gate), torch.empty_like(pooled)

    cut, tiles = _cut(encoder_feature, tokens, channels, encoder, token_map, upstream, d_encoder, d_tokens)
    parts_across = triton.cdiv(cut.across, tiles.BLOCK_CELLS)
    fewest_rows = triton.cdiv(cut.height * parts_across, MOST_PARTS)
    grid = _in_groups(cut, max(PROGRAM_ELEMENTS // _row_elements(tiles), fewest_rows))
    parts = _empty_parts(gate, grid.groups * parts_across, channels)
    triton_maps.gate_gradient_kernel[_programs(grid, tiles, batch, channels)](
        gradient=upstream,
        encoder=encoder,
        tokens=token_map,
        parts_ptr=parts.ptr,
        cut=grid,
        TILES=tiles,
        num_warps=NUM_WARPS,
    )
    step, block_parts = _gate_step(channels, parts)
    triton_gate.mean_gradient_kernel[(batch, _blocks(channels, columns, GATE_RESULTS))](
        parts=parts,
        skip=Weight(weight_skip.contiguous(), channels),
        decoder=None if weight_decoder is None else Weight(weight_decoder.contiguous(), columns - channels),
        gate_ptr=gate,
        slope_ptr=slope,
        d_mean_ptr=d_means,
        columns=columns,
        BLOCK_PARTS=block_parts,
        BLOCK_OUT=step,
        BLOCK_IN=GATE_RESULTS,
        num_warps=GATE_WARPS,
    )
    blocks = _blocks(channels, columns, WEIGHT_GRADIENT_TILES["BLOCK_IN"])
    triton_gate.weight_gradient_kernel[(blocks, triton.cdiv(channels, WEIGHT_GRADIENT_TILES["BLOCK_OUT"]))](
        d_skip=_linear(*d_weights[:2]),
        d_decoder=None if weight_decoder is None else _linear(*d_weights[2:]),
        slope_ptr=slope,
        pooled_ptr=pooled,
        batch=batch,
        columns=columns,
        **WEIGHT_GRADIENT_TILES,
        num_warps=NUM_WARPS,
    )
    triton_maps.skip_gradient_kernel[_programs(cut, tiles, batch, channels)](
        gradient=upstream,
        encoder=encoder,
        tokens=token_map,
        d_encoder=d_encoder,
        d_tokens=d_tokens,
        gate_ptr=gate,
        d_mean_ptr=d_means,
        columns=columns,
        cut=cut,
        TILES=tiles,
        num_warps=NUM_WARPS,
    )
    if decoder_grid:
        d_decoder_feature = d_maps[-1]
        is_concatenated = gradient.shape[1] > channels
        upstream = _map(gradient[:, channels:], memory_format) if is_concatenated else None
        d_decoder = _map(d_decoder_feature)
        cut, tiles = _cut(encoder_feature, d_decoder_feature, columns - channels, upstream, d_decoder)
        triton_maps.decoder_gradient_kernel[_programs(cut, tiles, batch, columns - channels)](
            gradient=upstream,
            d_decoder=d_decoder,
            d_mean_ptr=d_means[:, channels:],
            columns=columns,
            cut=cut,
            TILES=tiles,
            num_warps=NUM_WARPS,
        )
    return d_maps + d_weights


def _mean_parts(encoder_feature: Tensor, encoder: Map, tokens: Map | None, decoder: Map | None, columns: int) -> Parts:
    """Launch the parts of the means over pixels, (B, parts, C + D)."""
    most_channels = _most_channels(encoder, tokens, decoder)
    if memory_format_of(encoder_feature) == torch.channels_last:
        block_c = min(triton.next_power_of_2(encoder.channels), MOST_CHANNELS, most_channels)
        block_pixels = TILE // block_c
    else:
        block_pixels = min(triton.next_power_of_2(encoder.pixels), MOST_PIXELS)
        block_c = min(triton.next_power_of_2(encoder.channels), TILE // block_pixels, most_channels)
    count = min(triton.cdiv(encoder.pixels * block_c, PART_ELEMENTS), MOST_PARTS)
    parts = _empty_parts(encoder_feature, count, columns)
    programs = encoder_feature.shape[0] * count * _blocks(encoder.channels, columns, block_c)
    triton_maps.pool_kernel[(programs,)](
        encoder=encoder,
        tokens=tokens,
        decoder=decoder,
        parts=parts,
        BLOCK_PIXELS=block_pixels,
        BLOCK_C=block_c,
        num_warps=NUM_WARPS,
    )
    return parts


def _empty_parts(like: Tensor, count: int, columns: int) -> Parts:
    return Parts(torch.empty(like.shape[0], count, columns, device=like.device), count, columns)


def _gate_step(length: int, parts: Parts) -> tuple[int, int]:
    """Return how many of ``length`` summands a program of the gate takes at once, and how many of their parts."""
    step = min(triton.next_power_of_2(length), LONGEST_GATE_STEP)
    return step, min(triton.next_power_of_2(parts.count), PARTS_ELEMENTS // step)


def _blocks(channels: int, columns: int, block: int) -> int:
    """Count the blocks of the skip's columns, and behind them of the decoder's."""
    return triton.cdiv(channels, block) + triton.cdiv(columns - channels, block)


def _linear(weight: Tensor, bias: Tensor) -> Linear:
    return Linear(weight.contiguous(), bias.contiguous(), weight.shape[1])


def _map(feature: Tensor | None, memory_format: torch.memory_format | None = None) -> Map | None:
    """Describe ``feature`` to kernels, or a copy of it if its pixels are unevenly spaced or in the other format."""
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
    """Return the largest power of two of channels that lie within :data:`LARGEST_OFFSET` in every map."""
    stride = max(feature.stride_channel for feature in maps if feature is not None)
    return 1 << (LARGEST_OFFSET // max(stride, 1) + 1).bit_length() - 1


def _cut(full: Tensor, coarse: Tensor | None, channels: int, *maps: Map | None) -> tuple[Grid, Tiles]:
    """Cut the map ``full`` into the cells that pixels of ``coarse`` are, for tiles over ``maps`` of ``channels``.

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
    return grid, Tiles(unit, cell_width, block_cells, block_columns, block_c)


def _in_groups(grid: Grid, rows: int) -> Grid:
    """Return the same cells, with ``rows`` rows of pixels for a program, at least one."""
    rows = max(rows, 1)
    return grid._replace(groups=triton.cdiv(grid.height, rows), rows_a_group=rows)


def _row_elements(tiles: Tiles) -> int:
    """Count the elements of a row of pixels that a program works through."""
    return tiles.BLOCK_CELLS * tiles.CELL_WIDTH * tiles.BLOCK_C


def _programs(grid: Grid, tiles: Tiles, batch: int, channels: int) -> tuple[int]:
    cell_blocks = triton.cdiv(grid.across, tiles.BLOCK_CELLS)
    return (batch * grid.groups * cell_blocks * triton.cdiv(channels, tiles.BLOCK_C),)
