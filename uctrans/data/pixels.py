"""Read the pixels of an image file as they are stored: one page, unsigned integers, no silent loss of bits."""

import struct
import zlib
from pathlib import Path

import numpy as np

from uctrans.data.errors import DataError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A PNG file begins: signature, length and name of the IHDR chunk, width, height, bit depth, colour type.
PNG_BIT_DEPTH, PNG_COLOUR_TYPE = 24, 25
PNG_GRAY = 0


def read_pixels(path: Path) -> np.ndarray:
    """(H, W) or (H, W, 1..4) of bool, uint8 or uint16.

    Raises:
        DataError: see :func:`uctrans.data.read_image`.
    """
    from imageio.v3 import imread
    from PIL.Image import DecompressionBombError

    if not path.is_file():
        raise DataError(f"{path} is not a file.")
    try:
        pixels = imread(path)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read, it may be damaged ({reason}): replace or re-save it.") from error
    _refuse_deep_png(path)
    if pixels.ndim == 4 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] > 4):
        raise DataError(f"{path} holds several pages or frames (shape {pixels.shape}): save one image to a file.")
    if pixels.ndim == 3 and pixels.shape[2] == 4 and path.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif"):
        raise DataError(f"{path} is a CMYK JPEG: convert it to RGB.")
    if pixels.dtype not in (bool, np.uint8, np.uint16):
        raise DataError(f"{path} holds {pixels.dtype} values: save it with 8 or 16 bit unsigned integers.")
    return pixels


def _refuse_deep_png(path: Path) -> None:
    """Refuse 16-bit PNG files with colours or alpha: Pillow keeps the high byte only, so labels would vanish."""
    with path.open("rb") as file:
        header = file.read(PNG_COLOUR_TYPE + 1)
    if len(header) <= PNG_COLOUR_TYPE or not header.startswith(PNG_SIGNATURE):
        return
    if header[PNG_BIT_DEPTH] == 16 and header[PNG_COLOUR_TYPE] != PNG_GRAY:
        raise DataError(
            f"{path} is a 16-bit PNG with colours or alpha, which cannot be read without loss: save it as 8-bit PNG, "
            "as 16-bit TIFF, or as 16-bit PNG with one gray channel."
        )
