"""Scores of an instance map against the truth: aggregated Jaccard index, panoptic quality and F1 over objects.

Instance maps are integers of shape ``(height, width)``: 0 is background, every other value is one object (a nucleus),
whose pixels need not touch. Which number an object has plays no part in any score.

================= ===== ===== ===== ===== =====
truth, prediction   AJI    PQ    SQ    RQ    F1
================= ===== ===== ===== ===== =====
both empty            1     1     1     1     1
one of them empty     0     0   nan     0     0
no object matched         0   nan     0     0
================= ===== ===== ===== ===== =====

SQ is the mean overlap of matched objects, so where there are none it is undefined (nan) and left out of means.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

MATCH_IOU = 0.5
INSTANCE_METRICS = ("aji", "pq", "sq", "rq", "f1")


class InstanceScores(NamedTuple):
    """Scores of one image, each in 0..1; nan where undefined.

    Attributes:
        aji: Aggregated Jaccard index, see `aggregated_jaccard_index`.
        pq: Panoptic quality, ``sq * rq``, see `panoptic_quality`.
        sq: Segmentation quality, the mean IoU of matched objects.
        rq: Recognition quality, also called detection quality (DQ): F1 over objects matched at an IoU above 0.5.
        f1: Object F1 at an IoU above 0.5. Equal to ``rq``, which is the name it has as a factor of ``pq``.
    """

    aji: float
    pq: float
    sq: float
    rq: float
    f1: float


class _Overlaps(NamedTuple):
    """Areas of the objects and every pair of objects that share pixels, ordered by truth, then prediction.

    Objects are numbered from 0 in the order in which a reader meets them, row by row.
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


def _instance_map(labels: Tensor | np.ndarray, role: str) -> np.ndarray:
    labels = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if labels.dtype == bool or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"The {role} must be an instance map of integers, got {labels.dtype}: number the objects first, as "
            "uctrans.inference.instances.to_instances does."
        )
    if labels.ndim != 2:
        raise ValueError(f"The {role} must have the shape (height, width), got {labels.shape}.")
    if labels.size and labels.min() < 0:
        raise ValueError(f"The {role} holds the number {labels.min()}: objects are numbered from 1, background is 0.")
    return labels


def _numbered_in_reading_order(labels: np.ndarray) -> np.ndarray:
    """The pixels in one row, objects numbered 1, 2, ... by their first pixel: the given numbers cannot matter then."""
    pixels = labels.reshape(-1)
    if pixels.size == 0 or pixels.max() > pixels.size:  # numbers too sparse for a table of them
        pixels = np.unique(np.append(pixels, 0), return_inverse=True)[1][:-1]
    pixels = pixels.astype(np.intp)
    absent = pixels.size
    first_pixel = np.full(pixels.max(initial=0) + 1, absent)
    first_pixel[pixels[::-1]] = np.arange(absent - 1, -1, -1)  # of equal indices the last assignment stays
    first_pixel[0] = -1
    order = np.argsort(first_pixel, kind="stable")
    numbers = np.empty_like(order)
    numbers[order] = np.arange(len(order))
    return numbers[pixels]


def _overlaps(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> _Overlaps:
    prediction, truth = _instance_map(prediction, "prediction"), _instance_map(truth, "truth")
    if prediction.shape != truth.shape:
        raise ValueError(f"Prediction and truth differ in shape: {prediction.shape} and {truth.shape}.")
    predicted, true = _numbered_in_reading_order(prediction), _numbered_in_reading_order(truth)
    predicted_areas, truth_areas = np.bincount(predicted)[1:], np.bincount(true)[1:]
    both = (predicted > 0) & (true > 0)
    columns = max(len(predicted_areas), 1)
    pairs, shared = np.unique((true[both] - 1) * columns + predicted[both] - 1, return_counts=True)
    rows, columns = np.divmod(pairs, columns)
    united = truth_areas[rows] + predicted_areas[columns] - shared
    return _Overlaps(truth_areas, predicted_areas, rows, columns, shared, united)


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


def _panoptic_quality(overlaps: _Overlaps) -> tuple[float, float, float]:
    rq = _f1(overlaps, MATCH_IOU)
    matched = overlaps.iou[overlaps.iou > MATCH_IOU]
    if matched.size:
        sq = float(matched.mean())
        return sq * rq, sq, rq
    is_empty = not len(overlaps.truth_areas) and not len(overlaps.predicted_areas)
    return (1.0, 1.0, 1.0) if is_empty else (0.0, float("nan"), 0.0)


def aggregated_jaccard_index(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> float:
    """AJI of Kumar et al., "A dataset and a technique for generalized nuclear segmentation" (2017).

    Each true object takes the predicted object of the highest IoU with it; the shared pixels of these pairs over their
    united pixels, to which the pixels of predicted objects that nobody took are added. As published, two true objects
    may take the same predicted one. Of predicted objects with equal IoU the one whose first pixel is met first, row by
    row, is taken.

    Args:
        prediction: Integer instance map ``(height, width)``, 0 background.
        truth: Integer instance map of the same shape.

    Returns:
        0..1; 1 where both maps are empty, 0 where one is.

    Raises:
        ValueError: The shapes differ, or a map is not two-dimensional, not of integers, or has negative numbers.
    """
    return _aji(_overlaps(prediction, truth))


def panoptic_quality(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> tuple[float, float, float]:
    """PQ, SQ and RQ of Kirillov et al., "Panoptic segmentation" (2019), of one class of objects.

    Objects match where their IoU is above 0.5, which no object can have with two others. SQ is the mean IoU of the
    matches, RQ is ``2 TP / (2 TP + FP + FN)`` and PQ their product. See `aggregated_jaccard_index` for the arguments
    and errors.

    Returns:
        PQ, SQ, RQ, each in 0..1; 1 where both maps are empty; SQ is nan where nothing matches.
    """
    return _panoptic_quality(_overlaps(prediction, truth))


def object_f1(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray, threshold: float = MATCH_IOU) -> float:
    """F1 over objects, ``2 TP / (2 TP + FP + FN)``, matched where their IoU is above ``threshold``.

    At the default of 0.5 this is RQ, the second factor of `panoptic_quality`. See `aggregated_jaccard_index` for the
    maps and their errors.

    Args:
        prediction: Integer instance map ``(height, width)``, 0 background.
        truth: Integer instance map of the same shape.
        threshold: 0.5 or more, where a match is unique, and below 1.

    Raises:
        ValueError: A map is bad, or the threshold out of its range.
    """
    if not MATCH_IOU <= threshold < 1:
        raise ValueError(f"threshold must lie in 0.5 <= threshold < 1, where matches are unique, got {threshold}.")
    return _f1(_overlaps(prediction, truth), threshold)


def score_instances(prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> InstanceScores:
    """All scores of one image at the cost of one; see `aggregated_jaccard_index` for the arguments and errors."""
    overlaps = _overlaps(prediction, truth)
    return InstanceScores(_aji(overlaps), *_panoptic_quality(overlaps), _f1(overlaps, MATCH_IOU))
