"""Decode image files with Pillow and tifffile, under the same rules whichever of them reads a file.

A picture lies as a viewer shows it, by the orientation tag of EXIF or TIFF. Only what a file declares to be alpha is
alpha. A file that can be read in more than one way, or only with a loss of bits, is refused.
"""

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .find import DataError
from .image_files import (
    CHANNELS_PER_PIXEL,
    READ_ERRORS,
    TIFF_SIGNATURES,
    check_segments,
    check_size,
    needs_imagecodecs,
    open_tiff,
    open_with_pillow,
    pillow_size,
    read_header,
    tiff_size,
    unreadable,
)
from .strips import join_strips, map_strips

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A PNG file begins with the signature, length and name of the IHDR chunk, width, height, bit depth and colour type.
PNG_BIT_DEPTH, PNG_COLOUR_TYPE = 24, 25
PNG_GRAY = 0
TIFF_BITS = (1, 8, 16)
TIFF_KINDS = ("MINISBLACK", "RGB", "PALETTE", "YCBCR")
ASSOCIATED_ALPHA = 1
ALPHA_SAMPLES = (ASSOCIATED_ALPHA, 2)  # values of the tag ExtraSamples
LOSSY_TIFF = ("JPEG", "JP2000", "WEBP", "LERC")  # parts of the names of compressions
UNDECLARED_PAGES = ("IYX", "QYX")  # what tifffile calls pages of which the file does not say what they are
JPEG_SCAN = b"\xff\xda"
MAX_SCANNED = 2e10  # pixels in all scans of a JPEG file, about a minute; encoders write up to about ten scans
ORIENTATION = 274  # the tag of EXIF and TIFF
# Whether to exchange left and right, then the quarter turns counter-clockwise.
UPRIGHT = {2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1)}
WHITE = {np.dtype(bool): 1, np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


class Picture(NamedTuple):
    """A decoded file, as a viewer shows it.

    Attributes:
        channels: (H, W, C) bool, uint8 or uint16, without alpha.
        alpha: (H, W) of the same type: what the file declares to be alpha, or None.
        white: value of full intensity that the format declares.
        indexes: (H, W) uint8 positions in the palette of an indexed file, whose ``channels`` are colours; or None.
        is_lossy: whether the compression of the file changes values.
    """

    channels: np.ndarray
    alpha: np.ndarray | None
    white: int
    indexes: np.ndarray | None
    is_lossy: bool


def decode_file(path: str | os.PathLike, channels: int | None = None) -> Picture:
    """Decode an image file.

    Args:
        path: image file.
        channels: number of pages of a TIFF that are taken as channels, where the file does not say what they are.

    Raises:
        DataError: the file is missing, damaged, has several pages or frames, or has colours other than gray and RGB;
            or it is a 16-bit PNG with colours or alpha, a TIFF that stores white as 0, a TIFF with 16-bit colours or
            undeclared channels under a compression that needs imagecodecs; or its values are not integers of 1, 8 or
            16 bits.
    """
    path = Path(path)
    header = read_header(path)
    is_tiff = header.startswith(TIFF_SIGNATURES)
    picture = _decode_tiff(path, channels) if is_tiff else _decode_with_pillow(path, header)
    if header.startswith(PNG_SIGNATURE) and header[PNG_BIT_DEPTH] == 16 and header[PNG_COLOUR_TYPE] != PNG_GRAY:
        # Pillow keeps the high bytes only, so labels would vanish.
        raise DataError(
            f"{path}: is a 16-bit PNG with colours or alpha, which cannot be read without loss; save it as 8-bit PNG, "
            "as 16-bit TIFF, or as 16-bit PNG with one gray channel"
        )
    if picture.channels.size == 0:
        raise unreadable(path, ValueError(f"its pixels have the shape {picture.channels.shape}"))
    return picture


def _picture(
    path: Path,
    pixels: np.ndarray,
    orientation: int,
    *,
    alpha: int | None = None,
    white: int | None = None,
    indexes: np.ndarray | None = None,
    is_lossy: bool = False,
) -> Picture:
    """Return the picture of (H, W) or (H, W, C) pixels as they are stored; ``alpha`` is the channel of alpha."""
    if pixels.dtype not in WHITE:
        raise _not_integers(path, pixels.dtype)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise unreadable(path, ValueError(f"its pixels have the shape {pixels.shape}"))
    pixels = _turn_upright(pixels, orientation)
    alpha_channel = None
    if alpha is not None:
        alpha_channel = pixels[..., alpha]
        is_last = alpha == pixels.shape[2] - 1
        pixels = pixels[..., :alpha] if is_last else np.delete(pixels, alpha, axis=2)
    if indexes is not None:
        indexes = _turn_upright(indexes, orientation)
    return Picture(pixels, alpha_channel, white or WHITE[pixels.dtype], indexes, is_lossy)


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in UPRIGHT:
        return pixels
    is_mirrored, quarters = UPRIGHT[orientation]
    return np.rot90(pixels[:, ::-1] if is_mirrored else pixels, quarters)


def _decode_with_pillow(path: Path, header: bytes) -> Picture:
    with open_with_pillow(path) as image:
        check_size(path, pillow_size(image))
        kind, mode = image.format, image.mode
        # MPO, a JPEG variant of cameras, keeps previews as further frames.
        if kind != "MPO" and getattr(image, "is_animated", False):
            raise _several_pages(path, "2 or more")
        if mode in ("CMYK", "LAB", "HSV", "YCbCr"):
            raise DataError(f"{path}: holds {mode} colours; convert it to RGB")
        if kind in ("JPEG", "MPO"):
            scans = path.read_bytes().count(JPEG_SCAN)
            if scans * image.width * image.height > MAX_SCANNED:
                raise unreadable(path, ValueError(f"it passes {scans} times over its pixels"))
        white = _white(image, header)
        if white is not None and white > 255 and mode == "RGB":
            raise DataError(f"{path}: is a 16-bit PPM, which cannot be read without loss; save it as 16-bit TIFF")
        indexes = _pixels_of(image) if mode == "P" else None
        if mode in ("P", "PA"):
            has_alpha = mode == "PA" or "transparency" in image.info
            pixels = _pixels_of(image, "RGBA" if has_alpha else "RGB")
        else:
            has_alpha = mode in ("LA", "La", "RGBA", "RGBa")
            pixels = _pixels_of(image, white=white)
        orientation = _orientation_by_exif(image)
    return _picture(
        path,
        pixels,
        orientation,
        alpha=pixels.shape[2] - 1 if has_alpha else None,
        white=white,
        indexes=indexes,
        is_lossy=_is_lossy(path, kind),
    )


def _pixels_of(image: Any, mode: str | None = None, white: int | None = None) -> np.ndarray:
    """Return the pixels of a Pillow image in another mode, or with values as stored if Pillow stretches white."""

    def convert(rows: slice) -> np.ndarray:
        strip = image.crop((0, rows.start, image.width, rows.stop))
        pixels = np.asarray(strip if mode is None else strip.convert(mode))
        return pixels if white is None else _as_stored(pixels, white)

    image.load()
    return join_strips(convert, image.height, image.width * CHANNELS_PER_PIXEL)


def _orientation_by_exif(image: Any) -> int:
    """Return the orientation tag of an image that Pillow has loaded, or 1 if it has no tag or its EXIF is damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except READ_ERRORS:
        return 1


def _white(image: Any, header: bytes) -> int | None:
    """Return the value of white in a file whose values Pillow stretches to 255 or 65535, or None for other files.

    They are PGM, PPM, and PNG of 2 or 4 bits.
    """
    if image.format == "PNG" and header[PNG_COLOUR_TYPE] == PNG_GRAY and header[PNG_BIT_DEPTH] in (2, 4):
        return (1 << header[PNG_BIT_DEPTH]) - 1
    if image.format != "PPM" or image.mode in ("1", "F"):
        return None
    arguments = image.tile[0].args
    if isinstance(arguments, str):  # Pillow reads the raw bytes
        return 65535 if arguments == "I;16B" else 255
    return arguments[-1]


def _as_stored(pixels: np.ndarray, white: int) -> np.ndarray:
    """Undo the stretching of values from 0..white to 255 or 65535."""
    if white > 255:
        return np.rint(pixels * (white / 65535)).astype(np.uint16)
    return pixels if white == 255 else np.rint(pixels * (white / 255)).astype(np.uint8)


def _is_lossy(path: Path, kind: str | None) -> bool:
    if kind == "WEBP":
        content = path.read_bytes()
        start = 12
        while start + 8 <= len(content):  # the chunks of a RIFF file, padded to even lengths
            name, length = struct.unpack_from("<4sI", content, start)
            if name in (b"VP8 ", b"VP8L"):
                return name == b"VP8 "
            start += 8 + length + length % 2
    if kind == "JPEG2000":
        content = path.read_bytes()
        coding_style = content.find(b"\xff\x52")
        return content[coding_style + 13 : coding_style + 14] == b"\0"  # the irreversible wavelet transform
    return kind in ("JPEG", "MPO", "WEBP")


def _decode_tiff(path: Path, channels: int | None) -> Picture:
    with open_tiff(path) as file:
        check_size(path, tiff_size(file, path))
        page, series = file.pages[0], file.series[0]
        # A frame is a page of the same kind as the first.
        pages = 1 + sum(not getattr(other, "is_reduced", False) for other in file.pages[1:])
        # Some programs store a stack behind a single page.
        pages = max(pages, series.size // max(page.size, 1))
        if pages == 1:
            _check_tiff_page(page, path)
            check_segments(page, path)
            return _decode_tiff_page(page, path)
        are_channels = series.axes == "CYX" or (series.axes in UNDECLARED_PAGES and pages == channels)
        if are_channels and series.shape[0] == pages:
            _check_tiff_page(page, path)
            for other in file.pages:
                check_segments(other, path)
            return _picture(path, np.moveaxis(series.asarray(), 0, -1), _orientation_of(page))
    raise _several_pages(path, pages)


def _check_tiff_page(page: Any, path: Path) -> None:
    kind = _tiff_kind(page)
    if page.dtype is not None and page.dtype not in WHITE:
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
    if page.axes not in ("YX", "YXS", "SYX"):
        raise DataError(f"{path}: has the axes {page.axes}; save it as one image with its channels")


def _tiff_kind(page: Any) -> str:
    return getattr(page.photometric, "name", f"unknown ({page.photometric})")


def _orientation_of(page: Any) -> int:
    return page.tags.valueof(ORIENTATION, default=1)


def _decode_tiff_page(page: Any, path: Path) -> Picture:
    """Decode the page with tifffile, or with Pillow where tifffile needs the package imagecodecs."""
    kind, orientation = _tiff_kind(page), _orientation_of(page)
    try:
        if kind == "YCBCR":
            return _decode_tiff_page_with_pillow(page, path)
        pixels = page.asarray()
    except (ImportError, ValueError) as error:
        if not needs_imagecodecs(error):
            raise
        return _decode_tiff_page_with_pillow(page, path)
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    extra = list(map(int, page.extrasamples))
    alpha = next((place for place, sample in enumerate(extra) if sample in ALPHA_SAMPLES), None)
    if alpha is not None:
        is_associated = extra[alpha] == ASSOCIATED_ALPHA
        alpha += page.samplesperpixel - len(extra)
        pixels = _without_association(pixels, alpha) if is_associated else pixels
    return _tiff_picture(page, path, pixels, orientation, alpha)


def _tiff_picture(page: Any, path: Path, pixels: np.ndarray, orientation: int, alpha: int | None) -> Picture:
    indexes = None
    if _tiff_kind(page) == "PALETTE":
        indexes, colours = pixels, _tiff_colours(page)
        pixels = map_strips(lambda strip: colours[strip.astype(np.uint16)], indexes)
    is_lossy = any(name in _compression_of(page) for name in LOSSY_TIFF)
    return _picture(path, pixels, orientation, alpha=alpha, indexes=indexes, is_lossy=is_lossy)


def _without_association(pixels: np.ndarray, alpha: int) -> np.ndarray:
    """Undo the multiplication of colours by alpha, as Pillow does."""
    white = WHITE[pixels.dtype]

    def divide(strip: np.ndarray) -> np.ndarray:
        share = strip[..., alpha : alpha + 1]
        colours = np.minimum(strip.astype(np.uint64) * white // np.maximum(share, 1), white).astype(strip.dtype)
        straight = np.where(share > 0, colours, strip)
        straight[..., alpha] = strip[..., alpha]
        return straight

    return map_strips(divide, pixels)


def _decode_tiff_page_with_pillow(page: Any, path: Path) -> Picture:
    compression = _compression_of(page)
    remedy = "install the package imagecodecs, or save the file without compression"
    if page.bitspersample == 16 and page.samplesperpixel > 1:
        raise DataError(f"{path}: holds 16-bit colours compressed by {compression}; {remedy}")
    if any(int(sample) not in ALPHA_SAMPLES for sample in page.extrasamples):
        # Pillow drops such channels.
        raise DataError(
            f"{path}: has {page.samplesperpixel} channels, not declared as colours or alpha, compressed by "
            f"{compression}; {remedy}"
        )
    try:
        with open_with_pillow(path) as image:
            pixels = _pixels_of(image, "RGB" if image.mode == "YCbCr" else None)
            orientation = _orientation_by_exif(image)  # 1 where Pillow has turned the image itself
            alpha = pixels.shape[2] - 1 if image.mode in ("LA", "RGBA") else None
    except DataError as error:
        raise DataError(f"{error}; or {remedy}") from error
    return _tiff_picture(page, path, pixels, orientation, alpha)


def _compression_of(page: Any) -> str:
    return getattr(page.compression, "name", str(page.compression))


def _tiff_colours(page: Any) -> np.ndarray:
    """Return the colours of an indexed page, (indexes, 3) uint8; some programs store 8-bit instead of 16-bit values."""
    colours = np.asarray(page.colormap).T
    return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)


def _several_pages(path: Path, count: int | str) -> DataError:
    return DataError(
        f"{path}: holds several pages or frames ({count}); save one image to a file, or declare pages that are "
        "channels as such (axes CYX)"
    )


def _not_integers(path: Path, kind: Any) -> DataError:
    return DataError(f"{path}: holds {kind} values; save it with 8-bit or 16-bit unsigned integers")
