"""UCTransNet: a U-Net whose skip connections are a channel transformer (CCT) and channel gates (CCA).

The encoder computes one feature a scale and a deepest one. The channel transformer turns the features of all scales
into tokens, mixes their channels, and returns a map of tokens for each scale. From the coarsest scale to the finest,
the decoder adds these tokens to the feature, gates its channels, concatenates it and convolves twice. A 1x1 convolution
gives the logits.
"""

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import check_backend
from ..kernels.checks import is_whole_number
from ..layers import ChannelGate, ChannelTransformer, DoubleConv, Encoder, pad_to_multiple
from ..layers.arguments import check_counts, check_probabilities, check_whole_numbers
from ..layers.checkpointing import Stage
from .base import SegmentationModel, check_image, weights_of_other_counts
from .registry import register_model
from .unet import UNet, scale_widths
from .weights import ModelFileError


class GatedStage(Stage):
    """Gate the skip by the decoder, concatenate, convolve twice.

    Skip (B, C, H, W), tokens (B, C, h, w) and decoded feature (B, D, H/2, W/2) give (B, out, H, W).
    """

    def __init__(self, skip_channels: int, decoder_channels: int, out_channels: int, backend: str):
        super().__init__()
        self.gate = ChannelGate(skip_channels, decoder_channels, backend=backend)
        self.convs = DoubleConv(skip_channels + decoder_channels, out_channels, backend)

    def forward(self, skip: Tensor, tokens: Tensor, decoded: Tensor) -> Tensor:
        """Decode ``skip`` (B, C, H, W) plus ``tokens`` (B, C, h, w) together with ``decoded`` (B, D, H/2, W/2)."""
        return self.convs(self.gate(skip, decoded, tokens))


@register_model("uctransnet")
class UCTransNet(SegmentationModel):
    """UCTransNet as published; 66.43 million parameters and 77.2 GFLOP forward at 224 x 224 with the defaults.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits; 1 for a binary mask.
        image_size: side, or (height, width), that the position embeddings are learned for; any other size works too.
        base_channels: width of the finest scale, which doubles from scale to scale; or the widths of all scales.
        num_layers: transformer layers.
        num_heads: attention heads.
        patch_sizes: side of a patch at each scale, finest first, each half of the one before; their number is the
            number of scales.
        mlp_ratio: hidden width of the MLPs, as a multiple of their width.
        embedding_dropout: dropout after the patch embeddings.
        attention_dropout: dropout of attention maps and output projections.
        mlp_dropout: dropout inside the MLPs.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``; see :func:`uctrans.set_backend`.

    Attributes:
        encoder: (B, in_channels, H, W) -> the features of all scales, finest first, and the deepest feature.
        patch_size: side of a patch at the finest scale, in pixels.
        size_multiple: images are padded to a multiple of it.

    Raises:
        ValueError: an argument does not fit the others; the message names it.
        TypeError: an argument is of the wrong type.

    Source: Wang et al., UCTransNet: rethinking the skip connections in U-Net from a channel-wise perspective with
    transformer, AAAI 2022.
    """

    can_start_from_unet = True

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
        _check_patches(patch_sizes)
        check_counts(
            in_channels=in_channels, classes=classes, num_layers=num_layers, num_heads=num_heads, mlp_ratio=mlp_ratio
        )
        check_probabilities(
            embedding_dropout=embedding_dropout, attention_dropout=attention_dropout, mlp_dropout=mlp_dropout
        )
        self.in_channels, self.classes = in_channels, classes
        self.patch_size = patch_sizes[0]
        channels = scale_widths(base_channels, len(patch_sizes))
        self.encoder = self._build_encoder(channels, image_size, backend)
        self.size_multiple = math.lcm(self.patch_size, self.encoder.size_multiple)
        self.transformer = ChannelTransformer(
            channels,
            patch_sizes,
            self.token_grid(image_size),
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

    def _build_encoder(self, channels: tuple[int, ...], image_size: int | Sequence[int], backend: str) -> nn.Module:
        return Encoder(self.in_channels, channels, backend)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) of an image (B, in_channels, H, W) of any size."""
        check_image(image, self.in_channels, next(self.parameters()))
        features, deepest = self.encoder(pad_to_multiple(image, self.size_multiple))
        tokens = self.transformer.token_maps(features)
        return self._decode(features, tokens, deepest, image)

    def forward_with_attention(self, image: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Return :meth:`forward` and the attention maps, averaged over the heads, before dropout.

        ``maps[layer][scale]`` is (B, C, S): how much each of the C channels of a scale attends to the S channels of all
        scales together.
        """
        check_image(image, self.in_channels, next(self.parameters()))
        features, deepest = self.encoder(pad_to_multiple(image, self.size_multiple))
        tokens, maps = self.transformer.token_maps_with_attention(features)
        return self._decode(features, tokens, deepest, image), maps

    def _decode(self, features: list[Tensor], tokens: list[Tensor], deepest: Tensor, image: Tensor) -> Tensor:
        decoded = deepest
        for scale in reversed(range(len(features))):
            decoded = self.decoder[scale](features[scale], tokens[scale], decoded)
        return self.head(decoded)[..., : image.shape[-2], : image.shape[-1]]

    def token_grid(self, image_size: int | Sequence[int]) -> tuple[int, int]:
        """Return rows and columns of tokens of an image, given as a side or as (height, width) in pixels.

        Raises:
            ValueError: ``image_size`` is not positive, or has not two sides.
            TypeError: ``image_size`` is not of whole numbers.
        """
        height, width = padded_size(image_size, self.size_multiple)
        return height // self.patch_size, width // self.patch_size

    def start_from(self, source: SegmentationModel) -> list[str]:
        """Take the weights of a trained network, see :meth:`SegmentationModel.start_from`."""
        if self.can_start_from_unet and isinstance(source, UNet):
            taken = self.load_unet(source)
            return [name for name in source.state_dict() if name not in taken]
        if source.name == self.name and source.config["image_size"] != self.config["image_size"]:
            source = resize_positions(source, self.config["image_size"])
        return super().start_from(source)

    def load_unet(self, unet: UNet) -> list[str]:
        """Take the weights of encoder, decoder convolutions and head from a trained U-Net.

        If it has another number of classes or channels, the last or the first convolution stays as it is.

        Returns:
            The names of the weights that were taken.

        Raises:
            TypeError: ``unet`` is not a :class:`UNet`.
            ModelFileError: ``unet`` has another width or set of skips.
        """
        if not isinstance(unet, UNet):
            raise TypeError(f"unet must be a UNet, such as uctrans.load_model gives; got {type(unet).__name__}")
        own, given = self.state_dict(), unet.state_dict()
        for name in weights_of_other_counts(self, unet):
            del given[name]
        unfit = [key for key, value in given.items() if key not in own or own[key].shape != value.shape]
        if unfit or len(unet.decoder) != len(self.decoder):
            raise ModelFileError(
                f"the U-Net ({unet.config}) does not fit this {type(self).__name__} ({self.config}); both need the "
                f"same encoder and base_channels, four scales, and a U-Net with all skips"
            )
        self.load_state_dict(given, strict=False)
        return list(given)


def padded_size(image_size: int | Sequence[int], multiple: int) -> list[int]:
    """Return height and width in pixels of an image once it is padded to multiples of ``multiple``.

    Args:
        image_size: a side, or (height, width).
        multiple: what height and width become a multiple of.

    Raises:
        ValueError: ``image_size`` is not positive, or has not two sides.
        TypeError: ``image_size`` is not of whole numbers.
    """
    sides = [image_size] * 2 if is_whole_number(image_size) else image_size
    check_whole_numbers("image_size", sides, "a side in pixels, such as 224, or height and width: (224, 320)")
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image_size must be a positive side, or height and width; got {image_size}")
    return [side + -side % multiple for side in sides]


def resize_positions(model: UCTransNet, image_size: int | tuple[int, int]) -> UCTransNet:
    """Return a copy of ``model`` whose position embeddings are interpolated (bicubic) for another image size."""
    resized = copy.deepcopy(model)
    resized.config["image_size"] = image_size if isinstance(image_size, int) else list(image_size)
    grid = resized.token_grid(image_size)
    with torch.no_grad():
        for embedding in resized.transformer.embeddings:
            if embedding.position.shape[-2:] != grid:
                position = F.interpolate(embedding.position, size=grid, mode="bicubic", align_corners=False)
                embedding.position = nn.Parameter(position, requires_grad=embedding.position.requires_grad)
    return resized


def _check_patches(patch_sizes: Sequence[int]) -> None:
    check_whole_numbers("patch_sizes", patch_sizes, "a list of whole numbers, one side a scale, such as (16, 8, 4, 2)")
    if not patch_sizes or any(patch < 1 for patch in patch_sizes):
        raise ValueError(f"patch_sizes needs one positive size a scale; got {list(patch_sizes)}")
    if any(fine != 2 * coarse for fine, coarse in itertools.pairwise(patch_sizes)):
        raise ValueError(
            f"patch_sizes must halve from scale to scale, so that all scales have one token grid; got "
            f"{list(patch_sizes)}"
        )
