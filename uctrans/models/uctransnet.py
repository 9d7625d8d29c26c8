"""UCTransNet: a U-Net whose skip connections are a channel transformer and channel gates."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ..kernels import check_backend
from ..layers import ChannelGate, ChannelTransformer, DoubleConv, Encoder
from ..layers.checks import check_counts, check_probabilities, check_sequence
from .base import ModelFileError, SegmentationModel, check_image, pad_to_multiple
from .registry import register_model
from .unet import UNet, scale_widths


class GatedStage(nn.Module):
    """Gate the skip by the decoder, concatenate, convolve twice: (B, D, H/2, W/2) -> (B, out, H, W)."""

    def __init__(self, skip_channels: int, decoder_channels: int, out_channels: int, backend: str):
        super().__init__()
        self.gate = ChannelGate(skip_channels, decoder_channels, backend=backend)
        self.convs = DoubleConv(skip_channels + decoder_channels, out_channels)

    def forward(self, skip: Tensor, tokens: Tensor, decoded: Tensor) -> Tensor:
        """``skip``: (B, C, H, W), ``tokens``: (B, C, h, w) to add to it, ``decoded``: (B, D, H/2, W/2)."""
        return self.convs(self.gate(skip, decoded, tokens))


@register_model("uctransnet")
class UCTransNet(SegmentationModel):
    """UCTransNet as published; 66.43 million parameters and 77.2 GFLOP forward at 224 x 224 with the defaults.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits; 1 for a binary mask.
        image_size: side, or (height, width), that the position embeddings are learned for; any other size works too.
        base_channels: width of the finest scale, each next one doubling it; or the widths of all scales.
        num_layers: transformer layers.
        num_heads: attention heads.
        patch_sizes: side of a patch at each scale, finest first, each half of the one before; as many as there are
            scales.
        mlp_ratio: hidden width of the MLPs over their width.
        embedding_dropout: dropout after the patch embeddings.
        attention_dropout: dropout of attention maps and output projections.
        mlp_dropout: dropout inside the MLPs.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``; see :func:`uctrans.set_backend`.

    Source: Wang et al., UCTransNet: rethinking the skip connections in U-Net from a channel-wise perspective with
    transformer, AAAI 2022.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        image_size: int | Sequence[int] = 224,
        base_channels: int | Sequence[int] = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        patch_sizes: Sequence[int] = (16, 8, 4, 2),
        mlp_ratio: int = 4,
        embedding_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        mlp_dropout: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        check_backend(backend)
        check_patches(patch_sizes)
        check_counts(
            in_channels=in_channels, classes=classes, num_layers=num_layers, num_heads=num_heads, mlp_ratio=mlp_ratio
        )
        check_probabilities(
            embedding_dropout=embedding_dropout, attention_dropout=attention_dropout, mlp_dropout=mlp_dropout
        )
        self.in_channels, self.classes = in_channels, classes
        self.patch_size = patch_sizes[0]
        self.size_multiple = math.lcm(patch_sizes[0], 2 ** len(patch_sizes))
        channels = scale_widths(base_channels, len(patch_sizes))
        self.encoder = Encoder(in_channels, channels)
        self.transformer = ChannelTransformer(
            channels,
            patch_sizes,
            grid=self.token_grid(image_size),
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            embedding_dropout=embedding_dropout,
            attention_dropout=attention_dropout,
            mlp_dropout=mlp_dropout,
            backend=backend,
        )
        self.decoder = nn.ModuleList(
            GatedStage(width, width, channels[max(scale - 1, 0)], backend) for scale, width in enumerate(channels)
        )
        self.head = nn.Conv2d(channels[0], classes, kernel_size=1)

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

    def load_unet(self, unet: UNet | str | Path) -> list[str]:
        """Start encoder, decoder convolutions and head from a trained U-Net; returns the names of what was taken.

        Args:
            unet: a model, or whatever :func:`uctrans.load_model` reads.

        Raises:
            ModelFileError: it is no U-Net, or of another width, number of classes or set of skips.
        """
        if not isinstance(unet, UNet):
            from .files import load_model  # files knows all models, this one among them

            source, unet = unet, load_model(unet)
            if not isinstance(unet, UNet):
                raise ModelFileError(f"{source} is a {unet.name!r}; start from the checkpoint of a 'unet'")
        own, given = self.state_dict(), unet.state_dict()
        unfit = [key for key, value in given.items() if key not in own or own[key].shape != value.shape]
        if unfit or len(unet.decoder) != len(self.decoder):
            raise ModelFileError(
                f"the U-Net ({unet.config}) does not fit this UCTransNet ({self.config}), both need "
                f"the same in_channels, classes and base_channels, four scales, and a U-Net with all skips"
            )
        self.load_state_dict(given, strict=False)
        return list(given)

    def _decode(self, features: list[Tensor], tokens: list[Tensor], deepest: Tensor, image: Tensor) -> Tensor:
        decoded = deepest
        for scale in reversed(range(len(features))):
            decoded = self.decoder[scale](features[scale], tokens[scale], decoded)
        return self.head(decoded)[..., : image.shape[-2], : image.shape[-1]]

    def token_grid(self, image_size: int | Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tokens of an image: a side, or (height, width), in pixels.

        Raises:
            ValueError: it is no size.
        """
        sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"image_size must be a positive side, or height and width; got {image_size}")
        rows, columns = ((side + -side % self.size_multiple) // self.patch_size for side in sides)
        return rows, columns


def check_patches(patch_sizes: Sequence[int]) -> None:
    """Raise unless each patch is half as wide as the one before; ``ValueError`` says what is wrong."""
    check_sequence("patch_sizes", patch_sizes, "one side a scale")
    if not patch_sizes or any(patch < 1 for patch in patch_sizes):
        raise ValueError(f"patch_sizes needs one positive size a scale; got {list(patch_sizes)}")
    if any(fine != 2 * coarse for fine, coarse in itertools.pairwise(patch_sizes)):
        raise ValueError(
            f"patch_sizes must halve from scale to scale, so that all come to one token grid; got {list(patch_sizes)}"
        )
