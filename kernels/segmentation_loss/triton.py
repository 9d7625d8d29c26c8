"""Triton kernels and launchers of the sums: forward reads logits and masks once, backward reads them once more.

A program sums some tiles of one image and writes its part of each sum; the parts are added in a fixed order. Logits and
masks are read through their strides and in their dtypes, and all arithmetic is float32. A tile is [PIXELS] for one
class and [PIXELS, CLASSES] for several: it holds all classes of a pixel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import empty_map
from ..launch import add_parts
from .reference import BINARY_SUMS, CLASS_SUMS, COUNTS

NUM_WARPS = 4
TILE = 1024  # pixels of one class: eight a thread, in half precision the longest load
CLASS_TILE = 512  # entries of several classes: there are six sums of each, and twice as many spill

# Programs enough to fill a GPU at a batch of 4 images of 224 pixels. A constant, so that results do not depend on it.
MOST_PARTS = 128


class Pixels(NamedTuple):
    """A map (B, K, H, W); pixels follow each other at one distance, row after row."""

    ptr: Tensor
    stride_image: int
    stride_class: int
    stride_pixel: int


@triton.jit
def _log1p(value):
    """Return log(1 + value) for 0 <= value <= 1, exact near 0: twice the area tangent of value / (2 + value)."""
    ratio = value / (2.0 + value)
    square = ratio * ratio
    # The terms left out are below 2^-26 of the sum, because the ratio is at most 1/3.
    series = 1.0 / 11.0 + square * (1.0 / 13.0)
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    return 2.0 * (ratio + ratio * (square * series))


@triton.jit
def _sigmoid(logits):
    """Return sigmoid(z) and sigmoid(-z), both to rounding, and exp(-|z|)."""
    small = tl.exp(-tl.abs(logits))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    is_positive = logits >= 0
    return tl.where(is_positive, larger, smaller), tl.where(is_positive, smaller, larger), small


@triton.jit
def _load_pixels(map, image, first_pixel, pixels, BLOCK_PIXELS: tl.constexpr):
    """Load pixels of a map of one class [BLOCK_PIXELS], zero beyond the image."""
    offs = tl.arange(0, BLOCK_PIXELS)
    ptr = map.ptr + image.to(tl.int64) * map.stride_image + first_pixel.to(tl.int64) * map.stride_pixel
    return tl.load(ptr + offs * map.stride_pixel, mask=first_pixel + offs < pixels, other=0)


@triton.jit
def _class_ptrs(map, image, first_pixel, BLOCK_PIXELS: tl.constexpr, CLASSES: tl.constexpr):
    """Return pointers to all classes of some pixels [BLOCK_PIXELS, CLASSES]."""
    ptr = map.ptr + image.to(tl.int64) * map.stride_image + first_pixel.to(tl.int64) * map.stride_pixel
    offs_class = tl.arange(0, CLASSES).to(tl.int64) * map.stride_class
    return ptr + tl.arange(0, BLOCK_PIXELS)[:, None] * map.stride_pixel + offs_class[None, :]


@triton.jit(do_not_specialize=["row", "parts"])
def binary_sums_kernel(
    logits,
    masks,
    sums_ptr,
    counts_ptr,
    row,
    pixels,
    parts,
    tiles_a_part,
    BLOCK_PIXELS: tl.constexpr,
    IGNORE_LABEL: tl.constexpr,
):
    """Write parts of the four sums (parts, 4, B) and of the three counts (parts, 3, B) of one class."""
    image = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    overlap = tl.zeros([BLOCK_PIXELS], tl.float32)
    area = tl.zeros([BLOCK_PIXELS], tl.float32)
    positive = tl.zeros([BLOCK_PIXELS], tl.float32)
    negative = tl.zeros([BLOCK_PIXELS], tl.float32)
    hits = tl.zeros([BLOCK_PIXELS], tl.float32)
    predicted = tl.zeros([BLOCK_PIXELS], tl.float32)
    actual = tl.zeros([BLOCK_PIXELS], tl.float32)
    for tile in range(tiles_a_part):
        first_pixel = (part * tiles_a_part + tile) * BLOCK_PIXELS
        label = _load_pixels(masks, image, first_pixel, pixels, BLOCK_PIXELS)
        value = _load_pixels(logits, image, first_pixel, pixels, BLOCK_PIXELS).to(tl.float32)
        target = label.to(tl.float32)
        is_scored = first_pixel + tl.arange(0, BLOCK_PIXELS) < pixels
        if IGNORE_LABEL is not None:
            is_scored = is_scored & (label != IGNORE_LABEL)
            target = tl.where(is_scored, target, 0.0)
        # A pixel that is certainly no target adds zero to every sum.
        value = tl.where(is_scored, value, -1e30)
        probability, _, small = _sigmoid(value)
        tail = _log1p(small)  # softplus(z) = max(z, 0) + tail
        overlap += probability * target
        area += probability * probability + target * target
        positive += target * (tl.maximum(-value, 0.0) + tail)
        negative += (1.0 - target) * (tl.maximum(value, 0.0) + tail)
        is_predicted = value > 0
        is_actual = target > 0
        hits += (is_predicted & is_actual).to(tl.float32)
        predicted += is_predicted.to(tl.float32)
        actual += is_actual.to(tl.float32)
    sums_ptr += part.to(tl.int64) * 4 * row + image
    tl.store(sums_ptr, tl.sum(overlap))
    tl.store(sums_ptr + row, tl.sum(area))
    tl.store(sums_ptr + 2 * row, tl.sum(positive))
    tl.store(sums_ptr + 3 * row, tl.sum(negative))
    counts_ptr += part.to(tl.int64) * 3 * row + image
    tl.store(counts_ptr, tl.sum(hits))
    tl.store(counts_ptr + row, tl.sum(predicted))
    tl.store(counts_ptr + 2 * row, tl.sum(actual))


@triton.jit(do_not_specialize=["row", "tiles"])
def binary_gradient_kernel(
    gradient_ptr,
    logits,
    masks,
    d_logits,
    row,
    pixels,
    tiles,
    BLOCK_PIXELS: tl.constexpr,
    IGNORE_LABEL: tl.constexpr,
):
    """Write the gradient by the logits of one class, a tile a program, from that of the sums (4, B)."""
    image = tl.program_id(0) // tiles
    first_pixel = tl.program_id(0) % tiles * BLOCK_PIXELS
    gradient_ptr += image
    d_overlap = tl.load(gradient_ptr)
    d_area = tl.load(gradient_ptr + row)
    d_positive = tl.load(gradient_ptr + 2 * row)
    d_negative = tl.load(gradient_ptr + 3 * row)
    label = _load_pixels(masks, image, first_pixel, pixels, BLOCK_PIXELS)
    target = label.to(tl.float32)
    value = _load_pixels(logits, image, first_pixel, pixels, BLOCK_PIXELS).to(tl.float32)
    probability, complement, _ = _sigmoid(value)
    d_probability = d_overlap * target + 2.0 * d_area * probability
    d_value = (probability * d_probability - d_positive * target) * complement
    d_value += d_negative * (1.0 - target) * probability
    if IGNORE_LABEL is not None:
        d_value = tl.where(label == IGNORE_LABEL, 0.0, d_value)
    offs = tl.arange(0, BLOCK_PIXELS)
    ptr = d_logits.ptr + image.to(tl.int64) * d_logits.stride_image + first_pixel.to(tl.int64) * d_logits.stride_pixel
    mask = first_pixel + offs < pixels
    tl.store(ptr + offs * d_logits.stride_pixel, d_value.to(d_logits.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softmax(logits, CLASSES: tl.constexpr):
    """Return probabilities, their logarithms, and the first class of the largest logit [PIXELS, 1]; NaN is largest."""
    offs_class = tl.arange(0, CLASSES)[None, :]
    largest = tl.max(logits, axis=1)[:, None]
    is_nan = logits != logits
    has_nan = tl.max(is_nan.to(tl.int32), axis=1)[:, None] > 0
    is_largest = tl.where(has_nan, is_nan, logits == largest)
    chosen = tl.min(tl.where(is_largest, offs_class, CLASSES), axis=1)[:, None]
    below = logits - largest
    exponential = tl.exp(below)
    # The chosen class adds 1 to the sum; added last, it leaves the logarithm exact where the others add little.
    others = tl.sum(tl.where(offs_class == chosen, exponential - 1.0, exponential), axis=1)[:, None]
    logarithm = tl.where(others > 1.0, tl.log(1.0 + others), _log1p(others))
    return exponential / (1.0 + others), below - logarithm, chosen


@triton.jit(do_not_specialize=["row", "parts"])
def class_sums_kernel(
    logits,
    masks,
    sums_ptr,
    counts_ptr,
    row,
    classes,
    pixels,
    parts,
    tiles_a_part,
    BLOCK_PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
    IGNORE_LABEL: tl.constexpr,
):
    """Write parts of the three sums and of the three counts of several classes, (parts, 3, B, K) each."""
    image = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    offs_class = tl.arange(0, CLASSES)
    mask_class = offs_class < classes
    overlap = tl.zeros([BLOCK_PIXELS, CLASSES], tl.float32)
    area = tl.zeros([BLOCK_PIXELS, CLASSES], tl.float32)
    cross_entropy = tl.zeros([BLOCK_PIXELS, CLASSES], tl.float32)
    hits = tl.zeros([BLOCK_PIXELS, CLASSES], tl.float32)
    predicted = tl.zeros([BLOCK_PIXELS, CLASSES], tl.float32)
    actual = tl.zeros([BLOCK_PIXELS, CLASSES], tl.float32)
    for tile in range(tiles_a_part):
        first_pixel = (part * tiles_a_part + tile) * BLOCK_PIXELS
        mask_pixel = first_pixel + tl.arange(0, BLOCK_PIXELS) < pixels
        mask = mask_pixel[:, None] & mask_class[None, :]
        label = _load_pixels(masks, image, first_pixel, pixels, BLOCK_PIXELS)[:, None]
        if IGNORE_LABEL is not None:
            mask = mask & (label != IGNORE_LABEL)
        ptrs = _class_ptrs(logits, image, first_pixel, BLOCK_PIXELS, CLASSES)
        value = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask_class[None, :], value, float("-inf"))
        probability, log_probability, chosen = _softmax(value, CLASSES)  # [BLOCK_PIXELS, CLASSES]
        is_actual = mask & (label == offs_class[None, :])
        is_predicted = mask & (chosen == offs_class[None, :])
        target = is_actual.to(tl.float32)
        overlap += tl.where(mask, probability * target, 0.0)
        area += tl.where(mask, probability * probability + target, 0.0)
        cross_entropy -= tl.where(mask, target * log_probability, 0.0)
        hits += (is_predicted & is_actual).to(tl.float32)
        predicted += is_predicted.to(tl.float32)
        actual += target
    offs = part.to(tl.int64) * 3 * row + image * classes + offs_class
    tl.store(sums_ptr + offs, tl.sum(overlap, axis=0), mask=mask_class)
    tl.store(sums_ptr + row + offs, tl.sum(area, axis=0), mask=mask_class)
    tl.store(sums_ptr + 2 * row + offs, tl.sum(cross_entropy, axis=0), mask=mask_class)
    tl.store(counts_ptr + offs, tl.sum(hits, axis=0), mask=mask_class)
    tl.store(counts_ptr + row + offs, tl.sum(predicted, axis=0), mask=mask_class)
    tl.store(counts_ptr + 2 * row + offs, tl.sum(actual, axis=0), mask=mask_class)


@triton.jit(do_not_specialize=["row", "tiles"])
def class_gradient_kernel(
    gradient_ptr,
    logits,
    masks,
    d_logits,
    row,
    classes,
    pixels,
    tiles,
    BLOCK_PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
    IGNORE_LABEL: tl.constexpr,
):
    """Write the gradient by the logits of several classes, a tile a program, from that of the sums (3, B, K)."""
    image = tl.program_id(0) // tiles
    first_pixel = tl.program_id(0) % tiles * BLOCK_PIXELS
    offs_class = tl.arange(0, CLASSES)
    mask_class = offs_class < classes
    gradient_ptr += image * classes
    d_overlap = tl.load(gradient_ptr + offs_class, mask=mask_class, other=0.0)[None, :]
    d_area = tl.load(gradient_ptr + row + offs_class, mask=mask_class, other=0.0)[None, :]
    d_cross_entropy = tl.load(gradient_ptr + 2 * row + offs_class, mask=mask_class, other=0.0)[None, :]
    mask_pixel = first_pixel + tl.arange(0, BLOCK_PIXELS) < pixels
    mask = mask_pixel[:, None] & mask_class[None, :]
    label = _load_pixels(masks, image, first_pixel, pixels, BLOCK_PIXELS)[:, None]
    value = tl.load(_class_ptrs(logits, image, first_pixel, BLOCK_PIXELS, CLASSES), mask=mask, other=0.0)
    value = tl.where(mask_class[None, :], value.to(tl.float32), float("-inf"))
    probability, _, _ = _softmax(value, CLASSES)  # [BLOCK_PIXELS, CLASSES]
    target = (label == offs_class[None, :]).to(tl.float32)
    # First by the logarithms of the probabilities, then through the softmax.
    d_logarithm = probability * (d_overlap * target + 2.0 * d_area * probability) - d_cross_entropy * target
    d_value = d_logarithm - probability * tl.sum(d_logarithm, axis=1)[:, None]
    if IGNORE_LABEL is not None:
        d_value = tl.where(label == IGNORE_LABEL, 0.0, d_value)
    ptrs = _class_ptrs(d_logits, image, first_pixel, BLOCK_PIXELS, CLASSES)
    tl.store(ptrs, d_value.to(d_logits.ptr.dtype.element_ty), mask=mask)


def forward(logits: Tensor, masks: Tensor, ignore_label: int | None = None) -> tuple[Tensor, Tensor]:
    """(B, K, H, W), (B, H, W) -> sums (4 or 3, B, K), counts (3, B, K); see the public function."""
    batch, classes, height, width = logits.shape
    pixels = height * width
    rows = BINARY_SUMS if classes == 1 else CLASS_SUMS
    if batch == 0 or pixels == 0:
        return tuple(torch.zeros(count, batch, classes, device=logits.device) for count in (rows, COUNTS))
    sizes = _sizes(classes)
    tiles = triton.cdiv(pixels, sizes["BLOCK_PIXELS"])
    tiles_a_part = triton.cdiv(tiles, MOST_PARTS)
    parts = triton.cdiv(tiles, tiles_a_part)
    sums, counts = (torch.empty(parts, count * batch * classes, device=logits.device) for count in (rows, COUNTS))
    arguments = {
        "logits": _pixels(logits),
        "masks": _pixels(_integers(masks).unsqueeze(1)),
        "sums_ptr": sums,
        "counts_ptr": counts,
        "row": batch * classes,
        "pixels": pixels,
        "parts": parts,
        "tiles_a_part": tiles_a_part,
        "IGNORE_LABEL": ignore_label,
    }
    if classes == 1:
        binary_sums_kernel[(batch * parts,)](**arguments, **sizes, num_warps=NUM_WARPS)
    else:
        class_sums_kernel[(batch * parts,)](**arguments, classes=classes, **sizes, num_warps=NUM_WARPS)
    return tuple(add_parts(part, torch.float32).view(-1, batch, classes) for part in (sums, counts))


def backward(gradient: Tensor, logits: Tensor, masks: Tensor, ignore_label: int | None = None) -> Tensor:
    """Return the gradient by the logits, in their dtype and memory format, from that of the sums."""
    batch, classes, height, width = logits.shape
    d_logits = empty_map(logits, classes, height, width, logits.dtype)
    if d_logits.numel() == 0:
        return d_logits
    sizes = _sizes(classes)
    tiles = triton.cdiv(height * width, sizes["BLOCK_PIXELS"])
    arguments = {
        "gradient_ptr": gradient.contiguous(),
        "logits": _pixels(logits),
        "masks": _pixels(_integers(masks).unsqueeze(1)),
        "d_logits": _pixels(d_logits),
        "row": batch * classes,
        "pixels": height * width,
        "tiles": tiles,
        "IGNORE_LABEL": ignore_label,
    }
    if classes == 1:
        binary_gradient_kernel[(batch * tiles,)](**arguments, **sizes, num_warps=NUM_WARPS)
    else:
        class_gradient_kernel[(batch * tiles,)](**arguments, classes=classes, **sizes, num_warps=NUM_WARPS)
    return d_logits


def _sizes(classes: int) -> dict[str, int]:
    """Return the sizes of a tile: all classes of as many pixels as it holds."""
    if classes == 1:
        return {"BLOCK_PIXELS": TILE}
    block = triton.next_power_of_2(classes)
    return {"BLOCK_PIXELS": CLASS_TILE // block, "CLASSES": block}


def _integers(masks: Tensor) -> Tensor:
    """View booleans as bytes, which they are in memory."""
    return masks.view(torch.uint8) if masks.dtype == torch.bool else masks


def _pixels(map: Tensor) -> Pixels:
    """Describe ``map`` to kernels, or a copy of it if its pixels are unevenly spaced."""
    height, width = map.shape[2:]
    image, channel, row, column = map.stride()
    pixel = column if width > 1 else row
    if height > 1 and width > 1 and row != width * column:
        return _pixels(map.contiguous())
    return Pixels(map, image, channel if map.shape[1] > 1 else 0, pixel)
