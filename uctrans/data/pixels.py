"""Read the pixels of an image file: one page, unsigned integers, as they look, without silent loss of bits.

Indexed colours become colours in every format, and what cannot be read in one way only is refused.
"""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from uctrans.data.errors import DataError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A PNG file begins: signature, length and name of the IHDR chunk, width, height, bit depth, colour type.
PNG_BIT_DEPTH, PNG_COLOUR_TYPE = 24, 25
PNG_GRAY = 0
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_BITS = (1, 8, 16)
TIFF_KINDS = ("MINISBLACK", "RGB", "PALETTE", "YCBCR")
INTEGERS = (bool, np.uint8, np.uint16)
# What Pillow and tifffile raise for damaged files; MemoryError where a size in the file was changed.
READ_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def read_pixels(path: Path) -> np.ndarray:
    """(H, W) or (H, W, 2..4) of bool, uint8 or uint16: gray, gray and alpha, RGB, RGB and alpha.

    Raises:
        DataError: see :func:`uctrans.data.read_image`.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file.")
    try:
        with path.open("rb") as file:
            header = file.read(PNG_COLOUR_TYPE + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    pixels = _read_tiff(path) if header.startswith(TIFF_SIGNATURES) else _read_with_pillow(path)
    if header.startswith(PNG_SIGNATURE) and header[PNG_BIT_DEPTH] == 16 and header[PNG_COLOUR_TYPE] != PNG_GRAY:
        # Pillow keeps the high bytes only, so labels would vanish.
        raise DataError(
            f"{path} is a 16-bit PNG with colours or alpha, which cannot be read without loss: save it as 8-bit PNG, "
            "as 16-bit TIFF, or as 16-bit PNG with one gray channel."
        )
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        raise _unreadable(path, ValueError(f"its pixels have the shape {pixels.shape}"))
    if pixels.dtype not in INTEGERS:
        raise DataError(f"{path} holds {pixels.dtype} values: save it with 8 or 16 bit unsigned integers.")
    return pixels


def _read_with_pillow(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            # Cameras put previews behind the photograph, in the JPEG variant MPO.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            mode = image.mode
            deep_ppm = image.format == "PPM" and mode == "RGB" and _highest_ppm_value(image) > 255
            pixels = np.array(image.convert("RGB") if mode in ("P", "PA") else image)
    except (*READ_ERRORS, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    if frames > 1:
        raise _several_pages(path, frames)
    if deep_ppm:
        raise DataError(f"{path} is a 16-bit PPM, which cannot be read without loss: save it as 16-bit TIFF.")
    if mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        raise DataError(f"{path} holds {mode} colours: convert it to RGB.")
    return pixels


def _highest_ppm_value(image: Any) -> int:
    """The value that a PPM file declares for white; Pillow reads the raw bytes where that is 255."""
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
                _refuse_tiff_kind(page, path)
                return _tiff_page(page, path)
    except DataError:
        raise
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error
    raise _several_pages(path, pages)


def _refuse_tiff_kind(page: Any, path: Path) -> None:
    if page.dtype is not None and page.dtype not in INTEGERS:
        raise DataError(f"{path} holds {page.dtype} values: save it with 8 or 16 bit unsigned integers.")
    if page.bitspersample not in TIFF_BITS:
        raise DataError(f"{path} holds {page.bitspersample}-bit values: save it with 8 or 16 bit unsigned integers.")
    if _tiff_kind(page) == "MINISWHITE":
        # Viewers turn such values round and array libraries do not, so either reading would be wrong for someone.
        raise DataError(
            f"{path} stores white as 0 (photometric MINISWHITE), so its values can be meant in two ways: save it as "
            "PNG, or as TIFF with photometric MINISBLACK, black being 0."
        )
    if _tiff_kind(page) not in TIFF_KINDS:
        raise DataError(f"{path} holds {_tiff_kind(page)} colours: convert it to RGB.")
    if page.samplesperpixel > 4 or page.axes not in ("YX", "YXS", "SYX"):
        raise DataError(
            f"{path} has {page.samplesperpixel} channels (axes {page.axes}): save it as one gray or RGB image."
        )


def _tiff_kind(page: Any) -> str:
    return getattr(page.photometric, "name", f"unknown ({page.photometric})")


def _tiff_page(page: Any, path: Path) -> np.ndarray:
    """Decode the page with tifffile, or with Pillow what tifffile needs the package imagecodecs for."""
    kind = _tiff_kind(page)
    try:
        if kind == "YCBCR":
            return _tiff_page_with_pillow(page, path)
        pixels = page.asarray()
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        return _tiff_page_with_pillow(page, path)
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    if kind == "PALETTE":
        return _tiff_colours(page)[pixels.astype(np.uint16)]
    return pixels


def _tiff_page_with_pillow(page: Any, path: Path) -> np.ndarray:
    from PIL import Image

    compression = getattr(page.compression, "name", page.compression)
    remedy = "install the package imagecodecs, or save the file without compression"
    if page.bitspersample == 16 and page.samplesperpixel > 1:
        raise DataError(f"{path} holds 16-bit colours compressed by {compression}: {remedy}.")
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB") if image.mode == "YCbCr" else image)
    except (*READ_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}, compressed by {compression}, cannot be read, it may be damaged ({_reason(error)}): replace or "
            f"re-save it; or {remedy}."
        ) from error
    return _tiff_colours(page)[pixels] if _tiff_kind(page) == "PALETTE" else pixels


def _tiff_colours(page: Any) -> np.ndarray:
    """The colours of an indexed page, (indexes, 3) uint8; some programs write 8-bit values in place of 16-bit ones."""
    colours = np.asarray(page.colormap).T
    return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)


def _several_pages(path: Path, count: int) -> DataError:
    return DataError(f"{path} holds several pages or frames ({count}): save one image to a file.")


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path} cannot be read, it may be damaged ({_reason(error)}): replace or re-save it.")


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
