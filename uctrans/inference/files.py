"""Files in and out of the inference commands: atomic writing, JSON without NaN, packages of optional extras."""

import contextlib
import importlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")


class InferenceError(ValueError):
    """A setting or an output that evaluate, predict or export cannot work with; the message names the remedy."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module that belongs to an optional extra.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(f'{package} is needed here and is not installed: pip install "uctrans[{extra}]"') from error


def progress_bar(items: Iterable[Item], total: int, title: str, shown: bool) -> Iterable[Item]:
    """The items, with a progress bar on stderr where ``shown`` (needs tqdm)."""
    return import_extra("tqdm", "training").tqdm(items, total=total, desc=title, unit="image") if shown else items


def output_folder(path: str | Path) -> Path:
    """The folder to write to, not created yet.

    Raises:
        InferenceError: The path is empty, or something that is not a folder lies there.
    """
    if not str(path):
        raise InferenceError("No output folder was given: name one with output (-o/--output).")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InferenceError(f"The output {folder} is a file: name a folder instead.")
    return folder


def refuse_existing(paths: list[Path], what: str) -> None:
    """Raise where any of the files about to be written exists.

    Raises:
        InferenceError: Names up to three of them and the remedy.
    """
    existing = [path for path in paths if path.exists()]
    if existing:
        named = ", ".join(str(path) for path in existing[:3]) + (", ..." if len(existing) > 3 else "")
        raise InferenceError(
            f"{len(existing)} of the files of {what} exist already: {named}. "
            "Choose another output folder, or set overwrite to replace them."
        )


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, of its extension, that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:100]}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)  # noqa: PTH105 - the atomic rename
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 ``(H, W)`` or ``(H, W, 3)`` as PNG, atomically."""
    from skimage.io import imsave

    with written_atomically(path) as temporary:
        imsave(temporary, pixels, check_contrast=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON atomically; numbers that JSON does not know (nan, infinities) become null."""
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(_without_nan(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
