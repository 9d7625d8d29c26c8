"""Read large images a few rows at a time: TIFF files tile by tile, with the next rows decoded in a thread."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .decode import ORIENTATION, WHITE, Picture
from .image_files import (
    HARMLESS_BYTES,
    READ_ERRORS,
    TIFF_SIGNATURES,
    UNPACKERS,
    needs_imagecodecs,
    open_tiff,
    read_header,
    unreadable,
)
from .read import RGB_CHANNELS, Doubts, decode_image, image_of

BAND_ROWS = 256  # decoded at once, or as many as a row of tiles has
KEPT_BANDS = 4  # before the rows that are asked for: who sees the image mirrored asks for earlier ones
LARGEST_SEGMENT = 1 << 26  # bytes of a strip or tile; a file of one strip is read as a whole
JPEG = (6, 7)  # compressions


class ImageRows(NamedTuple):
    """Rows of an image.

    Attributes:
        size: height and width.
        read: function of the first row and the one after the last, which returns uint8 (rows, width, channels).
    """

    size: tuple[int, int]
    read: Callable[[int, int], np.ndarray]


@contextlib.contextmanager
def open_rows(
    path: str | os.PathLike, channels: int, intensity_range: tuple[int, int] | None, doubts: Doubts
) -> Iterator[ImageRows]:
    """Yield the rows of an image file, with the values that :func:`uctrans.data.read_image` gives.

    Gray and RGB TIFF files are read in parts, if they have no alpha, no orientation tag and no compression that needs
    Pillow or imagecodecs; the limit of pixels does not apply to them. All other files are decoded as a whole.

    Args:
        path: image file.
        channels: number of channels.
        intensity_range: values that become 0 and 255, see :func:`uctrans.data.read_image`.
        doubts: takes doubts about the file.

    Raises:
        DataError: see :func:`uctrans.data.read_image`; also while rows are read.
    """
    path = Path(path)
    with contextlib.ExitStack() as opening:  # which turns errors of reading, but no others, into DataError
        rows = _rows_of_tiff(path, opening, channels, intensity_range, doubts)
        if rows is None:
            image = decode_image(path, channels, intensity_range, doubts)
            rows = ImageRows(image.shape[:2], lambda top, bottom: image[top:bottom])
        is_open = opening.pop_all()
    try:
        yield rows
    finally:
        is_open.close()


def _rows_of_tiff(
    path: Path,
    opening: contextlib.ExitStack,
    channels: int,
    intensity_range: tuple[int, int] | None,
    doubts: Doubts,
) -> ImageRows | None:
    """Return the rows of a TIFF file that can be read in parts, which ``opening`` closes, or None for other files."""
    if not read_header(path).startswith(TIFF_SIGNATURES):
        return None
    file = opening.enter_context(open_tiff(path))
    if not _is_readable_in_parts(file, channels):
        return None
    page = file.pages[0]
    rows_of = _contiguous_rows if page.is_contiguous else _segment_rows

    def read(top: int, bottom: int) -> np.ndarray:
        try:
            pixels = rows_of(page, top, bottom)
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
        picture = Picture(pixels, None, WHITE[pixels.dtype], None, False)
        return image_of(picture, path, channels, intensity_range, doubts)

    bands = opening.enter_context(_Bands(read, page.imagelength, _band_rows(page)))
    return ImageRows((page.imagelength, page.imagewidth), bands.rows)


def _is_readable_in_parts(file: Any, channels: int) -> bool:
    page = file.pages[0]
    samples = page.samplesperpixel
    is_plain = (
        all(getattr(other, "is_reduced", False) for other in file.pages[1:])
        and file.series[0].size <= page.size
        and getattr(page.photometric, "name", "") in ("MINISBLACK", "RGB")
        and page.axes in ("YX", "YXS")
        and page.dtype in WHITE
        and page.bitspersample in (8, 16)
        and not page.extrasamples
        and page.tags.valueof(ORIENTATION, default=1) == 1
        and (samples == channels or {samples, channels} == {1, RGB_CHANNELS})
    )
    if not is_plain or page.compression in JPEG:
        return False
    if page.is_contiguous:
        return page.fillorder == 1 and page.predictor == 1
    is_small = math.prod(page.chunks) * page.dtype.itemsize <= LARGEST_SEGMENT
    return is_small and len(page.dataoffsets) == len(page.databytecounts) == math.prod(page.chunked) and _decodes(page)


def _decodes(page: Any) -> bool:
    """Return whether tifffile can decode the compression without imagecodecs."""
    try:
        _segment_rows(page, 0, 1)
    except (ImportError, ValueError) as error:
        return not needs_imagecodecs(error)
    return True


def _band_rows(page: Any) -> int:
    """Return the number of rows to decode at once, a multiple of those of the strips or tiles."""
    rows = 1 if page.is_contiguous else page.chunks[0]
    return -(-BAND_ROWS // rows) * rows


def _contiguous_rows(page: Any, top: int, bottom: int) -> np.ndarray:
    """Read rows (h, W, samples) of a page without compression that lies in one piece."""
    shape = (bottom - top, page.imagewidth, page.samplesperpixel)
    file = page.parent.filehandle
    file.seek(page.dataoffsets[0] + top * math.prod(shape[1:]) * page.dtype.itemsize)
    values = file.read_array(f"{page.parent.byteorder}{page.dtype.char}", math.prod(shape))
    return values.astype(page.dtype, copy=False).reshape(shape)


def _segment_rows(page: Any, top: int, bottom: int) -> np.ndarray:
    """Read rows (h, W, samples) of a page in strips or tiles."""
    height, width = page.chunks[:2]
    across = -(-page.imagewidth // width)
    first, last = top // height, -(-bottom // height)
    pixels = np.zeros(((last - first) * height, page.imagewidth, page.samplesperpixel), page.dtype)
    for index in range(first * across, last * across):
        segment = page.decode(_bytes_of(page, index), index)[0]
        if segment is not None:  # an empty tile is black
            y, x = (index // across - first) * height, index % across * width
            part = segment[0, :, : page.imagewidth - x]
            pixels[y : y + len(part), x : x + part.shape[1]] = part
    return pixels[top - first * height : bottom - first * height]


def _bytes_of(page: Any, index: int) -> bytes | None:
    """Return the bytes of a strip or tile as they are in the file, or None if it is empty."""
    count, file = page.databytecounts[index], page.parent.filehandle
    if not count:
        return None
    most = math.prod(page.chunks) * page.dtype.itemsize
    file.seek(page.dataoffsets[index])
    data = file.read(min(count, 2 * most + 1))
    unpacker = UNPACKERS.get(int(page.compression))
    is_large = len(data) > HARMLESS_BYTES and unpacker and len(unpacker().decompress(data, most + 1)) > most
    if is_large or len(data) > 2 * most:
        raise ValueError("a strip or tile unpacks to more than its pixels")
    return data


class _Bands:
    """Context of an image whose bands of rows are decoded by a thread, one ahead of the rows that are asked for."""

    def __init__(self, read: Callable[[int, int], np.ndarray], height: int, band_rows: int) -> None:
        self._read, self._height, self._band_rows = read, height, band_rows
        self._decoded: dict[int, Future[np.ndarray]] = {}

    def __enter__(self) -> "_Bands":
        self._thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Return rows (bottom - top, W, channels)."""
        first, last = top // self._band_rows, (bottom - 1) // self._band_rows
        for band in range(first, min(last + 2, -(-self._height // self._band_rows))):
            if band not in self._decoded:
                start = band * self._band_rows
                end = min(start + self._band_rows, self._height)
                self._decoded[band] = self._thread.submit(self._read, start, end)
        for band in [band for band in self._decoded if band < first - KEPT_BANDS]:
            del self._decoded[band]
        rows = np.concatenate([self._decoded[band].result() for band in range(first, last + 1)])
        return rows[top - first * self._band_rows : bottom - first * self._band_rows]
