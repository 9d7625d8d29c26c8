"""Launchers of batch norm and ReLU on Triton: two passes over the map forward, two over map and gradient backward.

Forward takes the statistics, then writes the output. Backward sums what passes the ReLU, then writes the gradient;
which pixels pass is computed again from the map, so that of forward only the map itself is kept. Nothing depends on the
order of programs.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..skip_gate.layout import empty_map, memory_format_of
from . import triton_channels, triton_maps
from .triton_maps import Cut, Map

TILE = 2048  # elements
MOST_CHANNELS = 128  # of a tile in channels-last memory

# Programs that sum hold, in half precision, 16 bytes of a tile a thread, the longest load, and load STEPS tiles at
# once. They leave parts that others add: at most four for each of 132 multiprocessors. Constants, here and below, so
# that results do not depend on the GPU.
SUM_WARPS = 8
STEPS = 4
MOST_PARTS = 4 * 132

# Programs that write a map have two such loads a thread. Enough tiles each to hide its start; fewer where programs
# would be too few to fill a GPU.
NUM_WARPS = 4
PROGRAM_TILES = 8
ENOUGH_PROGRAMS = 16 * 132

# A program of the channels has a few of them, a 64-byte line of every part, and waits for memory at each step.
CHANNEL_BLOCK = 16
MOST_PARTS_AT_ONCE = 256
CHANNEL_WARPS = 8

LARGEST_UNIT = 16  # a larger divisor of channels is of no use to the compiler
LARGEST_STRIDE = 2**20  # between neighbours in a tile, which are counted in 32 bits


class Layout(NamedTuple):
    """How the maps of a launch lie: their pixels and channels as kernels count them, and the tiles that fit them."""

    images: int
    pixels: int
    channels: int
    unit: int  # divides the channels and every distance between pixels
    is_channels_last: bool


def forward(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, mean and biased variance of the batch (C,), and the running statistics after it (2, C)."""
    channels = feature.shape[1]
    mean, variance = (torch.empty(channels, device=feature.device) for _ in range(2))
    has_running = running_mean is not None
    running = feature.new_empty((2, channels) if has_running else 0, dtype=running_mean.dtype if has_running else None)
    if feature.numel() == 0:
        mean.zero_(), variance.fill_(1)
        if has_running:
            running[0].copy_(running_mean), running[1].copy_(running_var)
        return empty_map(feature, *feature.shape[1:], feature.dtype), mean, variance, running
    (values,), layout = _maps(feature)
    cut, tiles = _cut_into_parts(layout)
    parts = torch.empty(_count(cut), 3, channels, device=feature.device)
    with torch.cuda.device_of(feature):
        triton_maps.statistics_kernel[_programs(cut, layout, tiles)](
            values, parts, cut, layout.unit, **tiles, STEPS=STEPS, num_warps=SUM_WARPS
        )
        triton_channels.combine_statistics_kernel[(triton.cdiv(channels, CHANNEL_BLOCK),)](
            parts,
            _contiguous(running_mean),
            _contiguous(running_var),
            mean,
            variance,
            running if has_running else None,
            momentum,
            cut,
            parts.shape[0],
            layout.unit,
            **_channel_tiles(parts),
            num_warps=CHANNEL_WARPS,
        )
    return apply(feature, weight, bias, mean, variance, eps), mean, variance, running


def apply(feature: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """The map normalised by the given statistics, then the ReLU."""
    output = empty_map(feature, *feature.shape[1:], feature.dtype)
    if feature.numel() == 0:
        return output
    (values, written), layout = _maps(feature, output)
    cut, tiles = _cut_evenly(layout)
    channels = [_contiguous(tensor) for tensor in (weight, bias, mean, variance)]
    with torch.cuda.device_of(feature):
        triton_maps.normalise_kernel[_programs(cut, layout, tiles)](
            values, *channels, written, eps, cut, layout.unit, **tiles, num_warps=NUM_WARPS
        )
    return output


def backward(
    gradient: Tensor,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    is_of_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the feature (B, C, H, W), weight and bias (C,)."""
    d_feature = empty_map(feature, *feature.shape[1:], feature.dtype)
    if feature.numel() == 0:
        return d_feature, torch.zeros_like(weight), torch.zeros_like(bias)
    d_weight, d_bias = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (weight, bias)
    )
    (values, written, upstream), layout = _maps(feature, d_feature, gradient)
    channels = [_contiguous(tensor) for tensor in (weight, bias, mean, variance)]
    cut, tiles = _cut_into_parts(layout)
    parts = torch.empty(_count(cut), 2, layout.channels, device=feature.device)
    sums = torch.empty(2, layout.channels, device=feature.device)
    with torch.cuda.device_of(feature):
        triton_maps.gradient_sums_kernel[_programs(cut, layout, tiles)](
            upstream, values, *channels, parts, eps, cut, layout.unit, **tiles, STEPS=STEPS, num_warps=SUM_WARPS
        )
        triton_channels.add_gradient_sums_kernel[(triton.cdiv(layout.channels, CHANNEL_BLOCK),)](
            parts,
            channels[3],
            sums,
            d_weight,
            d_bias,
            eps,
            layout.channels,
            parts.shape[0],
            **_channel_tiles(parts),
            num_warps=CHANNEL_WARPS,
        )
        cut, tiles = _cut_evenly(layout)
        triton_maps.gradient_kernel[_programs(cut, layout, tiles)](
            upstream,
            values,
            *channels,
            sums if is_of_batch else None,
            written,
            1.0 / (layout.images * layout.pixels),
            eps,
            cut,
            layout.unit,
            **tiles,
            num_warps=NUM_WARPS,
        )
    return d_feature, d_weight, d_bias


def _maps(feature: Tensor, *others: Tensor) -> tuple[list[Map], Layout]:
    """What kernels see of ``feature`` and of others of its shape, all in its memory format."""
    is_channels_last = memory_format_of(feature) == torch.channels_last
    maps = [_map(tensor, is_channels_last) for tensor in (feature, *others)]
    batch, channels, height, width = feature.shape
    unit = math.gcd(LARGEST_UNIT, channels, *(found.pixel_units for found in maps))
    maps = [found._replace(pixel_units=found.pixel_units // unit) for found in maps]
    images, pixels = (1, batch * height * width) if is_channels_last else (batch, height * width)
    return maps, Layout(images, pixels, channels, unit, is_channels_last)


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
        block_c = min(triton.next_power_of_2(layout.channels), MOST_CHANNELS, TILE)
        return {"BLOCK_PIXELS": TILE // block_c, "BLOCK_C": block_c}
    block_pixels = min(triton.next_power_of_2(layout.pixels), TILE)
    block_c = min(triton.next_power_of_2(layout.channels), TILE // block_pixels)
    return {"BLOCK_PIXELS": block_pixels, "BLOCK_C": block_c}


def _cut_into_parts(layout: Layout) -> tuple[Cut, dict[str, int]]:
    """For programs that sum: few parts, as whoever needs the sums adds them all."""
    tiles = _tiles(layout)
    most = max(MOST_PARTS // triton.cdiv(layout.channels, tiles["BLOCK_C"]), 1)
    return _cut(layout, tiles, min(triton.cdiv(_pixel_tiles(layout, tiles), STEPS), most)), tiles


def _cut_evenly(layout: Layout) -> tuple[Cut, dict[str, int]]:
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


def _count(cut: Cut) -> int:
    """Parts of the whole map."""
    return triton.cdiv(cut.images, cut.images_a_part) * cut.chunks


def _programs(cut: Cut, layout: Layout, tiles: dict[str, int]) -> tuple[int]:
    return (_count(cut) * triton.cdiv(layout.channels, tiles["BLOCK_C"]),)


def _channel_tiles(parts: Tensor) -> dict[str, Any]:
    return {"BLOCK_PARTS": min(triton.next_power_of_2(parts.shape[0]), MOST_PARTS_AT_ONCE), "BLOCK_C": CHANNEL_BLOCK}


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
