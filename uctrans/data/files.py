"""Find images and masks in a folder and pair them by stem.

Three layouts are understood::

    ROOT/{train,val,test}/{images,masks}/NAME.EXT
    ROOT/{images,masks}/NAME.EXT                                 one folder, split by a seed
    ROOT/{Train,Val,Test}_Folder/{img,labelcol}/NAME.EXT         as published with UCTransNet
"""

import os
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from uctrans.data.errors import DataError, shorten

SPLITS = ("train", "val", "test")
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on
LAYOUTS = (
    "understood layouts: {train,val,test}/{images,masks}, or images + masks side by side, "
    "or {Train,Val,Test}_Folder/{img,labelcol}"
)


@dataclass(frozen=True)
class Sample:
    """An image file and, where there is one, its mask; ``name`` is their common stem."""

    name: str
    image: Path
    mask: Path | None


def find_samples(
    root: str | os.PathLike,
    split: str | None = None,
    *,
    require_masks: bool = True,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> list[Sample]:
    """Images and masks of one split of a dataset folder, sorted by name.

    In a folder of ``images`` + ``masks`` a split is drawn: the names are sorted, shuffled with ``seed``, and the first
    ``test_fraction`` and next ``val_fraction`` of them (rounded, but at least one where the fraction is above zero) are
    test and val; ``split=None`` gives all of them. A folder that comes split ignores fractions and seed, and there
    ``split`` must be given.

    Args:
        root: dataset folder in one of the layouts of this module.
        split: "train", "val", "test" or None.
        require_masks: False lets images without a mask pass, with ``mask=None``.
        val_fraction: share of a flat folder that is val, 0 to 1.
        test_fraction: share of a flat folder that is test, 0 to 1.
        seed: decides the split of a flat folder.

    Raises:
        DataError: a missing or empty folder, an image without a mask or a mask without an image, two images of one
            stem, or a split that would be empty.
    """
    root = Path(root)
    if split is not None and split not in SPLITS:
        raise DataError(f"Unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; {LAYOUTS}.")
    folders = _split_folders(root)
    if folders:
        if split is None:
            raise DataError(f"{root} comes split into {', '.join(folders)}: say which split to take.")
        if split not in folders:
            raise DataError(f"{root} has no folder for the split {split!r}, only {', '.join(folders)}; {LAYOUTS}.")
        return _pair(*folders[split], require_masks)
    if not (root / "images").is_dir():
        raise DataError(f"{root} holds no dataset; {LAYOUTS}.")
    samples = _pair(root / "images", root / "masks", require_masks)
    if split is None:
        return samples
    chosen = _draw_split([sample.name for sample in samples], val_fraction, test_fraction, seed)[split]
    if not chosen:
        raise DataError(
            f"{root} has {len(samples)} images, too few to put any into {split!r} with val_fraction={val_fraction} and "
            f"test_fraction={test_fraction}: add images or change the fractions."
        )
    return [sample for sample in samples if sample.name in chosen]


def find_development_samples(
    root: str | os.PathLike, *, val_fraction: float = 0.2, test_fraction: float = 0.2, seed: int = 0
) -> list[Sample]:
    """All samples that folds may use, sorted by name: train and val together.

    In a folder of ``images`` + ``masks`` these are all but the test images that :func:`find_samples` draws with the
    same fractions and seed, so that no fold trains on an image that is scored later.

    Raises:
        DataError: as :func:`find_samples`, a flat folder of test images alone, or a name that is in train and in val.
    """
    root = Path(root)
    if not _split_folders(root):
        samples = find_samples(root)
        test = _draw_split([sample.name for sample in samples], val_fraction, test_fraction, seed)["test"]
        if len(test) == len(samples):
            raise DataError(f"{root} has {len(samples)} images, all of them for testing: add images.")
        return [sample for sample in samples if sample.name not in test]
    return _of_several_splits(root, ("train", "val"))


def find_all_samples(root: str | os.PathLike) -> list[Sample]:
    """All samples of a dataset folder, of whatever splits it has, sorted by name.

    Raises:
        DataError: as :func:`find_samples`, or a name that is in two splits.
    """
    folders = _split_folders(Path(root)) if Path(root).is_dir() else {}
    return _of_several_splits(root, folders) if folders else find_samples(root)


def _of_several_splits(root: str | os.PathLike, splits: Iterable[str]) -> list[Sample]:
    by_name: dict[str, Sample] = {}
    for split in splits:
        for sample in find_samples(root, split):
            if sample.name in by_name:
                raise DataError(f"{by_name[sample.name].image} and {sample.image} share a name: rename one.")
            by_name[sample.name] = sample
    return [by_name[name] for name in sorted(by_name)]


def drawn_from(root: str | os.PathLike) -> int | None:
    """How many images a folder has whose splits are drawn; None where it comes split."""
    return None if _split_folders(Path(root)) else len(find_samples(root))


def find_images(path: str | os.PathLike) -> list[Sample]:
    """One image file, or all images of a folder sorted by name, as samples without masks.

    Raises:
        DataError: a missing path, a file that is no image, an empty folder, or two images of one stem.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{path} is not an image by its extension; known are {' '.join(sorted(IMAGE_SUFFIXES))}.")
        return [Sample(path.stem, path, None)]
    if not path.is_dir():
        raise DataError(f"{path} does not exist: give an image file or a folder of images.")
    return [Sample(name, image, None) for name, image in list_images(path).items()]


def list_images(folder: Path, *, companions: frozenset[str] = frozenset()) -> dict[str, Path]:
    """Image files of one folder by stem, sorted.

    Hidden files are passed over in silence, other files that are no images with one warning, except those whose suffix
    is in ``companions`` (files that belong there).

    Raises:
        DataError: no image in the folder, or two of one stem.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES]
    strays = [entry.name for entry in entries if entry not in files and entry.suffix.lower() not in companions]
    if strays:
        warnings.warn(f"Not images, ignored in {folder}: {shorten(strays)}.", stacklevel=2)
    if not files:
        raise DataError(f"{folder} holds no image; known extensions are {' '.join(sorted(IMAGE_SUFFIXES))}.")
    by_stem: dict[str, Path] = {}
    for file in files:
        if file.stem in by_stem:
            raise DataError(
                f"{by_stem[file.stem]} and {file.name} share a stem, so their results would share a name: rename one."
            )
        by_stem[file.stem] = file
    return dict(sorted(by_stem.items()))


def _split_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Image and mask folders by split; empty where ``root`` does not come split."""
    plain = {split: (root / split / "images", root / split / "masks") for split in SPLITS}
    published = {split: (root / f"{split.title()}_Folder", "img", "labelcol") for split in SPLITS}
    published = {split: (folder / images, folder / masks) for split, (folder, images, masks) in published.items()}
    for candidates in (plain, published):
        present = {split: folders for split, folders in candidates.items() if folders[0].parent.is_dir()}
        if present:
            return present
    return {}


def _pair(images: Path, masks: Path, require_masks: bool) -> list[Sample]:
    if not images.is_dir():
        raise DataError(f"{images} is missing; {LAYOUTS}.")
    image_files = list_images(images)
    if not masks.is_dir():
        if require_masks:
            raise DataError(f"{masks} is missing: put one mask for each image there, with the same stem; {LAYOUTS}.")
        return [Sample(name, image, None) for name, image in image_files.items()]
    mask_files = list_images(masks)
    without_mask = [name for name in image_files if name not in mask_files] if require_masks else []
    without_image = [name for name in mask_files if name not in image_files]
    if without_mask or without_image:
        raise DataError(
            f"Images and masks do not pair by stem. Without a mask in {masks}: {shorten(without_mask) or 'none'}. "
            f"Without an image in {images}: {shorten(without_image) or 'none'}. Add, rename or remove these files."
        )
    return [Sample(name, image, mask_files.get(name)) for name, image in image_files.items()]


def _draw_split(names: list[str], val_fraction: float, test_fraction: float, seed: int) -> dict[str, set[str]]:
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise DataError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing to train on: "
            "both must be 0 or more and their sum below 1."
        )
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    test_count, val_count = (
        max(1, round(fraction * len(names))) if fraction else 0 for fraction in (test_fraction, val_fraction)
    )
    return {
        "test": set(shuffled[:test_count]),
        "val": set(shuffled[test_count : test_count + val_count]),
        "train": set(shuffled[test_count + val_count :]),
    }
