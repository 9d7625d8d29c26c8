"""Write the results of an image that is segmented in strips, without holding more than a few of its rows."""

import contextlib
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from ..writing import write_png, written_atomically
from .figures import as_rgb, class_colours, overlay
from .instances import mask_classes
from .outputs import Planned, mask_shown, probability_shown

TILE = 256  # side of the tiles of a TIFF file
COMPRESSION = 8  # TIFF's number for zlib
LARGEST_CLASSIC = 2**32 - 2**25  # bytes; larger TIFF files need 64-bit offsets
OVERVIEW = 4096  # pixels of the longer side of an overlay


class Strip(NamedTuple):
    """Consecutive rows of a segmented image.

    Attributes:
        planned: The image.
        top: Number of the first row.
        size: Height and width of the whole image.
        image: uint8 ``(rows, W, C)``.
        probabilities: float32 ``(P, rows, W)``.
        labels: uint8 ``(rows, W)``.
    """

    planned: Planned
    top: int
    size: tuple[int, int]
    image: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray


class LargeOutputs:
    """The files of one image, which get their names when it is complete.

    The mask and the 8-bit probability are TIFF files in tiles, compressed by zlib. The overlay is of every n-th pixel,
    so that its longer side has no more than 4096.

    Args:
        files: Files to write by kind, see `uctrans.inference.outputs.ENDINGS`.
        size: Height and width of the image.
        model: The model that has segmented it.
    """

    def __init__(self, files: dict[str, Path], size: tuple[int, int], model: nn.Module) -> None:
        self._files, self._size, self._model = files, size, model
        self._step = -(-max(size) // OVERVIEW)
        self._overview: list[tuple[np.ndarray, np.ndarray]] = []
        self._open = contextlib.ExitStack()
        folder = files["mask"].parent
        colours = () if model.metadata.get("palette") is None else (3,)
        self._mask = self._open.enter_context(_TiffTiles(folder, size, colours))
        if "png" in files:
            self._probability = self._open.enter_context(_TiffTiles(folder, size))
        if "npy" in files:
            self._npy = self._open.enter_context(written_atomically(files["npy"]))

    def add(self, strip: Strip) -> None:
        """Write the next rows."""
        self._mask.add(mask_shown(self._model, strip.labels))
        if "png" in self._files:
            self._probability.add(probability_shown(self._model, strip.probabilities))
        if "npy" in self._files:
            self._write_probabilities(strip)
        rows = slice(-strip.top % self._step, None, self._step)
        kept = rows, slice(None, None, self._step)
        self._overview.append((as_rgb(strip.image[kept]).copy(), strip.labels[kept].copy()))

    def finish(self) -> None:
        """Complete the files."""
        with self._open:
            if "png" in self._files:
                self._probability.write(self._files["png"])
            images, labels = map(np.concatenate, zip(*self._overview, strict=True))
            colours = class_colours(mask_classes(self._model), self._model.metadata.get("palette"))
            write_png(self._files["overlay"], overlay(images, labels, colours))
            self._mask.write(self._files["mask"])

    def discard(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(_Discarded), self._open:
            raise _Discarded

    def _write_probabilities(self, strip: Strip) -> None:
        shape = (len(strip.probabilities), *self._size)
        with self._npy.open("r+b") as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            for number, plane in enumerate(strip.probabilities):
                file.seek(start + (number * self._size[0] + strip.top) * self._size[1] * plane.itemsize)
                file.write(np.ascontiguousarray(plane))


class _Discarded(Exception):
    """Ends the contexts of files that are not to be completed."""


class _TiffTiles:
    """Context of a TIFF file of uint8 that takes rows one after the other: compressed tiles in a nameless file first.

    Args:
        folder: Where the nameless file lies.
        size: Height and width of the image.
        samples: () for one value a pixel, or (3,) for colours.
    """

    def __init__(self, folder: Path, size: tuple[int, int], samples: tuple[int, ...] = ()) -> None:
        self._folder, self._shape = folder, (*size, *samples)
        self._lengths: list[int] = []
        self._waiting = np.empty((0, *self._shape[1:]), np.uint8)
        self._rows = 0

    def __enter__(self) -> "_TiffTiles":
        self._file = tempfile.TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: np.ndarray) -> None:
        self._waiting = np.concatenate([self._waiting, rows])
        self._rows += len(rows)
        is_last = self._rows == self._shape[0]
        while len(self._waiting) >= TILE or (is_last and len(self._waiting)):
            line, self._waiting = self._waiting[:TILE], self._waiting[TILE:]
            for left in range(0, self._shape[1], TILE):
                part = line[:, left : left + TILE]
                tile = np.zeros((TILE, TILE, *self._shape[2:]), np.uint8)
                tile[: part.shape[0], : part.shape[1]] = part
                self._lengths.append(self._file.write(zlib.compress(tile)))

    def write(self, path: Path) -> None:
        import tifffile

        self._file.seek(0)
        with written_atomically(path) as temporary:
            tifffile.imwrite(
                temporary,
                (self._file.read(length) for length in self._lengths),
                shape=self._shape,
                dtype=np.uint8,
                tile=(TILE, TILE),
                compression=COMPRESSION,
                photometric="rgb" if len(self._shape) == 3 else "minisblack",
                metadata=None,
                bigtiff=np.prod(self._shape, dtype=np.int64) > LARGEST_CLASSIC,
            )
