"""Checks of the settings and outputs that evaluate, predict and export share, made before the work begins."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..data.find import IMAGE_SUFFIXES, shorten, stem_of
from ..extras import import_extra
from ..system import escaped, is_utf8

Item = TypeVar("Item")
# The folder that lies beside each folder of a data set, see `uctrans.data.find` and `uctrans.data.instances`.
COUNTERPARTS = {"masks": "images", "instances": "images", "images": "masks", "labelcol": "img", "img": "labelcol"}


class InferenceError(ValueError):
    """A setting or an output that evaluate, predict or export cannot work with; the message names the remedy."""


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise InferenceError if ``value`` is not one of ``choices``."""
    if value not in choices:
        raise InferenceError(f"{name}: {value!r} is not known; choose one of {', '.join(choices)}")


def check_mask_settings(threshold: float, smallest_object: int, seed_distance: int) -> None:
    """Raise InferenceError if masks or instances cannot be made with these settings.

    Args:
        threshold: Probability above which a pixel is foreground.
        smallest_object: See `uctrans.inference.instances.to_instances`.
        seed_distance: See `uctrans.inference.instances.to_instances`.
    """
    if not 0 < threshold < 1:
        raise InferenceError(f"threshold: {threshold} is out of range; give a number between 0 and 1")
    if smallest_object < 0:
        raise InferenceError(f"smallest_object: {smallest_object} is negative; give 0 or more pixels")
    if seed_distance < 1:
        raise InferenceError(f"seed_distance: {seed_distance} is too small; give 1 pixel or more")


def output_folder(path: str | Path) -> Path:
    """Return the folder to write to, without creating it.

    Raises:
        InferenceError: The path is empty or not UTF-8, or a file lies there.
    """
    if not str(path):
        raise InferenceError("output: no folder is given; name one with output (-o/--output)")
    if not is_utf8(path):
        raise InferenceError(f"output: {escaped(path)}: is not UTF-8; rename it or name another folder")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InferenceError(f"output: {folder} is a file; name a folder")
    return folder


def refuse_existing(paths: list[Path], what: str) -> None:
    """Raise InferenceError if any of ``paths``, the files of ``what``, exists; the message names up to three."""
    existing = [path for path in paths if path.exists()]
    if existing:
        raise InferenceError(
            f"{shorten(existing, limit=3)}: {len(existing)} of the files of {what} exist already; "
            "choose another output folder, or set overwrite to replace them"
        )


def refuse_inputs(paths: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise InferenceError if any of ``paths`` to write is one of the files ``inputs``, by a link of either kind."""
    owners = {(status.st_dev, status.st_ino): path for path in inputs for status in [path.stat()]}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if (status.st_dev, status.st_ino) in owners:
                image = owners[status.st_dev, status.st_ino]
                raise InferenceError(f"output: {path} is the file {image} itself, by a link; choose another folder")


def refuse_truth(folder: Path) -> None:
    """Raise InferenceError if ``folder`` holds the images, the masks or the instance maps of a data set.

    Images lie beside a folder of masks. Masks are a file for each image of the folder beside them, without the overlays
    that a prediction has. Instance maps have names of images beside them.
    """
    folder = folder.resolve()
    beside = folder.parent / COUNTERPARTS.get(folder.name, "")
    if folder.name not in COUNTERPARTS or not beside.is_dir():
        return
    held, counterparts = _image_stems(folder), _image_stems(beside)
    if folder.name in ("masks", "labelcol"):
        is_predicted = all(f"{name}_overlay" in held for name in counterparts)
        is_of_dataset = counterparts <= held and not is_predicted
    else:
        is_of_dataset = bool(held) and (folder.name != "instances" or held <= counterparts)
    if is_of_dataset:
        raise InferenceError(f"output: {folder} holds the {folder.name} of a data set; choose another folder")


def _image_stems(folder: Path) -> set[str]:
    return {stem_of(path) for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."}


def progress_bar(items: Iterable[Item], total: int, title: str, shown: bool) -> Iterable[Item]:
    """Return the items, with a progress bar on stderr if ``shown`` is set (needs tqdm)."""
    return import_extra("tqdm", "training").tqdm(items, total=total, desc=title, unit="image") if shown else items
