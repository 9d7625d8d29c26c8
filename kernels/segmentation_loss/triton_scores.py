"""Triton kernels from the sums to the loss, its gradient by the sums, and the Dice scores: one program for all images.

Between the pass over pixels and that over their gradients there are a few numbers an image, which cost nothing but the
launches: here it is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scores

NUM_WARPS = 4
TILE = 512  # entries of a tile of images and classes
SMOOTHING = (scores.OVERLAP_SMOOTHING, scores.AREA_SMOOTHING)


@triton.jit
def _dice(hits, predicted, actual):
    area = predicted + actual
    return tl.where(area > 0, 2.0 * hits / area, 1.0)


@triton.jit(do_not_specialize=["images"])
def binary_scores_kernel(
    sums_ptr,
    counts_ptr,
    totals_ptr,
    loss_ptr,
    dice_ptr,
    slopes_ptr,
    images,
    image_total,
    pixel_total,
    dice_weight,
    positive_weight,
    negative_weight,
    overlap_smoothing,
    area_smoothing,
    empty,
    BLOCK_IMAGES: tl.constexpr,
):
    """Loss, Dice and gradients of one class: sums and slopes (4, B), counts (3, B)."""
    dice_loss = tl.zeros([BLOCK_IMAGES], tl.float32)
    positive = tl.zeros([BLOCK_IMAGES], tl.float32)
    negative = tl.zeros([BLOCK_IMAGES], tl.float32)
    positives = tl.zeros([BLOCK_IMAGES], tl.float32)
    for start in range(0, images, BLOCK_IMAGES):
        offs = start + tl.arange(0, BLOCK_IMAGES)
        mask = offs < images
        overlap = tl.load(sums_ptr + offs, mask=mask, other=0.0) + overlap_smoothing
        area = tl.load(sums_ptr + images + offs, mask=mask, other=0.0) + area_smoothing
        dice_loss += tl.where(mask, 1.0 - 2.0 * (overlap / area), 0.0)
        positive += tl.load(sums_ptr + 2 * images + offs, mask=mask, other=0.0)
        negative += tl.load(sums_ptr + 3 * images + offs, mask=mask, other=0.0)
        hits = tl.load(counts_ptr + offs, mask=mask, other=0.0)
        predicted = tl.load(counts_ptr + images + offs, mask=mask, other=0.0)
        actual = tl.load(counts_ptr + 2 * images + offs, mask=mask, other=0.0)
        positives += actual
        tl.store(dice_ptr + offs, _dice(hits, predicted, actual), mask=mask)
    positive_total = tl.sum(positives)
    negative_total = pixel_total - positive_total
    if totals_ptr is not None:
        image_total = tl.load(totals_ptr)
        positive_total = tl.load(totals_ptr + 1)
        negative_total = tl.load(totals_ptr + 2)
    dice_weight = dice_weight / image_total
    positive_weight = positive_weight / (positive_total + empty)
    negative_weight = negative_weight / (negative_total + empty)
    cross_entropy = positive_weight * tl.sum(positive) + negative_weight * tl.sum(negative)
    tl.store(loss_ptr, dice_weight * tl.sum(dice_loss) + cross_entropy)
    for start in range(0, images, BLOCK_IMAGES):
        offs = start + tl.arange(0, BLOCK_IMAGES)
        mask = offs < images
        overlap = tl.load(sums_ptr + offs, mask=mask, other=0.0) + overlap_smoothing
        area = tl.load(sums_ptr + images + offs, mask=mask, other=0.0) + area_smoothing
        slope = 2.0 * dice_weight / area
        tl.store(slopes_ptr + offs, -slope, mask=mask)
        tl.store(slopes_ptr + images + offs, slope * (overlap / area), mask=mask)
        tl.store(slopes_ptr + 2 * images + offs, tl.zeros([BLOCK_IMAGES], tl.float32) + positive_weight, mask=mask)
        tl.store(slopes_ptr + 3 * images + offs, tl.zeros([BLOCK_IMAGES], tl.float32) + negative_weight, mask=mask)


@triton.jit(do_not_specialize=["images"])
def class_scores_kernel(
    sums_ptr,
    counts_ptr,
    totals_ptr,
    loss_ptr,
    dice_ptr,
    slopes_ptr,
    images,
    classes,
    image_total,
    pixels,
    dice_weight,
    cross_entropy_weight,
    overlap_smoothing,
    area_smoothing,
    BLOCK_IMAGES: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Loss, Dice and gradients of several classes: sums, slopes and counts (3, B, K)."""
    row = images * classes
    offs_class = tl.arange(0, CLASSES)[None, :]
    mask_class = offs_class < classes
    dice_loss = tl.zeros([BLOCK_IMAGES, CLASSES], tl.float32)
    cross_entropy = tl.zeros([BLOCK_IMAGES, CLASSES], tl.float32)
    for start in range(0, images, BLOCK_IMAGES):
        offs_image = start + tl.arange(0, BLOCK_IMAGES)[:, None]
        mask = (offs_image < images) & mask_class
        offs = offs_image * classes + offs_class
        overlap = tl.load(sums_ptr + offs, mask=mask, other=0.0) + overlap_smoothing
        area = tl.load(sums_ptr + row + offs, mask=mask, other=0.0) + area_smoothing
        dice_loss += tl.where(mask, 1.0 - 2.0 * (overlap / area), 0.0)
        cross_entropy += tl.load(sums_ptr + 2 * row + offs, mask=mask, other=0.0)
        hits = tl.load(counts_ptr + offs, mask=mask, other=0.0)
        predicted = tl.load(counts_ptr + row + offs, mask=mask, other=0.0)
        actual = tl.load(counts_ptr + 2 * row + offs, mask=mask, other=0.0)
        is_foreground = mask_class & (offs_class > 0)
        dice = tl.sum(tl.where(is_foreground, _dice(hits, predicted, actual), 0.0), axis=1) / (classes - 1)
        offs_dice = start + tl.arange(0, BLOCK_IMAGES)
        tl.store(dice_ptr + offs_dice, dice, mask=offs_dice < images)
    if totals_ptr is not None:
        image_total = tl.load(totals_ptr)
    dice_weight = dice_weight / (image_total * classes)
    cross_entropy_weight = cross_entropy_weight / (image_total * pixels)
    loss = dice_weight * tl.sum(tl.sum(dice_loss, axis=1), axis=0)
    tl.store(loss_ptr, loss + cross_entropy_weight * tl.sum(tl.sum(cross_entropy, axis=1), axis=0))
    for start in range(0, images, BLOCK_IMAGES):
        offs_image = start + tl.arange(0, BLOCK_IMAGES)[:, None]
        mask = (offs_image < images) & mask_class
        offs = offs_image * classes + offs_class
        overlap = tl.load(sums_ptr + offs, mask=mask, other=0.0) + overlap_smoothing
        area = tl.load(sums_ptr + row + offs, mask=mask, other=0.0) + area_smoothing
        slope = 2.0 * dice_weight / area
        tl.store(slopes_ptr + offs, -slope, mask=mask)
        tl.store(slopes_ptr + row + offs, slope * (overlap / area), mask=mask)
        weight = tl.zeros([BLOCK_IMAGES, CLASSES], tl.float32) + cross_entropy_weight
        tl.store(slopes_ptr + 2 * row + offs, weight, mask=mask)


def segmentation_scores(
    sums: Tensor,
    counts: Tensor,
    totals: Tensor | None,
    pixels: int,
    dice_weight: float,
    cross_entropy_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the Dice scores (B,), and the gradient of the loss by the sums in their shape."""
    _, images, classes = sums.shape
    if images == 0:
        loss, dice = scores.segmentation_scores(sums, counts, totals, pixels, dice_weight, cross_entropy_weight)
        return loss, dice, torch.empty(sums.shape, device=sums.device)
    loss = torch.empty((), device=sums.device)
    dice = torch.empty(images, device=sums.device)
    slopes = torch.empty(sums.shape, device=sums.device)
    tensors = (sums.contiguous(), counts.contiguous(), None if totals is None else totals.contiguous())
    block_classes = triton.next_power_of_2(classes)
    block_images = min(triton.next_power_of_2(images), max(TILE // block_classes, 1))
    with torch.cuda.device_of(sums):
        if classes == 1:
            binary_scores_kernel[(1,)](
                *tensors,
                loss,
                dice,
                slopes,
                images,
                float(images),
                float(images * pixels),
                dice_weight,
                cross_entropy_weight * scores.POSITIVE_WEIGHT,
                cross_entropy_weight * scores.NEGATIVE_WEIGHT,
                *SMOOTHING,
                scores.EMPTY,
                block_images,
                num_warps=NUM_WARPS,
            )
        else:
            class_scores_kernel[(1,)](
                *tensors,
                loss,
                dice,
                slopes,
                images,
                classes,
                float(images),
                float(pixels),
                dice_weight,
                cross_entropy_weight,
                *SMOOTHING,
                block_images,
                block_classes,
                num_warps=NUM_WARPS,
            )
    return loss, dice, slopes
