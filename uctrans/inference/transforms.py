"""Flips, turns and changes of size of images and probabilities before and after a network."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# Each transform flips the columns if its second value is set, then turns counter-clockwise by its first, in quarters.
TRANSFORMS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "d4": tuple((turns, flip) for flip in (False, True) for turns in range(4)),
}


def transform(images: Tensor, turns: int, flip: bool) -> Tensor:
    """Flip the columns of ``(..., H, W)`` if ``flip`` is set, then turn counter-clockwise by ``turns`` quarters."""
    return torch.rot90(images.flip(-1) if flip else images, turns, (-2, -1))


def inverse_transform(images: Tensor, turns: int, flip: bool) -> Tensor:
    """Undo `transform`."""
    images = torch.rot90(images, -turns, (-2, -1))
    return images.flip(-1) if flip else images


def untransformed_tiles(tile: tuple[int, int], turns: int, flip: bool) -> tuple[tuple[int, int], tuple[bool, bool]]:
    """Return how tiles of a transformed image lie in the image itself.

    Returns:
        Height and width of a tile, and whether the tiles are laid out from the bottom, and from the right.
    """
    return tile if turns % 2 == 0 else tile[::-1], (turns in (2, 3), (turns in (1, 2)) != flip)


def enlarge(probabilities: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``(B, P, h, w)`` to ``size`` bilinearly; pixel centres stay in place and nothing is smoothed."""
    if probabilities.shape[-2:] == size:
        return probabilities
    return interpolate(probabilities, size, mode="bilinear", align_corners=False)


def resize_smoothly(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``(B, C, h, w)`` to ``size`` bilinearly, over wider neighbourhoods where it shrinks (anti-aliasing)."""
    return interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
