"""The sums of a segmentation loss, and loss and Dice, one PyTorch operation a step: specification, oracle and baseline.

The sums are a few numbers an image, so that the steps from them to loss and Dice are the composed form, too.

Source: the loss of the authors' implementation of UCTransNet, written in logits so that it is finite for any of them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import statistics_dtype

BINARY_SUMS, CLASS_SUMS, COUNTS = 4, 3, 3  # rows of sums for one class and for several, and of counts

DICE_SMOOTHING = 1e-5
DICE_SCALE = 0.25  # probabilities and masks are halved before they are multiplied
POSITIVE_WEIGHT = 0.5
NEGATIVE_WEIGHT = 0.5
EMPTY = 1e-12  # keeps 0 / 0 out of masks without positives, without negatives, or without either

# (2 DICE_SCALE overlap + smoothing) / (DICE_SCALE area + smoothing), divided through by the scale:
# 2 (overlap + OVERLAP_SMOOTHING) / (area + AREA_SMOOTHING)
AREA_SMOOTHING = DICE_SMOOTHING / DICE_SCALE
OVERLAP_SMOOTHING = AREA_SMOOTHING / 2


def segmentation_sums(logits: Tensor, masks: Tensor, ignore_label: int | None = None) -> tuple[Tensor, Tensor]:
    """(B, K, H, W), (B, H, W) -> sums (4 or 3, B, K), counts (3, B, K); see the public function."""
    ignored = None if ignore_label is None else masks.unsqueeze(1) == ignore_label
    logits = _without_ignored(logits.to(statistics_dtype(logits)), ignored)
    classes = logits.shape[1]
    if classes == 1:
        target = masks.unsqueeze(1).to(logits.dtype)
        probability = torch.sigmoid(logits)
        # -log sigmoid(z) = softplus(-z) and -log(1 - sigmoid(z)) = softplus(z), for any z.
        cross_entropies = [target * F.softplus(-logits), (1 - target) * F.softplus(logits)]
        predicted, actual = logits > 0, masks.unsqueeze(1) > 0
    else:
        labels = torch.arange(classes, device=masks.device).view(1, -1, 1, 1)
        actual = masks.unsqueeze(1) == labels
        target = actual.to(logits.dtype)
        log_probability = torch.log_softmax(logits, dim=1)
        probability = log_probability.exp()
        cross_entropies = [-(target * log_probability)]
        predicted = logits.argmax(1, keepdim=True) == labels
    terms = [probability * target, probability.square(), target.square(), *cross_entropies]
    overlap, predicted_area, actual_area, *sums = (_without_ignored(term, ignored).flatten(2).sum(2) for term in terms)
    counts = [
        _without_ignored(pixels, ignored).flatten(2).sum(2, dtype=torch.float32)
        for pixels in (predicted & actual, predicted, actual)
    ]
    return torch.stack([overlap, predicted_area + actual_area, *sums]), torch.stack(counts)


def _without_ignored(pixels: Tensor, ignored: Tensor | None) -> Tensor:
    """Return the pixels (B, K, H, W), zero where ``ignored`` (B, 1, H, W) is true."""
    return pixels if ignored is None else pixels.masked_fill(ignored, 0)


def _totals(counts: Tensor, pixels: int) -> Tensor:
    """Count images, positive and negative pixels of a batch, float32 (3,), from its counts (3, B, K)."""
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
    images, positives, negatives = (_totals(counts, pixels) if totals is None else totals).unbind()
    overlap, area, *cross_entropies = sums.unbind()
    score = (overlap + OVERLAP_SMOOTHING) / (area + AREA_SMOOTHING)
    dice_loss = (1 - 2 * score).mean(1).sum() / images
    if sums.shape[2] == 1:
        positive, negative = (sum_of_pixels.sum() for sum_of_pixels in cross_entropies)
        cross_entropy = POSITIVE_WEIGHT * positive / (positives + EMPTY)
        cross_entropy = cross_entropy + NEGATIVE_WEIGHT * negative / (negatives + EMPTY)
    else:
        cross_entropy = cross_entropies[0].sum() / (positives + negatives + EMPTY)
    return dice_weight * dice_loss + cross_entropy_weight * cross_entropy, _dice(counts)


def _dice(counts: Tensor) -> Tensor:
    """(3, B, K) -> (B,): of the class, or the mean over foreground classes; one in neither mask nor prediction is 1."""
    hits, predicted, actual = counts if counts.shape[2] == 1 else counts[:, :, 1:]
    area = predicted + actual
    return torch.where(area > 0, 2 * hits / area, 1.0).mean(1)
