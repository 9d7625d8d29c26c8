"""Single nuclei from probabilities, by distance transform and watershed.

An instance map is int32 ``(H, W)``: 0 background, nuclei 1, 2, ... without gaps. A boundary-aware model has learned
`uctrans.data.boundary_target`: three classes, background, interior and border of nuclei.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

from ..data.instances import BACKGROUND, BOUNDARY_CLASSES, BOUNDARY_TARGET, INTERIOR
from .settings import check_mask_settings

# Chosen on the four annotated training images of MoNuSeg at 40x (nuclei of about 500 pixels, 25 across).
SMALLEST_OBJECT, SEED_DISTANCE = 30, 8
# Of a boundary-aware model, chosen on validation images of the Data Science Bowl 2018: how far the probability of
# interior, smoothed over so many pixels, falls between two nuclei.
SEED_DEPTH, SEED_SMOOTHING = 0.1, 1.0
# Outlines are uneven, and so is the distance to them: without smoothing it has several peaks in one nucleus.
SMOOTHING_PER_SEED_DISTANCE = 0.25
LEVEL_STEP = 0.1  # pixels of distance; smaller differences are rounding and make no peak
ROUNDING = 1e-3  # means over tiles or transforms may leave 0..1 by this much


def is_boundary_aware(model: nn.Module) -> bool:
    """Return whether the model's classes are background, interior and border of nuclei, by its metadata."""
    return model.classes == BOUNDARY_CLASSES and model.metadata.get("target") == BOUNDARY_TARGET


def mask_classes(model: nn.Module) -> int:
    """Return the number of classes of the masks that the model is scored against: 1 if it is boundary-aware."""
    return 1 if is_boundary_aware(model) else model.classes


def mask_probabilities(model: nn.Module, probabilities: Tensor) -> Tensor:
    """Return the model's probabilities ``(B, P, H, W)`` for the classes of its masks.

    For a boundary-aware model this is the probability of nucleus, ``(B, 1, H, W)``; others keep theirs.
    """
    return 1 - probabilities[:, BACKGROUND : BACKGROUND + 1] if is_boundary_aware(model) else probabilities


def instances_of(model: nn.Module, probabilities: Tensor, labels: np.ndarray, config: Any) -> np.ndarray:
    """Return the nuclei that a model predicts.

    Args:
        model: A boundary-aware model gives nuclei from its three probabilities, any other from its foreground.
        probabilities: Output of the model for one image, ``(P, H, W)``.
        labels: Mask made of them, ``(H, W)``, 0 background.
        config: Settings with ``threshold``, ``smallest_object`` and ``seed_distance`` of `to_instances`.

    Returns:
        int32 ``(H, W)``, see `to_instances`.
    """
    if is_boundary_aware(model):
        return to_instances(probabilities, config.threshold, config.smallest_object, config.seed_distance)
    foreground = (labels > 0).astype(np.float32)
    return to_instances(foreground, smallest_object=config.smallest_object, seed_distance=config.seed_distance)


def to_instances(
    probabilities: Tensor | np.ndarray,
    threshold: float = 0.5,
    smallest_object: int = SMALLEST_OBJECT,
    seed_distance: int = SEED_DISTANCE,
) -> np.ndarray:
    """Divide the pixels above ``threshold`` into single nuclei by a watershed from seeds.

    For a binary model, the seeds are the peaks of the distance to the background, smoothed by a Gaussian of a quarter
    of ``seed_distance``. For a boundary-aware model, they are the peaks of the smoothed probability of interior that a
    valley of 0.1 parts from each other, and objects whose mean probability of nucleus is below the middle between
    ``threshold`` and 1 are left out. To seed such a model by distance, pass the result of `nucleus_probability`. A
    connected part without a seed is one nucleus. The same input always gives the same map.

    Args:
        probabilities: Probabilities of one image, see `nucleus_probability`.
        threshold: Probability of nucleus above which a pixel belongs to one, 0..1 exclusive.
        smallest_object: Nuclei of fewer pixels are left out.
        seed_distance: For a binary model, the seeds of one connected part are further apart than this, in pixels:
            about a third of a usual diameter. Larger values part fewer touching nuclei, smaller ones split uneven ones.

    Returns:
        int32 ``(H, W)``: 0 background, nuclei 1, 2, ... without gaps.

    Raises:
        ValueError: A setting is out of its range, or `nucleus_probability` refuses the probabilities.
    """
    check_mask_settings(threshold, smallest_object, seed_distance)
    from skimage.morphology import local_maxima, reconstruction
    from skimage.segmentation import watershed

    probabilities = _checked_probabilities(probabilities)
    nucleus = nucleus_probability(probabilities)
    foreground = nucleus > threshold
    is_boundary_aware = len(probabilities) == BOUNDARY_CLASSES
    if is_boundary_aware:
        height = _smoothed(probabilities[INTERIOR], SEED_SMOOTHING) * foreground
        summits = local_maxima(reconstruction(height - SEED_DEPTH, height))
        seeds = _connected_parts(summits & foreground, connectivity=2)
    else:
        height = _smoothed(_distance(foreground), seed_distance * SMOOTHING_PER_SEED_DISTANCE)
        seeds = _peaks(height, foreground, seed_distance)
    seeds = _with_unseeded_parts(seeds, foreground)
    nuclei = watershed(-height, seeds, mask=foreground)
    areas = np.bincount(nuclei.reshape(-1))
    is_kept = areas >= max(smallest_object, 1)
    if is_boundary_aware:
        total = np.bincount(nuclei.reshape(-1), weights=nucleus.reshape(-1).astype(np.float64))
        is_kept &= total >= (1 + threshold) / 2 * areas
    is_kept[0] = False
    return (np.cumsum(is_kept) * is_kept).astype(np.int32)[nuclei]


def nucleus_probability(probabilities: Tensor | np.ndarray) -> np.ndarray:
    """Return the probability of nucleus, float32 ``(H, W)``, from the output of a binary or a boundary-aware model.

    Args:
        probabilities: ``(H, W)`` or ``(1, H, W)`` of nucleus; or ``(3, H, W)`` of background, interior and border,
            where everything but background is nucleus.

    Raises:
        ValueError: The shape is another, or the values are not finite floating-point numbers in 0..1.
    """
    probabilities = _checked_probabilities(probabilities)
    return probabilities[0] if len(probabilities) == 1 else 1 - probabilities[BACKGROUND]


def _checked_probabilities(probabilities: Tensor | np.ndarray) -> np.ndarray:
    """Return float32 ``(1, H, W)`` or ``(3, H, W)``."""
    if isinstance(probabilities, Tensor):
        probabilities = probabilities.detach().float().cpu().numpy()
    probabilities = np.asarray(probabilities)
    if probabilities.ndim == 2:
        probabilities = probabilities[None]
    if probabilities.ndim != 3 or len(probabilities) not in (1, BOUNDARY_CLASSES) or probabilities.size == 0:
        raise ValueError(
            f"probabilities: got the shape {probabilities.shape}; give those of one image as (H, W), (1, H, W) or "
            "(3, H, W) for background, interior and border"
        )
    if not np.issubdtype(probabilities.dtype, np.floating):
        raise ValueError(f"probabilities: got {probabilities.dtype}; give floating-point numbers in 0..1")
    if not (probabilities.min() >= -ROUNDING and probabilities.max() <= 1 + ROUNDING):
        raise ValueError("probabilities: some are not in 0..1; apply the sigmoid or softmax first")
    return probabilities.astype(np.float32, copy=False).clip(0, 1)


def _connected_parts(mask: np.ndarray, connectivity: int = 1) -> np.ndarray:
    from skimage.measure import label

    return label(mask, connectivity=connectivity)


def _distance(mask: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel to the nearest one outside the mask; 0 everywhere if there is none outside."""
    from scipy import ndimage

    return np.zeros(mask.shape) if mask.all() else ndimage.distance_transform_edt(mask)


def _smoothed(height: np.ndarray, deviation: float) -> np.ndarray:
    from scipy import ndimage

    return ndimage.gaussian_filter(height, deviation)


def _peaks(height: np.ndarray, mask: np.ndarray, seed_distance: int) -> np.ndarray:
    """Return the highest points of the mask's connected parts, numbered from 1; a level ridge has one number."""
    from skimage.feature import peak_local_max
    from skimage.measure import label

    parts = _connected_parts(mask)
    position = tuple(peak_local_max(height, min_distance=seed_distance, exclude_border=False, labels=parts).T)
    levels = label(np.rint(height / LEVEL_STEP).astype(np.int32) + 1, connectivity=2)
    ridges = np.stack([parts[position], levels[position]])
    seeds = np.zeros(height.shape, dtype=np.int32)
    seeds[position] = np.unique(ridges, axis=1, return_inverse=True)[1].reshape(-1) + 1
    return seeds


def _with_unseeded_parts(seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the seeds and, as further seeds, the connected parts of the mask that have none."""
    parts = _connected_parts(mask)
    is_seeded = np.zeros(parts.max() + 1, dtype=bool)
    is_seeded[parts[seeds > 0]] = True
    return np.where((parts > 0) & ~is_seeded[parts], parts + seeds.max(), seeds)
