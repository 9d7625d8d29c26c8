"""Scores of a prediction against the truth: of label maps (Dice, IoU, HD95) and of instance maps (AJI, PQ, F1, AP).

Label maps are integers ``(..., height, width)``. With ``classes=1`` they are binary: anything but 0 is foreground. With
``classes>=2`` they hold label indices, and 0 is background, which is not scored. `dice`, `iou` and `hd95` return one
score for each foreground class along a new last axis, ``(..., foreground)``, where ``foreground`` is
``max(classes - 1, 1)``.

Instance maps are integers ``(height, width)``: 0 is background, every other value is one object (a nucleus), whose
pixels need not touch. Scores do not depend on the numbers of the objects.

Empty maps score as follows, so that no score depends on a small constant in a denominator; nan is undefined, and means
leave it out:

========================= ==== === ==== === === === === === ===
truth and prediction      Dice IoU HD95 AJI PQ  SQ  RQ  F1  AP
========================= ==== === ==== === === === === === ===
both empty                1    1   0    1   1   1   1   1   1
one of them empty         0    0   nan  0   0   nan 0   0   0
no object matched                       any 0   nan 0   0   0
========================= ==== === ==== === === === === === ===

A label to ignore takes pixels of the truth out of both maps before they are compared: what is predicted there counts
neither as found nor as wrong. Outlines (HD95) then follow the rim of these pixels in both maps, and an object that they
cut (AJI, PQ) is what is left of it. Where all pixels are ignored, every score is undefined.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..extras import import_extra

METRICS = ("dice", "iou", "hd95")
INSTANCE_METRICS = ("aji", "pq", "sq", "rq", "f1", "ap")
MATCH_IOU = 0.5  # two objects match above this


def dice(
    prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, classes: int = 1, ignore_label: int | None = None
) -> Tensor:
    """Return the Dice coefficient ``2 |P and T| / (|P| + |T|)`` of each foreground class.

    Args:
        prediction: Integer label maps ``(..., height, width)``.
        truth: Integer label maps of the same shape.
        classes: 1 for binary maps, otherwise the number of labels including background.
        ignore_label: Pixels with this label in the truth are left out of both maps.

    Returns:
        float64 ``(..., foreground)`` on the CPU, in 0..1; 1 if both maps are empty, nan if all pixels are ignored.

    Raises:
        ValueError: The shapes differ, a map is not of integers, or a label is not below ``classes``.
    """
    predicted, true, is_scored = _foreground(prediction, truth, classes, ignore_label)
    overlap = (predicted & true).sum((-2, -1))
    return _ratio(2 * overlap, predicted.sum((-2, -1)) + true.sum((-2, -1)), is_scored)


def iou(
    prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, classes: int = 1, ignore_label: int | None = None
) -> Tensor:
    """Return the intersection over union ``|P and T| / |P or T|`` of each foreground class; see `dice`."""
    predicted, true, is_scored = _foreground(prediction, truth, classes, ignore_label)
    return _ratio((predicted & true).sum((-2, -1)), (predicted | true).sum((-2, -1)), is_scored)


def hd95(
    prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, classes: int = 1, ignore_label: int | None = None
) -> Tensor:
    """Return the 95th percentile of the Hausdorff distance between outlines, in pixels of the maps (through MONAI).

    It is the larger of the two directed 95th percentiles. See `dice` for shapes and errors.

    Returns:
        float64 ``(..., foreground)`` on the CPU; 0 if both maps are empty, nan if one of them is or if all pixels are
        ignored.

    Raises:
        ImportError: MONAI is not installed.
    """
    predicted, true, is_scored = (maps.cpu() for maps in _foreground(prediction, truth, classes, ignore_label))
    shape = predicted.shape[:-2]
    predicted, true = (maps.reshape(-1, *maps.shape[-2:]) for maps in (predicted, true))
    has_prediction, has_truth = predicted.any(-1).any(-1), true.any(-1).any(-1)
    distances = torch.full((len(predicted),), torch.nan, dtype=torch.float64)
    distances[~has_prediction & ~has_truth] = 0.0
    defined = has_prediction & has_truth
    if defined.any():
        monai_metrics = import_extra("monai.metrics", "training")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI from 1.5 on warns of one of its own calls
            found = monai_metrics.compute_hausdorff_distance(
                predicted[defined].unsqueeze(1), true[defined].unsqueeze(1), include_background=True, percentile=95
            )
        distances[defined] = found[:, 0].double()
    return distances.reshape(shape).masked_fill(~is_scored[..., None], torch.nan)


def mean_over_classes(scores: Tensor) -> Tensor:
    """Return the mean over the last axis of ``(..., foreground)`` without nan; nan if all scores are nan."""
    return scores.nanmean(-1)


def mean_and_deviation(scores: Tensor | np.ndarray | list[float]) -> tuple[float, float, int]:
    """Return mean, sample standard deviation (``n - 1``) and number of the scores that are not nan.

    The mean of no score and the deviation of fewer than two are nan.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64).flatten()
    scores = scores[~scores.isnan()]
    deviation = scores.std().item() if len(scores) > 1 else float("nan")
    mean = scores.mean().item() if len(scores) else float("nan")
    return mean, deviation, len(scores)


def _foreground(
    prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, classes: int, ignore_label: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both label maps as one bool map for each foreground class, and whether any pixel is scored.

    The maps are ``(..., foreground, height, width)``, false where pixels are ignored; the last tensor is ``(...)``.
    """
    if classes < 1:
        raise ValueError(f"classes: {classes} is too small; give 1 or more")
    ignored = torch.as_tensor(truth) == ignore_label if ignore_label is not None else None
    prediction = _label_map(prediction, classes, "prediction")
    truth = _label_map(truth, classes, "truth", ignored)
    _check_shapes(prediction, truth)
    indices = torch.arange(1, max(classes, 2), device=prediction.device).view(-1, 1, 1)
    predicted, true = prediction.unsqueeze(-3) == indices, truth.unsqueeze(-3).to(prediction.device) == indices
    if ignored is None:
        return predicted, true, torch.ones(truth.shape[:-2], dtype=torch.bool)
    return predicted & ~ignored.unsqueeze(-3).to(prediction.device), true, ~ignored.flatten(-2).all(-1).cpu()


def _label_map(labels: Tensor | np.ndarray, classes: int, role: str, ignored: Tensor | None = None) -> Tensor:
    """Return checked labels, 0 where ``ignored``."""
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{role}: a label map holds integers, got {labels.dtype}; threshold probabilities first")
    if labels.ndim < 2:
        raise ValueError(f"{role}: got the shape {tuple(labels.shape)}; give (..., height, width)")
    if ignored is not None:
        labels = labels.masked_fill(ignored, 0)
    if classes == 1:
        return labels != 0
    lowest, highest = (int(bound) for bound in labels.aminmax()) if labels.numel() else (0, 0)
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"{role}: it holds labels from {lowest} to {highest}; with {classes} classes, labels must lie in "
            f"0..{classes - 1}"
        )
    return labels


def _check_shapes(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> None:
    if prediction.shape != truth.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(truth.shape)}"
        raise ValueError(f"prediction: it differs in shape from the truth, {shapes}; give two maps of one image")


def _ratio(numerator: Tensor, denominator: Tensor, is_scored: Tensor) -> Tensor:
    """Return the quotient of two counts ``(..., foreground)`` in float64 on the CPU.

    It is 1 where the denominator is 0 (both maps empty), and nan where ``is_scored`` ``(...)`` is false.
    """
    numerator, denominator = numerator.cpu(), denominator.cpu()
    ratio = torch.where(denominator == 0, 1.0, numerator.double() / denominator.clamp(min=1))
    return ratio.masked_fill(~is_scored[..., None], torch.nan)


class InstanceScores(NamedTuple):
    """Scores of one instance map, each in 0..1; nan where undefined.

    Attributes:
        aji: Aggregated Jaccard index, see `aggregated_jaccard_index`.
        pq: Panoptic quality, ``sq * rq``, see `panoptic_quality`.
        sq: Segmentation quality, the mean IoU of matched objects.
        rq: Recognition quality, also called detection quality (DQ): F1 over objects that match.
        f1: Object F1; equal to ``rq``, its name as a factor of ``pq``.
        ap: Average precision at an IoU of 0.5 as the Data Science Bowl 2018 counts it (Caicedo et al., "Nucleus
            segmentation across imaging experiments", 2019), ``TP / (TP + FP + FN)`` over objects that match.
    """

    aji: float
    pq: float
    sq: float
    rq: float
    f1: float
    ap: float


def score_instances(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> InstanceScores:
    """Return all scores of one instance map.

    Args:
        prediction: Integer instance map ``(height, width)``, 0 background.
        truth: Integer instance map of the same shape.

    Raises:
        ValueError: The shapes differ, or a map is not two-dimensional, not of integers, or has negative numbers.
    """
    overlaps = _overlaps(prediction, truth)
    f1 = _f1(overlaps, MATCH_IOU)
    ap = f1 / (2 - f1)  # f1 is 2 TP / (2 TP + FP + FN)
    matched = overlaps.iou[overlaps.iou > MATCH_IOU]
    if matched.size:
        sq = float(matched.mean())
        return InstanceScores(_aji(overlaps), sq * f1, sq, f1, f1, ap)
    is_empty = not len(overlaps.truth_areas) and not len(overlaps.predicted_areas)
    pq, sq = (1.0, 1.0) if is_empty else (0.0, float("nan"))
    return InstanceScores(_aji(overlaps), pq, sq, f1, f1, ap)


def aggregated_jaccard_index(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> float:
    """Return the AJI of Kumar et al., "A dataset and a technique for generalized nuclear segmentation" (2017).

    Each true object takes the predicted object of the highest IoU with it. The AJI is the number of shared pixels of
    these pairs over the number of their united pixels and the pixels of predicted objects that were not taken. As
    published, two true objects may take the same predicted one. Of predicted objects with equal IoU, the one whose
    first pixel comes first, row by row, is taken. See `score_instances` for the arguments and errors.
    """
    return score_instances(prediction, truth).aji


def panoptic_quality(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> tuple[float, float, float]:
    """Return PQ, SQ and RQ of Kirillov et al., "Panoptic segmentation" (2019), for one class of objects.

    Objects match if their IoU is above 0.5, which no object can have with two others. SQ is the mean IoU of the
    matches, RQ is ``2 TP / (2 TP + FP + FN)`` and PQ is their product. See `score_instances` for the arguments and
    errors.
    """
    return score_instances(prediction, truth)[1:4]


def object_f1(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, threshold: float = MATCH_IOU) -> float:
    """Return F1 over objects, ``2 TP / (2 TP + FP + FN)``, which match if their IoU is above ``threshold``.

    Args:
        prediction: See `score_instances`.
        truth: See `score_instances`.
        threshold: 0.5 or more, where a match is unique, and below 1.

    Raises:
        ValueError: A map is refused, or the threshold is out of its range.
    """
    if not MATCH_IOU <= threshold < 1:
        raise ValueError(f"threshold: {threshold} is out of range; give 0.5 <= threshold < 1, where matches are unique")
    return _f1(_overlaps(prediction, truth), threshold)


class _Overlaps(NamedTuple):
    """Areas of the objects and every pair of objects that share pixels, ordered by truth, then prediction.

    Objects are numbered from 0 in the order of their first pixels, row by row.
    """

    truth_areas: np.ndarray  # [T]
    predicted_areas: np.ndarray  # [P]
    truth: np.ndarray  # [pairs]
    predicted: np.ndarray  # [pairs]
    shared: np.ndarray  # [pairs] pixels
    united: np.ndarray  # [pairs] pixels

    @property
    def iou(self) -> np.ndarray:
        return self.shared / self.united


def _overlaps(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> _Overlaps:
    prediction, truth = _instance_map(prediction, "prediction"), _instance_map(truth, "truth")
    _check_shapes(prediction, truth)
    predicted, true = _in_reading_order(prediction), _in_reading_order(truth)
    predicted_areas, truth_areas = np.bincount(predicted)[1:], np.bincount(true)[1:]
    both = (predicted > 0) & (true > 0)
    columns = max(len(predicted_areas), 1)
    pairs, shared = np.unique((true[both] - 1) * columns + predicted[both] - 1, return_counts=True)
    rows, columns = np.divmod(pairs, columns)
    united = truth_areas[rows] + predicted_areas[columns] - shared
    return _Overlaps(truth_areas, predicted_areas, rows, columns, shared, united)


def _instance_map(labels: Tensor | np.ndarray, role: str) -> np.ndarray:
    labels = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if labels.dtype == bool or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{role}: an instance map holds integers, got {labels.dtype}; number the objects first, for example with "
            "uctrans.inference.instances.to_instances"
        )
    if labels.ndim != 2:
        raise ValueError(f"{role}: got the shape {labels.shape}; give (height, width)")
    if labels.size and labels.min() < 0:
        raise ValueError(f"{role}: it holds the number {labels.min()}; number objects from 1, background is 0")
    return labels


def _in_reading_order(labels: np.ndarray) -> np.ndarray:
    """Return the pixels in one row, objects numbered 1, 2, ... by their first pixel, so that numbers cannot matter."""
    numbers, first_pixel, position = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.where(numbers == 0, -1, first_pixel))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) + (0 not in numbers)
    return rank[position.reshape(-1)]


def _aji(overlaps: _Overlaps) -> float:
    order = np.lexsort((overlaps.predicted, -overlaps.iou, overlaps.truth))
    found, first = np.unique(overlaps.truth[order], return_index=True)
    best = order[first]
    missed = np.delete(overlaps.truth_areas, found)
    unused = np.delete(overlaps.predicted_areas, overlaps.predicted[best])
    united = overlaps.united[best].sum() + missed.sum() + unused.sum()
    return float(overlaps.shared[best].sum() / united) if united else 1.0


def _f1(overlaps: _Overlaps, threshold: float) -> float:
    objects = len(overlaps.truth_areas) + len(overlaps.predicted_areas)
    return float(2 * (overlaps.iou > threshold).sum() / objects) if objects else 1.0
