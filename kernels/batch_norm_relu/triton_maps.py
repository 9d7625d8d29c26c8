"""Triton kernels that read and write whole maps: statistics, the normalised map, and gradients.

A program has a block of channels, and walks along pixels of one image or of several, [BLOCK_PIXELS, BLOCK_C] at a time.
Maps are read through their strides, so that one kernel serves contiguous and channels-last memory with blocks of other
sizes. In channels-last memory the pixels of all images count as those of one. All arithmetic is float32.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Map(NamedTuple):
    """A map (B, C, H, W); pixels follow each other at one distance, row after row."""

    ptr: Tensor
    stride_image: int
    stride_channel: int
    pixel_units: int  # stride of a pixel, in UNIT elements: the compiler sees what divides it, and loads whole vectors


class Norm(NamedTuple):
    """Numbers of each channel, (C,) and contiguous, and what is added to the variance."""

    weight_ptr: Tensor
    bias_ptr: Tensor
    mean_ptr: Tensor
    variance_ptr: Tensor
    shift_ptr: Tensor | None  # what the map lacks of the one that has this mean
    eps: float


class Tiles(NamedTuple):
    """Sizes of tiles, known when a kernel is compiled."""

    UNIT: int  # divides the channels and the strides of pixels
    BLOCK_PIXELS: int
    BLOCK_C: int


class Cut(NamedTuple):
    """A map cut into parts, one for a program and block of channels: a few images, and a chunk of each."""

    images: int
    pixels: int  # of an image
    channel_units: int  # of UNIT channels
    images_a_part: int
    pixels_a_part: int  # a chunk; the last one may be shorter
    chunks: int  # of an image


@triton.jit
def place_of(pid, cut, TILES: tl.constexpr):
    """Return a program's part and first channel, and where the part begins and ends."""
    channel_blocks = tl.cdiv(cut.channel_units * TILES.UNIT, TILES.BLOCK_C)
    first_channel = pid % channel_blocks * TILES.BLOCK_C
    part = pid // channel_blocks
    first_image = part // cut.chunks * cut.images_a_part
    end_image = tl.minimum(first_image + cut.images_a_part, cut.images)
    first_pixel = part % cut.chunks * cut.pixels_a_part
    end_pixel = tl.minimum(first_pixel + cut.pixels_a_part, cut.pixels)
    return part, first_channel, first_image, end_image, first_pixel, end_pixel


@triton.jit
def _at(map, image, first_channel, first_pixel, TILES: tl.constexpr):
    """Return a pointer to the first channel and pixel of a program."""
    ptr = map.ptr + image.to(tl.int64) * map.stride_image + first_channel.to(tl.int64) * map.stride_channel
    return ptr + first_pixel.to(tl.int64) * (map.pixel_units * TILES.UNIT)


@triton.jit
def _offsets(map, TILES: tl.constexpr):
    """Return the offsets of a tile: [BLOCK_PIXELS, BLOCK_C]."""
    offs_pixel = tl.arange(0, TILES.BLOCK_PIXELS)
    offs_c = tl.arange(0, TILES.BLOCK_C)
    return offs_pixel[:, None] * (map.pixel_units * TILES.UNIT) + offs_c[None, :] * map.stride_channel


@triton.jit
def zeros(TILES: tl.constexpr):
    """Return zeros for each entry of a tile: [BLOCK_PIXELS, BLOCK_C]."""
    BLOCK_PIXELS: tl.constexpr = TILES.BLOCK_PIXELS
    BLOCK_C: tl.constexpr = TILES.BLOCK_C
    return tl.zeros([BLOCK_PIXELS, BLOCK_C], tl.float32)


@triton.jit
def _channel(ptr, offs_c, mask_c):
    """Load a number of each channel so that it meets its pixels: [1, BLOCK_C]."""
    return tl.load(ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_norm(norm, offs_c, mask_c):
    """Load the mean, the inverse deviation, the weight times it, and the bias."""
    inverse_deviation = tl.rsqrt(_channel(norm.variance_ptr, offs_c, mask_c) + norm.eps)
    scale = _channel(norm.weight_ptr, offs_c, mask_c) * inverse_deviation
    mean = _channel(norm.mean_ptr, offs_c, mask_c)
    if norm.shift_ptr is not None:
        mean -= _channel(norm.shift_ptr, offs_c, mask_c)
    return mean, inverse_deviation, scale, _channel(norm.bias_ptr, offs_c, mask_c)


@triton.jit
def activate(normalised):
    """Apply the ReLU; NaN must not become zero."""
    return tl.maximum(normalised, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def through_statistics(sums_ptr, inverse_deviation, inverse_count, channels, offs_c, mask_c):
    """Return what the statistics of the batch take from the gradient: a mean, and the slope of the centred map."""
    mean_gradient = _channel(sums_ptr, offs_c, mask_c) * inverse_count
    # One deviation after the other: the square of a large one may be infinite.
    slope = _channel(sums_ptr + channels, offs_c, mask_c) * inverse_count * inverse_deviation * inverse_deviation
    return mean_gradient, slope


@triton.jit
def statistics_kernel(feature, parts_ptr, cut, TILES: tl.constexpr, STEPS: tl.constexpr):
    """Write for each part (parts, 3, C) one of its values, their mean as seen from it, and the squares around the mean.

    A lane takes its values as distances from its first one, so that no common offset is squared; README.md bounds the
    error.
    """
    channels = cut.channel_units * TILES.UNIT
    part, first_channel, first_image, end_image, first_pixel, end_pixel = place_of(tl.program_id(0), cut, TILES)
    offs_pixel = first_pixel + tl.arange(0, TILES.BLOCK_PIXELS)
    offs_c = tl.arange(0, TILES.BLOCK_C)
    mask_c = first_channel + offs_c < channels
    offs = _offsets(feature, TILES)
    ptr = _at(feature, first_image, first_channel, first_pixel, TILES)
    origin = tl.load(ptr + offs_c * feature.stride_channel, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
    mask = (offs_pixel < end_pixel)[:, None] & mask_c[None, :]
    first = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_PIXELS, BLOCK_C]
    total = zeros(TILES)
    squares = zeros(TILES)
    for _ in range(first_image, end_image):
        pixel_ptr = ptr
        for start in range(0, end_pixel - first_pixel, STEPS * TILES.BLOCK_PIXELS):
            tiles = ()  # all loads first, so that they are under way at the same time
            for step in tl.static_range(STEPS):
                mask = (start + step * TILES.BLOCK_PIXELS + offs_pixel < end_pixel)[:, None] & mask_c[None, :]
                tiles = tiles + (tl.load(pixel_ptr + offs, mask=mask, other=0.0),)
                pixel_ptr += TILES.BLOCK_PIXELS * (feature.pixel_units * TILES.UNIT)
            for step in tl.static_range(STEPS):
                mask = (start + step * TILES.BLOCK_PIXELS + offs_pixel < end_pixel)[:, None] & mask_c[None, :]
                centred = tl.where(mask, tiles[step].to(tl.float32) - first, 0.0)  # [BLOCK_PIXELS, BLOCK_C]
                total += centred
                squares += centred * centred
        ptr += feature.stride_image

    images = end_image - first_image
    lane_pixels = tl.cdiv(tl.maximum(end_pixel - offs_pixel, 0), TILES.BLOCK_PIXELS)
    counts = (images * lane_pixels).to(tl.float32)[:, None]
    lane_means = total / tl.maximum(counts, 1.0)
    lane_squares = squares - total * lane_means
    offsets = tl.where(counts > 0.0, (first - origin[None, :]) + lane_means, 0.0)  # [BLOCK_PIXELS, BLOCK_C]
    mean = tl.sum(counts * offsets, axis=0) / (images * (end_pixel - first_pixel))  # [BLOCK_C]
    apart = offsets - mean[None, :]
    around_mean = tl.sum(lane_squares + counts * apart * apart, axis=0)

    parts_ptr += part.to(tl.int64) * (3 * channels) + first_channel
    tl.store(parts_ptr + offs_c, origin, mask=mask_c)
    tl.store(parts_ptr + channels + offs_c, mean, mask=mask_c)
    tl.store(parts_ptr + 2 * channels + offs_c, around_mean, mask=mask_c)


@triton.jit
def normalise_kernel(feature, output, norm, cut, TILES: tl.constexpr):
    """Write the output: the map with mean 0 and variance 1, scaled, shifted, and no less than zero."""
    channels = cut.channel_units * TILES.UNIT
    # From last to first: the cache still holds the end of the map, which the statistics read last.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    _, first_channel, first_image, end_image, first_pixel, end_pixel = place_of(pid, cut, TILES)
    offs_pixel = first_pixel + tl.arange(0, TILES.BLOCK_PIXELS)
    offs_c = first_channel + tl.arange(0, TILES.BLOCK_C)
    mask_c = offs_c < channels
    mean, _, scale, bias = load_norm(norm, offs_c, mask_c)
    offs = _offsets(feature, TILES)
    output_offs = _offsets(output, TILES)
    ptr = _at(feature, first_image, first_channel, first_pixel, TILES)
    output_ptr = _at(output, first_image, first_channel, first_pixel, TILES)
    for _ in range(first_image, end_image):
        pixel_ptr = ptr
        output_pixel_ptr = output_ptr
        for start in range(0, end_pixel - first_pixel, TILES.BLOCK_PIXELS):
            mask = (start + offs_pixel < end_pixel)[:, None] & mask_c[None, :]
            values = tl.load(pixel_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_PIXELS, BLOCK_C]
            activated = activate((values - mean) * scale + bias)
            tl.store(output_pixel_ptr + output_offs, activated.to(output.ptr.dtype.element_ty), mask=mask)
            pixel_ptr += TILES.BLOCK_PIXELS * (feature.pixel_units * TILES.UNIT)
            output_pixel_ptr += TILES.BLOCK_PIXELS * (output.pixel_units * TILES.UNIT)
        ptr += feature.stride_image
        output_ptr += output.stride_image


@triton.jit
def gradient_sums_kernel(gradient, feature, norm, parts_ptr, cut, TILES: tl.constexpr, STEPS: tl.constexpr):
    """Write for each part (parts, 2, C) the sums of ``g`` and of ``g (x - mean)``; ``g`` is what passes the ReLU."""
    channels = cut.channel_units * TILES.UNIT
    part, first_channel, first_image, end_image, first_pixel, end_pixel = place_of(tl.program_id(0), cut, TILES)
    offs_pixel = first_pixel + tl.arange(0, TILES.BLOCK_PIXELS)
    offs_c = first_channel + tl.arange(0, TILES.BLOCK_C)
    mask_c = offs_c < channels
    mean, _, scale, bias = load_norm(norm, offs_c, mask_c)
    offs = _offsets(feature, TILES)
    gradient_offs = _offsets(gradient, TILES)
    ptr = _at(feature, first_image, first_channel, first_pixel, TILES)
    gradient_ptr = _at(gradient, first_image, first_channel, first_pixel, TILES)
    total = zeros(TILES)
    weighted = zeros(TILES)
    for _ in range(first_image, end_image):
        pixel_ptr = ptr
        gradient_pixel_ptr = gradient_ptr
        for start in range(0, end_pixel - first_pixel, STEPS * TILES.BLOCK_PIXELS):
            tiles = ()  # all loads first, so that they are under way at the same time
            upstream = ()
            for step in tl.static_range(STEPS):
                mask = (start + step * TILES.BLOCK_PIXELS + offs_pixel < end_pixel)[:, None] & mask_c[None, :]
                tiles = tiles + (tl.load(pixel_ptr + offs, mask=mask, other=0.0),)
                upstream = upstream + (tl.load(gradient_pixel_ptr + gradient_offs, mask=mask, other=0.0),)
                pixel_ptr += TILES.BLOCK_PIXELS * (feature.pixel_units * TILES.UNIT)
                gradient_pixel_ptr += TILES.BLOCK_PIXELS * (gradient.pixel_units * TILES.UNIT)
            for step in tl.static_range(STEPS):
                centred = tiles[step].to(tl.float32) - mean  # [BLOCK_PIXELS, BLOCK_C]
                passed = tl.where(centred * scale + bias <= 0.0, 0.0, upstream[step].to(tl.float32))
                total += passed
                weighted += passed * centred
        ptr += feature.stride_image
        gradient_ptr += gradient.stride_image
    parts_ptr += part.to(tl.int64) * (2 * channels)
    tl.store(parts_ptr + offs_c, tl.sum(total, axis=0), mask=mask_c)
    tl.store(parts_ptr + channels + offs_c, tl.sum(weighted, axis=0), mask=mask_c)


@triton.jit
def gradient_kernel(gradient, feature, d_feature, norm, sums_ptr, inverse_count, cut, TILES: tl.constexpr):
    """Write the gradient by the feature; without sums, for statistics that do not depend on it."""
    channels = cut.channel_units * TILES.UNIT
    # From last to first: the cache still holds the end of both maps, which was summed last.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    _, first_channel, first_image, end_image, first_pixel, end_pixel = place_of(pid, cut, TILES)
    offs_pixel = first_pixel + tl.arange(0, TILES.BLOCK_PIXELS)
    offs_c = first_channel + tl.arange(0, TILES.BLOCK_C)
    mask_c = offs_c < channels
    mean, inverse_deviation, scale, bias = load_norm(norm, offs_c, mask_c)
    if sums_ptr is not None:
        mean_gradient, slope = through_statistics(sums_ptr, inverse_deviation, inverse_count, channels, offs_c, mask_c)
    offs = _offsets(feature, TILES)
    gradient_offs = _offsets(gradient, TILES)
    d_offs = _offsets(d_feature, TILES)
    ptr = _at(feature, first_image, first_channel, first_pixel, TILES)
    gradient_ptr = _at(gradient, first_image, first_channel, first_pixel, TILES)
    d_ptr = _at(d_feature, first_image, first_channel, first_pixel, TILES)
    for _ in range(first_image, end_image):
        pixel_ptr = ptr
        gradient_pixel_ptr = gradient_ptr
        d_pixel_ptr = d_ptr
        for start in range(0, end_pixel - first_pixel, TILES.BLOCK_PIXELS):
            mask = (start + offs_pixel < end_pixel)[:, None] & mask_c[None, :]
            values = tl.load(pixel_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_PIXELS, BLOCK_C]
            upstream = tl.load(gradient_pixel_ptr + gradient_offs, mask=mask, other=0.0).to(tl.float32)
            centred = values - mean
            d_values = tl.where(centred * scale + bias <= 0.0, 0.0, upstream)
            if sums_ptr is not None:
                d_values = d_values - mean_gradient - centred * slope
            tl.store(d_pixel_ptr + d_offs, (scale * d_values).to(d_feature.ptr.dtype.element_ty), mask=mask)
            pixel_ptr += TILES.BLOCK_PIXELS * (feature.pixel_units * TILES.UNIT)
            gradient_pixel_ptr += TILES.BLOCK_PIXELS * (gradient.pixel_units * TILES.UNIT)
            d_pixel_ptr += TILES.BLOCK_PIXELS * (d_feature.pixel_units * TILES.UNIT)
        ptr += feature.stride_image
        gradient_ptr += gradient.stride_image
        d_ptr += d_feature.stride_image
