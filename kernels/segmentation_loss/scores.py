"""What the sums are for: the loss of the published protocol and the Dice scores, in plain PyTorch.

The sums are a few numbers an image, so that these steps are the reference and the composed form in one.
"""

import torch
from torch import Tensor

DICE_SMOOTHING = 1e-5
DICE_SCALE = 0.25  # probabilities and masks are halved before they are multiplied
POSITIVE_WEIGHT = 0.5
NEGATIVE_WEIGHT = 0.5
EMPTY = 1e-12  # keeps 0 / 0 out of masks without positives or without negatives

# (2 DICE_SCALE overlap + smoothing) / (DICE_SCALE area + smoothing), divided through by the scale:
# 2 (overlap + OVERLAP_SMOOTHING) / (area + AREA_SMOOTHING)
AREA_SMOOTHING = DICE_SMOOTHING / DICE_SCALE
OVERLAP_SMOOTHING = AREA_SMOOTHING / 2


def totals_of(counts: Tensor, pixels: int) -> Tensor:
    """Images, positive and negative pixels of a batch, float32 (3,), from its counts (3, B, K)."""
    actual = counts[2]
    images, classes = actual.shape
    positives = (actual if classes == 1 else actual[:, 1:]).sum()
    return torch.stack([torch.full_like(positives, images), positives, images * pixels - positives])


def segmentation_scores(
    sums: Tensor,
    counts: Tensor,
    totals: Tensor | None,
    pixels: int,
    dice_weight: float,
    cross_entropy_weight: float,
) -> tuple[Tensor, Tensor]:
    """(4 or 3, B, K), (3, B, K), (3,) or None -> the loss, a scalar, and the Dice scores (B,)."""
    images, positives, negatives = (totals_of(counts, pixels) if totals is None else totals).unbind()
    overlap, area, *cross_entropies = sums.unbind()
    score = (overlap + OVERLAP_SMOOTHING) / (area + AREA_SMOOTHING)
    dice_loss = (1 - 2 * score).mean(1).sum() / images
    if sums.shape[2] == 1:
        positive, negative = (sum_of_pixels.sum() for sum_of_pixels in cross_entropies)
        cross_entropy = POSITIVE_WEIGHT * positive / (positives + EMPTY)
        cross_entropy = cross_entropy + NEGATIVE_WEIGHT * negative / (negatives + EMPTY)
    else:
        cross_entropy = cross_entropies[0].sum() / (images * pixels)
    return dice_weight * dice_loss + cross_entropy_weight * cross_entropy, image_dice(counts)


def image_dice(counts: Tensor) -> Tensor:
    """(3, B, K) -> (B,): over the class, or the mean over the foreground classes; one that nobody holds scores 1."""
    hits, predicted, actual = counts if counts.shape[2] == 1 else counts[:, :, 1:]
    area = predicted + actual
    return torch.where(area > 0, 2 * hits / area, 1.0).mean(1)


def slopes(
    sums: Tensor,
    counts: Tensor,
    totals: Tensor | None,
    pixels: int,
    dice_weight: float,
    cross_entropy_weight: float,
) -> Tensor:
    """The gradient of the loss by the sums, in their shape."""
    images, positives, negatives = (totals_of(counts, pixels) if totals is None else totals).unbind()
    overlap, area = sums[:2]
    smoothed = area + AREA_SMOOTHING
    d_overlap = -2 * dice_weight / (sums.shape[2] * images) / smoothed
    d_area = -d_overlap * (overlap + OVERLAP_SMOOTHING) / smoothed
    if sums.shape[2] == 1:
        weights = [POSITIVE_WEIGHT / (positives + EMPTY), NEGATIVE_WEIGHT / (negatives + EMPTY)]
    else:
        weights = [1 / (images * pixels)]
    return torch.stack([d_overlap, d_area, *((cross_entropy_weight * weight).expand_as(area) for weight in weights)])
