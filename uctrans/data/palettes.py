"""Palettes of colour-coded masks: the position of a colour in the palette is its class."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .find import DataError
from .strips import map_strips, strips

Palette = tuple[str, ...]
MAX_COLOURS = 256
MAX_UNKNOWN = 10_000  # colours to count for an error
_HEX_COLOUR = re.compile(r"#[0-9a-f]{6}")


def parse_palette(palette: str | Sequence) -> Palette:
    """Return a palette in its one form, a tuple of "#rrggbb" in lower case; entry 0 is the background.

    Args:
        palette: "#000000,#ff0000" or a sequence of such colours, or of (red, green, blue) in 0..255.

    Raises:
        DataError: a colour cannot be read or is given twice, or there are fewer than two or more than 256 colours.
    """
    entries = palette.split(",") if isinstance(palette, str) else list(palette)
    colours = tuple(_parse_colour(entry) for entry in entries)
    if not 2 <= len(colours) <= MAX_COLOURS:
        raise DataError(f"palette: has {len(colours)} colours; give 2 to {MAX_COLOURS}, background first")
    repeated = sorted({colour for colour in colours if colours.count(colour) > 1})
    if repeated:
        raise DataError(f"palette: names {', '.join(repeated)} more than once; give every class its own colour")
    return colours


def labels_to_colours(labels: np.ndarray, palette: str | Sequence) -> np.ndarray:
    """Paint label indexes, (H, W) integers, in the colours of the palette: (H, W, 3) uint8.

    Raises:
        DataError: a label has no colour.
    """
    table = _to_table(parse_palette(palette))
    if labels.size and not 0 <= labels.min() <= labels.max() < len(table):
        raise DataError(
            f"palette: has {len(table)} colours, but the labels are {labels.min()} to {labels.max()}; give every label "
            "a colour"
        )
    return table[labels]


def colours_to_labels(colours: np.ndarray, palette: str | Sequence) -> np.ndarray:
    """Invert :func:`labels_to_colours`: (H, W, 3) uint8 to (H, W) uint8 label indexes.

    Raises:
        DataError: a colour is not in the palette; the message lists such colours and their pixel counts.
    """
    colours_by_label = parse_palette(palette)
    known = pack_colours(_to_table(colours_by_label))
    order = np.argsort(known)
    unknown: Counter[int] = Counter()

    def to_labels(strip: np.ndarray) -> np.ndarray:
        packed = pack_colours(strip)
        position = np.searchsorted(known[order], packed).clip(max=len(known) - 1)
        labels = order[position].astype(np.uint8)
        values, counts = np.unique(packed[known[labels] != packed], return_counts=True)
        if len(unknown) < MAX_UNKNOWN:
            unknown.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        return labels

    labels = map_strips(to_labels, colours)
    if unknown:
        listed = ", ".join(f"#{_unpack(colour)} ({count} pixels)" for colour, count in unknown.most_common(5))
        raise DataError(
            f"{len(unknown)} colours are not in the palette {','.join(colours_by_label)}: {listed}; add them to the "
            "palette, or save the mask without lossy compression and without smoothed edges"
        )
    return labels


def list_colours(colours: np.ndarray, indexes: np.ndarray | None = None) -> list[str]:
    """Return the colours of a mask, (H, W, 3) uint8, as "#rrggbb", in an order that a palette may have.

    If there are more than a palette may have, they are not complete.

    Args:
        colours: the mask.
        indexes: (H, W) positions of the colours in the palette of the file, which order them; without them black is the
            first one, the others follow by their values.
    """
    found: dict[int, int] = {}
    for rows in strips(colours):
        values, places = np.unique(pack_colours(colours[rows]), return_index=True)
        order = values if indexes is None else indexes[rows].ravel()[places]
        found |= dict(zip(values.tolist(), order.tolist(), strict=True))
        if len(found) > MAX_COLOURS:
            break
    return [f"#{_unpack(value)}" for value in sorted(found, key=found.get)]


def pack_colours(colours: np.ndarray) -> np.ndarray:
    """Return one number for each colour: (..., 3) of 8 or 16 bits to (...) int64, 16 bits for each channel."""
    return colours.astype(np.int64) @ np.array([1 << 32, 1 << 16, 1])


def _unpack(colour: int) -> str:
    return "".join(f"{colour >> shift & 0xFF:02x}" for shift in (32, 16, 0))


def _to_table(palette: Palette) -> np.ndarray:
    """Return the palette as (classes, 3) uint8."""
    return np.array([tuple(bytes.fromhex(colour[1:])) for colour in palette], dtype=np.uint8)


def _parse_colour(entry: str | Sequence[int]) -> str:
    if isinstance(entry, str):
        colour = entry.strip().lower()
        if _HEX_COLOUR.fullmatch(colour):
            return colour
    elif len(entry) == 3 and all(isinstance(value, int | np.integer) and 0 <= value <= 255 for value in entry):
        return "#{:02x}{:02x}{:02x}".format(*entry)
    raise DataError(
        f"palette: {entry!r} is not a colour; write #rrggbb, or (red, green, blue) with whole numbers in 0..255"
    )
