"""Random quarter turns, flips and small rotations of a whole batch at once, on the device that holds it.

Each sample is moved by its own affine map about the image centre, and image and mask are sampled by the same gather,
nearest neighbour. Nothing here waits for the device or branches on what it computed, so the augmentation can be
captured in a CUDA graph (register the generator with the graph, so that every replay draws anew).
"""

import math

import torch
from torch import Tensor

TURN_FLIP_PROBABILITY = 0.5
ROTATION_PROBABILITY = 0.5  # of the samples that were not turned and flipped
LOWEST_ANGLE, HIGHEST_ANGLE = -20, 19  # degrees, both included


def turn_flip_rotate(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augment a batch as the published training code does, every sample by its own draw.

    With probability 1/2 a sample is turned counter-clockwise by a random multiple of 90 degrees and then flipped along
    a random one of the two axes; else with probability 1/2 it is rotated counter-clockwise by a whole angle, uniform in
    -20..19 degrees, same size, zeros outside; else it stays as it is. A map that is not square cannot keep its size
    under a quarter turn: there the turn is by 0 or 180 degrees.

    Args:
        images: (B, C, H, W), any dtype.
        masks: (B, H, W), any dtype.
        generator: source of randomness, on the same device.

    Returns:
        New images and masks of the same shapes and dtypes.

    Source:
        Training transform of the code published with Wang et al., AAAI 2022.
    """
    height, width = images.shape[-2:]
    maps = draw_maps(images.shape[0], height == width, images.device, generator)
    return sample_nearest(images, masks, maps)


def draw_maps(batch: int, square: bool, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random maps for :func:`sample_nearest`, (batch, 2, 2) float32."""
    pick, pick_rotation, turn, axis, angle = torch.rand(5, batch, device=device, generator=generator)
    turned = pick < TURN_FLIP_PROBABILITY
    rotated = ~turned & (pick_rotation < ROTATION_PROBABILITY)
    quarter_turns = torch.floor(4 * turn) if square else 2 * torch.floor(2 * turn)
    degrees = LOWEST_ANGLE + torch.floor((HIGHEST_ANGLE - LOWEST_ANGLE + 1) * angle)
    rotation = rotation_maps(torch.where(rotated, degrees, 0.0))
    turn_flip = turn_flip_maps(quarter_turns, torch.floor(2 * axis))
    return torch.where(turned[:, None, None], turn_flip, rotation)


def rotation_maps(degrees: Tensor) -> Tensor:
    """Maps of counter-clockwise rotations: (B,) degrees to (B, 2, 2)."""
    radians = degrees * (math.pi / 180)
    cosine, sine = torch.cos(radians), torch.sin(radians)
    return torch.stack([cosine, sine, -sine, cosine], dim=-1).unflatten(-1, (2, 2))


def turn_flip_maps(quarter_turns: Tensor, axis: Tensor) -> Tensor:
    """Exact maps of ``flip(rot90(x, quarter_turns), axis)``, axis 0 vertical, 1 horizontal: two (B,) to (B, 2, 2)."""
    turns = torch.round(rotation_maps(90.0 * quarter_turns))
    # The flip acts on output coordinates, so it multiplies the columns of the map.
    signs = torch.stack([2 * axis - 1, 1 - 2 * axis], dim=-1)
    return turns * signs[:, None, :]


def sample_nearest(images: Tensor, masks: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Move images and masks by the same maps about the image centre, nearest neighbour, zeros outside.

    Args:
        images: (B, C, H, W), any dtype.
        masks: (B, H, W), any dtype.
        maps: (B, 2, 2); takes (row, column) of an output pixel, from the centre, to the input point it shows.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device, dtype=maps.dtype) - (height - 1) / 2
    columns = torch.arange(width, device=images.device, dtype=maps.dtype) - (width - 1) / 2
    offsets = maps[:, :, 0, None, None] * rows[:, None] + maps[:, :, 1, None, None] * columns  # (B, 2, H, W)
    source_row = offsets[:, 0] + (height - 1) / 2
    source_column = offsets[:, 1] + (width - 1) / 2
    inside = (source_row >= 0) & (source_row <= height - 1) & (source_column >= 0) & (source_column <= width - 1)
    nearest_row = torch.floor(source_row + 0.5).clamp(0, height - 1)
    nearest_column = torch.floor(source_column + 0.5).clamp(0, width - 1)
    index = (nearest_row.long() * width + nearest_column.long()).flatten(1)  # (B, H * W)
    moved_images = (
        images.flatten(2).gather(2, index[:, None].expand(-1, images.shape[1], -1)).unflatten(2, (height, width))
    )
    moved_masks = masks.flatten(1).gather(1, index).unflatten(1, (height, width))
    zero_image, zero_mask = images.new_zeros(()), masks.new_zeros(())
    return torch.where(inside[:, None], moved_images, zero_image), torch.where(inside, moved_masks, zero_mask)
