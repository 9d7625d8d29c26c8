"""The last stage of a prediction: the files of whole images, and of large ones strip by strip."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data import DataError
from ..devices import explaining_short_memory
from .journal import Journal
from .large import LargeOutputs, Strip
from .outputs import Planned, Segmented, write_outputs
from .settings import InferenceError

MEMORY_REMEDY = "use a device with more memory, or smaller images"
PER_IMAGE = (DataError, InferenceError, torch.OutOfMemoryError)  # errors that cost one image


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
