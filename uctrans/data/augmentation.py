"""Random changes of whole batches, on the device that holds them: place, colour and sharpness.

Every sample has its own draw, all from one generator, and image and mask move together. Nothing here waits for the
device or branches on values computed there, so a CUDA graph can capture it (register the generator with the graph, so
that every replay draws new numbers).

Place is described by maps, (B, 2, 2): each takes the (row, column) of an output pixel, relative to the image centre, to
the input point that the pixel shows.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from .find import DataError

TURN_FLIP_PROBABILITY = 0.5
ROTATION_PROBABILITY = 0.5  # of the samples that were not turned and flipped
LOWEST_ANGLE, HIGHEST_ANGLE = -20, 19  # degrees, both included

HIGHEST_STRENGTHS = {"rotation": 180, "scale": 8, "gamma": 8, "blur": 8}  # others: 1
DEVIATIONS_PER_RADIUS = 3  # where a Gaussian is cut off

# Rows: red, green and blue that haematoxylin, eosin and DAB absorb.
RGB_FROM_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
HED_FROM_RGB = tuple(map(tuple, np.linalg.inv(RGB_FROM_HED).tolist()))
DARKEST = 1e-6
LOG_UNIT = -math.log(DARKEST)


def turn_flip_rotate(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augment a batch as the published training code does, each sample by its own draw.

    With probability 1/2 a sample is turned counter-clockwise by a random multiple of 90 degrees and then flipped along
    a random one of the two axes; else with probability 1/2 it is rotated counter-clockwise by a whole angle, uniform in
    -20..19 degrees, same size, zeros outside; else it stays as it is. An image that is not square is turned by 0 or 180
    degrees only, to keep its size.

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
    maps = draw_turns_and_rotations(images.shape[0], height == width, images.device, generator)
    return sample_nearest(images, masks, maps)


def draw_turns_and_rotations(batch: int, square: bool, device: torch.device, generator: torch.Generator) -> Tensor:
    """Draw the maps of :func:`turn_flip_rotate`, (batch, 2, 2) float32."""
    pick, pick_rotation, turn, axis, angle = torch.rand(5, batch, device=device, generator=generator)
    turned = pick < TURN_FLIP_PROBABILITY
    rotated = ~turned & (pick_rotation < ROTATION_PROBABILITY)
    quarter_turns = torch.floor(4 * turn) if square else 2 * torch.floor(2 * turn)
    degrees = LOWEST_ANGLE + torch.floor((HIGHEST_ANGLE - LOWEST_ANGLE + 1) * angle)
    rotation = rotation_maps(torch.where(rotated, degrees, 0.0))
    turn_flip = turn_flip_maps(quarter_turns, torch.floor(2 * axis))
    return torch.where(turned[:, None, None], turn_flip, rotation)


def rotation_maps(degrees: Tensor) -> Tensor:
    """Return the maps of counter-clockwise rotations: (B,) degrees to (B, 2, 2)."""
    radians = degrees * (math.pi / 180)
    cosine, sine = torch.cos(radians), torch.sin(radians)
    return torch.stack([cosine, sine, -sine, cosine], dim=-1).unflatten(-1, (2, 2))


def turn_flip_maps(quarter_turns: Tensor, axis: Tensor) -> Tensor:
    """Return the exact maps of ``flip(rot90(x, quarter_turns), axis)``, axis 0 or 1: two (B,) to (B, 2, 2)."""
    turns = torch.round(rotation_maps(90.0 * quarter_turns))
    # The flip acts on output coordinates, so it multiplies the columns of the map.
    signs = torch.stack([2 * axis - 1, 1 - 2 * axis], dim=-1)
    return turns * signs[:, None, :]


def sample_nearest(images: Tensor, masks: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Move images (B, C, H, W) and masks (B, H, W) of any dtype by ``maps``: nearest neighbour, zeros outside."""
    height, width = images.shape[-2:]
    offsets = _input_offsets(maps, (height, width))
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


@dataclass(frozen=True)
class NativeAugmentation:
    """Strengths of the changes of crops; 0 switches a change off. Draws are uniform within the ranges.

    Every crop is turned by a random multiple of 90 degrees and flipped along one axis or not, which keeps its pixels
    (unless one of height and width is even and the other odd). The defaults are conventional values, not tuned.

    Attributes:
        warp_probability: share of the crops that are also rotated and scaled, 0..1.
        rotation: largest angle of that rotation in degrees, to either side, up to 180.
        scale: largest magnification less one: 0.25 enlarges by up to 1.25 and shrinks by up to 1 / 1.25.
        brightness: largest value that is added to all channels, of 0..1, or subtracted.
        contrast: largest share by which differences from the crop's mean gray are enlarged or reduced, up to 1.
        gamma: largest magnitude of the logarithm of the exponent.
        stain_scale: largest share by which each of the stains haematoxylin, eosin and DAB is enlarged or reduced.
        stain_shift: largest amount of each stain that is added or subtracted, in the unit of
            ``skimage.color.rgb2hed``: 0.01 changes the transmitted light by about a tenth.
        blur_probability: share of the crops that are blurred, 0..1.
        blur: largest standard deviation of the Gaussian, in pixels.
        noise: largest standard deviation of noise that is added to every value, of 0..1.

    Raises:
        DataError: a strength is out of its range.
    """

    warp_probability: float = 0.5
    rotation: float = 45.0
    scale: float = 0.25
    brightness: float = 0.1
    contrast: float = 0.15
    gamma: float = 0.1
    stain_scale: float = 0.1
    stain_shift: float = 0.01
    blur_probability: float = 0.2
    blur: float = 1.0
    noise: float = 0.02

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            highest = HIGHEST_STRENGTHS.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
                raise DataError(f"augmentation: {name}={value!r} is out of range; give a number from 0 to {highest}")

    @classmethod
    def of(cls, strengths: Mapping[str, float]) -> "NativeAugmentation":
        """Take strengths by name, the others at their defaults; raise DataError for an unknown name."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in strengths if name not in names]:
            raise DataError(f"augmentation: there is no {unknown[0]!r}; choose from {', '.join(names)}")
        return cls(**strengths)

    def margin(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns beyond each side of a crop of ``size`` that the strongest warp may show."""
        rotation, scale = (self.rotation, self.scale) if self.warp_probability > 0 else (0, 0)
        # Quarter turns swap the directions, so the longer span counts for both.
        span = (1 + scale) * max(_rotated_span(*size, rotation), _rotated_span(*size[::-1], rotation))
        return tuple(max(math.ceil((span - side) / 2), 0) for side in size)


def augment_strongly(
    images: Tensor, masks: Tensor, strengths: NativeAugmentation, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Warp images with their margins, if any, to ``size``, and change their colours, each sample by its own draw.

    Args:
        images: (B, C, H, W) float32 in 0..1; three channels are RGB.
        masks: (B, H, W) uint8.
        strengths: strengths of the changes.
        size: (h, w) of the result.
        generator: source of randomness, on the device of the images.

    Returns:
        (B, C, h, w) and (B, h, w).
    """
    maps = draw_warps(len(images), strengths, images.device, generator)
    images, masks = warp(images, masks, maps, size)
    return change_colours(images, strengths, generator), masks


def draw_warps(batch: int, strengths: NativeAugmentation, device: torch.device, generator: torch.Generator) -> Tensor:
    """Draw maps for `warp`, (batch, 2, 2) float32."""
    turn, flip, axis, pick, angle, size = torch.rand(6, batch, device=device, generator=generator)
    axis = torch.floor(2 * axis)
    turned = turn_flip_maps(torch.floor(4 * turn), axis)
    # A second flip along the same axis undoes the first.
    unflip = turn_flip_maps(torch.zeros_like(axis), axis)
    turned = torch.where((flip < 0.5)[:, None, None], turned @ unflip, turned)
    warped = pick < strengths.warp_probability
    degrees = torch.where(warped, (2 * angle - 1) * strengths.rotation, 0.0)
    factor = torch.where(warped, torch.exp((2 * size - 1) * math.log1p(strengths.scale)), 1.0)
    return factor[:, None, None] * (rotation_maps(degrees) @ turned)


def warp(images: Tensor, masks: Tensor, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sample crops around the centres of larger crops: images bilinearly, masks at the nearest pixel.

    Args:
        images: (B, C, H, W) floating point.
        masks: (B, H, W) uint8.
        maps: (B, 2, 2).
        size: (h, w) of the output. Points outside the input show its reflection.

    Returns:
        (B, C, h, w) and (B, h, w).
    """
    height, width = images.shape[-2:]
    offsets = _input_offsets(maps, size)
    grid = torch.stack([2 * offsets[:, 1] / width, 2 * offsets[:, 0] / height], dim=-1)
    settings = {"padding_mode": "reflection", "align_corners": False}
    moved_images = grid_sample(images, grid.to(images.dtype), mode="bilinear", **settings)
    moved_masks = grid_sample(masks[:, None].float(), grid, mode="nearest", **settings)
    return moved_images, moved_masks[:, 0].to(masks.dtype)


def change_colours(images: Tensor, strengths: NativeAugmentation, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, gamma, sharpness and noise of (B, C, H, W) float32 in 0..1; of RGB also stains."""
    batch, device = len(images), images.device
    stain_scale, stain_shift = 2 * torch.rand(2, batch, 3, 1, 1, device=device, generator=generator) - 1
    brightness, contrast, gamma = 2 * torch.rand(3, batch, 1, 1, 1, device=device, generator=generator) - 1
    pick_blur, blur, noise = torch.rand(3, batch, device=device, generator=generator)
    grain = torch.randn(images.shape, device=device, generator=generator)

    if images.shape[1] == 3:
        stains = rgb_to_stains(images)
        stains = stains * (1 + strengths.stain_scale * stain_scale) + strengths.stain_shift * stain_shift
        images = stains_to_rgb(stains)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (1 + strengths.contrast * contrast) * (images - mean) + strengths.brightness * brightness
    images = images.clamp(0, 1) ** torch.exp(strengths.gamma * gamma)
    blurred = pick_blur < strengths.blur_probability
    images = blur_gaussian(images, torch.where(blurred, strengths.blur * blur, 0.0), strengths.blur)
    return (images + strengths.noise * noise[:, None, None, None] * grain).clamp(0, 1)


def blur_gaussian(images: Tensor, deviations: Tensor, largest: float) -> Tensor:
    """Blur each image of (B, C, H, W) by a Gaussian of its own standard deviation; edges are repeated.

    Args:
        images: (B, C, H, W) floating point.
        deviations: (B,) pixels; 0 leaves the image as it is.
        largest: upper bound of ``deviations``.
    """
    radius = math.ceil(DEVIATIONS_PER_RADIUS * largest)
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-(steps**2) / (2 * deviations[:, None].clamp(min=1e-3) ** 2))
    weights = (weights / weights.sum(1, keepdim=True))[:, :, None, None, None]  # (B, taps, 1, 1, 1)
    height, width = images.shape[-2:]
    rows = pad(images, (0, 0, radius, radius), mode="replicate")
    images = sum(weights[:, tap] * rows[:, :, tap : tap + height] for tap in range(2 * radius + 1))
    columns = pad(images, (radius, radius, 0, 0), mode="replicate")
    return sum(weights[:, tap] * columns[..., tap : tap + width] for tap in range(2 * radius + 1))


def rgb_to_stains(images: Tensor) -> Tensor:
    """Return the amounts of haematoxylin, eosin and DAB of (B, 3, H, W) RGB in 0..1, float32 of the same shape.

    By Beer and Lambert's law the logarithm of the transmitted light is linear in the amount of each stain. An amount of
    1 transmits one millionth of the light, as in scikit-image. Unlike ``skimage.color.rgb2hed``, colours that the three
    stains cannot mix keep negative amounts, so `stains_to_rgb` restores the image.

    Source:
        Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution, Anal. Quant. Cytol.
        Histol. 23 (2001); numbers as in ``skimage.color.rgb_from_hed``.
    """
    amounts = -images.float().clamp(min=DARKEST).log() / LOG_UNIT
    return _mix(amounts, HED_FROM_RGB)


def stains_to_rgb(stains: Tensor) -> Tensor:
    """Invert `rgb_to_stains` and clamp to 0..1: ``skimage.color.hed2rgb`` for a batch."""
    return torch.exp(-LOG_UNIT * _mix(stains.float(), RGB_FROM_HED)).clamp(0, 1)


def _mix(channels: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Multiply every pixel by a (3, 3) matrix from the right, written out because GPU products may round to TF32."""
    return torch.stack([sum(channels[:, i] * matrix[i][j] for i in range(3)) for j in range(3)], dim=1)


def _input_offsets(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the input point of each output pixel, relative to the centre: (B, 2, 2) to (B, 2, h, w)."""
    rows = torch.arange(size[0], device=maps.device, dtype=maps.dtype) - (size[0] - 1) / 2
    columns = torch.arange(size[1], device=maps.device, dtype=maps.dtype) - (size[1] - 1) / 2
    return maps[:, :, 0, None, None] * rows[:, None] + maps[:, :, 1, None, None] * columns


def _rotated_span(along: float, across: float, rotation: float) -> float:
    """Return the largest extent of a rectangle along its side ``along``, rotated by up to ``rotation`` degrees."""
    widest = math.atan2(across, along)  # here the extent is the diagonal
    angle = min(math.radians(rotation), widest)
    return along * math.cos(angle) + across * math.sin(angle)
