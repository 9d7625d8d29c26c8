"""Dice and cross-entropy losses of the published protocol, and the Dice score that validation reports.

Losses take logits and equal the published formulas on probabilities, but stay finite for any logit. They are float32
(float64 for float64 logits) under autocast too, and never wait for the device. Loss, score and what they are averaged
over are made of the same few sums over pixels (:func:`uctrans.kernels.segmentation_sums`), taken in one read.
"""

from typing import NamedTuple

import torch

from uctrans import kernels


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


def loss_and_dice(
    logits: torch.Tensor,
    masks: torch.Tensor,
    *,
    dice_weight: float = 0.5,
    cross_entropy_weight: float = 0.5,
    counts: BatchCounts | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what :func:`segmentation_loss` and :func:`image_dice` do, of one read of logits and masks."""
    sums, pixel_counts = kernels.segmentation_sums(logits, masks, backend=backend)
    return kernels.segmentation_scores(
        sums,
        pixel_counts,
        masks.shape[1] * masks.shape[2],
        totals=None if counts is None else torch.stack(counts),
        dice_weight=dice_weight,
        cross_entropy_weight=cross_entropy_weight,
        backend=backend,
    )


def segmentation_loss(
    logits: torch.Tensor,
    masks: torch.Tensor,
    *,
    dice_weight: float = 0.5,
    cross_entropy_weight: float = 0.5,
    counts: BatchCounts | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return ``dice_weight * Dice + cross_entropy_weight * cross entropy``, a scalar.

    Args:
        logits: (B, classes, height, width). One class means a sigmoid and binary masks, more mean a softmax.
        masks: bool or integer (B, height, width), {0, 1} for one class, otherwise labels 0 .. classes - 1.
        dice_weight: weight of the Dice loss.
        cross_entropy_weight: weight of the cross entropy.
        counts: what to average over; counted from ``masks`` when not given.
        backend: implementation, see :func:`uctrans.kernels.segmentation_sums`.

    One class, with p = sigmoid(logit) and mask t (the published code's loss):
        Dice = mean over images of 1 - (2 sum pt/4 + 1e-5) / (sum p^2/4 + sum t^2/4 + 1e-5)
        cross entropy = 0.5 * mean over positives of -log p + 0.5 * mean over negatives of -log(1 - p), over the batch
    More classes: the same Dice for each class of the softmax, averaged over the classes, and the mean of -log p(label).

    Raises:
        ValueError: the shapes do not belong together.
        TypeError: the logits are not floating point, or the masks are.
    """
    weights = {"dice_weight": dice_weight, "cross_entropy_weight": cross_entropy_weight}
    loss, _dice = loss_and_dice(logits, masks, **weights, counts=counts, backend=backend)
    return loss


@torch.no_grad()
def image_dice(logits: torch.Tensor, masks: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Return the Dice score of each image, float32 (B,): probability above 0.5 (one class) or the largest logit.

    Args:
        logits: (B, classes, height, width).
        masks: bool or integer (B, height, width).
        backend: implementation, see :func:`uctrans.kernels.segmentation_sums`.

    More classes: mean over the foreground classes. A class that neither mask nor prediction holds scores 1.

    Raises:
        ValueError: the shapes do not belong together.
        TypeError: the logits are not floating point, or the masks are.
    """
    _loss, dice = loss_and_dice(logits, masks, backend=backend)
    return dice
