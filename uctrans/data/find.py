"""Find images and masks in a folder and pair them by stem.

A dataset folder has one of three layouts::

    ROOT/{train,val,test}/{images,masks}/NAME.EXT
    ROOT/{images,masks}/NAME.EXT                                 one folder, split by a seed
    ROOT/{Train,Val,Test}_Folder/{img,labelcol}/NAME.EXT         as published with UCTransNet

A dataset that comes without the folder for validation, such as GlaS, has it drawn from the folder for training.
"""

import os
import random
import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..system import escaped, is_utf8

SPLITS = ("train", "val", "test")
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on
LAYOUTS = (
    "a dataset folder holds {train,val,test}/{images,masks}, or images and masks side by side, "
    "or {Train,Val,Test}_Folder/{img,labelcol}"
)


class DataError(ValueError):
    """A file, folder or setting of a dataset cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Sample:
    """An image file and its mask file, or None without a mask; ``name`` is their common stem."""

    name: str
    image: Path
    mask: Path | None

    def read(self, protocol: Any, classes: int, palette: Any, doubts: Any) -> tuple[Any, Any]:
        """Read image and mask, (H, W, C) and (H, W) uint8, as a :class:`uctrans.data.Protocol` does.

        Raises:
            DataError: there is no mask, or a file cannot be used.
        """
        if self.mask is None:
            raise DataError(f"{self.image}: has no mask; training and scores need one for each image")
        image = protocol.read_image(self.image, doubts)
        return image, protocol.read_mask(self.mask, classes, palette, image.shape[:2], doubts)


def find_samples(
    root: str | os.PathLike,
    split: str | None = None,
    *,
    require_masks: bool = True,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> list[Sample]:
    """Return the images and masks of one split of a dataset folder, sorted by name.

    A folder of ``images`` and ``masks`` is split here: the names are sorted and shuffled with ``seed``; the first
    ``test_fraction`` of them are for testing and the next ``val_fraction`` for validation, both rounded, but at least
    one image for a fraction above zero. ``split=None`` returns all images. A folder that comes split ignores fractions
    and seed, and needs ``split``; but without a folder for validation, ``val_fraction`` of the training images are
    drawn for it, by ``seed``.

    Args:
        root: dataset folder in one of the layouts of this module.
        split: "train", "val", "test" or None.
        require_masks: False accepts images without a mask, with ``mask=None``.
        val_fraction: share of an unsplit folder for validation, 0 to 1.
        test_fraction: share of an unsplit folder for testing, 0 to 1.
        seed: decides the split of an unsplit folder.

    Raises:
        DataError: a folder is missing or empty, an image has no mask or a mask no image, two images share a stem, or
            the split would be empty.
    """
    root = Path(root)
    if split is not None and split not in SPLITS:
        raise DataError(f"split: {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if not root.is_dir():
        raise DataError(f"{root}: {missing_target(root) or f'is not a folder; {LAYOUTS}'}")
    folders = _split_folders(root)
    if folders:
        if split is None:
            raise DataError(f"{root}: comes split into {', '.join(folders)}; say which split to take")
        if split in ("train", "val") and _lacks_val(folders):
            _check_for_other_names(root, folders["train"][0].parent)
            samples = _pair(*folders["train"], require_masks)
            return _drawn(root, samples, split, val_fraction, 0, seed)
        if split not in folders:
            raise DataError(f"{root}: has no folder for the split {split!r}, only {', '.join(folders)}; {LAYOUTS}")
        return _pair(*folders[split], require_masks)
    if not (root / "images").is_dir():
        raise DataError(f"{root}: holds no dataset; {LAYOUTS}")
    samples = _pair(root / "images", root / "masks", require_masks)
    return samples if split is None else _drawn(root, samples, split, val_fraction, test_fraction, seed)


def find_development_samples(
    root: str | os.PathLike, *, val_fraction: float = 0.2, test_fraction: float = 0.2, seed: int = 0
) -> list[Sample]:
    """Return the samples that folds may use, those of train and val, sorted by name.

    In a folder of ``images`` and ``masks`` they are all but the test images that :func:`find_samples` draws with the
    same fractions and seed, so no fold trains on an image that is scored later.

    Raises:
        DataError: as :func:`find_samples`; or an unsplit folder has test images alone, or a name is in train and val.
    """
    if _comes_split(root):
        return _find_in_splits(root, ("train", "val"))
    samples = find_samples(root)
    test = _draw_split(samples, val_fraction, test_fraction, seed)["test"]
    if len(test) == len(samples):
        raise DataError(f"{root}: has {len(samples)} images, all of them for testing; add images")
    return [sample for sample in samples if sample.name not in test]


def find_all_samples(root: str | os.PathLike) -> list[Sample]:
    """Return the samples of all splits of a dataset folder, sorted by name.

    Raises:
        DataError: as :func:`find_samples`, or a name is in two splits.
    """
    if not _comes_split(root):
        return find_samples(root)
    folders = _split_folders(Path(root))
    return _find_in_splits(root, [*folders, "val"] if _lacks_val(folders) else folders)


def describe_draw(root: str | os.PathLike, split: str, count: int) -> str | None:
    """Return in words from how many images the ``count`` ones of a split are drawn, or None if the split is a folder.

    Args:
        root: dataset folder.
        split: "train", "val" or "test".
        count: number of its images.
    """
    folders = _split_folders(Path(root))
    if folders and (split == "test" or not _lacks_val(folders)):
        return None
    with warnings.catch_warnings(action="ignore"):  # of files that are not images, which were given before
        if not folders:
            return f"{root} comes unsplit: {count} of its {len(find_samples(root))} images are drawn for {split}"
        train = folders["train"][0]
        total = len(list_images(train))
    return f"{root} comes without a folder for val: {count} of the {total} images in {train} are drawn for {split}"


def find_images(path: str | os.PathLike) -> list[Sample]:
    """Return one image file, or all images of a folder sorted by name, as samples without masks.

    Raises:
        DataError: the path is missing, a file that is no image or an empty folder, or two images share a stem.
    """
    path = Path(path)
    if problem := missing_target(path):
        raise DataError(f"{path}: {problem}")
    if path.is_dir():
        return [Sample(name, image, None) for name, image in list_images(path).items()]
    if not path.exists():
        raise DataError(f"{path}: does not exist; name an image file or a folder of images")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise DataError(f"{path}: is not an image by its extension; use {_suffixes()}")
    return [Sample(stem_of(path), path, None)]


def list_images(folder: Path, *, companions: frozenset[str] = frozenset()) -> dict[str, Path]:
    """Return the image files of one folder by stem, sorted; see `stem_of`.

    Hidden files are ignored. One warning names all other files that are not images, except those with a suffix in
    ``companions``, which belong there.

    Raises:
        DataError: the folder cannot be listed, holds no image, two of one stem, a name that is not UTF-8, or a link to
            an image that is not there.
    """
    files, strays, broken = [], [], []
    for name, is_file in _list_names(folder):
        file = folder / name
        suffix = file.suffix.lower()
        if suffix in IMAGE_SUFFIXES and is_file:
            files.append(file)
        elif suffix in IMAGE_SUFFIXES and missing_target(file):
            broken.append(file)
        elif suffix not in companions:
            strays.append(name)
    if broken:
        others = f" ({len(broken)} such links in the folder)" if len(broken) > 1 else ""
        raise DataError(f"{broken[0]}: {missing_target(broken[0])}{others}")
    if strays:
        warnings.warn(f"{folder}: ignored files that are not images: {shorten(strays)}", stacklevel=2)
    if not files:
        raise DataError(f"{folder}: holds no image; use {_suffixes()}")
    by_stem: dict[str, Path] = {}
    for file in files:
        if (stem := stem_of(file)) in by_stem:
            raise DataError(
                f"{by_stem[stem]}: shares its stem with {file.name}, so their results would share a name; rename one"
            )
        by_stem[stem] = file
    return dict(sorted(by_stem.items()))


def _list_names(folder: Path) -> list[tuple[str, bool]]:
    """Return the names in a folder that are not hidden, sorted, and whether each is that of a file or a link to one."""
    try:
        with os.scandir(folder) as entries:
            names = [
                (entry.name, Path(entry).is_file() if entry.is_symlink() else entry.is_file())
                for entry in entries
                if not entry.name.startswith(".")
            ]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); check the folder and its permissions"
        ) from error
    return sorted(names)


def stem_of(path: Path) -> str:
    """Return the name of a file without its extension, in the composed form of Unicode.

    File systems and archives keep an umlaut as one character or as two, so that equal names may differ in bytes.

    Raises:
        DataError: the name is not UTF-8.
    """
    if not is_utf8(path):
        raise DataError(f"{escaped(path)}: is not UTF-8; rename the file or its folder")
    return unicodedata.normalize("NFC", path.stem)


def missing_target(path: Path) -> str | None:
    """Return in words that a link leads to no file, or None."""
    if not path.is_symlink() or path.exists():
        return None
    return (
        f"is a link to {path.readlink()}, which is not there; fetch it (git annex get, dvc pull, or from its machine), "
        "or remove the link"
    )


def shorten(names: Iterable[Any], limit: int = 5) -> str:
    """Join at most ``limit`` names with commas and say how many more there are."""
    names = list(names)
    text = ", ".join(escaped(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def _comes_split(root: str | os.PathLike) -> bool:
    return bool(_split_folders(Path(root)))


def _split_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return the image and mask folders by split, or an empty dict if ``root`` does not come split."""
    plain = {split: root / split for split in SPLITS}
    published = {split: root / f"{split.title()}_Folder" for split in SPLITS}
    for folders, images, masks in ((plain, "images", "masks"), (published, "img", "labelcol")):
        for folder in folders.values():
            if problem := missing_target(folder):
                raise DataError(f"{folder}: {problem}")
        present = {split: folder for split, folder in folders.items() if folder.is_dir()}
        if present:
            return {split: (folder / images, folder / masks) for split, folder in present.items()}
    return {}


def _lacks_val(folders: dict[str, tuple[Path, Path]]) -> bool:
    return "train" in folders and "val" not in folders


def _check_for_other_names(root: Path, train: Path) -> None:
    """Raise DataError if a folder looks as if it were that of the validation images under another name."""
    wanted = "val" if train.name == "train" else "Val_Folder"
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name.lower().startswith(("val", "dev")):
            raise DataError(f"{folder}: may be the folder for validation; rename it {wanted}, or move it away")


def _drawn(
    root: Path, samples: list[Sample], split: str, val_fraction: float, test_fraction: float, seed: int
) -> list[Sample]:
    chosen = _draw_split(samples, val_fraction, test_fraction, seed)[split]
    if not chosen:
        raise DataError(
            f"{root}: has {len(samples)} images, too few to put any into {split!r} with val_fraction={val_fraction} "
            f"and test_fraction={test_fraction}; add images or change the fractions"
        )
    return [sample for sample in samples if sample.name in chosen]


def _find_in_splits(root: str | os.PathLike, splits: Iterable[str]) -> list[Sample]:
    by_name: dict[str, Sample] = {}
    for split in splits:
        for sample in find_samples(root, split):
            if sample.name in by_name:
                raise DataError(f"{sample.image}: shares its name with {by_name[sample.name].image}; rename one")
            by_name[sample.name] = sample
    return [by_name[name] for name in sorted(by_name)]


def _pair(images: Path, masks: Path, require_masks: bool) -> list[Sample]:
    if not images.is_dir():
        raise DataError(f"{images}: {missing_target(images) or f'is missing; {LAYOUTS}'}")
    image_files = list_images(images)
    if not masks.is_dir():
        if problem := missing_target(masks):
            raise DataError(f"{masks}: {problem}")
        if require_masks:
            raise DataError(f"{masks}: is missing; put one mask for each image there, with the same stem")
        return [Sample(name, image, None) for name, image in image_files.items()]
    mask_files = list_images(masks)
    without_mask = [name for name in image_files if name not in mask_files] if require_masks else []
    without_image = [name for name in mask_files if name not in image_files]
    if without_mask or without_image:
        raise DataError(
            f"{images.parent}: images and masks do not pair by stem (without a mask in {masks}: "
            f"{shorten(without_mask) or 'none'}; without an image in {images}: {shorten(without_image) or 'none'}); "
            "add, rename or remove these files"
        )
    return [Sample(name, image, mask_files.get(name)) for name, image in image_files.items()]


def _draw_split(samples: list[Sample], val_fraction: float, test_fraction: float, seed: int) -> dict[str, set[str]]:
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise DataError(
            f"val_fraction={val_fraction}, test_fraction={test_fraction}: leave nothing to train on; "
            "give two numbers of 0 or more with a sum below 1"
        )
    shuffled = sorted(sample.name for sample in samples)
    random.Random(seed).shuffle(shuffled)
    test_count, val_count = (
        max(1, round(fraction * len(shuffled))) if fraction else 0 for fraction in (test_fraction, val_fraction)
    )
    return {
        "test": set(shuffled[:test_count]),
        "val": set(shuffled[test_count : test_count + val_count]),
        "train": set(shuffled[test_count + val_count :]),
    }


def _suffixes() -> str:
    return f"a file with one of the extensions {' '.join(sorted(IMAGE_SUFFIXES))}"
