"""Scores of a predicted label map against the truth: Dice, IoU and the 95th percentile Hausdorff distance.

Label maps are integers of shape ``(..., height, width)``. With ``classes=1`` they are binary (anything but 0 is
foreground); with ``classes>=2`` they hold label indices and 0 is background, which is not scored. Every function
returns one score per foreground class along a new last axis, ``(..., foreground)``, where ``foreground`` is
``max(classes - 1, 1)``.

An empty class is defined as follows, so that no score depends on a small constant in a denominator:

========================== ====== ====== ==============================================
truth and prediction        Dice    IoU   HD95
========================== ====== ====== ==============================================
both empty                    1      1    0
one of the two empty          0      0    nan: there is no distance to measure
========================== ====== ====== ==============================================

`mean_over_classes` leaves the undefined distances out.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from uctrans.extras import import_extra

METRICS = ("dice", "iou", "hd95")


def _label_map(labels: Tensor | np.ndarray, classes: int, role: str) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"The {role} must be a label map of integers, got {labels.dtype}: threshold probabilities first."
        )
    if labels.ndim < 2:
        raise ValueError(f"The {role} must have the shape (..., height, width), got {tuple(labels.shape)}.")
    if classes == 1:
        return labels != 0
    lowest, highest = (int(bound) for bound in labels.aminmax()) if labels.numel() else (0, 0)
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"The {role} holds labels from {lowest} to {highest}: with {classes} classes the labels must lie in "
            f"0..{classes - 1}."
        )
    return labels


def _foreground(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, classes: int) -> tuple[Tensor, Tensor]:
    """Both label maps as one bool map per foreground class, ``(..., foreground, height, width)``."""
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}.")
    prediction = _label_map(prediction, classes, "prediction")
    truth = _label_map(truth, classes, "truth")
    if prediction.shape != truth.shape:
        raise ValueError(f"Prediction and truth differ in shape: {tuple(prediction.shape)} and {tuple(truth.shape)}.")
    indices = torch.arange(1, max(classes, 2), device=prediction.device).view(-1, 1, 1)
    return prediction.unsqueeze(-3) == indices, truth.unsqueeze(-3).to(prediction.device) == indices


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of two counts in float64 on the CPU, 1 where the denominator is 0 (both label maps empty)."""
    numerator, denominator = numerator.cpu(), denominator.cpu()
    return torch.where(denominator == 0, 1.0, numerator.double() / denominator.clamp(min=1))


def dice(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, classes: int = 1) -> Tensor:
    """Dice coefficient ``2 |P and T| / (|P| + |T|)`` of each foreground class.

    Args:
        prediction: Integer label maps ``(..., height, width)``.
        truth: Integer label maps of the same shape.
        classes: 1 for binary maps, otherwise the number of labels including background.

    Returns:
        float64 ``(..., foreground)`` on the CPU, each in 0..1; 1 where both maps are empty.

    Raises:
        ValueError: The shapes differ, a map is not of integers, or a label is not below ``classes``.
    """
    predicted, true = _foreground(prediction, truth, classes)
    overlap = (predicted & true).sum((-2, -1))
    return _ratio(2 * overlap, predicted.sum((-2, -1)) + true.sum((-2, -1)))


def iou(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, classes: int = 1) -> Tensor:
    """Intersection over union ``|P and T| / |P or T|`` of each foreground class; see `dice` for shapes and errors."""
    predicted, true = _foreground(prediction, truth, classes)
    return _ratio((predicted & true).sum((-2, -1)), (predicted | true).sum((-2, -1)))


def hd95(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, classes: int = 1) -> Tensor:
    """95th percentile of the Hausdorff distance between the outlines, in pixels of the maps given (through MONAI).

    The larger of the two directed 95th percentiles. See `dice` for shapes and errors.

    Returns:
        float64 ``(..., foreground)`` on the CPU; 0 where both maps are empty, nan where one of the two is.

    Raises:
        ImportError: MONAI is not installed.
    """
    predicted, true = _foreground(prediction, truth, classes)
    shape = predicted.shape[:-2]
    predicted = predicted.cpu().reshape(-1, *predicted.shape[-2:])
    true = true.cpu().reshape(-1, *true.shape[-2:])
    has_prediction, has_truth = predicted.any(-1).any(-1), true.any(-1).any(-1)
    distances = torch.full((len(predicted),), torch.nan, dtype=torch.float64)
    distances[~has_prediction & ~has_truth] = 0.0
    defined = has_prediction & has_truth
    if defined.any():
        monai_metrics = import_extra("monai.metrics", "training")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.5 and later warn of a call of their own
            found = monai_metrics.compute_hausdorff_distance(
                predicted[defined].unsqueeze(1), true[defined].unsqueeze(1), include_background=True, percentile=95
            )
        distances[defined] = found[:, 0].double()
    return distances.reshape(shape)


def mean_over_classes(scores: Tensor) -> Tensor:
    """Mean over the last axis of ``(..., foreground)``, undefined (nan) ones left out; nan where all are undefined."""
    return scores.nanmean(-1)


def mean_and_deviation(scores: Tensor | np.ndarray | list[float]) -> tuple[float, float, int]:
    """Mean, sample standard deviation (``n - 1``) and number of the defined scores.

    Undefined (nan) scores are left out. The mean of no score and the deviation of fewer than two are nan.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64).flatten()
    scores = scores[~scores.isnan()]
    deviation = scores.std().item() if len(scores) > 1 else float("nan")
    mean = scores.mean().item() if len(scores) else float("nan")
    return mean, deviation, len(scores)
