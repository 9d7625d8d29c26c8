"""Dice and cross-entropy losses of the published protocol, and the Dice score that validation reports.

Losses take logits and equal the published formulas on probabilities, but stay finite for any logit. They are float32
(float64 for float64 logits) under autocast too, and never wait for the device.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

DICE_SMOOTHING = 1e-5
DICE_SCALE = 0.25  # probabilities and masks are halved before they are multiplied
POSITIVE_WEIGHT = 0.5
NEGATIVE_WEIGHT = 0.5
EMPTY = 1e-12  # keeps 0 / 0 out of masks without positives or without negatives


class BatchCounts(NamedTuple):
    """What the losses are averaged over: float32 scalars on the device.

    In training with several processes these are the means over the processes, so that the mean of the processes'
    losses is the loss of the whole batch.
    """

    images: torch.Tensor
    positives: torch.Tensor
    negatives: torch.Tensor


def batch_counts(masks: torch.Tensor) -> BatchCounts:
    """Count images, non-zero pixels and zero pixels of ``masks`` (B, height, width)."""
    positives = (masks > 0).sum(dtype=torch.float32)
    return BatchCounts(torch.full_like(positives, len(masks)), positives, masks.numel() - positives)


def segmentation_loss(
    logits: torch.Tensor,
    masks: torch.Tensor,
    *,
    dice_weight: float = 0.5,
    cross_entropy_weight: float = 0.5,
    counts: BatchCounts | None = None,
) -> torch.Tensor:
    """Return ``dice_weight * Dice + cross_entropy_weight * cross entropy``, a scalar.

    Args:
        logits: (B, classes, height, width). One class means a sigmoid and binary masks, more mean a softmax.
        masks: integer (B, height, width), {0, 1} for one class, otherwise labels 0 .. classes - 1.
        dice_weight: weight of the Dice loss.
        cross_entropy_weight: weight of the cross entropy.
        counts: what to average over; counted from ``masks`` when not given.

    One class, with p = sigmoid(logit) and mask t (the published code's loss):
        Dice = mean over images of 1 - (2 sum pt/4 + 1e-5) / (sum p^2/4 + sum t^2/4 + 1e-5)
        cross entropy = 0.5 * mean over positives of -log p + 0.5 * mean over negatives of -log(1 - p), over the batch
    More classes: the same Dice for each class of the softmax, averaged over the classes, and the mean of -log p(label).

    Raises:
        ValueError: the shapes do not belong together.
    """
    batch, classes, *size = logits.shape
    if masks.shape != (batch, *size):
        raise ValueError(f"masks must be {(batch, *size)} for logits {tuple(logits.shape)}, not {tuple(masks.shape)}")
    counts = batch_counts(masks) if counts is None else counts
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if classes == 1:
            target = masks.unsqueeze(1).to(logits.dtype)
            probability = torch.sigmoid(logits)
            cross_entropy = _balanced_cross_entropy(logits, target, counts)
        else:
            labels = torch.arange(classes, device=masks.device).view(1, -1, 1, 1)
            target = (masks.unsqueeze(1) == labels).to(logits.dtype)
            log_probability = torch.log_softmax(logits, dim=1)
            probability = log_probability.exp()
            cross_entropy = -(target * log_probability).sum() / (counts.images * (masks.numel() // max(batch, 1)))
        dice = _dice_loss(probability, target).mean(1).sum() / counts.images
        return dice_weight * dice + cross_entropy_weight * cross_entropy


def image_dice(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the Dice score of each image, float32 (B,): probability above 0.5 (one class) or the largest logit.

    Args:
        logits: (B, classes, height, width).
        masks: integer (B, height, width).

    More classes: mean over the foreground classes. A class that neither mask nor prediction holds scores 1.
    """
    classes = logits.shape[1]
    if classes == 1:
        predicted, target = logits > 0, masks.unsqueeze(1) > 0
    else:
        labels = torch.arange(1, classes, device=masks.device).view(1, -1, 1, 1)
        predicted, target = logits.argmax(1, keepdim=True) == labels, masks.unsqueeze(1) == labels
    overlap = (predicted & target).flatten(2).sum(2, dtype=torch.float32)
    area = predicted.flatten(2).sum(2, dtype=torch.float32) + target.flatten(2).sum(2, dtype=torch.float32)
    return torch.where(area > 0, 2 * overlap / area.clamp(min=1), torch.ones_like(area)).mean(1)


def _balanced_cross_entropy(logits: torch.Tensor, target: torch.Tensor, counts: BatchCounts) -> torch.Tensor:
    # -log sigmoid(z) = softplus(-z) and -log(1 - sigmoid(z)) = softplus(z), for any z.
    positive = (target * F.softplus(-logits)).sum() / (counts.positives + EMPTY)
    negative = ((1 - target) * F.softplus(logits)).sum() / (counts.negatives + EMPTY)
    return POSITIVE_WEIGHT * positive + NEGATIVE_WEIGHT * negative


def _dice_loss(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the Dice loss (B, classes) of each class of each image."""
    overlap = (probability * target).flatten(2).sum(2) * DICE_SCALE
    area = (probability.square().flatten(2).sum(2) + target.square().flatten(2).sum(2)) * DICE_SCALE
    return 1 - (2 * overlap + DICE_SMOOTHING) / (area + DICE_SMOOTHING)
