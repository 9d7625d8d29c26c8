"""Triton kernels over rows of maps in memory, and over the segments of the rows of a head.

A map is (B, C, H, S), contiguous: a row holds the scores of one query channel and head with all key channels. A program
keeps whole rows in registers, one or several short ones, so a kernel reads and writes each entry once, and memory
bounds its time. Numbers that belong to a row are (B, H, C) float32. Both may be those of a part of the images:
``first_row`` is how many rows come before it, which the dropout mask depends on.
"""

import triton
import triton.language as tl

from .triton_dropout import keep_mask, row_keys

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_statistics_kernel(
    score_ptr,
    mean_ptr,
    variance_ptr,
    heads,
    rows,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write the mean and the biased variance of each row of scores."""
    row, mask_row, entry, mask = _rows(heads, rows, CHANNELS, KEY_CHANNELS, BLOCK_ROWS, BLOCK_S)
    scores = tl.load(score_ptr + entry, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_S]
    mean = tl.sum(scores, axis=1) / KEY_CHANNELS
    centred = tl.where(mask, scores - mean[:, None], 0.0)
    tl.store(mean_ptr + row, mean, mask=mask_row)
    tl.store(variance_ptr + row, tl.sum(centred * centred, axis=1) / KEY_CHANNELS, mask=mask_row)


@triton.jit
def instance_norm_kernel(
    mean_ptr, variance_ptr, eps, CHANNELS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Replace the mean of each row by that of its map, the rows of one segment, and the variance by ``1 / sigma``."""
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    row = tl.program_id(0).to(tl.int64) * CHANNELS + offs_c
    row_mean = tl.load(mean_ptr + row, mask=mask_c, other=0.0)
    row_variance = tl.load(variance_ptr + row, mask=mask_c, other=0.0)
    mean = _segment_means(row_mean, offs_c, SEGMENTS)
    deviation = row_mean - mean
    variance = _segment_means(row_variance + deviation * deviation, offs_c, SEGMENTS) + eps
    is_constant = variance == 0.0  # without eps; then the softmax is even
    temperature = tl.where(is_constant, 0.0, 1.0 / tl.sqrt(tl.where(is_constant, 1.0, variance)))
    tl.store(mean_ptr + row, mean, mask=mask_c)
    tl.store(variance_ptr + row, temperature, mask=mask_c)


@triton.jit
def segment_mean_kernel(value_ptr, CHANNELS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Replace the value of each row by the mean over the rows of its segment."""
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    row = tl.program_id(0).to(tl.int64) * CHANNELS + offs_c
    values = tl.load(value_ptr + row, mask=mask_c, other=0.0)
    tl.store(value_ptr + row, _segment_means(values, offs_c, SEGMENTS), mask=mask_c)


@triton.jit
def softmax_kernel(
    score_ptr,
    temperature_ptr,
    seed_ptr,
    first_row,
    threshold,
    heads,
    rows,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Turn scores into attention in place: softmax of the scores times temperature, and dropout without its factor."""
    row, mask_row, entry, mask = _rows(heads, rows, CHANNELS, KEY_CHANNELS, BLOCK_ROWS, BLOCK_S)
    scores = tl.load(score_ptr + entry, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_S]
    temperature = tl.load(temperature_ptr + row, mask=mask_row, other=0.0)
    softmax = _softmax(scores, temperature, KEY_CHANNELS, BLOCK_S)
    if seed_ptr is not None:
        softmax = tl.where(_keep_rows(seed_ptr, first_row + row, threshold, BLOCK_S), softmax, 0.0)
    tl.store(score_ptr + entry, softmax.to(score_ptr.dtype.element_ty), mask=mask)


@triton.jit
def slope_kernel(
    score_ptr,
    map_gradient_ptr,
    mean_ptr,
    temperature_ptr,
    slope_ptr,
    seed_ptr,
    first_row,
    threshold,
    heads,
    rows,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write the slope of each row: the mean of its logits, the scores after instance norm, times their gradient."""
    row, mask_row, entry, mask = _rows(heads, rows, CHANNELS, KEY_CHANNELS, BLOCK_ROWS, BLOCK_S)
    scores = tl.load(score_ptr + entry, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_S]
    gradient = tl.load(map_gradient_ptr + entry, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + row, mask=mask_row, other=0.0)
    temperature = tl.load(temperature_ptr + row, mask=mask_row, other=0.0)
    if seed_ptr is not None:
        gradient = tl.where(_keep_rows(seed_ptr, first_row + row, threshold, BLOCK_S), gradient, 0.0)
    softmax = _softmax(scores, temperature, KEY_CHANNELS, BLOCK_S)
    delta = tl.sum(softmax * gradient, axis=1)
    logits = scores * temperature[:, None] - (mean * temperature)[:, None]
    slope = tl.sum(softmax * (gradient - delta[:, None]) * logits, axis=1) / KEY_CHANNELS
    tl.store(slope_ptr + row, slope, mask=mask_row)


@triton.jit
def score_gradient_kernel(
    score_ptr,
    map_gradient_ptr,
    mean_ptr,
    temperature_ptr,
    mean_slope_ptr,
    seed_ptr,
    first_row,
    threshold,
    heads,
    rows,
    CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Turn scores into attention, as `softmax_kernel` does, and its gradient into that of the scores, both in place."""
    row, mask_row, entry, mask = _rows(heads, rows, CHANNELS, KEY_CHANNELS, BLOCK_ROWS, BLOCK_S)
    scores = tl.load(score_ptr + entry, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_S]
    gradient = tl.load(map_gradient_ptr + entry, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + row, mask=mask_row, other=0.0)
    temperature = tl.load(temperature_ptr + row, mask=mask_row, other=0.0)
    mean_slope = tl.load(mean_slope_ptr + row, mask=mask_row, other=0.0)
    softmax = _softmax(scores, temperature, KEY_CHANNELS, BLOCK_S)
    attention = softmax
    if seed_ptr is not None:
        keep = _keep_rows(seed_ptr, first_row + row, threshold, BLOCK_S)
        attention = tl.where(keep, softmax, 0.0)
        gradient = tl.where(keep, gradient, 0.0)
    tl.store(score_ptr + entry, attention.to(score_ptr.dtype.element_ty), mask=mask)
    delta = tl.sum(softmax * gradient, axis=1)
    logits = scores * temperature[:, None] - (mean * temperature)[:, None]
    # softmax * (gradient - delta) is the gradient of the logits.
    along_softmax = gradient * temperature[:, None] - (delta * temperature)[:, None]
    score_gradient = softmax * along_softmax - logits * (mean_slope * temperature)[:, None]
    tl.store(map_gradient_ptr + entry, score_gradient.to(map_gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows(
    heads, rows, CHANNELS: tl.constexpr, KEY_CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Return the places of this program's rows in (B, H, C), and of their entries in (B, C, H, S), each with a mask."""
    row_of_map = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # in (B, C, H)
    mask_row = row_of_map < rows
    image_and_channel, head = row_of_map // heads, row_of_map % heads
    row = (image_and_channel // CHANNELS * heads + head) * CHANNELS + image_and_channel % CHANNELS
    offs_s = tl.arange(0, BLOCK_S)
    entry = row_of_map[:, None] * KEY_CHANNELS + offs_s[None, :]
    return row, mask_row, entry, mask_row[:, None] & (offs_s < KEY_CHANNELS)[None, :]


@triton.jit
def _softmax(scores, temperature, KEY_CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the softmax of rows of scores, each times its temperature."""
    mask_s = (tl.arange(0, BLOCK_S) < KEY_CHANNELS)[None, :]
    maximum = tl.max(tl.where(mask_s, scores, float("-inf")), axis=1)
    factor = temperature * LOG2_E  # exponentials are powers of two
    exponentials = tl.exp2(scores * factor[:, None] - (maximum * factor)[:, None])
    exponentials = tl.where(mask_s, exponentials, 0.0)
    return exponentials * (1.0 / tl.sum(exponentials, axis=1))[:, None]


@triton.jit
def _keep_rows(seed_ptr, row, threshold, BLOCK_S: tl.constexpr):
    first_key, second_key = row_keys(seed_ptr, row)
    return keep_mask(first_key[:, None], second_key[:, None], tl.arange(0, BLOCK_S)[None, :], threshold)


@triton.jit
def _segment_means(values, offs_c, SEGMENTS: tl.constexpr):
    """Replace each of [channels] values by the mean over its segment."""
    means = tl.zeros_like(values)
    start = 0
    for segment in tl.static_range(len(SEGMENTS)):
        is_own = (offs_c >= start) & (offs_c < start + SEGMENTS[segment])
        mean = tl.sum(tl.where(is_own, values, 0.0), axis=0) / SEGMENTS[segment]
        means = tl.where(is_own, mean, means)
        start += SEGMENTS[segment]
    return means
