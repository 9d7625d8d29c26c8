"""One training step and one pass over the validation images.

A training step has static shapes and never waits for the device: it indexes images that lie there, and its sums stay
there until the end of the epoch. That makes it fit for capture as a CUDA graph.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from uctrans.training.config import TrainConfig
from uctrans.training.distributed import Processes
from uctrans.training.ema import WeightAverage
from uctrans.training.losses import BatchCounts, batch_counts, image_dice, segmentation_loss


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
    def add(self, loss: torch.Tensor, logits: torch.Tensor, masks: torch.Tensor) -> None:
        """Count one step in: its mean loss (scalar), logits (B, classes, h, w) and masks (B, h, w)."""
        self.loss.add_(loss, alpha=len(masks))
        self.dice.add_(image_dice(logits, masks).sum())
        self.images.add_(len(masks))
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
        forward: the network as it is called (itself, compiled, or wrapped for several processes).
        model: the network itself.
        optimizer: its optimizer.
        average: the moving average of its weights, if any.
        data: the training images on the device.
        protocol: turns uint8 images into input and augments them.
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
        images = self.protocol.to_input(self.data.images.index_select(0, index))
        masks = self.data.masks.index_select(0, index)
        images, masks = self.protocol.augment(images, masks, self.generator)
        counts = BatchCounts(*self.group.mean_(torch.stack(batch_counts(masks))))

        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config, images.device):
            logits = self.forward(images)
        loss = loss_of(logits, masks, self.config, counts)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        self.totals.add(loss.detach(), logits.detach(), masks)


@torch.no_grad()
def validate(model: torch.nn.Module, data: Any, protocol: Any, config: TrainConfig, group: Processes) -> EpochTotals:
    """Return the sums of loss and Dice over this process's share of ``data``: every ``group.count``-th image."""
    was_training = model.training
    model.eval()
    totals = EpochTotals(data.images.device)
    positions = torch.arange(group.rank, len(data), group.count, device=data.images.device)
    for index in positions.split(config.batch_size):
        images = protocol.to_input(data.images.index_select(0, index))
        masks = data.masks.index_select(0, index)
        with autocast(config, images.device):
            logits = model(images)
        totals.add(loss_of(logits, masks, config), logits, masks)
    model.train(was_training)
    return totals


def loss_of(
    logits: torch.Tensor, masks: torch.Tensor, config: TrainConfig, counts: BatchCounts | None = None
) -> torch.Tensor:
    """Return the loss with the weights of the configuration."""
    return segmentation_loss(
        logits,
        masks,
        dice_weight=config.dice_weight,
        cross_entropy_weight=config.cross_entropy_weight,
        counts=counts,
    )


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the precision the network runs under: bfloat16 autocast or none."""
    if config.amp == "no":
        return contextlib.nullcontext()
    # Each weight is cast once a step anyway, and a cache of casts must not outlive the capture of a CUDA graph.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
