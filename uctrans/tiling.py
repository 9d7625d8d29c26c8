"""Class probabilities of images larger than the network is run on, from tiles that overlap."""

from collections.abc import Callable

from torch import Tensor

from uctrans.extras import import_extra

OVERLAP = 0.25


def tiled(
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    tile: tuple[int, int],
    batch_size: int,
    overlap: float = OVERLAP,
) -> Tensor:
    """Run ``forward`` on overlapping tiles and blend the results with a Gaussian about the centre of each.

    Args:
        forward: takes (B, C, h, w) and gives (B, P, h, w), values that may be averaged, as probabilities.
        inputs: (B, C, H, W). Images no larger than a tile are given to ``forward`` whole.
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
