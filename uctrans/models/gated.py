"""What networks with a channel transformer for skips and gates in the decoder share, whatever their encoder is."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layers import ChannelGate, ChannelTransformer, DoubleConv
from ..layers.arguments import check_whole_numbers, is_whole_number
from .base import check_image, pad_to_multiple


class GatedStage(nn.Module):
    """Gate the skip by the decoder, concatenate, convolve twice: (B, D, H/2, W/2) -> (B, out, H, W)."""

    def __init__(self, skip_channels: int, decoder_channels: int, out_channels: int, backend: str):
        super().__init__()
        self.gate = ChannelGate(skip_channels, decoder_channels, backend=backend)
        self.convs = DoubleConv(skip_channels + decoder_channels, out_channels, backend)

    def forward(self, skip: Tensor, tokens: Tensor, decoded: Tensor) -> Tensor:
        """``skip``: (B, C, H, W), ``tokens``: (B, C, h, w) to add to it, ``decoded``: (B, D, H/2, W/2)."""
        return self.convs(self.gate(skip, decoded, tokens))


class TransformerSkips:
    """Image to logits through encoder, channel transformer and gated decoder; mixed into a :class:`SegmentationModel`.

    Attributes:
        encoder: (B, in_channels, H, W) -> the features of all scales, finest first, and the deepest feature.
        patch_size: of the finest scale, in pixels.
        size_multiple: images are padded to a multiple of it.
    """

    def _build_skips_and_decoder(
        self,
        channels: Sequence[int],
        patch_sizes: Sequence[int],
        image_size: int | Sequence[int],
        backend: str,
        **transformer_options: Any,
    ) -> None:
        """Add what follows the encoder; its weights are drawn after the encoder's."""
        grid = self.token_grid(image_size)
        self.transformer = ChannelTransformer(channels, patch_sizes, grid=grid, backend=backend, **transformer_options)
        self.decoder = nn.ModuleList(
            GatedStage(width, width, channels[max(scale - 1, 0)], backend) for scale, width in enumerate(channels)
        )
        self.head = nn.Conv2d(channels[0], self.classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, H, W) of any size -> logits (B, classes, H, W)."""
        check_image(image, self.in_channels, self.head.weight)
        features, deepest = self.encoder(pad_to_multiple(image, self.size_multiple))
        tokens = self.transformer.token_maps(features)
        return self._decode(features, tokens, deepest, image)

    def forward_with_attention(self, image: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """:meth:`forward`, and ``maps[layer][scale]``: (B, C, sum C), softmax maps before dropout, mean over heads."""
        check_image(image, self.in_channels, self.head.weight)
        features, deepest = self.encoder(pad_to_multiple(image, self.size_multiple))
        tokens, maps = self.transformer.token_maps_with_attention(features)
        return self._decode(features, tokens, deepest, image), maps

    def token_grid(self, image_size: int | Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tokens of an image: a side, or (height, width), in pixels.

        Raises:
            ValueError: it is no size.
            TypeError: it is not of whole numbers.
        """
        height, width = self._padded(image_size)
        return height // self.patch_size, width // self.patch_size

    def _decode(self, features: list[Tensor], tokens: list[Tensor], deepest: Tensor, image: Tensor) -> Tensor:
        decoded = deepest
        for scale in reversed(range(len(features))):
            decoded = self.decoder[scale](features[scale], tokens[scale], decoded)
        return self.head(decoded)[..., : image.shape[-2], : image.shape[-1]]

    def _padded(self, image_size: int | Sequence[int]) -> list[int]:
        sides = [image_size] * 2 if is_whole_number(image_size) else image_size
        check_whole_numbers("image_size", sides, "a side in pixels, such as 224, or height and width: (224, 320)")
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"image_size must be a positive side, or height and width; got {image_size}")
        return [side + -side % self.size_multiple for side in sides]


def check_patches(patch_sizes: Sequence[int]) -> None:
    """Raise unless each patch is half as wide as the one before; ``ValueError`` or ``TypeError`` says what is wrong."""
    check_whole_numbers("patch_sizes", patch_sizes, "a list of whole numbers, one side a scale, such as (16, 8, 4, 2)")
    if not patch_sizes or any(patch < 1 for patch in patch_sizes):
        raise ValueError(f"patch_sizes needs one positive size a scale; got {list(patch_sizes)}")
    if any(fine != 2 * coarse for fine, coarse in itertools.pairwise(patch_sizes)):
        raise ValueError(
            f"patch_sizes must halve from scale to scale, so that all come to one token grid; got {list(patch_sizes)}"
        )
