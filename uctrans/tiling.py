"""Class probabilities of large images, from overlapping tiles."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .extras import import_extra

OVERLAP = 0.25


def tiled(
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    tile: tuple[int, int],
    batch_size: int,
    overlap: float = OVERLAP,
) -> Tensor:
    """Run ``forward`` on overlapping tiles and blend the results, each weighted by a Gaussian around its centre.

    Args:
        forward: takes (B, C, h, w) and returns (B, P, h, w) of values that may be averaged, such as probabilities.
        inputs: (B, C, H, W). ``forward`` takes images no larger than a tile whole.
        tile: height and width of the tiles.
        batch_size: tiles in one call of ``forward``.
        overlap: share of a tile that overlaps with the next, 0 <= overlap < 1.

    Returns:
        (B, P, H, W).

    Raises:
        ImportError: MONAI is not installed.
    """
    height, width = inputs.shape[-2:]
    window = (min(tile[0], height), min(tile[1], width))
    if window == (height, width):
        return forward(inputs)
    sliding_window_inference = import_extra("monai.inferers", "training").sliding_window_inference
    return sliding_window_inference(inputs, window, batch_size, forward, overlap=overlap, mode="gaussian")


def tiled_rows(
    forward: Callable[[Tensor], Tensor],
    read: Callable[[int, int], Tensor],
    size: tuple[int, int],
    tile: tuple[int, int],
    batch_size: int,
    overlap: float = OVERLAP,
    mirrored: tuple[bool, bool] = (False, False),
) -> Iterator[Tensor]:
    """Yield what `tiled` returns for one image, a few rows at a time from top to bottom.

    Only the rows of one line of tiles are in memory.

    Args:
        forward: see `tiled`.
        read: takes the first row and the one after the last, and returns these rows, (C, rows, W).
        size: height H and width W of the image.
        tile: height and width of the tiles.
        batch_size: tiles in one call of ``forward``.
        overlap: share of a tile that overlaps with the next, 0 <= overlap < 1.
        mirrored: whether tiles are laid out from the bottom, and from the right, as `tiled` does for a mirrored image.

    Yields:
        (P, rows, W), H rows in all.

    Raises:
        ImportError: MONAI is not installed.
    """
    window = (min(tile[0], size[0]), min(tile[1], size[1]))
    weights = import_extra("monai.data.utils", "training").compute_importance_map(window, "gaussian", 0.125)
    tops, lefts = (_tile_starts(*lengths, overlap, flip) for *lengths, flip in zip(size, window, mirrored, strict=True))
    corners = iter([(top, left) for top in tops for left in lefts])
    first, total, total_weight = 0, None, None  # row of the image at which the sums begin
    line, rows = None, None
    while batch := list(itertools.islice(corners, batch_size)):
        tiles = []
        for top, left in batch:
            if top != line:
                line, rows = top, read(top, top + window[0])
            tiles.append(rows[..., left : left + window[1]])
        for (top, left), result in zip(batch, forward(torch.stack(tiles)), strict=True):
            if total is None:
                weights = weights.to(result)
                total = result.new_zeros(len(result), window[0], size[1])
                total_weight = result.new_zeros(window[0], size[1])
            if done := top - first:
                yield total[:, :done] / total_weight[:done]
                first = top
                total, total_weight = (pad(sums[..., done:, :], (0, 0, 0, done)) for sums in (total, total_weight))
            total[..., left : left + window[1]] += result * weights
            total_weight[..., left : left + window[1]] += weights
    yield total / total_weight


def _tile_starts(length: int, tile: int, overlap: float, is_mirrored: bool) -> list[int]:
    """Return where tiles begin along one axis: at equal distances, and the last one where it ends with the image."""
    step = max(int(tile * (1 - overlap)), 1)
    starts = [*range(0, length - tile, step), length - tile]
    return sorted(length - tile - start for start in starts) if is_mirrored else starts


def mean_of_rows(streams: Sequence[Iterator[Tensor]]) -> Iterator[Tensor]:
    """Yield the mean of several streams of rows, (P, rows, W), that have equal numbers of rows in all."""
    held = [next(stream) for stream in streams]
    while held:
        rows = min(part.shape[-2] for part in held)
        yield sum(part[..., :rows, :] for part in held) / len(held)
        held = [part[..., rows:, :] for part in held]
        held = [part if part.shape[-2] else next(stream, None) for part, stream in zip(held, streams, strict=True)]
        if held[0] is None:
            return
