"""Write the files of a prediction: of whole images, and of large ones strip by strip, a few rows at a time."""

import contextlib
import math
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..data import DataError, labels_to_colours
from ..data.instances import write_instances
from ..devices import explaining_short_memory
from ..writing import write_png, written_atomically
from .figures import as_rgb, class_colours, instance_overlay, overlay
from .instances import instances_of, mask_classes, mask_probabilities
from .journal import Journal
from .outputs import Planned
from .settings import InferenceError

MEMORY_REMEDY = "use a device with more memory, or smaller images"
PER_IMAGE = (DataError, InferenceError, torch.OutOfMemoryError)  # errors that cost one image
TILE = 256  # side of the tiles of a TIFF file
COMPRESSION = 8  # TIFF's number for zlib
LARGEST_CLASSIC = 2**32 - 2**25  # bytes; larger TIFF files need 64-bit offsets
OVERVIEW = 4096  # pixels of the longer side of an overlay


class Segmented(NamedTuple):
    """An image, uint8 ``(H, W, C)``, with its probabilities, float32 ``(P, H, W)``, and labels, uint8 ``(H, W)``."""

    planned: Planned
    image: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray


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


class Done(NamedTuple):
    """An image whose files are written: their paths, and the number of its pixels."""

    files: list[Path]
    pixels: int


class Failed(NamedTuple):
    """An image that could not be segmented, and why."""

    image: Path
    reason: str

    @classmethod
    def of(cls, planned: Planned, error: Exception) -> "Failed":
        """Return the failure of an image; errors of its data name it themselves."""
        image = planned.sample.image
        return cls(image, str(error) if isinstance(error, DataError) else f"{image}: {error}")


class Writer:
    """Writes what is segmented, in one thread; the context removes what is not complete at its end.

    Args:
        model: The model that has segmented it.
        config: Settings of the prediction.
        journal: Where images that are done are noted.
    """

    def __init__(self, model: nn.Module, config: Any, journal: Journal) -> None:
        self._model, self._config, self._journal = model, config, journal
        self._large: LargeOutputs | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    def write(self, segmented: Segmented | Strip | Failed) -> Done | Failed | None:
        """Write the files of an image, or a strip of it; return None if more strips are to come."""
        if isinstance(segmented, Failed):
            self._discard()
            return segmented
        planned = segmented.planned
        try:
            with explaining_short_memory(MEMORY_REMEDY):
                if isinstance(segmented, Strip):
                    files, pixels = planned.large_files, math.prod(segmented.size)
                    if not self._write_strip(segmented):
                        return None
                else:
                    files, pixels = planned.files, segmented.labels.size
                    write_outputs(segmented, self._model, self._config)
        except PER_IMAGE as error:
            self._discard()
            return Failed.of(planned, error)
        self._journal.note_done(planned.sample.name, files.values())
        return Done(list(files.values()), pixels)

    def _write_strip(self, strip: Strip) -> bool:
        """Return whether the strip was the last one of its image, so that its files are complete."""
        if strip.top == 0:
            self._large = LargeOutputs(strip.planned.large_files, strip.size, self._model)
        if self._large is None:  # an earlier strip of the image failed
            return False
        self._large.add(strip)
        if strip.top + len(strip.labels) < strip.size[0]:
            return False
        self._large.finish()
        self._large = None
        return True

    def _discard(self) -> None:
        if self._large is not None:
            self._large.discard()
            self._large = None


def write_outputs(segmented: Segmented, model: nn.Module, config: Any) -> None:
    """Write all files of one image; raise DataError before the first if 16 bit cannot number its nuclei."""
    files, image = segmented.planned.files, as_rgb(segmented.image)
    probabilities, labels = segmented.probabilities, segmented.labels
    classes, palette = mask_classes(model), model.metadata.get("palette")
    if "instances" in files:
        instances = instances_of(model, probabilities, labels, config)
        write_instances(files["instances"], instances)
        write_png(files["instances overlay"], instance_overlay(image, instances))
    if "npy" in files:
        with written_atomically(files["npy"]) as temporary:
            np.save(temporary, probabilities)
    if "png" in files:
        write_png(files["png"], probability_shown(model, probabilities))
    write_png(files["overlay"], overlay(image, labels, class_colours(classes, palette)))
    write_png(files["mask"], mask_shown(model, labels))


def probability_shown(model: nn.Module, probabilities: np.ndarray) -> np.ndarray:
    """Return the probability of foreground in 8 bits, uint8 ``(H, W)``, from all probabilities ``(P, H, W)``."""
    first = mask_probabilities(model, probabilities[None])[0, 0]  # of the foreground, or of the background
    foreground = first if mask_classes(model) == 1 else 1 - first
    return (foreground * 255).round().astype(np.uint8)


def mask_shown(model: nn.Module, labels: np.ndarray) -> np.ndarray:
    """Return labels ``(H, W)`` as a mask file holds them: 0 and 255, label indexes, or colours ``(H, W, 3)``."""
    if (palette := model.metadata.get("palette")) is not None:
        return labels_to_colours(labels, palette)
    return labels * np.uint8(255) if mask_classes(model) == 1 else labels


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
