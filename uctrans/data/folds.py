"""Cross-validation folds: made from names and a seed, kept in a file, checked against a dataset folder."""

import os
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..reading import UnreadableError, read_json
from .find import SPLITS, DataError, Sample, find_all_samples, find_development_samples, find_samples, shorten

FOLDS_FOLDER = Path(__file__).parent / "folds"
Fold = dict[str, list[str]]


def make_folds(names: Sequence[str], n: int = 5, seed: int = 0) -> list[Fold]:
    """Deal names into ``n`` folds: sorted, shuffled by ``seed``, every n-th name validates one fold.

    Args:
        names: sample names of train and val together; test names do not belong here.
        n: number of folds, 2 to the number of names.
        seed: decides the shuffle.

    Returns:
        n of {"train": names, "val": names}, sorted; each name is in "val" exactly once.

    Raises:
        DataError: there are too few names or folds, or a name is given twice.
    """
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise DataError(f"names: {shorten(repeated)} are given more than once; name each image once")
    if not 2 <= n <= len(names):
        raise DataError(f"folds: {n} cannot be made of {len(names)} images; choose 2 to the number of images")
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    held_out = [set(shuffled[start::n]) for start in range(n)]
    return [{"train": sorted(set(names) - val), "val": sorted(val)} for val in held_out]


def load_folds(path_or_name: str | os.PathLike, root: str | os.PathLike | None = None) -> list[Fold]:
    """Read folds from a JSON file, or by name from those that come with the package ("monuseg").

    The file holds {"folds": [{"train": [names], "val": [names]}, ...]}.

    Args:
        path_or_name: path of a file, or a name.
        root: dataset folder that must have every name, outside its test split; None checks the file alone.

    Raises:
        DataError: the file is missing or malformed, or a name is in train and val of one fold, is not in the dataset,
            or is one of its test images.
    """
    path = _folds_path(path_or_name)
    try:
        content = read_json(path)
    except UnreadableError as error:
        raise DataError(f"{error}; write one with the result of make_folds") from error
    folds = content.get("folds") if isinstance(content, dict) else None
    if not isinstance(folds, list) or not folds or not all(_is_fold(fold) for fold in folds):
        raise DataError(
            f'{path}: holds no folds; write {{"folds": [{{"train": [names], "val": [names]}}, ...]}}, no list empty'
        )
    folds = [
        {part: [unicodedata.normalize("NFC", name) for name in fold[part]] for part in ("train", "val")}
        for fold in folds
    ]
    for number, fold in enumerate(folds):
        shared = sorted(set(fold["train"]) & set(fold["val"]))
        if shared:
            raise DataError(f"{path}: fold {number} has {shorten(shared)} in train and in val; remove them from one")
    if root is not None:
        known = {sample.name for sample in find_development_samples(root)}
        unknown = sorted({name for fold in folds for name in fold["train"] + fold["val"]} - known)
        if unknown:
            raise DataError(
                f"{path}: names images that are not among the {len(known)} of train and val in {root}: "
                f"{shorten(unknown)}; use folds of these images, from a file or from a study with --cross-validation 5 "
                "(test images never belong in a fold; of a folder that does not come split, a fifth is drawn for "
                "testing)"
            )
    return folds


def find_split(root: str | os.PathLike, split: str, folds: str | None = None, fold: int | None = None) -> list[Sample]:
    """Return the samples of a split, or of train or val of a fold.

    Args:
        root: dataset folder.
        split: "train", "val", "test" or "all"; the test split is the same for all folds.
        folds: file or shipped name, see `load_folds`; None takes the folder's own train and val.
        fold: number of the fold, from 0.

    Raises:
        DataError: as `load_folds` and :func:`uctrans.data.find_samples`, or there is no such split or fold.
    """
    if split not in (*SPLITS, "all"):
        raise DataError(f"split: {split!r} is unknown; choose one of {', '.join(SPLITS)}, all")
    if split == "all":
        return find_all_samples(root)
    if folds is None or split == "test":
        return find_samples(root, split)
    loaded = load_folds(folds, root)
    if fold is None or not 0 <= fold < len(loaded):
        raise DataError(f"fold: {folds} has folds 0 to {len(loaded) - 1}, not {fold}; name one of them")
    samples = {sample.name: sample for sample in find_development_samples(root)}
    return [samples[name] for name in loaded[fold][split]]


def _folds_path(path_or_name: str | os.PathLike) -> Path:
    path = Path(path_or_name)
    if path.exists() and not path.is_dir():
        return path
    shipped = {file.stem: file for file in sorted(FOLDS_FOLDER.glob("*.json"))}
    if str(path_or_name) in shipped:
        return shipped[str(path_or_name)]
    raise DataError(
        f"{path}: is neither a file nor one of the folds that come with the package; choose from {', '.join(shipped)}"
    )


def _is_fold(fold) -> bool:
    return isinstance(fold, dict) and all(
        isinstance(fold.get(part), list) and fold[part] and all(isinstance(name, str) for name in fold[part])
        for part in ("train", "val")
    )
