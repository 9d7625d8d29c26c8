"""The dual-branch UCTransNet: parallel regular and dilated convolutions, and a small U inside every level."""

import math
from collections.abc import Sequence

from ..kernels.checks import is_whole_number
from ..layers import DualBranchEncoder
from ..layers.arguments import check_whole_numbers
from .registry import register_model
from .uctransnet import UCTransNet, padded_size

SINGLE = {"dilations": "a whole number, such as 2, or ", "nested_channels": "a whole number, such as 32, or None, or "}


@register_model("dual_branch_uctransnet")
class DualBranchUCTransNet(UCTransNet):
    """UCTransNet with another encoder, which sees further.

    Every down-sampling convolves the pooled map twice without and twice with dilation, in parallel, and every level has
    a U^2-Net block: a small U with a residual connection around it. Transformer, gates and decoder are those of
    UCTransNet. 74.04 million parameters and 116.5 GFLOP forward at 224 x 224 with the defaults, of which the small Us
    take 10.33 million and 45.3 GFLOP.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits; 1 for a binary mask.
        image_size: side, or (height, width), that the position embeddings are learned for; any other size works too.
        base_channels: width of the finest scale, which doubles from scale to scale; or the widths of all scales. From
            the second scale on they are even, because each branch gives half.
        dilations: dilation of the dilated branch: one for all down-samplings, or one for each, finest first.
        depths: how many times the U inside each level halves its map, finest first; 0 for a level without a U.
        nested_channels: width inside the U of the finest level, which doubles from level to level; or the widths inside
            all Us; ``None`` for half of the width of each level.
        num_layers: transformer layers.
        num_heads: attention heads.
        patch_sizes: side of a patch at each scale, finest first, each half of the one before; their number is the
            number of scales.
        mlp_ratio: hidden width of the MLPs, as a multiple of their width.
        embedding_dropout: dropout after the patch embeddings.
        attention_dropout: dropout of attention maps and output projections.
        mlp_dropout: dropout inside the MLPs.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``; see :func:`uctrans.set_backend`.

    Raises:
        ValueError: an argument does not fit the others, or the maps of an image of ``image_size`` are too small for a
            dilation or depth; the message names it.
        TypeError: an argument is of the wrong type.

    Source: Wang et al., UCTransNet, AAAI 2022, for transformer and gates; Qin et al., U^2-Net, Pattern Recognition
    2020, for the U inside a level.
    """

    can_start_from_unet = False

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        image_size: int | Sequence[int] = 224,
        base_channels: int | Sequence[int] = 64,
        dilations: int | Sequence[int] = 2,
        depths: Sequence[int] = (4, 3, 2, 1),
        nested_channels: int | Sequence[int] | None = None,
        num_layers: int = 4,
        num_heads: int = 4,
        patch_sizes: Sequence[int] = (16, 8, 4, 2),
        mlp_ratio: int = 4,
        embedding_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        mlp_dropout: float = 0.0,
        backend: str = "auto",
    ):
        # Set before the base class builds the encoder from them.
        self.dilations, self.depths, self.nested_channels = dilations, depths, nested_channels
        super().__init__(
            in_channels=in_channels,
            classes=classes,
            image_size=image_size,
            base_channels=base_channels,
            num_layers=num_layers,
            num_heads=num_heads,
            patch_sizes=patch_sizes,
            mlp_ratio=mlp_ratio,
            embedding_dropout=embedding_dropout,
            attention_dropout=attention_dropout,
            mlp_dropout=mlp_dropout,
            backend=backend,
        )

    def _build_encoder(
        self, channels: tuple[int, ...], image_size: int | Sequence[int], backend: str
    ) -> DualBranchEncoder:
        num_scales = len(channels)
        _check_even(channels)
        dilations = [self.dilations] * num_scales if is_whole_number(self.dilations) else self.dilations
        _check_per_scale("dilations", dilations, num_scales, at_least=1)
        _check_per_scale("depths", self.depths, num_scales, at_least=0)
        nested_channels = _nested_widths(self.nested_channels, channels)
        multiple = math.lcm(self.patch_size, 2**num_scales)
        _check_depths(self.depths, padded_size(image_size, multiple), image_size)
        encoder = DualBranchEncoder(self.in_channels, channels, dilations, self.depths, nested_channels, backend)
        # The encoder asks for larger multiples if a small U halves its map more often than the levels below do.
        multiple = math.lcm(multiple, encoder.size_multiple)
        _check_dilations(dilations, padded_size(image_size, multiple), image_size)
        return encoder


def _check_even(channels: Sequence[int]) -> None:
    """Refuse odd widths of the scales that two branches compute; the deepest feature is as wide as the last scale."""
    if any(width % 2 for width in channels[1:] or channels):
        raise ValueError(
            f"base_channels must be even from the second scale on (with one scale, there), as each branch gives half; "
            f"got {list(channels)}"
        )


def _nested_widths(nested_channels: int | Sequence[int] | None, channels: Sequence[int]) -> list[int]:
    if nested_channels is None:
        return [max(width // 2, 1) for width in channels]
    if is_whole_number(nested_channels):
        nested_channels = [nested_channels * 2**scale for scale in range(len(channels))]
    _check_per_scale("nested_channels", nested_channels, len(channels), at_least=1)
    return list(nested_channels)


def _check_per_scale(name: str, values: Sequence[int], num_scales: int, at_least: int) -> None:
    example = tuple(range(num_scales, 0, -1))
    kind = f"{SINGLE.get(name, '')}a list of whole numbers, one for each of {num_scales} scales, such as {example}"
    check_whole_numbers(name, values, kind)
    if len(values) != num_scales:
        raise ValueError(
            f"{name} needs one number for each of the {num_scales} scales of patch_sizes; got {len(values)}: "
            f"{list(values)}"
        )
    if min(values) < at_least:
        raise ValueError(f"{name} must be at least {at_least} each; got {list(values)}")


def _check_depths(depths: Sequence[int], padded: Sequence[int], image_size: int | Sequence[int]) -> None:
    """Refuse a depth that would halve the map of its level below one pixel."""
    for scale, depth in enumerate(depths):
        height, width = (side >> scale for side in padded)
        most = min(height, width).bit_length() - 1
        if depth > most:
            raise ValueError(
                f"depths: {depth} at scale {scale + 1}, whose map is {height}x{width} for image_size {image_size} and "
                f"can be halved {most} times; give at most {most} there, or a larger image_size"
            )


def _check_dilations(dilations: Sequence[int], padded: Sequence[int], image_size: int | Sequence[int]) -> None:
    """Refuse a dilation at which every tap but the middle one misses the map."""
    for stage, dilation in enumerate(dilations, start=1):
        height, width = (side >> stage for side in padded)
        most = max(1, min(height, width) - 1)
        if dilation > most:
            raise ValueError(
                f"dilations: {dilation} at down-sampling {stage}, whose map is {height}x{width} for image_size "
                f"{image_size}: all taps but the middle one would miss it; give at most {most} there, or a larger "
                f"image_size"
            )
