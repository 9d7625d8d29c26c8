"""UCTransNet: a U-Net whose skip connections are a channel transformer and channel gates."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..kernels import check_backend
from ..layers import Encoder
from ..layers.arguments import check_counts, check_probabilities
from .base import ModelFileError, SegmentationModel
from .gated import TransformerSkips, check_patches
from .registry import register_model
from .unet import UNet, scale_widths


@register_model("uctransnet")
class UCTransNet(TransformerSkips, SegmentationModel):
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
        self.encoder = Encoder(in_channels, channels, backend)
        self._build_skips_and_decoder(
            channels,
            patch_sizes,
            image_size,
            backend,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            embedding_dropout=embedding_dropout,
            attention_dropout=attention_dropout,
            mlp_dropout=mlp_dropout,
        )

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
