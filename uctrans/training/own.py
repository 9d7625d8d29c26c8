"""Data and functions that the caller of :func:`uctrans.training.train` gives in place of a folder and of settings."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.read import IGNORED
from ..data.tensors import MASK_TARGET
from .config import ConfigError, TrainConfig

OF_A_FOLDER = ("data", "folds", "fold", "palette", "intensity_range")


@dataclass(frozen=True)
class Own:
    """Data and functions of the caller, see :func:`uctrans.training.train`.

    Attributes:
        train_data: Training images and masks.
        val_data: Validation images and masks.
        transform: Takes the place of the augmentation.
        loss: Takes the place of Dice and cross entropy.
    """

    train_data: Any = None
    val_data: Any = None
    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def recorded_in(self, config: TrainConfig) -> TrainConfig:
        """Return ``config`` with the names of the functions.

        Raises:
            ConfigError: something is missing, given twice, or not a function.
        """
        if (self.train_data is None) != (self.val_data is None):
            missing, given = ("train_data", "val_data") if self.train_data is None else ("val_data", "train_data")
            raise ConfigError(
                f"{missing}: is missing, and {given} is given; give both, because the best epoch and early stopping "
                "need images that are not trained on (torch.utils.data.random_split draws some)"
            )
        if self.train_data is None and not config.data:
            raise ConfigError(
                "data: is empty; name a folder, or call train(config, train_data=..., val_data=...) in Python, also to "
                "resume a run that began so"
            )
        if self.train_data is not None:
            if given := [name for name in OF_A_FOLDER if getattr(config, name) not in ("", None)]:
                raise ConfigError(f"{given[0]}: belongs to a folder, and train_data is given; leave one of them out")
            if config.target != MASK_TARGET:
                raise ConfigError(
                    f"target: {config.target} needs the instance maps of a folder, and train_data is given; set target "
                    f"to {MASK_TARGET}"
                )
        if self.transform is not None and config.augmentation:
            raise ConfigError("augmentation: transform takes its place; leave one of them out")
        names = {}
        for name in ("transform", "loss"):
            function, recorded = getattr(self, name), getattr(config, name)
            if function is None and recorded is not None:
                raise ConfigError(
                    f"{name}: names the function {recorded} of a program; give it again in Python, "
                    f"train(config, {name}={recorded}), or leave it out of the settings of a new run"
                )
            if function is not None and not callable(function):
                raise ConfigError(f"{name}: {function!r} cannot be called; give a function")
            names[name] = None if function is None else _name_of(function)
        return dataclasses.replace(config, **names)

    def checked_transform(self, config: TrainConfig) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Return ``transform`` with a check of what it returns, or None.

        Raises in a call:
            ConfigError: it returns no images and masks that belong together.
        """
        if self.transform is None:
            return None

        def transform(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
            result = self.transform(images, masks)
            if not (isinstance(result, tuple | list) and [*map(torch.is_tensor, result)] == [True, True]):
                raise ConfigError(f"transform: returned a {type(result).__name__}; return two tensors, (images, masks)")
            new_images, new_masks = result
            batch, channels = images.shape[:2]
            are_of_kind = new_images.is_floating_point() and not new_masks.is_floating_point()
            size = new_images.shape[2:]
            if not are_of_kind or new_images.shape != (batch, channels, *size) or new_masks.shape != (batch, *size):
                raise ConfigError(
                    f"transform: returned images {_described(new_images)} and masks {_described(new_masks)}; return "
                    f"floating-point images ({batch}, {channels}, H, W) and whole labels ({batch}, H, W)"
                )
            is_label = (new_masks >= 0) & (new_masks < max(config.network_classes, 2))
            if config.ignore_label is not None:
                is_label |= new_masks == IGNORED
            if not is_label.all():
                raise ConfigError(
                    f"transform: returned the label {new_masks[~is_label][0].item()}; keep the labels of the masks, as "
                    f"nearest-neighbour sampling does, and mark pixels without one with {IGNORED} and ignore_label"
                )
            return new_images.float(), new_masks.to(torch.uint8)

        return transform

    def loss_of(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return ``loss`` of logits (B, classes, H, W), as float32, and masks (B, H, W), as int64.

        Raises:
            ConfigError: it is no scalar that a network can learn from.
        """
        loss = self.loss(logits.float(), masks.long())
        if not torch.is_tensor(loss) or loss.ndim or not loss.is_floating_point():
            given = _described(loss) if torch.is_tensor(loss) else f"a {type(loss).__name__}"
            raise ConfigError(f"loss: returned {given}; return a scalar tensor, such as losses.mean()")
        if logits.requires_grad and not loss.requires_grad:
            raise ConfigError("loss: returned a value without gradient; compute it from the logits alone by PyTorch")
        return loss


NOTHING = Own()


def _name_of(function: Any) -> str:
    """Return the name of a function, or of the class of another object, which is the same in every process."""
    function = getattr(function, "func", function)  # of functools.partial
    return getattr(function, "__qualname__", type(function).__qualname__).rpartition("<locals>.")[2]


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
