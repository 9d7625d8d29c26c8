"""Read image and mask files: images as RGB, masks as label indexes, both uint8.

A file that can be read in more than one way, or only with a loss of bits, is refused.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .find import DataError, shorten
from .palettes import colours_to_labels, pack_colours, parse_palette

MAX_CLASSES = 256
SIXTEEN_TO_EIGHT_BIT = 257  # 65535 = 255 * 257, so a 16-bit value over 257 is the nearest 8-bit one
# Warnings about masks that may not be binary.
MANY_VALUES = (
    "{count} binary masks hold more than two distinct values; every value above 0 was taken as foreground: {paths}. "
    "If the values are classes, set classes; if they are blurred edges, threshold the masks."
)
NO_BACKGROUND = (
    "{count} binary masks hold two distinct values, both above 0, so all of the mask was taken as foreground: {paths}. "
    "Save the background as 0 (black), or give a palette, background first."
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A PNG file begins with the signature, length and name of the IHDR chunk, width, height, bit depth and colour type.
PNG_BIT_DEPTH, PNG_COLOUR_TYPE = 24, 25
PNG_GRAY = 0
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_BITS = (1, 8, 16)
TIFF_KINDS = ("MINISBLACK", "RGB", "PALETTE", "YCBCR")
INTEGERS = (bool, np.uint8, np.uint16)
# Pillow and tifffile raise these for damaged files, MemoryError for a damaged size.
READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, RuntimeError)
READ_ERRORS += (MemoryError, struct.error, zlib.error)


class Doubts:
    """Doubtful files of a dataset, collected so that one warning names all files with the same doubt."""

    def __init__(self) -> None:
        self.paths: dict[str, list[str | os.PathLike]] = {}

    def add(self, doubt: str | None, path: str | os.PathLike) -> None:
        """Note a file, with a warning that has the fields ``count`` and ``paths``; None is no doubt."""
        if doubt is not None:
            self.paths.setdefault(doubt, []).append(path)

    def warn(self) -> None:
        """Give one warning for each doubt."""
        for doubt, paths in self.paths.items():
            warnings.warn(doubt.format(count=len(paths), paths=shorten(paths)), stacklevel=3)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB.

    Grayscale becomes three equal channels, alpha is dropped, black and white become 0 and 255, 16-bit values are
    divided by 257 and rounded, and indexed files give the colours of their indexes.

    Raises:
        DataError: the file is missing, damaged, has several pages or frames, or has colours other than gray and RGB;
            or it is a 16-bit PNG with colours or alpha, a TIFF that stores white as 0, a TIFF with 16-bit colours
            under a compression that needs imagecodecs; or its values are not integers of 1, 8 or 16 bits.
    """
    path = Path(path)
    pixels = _to_rgb(read_pixels(path))
    if pixels.dtype == np.uint16:
        half = SIXTEEN_TO_EIGHT_BIT // 2
        return ((pixels.astype(np.uint32) + half) // SIXTEEN_TO_EIGHT_BIT).astype(np.uint8)
    return _to_eight_bit(pixels)


def read_mask(
    path: str | os.PathLike,
    classes: int = 1,
    palette: str | Sequence | None = None,
    shape: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read a mask file as (H, W) uint8 label indexes; alpha is dropped, indexed files count by their colours.

    ``classes=1``: every pixel above 0 in any channel is foreground, so masks of 0 and 1 equal masks of 0 and 255; the
    result holds 0 and 1. A mask with more than two distinct values, or with two that are both above 0, gives a warning.
    ``classes>=2``: the pixel value, equal in all channels, is the class. With a palette the position of the colour in
    the palette is the class.

    Args:
        path: mask file.
        classes: 1, or the number of label values including the background.
        palette: colours as :func:`uctrans.data.parse_palette` takes them: ``classes`` of them, or two for one class.
        shape: (H, W) in pixels that the mask must have.

    Raises:
        DataError: the file cannot be read, its size is not ``shape``, a label value is not below ``classes``, a
            coloured mask has no palette, or a colour is not in the palette.
    """
    doubts = Doubts()
    mask = decode_mask(path, classes, palette, shape, doubts)
    doubts.warn()
    return mask


def decode_mask(
    path: str | os.PathLike,
    classes: int,
    palette: str | Sequence | None,
    shape: tuple[int, int] | None,
    doubts: Doubts,
) -> np.ndarray:
    """Read a mask as :func:`read_mask` does, but add doubts about it to ``doubts`` instead of warning."""
    path = Path(path)
    if not 1 <= classes <= MAX_CLASSES:
        raise DataError(f"classes={classes}: masks hold 1 to {MAX_CLASSES} classes; give such a number")
    pixels = read_pixels(path)
    if shape is not None:
        check_shape(path, pixels, shape)
    if palette is not None:
        return _from_colours(pixels, path, classes, palette)
    if classes == 1:
        return _from_any_value(pixels, path, doubts)
    return _from_label_values(pixels, path, classes)


def check_shape(path: Path, pixels: np.ndarray, shape: tuple[int, int]) -> None:
    """Raise DataError if the (H, W) of ``pixels`` is not that of the image, ``shape``."""
    if pixels.shape[:2] != tuple(shape):
        height, width = pixels.shape[:2]
        raise DataError(
            f"{path}: is {height} x {width} pixels (height x width), but its image is {shape[0]} x {shape[1]}; "
            "save both at the same size"
        )


def read_pixels(path: Path) -> np.ndarray:
    """Read an image file as (H, W) or (H, W, 2..4) of bool, uint8 or uint16: gray or RGB, with alpha or without.

    Raises:
        DataError: as :func:`read_image`.
    """
    if not path.is_file():
        raise DataError(f"{path}: is not a file; check the path")
    try:
        with path.open("rb") as file:
            header = file.read(PNG_COLOUR_TYPE + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    pixels = _read_tiff(path) if header.startswith(TIFF_SIGNATURES) else _read_with_pillow(path)
    if header.startswith(PNG_SIGNATURE) and header[PNG_BIT_DEPTH] == 16 and header[PNG_COLOUR_TYPE] != PNG_GRAY:
        # Pillow keeps the high bytes only, so labels would vanish.
        raise DataError(
            f"{path}: is a 16-bit PNG with colours or alpha, which cannot be read without loss; save it as 8-bit PNG, "
            "as 16-bit TIFF, or as 16-bit PNG with one gray channel"
        )
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        raise _unreadable(path, ValueError(f"its pixels have the shape {pixels.shape}"))
    if pixels.dtype not in INTEGERS:
        raise _not_integers(path, pixels.dtype)
    return pixels


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]
    return np.ascontiguousarray(np.broadcast_to(channels, (*pixels.shape[:2], 3)))


def _to_eight_bit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.uint8) * np.uint8(255) if pixels.dtype == bool else pixels


def _from_colours(pixels: np.ndarray, path: Path, classes: int, palette: str | Sequence) -> np.ndarray:
    colours = parse_palette(palette)
    if len(colours) != max(classes, 2):
        raise DataError(
            f"palette: has {len(colours)} colours, but classes={classes} needs {max(classes, 2)}; change one of them"
        )
    if pixels.dtype == np.uint16:
        raise DataError(f"{path}: holds 16-bit colours, but a palette has 8-bit ones; save it with 8 bits a channel")
    try:
        return colours_to_labels(_to_rgb(_to_eight_bit(pixels)), colours)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _from_any_value(pixels: np.ndarray, path: Path, doubts: Doubts) -> np.ndarray:
    if pixels.ndim == 3:
        pixels = pack_colours(_to_rgb(pixels))
    lowest, *others = np.unique(pixels)
    if len(others) > 1:
        doubts.add(MANY_VALUES, path)
    elif others and lowest > 0:
        doubts.add(NO_BACKGROUND, path)
    return (pixels > 0).astype(np.uint8)


def _from_label_values(pixels: np.ndarray, path: Path, classes: int) -> np.ndarray:
    rgb = _to_rgb(pixels)
    labels = rgb[..., 0]
    if (rgb != labels[..., None]).any():
        raise DataError(f"{path}: is a coloured mask; give a palette, or save the label index of each pixel in gray")
    values = np.unique(labels)
    beyond = values[values >= classes]
    if beyond.size:
        raise DataError(
            f"{path}: holds label values {shorten(beyond)}, but classes={classes} allows 0 to {classes - 1}; raise "
            "classes, renumber the mask, or use classes=1 for a mask of 0 and 255"
        )
    return labels.astype(np.uint8)


def _read_with_pillow(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            # MPO, a JPEG variant of cameras, keeps previews as further frames.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            mode = image.mode
            deep_ppm = image.format == "PPM" and mode == "RGB" and _highest_ppm_value(image) > 255
            pixels = np.array(image.convert("RGB") if mode in ("P", "PA") else image)
    except (*READ_ERRORS, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    if frames > 1:
        raise _several_pages(path, frames)
    if deep_ppm:
        raise DataError(f"{path}: is a 16-bit PPM, which cannot be read without loss; save it as 16-bit TIFF")
    if mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        raise DataError(f"{path}: holds {mode} colours; convert it to RGB")
    return pixels


def _highest_ppm_value(image: Any) -> int:
    """Return the value that a PPM file declares for white; Pillow reads the raw bytes if it is 255."""
    arguments = image.tile[0].args
    return 255 if isinstance(arguments, str) else arguments[1]


def _read_tiff(path: Path) -> np.ndarray:
    from tifffile import TiffFile

    try:
        with TiffFile(path) as file:
            page = file.pages[0]
            pages = 1 + sum(not other.is_reduced for other in file.pages[1:])
            # Some programs store a stack behind a single page.
            pages = max(pages, file.series[0].size // max(page.size, 1))
            if pages == 1:
                _check_tiff_page(page, path)
                return _decode_tiff_page(page, path)
    except DataError:
        raise
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error
    raise _several_pages(path, pages)


def _check_tiff_page(page: Any, path: Path) -> None:
    kind = _tiff_kind(page)
    if page.dtype is not None and page.dtype not in INTEGERS:
        raise _not_integers(path, page.dtype)
    if page.bitspersample not in TIFF_BITS:
        raise _not_integers(path, f"{page.bitspersample}-bit")
    if kind == "MINISWHITE":
        # Viewers invert such values and array libraries do not, so either reading would be wrong for someone.
        raise DataError(
            f"{path}: stores white as 0 (photometric MINISWHITE), which programs read in two ways; save it as PNG, or "
            "as TIFF with photometric MINISBLACK"
        )
    if kind not in TIFF_KINDS:
        raise DataError(f"{path}: holds {kind} colours; convert it to RGB")
    if page.samplesperpixel > 4 or page.axes not in ("YX", "YXS", "SYX"):
        raise DataError(
            f"{path}: has {page.samplesperpixel} channels (axes {page.axes}); save it as one gray or RGB image"
        )


def _tiff_kind(page: Any) -> str:
    return getattr(page.photometric, "name", f"unknown ({page.photometric})")


def _decode_tiff_page(page: Any, path: Path) -> np.ndarray:
    """Decode the page with tifffile, or with Pillow where tifffile needs the package imagecodecs."""
    kind = _tiff_kind(page)
    try:
        if kind == "YCBCR":
            return _decode_tiff_with_pillow(page, path)
        pixels = page.asarray()
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        return _decode_tiff_with_pillow(page, path)
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    return _tiff_colours(page)[pixels.astype(np.uint16)] if kind == "PALETTE" else pixels


def _decode_tiff_with_pillow(page: Any, path: Path) -> np.ndarray:
    from PIL import Image

    compression = getattr(page.compression, "name", page.compression)
    remedy = "install the package imagecodecs, or save the file without compression"
    if page.bitspersample == 16 and page.samplesperpixel > 1:
        raise DataError(f"{path}: holds 16-bit colours compressed by {compression}; {remedy}")
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB") if image.mode == "YCbCr" else image)
    except (*READ_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: cannot be read ({compression} compression, {_reason(error)}), it may be damaged; replace it or "
            f"save it again; or {remedy}"
        ) from error
    return _tiff_colours(page)[pixels] if _tiff_kind(page) == "PALETTE" else pixels


def _tiff_colours(page: Any) -> np.ndarray:
    """Return the colours of an indexed page, (indexes, 3) uint8; some programs store 8-bit instead of 16-bit values."""
    colours = np.asarray(page.colormap).T
    return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)


def _several_pages(path: Path, count: int) -> DataError:
    return DataError(f"{path}: holds several pages or frames ({count}); save one image to a file")


def _not_integers(path: Path, kind: Any) -> DataError:
    return DataError(f"{path}: holds {kind} values; save it with 8-bit or 16-bit unsigned integers")


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: cannot be read, it may be damaged ({_reason(error)}); replace it or save it again")


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
