"""Strides of maps as kernels read them, tiles that fit, and the parts that programs take.

Constants here and in ``triton.py`` do not depend on the GPU, so that results do not either.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..formats import memory_format_of
from .triton_maps import Cut, Map, Tiles

TILE = 2048  # elements
# Elements of a tile of windows, which is loaded four times: in half precision a thread has four or, with gradients,
# nine of the longest loads under way, 16 bytes each.
WINDOW_TILE = 1024
MOST_CHANNELS = 128  # of a tile in channels-last memory

# Programs that sum load so many tiles at once, and leave parts that others add: at most four for each of 132
# multiprocessors.
STEPS = 4
MOST_PARTS = 4 * 132

# Programs that write a map have enough tiles each to hide their start, and fewer where programs would be too few to
# fill a GPU.
PROGRAM_TILES = 8
ENOUGH_PROGRAMS = 16 * 132

LARGEST_UNIT = 16  # the compiler makes no use of a larger divisor of the channels
LARGEST_STRIDE = 2**20  # between neighbours in a tile, which are counted in 32 bits


class Layout(NamedTuple):
    """The pixels, or windows of pixels, that the kernels of a launch walk along, and the tiles that fit."""

    images: int
    pixels: int  # of an image
    channels: int
    unit: int  # divides the channels and every distance between pixels
    is_channels_last: bool
    tile: int  # elements of a tile


def maps_of(feature: Tensor, *others: Tensor) -> tuple[list[Map], Layout]:
    """Describe ``feature`` and others of its images and channels to kernels, all in its memory format."""
    is_channels_last = memory_format_of(feature) == torch.channels_last
    maps = [_map(tensor, is_channels_last) for tensor in (feature, *others)]
    batch, channels, height, width = feature.shape
    unit = math.gcd(LARGEST_UNIT, channels, *(found.pixel_units for found in maps))
    maps = [found._replace(pixel_units=found.pixel_units // unit) for found in maps]
    images, pixels = (1, batch * height * width) if is_channels_last else (batch, height * width)
    return maps, Layout(images, pixels, channels, unit, is_channels_last, TILE)


def windows_of(feature: Tensor, layout: Layout) -> Layout:
    """Return ``layout`` for kernels that walk along the windows of each image."""
    batch, _, height, width = feature.shape
    windows = ((height + 1) // 2) * ((width + 1) // 2)
    return layout._replace(images=batch, pixels=windows, tile=WINDOW_TILE)


def _map(feature: Tensor, is_channels_last: bool) -> Map:
    """Return the strides of ``feature``, in units of one; of a copy if kernels cannot read it as it lies."""
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
        # ``contiguous`` would return the same tensor if only an axis of one is out of place.
        return _map(torch.empty_like(feature, memory_format=memory_format).copy_(feature), is_channels_last)
    return Map(feature, image, channel, pixel)


def _tiles(layout: Layout) -> Tiles:
    if layout.is_channels_last:
        block_c = min(triton.next_power_of_2(layout.channels), MOST_CHANNELS, layout.tile)
        return Tiles(layout.unit, layout.tile // block_c, block_c)
    block_pixels = min(triton.next_power_of_2(layout.pixels), layout.tile)
    block_c = min(triton.next_power_of_2(layout.channels), layout.tile // block_pixels)
    return Tiles(layout.unit, block_pixels, block_c)


def cut_into_parts(layout: Layout) -> tuple[Cut, Tiles]:
    """Cut a map for programs that sum: into few parts, because every reader of a sum adds them all."""
    tiles = _tiles(layout)
    most = max(MOST_PARTS // triton.cdiv(layout.channels, tiles.BLOCK_C), 1)
    return _cut(layout, tiles, min(triton.cdiv(_pixel_tiles(layout, tiles), STEPS), most)), tiles


def cut_evenly(layout: Layout) -> tuple[Cut, Tiles]:
    """Cut a map for programs that write one: into as many parts as it takes."""
    tiles = _tiles(layout)
    pixel_tiles = _pixel_tiles(layout, tiles)
    enough = triton.cdiv(ENOUGH_PROGRAMS, triton.cdiv(layout.channels, tiles.BLOCK_C))
    return _cut(layout, tiles, max(triton.cdiv(pixel_tiles, PROGRAM_TILES), min(pixel_tiles, enough))), tiles


def _pixel_tiles(layout: Layout, tiles: Tiles) -> int:
    """Count the tiles that the pixels of all images fill, for one block of channels."""
    return layout.images * triton.cdiv(layout.pixels, tiles.BLOCK_PIXELS)


def _cut(layout: Layout, tiles: Tiles, parts: int) -> Cut:
    """Cut into about so many parts, never more: whole tiles of an image, or whole images."""
    images_a_part = triton.cdiv(layout.images, parts)
    image_tiles = triton.cdiv(layout.pixels, tiles.BLOCK_PIXELS)
    pixels_a_part = triton.cdiv(image_tiles, max(parts // layout.images, 1)) * tiles.BLOCK_PIXELS
    chunks = triton.cdiv(layout.pixels, pixels_a_part)
    return Cut(layout.images, layout.pixels, layout.channels // layout.unit, images_a_part, pixels_a_part, chunks)


def count_parts(cut: Cut) -> int:
    """Count the parts of the whole map."""
    return triton.cdiv(cut.images, cut.images_a_part) * cut.chunks


def programs_of(cut: Cut, tiles: Tiles) -> tuple[int]:
    """Return the grid of a launch: a program for each part and block of channels."""
    return (count_parts(cut) * triton.cdiv(cut.channel_units * tiles.UNIT, tiles.BLOCK_C),)
