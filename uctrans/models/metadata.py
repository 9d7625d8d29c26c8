"""Check the metadata of a model, which decide how its images are prepared and its predictions drawn."""

import math
from collections.abc import Callable
from typing import Any

from .weights import ModelFileError

LARGEST_SIDE = 1 << 14  # pixels of an image that a network sees at once
REMEDY = "restore the file, or save the model again"


def check_metadata(metadata: Any, source: object) -> None:
    """Raise :class:`ModelFileError`, naming ``source``, unless the metadata of a model have the types they need.

    Entries that this package does not use may have any value.
    """
    if not isinstance(metadata, dict):
        raise ModelFileError(f"{source}: metadata is a {type(metadata).__name__}, not a mapping: {REMEDY}")
    for name, (is_valid, needed) in NEEDED.items():
        value = metadata.get(name)
        if value is not None and not is_valid(value):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
            raise ModelFileError(f"{source}: metadata: {name} is {shown}, not {needed}: {REMEDY}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_list_of(is_valid: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_valid, value))


def _is_side(value: Any) -> bool:
    return _is_whole(value) and 1 <= value <= LARGEST_SIDE


def _is_image_size(value: Any) -> bool:
    return _is_side(value) or (_is_list_of(_is_side, value) and len(value) == 2)


def _is_intensity_range(value: Any) -> bool:
    return _is_list_of(_is_number, value) and len(value) == 2 and all(map(math.isfinite, value))


def _is_colour(value: Any) -> bool:
    return _is_text(value) or (_is_list_of(_is_whole, value) and len(value) == 3)


def _is_palette(value: Any) -> bool:
    return _is_text(value) or _is_list_of(_is_colour, value)


def _is_record(value: Any) -> bool:
    parts = [value.get(part) for part in ("train", "val")] if isinstance(value, dict) else [None]
    return all(isinstance(part, dict) and all(map(_is_text, (*part, *part.values()))) for part in parts)


NEEDED = {
    "protocol": (_is_text, "the name of a protocol"),
    "target": (_is_text, "the name of a target"),
    "image_size": (_is_image_size, f"height and width in pixels, 1 to {LARGEST_SIDE}"),
    "channel_order": (_is_text, "an order of colour channels"),
    "intensity_range": (_is_intensity_range, "two numbers"),
    "palette": (_is_palette, "a list of colours"),
    "ignore_label": (_is_whole, "a whole number"),
    "class_names": (lambda value: _is_list_of(_is_text, value), "a list of names"),
    "best_epoch": (_is_whole, "a whole number"),
    "best_dice": (_is_number, "a number"),
    "images": (_is_record, "a mapping of names by fingerprint for each of train and val"),
}
