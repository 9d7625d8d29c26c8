"""One training step and one pass over the validation images.

A training step has static shapes and never waits for the device: it indexes images that lie there, and its sums stay
there until the end of the epoch. That makes it fit for capture as a CUDA graph.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from uctrans.data.boundary import BOUNDARY_CLASSES, BOUNDARY_TARGET
from uctrans.models.base import probabilities
from uctrans.tiling import tiled
from uctrans.training.config import TrainConfig
from uctrans.training.distributed import Processes
from uctrans.training.ema import WeightAverage
from uctrans.training.losses import BatchCounts, batch_counts, image_dice, loss_and_dice
from uctrans.weight_casts import casting_together

LEAST_PROBABILITY = 1e-6  # keeps the loss of blended probabilities finite


class EpochTotals:
    """Sums of an epoch, kept on the device: loss, Dice, images, steps, and the first step with a non-finite loss."""

    NAMES = ("loss", "dice", "images", "steps", "first_bad")

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.dice = torch.zeros((), device=device)
        self.images = torch.zeros((), device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, loss: torch.Tensor, dice: torch.Tensor) -> None:
        """Count one step in: its mean loss (scalar) and the Dice of each image (B,)."""
        self.loss.add_(loss, alpha=len(dice))
        self.dice.add_(dice.sum())
        self.images.add_(len(dice))
        is_first_bad = (self.first_bad < 0) & ~torch.isfinite(loss)
        self.first_bad.copy_(torch.where(is_first_bad, self.steps, self.first_bad))
        self.steps.add_(1)

    def reset(self) -> None:
        """Start a new epoch, in place."""
        for name in self.NAMES:
            getattr(self, name).fill_(-1 if name == "first_bad" else 0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sums as CPU tensors."""
        return {name: getattr(self, name).cpu() for name in self.NAMES}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take the sums over from ``state_dict``."""
        for name in self.NAMES:
            getattr(self, name).copy_(state[name])

    def read(self, group: Processes) -> tuple[float, float]:
        """Return mean loss and mean Dice over all images of all processes. Waits for the device."""
        loss, dice, images = group.sum_(torch.stack([self.loss, self.dice, self.images])).tolist()
        return loss / images, dice / images


@dataclass
class TrainStep:
    """Callable: train on the images at some positions of the data.

    Attributes:
        forward: the network as it is called, see :func:`training_forward`.
        model: the network itself.
        optimizer: its optimizer.
        average: the moving average of its weights, if any.
        data: the training images on the device.
        protocol: makes augmented input of them.
        generator: random numbers for augmentation, on the device.
        totals: the sums of the epoch.
        group: the processes that train together.
        config: loss weights and precision.
    """

    forward: Any
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    data: Any
    protocol: Any
    generator: torch.Generator
    totals: EpochTotals
    group: Processes
    config: TrainConfig

    def __call__(self, index: torch.Tensor) -> None:
        """Train on the images at ``index``, int64 (B,) on the device."""
        images, masks = self.protocol.training_batch(self.data, index, self.generator)
        counts = None  # one process counts what its loss is averaged over on the way
        if self.group.count > 1:
            counts = BatchCounts(*self.group.mean_(torch.stack(batch_counts(masks))))

        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config, images.device):
            logits = self.forward(images)
        loss, dice = scores_of(logits, masks, self.config, counts)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        self.totals.add(loss.detach(), dice)


@torch.no_grad()
def validate(
    model: torch.nn.Module,
    data: Any,
    protocol: Any,
    config: TrainConfig,
    group: Processes,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> EpochTotals:
    """Return the sums of loss and Dice over this process's share of ``data``: every ``group.count``-th image.

    Under a protocol that keeps the resolution whole images are predicted in tiles, one after the other. ``forward`` is
    how the network is called, plainly unless given.
    """
    forward = forward or plain_forward(model, config)
    was_training = model.training
    model.eval()
    totals = EpochTotals(group.device)
    positions = torch.arange(group.rank, len(data), group.count, device=group.device)
    for index in positions.split(validation_batch_size(protocol, config)):
        images, masks = data.batch(index)
        logits = predict_logits(forward, protocol.to_input(images), protocol, config)
        totals.add(*scores_of(logits, masks, config))
    model.train(was_training)
    return totals


def validation_batch_size(protocol: Any, config: TrainConfig) -> int:
    """Images of one validation step: one where they keep their own sizes."""
    return 1 if protocol.keeps_resolution else config.batch_size


def training_forward(model: torch.nn.Module, config: TrainConfig, group: Processes) -> Callable[[torch.Tensor], Any]:
    """Return ``model`` as a training step calls it: in several processes, compiled, or with its weights cast at once.

    The compiler has its own way with casts, and several processes exchange the gradients of the parameters themselves.
    """
    forward = group.wrap(model)
    if config.compile:
        return torch.compile(forward, dynamic=False)  # the last, smaller batch of an epoch is compiled apart, once
    return casting_together(model, torch.bfloat16) if config.amp == "bf16" and group.count == 1 else forward


def plain_forward(model: torch.nn.Module, config: TrainConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``model`` as it is called: images to logits, in the precision of the configuration."""

    def forward(images: torch.Tensor) -> torch.Tensor:
        with autocast(config, images.device):
            return model(images)

    return forward


def predict_logits(
    forward: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, protocol: Any, config: TrainConfig
) -> torch.Tensor:
    """Logits of network input (B, 3, H, W); of blended probabilities under a protocol that keeps the resolution."""

    if not protocol.keeps_resolution:
        return forward(images)
    blended = tiled(lambda tiles: probabilities(forward(tiles).float()), images, protocol.image_size, config.batch_size)
    return torch.logit(blended, LEAST_PROBABILITY) if blended.shape[1] == 1 else blended.clamp(LEAST_PROBABILITY).log()


def scored_logits(logits: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Logits of the masks that Dice is taken of: of nucleus, (B, 1, H, W), where the target is boundary-aware.

    A nucleus is what is not background, and labels above 0 are its mask.
    """
    if config.target != BOUNDARY_TARGET:
        return logits
    logits = logits.float()
    background, nucleus = logits.split([1, BOUNDARY_CLASSES - 1], dim=1)
    return nucleus.logsumexp(1, keepdim=True) - background


def scores_of(
    logits: torch.Tensor, masks: torch.Tensor, config: TrainConfig, counts: BatchCounts | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss with the weights of the configuration, a scalar, and the Dice of each image (B,)."""
    loss, dice = loss_and_dice(
        logits,
        masks,
        dice_weight=config.dice_weight,
        cross_entropy_weight=config.cross_entropy_weight,
        counts=counts,
        backend=config.backend,
    )
    if config.target == BOUNDARY_TARGET:
        dice = image_dice(scored_logits(logits.detach(), config), masks, backend=config.backend)
    return loss, dice


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the precision the network runs under: bfloat16 autocast or none."""
    if config.amp == "no":
        return contextlib.nullcontext()
    # Each weight is cast once a step anyway, and a cache of casts must not outlive the capture of a CUDA graph.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
