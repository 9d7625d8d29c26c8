"""Files out of the inference commands: folders, pictures, JSON without NaN, and a progress bar over the work."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from uctrans.extras import import_extra
from uctrans.writing import written_atomically

Item = TypeVar("Item")


class InferenceError(ValueError):
    """A setting or an output that evaluate, predict or export cannot work with; the message names the remedy."""


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


def refuse_bad_instance_settings(smallest_object: int, seed_distance: int) -> None:
    """Raise InferenceError where `uctrans.inference.instances.to_instances` could not work with these."""
    if smallest_object < 0 or seed_distance < 1:
        raise InferenceError(
            "smallest_object must be 0 or more pixels and seed_distance 1 or more, got "
            f"{smallest_object} and {seed_distance}."
        )


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
