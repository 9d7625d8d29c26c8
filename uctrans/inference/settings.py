"""Checks of the settings and outputs that evaluate, predict and export share, made before the work begins."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..data.find import shorten
from ..extras import import_extra
from ..system import escaped, is_utf8

Item = TypeVar("Item")


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


def progress_bar(items: Iterable[Item], total: int, title: str, shown: bool) -> Iterable[Item]:
    """Return the items, with a progress bar on stderr if ``shown`` is set (needs tqdm)."""
    return import_extra("tqdm", "training").tqdm(items, total=total, desc=title, unit="image") if shown else items
