"""Random changes of full-resolution crops, a whole batch at once on the device that holds it: place, colour, sharpness.

Every sample has its own draw, all from one generator. Nothing waits for the device or branches on what it computed.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from uctrans.data.augmentation import rotation_maps, turn_flip_maps
from uctrans.data.errors import DataError
from uctrans.data.stains import rgb_to_stains, stains_to_rgb

DEVIATIONS_PER_RADIUS = 3  # a Gaussian is cut off here
HIGHEST = {
    "warp_probability": 1,
    "rotation": 180,
    "brightness": 1,
    "contrast": 1,
    "stain_scale": 1,
    "stain_shift": 1,
    "blur_probability": 1,
    "noise": 1,
}
HIGHEST_OF_OTHERS = 8


@dataclass(frozen=True)
class NativeAugmentation:
    """How strongly crops are changed; 0 switches a change off. Draws are uniform within the ranges.

    Every crop is turned by a random multiple of 90 degrees and flipped along one axis or not, which keeps its pixels
    (unless one of height and width is even and the other odd). The defaults are conventional values, not tuned.

    Attributes:
        warp_probability: share of the crops that are also rotated and scaled, 0..1.
        rotation: largest angle of that rotation in degrees, to either side, up to 180.
        scale: largest magnification less one: 0.25 enlarges by up to 1.25 and shrinks by up to 1 / 1.25.
        brightness: largest value that is added to all channels, of 0..1, or taken off.
        contrast: largest share by which differences from the crop's mean gray are enlarged or reduced, up to 1.
        gamma: largest magnitude of the logarithm of the exponent.
        stain_scale: largest share by which each of the stains haematoxylin, eosin and DAB is enlarged or reduced.
        stain_shift: largest amount of each stain that is added or taken off, in the unit of
            ``skimage.color.rgb2hed``: 0.01 changes the light that comes through by about a tenth.
        blur_probability: share of the crops that are blurred, 0..1.
        blur: largest standard deviation of the Gaussian, in pixels.
        noise: largest standard deviation of noise that is added to every value, of 0..1.

    Raises:
        DataError: a strength out of its range.
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
            highest = HIGHEST.get(name, HIGHEST_OF_OTHERS)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
                raise DataError(f"augmentation: {name}={value!r} must be a number of 0 to {highest}.")

    @classmethod
    def of(cls, strengths: Mapping[str, float]) -> "NativeAugmentation":
        """Strengths by name, the others at their defaults; DataError where a name is unknown."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in strengths if name not in names]:
            raise DataError(f"augmentation: there is no {unknown[0]!r}; choose of {', '.join(names)}.")
        return cls(**strengths)

    def margin(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns beyond each side of a crop of ``size`` that the strongest warp may bring into it."""
        rotation, scale = (self.rotation, self.scale) if self.warp_probability > 0 else (0, 0)
        # Quarter turns come on top, so what a rotated crop spans in one direction it may span in the other.
        span = (1 + scale) * max(rotated_span(*size, rotation), rotated_span(*size[::-1], rotation))
        return tuple(max(math.ceil((span - side) / 2), 0) for side in size)


def rotated_span(along: float, across: float, rotation: float) -> float:
    """Largest extent of a rectangle in the direction of its side ``along``, rotated by up to ``rotation`` degrees."""
    widest = math.atan2(across, along)  # here the extent is the diagonal
    angle = min(math.radians(rotation), widest)
    return along * math.cos(angle) + across * math.sin(angle)


def augment_strongly(
    images: Tensor, masks: Tensor, strengths: NativeAugmentation, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Warp images with their margins, if any, to ``size``, and change their colours, each sample by its own draw.

    Args:
        images: (B, 3, H, W) float32 RGB in 0..1.
        masks: (B, H, W) uint8.
        strengths: how much.
        size: (h, w) of the result.
        generator: of all draws, on the device of the images.

    Returns:
        (B, 3, h, w) and (B, h, w).
    """
    maps = draw_warps(len(images), strengths, images.device, generator)
    images, masks = warp(images, masks, maps, size)
    return change_colours(images, strengths, generator), masks


def draw_warps(batch: int, strengths: NativeAugmentation, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random maps for `warp`, (batch, 2, 2) float32."""
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
    """Sample crops about the centres of larger crops: images bilinearly, masks at the nearest pixel, by the same grid.

    Args:
        images: (B, C, H, W) floating point.
        masks: (B, H, W) uint8.
        maps: (B, 2, 2); takes (row, column) of an output pixel, from the centre, to the input point it shows.
        size: (h, w) of the output. Points outside the input show its reflection.

    Returns:
        (B, C, h, w) and (B, h, w).
    """
    height, width = images.shape[-2:]
    rows = torch.arange(size[0], device=images.device, dtype=maps.dtype) - (size[0] - 1) / 2
    columns = torch.arange(size[1], device=images.device, dtype=maps.dtype) - (size[1] - 1) / 2
    offsets = maps[:, :, 0, None, None] * rows[:, None] + maps[:, :, 1, None, None] * columns  # (B, 2, h, w)
    grid = torch.stack([2 * offsets[:, 1] / width, 2 * offsets[:, 0] / height], dim=-1)
    settings = {"padding_mode": "reflection", "align_corners": False}
    moved_images = grid_sample(images, grid.to(images.dtype), mode="bilinear", **settings)
    moved_masks = grid_sample(masks[:, None].float(), grid, mode="nearest", **settings)
    return moved_images, moved_masks[:, 0].to(masks.dtype)


def change_colours(images: Tensor, strengths: NativeAugmentation, generator: torch.Generator) -> Tensor:
    """Change stains, brightness, contrast, gamma, sharpness and noise: (B, 3, H, W) float32 RGB in 0..1 to the same."""
    batch, device = len(images), images.device
    stain_scale, stain_shift = 2 * torch.rand(2, batch, 3, 1, 1, device=device, generator=generator) - 1
    brightness, contrast, gamma = 2 * torch.rand(3, batch, 1, 1, 1, device=device, generator=generator) - 1
    pick_blur, blur, noise = torch.rand(3, batch, device=device, generator=generator)
    grain = torch.randn(images.shape, device=device, generator=generator)

    stains = rgb_to_stains(images)
    images = stains_to_rgb(stains * (1 + strengths.stain_scale * stain_scale) + strengths.stain_shift * stain_shift)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (1 + strengths.contrast * contrast) * (images - mean) + strengths.brightness * brightness
    images = images.clamp(0, 1) ** torch.exp(strengths.gamma * gamma)
    blurred = pick_blur < strengths.blur_probability
    images = blur_gaussian(images, torch.where(blurred, strengths.blur * blur, 0.0), strengths.blur)
    return (images + strengths.noise * noise[:, None, None, None] * grain).clamp(0, 1)


def blur_gaussian(images: Tensor, deviations: Tensor, largest: float) -> Tensor:
    """Blur each image (B, C, H, W) by a Gaussian of its own standard deviation (B,), at most ``largest``; 0 is none.

    Edges are repeated.
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
