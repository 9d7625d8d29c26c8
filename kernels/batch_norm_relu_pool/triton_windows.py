"""Triton kernels that walk along windows: the normalised map with the maximum of each, and the gradients of both.

A program has a block of channels, and walks along windows of 2x2 pixels of one image or of several, [BLOCK_WINDOWS,
BLOCK_C] at a time; ``cut`` counts windows for pixels. At odd edges windows miss a row or a column: their pixels are
those of the map, and they pool nothing. Maps are read through their strides, as in ``batch_norm_relu``. All arithmetic
is float32, but the pixels of a window compete as the map holds them: what rounding makes equal is equal.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..batch_norm_relu.triton_maps import activate, normalisation, place_of, through_statistics


class Size(NamedTuple):
    """Rows and columns of the map, in pixels."""

    height: int
    width: int


@triton.jit
def _pixel(windows, size, CORNER: tl.constexpr):
    """Of each window one of its four pixels, row after row: its number in the image, and whether there is one."""
    offs_window, is_window = windows
    columns = (size.width + 1) // 2
    row = offs_window // columns * 2 + CORNER // 2
    column = offs_window % columns * 2 + CORNER % 2
    return row.to(tl.int64) * size.width + column, is_window & (row < size.height) & (column < size.width)


@triton.jit
def _pooled_pixel(windows, size):
    """The pixel of the pooled map that each window is: its number in the image, and whether there is one."""
    offs_window, is_window = windows
    columns = (size.width + 1) // 2
    row = offs_window // columns
    column = offs_window % columns
    is_whole = (2 * row + 1 < size.height) & (2 * column + 1 < size.width)
    return row.to(tl.int64) * (size.width // 2) + column, is_window & is_whole


@triton.jit
def _pointers(map, image, first_channel, pixel, UNIT: tl.constexpr, BLOCK_C: tl.constexpr):
    """To pixels of an image and a block of channels: [pixels, BLOCK_C]."""
    ptr = map.ptr + image * map.stride_image + first_channel.to(tl.int64) * map.stride_channel
    return ptr + pixel[:, None] * (map.pixel_units * UNIT) + (tl.arange(0, BLOCK_C) * map.stride_channel)[None, :]


@triton.jit
def _compete(values):
    """The largest of a window's four pixels and which one that is: the first of equals, the last that is no number."""
    largest = values[0]
    winner = tl.zeros(largest.shape, tl.int32)
    for corner in tl.static_range(1, 4):
        wins = (values[corner] > largest) | (values[corner] != values[corner])
        largest = tl.where(wins, values[corner], largest)
        winner = tl.where(wins, corner, winner)
    return largest, winner


@triton.jit
def normalise_and_pool_kernel(
    feature,
    output,
    pooled,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    eps,
    cut,
    size,
    UNIT: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The output, normalised and no less than zero, and the maximum of each whole window."""
    channels = cut.channel_units * UNIT
    # Last to first: what the statistics were taken of last is still in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    _, first_channel, first_image, end_image, first_window, end_window = place_of(pid, cut, channels, BLOCK_C)
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean, _, scale, bias = normalisation(weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps, offs_c, mask_c)
    image = first_image.to(tl.int64)
    for _ in range(first_image, end_image):
        for start in range(first_window, end_window, BLOCK_WINDOWS):
            offs_window = start + tl.arange(0, BLOCK_WINDOWS)
            windows = (offs_window, offs_window < end_window)
            tiles = ()  # all loads first, so that they are under way at once
            for corner in tl.static_range(4):
                pixel, is_there = _pixel(windows, size, corner)
                ptrs = _pointers(feature, image, first_channel, pixel, UNIT, BLOCK_C)
                mask = is_there[:, None] & mask_c[None, :]
                tiles = tiles + (tl.load(ptrs, mask=mask, other=0.0),)  # [BLOCK_WINDOWS, BLOCK_C]
            activated = ()
            for corner in tl.static_range(4):
                pixel, is_there = _pixel(windows, size, corner)
                ptrs = _pointers(output, image, first_channel, pixel, UNIT, BLOCK_C)
                values = activate((tiles[corner].to(tl.float32) - mean) * scale + bias).to(output.ptr.dtype.element_ty)
                tl.store(ptrs, values, mask=is_there[:, None] & mask_c[None, :])
                activated = activated + (values.to(tl.float32),)
            largest, _winner = _compete(activated)
            pixel, is_there = _pooled_pixel(windows, size)
            ptrs = _pointers(pooled, image, first_channel, pixel, UNIT, BLOCK_C)
            tl.store(ptrs, largest.to(pooled.ptr.dtype.element_ty), mask=is_there[:, None] & mask_c[None, :])
        image += 1


@triton.jit
def _gradients_of_windows(
    gradient,
    d_pooled,
    feature,
    image,
    first_channel,
    windows,
    mask_c,
    size,
    affine,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of the four pixels of each window: their distance from the mean, and what passes the ReLU of both gradients."""
    mean, scale, bias = affine
    tiles = ()  # all loads first, so that they are under way at once
    upstream = ()
    for corner in tl.static_range(4):
        pixel, is_there = _pixel(windows, size, corner)
        mask = is_there[:, None] & mask_c[None, :]
        ptrs = _pointers(feature, image, first_channel, pixel, UNIT, BLOCK_C)
        tiles = tiles + (tl.load(ptrs, mask=mask, other=0.0),)  # [BLOCK_WINDOWS, BLOCK_C]
        ptrs = _pointers(gradient, image, first_channel, pixel, UNIT, BLOCK_C)
        upstream = upstream + (tl.load(ptrs, mask=mask, other=0.0),)
    pixel, is_there = _pooled_pixel(windows, size)
    ptrs = _pointers(d_pooled, image, first_channel, pixel, UNIT, BLOCK_C)
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
def window_gradient_sums_kernel(
    gradient,
    d_pooled,
    feature,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    parts_ptr,
    eps,
    cut,
    size,
    UNIT: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of each part (parts, 2, C): the sums of ``g`` and of ``g (x - mean)``, with ``g`` what passes the ReLU."""
    channels = cut.channel_units * UNIT
    part, first_channel, first_image, end_image, first_window, end_window = place_of(
        tl.program_id(0), cut, channels, BLOCK_C
    )
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean, _, scale, bias = normalisation(weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps, offs_c, mask_c)
    affine = (mean, scale, bias)
    total = tl.zeros([BLOCK_WINDOWS, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_WINDOWS, BLOCK_C], tl.float32)
    image = first_image.to(tl.int64)
    for _ in range(first_image, end_image):
        for start in range(first_window, end_window, BLOCK_WINDOWS):
            offs_window = start + tl.arange(0, BLOCK_WINDOWS)
            windows = (offs_window, offs_window < end_window)
            centred, passed = _gradients_of_windows(
                gradient, d_pooled, feature, image, first_channel, windows, mask_c, size, affine, UNIT, BLOCK_C
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
    gradient,
    d_pooled,
    feature,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    sums_ptr,
    d_feature,
    inverse_count,
    eps,
    cut,
    size,
    UNIT: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient by the feature; without sums, of statistics that do not depend on it."""
    channels = cut.channel_units * UNIT
    # Last to first: what the gradients were summed of last is still in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    _, first_channel, first_image, end_image, first_window, end_window = place_of(pid, cut, channels, BLOCK_C)
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean, inverse_deviation, scale, bias = normalisation(
        weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps, offs_c, mask_c
    )
    if sums_ptr is not None:
        mean_gradient, slope = through_statistics(sums_ptr, inverse_deviation, inverse_count, channels, offs_c, mask_c)
    affine = (mean, scale, bias)
    image = first_image.to(tl.int64)
    for _ in range(first_image, end_image):
        for start in range(first_window, end_window, BLOCK_WINDOWS):
            offs_window = start + tl.arange(0, BLOCK_WINDOWS)
            windows = (offs_window, offs_window < end_window)
            centred, passed = _gradients_of_windows(
                gradient, d_pooled, feature, image, first_channel, windows, mask_c, size, affine, UNIT, BLOCK_C
            )
            for corner in tl.static_range(4):
                pixel, is_there = _pixel(windows, size, corner)
                ptrs = _pointers(d_feature, image, first_channel, pixel, UNIT, BLOCK_C)
                d_values = passed[corner]
                if sums_ptr is not None:
                    d_values = d_values - mean_gradient - centred[corner] * slope
                d_values = (scale * d_values).to(d_feature.ptr.dtype.element_ty)
                tl.store(ptrs, d_values, mask=is_there[:, None] & mask_c[None, :])
        image += 1
