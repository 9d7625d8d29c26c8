"""Instance maps of a dataset: one number for each nucleus, in a folder ``instances`` beside the folder of the masks."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..writing import write_png
from .decode import decode_file
from .find import IMAGE_SUFFIXES, DataError, Sample, shorten, stem_of
from .pairs import Samples
from .protocols import DEFAULT_PROTOCOL, PROTOCOLS, Protocol
from .read import Doubts, check_shape

INSTANCES = "instances"
HIGHEST_NUMBER = np.iinfo(np.uint16).max
MASK_VALUES = ([255], [0, 255])
# Dice of a map's nuclei with the foreground of its mask. On MoNuSeg's test images outlines and stored masks reach 0.93
# to 0.95, outlines moved by 5 pixels down and right 0.52 to 0.64, those of other images 0.09 to 0.28.
USUAL_AGREEMENT, LEAST_AGREEMENT = 0.8, 0.5
# Warnings about maps that may be wrong.
ONE_NUMBER = (
    "{count} instance maps hold one number alone, in several places, which was taken as one nucleus: {paths}. "
    "If they are masks, number the nuclei."
)
LOOSE_FIT = (
    f"{{count}} instance maps fit their masks with a Dice below {USUAL_AGREEMENT}: {{paths}}. "
    "Check that they belong to the same images, are not shifted, and are complete."
)

BOUNDARY_TARGET = "boundary"  # metadata["target"] of a model that was trained on `boundary_target`
BACKGROUND, INTERIOR, BORDER = 0, 1, 2
BOUNDARY_CLASSES = 3
BORDER_WIDTH = 3  # pixels at 40x, chosen with the settings of `uctrans.inference.instances`


def find_instances(samples: Sequence[Sample]) -> dict[str, Path]:
    """Return the files of the instance maps by sample name; samples without a map are left out.

    The map of ``ROOT/masks/NAME.EXT`` is ``ROOT/instances/NAME.EXT``, with any image suffix. Maps of other names are
    ignored, because a split takes only some images of a folder. A file that may be meant for a sample without a map, as
    its suffix or its capitals differ, is ignored with a warning.

    Raises:
        DataError: a sample has two maps.
    """
    names: dict[Path, set[str]] = {}
    for sample in samples:
        if sample.mask is not None:
            names.setdefault(sample.mask.parent, set()).add(sample.name)
    found: dict[str, Path] = {}
    misnamed: list[Path] = []
    for masks, stems in sorted(names.items()):
        folder = masks.parent / INSTANCES
        others: list[Path] = []
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (stem := stem_of(file)) not in stems or file.suffix.lower() not in IMAGE_SUFFIXES:
                others.append(file)
            elif stem in found:
                raise DataError(f"{file}: is an instance map of the same image as {found[stem]}; remove one")
            else:
                found[stem] = file
        without = {stem.casefold() for stem in stems if stem not in found}
        misnamed += [file for file in others if stem_of(file).casefold() in without]
    if misnamed:
        warnings.warn(
            f"Ignored {shorten(misnamed)}: an instance map is an image file (such as PNG) with the name of its mask, "
            "capitals included.",
            stacklevel=2,
        )
    return found


def read_instances(
    path: str | os.PathLike, mask: np.ndarray | None = None, ignored: np.ndarray | None = None
) -> np.ndarray:
    """Read an instance map as (H, W) int32: 0 is background, every other number one nucleus, as in the file.

    Args:
        path: gray image file of 8 or 16 bits.
        mask: label indexes (H, W) of the image, to check that the map belongs to it: both must have the same size, and
            the nuclei must agree with the foreground of the mask, with a Dice of `LEAST_AGREEMENT` or more.
        ignored: pixels to leave out of this check, bool (H, W).

    Raises:
        DataError: the file cannot be read, has colours, is a mask of 0 and 255 (or of 1 bit), which does not tell
            nuclei apart, or does not belong to ``mask``.
    """
    path = Path(path)
    picture = decode_file(path)
    if mask is not None:
        check_shape(path, picture.channels, mask.shape)
    if picture.is_lossy:
        raise DataError(f"{path}: has a lossy compression, which changes numbers; save it as PNG from its source")
    if picture.channels.shape[2] != 1 or picture.alpha is not None:
        raise DataError(
            f"{path}: has colours, alpha or a palette; save an instance map with one number for each nucleus, in one "
            "channel"
        )
    pixels = picture.channels[..., 0]
    if pixels.dtype == bool or np.unique(pixels).tolist() in MASK_VALUES:
        raise DataError(
            f"{path}: is a mask, not an instance map; number the nuclei from 1, or take the file out of {path.parent}"
        )
    if mask is not None and (dice := agreement(pixels, mask, ignored)) < LEAST_AGREEMENT:
        raise DataError(
            f"{path}: is not the instance map of its image, as its nuclei and the foreground of the mask have a Dice "
            f"of {dice:.2f}, below {LEAST_AGREEMENT}; put the right map there, or take the file out of {path.parent}"
        )
    return pixels.astype(np.int32)


def check_truth(
    samples: Samples,
    instance_maps: Mapping[str, Path],
    classes: int = 1,
    palette: str | Sequence | None = None,
    protocol: Protocol = PROTOCOLS[DEFAULT_PROTOCOL],
) -> None:
    """Read every mask and instance map once, so that a bad one is found before any work.

    Args:
        samples: images with masks.
        instance_maps: files of the maps by sample name, see `find_instances`.
        classes: classes of the masks, see :func:`uctrans.data.read_mask`.
        palette: palette of the masks.
        protocol: says which channels and values the images have, and which label to ignore.

    Raises:
        DataError: an image, mask or map cannot be used, or belongs to another image.
    """
    doubts = Doubts()
    for sample in samples:
        _image, mask = sample.read(protocol, classes, palette, Doubts())
        if path := instance_maps.get(sample.name):
            ignored = protocol.ignored(mask)
            doubts.add(find_doubt(read_instances(path, mask, ignored), mask, ignored), path)
    doubts.warn()


def agreement(instances: np.ndarray, mask: np.ndarray, ignored: np.ndarray | None = None) -> float:
    """Return the Dice of the nuclei of an instance map with the foreground of a mask, 1 if both are empty.

    Pixels that are ``ignored``, bool (H, W), are neither.
    """
    nuclei, foreground = instances > 0, mask > 0
    if ignored is not None:
        nuclei, foreground = nuclei & ~ignored, foreground & ~ignored
    total = np.count_nonzero(nuclei) + np.count_nonzero(foreground)
    return 2 * np.count_nonzero(nuclei & foreground) / total if total else 1.0


def find_doubt(instances: np.ndarray, mask: np.ndarray, ignored: np.ndarray | None = None) -> str | None:
    """Return the warning, for `Doubts`, about an instance map that `read_instances` accepted, or None."""
    from scipy import ndimage

    numbers = instances[instances > 0]
    if numbers.size and np.ptp(numbers) == 0 and ndimage.label(instances)[1] > 1:
        return ONE_NUMBER
    return LOOSE_FIT if agreement(instances, mask, ignored) < USUAL_AGREEMENT else None


def write_instances(path: str | os.PathLike, instances: np.ndarray) -> None:
    """Write an integer instance map (H, W) as a 16-bit PNG.

    Raises:
        DataError: a number does not fit into 16 bits.
    """
    lowest, highest = (int(instances.min()), int(instances.max())) if instances.size else (0, 0)
    if lowest < 0 or highest > HIGHEST_NUMBER:
        raise DataError(
            f"{path}: would hold numbers from {lowest} to {highest}, but a 16-bit PNG holds 0 to {HIGHEST_NUMBER}; "
            "number the nuclei from 1, and cut larger images into tiles"
        )
    write_png(Path(path), instances.astype(np.uint16))


def boundary_target(instances: np.ndarray, border_width: int = BORDER_WIDTH) -> np.ndarray:
    """Return the labels that a boundary-aware model is trained on: background, interior and border of every nucleus.

    The border is the part of a nucleus within ``border_width`` pixels of its outline, towards the background and
    towards other nuclei, so it separates nuclei that touch. Where the image cuts a nucleus off there is no border. A
    nucleus too thin for a border of this width keeps its innermost pixels as interior, so none is lost.

    Interior and border together are the foreground of the instance map. It differs from a mask that was not made of the
    same outlines: on MoNuSeg the masks of the authors' split and the filled outlines have a mean Dice of 0.938.

    Args:
        instances: integer instance map (H, W), 0 background.
        border_width: pixels, 1 or more.

    Returns:
        uint8 (H, W) of `BACKGROUND`, `INTERIOR` and `BORDER`.

    Raises:
        ValueError: the map is not two-dimensional, not of integers, or has negative numbers, or the width is below 1.
    """
    from scipy import ndimage
    from skimage.segmentation import find_boundaries, relabel_sequential

    instances = np.asarray(instances)
    if instances.ndim != 2 or not np.issubdtype(instances.dtype, np.integer):
        raise ValueError(
            f"instances: {instances.dtype} of the shape {instances.shape} is not a map of integers (H, W); give one"
        )
    if instances.size and instances.min() < 0:
        raise ValueError(f"instances: holds {instances.min()}; give 0 for background and numbers from 1")
    if border_width < 1:
        raise ValueError(f"border_width={border_width}: is below 1 pixel; give 1 or more")
    nuclei = instances > 0
    rim = find_boundaries(instances, connectivity=1, mode="inner")
    if not rim.any():
        return np.where(nuclei, np.uint8(INTERIOR), np.uint8(BACKGROUND))
    depth = ndimage.distance_transform_edt(~rim) + 1  # the rim itself is the first pixel of the border
    labels = relabel_sequential(instances)[0]
    deepest = ndimage.maximum(depth, labels, np.arange(labels.max() + 1))[labels]
    border = nuclei & (depth <= border_width) & ((deepest > border_width) | (depth < deepest))
    return np.where(border, np.uint8(BORDER), np.where(nuclei, np.uint8(INTERIOR), np.uint8(BACKGROUND)))
