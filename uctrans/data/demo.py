"""Demonstration dataset: one immunohistochemistry photograph of scikit-image, cut into labelled tiles."""

import os
from pathlib import Path

import numpy as np

from ..writing import write_bytes, write_png
from .find import SPLITS, DataError, shorten

TILE = 128  # pixels
# Row and column of the tiles that are not for training. Both splits show glands and the tissue between them.
VAL_TILES = ((0, 1), (2, 0), (3, 2))
TEST_TILES = ((0, 2), (2, 2), (3, 1))

SMOOTHING = 1.0  # pixels, standard deviation of the Gaussian
DAB_WEIGHT = 0.5  # how much brown counts against blue inside stained cells
MIN_NUCLEUS = 40  # pixels; smaller objects and smaller holes are removed

README = """Demonstration tiles
===================

Source: the photograph that skimage.data.immunohistochemistry() returns, 512 x 512 pixels, part of the scikit-image
package: colonic glands, FHL2 protein in brown (DAB), haematoxylin counterstain in blue; acquired at the Center for
Microscopy And Molecular Imaging (CMMI), no known copyright restrictions.

Labels: made by a computer, not by a pathologist. Foreground are the nuclei stained blue by haematoxylin, in the brown
glands and between them; the brown DAB stain of the cells is background. The stains were separated by colour
deconvolution (skimage.color.rgb2hed), smoothed with a Gaussian, thresholded by Otsu's method, inside brown cells once
more by the excess of blue over brown, opened, and objects and holes below 40 pixels removed. Nuclei that touch are one
object.

Split: sixteen tiles of 128 x 128 pixels that do not overlap, ten for training, three for validation, three for testing,
all from the same photograph. Good for seeing the program at work. A score on these tiles says how well a network copies
this labelling rule and nothing about medicine.
"""


def write_demo_dataset(folder: str | os.PathLike) -> Path:
    """Write the demonstration dataset, {train,val,test}/{images,masks} and README.txt; needs no download.

    Writing again into the same folder gives the same bytes.

    Args:
        folder: a new folder, or one without train, val and test, or one written by this function.

    Returns:
        The folder.

    Raises:
        DataError: the path is a file, or train, val or test hold other files, which would mix with the dataset.
    """
    from skimage.data import immunohistochemistry

    folder = Path(folder)
    tiles = {}
    image = immunohistochemistry()
    mask = label_nuclei(image)
    for row in range(image.shape[0] // TILE):
        for column in range(image.shape[1] // TILE):
            part = np.s_[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            split = "val" if (row, column) in VAL_TILES else "test" if (row, column) in TEST_TILES else "train"
            name = f"tile_{row}{column}.png"
            tiles[folder / split / "images" / name] = image[part]
            tiles[folder / split / "masks" / name] = mask[part] * np.uint8(255)
    _refuse_other_files(folder, set(tiles))
    for path, pixels in tiles.items():
        write_png(path, pixels)
    write_bytes(folder / "README.txt", README.encode())
    return folder


def haematoxylin_image(image: np.ndarray) -> np.ndarray:
    """Return the haematoxylin stain of an image, without its other stains: (H, W, 3) uint8 RGB to (H, W) uint8.

    Nuclei are bright. The gray levels go from the 1st to the 99.7th percentile of the stain.
    """
    from skimage.color import rgb2hed
    from skimage.exposure import rescale_intensity

    stain = rgb2hed(image)[..., 0]
    return rescale_intensity(stain, tuple(np.percentile(stain, (1, 99.7))), (0, 255)).astype(np.uint8)


def label_nuclei(image: np.ndarray) -> np.ndarray:
    """Label haematoxylin-blue nuclei in a DAB-stained image: (H, W, 3) uint8 RGB to (H, W) uint8 of 0 and 1."""
    from skimage.color import rgb2hed
    from skimage.filters import gaussian, threshold_otsu
    from skimage.morphology import disk, opening

    stains = rgb2hed(image)
    haematoxylin, dab = (gaussian(stains[..., channel], SMOOTHING) for channel in (0, 2))
    blue = haematoxylin > threshold_otsu(haematoxylin)
    brown = dab > threshold_otsu(dab)
    # Stained glands are somewhat blue between their nuclei too, so a nucleus is where blue outweighs brown.
    excess = haematoxylin - DAB_WEIGHT * dab
    nuclei = blue & (excess > threshold_otsu(excess[blue & brown]))
    nuclei = _drop_small_regions(opening(nuclei, disk(1)))
    without_holes = ~_drop_small_regions(~nuclei)
    return without_holes.astype(np.uint8)


def _drop_small_regions(mask: np.ndarray) -> np.ndarray:
    from skimage.measure import label

    regions = label(mask, connectivity=1)
    large = np.bincount(regions.ravel()) >= MIN_NUCLEUS
    large[0] = False
    return large[regions]


def _refuse_other_files(folder: Path, ours: set[Path]) -> None:
    if folder.is_file():
        raise DataError(f"{folder}: is a file; choose a folder for the demonstration data")
    present = (path for split in SPLITS for path in (folder / split).rglob("*") if path.is_file())
    others = sorted(path.relative_to(folder) for path in present if path not in ours)
    if others:
        raise DataError(f"{folder}: holds other images ({shorten(others)}); choose a new or empty folder")
