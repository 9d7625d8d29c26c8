"""Read image and mask files of any kind scikit-image opens into two forms: RGB and label index, both uint8."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uctrans.data.errors import DataError, shorten
from uctrans.data.palettes import colours_to_labels, pack_colours, parse_palette
from uctrans.data.pixels import read_pixels

MAX_CLASSES = 256
# 65535 = 255 * 257, so a 16-bit value over 257 is the nearest 8-bit one.
SIXTEEN_TO_EIGHT_BIT = 257
# Why a mask may not be the binary mask it was taken for: what was found in it, and the remedy.
DOUBTS = {
    "many values": (
        "more than two distinct values; every value above 0 was taken as foreground",
        "If the values are classes, set classes; if they are blurred edges, threshold the masks.",
    ),
    "no background": (
        "two distinct values, both above 0, so all of the mask was taken as foreground",
        "Save the background as 0 (black), or give a palette, background first.",
    ),
}


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB.

    Grayscale becomes three equal channels, alpha is dropped, black-and-white becomes 0 and 255, 16-bit values are
    scaled by 1/257, and indexed files give the colours of their indexes.

    Raises:
        DataError: a file that is missing, damaged, of several pages or frames, in CMYK, a PNG of 16 bit with colours
            or alpha, a TIFF file that stores white as 0 or 16-bit colours under a compression that needs imagecodecs,
            or of floating-point or other values than 1, 8 or 16 bit.
    """
    path = Path(path)
    pixels = _to_rgb(read_pixels(path), path)
    if pixels.dtype == np.uint16:
        half = SIXTEEN_TO_EIGHT_BIT // 2
        return ((pixels.astype(np.uint32) + half) // SIXTEEN_TO_EIGHT_BIT).astype(np.uint8)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    return pixels


def read_mask(
    path: str | os.PathLike,
    classes: int = 1,
    palette: str | Sequence | None = None,
    shape: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read a mask file as (H, W) uint8 label indexes; alpha is dropped, indexed files count by their colours.

    ``classes=1``: every pixel above 0 in any channel is foreground, so 0/1 and 0/255 masks are the same; the result
    holds 0 and 1, and a mask of more than two distinct values, or of two that are both above 0, brings a warning.
    ``classes>=2``: the pixel value, equal
    in all channels, is the class. With a palette the colour says the class, its position in the palette.

    Args:
        path: mask file.
        classes: 1, or the number of label values with the background.
        palette: colours as :func:`uctrans.data.parse_palette` takes them: ``classes`` of them, or two for one class.
        shape: (H, W) that the mask must have, in pixels.

    Raises:
        DataError: an unreadable file, another size than ``shape``, label values of ``classes`` or more, a coloured
            mask without a palette, or a colour that is not in the palette.
    """
    mask, doubt = decode_mask(path, classes, palette, shape)
    if doubt is not None:
        warn_of_doubts({doubt: [path]})
    return mask


def decode_mask(
    path: str | os.PathLike, classes: int, palette: str | Sequence | None, shape: tuple[int, int] | None
) -> tuple[np.ndarray, str | None]:
    """As :func:`read_mask`, without its warning; also what makes a binary mask doubtful, a key of `DOUBTS`."""
    path = Path(path)
    if not 1 <= classes <= MAX_CLASSES:
        raise DataError(f"classes={classes}: masks hold 1 to {MAX_CLASSES} classes.")
    pixels = read_pixels(path)
    if shape is not None and pixels.shape[:2] != tuple(shape):
        height, width = pixels.shape[:2]
        raise DataError(
            f"{path} is {height} x {width} pixels (height x width), but its image is {shape[0]} x {shape[1]}: "
            "the two must have the same size."
        )
    if palette is not None:
        return _from_colours(pixels, path, classes, palette), None
    if classes == 1:
        return _from_any_value(pixels, path)
    return _from_label_values(pixels, path, classes), None


def warn_of_doubts(paths_by_doubt: Mapping[str, Sequence[str | os.PathLike]]) -> None:
    """Give one warning for each kind of doubt (see `DOUBTS`) about masks that were taken as binary."""
    for doubt, paths in paths_by_doubt.items():
        finding, remedy = DOUBTS[doubt]
        warnings.warn(f"{len(paths)} binary masks hold {finding}: {shorten(paths)}. {remedy}", stacklevel=3)


def _to_rgb(pixels: np.ndarray, path: Path) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]
    return np.ascontiguousarray(np.broadcast_to(channels, (*pixels.shape[:2], 3)))


def _from_colours(pixels: np.ndarray, path: Path, classes: int, palette: str | Sequence) -> np.ndarray:
    colours = parse_palette(palette)
    if len(colours) != max(classes, 2):
        raise DataError(f"The palette has {len(colours)} colours, but classes={classes} needs {max(classes, 2)}.")
    if pixels.dtype == np.uint16:
        raise DataError(f"{path} holds 16-bit colours, a palette 8-bit ones: save the mask with 8 bit a channel.")
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    try:
        return colours_to_labels(_to_rgb(pixels, path), colours)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _from_any_value(pixels: np.ndarray, path: Path) -> tuple[np.ndarray, str | None]:
    if pixels.ndim == 3:
        rgb = _to_rgb(pixels, path)
        pixels = pack_colours(rgb) if rgb.dtype != np.uint16 else rgb.astype(np.int64) @ np.array([1 << 32, 1 << 16, 1])
    lowest, *others = np.unique(pixels)
    doubts = {"many values": len(others) > 1, "no background": len(others) == 1 and lowest > 0}
    return (pixels > 0).astype(np.uint8), next((doubt for doubt, found in doubts.items() if found), None)


def _from_label_values(pixels: np.ndarray, path: Path, classes: int) -> np.ndarray:
    rgb = _to_rgb(pixels, path)
    labels = rgb[..., 0]
    if (rgb != labels[..., None]).any():
        raise DataError(f"{path} is a coloured mask: give a palette, or save the label index of each pixel in gray.")
    values = np.unique(labels)
    beyond = values[values >= classes]
    if beyond.size:
        raise DataError(
            f"{path} holds label values {shorten(beyond)}, but classes={classes} allows 0 to {classes - 1}: raise "
            "classes, renumber the mask, or use classes=1 for a 0/255 mask."
        )
    return labels.astype(np.uint8)
