"""The U-Net that UCTransNet extends, with any subset of its skip connections."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.checks import is_whole_number
from ..layers import DoubleConv, Encoder, pad_to_multiple
from ..layers.arguments import check_counts, check_whole_numbers
from ..layers.checkpointing import Stage
from .base import SegmentationModel, check_image
from .registry import register_model

NUM_SCALES = 4


class SkipStage(Stage):
    """Upsample, concatenate the skip if there is one, convolve twice: (B, D, H/2, W/2) -> (B, out, H, W)."""

    def __init__(self, skip_channels: int, decoder_channels: int, out_channels: int):
        super().__init__()
        self.convs = DoubleConv(skip_channels + decoder_channels, out_channels)

    def forward(self, skip: Tensor | None, decoded: Tensor) -> Tensor:
        """Decode ``skip`` (B, skip_channels, H, W), or ``None``, together with ``decoded`` (B, D, H/2, W/2)."""
        decoded = F.interpolate(decoded, scale_factor=2.0, mode="nearest")
        return self.convs(decoded if skip is None else torch.cat([skip, decoded], dim=1))


@register_model("unet")
class UNet(SegmentationModel):
    """U-Net with nearest-neighbour upsampling and plain skips; its weights have the names of UCTransNet's.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits; 1 for a binary mask.
        base_channels: width of the finest of the four scales, which doubles from scale to scale; or all four widths.
        skips: which skip connections exist, from 1 for the finest to 4 for the coarsest; ``()`` for none.

    Raises:
        ValueError: an argument does not fit the others; the message names it.
        TypeError: an argument is of the wrong type.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        base_channels: int | Sequence[int] = 64,
        skips: Sequence[int] = (1, 2, 3, 4),
    ):
        super().__init__()
        check_counts(in_channels=in_channels, classes=classes)
        check_whole_numbers("skips", skips, f"a list of numbers of 1 to {NUM_SCALES}, such as (1, 2), or ()")
        if not set(skips) <= set(range(1, NUM_SCALES + 1)) or len(set(skips)) != len(list(skips)):
            raise ValueError(f"skips must be different numbers of 1 to {NUM_SCALES}; got {list(skips)}")
        self.in_channels, self.classes = in_channels, classes
        channels = scale_widths(base_channels, NUM_SCALES)
        self.has_skip = [scale + 1 in skips for scale in range(NUM_SCALES)]
        self.encoder = Encoder(in_channels, channels)
        self.decoder = nn.ModuleList(
            SkipStage(width if has_skip else 0, width, channels[max(scale - 1, 0)])
            for scale, (width, has_skip) in enumerate(zip(channels, self.has_skip, strict=True))
        )
        self.head = nn.Conv2d(channels[0], classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) of an image (B, in_channels, H, W) of any size."""
        check_image(image, self.in_channels, next(self.parameters()))
        height, width = image.shape[-2:]
        features, decoded = self.encoder(pad_to_multiple(image, self.encoder.size_multiple))
        for scale in reversed(range(NUM_SCALES)):
            skip = features[scale] if self.has_skip[scale] else None
            decoded = self.decoder[scale](skip, decoded)
        return self.head(decoded)[..., :height, :width]


def scale_widths(base_channels: int | Sequence[int], num_scales: int) -> tuple[int, ...]:
    """Return the widths of the scales: one number doubles from scale to scale, a sequence gives each."""
    if is_whole_number(base_channels):
        base_channels = [base_channels * 2**scale for scale in range(num_scales)]
    example = tuple(64 * 2**scale for scale in range(num_scales))
    description = f"a whole number, such as 64, or a list of one for each of {num_scales} scales, such as {example}"
    check_whole_numbers("base_channels", base_channels, description)
    if len(base_channels) != num_scales or min(base_channels) < 1:
        raise ValueError(f"base_channels must be one width, or {num_scales}, at least 1 each; got {base_channels}")
    return tuple(base_channels)
