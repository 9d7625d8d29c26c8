"""How maps are seen by the kernels: strides in units, tiles that fit, and the parts that programs take.

Constants here and in ``triton.py`` do not depend on the GPU, so that results do not either.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..formats import memory_format_of
from .triton_maps import Cut, Map

TILE = 2048  # elements
MOST_CHANNELS = 128  # of a tile in channels-last memory

# Programs that sum load so many tiles at once, and leave parts that others add: at most four for each of 132
# multiprocessors.
STEPS = 4
MOST_PARTS = 4 * 132

# Of programs that write a map, enough tiles each to hide its start; fewer where programs would be too few to fill a
# GPU.
PROGRAM_TILES = 8
ENOUGH_PROGRAMS = 16 * 132

LARGEST_UNIT = 16  # a larger divisor of channels is of no use to the compiler
LARGEST_STRIDE = 2**20  # between neighbours in a tile, which are counted in 32 bits


class Layout(NamedTuple):
    """How the maps of a launch lie: what kernels walk along, pixels or windows of them, and the tiles that fit."""

    images: int
    pixels: int  # of an image
    channels: int
    unit: int  # divides the channels and every distance between pixels
    is_channels_last: bool
    tile: int  # elements of a tile


def maps_of(feature: Tensor, *others: Tensor) -> tuple[list[Map], Layout]:
    """What kernels see of ``feature`` and of others of its images and channels, all in its memory format."""
    is_channels_last = memory_format_of(feature) == torch.channels_last
    maps = [_map(tensor, is_channels_last) for tensor in (feature, *others)]
    batch, channels, height, width = feature.shape
    unit = math.gcd(LARGEST_UNIT, channels, *(found.pixel_units for found in maps))
    maps = [found._replace(pixel_units=found.pixel_units // unit) for found in maps]
    images, pixels = (1, batch * height * width) if is_channels_last else (batch, height * width)
    return maps, Layout(images, pixels, channels, unit, is_channels_last, TILE)


def _map(feature: Tensor, is_channels_last: bool) -> Map:
    """Strides of ``feature``, in units of one; of a copy where it does not lie as kernels read it."""
    batch, channels, height, width = feature.shape
    image, channel, row, column = feature.stride()
    # The stride of an axis of one says nothing.
    pixel = column if width > 1 else row if height > 1 else image if is_channels_last else 1
    channel = channel if channels > 1 else 1
    follows = (height == 1 or width == 1 or row == width * pixel) and pixel <= LARGEST_STRIDE
    # A stride of 0, as in the gradient of a sum, reads one element again and again: as good as any format.
    if is_channels_last:
        follows = follows and channel <= 1 and (batch == 1 or image == height * width * pixel)
    else:
        follows = follows and pixel <= 1 and channel <= LARGEST_STRIDE
    if not follows:
        memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        return _map(_copy(feature, memory_format), is_channels_last)
    return Map(feature, image, channel, pixel)


def _copy(feature: Tensor, memory_format: torch.memory_format) -> Tensor:
    """In memory of its own: ``contiguous`` leaves what lies right but for an axis of one as it is."""
    return torch.empty_like(feature, memory_format=memory_format).copy_(feature)


def _tiles(layout: Layout) -> dict[str, int]:
    if layout.is_channels_last:
        block_c = min(triton.next_power_of_2(layout.channels), MOST_CHANNELS, layout.tile)
        return {"BLOCK_PIXELS": layout.tile // block_c, "BLOCK_C": block_c}
    block_pixels = min(triton.next_power_of_2(layout.pixels), layout.tile)
    block_c = min(triton.next_power_of_2(layout.channels), layout.tile // block_pixels)
    return {"BLOCK_PIXELS": block_pixels, "BLOCK_C": block_c}


def cut_into_parts(layout: Layout) -> tuple[Cut, dict[str, int]]:
    """For programs that sum: few parts, as whoever needs the sums adds them all."""
    tiles = _tiles(layout)
    most = max(MOST_PARTS // triton.cdiv(layout.channels, tiles["BLOCK_C"]), 1)
    return _cut(layout, tiles, min(triton.cdiv(_pixel_tiles(layout, tiles), STEPS), most)), tiles


def cut_evenly(layout: Layout) -> tuple[Cut, dict[str, int]]:
    """For programs that write a map: as many as it takes."""
    tiles = _tiles(layout)
    pixel_tiles = _pixel_tiles(layout, tiles)
    enough = triton.cdiv(ENOUGH_PROGRAMS, triton.cdiv(layout.channels, tiles["BLOCK_C"]))
    return _cut(layout, tiles, max(triton.cdiv(pixel_tiles, PROGRAM_TILES), min(pixel_tiles, enough))), tiles


def _pixel_tiles(layout: Layout, tiles: dict[str, int]) -> int:
    """How many tiles the pixels of all images fill; of the channels there may be several blocks."""
    return layout.images * triton.cdiv(layout.pixels, tiles["BLOCK_PIXELS"])


def _cut(layout: Layout, tiles: dict[str, int], parts: int) -> Cut:
    """About so many parts, never more: whole tiles of an image, or whole images."""
    images_a_part = triton.cdiv(layout.images, parts)
    image_tiles = triton.cdiv(layout.pixels, tiles["BLOCK_PIXELS"])
    pixels_a_part = triton.cdiv(image_tiles, max(parts // layout.images, 1)) * tiles["BLOCK_PIXELS"]
    chunks = triton.cdiv(layout.pixels, pixels_a_part)
    return Cut(layout.images, layout.pixels, layout.channels // layout.unit, images_a_part, pixels_a_part, chunks)


def count_parts(cut: Cut) -> int:
    """Parts of the whole map."""
    return triton.cdiv(cut.images, cut.images_a_part) * cut.chunks


def programs_of(cut: Cut, layout: Layout, tiles: dict[str, int]) -> tuple[int]:
    """The grid of a launch: a program for each part and block of channels."""
    return (count_parts(cut) * triton.cdiv(layout.channels, tiles["BLOCK_C"]),)
