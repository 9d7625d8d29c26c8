"""Open image files that anyone may have written: known formats alone, and a limit of pixels checked on the header.

A header can ask for any amount of memory, however small its file is.
"""

import contextlib
import lzma
import math
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..reading import UnreadableError, check_regular_file
from ..system import first_line
from .find import DataError, missing_target

MAX_PIXELS = 180_000_000  # such as 13,000 x 13,000
MAX_PIXELS_VARIABLE = "UCTRANS_MAX_PIXELS"
CHANNELS_PER_PIXEL = 4  # that the limit allows for: more channels need as much memory as more pixels
MAX_PAGES = 1000
UNPACKERS = {8: zlib.decompressobj, 32946: zlib.decompressobj, 34925: lzma.LZMADecompressor}  # by TIFF's compression
HARMLESS_BYTES = 1 << 15  # unpack to a few hundred megabytes at most
# Pillow knows further formats, and runs Ghostscript for one of them. TGA has no signature, so it comes last.
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "WEBP", "TIFF", "TGA")
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
HEADER_BYTES = 26
# Files that stand in the place of images until these programs fetch them.
POINTERS = {b"version https://git-lfs": "git lfs pull", b"/annex/objects/": "git annex get"}
# Pillow and tifffile raise these for damaged files, MemoryError for a damaged size.
READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, RuntimeError)
READ_ERRORS += (MemoryError, AttributeError, AssertionError, ImportError, struct.error, zlib.error, lzma.LZMAError)
# Numbers of OME metadata that tifffile makes lists of this length for, and a range that it makes an array of.
OME_COUNTS = re.compile(r"""\b(Size[A-Z]|IFD|NumPlanes|PlaneCount|First[A-Z])\s*=\s*["']\s*([^"']*)""")
OME_RANGE = re.compile("Along[A-Z]")
MAX_OME_DIGITS = 9
_pillow_limit = threading.Lock()


class ImageSize(NamedTuple):
    """Size of an image as its file stores it, before the orientation tag turns it.

    Attributes:
        kind: format, "TIFF" or as Pillow names it.
        height: pixels.
        width: pixels.
        channels: samples of a pixel in all pages, alpha and reduced copies included.
    """

    kind: str
    height: int
    width: int
    channels: int


def read_size(path: str | os.PathLike) -> ImageSize:
    """Return the size of an image from the header of its file, without decoding it; no limit applies.

    Raises:
        DataError: the file is missing, no regular file, of an unknown format, or its header is damaged.
    """
    path = Path(path)
    if read_header(path).startswith(TIFF_SIGNATURES):
        with open_tiff(path) as file:
            return tiff_size(file, path)
    with open_with_pillow(path) as image:
        return pillow_size(image)


def check_size(path: Path, size: ImageSize) -> None:
    """Raise DataError if an image has no pixels, or more than the limit.

    The limit is `MAX_PIXELS`, or the number in the environment variable UCTRANS_MAX_PIXELS. It holds for up to four
    channels; more of them count as more pixels.
    """
    if min(size[1:]) < 1:
        raise unreadable(path, ValueError(f"it has {size.height} x {size.width} pixels of {size.channels} channels"))
    limit = max_pixels()
    channels = max(size.channels, CHANNELS_PER_PIXEL)
    if size.height * size.width * channels > limit * CHANNELS_PER_PIXEL:
        needed = -(-size.height * size.width * channels // CHANNELS_PER_PIXEL)
        many = f" of {size.channels} channels" if size.channels > CHANNELS_PER_PIXEL else ""
        raise DataError(
            f"{path}: cannot be read, as it has {size.height} x {size.width} pixels{many} (height x width), beyond the "
            f"limit of {limit} that protects the memory; cut it into tiles, or set the environment variable "
            f"{MAX_PIXELS_VARIABLE} to {needed}"
        )


def max_pixels() -> int:
    """Return the limit of pixels; raise DataError if the environment variable is no number of pixels."""
    text = os.environ.get(MAX_PIXELS_VARIABLE, "")
    try:
        limit = int(text) if text.strip() else MAX_PIXELS
    except ValueError:
        limit = 0
    if limit < 1:
        raise DataError(f"{MAX_PIXELS_VARIABLE}: {text!r} is no number of pixels; give one such as {MAX_PIXELS}")
    return limit


def read_header(path: Path) -> bytes:
    """Return the first bytes of an image file, at most `HEADER_BYTES`.

    Raises:
        DataError: the file is missing, no regular file, cannot be opened, or only points to an image elsewhere.
    """
    try:
        check_regular_file(path)
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except FileNotFoundError as error:
        raise DataError(f"{path}: {missing_target(path) or 'is not a file; check the path'}") from error
    except UnreadableError as error:
        raise DataError(f"{error}; replace it by an image") from error
    except (OSError, ValueError) as error:  # ValueError: the path holds a null byte
        raise unreadable(path, error) from error
    for beginning, command in POINTERS.items():
        if header.startswith(beginning):
            raise DataError(f"{path}: is a pointer to an image that is not here; fetch it with {command}")
    return header


@contextlib.contextmanager
def open_with_pillow(path: Path) -> Iterator[Any]:
    """Yield the Pillow image of a file, of which only the header has been read; the limit of Pillow does not apply.

    Raises:
        DataError: Pillow cannot read the file, here or in the block.
    """
    from PIL import Image

    try:
        with _pillow_limit:  # the limit is one for all threads
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(path, formats=PILLOW_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        with image:
            yield image
    except DataError:
        raise
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def pillow_size(image: Any) -> ImageSize:
    """Return the size of an image that Pillow has opened."""
    return ImageSize(image.format, image.height, image.width, len(image.getbands()))


@contextlib.contextmanager
def open_tiff(path: Path) -> Iterator[Any]:
    """Yield the ``tifffile.TiffFile`` of a file, of which only the tags have been read.

    Other files that it names are not opened.

    Raises:
        DataError: the file has a circle of pages, or more than `MAX_PAGES`, or OME metadata of more pages; or tifffile
            cannot read it, here or in the block.
    """
    from tifffile import TiffFile

    try:
        with TiffFile(path, _multifile=False, is_mmstack=False, is_ndtiff=False) as file:
            _check_pages(file, path)
            if file.is_ome:
                _check_ome(file, path)
            yield file
    except DataError:
        raise
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def tiff_size(file: Any, path: Path) -> ImageSize:
    """Return the size of an open TIFF file, whose channels are those of all pages, or of the largest tile.

    Raises:
        DataError: the tags of its pages contradict each other.
    """
    page, series = file.pages[0], file.series[0]
    height, width = page.imagelength, page.imagewidth
    if min(height, width) < 1 or (page.is_tiled and min(page.tilelength, page.tilewidth) < 1):
        raise unreadable(path, ValueError(f"it has {height} x {width} pixels"))
    rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, height)
    columns = page.tilewidth if page.is_tiled else width
    samples = max(page.samplesperpixel, 1) * max(page.imagedepth, 1)
    tile_samples = rows * columns * samples * max(page.tiledepth if page.is_tiled else 1, 1)
    total = max(height * width * samples, tile_samples, series.size)
    return ImageSize("TIFF", height, width, math.ceil(total / (height * width)))


def check_segments(page: Any, path: Path) -> None:
    """Raise DataError if a compressed strip or tile would unpack to more than its pixels, or many share their bytes.

    Args:
        page: page of a TIFF file whose size has been checked.
        path: the file.
    """
    if page.compression == 1:
        return
    file = page.parent.filehandle
    most = (math.prod(page.chunks) if page.is_tiled else page.size) * page.dtype.itemsize
    if sum(page.databytecounts) > 16 * file.size or len(page.dataoffsets) < math.prod(page.chunked):
        raise unreadable(path, ValueError("its strips or tiles are not those of its size"))
    unpacker = UNPACKERS.get(int(page.compression))
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count > HARMLESS_BYTES:
            file.seek(offset)
            if count > 2 * most or (unpacker and len(unpacker().decompress(file.read(count), most + 1)) > most):
                raise unreadable(path, ValueError("a strip or tile unpacks to more than its pixels"))


def needs_imagecodecs(error: Exception) -> bool:
    """Return whether tifffile raised this because a compression needs the package imagecodecs, which is missing."""
    return isinstance(error, ImportError) or "imagecodecs" in str(error)


def unreadable(path: Path, error: BaseException) -> DataError:
    """Return the error of a file that cannot be decoded."""
    cause = "be too large for the memory" if isinstance(error, MemoryError) else "be damaged"
    return DataError(f"{path}: cannot be read, it may {cause} ({first_line(error)}); replace it or save it again")


def _check_pages(file: Any, path: Path) -> None:
    """Visit the pages one by one, because tifffile follows most circles of them without end."""
    places = {file.pages[0].offset}
    for index in range(1, MAX_PAGES + 1):
        try:
            place = file.pages[index].offset
        except IndexError:
            return
        if place in places:
            raise unreadable(path, ValueError("its pages form a circle"))
        places.add(place)
    raise DataError(f"{path}: holds more than {MAX_PAGES} pages; save one image to a file")


def _check_ome(file: Any, path: Path) -> None:
    """Raise DataError if OME metadata ask for more pages than a file may have."""
    metadata = file.ome_metadata or ""
    largest: dict[str, int] = {}
    for name, text in OME_COUNTS.findall(metadata):
        is_number = text.strip().isdecimal() and len(text.strip()) <= MAX_OME_DIGITS
        largest[name] = max(largest.get(name, 0), int(text) if is_number else 10**MAX_OME_DIGITS)
    sizes = {name: largest.pop(name) for name in list(largest) if name.startswith("Size")}
    samples = max(page.size for page in file.pages)
    if (
        OME_RANGE.search(metadata)
        or "<!" in metadata
        or max(largest.values(), default=0) > MAX_PAGES
        or math.prod(sizes.values()) > MAX_PAGES * samples
    ):
        raise DataError(f"{path}: has OME metadata that its pages do not fit; save it as a plain TIFF file")
