"""The labels in the masks of a run: masks of one label alone are refused, empty masks and missing classes named."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data import DataError, NativeImages, SegmentationTensors
from ..data.instances import BOUNDARY_TARGET
from ..data.read import IGNORED
from .config import TrainConfig

LABELS = 256
PARTS = {"train": "training", "val": "validation"}


def count_labels(data: SegmentationTensors | NativeImages) -> Tensor:
    """Return how many pixels of each image have each label, int64 (images, 256) on the CPU."""
    if isinstance(data, SegmentationTensors):
        masks = data.masks.flatten(1)
    else:
        masks = data.labels.split(data.sizes.prod(0).tolist())
    return torch.stack([torch.bincount(mask, minlength=LABELS) for mask in masks]).cpu()


def check_truth_of_run(
    config: TrainConfig, train: SegmentationTensors | NativeImages, val: SegmentationTensors | NativeImages
) -> tuple[str, ...]:
    """Return sentences about empty masks and classes that no mask has.

    Raises:
        DataError: no training mask, or no validation mask, has any foreground, or any background; a network that
            predicts one label everywhere would score 1.
    """
    remarks = []
    for (split, part), data in zip(PARTS.items(), (train, val), strict=True):
        source = config.data or f"{split}_data"
        counts = count_labels(data)
        if config.ignore_label is not None:
            share = counts[:, IGNORED].sum().item() / counts.sum().item()
            remarks.append(
                f"{100 * share:.3g} % of the pixels of the {part} masks are ignored"
                if share
                else f"no pixel of the {part} masks is ignored: none has ignore_label {config.ignore_label}"
            )
            counts[:, IGNORED] = 0
        has_none = counts[:, 1:].sum(1) == 0
        is_empty = has_none & (counts[:, 0] > 0)  # but not ignored as a whole
        if has_none.all():
            ignoring = "" if config.ignore_label is None else ", or is all of it ignored (ignore_label)"
            raise DataError(
                f"{source}: none of the {len(counts)} {part} masks has any foreground{ignoring}, so a network "
                "that predicts none would score 1; check that these are the masks and that their values fit classes "
                "and palette, or choose the images of both parts yourself, in folders train and val or as folds"
            )
        if config.classes == 1 and not counts[:, 0].any():
            raise DataError(
                f"{source}: every pixel of the {len(counts)} {part} masks is foreground, so a network that "
                "predicts it everywhere would score 1; save the background as 0, or give a palette, background first"
            )
        if is_empty.any():
            scores = ", each of which scores Dice 1 if nothing is predicted there and 0 otherwise"
            remarks.append(
                f"{int(is_empty.sum())} of {len(counts)} {part} masks have no foreground"
                + (scores if part == "validation" else "")
            )
        absent = [_name(config, label) for label in _foreground(config) if not counts[:, label].any()]
        if absent:
            effect = "so it cannot be learned" if part == "training" else "so the validation Dice leaves it out"
            remarks += [f"no {part} mask has class {name}, {effect}" for name in absent]
    return tuple(remarks)


def classes_of_masks(data: SegmentationTensors | NativeImages, config: TrainConfig) -> Sequence[int] | None:
    """Return the foreground classes that some mask of ``data`` has, or None if these are all."""
    if config.classes == 1:
        return None
    counts = count_labels(data)
    classes = [label for label in _foreground(config) if counts[:, label].any()]
    return None if len(classes) == config.classes - 1 else classes


def _foreground(config: TrainConfig) -> range:
    return range(1, config.classes) if config.target != BOUNDARY_TARGET else range(0)


def _name(config: TrainConfig, label: int) -> str:
    return f"{label}" if config.class_names is None else f"{label} ({config.class_names[label]})"
