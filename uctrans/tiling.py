"""Class probabilities of large images, from overlapping tiles."""

from collections.abc import Callable

from torch import Tensor

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
