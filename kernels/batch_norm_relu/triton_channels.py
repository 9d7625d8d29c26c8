"""Triton kernels of the channels: they put together what was found in the parts of a map, always in the same order.

A program has a block of channels, and walks along the parts [BLOCK_PARTS, BLOCK_C]. All arithmetic is float32.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Running(NamedTuple):
    """The running statistics (C,), which are updated in place."""

    mean_ptr: Tensor
    variance_ptr: Tensor
    momentum: float  # share of the batch
    copies: int  # pixels that each pixel stands for


@triton.jit
def _pixels_of_parts(cut, parts):
    """Count the pixels of all images that each part has."""
    images = cut.images - parts // cut.chunks * cut.images_a_part
    pixels = cut.pixels - parts % cut.chunks * cut.pixels_a_part
    images = tl.maximum(tl.minimum(images, cut.images_a_part), 0)
    return images.to(tl.float32) * tl.minimum(pixels, cut.pixels_a_part).to(tl.float32)


@triton.jit
def combine_statistics_kernel(
    parts_ptr,
    mean_ptr,
    variance_ptr,
    conv_bias_ptr,
    running,
    num_batches_tracked_ptr,
    cut,
    parts,
    channels,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write mean and biased variance of the batch (C,), and update the running statistics and the count of batches.

    The running mean is that of the map with the bias of the convolution, which the map itself lacks.

    First comes the mean of the parts, as seen from a value of the first one, then the squares around it: parts that lie
    apart add the distances between them.
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    origin = tl.load(parts_ptr + offs_c, mask=mask_c, other=0.0)  # [BLOCK_C]
    count = 1.0 * cut.images * cut.pixels

    total = tl.zeros([BLOCK_PARTS, BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        offs_part = first + tl.arange(0, BLOCK_PARTS)
        mask = (offs_part < parts)[:, None] & mask_c[None, :]
        ptrs = parts_ptr + offs_part.to(tl.int64)[:, None] * (3 * channels) + offs_c[None, :]
        part_origin = tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_PARTS, BLOCK_C]
        part_mean = tl.load(ptrs + channels, mask=mask, other=0.0)
        offset = tl.where(mask, (part_origin - origin[None, :]) + part_mean, 0.0)
        total += _pixels_of_parts(cut, offs_part)[:, None] * offset
    mean = tl.sum(total, axis=0) / count

    squares = tl.zeros([BLOCK_PARTS, BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        offs_part = first + tl.arange(0, BLOCK_PARTS)
        mask = (offs_part < parts)[:, None] & mask_c[None, :]
        ptrs = parts_ptr + offs_part.to(tl.int64)[:, None] * (3 * channels) + offs_c[None, :]
        part_origin = tl.load(ptrs, mask=mask, other=0.0)
        part_mean = tl.load(ptrs + channels, mask=mask, other=0.0)
        around_mean = tl.load(ptrs + 2 * channels, mask=mask, other=0.0)
        apart = tl.where(mask, (part_origin - origin[None, :]) + part_mean - mean[None, :], 0.0)
        squares += around_mean + _pixels_of_parts(cut, offs_part)[:, None] * apart * apart
    around_mean_of_all = tl.sum(squares, axis=0)

    mean += origin
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(variance_ptr + offs_c, around_mean_of_all / count, mask=mask_c)
    if running is not None:
        running_mean = tl.load(running.mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        running_var = tl.load(running.variance_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        unbiased = around_mean_of_all / (count - 1.0 / running.copies)
        if conv_bias_ptr is not None:
            mean += tl.load(conv_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        running_mean = running.momentum * mean + (1.0 - running.momentum) * running_mean
        running_var = running.momentum * unbiased + (1.0 - running.momentum) * running_var
        dtype = running.mean_ptr.dtype.element_ty
        tl.store(running.mean_ptr + offs_c, running_mean.to(dtype), mask=mask_c)
        tl.store(running.variance_ptr + offs_c, running_var.to(dtype), mask=mask_c)
    if num_batches_tracked_ptr is not None:
        is_first = tl.program_id(0) == 0
        tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr, mask=is_first) + 1, mask=is_first)


@triton.jit
def add_gradient_sums_kernel(
    parts_ptr,
    weight_ptr,
    variance_ptr,
    sums_ptr,
    d_weight_ptr,
    d_bias_ptr,
    d_conv_bias_ptr,
    eps,
    parts,
    channels,
    IS_OF_BATCH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the sums of all parts (2, C), and the gradients by weight, bias and conv_bias that follow from them.

    Statistics of the batch take away what conv_bias adds, so its gradient is zero.
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    total = tl.zeros([BLOCK_PARTS, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_PARTS, BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        offs_part = first + tl.arange(0, BLOCK_PARTS)
        mask = (offs_part < parts)[:, None] & mask_c[None, :]
        ptrs = parts_ptr + offs_part.to(tl.int64)[:, None] * (2 * channels) + offs_c[None, :]
        total += tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_PARTS, BLOCK_C]
        weighted += tl.load(ptrs + channels, mask=mask, other=0.0)
    sum_of_gradients = tl.sum(total, axis=0)
    sum_of_weighted = tl.sum(weighted, axis=0)
    variance = tl.load(variance_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    inverse_deviation = tl.rsqrt(variance + eps)
    d_weight = sum_of_weighted * inverse_deviation
    d_conv_bias = tl.zeros([BLOCK_C], tl.float32)
    if not IS_OF_BATCH:
        weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        d_conv_bias = sum_of_gradients * weight * inverse_deviation
    tl.store(sums_ptr + offs_c, sum_of_gradients, mask=mask_c)
    tl.store(sums_ptr + channels + offs_c, sum_of_weighted, mask=mask_c)
    tl.store(d_weight_ptr + offs_c, d_weight.to(d_weight_ptr.dtype.element_ty), mask=mask_c)
    tl.store(d_bias_ptr + offs_c, sum_of_gradients.to(d_bias_ptr.dtype.element_ty), mask=mask_c)
    tl.store(d_conv_bias_ptr + offs_c, d_conv_bias.to(d_conv_bias_ptr.dtype.element_ty), mask=mask_c)
