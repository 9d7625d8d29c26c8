"""Work on large images strip by strip, so that temporary arrays stay small whatever the size of the image."""

import math
from collections.abc import Callable, Iterator

import numpy as np

STRIP_VALUES = 1 << 22


def split_rows(height: int, row_values: int) -> Iterator[slice]:
    """Yield slices that divide ``height`` rows of ``row_values`` values each into strips, one of them if it is 0."""
    step = max(1, STRIP_VALUES // max(row_values, 1))
    for top in range(0, max(height, 1), step):
        yield slice(top, min(top + step, height))


def strips(pixels: np.ndarray) -> Iterator[slice]:
    """Yield slices that divide the rows of an array into strips."""
    return split_rows(len(pixels), math.prod(pixels.shape[1:]))


def join_strips(function: Callable[[slice], np.ndarray], height: int, row_values: int) -> np.ndarray:
    """Return an array of ``height`` rows, of which ``function`` returns those of a slice."""
    result = None
    for rows in split_rows(height, row_values):
        strip = function(rows)
        if result is None:
            result = np.empty((height, *strip.shape[1:]), strip.dtype)
        result[rows] = strip
    return result


def map_strips(function: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Apply a function, which keeps the rows, to an array strip by strip."""
    return join_strips(lambda rows: function(pixels[rows]), len(pixels), math.prod(pixels.shape[1:]))
