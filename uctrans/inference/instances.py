"""Single nuclei from probabilities by distance transform and watershed.

An instance map is int32 ``(H, W)``: 0 background, nuclei 1, 2, ... without gaps. A boundary-aware model has learned
`uctrans.data.boundary_target`.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

from uctrans.data.instances import BACKGROUND, BORDER, BOUNDARY_CLASSES, BOUNDARY_TARGET, INTERIOR

# Chosen on the four annotated training images of MoNuSeg at 40x (nuclei of about 500 pixels, 25 across).
SMALLEST_OBJECT, SEED_DISTANCE = 30, 8
# Of the interior, which is the nucleus less its border: this is left of a nucleus of 50 pixels. On the same images a
# perfect target gives a mean AJI of 0.997 at any value of 3 to 30. Crowds of small nuclei ask for less, noise for more.
SMALLEST_SEED = 5
# Outlines are uneven, and so is the distance to them: unsmoothed it has several peaks a nucleus.
SMOOTHING_PER_SEED_DISTANCE = 0.25
LEVEL_STEP = 0.1  # pixels of distance: less than that is rounding, and no peak
ROUNDING = 1e-3  # sums of several tiles or transforms may leave 0..1 by a little


def is_boundary_aware(model: nn.Module) -> bool:
    """Whether the model's three classes are background, interior and border of nuclei, by its metadata."""
    return model.classes == BOUNDARY_CLASSES and model.metadata.get("target") == BOUNDARY_TARGET


def mask_classes(model: nn.Module) -> int:
    """Classes of the masks that the model is scored against: 1 where it is boundary-aware, else its own."""
    return 1 if is_boundary_aware(model) else model.classes


def mask_probabilities(model: nn.Module, probabilities: Tensor) -> Tensor:
    """The model's probabilities ``(B, P, H, W)`` by the classes of its masks: of nucleus ``(B, 1, H, W)`` where it is
    boundary-aware, else as they are.
    """
    return 1 - probabilities[:, BACKGROUND : BACKGROUND + 1] if is_boundary_aware(model) else probabilities


def nucleus_probability(probabilities: Tensor | np.ndarray) -> np.ndarray:
    """Probability of nucleus, float32 ``(H, W)``, of the output of a binary or a boundary-aware model.

    Args:
        probabilities: ``(H, W)`` or ``(1, H, W)`` of nucleus; or ``(3, H, W)`` of background, interior and border,
            where nucleus is what is not background.

    Raises:
        ValueError: Another shape, or values that are not finite floating-point numbers of 0..1.
    """
    probabilities = _checked_probabilities(probabilities)
    return probabilities[0] if len(probabilities) == 1 else 1 - probabilities[BACKGROUND]


def to_instances(
    probabilities: Tensor | np.ndarray,
    threshold: float = 0.5,
    smallest_object: int = SMALLEST_OBJECT,
    seed_distance: int = SEED_DISTANCE,
) -> np.ndarray:
    """Single nuclei by distance transform and watershed.

    A watershed divides the pixels above ``threshold`` among seeds. Of a binary model the seeds are the peaks of the
    distance to the background, smoothed by a Gaussian of a quarter of ``seed_distance``. Of a boundary-aware model they
    are the connected parts of the interior, which a border keeps apart where nuclei touch, and they grow over interior
    and border; to seed these by distance all the same, pass what `nucleus_probability` makes of them. A connected part
    without a seed is one nucleus. The same input always gives the same map.

    Args:
        probabilities: Of one image, see `nucleus_probability`.
        threshold: Probability of nucleus above which a pixel belongs to one, 0..1 exclusive.
        smallest_object: Nuclei of fewer pixels are left out. An interior is smaller than its nucleus: to be a seed it
            needs 5 pixels, or as many as this where that is fewer.
        seed_distance: Of a binary model, seeds of one connected part lie further apart than this, in pixels: about a
            third of a usual nucleus's diameter. Larger parts fewer nuclei that touch, smaller splits uneven ones.

    Returns:
        int32 ``(H, W)``: 0 background, nuclei 1, 2, ... without gaps.

    Raises:
        ValueError: A setting out of its range, or probabilities that `nucleus_probability` refuses.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}.")
    if smallest_object < 0:
        raise ValueError(f"smallest_object must be 0 or more pixels, got {smallest_object}.")
    if seed_distance < 1:
        raise ValueError(f"seed_distance must be 1 pixel or more, got {seed_distance}.")
    from skimage.segmentation import watershed

    probabilities = _checked_probabilities(probabilities)
    foreground = nucleus_probability(probabilities) > threshold
    if len(probabilities) == BOUNDARY_CLASSES:
        interior = foreground & (probabilities[INTERIOR] > probabilities[BORDER])
        height = _distance(interior)
        seeds = _without_small(_connected_parts(interior), min(SMALLEST_SEED, smallest_object))
    else:
        height = _smoothed(_distance(foreground), seed_distance * SMOOTHING_PER_SEED_DISTANCE)
        seeds = _peaks(height, foreground, seed_distance)
    seeds = _with_unseeded_parts(seeds, foreground)
    return _without_small(watershed(-height, seeds, mask=foreground), smallest_object)


def instances_of(model: nn.Module, probabilities: Tensor, labels: np.ndarray, config: Any) -> np.ndarray:
    """Instances that a model predicts: of a boundary-aware one from its three probabilities, else of its foreground.

    Args:
        model: decides which.
        probabilities: its output for one image, ``(P, H, W)``.
        labels: the mask made of them, ``(H, W)``, 0 background.
        config: settings with ``threshold``, ``smallest_object`` and ``seed_distance`` of `to_instances`.

    Returns:
        int32 ``(H, W)``, see `to_instances`.
    """
    if is_boundary_aware(model):
        return to_instances(probabilities, config.threshold, config.smallest_object, config.seed_distance)
    foreground = (labels > 0).astype(np.float32)
    return to_instances(foreground, smallest_object=config.smallest_object, seed_distance=config.seed_distance)


def _checked_probabilities(probabilities: Tensor | np.ndarray) -> np.ndarray:
    """``(1, H, W)`` or ``(3, H, W)``, float32."""
    if isinstance(probabilities, Tensor):
        probabilities = probabilities.detach().float().cpu().numpy()
    probabilities = np.asarray(probabilities)
    if probabilities.ndim == 2:
        probabilities = probabilities[None]
    if probabilities.ndim != 3 or len(probabilities) not in (1, BOUNDARY_CLASSES) or probabilities.size == 0:
        raise ValueError(
            "Probabilities of one image have the shape (H, W), (1, H, W) or (3, H, W) for background, interior and "
            f"border, got {probabilities.shape}."
        )
    if not np.issubdtype(probabilities.dtype, np.floating):
        raise ValueError(f"Probabilities are floating-point numbers, got {probabilities.dtype}.")
    if not (probabilities.min() >= -ROUNDING and probabilities.max() <= 1 + ROUNDING):
        raise ValueError("Probabilities lie in 0..1: apply the sigmoid or softmax first.")
    return probabilities.astype(np.float32, copy=False).clip(0, 1)


def _connected_parts(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return ndimage.label(mask)[0]


def _distance(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest one outside the mask; zero everywhere where there is none outside."""
    from scipy import ndimage

    return np.zeros(mask.shape) if mask.all() else ndimage.distance_transform_edt(mask)


def _smoothed(height: np.ndarray, deviation: float) -> np.ndarray:
    from scipy import ndimage

    return ndimage.gaussian_filter(height, deviation)


def _peaks(height: np.ndarray, mask: np.ndarray, seed_distance: int) -> np.ndarray:
    """The highest points of the mask's connected parts, numbered from 1, those of one level ridge alike."""
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
    """The seeds, and as one seed more each connected part of the mask that has none."""
    parts = _connected_parts(mask)
    is_seeded = np.zeros(parts.max() + 1, dtype=bool)
    is_seeded[parts[seeds > 0]] = True
    return np.where((parts > 0) & ~is_seeded[parts], parts + seeds.max(), seeds)


def _without_small(labels: np.ndarray, smallest_object: int) -> np.ndarray:
    """The objects of enough pixels, numbered without gaps: int32 ``(H, W)``."""
    areas = np.bincount(labels.reshape(-1))
    kept = (areas >= max(smallest_object, 1)) & (np.arange(len(areas)) > 0)
    return (np.cumsum(kept) * kept).astype(np.int32)[labels]
