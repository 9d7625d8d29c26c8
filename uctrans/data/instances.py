"""Instance maps of a dataset: one number a nucleus, in a folder ``instances`` beside the folder of the masks."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uctrans.data.errors import DataError
from uctrans.data.files import IMAGE_SUFFIXES, Sample
from uctrans.data.pixels import read_pixels
from uctrans.data.writing import write_png

INSTANCES = "instances"
HIGHEST_NUMBER = np.iinfo(np.uint16).max
MASK_VALUES = ([255], [0, 255])


def find_instances(samples: Sequence[Sample]) -> dict[str, Path]:
    """Files of the instance maps by sample name, of the samples that have one.

    The map of ``ROOT/masks/NAME.EXT`` is ``ROOT/instances/NAME.EXT``, of any image suffix; maps of other names are
    passed over, as a split takes only some of a folder.

    Raises:
        DataError: two maps of one sample.
    """
    names = {(sample.mask.parent.parent / INSTANCES, sample.name) for sample in samples if sample.mask is not None}
    found: dict[str, Path] = {}
    for folder in sorted({folder for folder, _ in names}):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (folder, file.stem) not in names or file.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if file.stem in found:
                raise DataError(f"{found[file.stem]} and {file} are instance maps of one image: remove one of them.")
            found[file.stem] = file
    return found


def read_instances(path: str | os.PathLike, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Read an instance map as (H, W) int32: 0 background, every other number one nucleus, as the file has them.

    Args:
        path: gray image file of 8 or 16 bit.
        shape: (H, W) that the map must have, in pixels.

    Raises:
        DataError: an unreadable file, another size than ``shape``, colours, or a mask of 0 and 255 (or of 1 bit), in
            which nuclei cannot be told apart.
    """
    path = Path(path)
    pixels = read_pixels(path)
    if shape is not None and pixels.shape[:2] != tuple(shape):
        height, width = pixels.shape[:2]
        raise DataError(
            f"The instance map {path} is {height} x {width} pixels (height x width), but its image is {shape[0]} x "
            f"{shape[1]}: the two must have the same size."
        )
    if pixels.ndim != 2:
        raise DataError(f"The instance map {path} has colours: save one number a nucleus in one gray channel.")
    if pixels.dtype == bool or np.unique(pixels).tolist() in MASK_VALUES:
        raise DataError(
            f"{path} is a mask, not an instance map: number the nuclei from 1, or take the file out of {path.parent}."
        )
    return pixels.astype(np.int32)


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
