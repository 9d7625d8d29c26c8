"""Instance maps of a dataset: one number a nucleus, in a folder ``instances`` beside the folder of the masks."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uctrans.data.errors import DataError, shorten
from uctrans.data.files import IMAGE_SUFFIXES, Sample
from uctrans.data.images import decode_mask, read_image
from uctrans.data.pixels import read_pixels
from uctrans.writing import write_png

INSTANCES = "instances"
HIGHEST_NUMBER = np.iinfo(np.uint16).max
MASK_VALUES = ([255], [0, 255])
# Dice of a map's nuclei with the foreground of its mask. On MoNuSeg's test images outlines and stored masks reach 0.93
# to 0.95, outlines moved by 5 pixels down and right 0.52 to 0.64, those of other images 0.09 to 0.28.
USUAL_AGREEMENT, LEAST_AGREEMENT = 0.8, 0.5
# Why a map may not be what it was taken for: what was found in it, and the remedy.
DOUBTS = {
    "one number": (
        "hold one number alone, in several places, and it was taken as one nucleus",
        "If they are masks, number the nuclei.",
    ),
    "loose fit": (
        f"fit their masks with a Dice below {USUAL_AGREEMENT}",
        "See whether they are of the same images, and neither shifted nor incomplete.",
    ),
}


def find_instances(samples: Sequence[Sample]) -> dict[str, Path]:
    """Files of the instance maps by sample name, of the samples that have one.

    The map of ``ROOT/masks/NAME.EXT`` is ``ROOT/instances/NAME.EXT``, of any image suffix; maps of other names are
    passed over, as a split takes only some of a folder. A file that may be meant for a sample without a map, of another
    suffix or with other capitals, is passed over with a warning.

    Raises:
        DataError: two maps of one sample.
    """
    names = {(sample.mask.parent.parent / INSTANCES, sample.name) for sample in samples if sample.mask is not None}
    found: dict[str, Path] = {}
    others: list[Path] = []
    for folder in sorted({folder for folder, _ in names}):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (folder, file.stem) not in names or file.suffix.lower() not in IMAGE_SUFFIXES:
                others.append(file)
                continue
            if file.stem in found:
                raise DataError(f"{found[file.stem]} and {file} are instance maps of one image: remove one of them.")
            found[file.stem] = file
    without = {(folder, name.casefold()) for folder, name in names if name not in found}
    misnamed = [file for file in others if (file.parent, file.stem.casefold()) in without]
    if misnamed:
        warnings.warn(
            f"Passed over {shorten(misnamed)}: an instance map is an image file (such as PNG) with the name of its "
            "mask, capitals included.",
            stacklevel=2,
        )
    return found


def read_instances(path: str | os.PathLike, mask: np.ndarray | None = None) -> np.ndarray:
    """Read an instance map as (H, W) int32: 0 background, every other number one nucleus, as the file has them.

    Args:
        path: gray image file of 8 or 16 bit.
        mask: label indexes (H, W) of the image that the map belongs to, which it is held against: the two must have the
            same size, and the nuclei must lie where the mask is above 0, with a Dice of `LEAST_AGREEMENT` or more.

    Raises:
        DataError: an unreadable file, colours, a mask of 0 and 255 (or of 1 bit), in which nuclei cannot be told apart,
            or a map that is not that of ``mask``.
    """
    path = Path(path)
    pixels = read_pixels(path)
    if mask is not None and pixels.shape[:2] != mask.shape:
        height, width = pixels.shape[:2]
        raise DataError(
            f"The instance map {path} is {height} x {width} pixels (height x width), but its image is {mask.shape[0]} "
            f"x {mask.shape[1]}: the two must have the same size."
        )
    if pixels.ndim != 2:
        raise DataError(f"The instance map {path} has colours: save one number a nucleus in one gray channel.")
    if pixels.dtype == bool or np.unique(pixels).tolist() in MASK_VALUES:
        raise DataError(
            f"{path} is a mask, not an instance map: number the nuclei from 1, or take the file out of {path.parent}."
        )
    if mask is not None and (dice := agreement(pixels, mask)) < LEAST_AGREEMENT:
        raise DataError(
            f"The instance map {path} is not that of its image: its nuclei and the foreground of the mask have a Dice "
            f"of {dice:.2f}, below {LEAST_AGREEMENT}. Put the right map there, or take the file out of {path.parent}."
        )
    return pixels.astype(np.int32)


def check_truth(
    samples: Sequence[Sample],
    instance_maps: Mapping[str, Path],
    classes: int = 1,
    palette: str | Sequence | None = None,
) -> None:
    """Read every mask and instance map once, so that a bad one is told before the work and not in its midst.

    Args:
        samples: images with masks.
        instance_maps: files of the maps by sample name, see `find_instances`.
        classes: of the masks, see :func:`uctrans.data.read_mask`.
        palette: of the masks likewise.

    Raises:
        DataError: an unreadable image, or a mask or map that is refused or belongs to another image.
    """
    paths_by_doubt: dict[str, list[Path]] = {}
    for sample in samples:
        mask, _ = decode_mask(sample.mask, classes, palette, read_image(sample.image).shape[:2])
        path = instance_maps.get(sample.name)
        if path is not None and (doubt := doubt_of(read_instances(path, mask), mask)):
            paths_by_doubt.setdefault(doubt, []).append(path)
    warn_of_doubtful_instances(paths_by_doubt)


def agreement(instances: np.ndarray, mask: np.ndarray) -> float:
    """Dice of the nuclei of an instance map with the foreground of a mask, 1 where both are empty."""
    nuclei, foreground = instances > 0, mask > 0
    total = np.count_nonzero(nuclei) + np.count_nonzero(foreground)
    return 2 * np.count_nonzero(nuclei & foreground) / total if total else 1.0


def doubt_of(instances: np.ndarray, mask: np.ndarray) -> str | None:
    """What makes an instance map that `read_instances` took doubtful beside its mask, a key of `DOUBTS`, or None."""
    from scipy import ndimage

    numbers = instances[instances > 0]
    if numbers.size and np.ptp(numbers) == 0 and ndimage.label(instances)[1] > 1:
        return "one number"
    return "loose fit" if agreement(instances, mask) < USUAL_AGREEMENT else None


def warn_of_doubtful_instances(paths_by_doubt: Mapping[str, Sequence[Path]]) -> None:
    """Give one warning for each kind of doubt (see `DOUBTS`) about instance maps."""
    for doubt, paths in paths_by_doubt.items():
        finding, remedy = DOUBTS[doubt]
        warnings.warn(f"{len(paths)} instance maps {finding}: {shorten(paths)}. {remedy}", stacklevel=3)


def write_instances(path: str | os.PathLike, instances: np.ndarray) -> None:
    """Write an integer instance map (H, W) as a 16-bit PNG.

    Raises:
        DataError: numbers that 16 bit cannot hold.
    """
    lowest, highest = (int(instances.min()), int(instances.max())) if instances.size else (0, 0)
    if lowest < 0 or highest > HIGHEST_NUMBER:
        raise DataError(
            f"The instance map {path} would hold numbers from {lowest} to {highest}, a 16-bit PNG holds 0 to "
            f"{HIGHEST_NUMBER}: number the nuclei from 1, and cut larger images into tiles."
        )
    write_png(Path(path), instances.astype(np.uint16))
