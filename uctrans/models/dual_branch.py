"""The dual-branch UCTransNet: dilated convolutions beside regular ones, and a small U inside every level."""

import math
from collections.abc import Sequence

from ..kernels import check_backend
from ..layers import DualBranchEncoder
from ..layers.arguments import check_counts, check_probabilities, check_whole_numbers, is_whole_number
from .base import SegmentationModel
from .gated import TransformerSkips, check_patches
from .registry import register_model
from .unet import scale_widths

SINGLE = {"dilations": "a whole number, such as 2, or ", "nested_channels": "a whole number, such as 32, or None, or "}


@register_model("dual_branch_uctransnet")
class DualBranchUCTransNet(TransformerSkips, SegmentationModel):
    """UCTransNet with an encoder that sees further.

    Every down-sampling convolves the pooled map twice without and twice with dilation, side by side, and every level
    carries a U^2-Net block: a small U with a residual around it. The maps of all levels feed the channel transformer,
    and its gated outputs are the skips. 74.04 million parameters and 116.5 GFLOP forward at 224 x 224 with the
    defaults, of which the small Us take 10.33 million and 45.3 GFLOP.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits; 1 for a binary mask.
        image_size: side, or (height, width), that the position embeddings are learned for; any other size works too.
        base_channels: width of the finest scale, each next one doubling it; or the widths of all scales. From the
            second scale on they are even, as each branch gives half.
        dilations: of the dilated branch: one for all down-samplings, or one for each, finest first.
        depths: how many times the U inside each level halves its map, finest first; 0 for a level without one.
        nested_channels: width inside the U of the finest level, each next one doubling it; or the widths inside all;
            ``None`` for half of each level's own width.
        num_layers: transformer layers.
        num_heads: attention heads.
        patch_sizes: side of a patch at each scale, finest first, each half of the one before; as many as there are
            scales.
        mlp_ratio: hidden width of the MLPs over their width.
        embedding_dropout: dropout after the patch embeddings.
        attention_dropout: dropout of attention maps and output projections.
        mlp_dropout: dropout inside the MLPs.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``; see :func:`uctrans.set_backend`.

    Raises:
        ValueError: an argument does not fit the others, or the maps of an image of ``image_size`` cannot hold a
            dilation or depth; the message names it.
        TypeError: what should be an int, or a list of them, is something else.

    Source: Wang et al., UCTransNet, AAAI 2022, for transformer and gates; Qin et al., U^2-Net, Pattern Recognition
    2020, for the U inside a level.
    """

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
        super().__init__()
        check_backend(backend)
        check_patches(patch_sizes)
        check_counts(
            in_channels=in_channels, classes=classes, num_layers=num_layers, num_heads=num_heads, mlp_ratio=mlp_ratio
        )
        check_probabilities(
            embedding_dropout=embedding_dropout, attention_dropout=attention_dropout, mlp_dropout=mlp_dropout
        )
        num_scales = len(patch_sizes)
        channels = _even_widths(base_channels, num_scales)
        dilations = [dilations] * num_scales if is_whole_number(dilations) else dilations
        _check_per_scale("dilations", dilations, num_scales, at_least=1)
        _check_per_scale("depths", depths, num_scales, at_least=0)

        self.in_channels, self.classes = in_channels, classes
        self.patch_size = patch_sizes[0]
        self.size_multiple = math.lcm(patch_sizes[0], 2**num_scales)
        _check_depths(depths, self._padded(image_size), image_size)
        # From here on images are padded until the nested U of every level can halve its map.
        self.size_multiple = math.lcm(self.size_multiple, *(2 ** (scale + depth) for scale, depth in enumerate(depths)))
        _check_dilations(dilations, self._padded(image_size), image_size)

        self.encoder = DualBranchEncoder(
            in_channels, channels, dilations, depths, _nested_widths(nested_channels, channels), backend
        )
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


def _even_widths(base_channels: int | Sequence[int], num_scales: int) -> tuple[int, ...]:
    """Widths of the scales; those that two branches make must have a half. The deepest has the last one's."""
    channels = scale_widths(base_channels, num_scales)
    made_by_branches = channels[1:] or channels
    if any(width % 2 for width in made_by_branches):
        raise ValueError(
            f"base_channels must be even from the second scale on (with one scale, there), as each branch gives half; "
            f"got {list(channels)}"
        )
    return channels


def _nested_widths(nested_channels: int | Sequence[int] | None, channels: Sequence[int]) -> list[int]:
    if nested_channels is None:
        return [max(width // 2, 1) for width in channels]
    if is_whole_number(nested_channels):
        nested_channels = [nested_channels * 2**scale for scale in range(len(channels))]
    _check_per_scale("nested_channels", nested_channels, len(channels), at_least=1)
    return list(nested_channels)


def _check_per_scale(name: str, values: Sequence[int], num_scales: int, at_least: int) -> None:
    example = tuple(range(num_scales, 0, -1))
    what = f"{SINGLE.get(name, '')}a list of whole numbers, one for each of {num_scales} scales, such as {example}"
    check_whole_numbers(name, values, what)
    if len(values) != num_scales:
        raise ValueError(
            f"{name} needs one number for each of the {num_scales} scales of patch_sizes; got {len(values)}: "
            f"{list(values)}"
        )
    if min(values) < at_least:
        raise ValueError(f"{name} must be at least {at_least} each; got {list(values)}")


def _check_depths(depths: Sequence[int], padded: Sequence[int], image_size: int | Sequence[int]) -> None:
    """Refuse a depth that halves a map below a pixel, of an image padded as without nested Us."""
    for scale, depth in enumerate(depths):
        height, width = (side >> scale for side in padded)
        most = min(height, width).bit_length() - 1
        if depth > most:
            raise ValueError(
                f"depths: {depth} at scale {scale + 1}, whose map is {height}x{width} for image_size {image_size} and "
                f"can be halved {most} times; give at most {most} there, or a larger image_size"
            )


def _check_dilations(dilations: Sequence[int], padded: Sequence[int], image_size: int | Sequence[int]) -> None:
    """Refuse a dilation whose taps all miss the map but the middle one."""
    for stage, dilation in enumerate(dilations, start=1):
        height, width = (side >> stage for side in padded)
        most = max(1, min(height, width) - 1)
        if dilation > most:
            raise ValueError(
                f"dilations: {dilation} at down-sampling {stage}, whose map is {height}x{width} for image_size "
                f"{image_size}: all taps but the middle one would miss it; give at most {most} there, or a larger "
                f"image_size"
            )
