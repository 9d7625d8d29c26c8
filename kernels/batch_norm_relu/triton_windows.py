"""Triton kernels that walk along windows: the normalised map with the maximum of each, and the gradients of both.

A program has a block of channels, and walks along windows of 2x2 pixels of one image or of several, [BLOCK_PIXELS,
BLOCK_C] at a time: cuts and tiles count windows instead of pixels. At odd edges windows miss a row or a column: their
pixels are normalised like any, and they pool nothing. All arithmetic is float32, but the pixels of a window compete as
rounded to the map's dtype, as they do where a stored map is pooled.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_maps import activate, load_norm, place_of, through_statistics, zeros


class Size(NamedTuple):
    """Rows and columns of the map, in pixels."""

    height: int
    width: int


@triton.jit
def _pixel(windows, size, CORNER: tl.constexpr):
    """Return one of the four pixels of each window, row after row: its number in the image, and whether it exists."""
    offs_window, is_window = windows
    columns = (size.width + 1) // 2
    row = offs_window // columns * 2 + CORNER // 2
    column = offs_window % columns * 2 + CORNER % 2
    return row.to(tl.int64) * size.width + column, is_window & (row < size.height) & (column < size.width)


@triton.jit
def _pooled_pixel(windows, size):
    """Return the pixel of the pooled map for each window: its number in the image, and whether it exists."""
    offs_window, is_window = windows
    columns = (size.width + 1) // 2
    row = offs_window // columns
    column = offs_window % columns
    is_whole = (2 * row + 1 < size.height) & (2 * column + 1 < size.width)
    return row.to(tl.int64) * (size.width // 2) + column, is_window & is_whole


@triton.jit
def _pointers(map, image, first_channel, pixel, TILES: tl.constexpr):
    """Return pointers to pixels of an image and a block of channels: [BLOCK_PIXELS, BLOCK_C]."""
    ptr = map.ptr + image * map.stride_image + first_channel.to(tl.int64) * map.stride_channel
    offs_c = tl.arange(0, TILES.BLOCK_C) * map.stride_channel
    return ptr + pixel[:, None] * (map.pixel_units * TILES.UNIT) + offs_c[None, :]


@triton.jit
def _compete(values):
    """Return the largest of a window's four pixels and its place: the first of equals, the last that is NaN."""
    largest = values[0]
    winner = tl.zeros(largest.shape, tl.int32)
    for corner in tl.static_range(1, 4):
        wins = (values[corner] > largest) | (values[corner] != values[corner])
        largest = tl.where(wins, values[corner], largest)
        winner = tl.where(wins, corner, winner)
    return largest, winner


@triton.jit
def normalise_and_pool_kernel(feature, output, pooled, norm, cut, size, TILES: tl.constexpr):
    """Write the output, normalised and no less than zero, and the maximum of each whole window."""
    channels = cut.channel_units * TILES.UNIT
    # From last to first: the cache still holds the end of the map, which the statistics read last.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    _, first_channel, first_image, end_image, first_window, end_window = place_of(pid, cut, TILES)
    offs_c = first_channel + tl.arange(0, TILES.BLOCK_C)
    mask_c = offs_c < channels
    mean, _, scale, bias = load_norm(norm, offs_c, mask_c)
    image = first_image.to(tl.int64)
    for _ in range(first_image, end_image):
        for start in range(first_window, end_window, TILES.BLOCK_PIXELS):
            offs_window = start + tl.arange(0, TILES.BLOCK_PIXELS)
            windows = (offs_window, offs_window < end_window)
            tiles = ()  # all loads first, so that they are under way at the same time
            for corner in tl.static_range(4):
                pixel, is_there = _pixel(windows, size, corner)
                ptrs = _pointers(feature, image, first_channel, pixel, TILES)
                mask = is_there[:, None] & mask_c[None, :]
                tiles = tiles + (tl.load(ptrs, mask=mask, other=0.0),)  # [BLOCK_PIXELS, BLOCK_C]
            activated = ()
            for corner in tl.static_range(4):
                pixel, is_there = _pixel(windows, size, corner)
                ptrs = _pointers(output, image, first_channel, pixel, TILES)
                values = activate((tiles[corner].to(tl.float32) - mean) * scale + bias).to(output.ptr.dtype.element_ty)
                tl.store(ptrs, values, mask=is_there[:, None] & mask_c[None, :])
                activated = activated + (values.to(tl.float32),)
            largest, _winner = _compete(activated)
            pixel, is_there = _pooled_pixel(windows, size)
            ptrs = _pointers(pooled, image, first_channel, pixel, TILES)
            tl.store(ptrs, largest.to(pooled.ptr.dtype.element_ty), mask=is_there[:, None] & mask_c[None, :])
        image += 1


@triton.jit
def _gradients_of_windows(
    gradient, d_pooled, feature, image, first_channel, windows, mask_c, size, affine, TILES: tl.constexpr
):
    """Return for the pixels of each window the distance from the mean and what passes the ReLU of both gradients."""
    mean, scale, bias = affine
    tiles = ()  # all loads first, so that they are under way at the same time
    upstream = ()
    for corner in tl.static_range(4):
        pixel, is_there = _pixel(windows, size, corner)
        mask = is_there[:, None] & mask_c[None, :]
        ptrs = _pointers(feature, image, first_channel, pixel, TILES)
        tiles = tiles + (tl.load(ptrs, mask=mask, other=0.0),)  # [BLOCK_PIXELS, BLOCK_C]
        ptrs = _pointers(gradient, image, first_channel, pixel, TILES)
        upstream = upstream + (tl.load(ptrs, mask=mask, other=0.0),)
    pixel, is_there = _pooled_pixel(windows, size)
    ptrs = _pointers(d_pooled, image, first_channel, pixel, TILES)
    of_winner = tl.load(ptrs, mask=is_there[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
    centred = ()
    activated = ()
    for corner in tl.static_range(4):
        values = tiles[corner].to(tl.float32) - mean
        centred = centred + (values,)
        activated = activated + (activate(values * scale + bias).to(feature.ptr.dtype.element_ty).to(tl.float32),)
    _, winner = _compete(activated)
    passed = ()
    for corner in tl.static_range(4):
        total = upstream[corner].to(tl.float32) + tl.where(winner == corner, of_winner, 0.0)
        passed = passed + (tl.where(centred[corner] * scale + bias <= 0.0, 0.0, total),)
    return centred, passed


@triton.jit
def window_gradient_sums_kernel(gradient, d_pooled, feature, norm, parts_ptr, cut, size, TILES: tl.constexpr):
    """Write for each part (parts, 2, C) the sums of ``g`` and of ``g (x - mean)``; ``g`` is what passes the ReLU."""
    channels = cut.channel_units * TILES.UNIT
    part, first_channel, first_image, end_image, first_window, end_window = place_of(tl.program_id(0), cut, TILES)
    offs_c = first_channel + tl.arange(0, TILES.BLOCK_C)
    mask_c = offs_c < channels
    mean, _, scale, bias = load_norm(norm, offs_c, mask_c)
    affine = (mean, scale, bias)
    total = zeros(TILES)
    weighted = zeros(TILES)
    image = first_image.to(tl.int64)
    for _ in range(first_image, end_image):
        for start in range(first_window, end_window, TILES.BLOCK_PIXELS):
            offs_window = start + tl.arange(0, TILES.BLOCK_PIXELS)
            windows = (offs_window, offs_window < end_window)
            centred, passed = _gradients_of_windows(
                gradient, d_pooled, feature, image, first_channel, windows, mask_c, size, affine, TILES
            )
            for corner in tl.static_range(4):
                total += passed[corner]
                weighted += passed[corner] * centred[corner]
        image += 1
    parts_ptr += part.to(tl.int64) * (2 * channels)
    tl.store(parts_ptr + offs_c, tl.sum(total, axis=0), mask=mask_c)
    tl.store(parts_ptr + channels + offs_c, tl.sum(weighted, axis=0), mask=mask_c)


@triton.jit
def window_gradient_kernel(
    gradient, d_pooled, feature, d_feature, norm, sums_ptr, inverse_count, cut, size, TILES: tl.constexpr
):
    """Write the gradient by the feature; without sums, for statistics that do not depend on it."""
    channels = cut.channel_units * TILES.UNIT
    # From last to first: the cache still holds the end of the maps, which was summed last.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    _, first_channel, first_image, end_image, first_window, end_window = place_of(pid, cut, TILES)
    offs_c = first_channel + tl.arange(0, TILES.BLOCK_C)
    mask_c = offs_c < channels
    mean, inverse_deviation, scale, bias = load_norm(norm, offs_c, mask_c)
    if sums_ptr is not None:
        mean_gradient, slope = through_statistics(sums_ptr, inverse_deviation, inverse_count, channels, offs_c, mask_c)
    affine = (mean, scale, bias)
    image = first_image.to(tl.int64)
    for _ in range(first_image, end_image):
        for start in range(first_window, end_window, TILES.BLOCK_PIXELS):
            offs_window = start + tl.arange(0, TILES.BLOCK_PIXELS)
            windows = (offs_window, offs_window < end_window)
            centred, passed = _gradients_of_windows(
                gradient, d_pooled, feature, image, first_channel, windows, mask_c, size, affine, TILES
            )
            for corner in tl.static_range(4):
                pixel, is_there = _pixel(windows, size, corner)
                ptrs = _pointers(d_feature, image, first_channel, pixel, TILES)
                d_values = passed[corner]
                if sums_ptr is not None:
                    d_values = d_values - mean_gradient - centred[corner] * slope
                d_values = (scale * d_values).to(d_feature.ptr.dtype.element_ty)
                tl.store(ptrs, d_values, mask=is_there[:, None] & mask_c[None, :])
        image += 1
