"""Validation of a network in training: loss and Dice of whole images, in tiles at full resolution."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..models.base import probabilities
from ..tiling import tiled
from .build import plain_forward
from .config import TrainConfig
from .distributed import Processes
from .losses import EpochTotals, configured_loss_and_dice
from .own import NOTHING, Own

LEAST_PROBABILITY = 1e-6  # keeps the loss of blended probabilities finite


@torch.no_grad()
def validate(
    model: torch.nn.Module,
    data: Any,
    protocol: Any,
    config: TrainConfig,
    group: Processes,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
    scored_classes: Sequence[int] | None = None,
    own: Own = NOTHING,
) -> EpochTotals:
    """Return the sums of loss and Dice over this process's share of ``data``: every ``group.count``-th image.

    A protocol that keeps the resolution predicts whole images in tiles, one after the other. ``forward`` is the way to
    call ``model``, by default :func:`plain_forward`. The Dice is the mean over ``scored_classes``, by default
    all foreground classes. ``own`` may have a loss.
    """
    forward = forward or plain_forward(model, config)
    was_training = model.training
    model.eval()
    totals = EpochTotals(group.device, ignores=config.ignore_label is not None)
    positions = torch.arange(group.rank, len(data), group.count, device=group.device)
    for index in positions.split(validation_batch_size(protocol, config)):
        images, masks = data.batch(index)
        logits = predict_logits(forward, protocol.to_input(images), protocol, config)
        totals.add(*configured_loss_and_dice(logits, masks, config, scored_classes=scored_classes, own=own))
    model.train(was_training)
    return totals


def validation_batch_size(protocol: Any, config: TrainConfig) -> int:
    """Return the number of images in a validation step: one if images keep their own sizes."""
    return 1 if protocol.keeps_resolution else config.batch_size


def predict_logits(
    forward: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, protocol: Any, config: TrainConfig
) -> torch.Tensor:
    """Return logits of network input (B, C, H, W); at full resolution those of probabilities blended from tiles."""
    if not protocol.keeps_resolution:
        return forward(images)
    blended = tiled(lambda tiles: probabilities(forward(tiles).float()), images, protocol.image_size, config.batch_size)
    return torch.logit(blended, LEAST_PROBABILITY) if blended.shape[1] == 1 else blended.clamp(LEAST_PROBABILITY).log()
