"""Triton kernels from the sums to the loss, its gradient by the sums, and the Dice scores: one program for all images.

Between the passes over pixels there are a few numbers an image, which cost as much as the launches: here it is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

NUM_WARPS = 4
TILE = 512  # entries of a tile of images and classes

OVERLAP_SMOOTHING = tl.constexpr(reference.OVERLAP_SMOOTHING)
AREA_SMOOTHING = tl.constexpr(reference.AREA_SMOOTHING)
EMPTY = tl.constexpr(reference.EMPTY)


@triton.jit
def _dice(hits, predicted, actual):
    """Return the Dice score; a class that neither mask nor prediction holds scores 1."""
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
    pixel_total,
    dice_weight,
    positive_weight,
    negative_weight,
    BLOCK_IMAGES: tl.constexpr,
):
    """Write loss, Dice and gradients of one class: sums and slopes (4, B), counts (3, B)."""
    dice_loss = tl.zeros([BLOCK_IMAGES], tl.float32)
    positive = tl.zeros([BLOCK_IMAGES], tl.float32)
    negative = tl.zeros([BLOCK_IMAGES], tl.float32)
    positives = tl.zeros([BLOCK_IMAGES], tl.float32)
    for start in range(0, images, BLOCK_IMAGES):
        offs = start + tl.arange(0, BLOCK_IMAGES)
        mask = offs < images
        overlap = tl.load(sums_ptr + offs, mask=mask, other=0.0) + OVERLAP_SMOOTHING
        area = tl.load(sums_ptr + images + offs, mask=mask, other=0.0) + AREA_SMOOTHING
        dice_loss += tl.where(mask, 1.0 - 2.0 * (overlap / area), 0.0)
        positive += tl.load(sums_ptr + 2 * images + offs, mask=mask, other=0.0)
        negative += tl.load(sums_ptr + 3 * images + offs, mask=mask, other=0.0)
        hits = tl.load(counts_ptr + offs, mask=mask, other=0.0)
        predicted = tl.load(counts_ptr + images + offs, mask=mask, other=0.0)
        actual = tl.load(counts_ptr + 2 * images + offs, mask=mask, other=0.0)
        positives += actual
        tl.store(dice_ptr + offs, _dice(hits, predicted, actual), mask=mask)
    image_total = images.to(tl.float32)
    positive_total = tl.sum(positives)
    negative_total = pixel_total - positive_total
    if totals_ptr is not None:
        image_total = tl.load(totals_ptr)
        positive_total = tl.load(totals_ptr + 1)
        negative_total = tl.load(totals_ptr + 2)
    dice_weight = dice_weight / image_total
    positive_weight = positive_weight / (positive_total + EMPTY)
    negative_weight = negative_weight / (negative_total + EMPTY)
    cross_entropy = positive_weight * tl.sum(positive) + negative_weight * tl.sum(negative)
    tl.store(loss_ptr, dice_weight * tl.sum(dice_loss) + cross_entropy)
    for start in range(0, images, BLOCK_IMAGES):
        offs = start + tl.arange(0, BLOCK_IMAGES)
        mask = offs < images
        overlap = tl.load(sums_ptr + offs, mask=mask, other=0.0) + OVERLAP_SMOOTHING
        area = tl.load(sums_ptr + images + offs, mask=mask, other=0.0) + AREA_SMOOTHING
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
    pixel_total,
    dice_weight,
    cross_entropy_weight,
    BLOCK_IMAGES: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Write loss, Dice and gradients of several classes: sums, slopes and counts (3, B, K)."""
    row = images * classes
    offs_class = tl.arange(0, CLASSES)[None, :]
    mask_class = offs_class < classes
    dice_loss = tl.zeros([BLOCK_IMAGES, CLASSES], tl.float32)
    cross_entropy = tl.zeros([BLOCK_IMAGES, CLASSES], tl.float32)
    for start in range(0, images, BLOCK_IMAGES):
        offs_image = start + tl.arange(0, BLOCK_IMAGES)[:, None]
        mask = (offs_image < images) & mask_class
        offs = offs_image * classes + offs_class
        overlap = tl.load(sums_ptr + offs, mask=mask, other=0.0) + OVERLAP_SMOOTHING
        area = tl.load(sums_ptr + row + offs, mask=mask, other=0.0) + AREA_SMOOTHING
        dice_loss += tl.where(mask, 1.0 - 2.0 * (overlap / area), 0.0)
        cross_entropy += tl.load(sums_ptr + 2 * row + offs, mask=mask, other=0.0)
        hits = tl.load(counts_ptr + offs, mask=mask, other=0.0)
        predicted = tl.load(counts_ptr + row + offs, mask=mask, other=0.0)
        actual = tl.load(counts_ptr + 2 * row + offs, mask=mask, other=0.0)
        is_foreground = mask_class & (offs_class > 0)
        dice = tl.sum(tl.where(is_foreground, _dice(hits, predicted, actual), 0.0), axis=1) / (classes - 1)
        offs_dice = start + tl.arange(0, BLOCK_IMAGES)
        tl.store(dice_ptr + offs_dice, dice, mask=offs_dice < images)
    image_total = images.to(tl.float32)
    if totals_ptr is not None:
        image_total = tl.load(totals_ptr)
        pixel_total = tl.load(totals_ptr + 1) + tl.load(totals_ptr + 2)
    dice_weight = dice_weight / (image_total * classes)
    cross_entropy_weight = cross_entropy_weight / (pixel_total + EMPTY)
    loss = dice_weight * tl.sum(tl.sum(dice_loss, axis=1), axis=0)
    tl.store(loss_ptr, loss + cross_entropy_weight * tl.sum(tl.sum(cross_entropy, axis=1), axis=0))
    for start in range(0, images, BLOCK_IMAGES):
        offs_image = start + tl.arange(0, BLOCK_IMAGES)[:, None]
        mask = (offs_image < images) & mask_class
        offs = offs_image * classes + offs_class
        overlap = tl.load(sums_ptr + offs, mask=mask, other=0.0) + OVERLAP_SMOOTHING
        area = tl.load(sums_ptr + row + offs, mask=mask, other=0.0) + AREA_SMOOTHING
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
    """Return the loss, the Dice scores (B,), and the gradient of the loss by the sums in their shape."""
    _, images, classes = sums.shape
    slopes = torch.empty(sums.shape, device=sums.device)
    if images == 0:
        return (*reference.segmentation_scores(sums, counts, totals, pixels, dice_weight, cross_entropy_weight), slopes)
    loss, dice = (torch.empty(size, device=sums.device) for size in ((), images))
    block_classes = triton.next_power_of_2(classes)
    arguments = {
        "sums_ptr": sums.contiguous(),
        "counts_ptr": counts.contiguous(),
        "totals_ptr": None if totals is None else totals.contiguous(),
        "loss_ptr": loss,
        "dice_ptr": dice,
        "slopes_ptr": slopes,
        "images": images,
        "pixel_total": float(images * pixels),
        "dice_weight": dice_weight,
        "BLOCK_IMAGES": min(triton.next_power_of_2(images), max(TILE // block_classes, 1)),
        "num_warps": NUM_WARPS,
    }
    if classes == 1:
        binary_scores_kernel[(1,)](
            **arguments,
            positive_weight=cross_entropy_weight * reference.POSITIVE_WEIGHT,
            negative_weight=cross_entropy_weight * reference.NEGATIVE_WEIGHT,
        )
    else:
        class_scores_kernel[(1,)](
            **arguments,
            classes=classes,
            cross_entropy_weight=cross_entropy_weight,
            CLASSES=block_classes,
        )
    return loss, dice, slopes


def backward(gradient: Tensor, slopes: Tensor, sums: Tensor) -> Tensor:
    """Return the gradient by the sums, from that of the loss."""
    return gradient * slopes
