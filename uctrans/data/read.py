"""Read image and mask files: images as RGB or other channels, masks as label indexes, both uint8.

Nothing in a file that differs from pixel to pixel is left out without an error or a warning.
"""

import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .decode import Picture, decode_file
from .find import DataError, shorten
from .palettes import colours_to_labels, list_colours, pack_colours, parse_palette
from .strips import map_strips, strips

MAX_CLASSES = 256
IGNORED = 255  # label of the pixels that a mask says to ignore, whatever their value is in its file
RGB_CHANNELS = 3
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma of red, green and blue
HIGHEST_VALUE = 65535
VALUE_BITS = np.uint64(16)
# Cameras of 8 to 14 bits store their values in files of 16 bits.
CAMERA_RANGES = tuple((1 << bits) - 1 for bits in (8, 10, 12, 14, 16))
DARK_SHARE = 4  # images whose highest value is below a quarter of the range are doubtful
LOSSY_REMEDY = (
    "save it again as PNG from its source; without one, set every pixel to the nearest label and save that as PNG"
)
# Warnings about masks that may not hold what they are read as.
LOSSY = (
    "{count} masks have a lossy compression, which changes values at the edges of objects or everywhere: {paths}. "
    f"For each, {LOSSY_REMEDY}."
)
MANY_VALUES = (
    "{count} binary masks hold more than two distinct values; every value above 0 was taken as foreground: {paths}. "
    "That is right if the values number objects. If they are classes, set classes; if one marks pixels to ignore, set "
    "it with --ignore-label; if they are blurred edges, threshold the masks."
)
MANY_COLOURS = (
    "{{count}} binary masks hold the colours {colours}; all but black were taken as foreground: {{paths}}. If the "
    'colours are classes, set them: --classes {number} --palette "{palette}", background first.'
)
NO_BACKGROUND = (
    "{{count}} binary masks hold two distinct values, both above 0, so all of the mask was taken as foreground: "
    "{{paths}}. Save the background as 0 (black), or give a palette, background first{hint}."
)
# Warnings about images.
ALPHA = (
    "{count} images have an alpha channel that differs from pixel to pixel and was left out: {paths}. Save them "
    "without alpha, or train with it as a channel: --in-channels 4 for RGB, 2 for gray."
)
DARK = (
    "{count} images hold 16-bit values up to {highest} where the range is 0 to {high}, so they have {levels} of 256 "
    "gray levels and are nearly black: {paths}. Set the range of the values: --intensity-range 0,{likely}, or that of "
    "the camera (0,4095 for 12 bits)."
)
BEYOND = (
    "{count} images hold values up to {highest}, beyond the intensity range, which ends at {high}; they were read as "
    "white: {paths}. Train with a wider intensity_range if they matter."
)


class Doubts:
    """Doubtful files of a dataset, collected so that one warning names all files with the same doubt."""

    def __init__(self) -> None:
        self.paths: dict[str, list[str | os.PathLike]] = {}
        self.highest: dict[str | os.PathLike, tuple[int, int]] = {}

    def add(self, doubt: str | None, path: str | os.PathLike) -> None:
        """Note a file, with a warning that has the fields ``count`` and ``paths``; None is no doubt."""
        if doubt is not None:
            self.paths.setdefault(doubt, []).append(path)

    def add_highest(self, path: str | os.PathLike, highest: int, high: int) -> None:
        """Note the highest value of an image of 16 bits, and the end of the range that it is read in."""
        self.highest[path] = max(highest, self.highest.get(path, (0, high))[0]), high

    def warn(self) -> None:
        """Give one warning for each doubt."""
        for doubt, paths in self.paths.items():
            warnings.warn(doubt.format(count=len(paths), paths=shorten(paths)), stacklevel=3)
        if self.highest:
            self._warn_of_range()

    def _warn_of_range(self) -> None:
        beyond = [path for path, (value, end) in self.highest.items() if value > end]
        dark = [path for path, (value, end) in self.highest.items() if 0 < value * DARK_SHARE < end]
        for doubt, paths in ((BEYOND, beyond), (DARK, dark)):
            if not paths:
                continue
            highest, high = (max(values) for values in zip(*(self.highest[path] for path in paths), strict=True))
            likely = next(value for value in CAMERA_RANGES if value >= highest)
            levels = round(255 * highest / high) + 1
            numbers = {"highest": highest, "high": high, "levels": levels, "likely": likely}
            warnings.warn(doubt.format(count=len(paths), paths=shorten(paths), **numbers), stacklevel=4)


def read_image(
    path: str | os.PathLike, channels: int = RGB_CHANNELS, intensity_range: tuple[int, int] | None = None
) -> np.ndarray:
    """Read an image file as (H, W, channels) uint8, by default RGB, as a viewer shows it.

    Orientation tags are obeyed. Indexed files give the colours of their indexes. Black and white become 0 and 255.
    Values of 16 bits are divided by 257 and rounded; the values of ``intensity_range`` become 0 to 255.

    A file must have as many channels. Gray becomes three equal channels, and RGB becomes one by its luma. Channels
    that are constant are left out if they are too many. Alpha is left out, unless it makes up the number of channels.

    Args:
        path: image file.
        channels: number of channels.
        intensity_range: lowest and highest value, which become 0 and 255; values outside are clipped.

    Raises:
        DataError: the file cannot be read (see :func:`uctrans.data.decode.decode_file`), it has other channels, or the
            range is not two increasing values or cannot be that of the file.
    """
    doubts = Doubts()
    image = decode_image(path, channels, intensity_range, doubts)
    doubts.warn()
    return image


def decode_image(
    path: str | os.PathLike, channels: int, intensity_range: tuple[int, int] | None, doubts: Doubts
) -> np.ndarray:
    """Read an image as :func:`read_image` does, but add doubts about it to ``doubts`` instead of warning."""
    path = Path(path)
    picture = decode_file(path, channels if channels != RGB_CHANNELS else None)
    return image_of(picture, path, channels, intensity_range, doubts)


def image_of(
    picture: Picture, path: Path, channels: int, intensity_range: tuple[int, int] | None, doubts: Doubts
) -> np.ndarray:
    """Return a decoded file, or a part of one, as :func:`decode_image` does."""
    pixels = _fit_channels(picture, path, channels, doubts)
    low, high = intensity_range or (0, picture.white)
    if intensity_range is not None:
        check_intensity_range(intensity_range)
        if pixels.dtype != np.uint16 and high > 255:
            raise DataError(
                f"{path}: holds 8-bit values, but the intensity range ends at {high}; give images of one depth"
            )
    if (pixels.dtype == np.uint16 and high == HIGHEST_VALUE) or intensity_range is not None:
        doubts.add_highest(path, int(pixels.max()), high)
    pixels = _to_eight_bit(pixels, low, high)
    if channels == 1 and pixels.shape[2] == RGB_CHANNELS:
        pixels = map_strips(lambda strip: np.rint(strip @ np.array(GRAY_WEIGHTS)).astype(np.uint8)[..., None], pixels)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], channels)))


def check_intensity_range(intensity_range: Sequence[int]) -> None:
    """Raise DataError unless these are two 16-bit values, the lower one first."""
    if len(intensity_range) != 2 or not 0 <= intensity_range[0] < intensity_range[1] <= HIGHEST_VALUE:
        listed = ",".join(map(str, intensity_range))
        raise DataError(
            f"intensity_range: {listed} is no range; give the lowest and the highest value, such as 0,4095 for 12 bits"
        )


def read_mask(
    path: str | os.PathLike,
    classes: int = 1,
    palette: str | Sequence | None = None,
    shape: tuple[int, int] | None = None,
    ignore_label: int | None = None,
) -> np.ndarray:
    """Read a mask file as (H, W) uint8 label indexes, as a viewer shows it; indexed files count by their colours.

    ``classes=1``: every pixel above 0 in any channel is foreground, so masks of 0 and 1 equal masks of 0 and 255; the
    result holds 0 and 1. A mask with more than two distinct values, or with two that are both above 0, gives a warning.
    ``classes>=2``: the pixel value, equal in all channels, is the class. With a palette the position of the colour in
    the palette is the class. A mask with a lossy compression gives a warning.

    Args:
        path: mask file.
        classes: 1, or the number of label values including the background.
        palette: colours as :func:`uctrans.data.parse_palette` takes them: ``classes`` of them, or two for one class.
        shape: (H, W) in pixels that the mask must have.
        ignore_label: value in all channels, or position of a colour in the palette, which may have one more than
            there are classes. These pixels become `IGNORED`, 255.

    Raises:
        DataError: the file cannot be read, its size is not ``shape``, a label value is not below ``classes``, a
            coloured mask has no palette, a colour is not in the palette, or alpha, a further channel or the indexes
            tell pixels apart that have the same colour.
    """
    doubts = Doubts()
    mask = decode_mask(path, classes, palette, shape, doubts, ignore_label)
    doubts.warn()
    return mask


def decode_mask(
    path: str | os.PathLike,
    classes: int,
    palette: str | Sequence | None,
    shape: tuple[int, int] | None,
    doubts: Doubts,
    ignore_label: int | None = None,
) -> np.ndarray:
    """Read a mask as :func:`read_mask` does, but add doubts about it to ``doubts`` instead of warning."""
    path = Path(path)
    if not 1 <= classes <= MAX_CLASSES:
        raise DataError(f"classes={classes}: masks hold 1 to {MAX_CLASSES} classes; give such a number")
    picture = decode_file(path)
    if shape is not None:
        check_shape(path, picture.channels, shape)
    try:
        pixels = _label_channels(picture, path)
        ignored = None
        if ignore_label is not None and palette is None:
            ignored = (pixels == ignore_label).all(-1)
            pixels = np.where(ignored[..., None], pixels.dtype.type(0), pixels)
        if palette is not None:
            labels, doubt = _from_colours(pixels, picture, path, classes, palette, ignore_label), None
            ignored = None if ignore_label is None else labels == ignore_label
        elif classes == 1:
            labels, doubt = _from_any_value(pixels, picture)
        else:
            labels, doubt = _from_label_values(pixels, picture, path, classes), None
    except DataError as error:
        if picture.is_lossy:
            raise DataError(
                f"{error}. The mask has a lossy compression, which changes values: {LOSSY_REMEDY}"
            ) from error
        raise
    doubts.add(LOSSY if picture.is_lossy else doubt, path)
    return labels if ignored is None else np.where(ignored, np.uint8(IGNORED), labels)


def check_shape(path: Path, pixels: np.ndarray, shape: tuple[int, int]) -> None:
    """Raise DataError if the (H, W) of ``pixels`` is not that of the image, ``shape``."""
    if pixels.shape[:2] != tuple(shape):
        height, width = pixels.shape[:2]
        remedy = "save both at the same size"
        if (width, height) == tuple(shape):
            remedy = "turn the mask as viewers show the image, whose file may have an orientation tag"
        raise DataError(
            f"{path}: is {height} x {width} pixels (height x width), but its image is {shape[0]} x {shape[1]}; {remedy}"
        )


def _fit_channels(picture: Picture, path: Path, count: int, doubts: Doubts) -> np.ndarray:
    """Return ``count`` channels of an image, or 3 where 1 is to be its luma, or 1 that is to be repeated."""
    pixels, alpha = picture.channels, picture.alpha
    found = pixels.shape[2]
    if alpha is not None and count == found + 1:
        return np.dstack([pixels, alpha])
    if alpha is not None and not _is_constant(alpha):
        doubts.add(ALPHA, path)
    if found == count or (found, count) in ((1, RGB_CHANNELS), (RGB_CHANNELS, 1)):
        return pixels
    kept = count if found > count else 1
    if (found > count or count == RGB_CHANNELS) and _is_constant(pixels[..., kept:]):
        return pixels[..., :kept]
    raise DataError(
        f"{path}: has {found} channels, but the network takes {count}; train one with --in-channels {found}, or save "
        f"the image with {count}"
    )


def _is_constant(pixels: np.ndarray) -> bool:
    return bool((pixels == pixels[:1, :1]).all())


def _to_eight_bit(pixels: np.ndarray, low: int, high: int) -> np.ndarray:
    if pixels.dtype == np.uint8 and (low, high) == (0, 255):
        return pixels
    values = _eight_bit_values(low, high)
    return map_strips(lambda strip: values[strip.astype(np.uint8) if strip.dtype == bool else strip], pixels)


@functools.lru_cache(maxsize=4)
def _eight_bit_values(low: int, high: int) -> np.ndarray:
    """Return what every 16-bit value becomes, (65536,) uint8."""
    share = (np.arange(HIGHEST_VALUE + 1) - low) / (high - low)
    return np.rint(255 * share.clip(0, 1)).astype(np.uint8)


def _label_channels(picture: Picture, path: Path) -> np.ndarray:
    """Return the channels of a mask that labels are read from, (H, W, 1) or (H, W, 3).

    Raises:
        DataError: something else in the file tells pixels apart that have the same value there.
    """
    pixels = picture.channels
    kept = RGB_CHANNELS if pixels.shape[2] >= RGB_CHANNELS else 1
    if not _is_constant(pixels[..., kept:]):
        raise DataError(
            f"{path}: has {pixels.shape[2]} channels; save a mask with one channel of labels, or as RGB with a palette"
        )
    pixels = pixels[..., :kept]
    if picture.alpha is not None and not _is_constant(picture.alpha) and _tells_more(picture.alpha, pixels):
        raise DataError(
            f"{path}: has an alpha channel that tells pixels of one colour apart, but masks are read by their colours; "
            "save the labels as gray values without alpha"
        )
    if picture.indexes is not None and _tells_more(picture.indexes, pixels):
        raise DataError(
            f"{path}: has a palette that gives one colour to several indexes, but masks are read by their colours; "
            "give every index its own colour, or save the indexes as gray values"
        )
    return pixels


def _tells_more(values: np.ndarray, pixels: np.ndarray) -> bool:
    """Return whether ``values``, (H, W), differ between pixels of the same colour."""
    pairs = np.empty(0, np.uint64)
    for rows in strips(pixels):
        packed = _packed(pixels[rows]).astype(np.uint64)
        pairs = np.union1d(pairs, (packed << VALUE_BITS) + values[rows].astype(np.uint64))
        if (np.diff(pairs >> VALUE_BITS) == 0).any():
            return True
    return False


def _packed(pixels: np.ndarray) -> np.ndarray:
    """Return one number for each pixel of (H, W, 1) or (H, W, 3)."""
    return pixels[..., 0] if pixels.shape[2] == 1 else pack_colours(pixels)


def _distinct(pixels: np.ndarray) -> np.ndarray:
    """Return the distinct packed values of (H, W, 1) or (H, W, 3), sorted; some of them if there are very many."""
    found = np.empty(0, np.int64)
    for rows in strips(pixels):
        found = np.union1d(found, np.unique(_packed(pixels[rows])))
        if len(found) > HIGHEST_VALUE + 1:
            break
    return found


def _from_colours(
    pixels: np.ndarray, picture: Picture, path: Path, classes: int, palette: str | Sequence, ignore_label: int | None
) -> np.ndarray:
    colours = parse_palette(palette)
    needed = max(classes, 2) + (ignore_label == max(classes, 2))
    if len(colours) != needed:
        raise DataError(
            f"palette: has {len(colours)} colours, but classes={classes} needs {needed}; change one of them"
        )
    if ignore_label is not None and ignore_label >= len(colours):
        raise DataError(
            f"ignore_label: {ignore_label} is no position in the palette of {len(colours)} colours, from 0; add the "
            f"colour to ignore as the last one, and set ignore_label to {max(classes, 2)}"
        )
    if pixels.dtype == np.uint16:
        raise DataError(f"{path}: holds 16-bit colours, but a palette has 8-bit ones; save it with 8 bits a channel")
    try:
        shown = _to_eight_bit(pixels, 0, picture.white)
        return colours_to_labels(np.broadcast_to(shown, (*shown.shape[:2], RGB_CHANNELS)), colours)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _from_any_value(pixels: np.ndarray, picture: Picture) -> tuple[np.ndarray, str | None]:
    """Return where any channel is above 0, uint8 (H, W), and a doubt about it."""
    is_gray = _is_gray(pixels)
    lowest, *others = _distinct(pixels[..., :1] if is_gray else pixels)
    colours = [] if is_gray else _colours_of(pixels, picture)
    doubt = None
    if others and lowest > 0 and len(others) == 1:
        hint = f', such as --palette "{",".join(colours)}"' if colours else ""
        doubt = NO_BACKGROUND.format(hint=hint)
    elif len(others) > 1 and 0 < len(colours) <= MAX_CLASSES:
        listed = ",".join(colours)
        doubt = MANY_COLOURS.format(colours=shorten(colours, 8), number=len(colours), palette=listed)
    elif len(others) > 1:
        doubt = MANY_VALUES
    return (pixels > 0).any(-1).astype(np.uint8), doubt


def _from_label_values(pixels: np.ndarray, picture: Picture, path: Path, classes: int) -> np.ndarray:
    labels = pixels[..., 0]
    if not _is_gray(pixels):
        colours = _colours_of(pixels, picture)
        if len(colours) > MAX_CLASSES:
            raise DataError(
                f"{path}: is a coloured mask of more than {MAX_CLASSES} colours, more than there can be classes; save "
                "it without lossy compression and without smoothed edges, and give a palette"
            )
        raise DataError(
            f"{path}: is a coloured mask; give a palette of all classes, background first (this mask is read by "
            f'--classes {len(colours)} --palette "{",".join(colours)}"), or save the label index of each pixel in gray'
        )
    values = _distinct(labels[..., None])
    beyond = values[values >= classes]
    if beyond.size:
        raise DataError(
            f"{path}: holds label values {shorten(beyond)}, but classes={classes} allows 0 to {classes - 1}; raise "
            "classes, renumber the mask, set --ignore-label if a value marks pixels to ignore, or use classes=1 for a "
            "mask of 0 and 255 or of numbered objects"
        )
    return labels.astype(np.uint8)


def _is_gray(pixels: np.ndarray) -> bool:
    return pixels.shape[2] == 1 or all((pixels[rows] == pixels[rows, :, :1]).all() for rows in strips(pixels))


def _colours_of(pixels: np.ndarray, picture: Picture) -> list[str]:
    """Return the colours of a mask in an order that a palette may have; a few more than `MAX_CLASSES` for many."""
    return list_colours(_to_eight_bit(pixels, 0, picture.white), picture.indexes)
