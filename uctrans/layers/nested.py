"""Blocks of the dual-branch network: parallel regular and dilated convolutions, and a small U inside each level."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .arguments import check_counts
from .blocks import ConvNormAct, DoubleConv, DownStage
from .checkpointing import Stage


class DilatedConvNormAct(ConvNormAct):
    """3x3 convolution with taps ``dilation`` pixels apart, batch norm, ReLU: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int, backend: str = "auto"):
        check_counts(in_channels=in_channels, out_channels=out_channels, dilation=dilation)
        super().__init__(in_channels, out_channels, backend, dilation=dilation)


class DualBranchDown(Stage):
    """Pool, then convolve in a regular and a dilated branch: (B, in, H, W) -> (B, out, H/2, W/2).

    Each branch convolves the pooled map twice and computes half of the channels.

    Args:
        in_channels: width of the feature.
        out_channels: width of the result, an even number.
        dilation: distance between the taps of the dilated branch, in pixels.
        backend: see :func:`uctrans.kernels.resolve_backend`.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 2, backend: str = "auto"):
        super().__init__()
        check_counts(in_channels=in_channels, out_channels=out_channels)
        if out_channels % 2:
            raise ValueError(f"out_channels must be even, as each branch gives half of them; got {out_channels}")
        self.pool = nn.MaxPool2d(2)
        self.regular = DoubleConv(in_channels, out_channels // 2, backend)
        self.dilated = nn.Sequential(
            DilatedConvNormAct(in_channels, out_channels // 2, dilation, backend),
            DilatedConvNormAct(out_channels // 2, out_channels // 2, dilation, backend),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Pool, then concatenate the results of both branches, the regular one first."""
        pooled = self.pool(feature)
        return torch.cat([self.regular(pooled), self.dilated(pooled)], dim=1)


class U2DownBlock(DownStage):
    """Convolve twice, then pool: (B, in, H, W) -> (B, out, H, W) for the skip and (B, out, H/2, W/2) to go down."""


class U2UpBlock(nn.Module):
    """Double the resolution by a transposed convolution, concatenate the skip, convolve twice.

    (B, skip_channels, H, W) and (B, in_channels, H/2, W/2) -> (B, out_channels, H, W)
    """

    def __init__(self, skip_channels: int, in_channels: int, out_channels: int, backend: str = "auto"):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, skip_channels, kernel_size=2, stride=2)
        self.convs = DoubleConv(2 * skip_channels, out_channels, backend)

    def forward(self, skip: Tensor, feature: Tensor) -> Tensor:
        """Concatenate ``skip``, the unpooled map of a :class:`U2DownBlock`, and the upsampled ``feature``."""
        return self.convs(torch.cat([skip, self.upsample(feature)], dim=1))


class NestedU(Stage):
    """A small U with a residual connection around it: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: width of the feature.
        inner_channels: width of every map inside the U.
        depth: how many times the U halves the map; height and width must be multiples of ``2**depth``.
        backend: see :func:`uctrans.kernels.resolve_backend`.

    Source: U^2-Net (Qin et al., Pattern Recognition 2020), residual U-block.
    """

    def __init__(self, channels: int, inner_channels: int, depth: int, backend: str = "auto"):
        super().__init__()
        check_counts(channels=channels, inner_channels=inner_channels, depth=depth)
        outer = [channels] + [inner_channels] * (depth - 1)
        self.down = nn.ModuleList(U2DownBlock(width, inner_channels, backend) for width in outer)
        self.up = nn.ModuleList(U2UpBlock(inner_channels, inner_channels, width, backend) for width in outer)

    def forward(self, feature: Tensor) -> Tensor:
        """Run the U and add its result to ``feature``.

        Raises:
            ValueError: the map cannot be halved ``depth`` times.
        """
        self._check_size(*feature.shape[-2:])
        inner, skips = feature, []
        for block in self.down:
            skip, inner = block(inner)
            skips.append(skip)
        for level in reversed(range(len(skips))):
            inner = self.up[level](skips[level], inner)
        return feature + inner

    def _check_size(self, height: int, width: int) -> None:
        multiple = 2 ** len(self.down)
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise ValueError(
                f"a nested U of depth {len(self.down)} needs a map of multiples of {multiple} pixels; got "
                f"{height}x{width}: pad the map, or give less depth"
            )


class DualBranchEncoder(nn.Module):
    """The contracting path with dual-branch down-sampling between levels and a nested U inside each level.

    Args:
        in_channels: channels of the image.
        channels: width of each scale, finest first; scale ``i`` has ``1/2^i`` of the image's resolution. The deepest
            feature keeps the width of the last scale.
        dilations: dilation of the dilated branch of each down-sampling, finest first.
        depths: depth of the nested U of each scale; 0 for none.
        nested_channels: width inside the nested U of each scale.
        backend: see :func:`uctrans.kernels.resolve_backend`.

    Attributes:
        size_multiple: height and width of the image must be multiples of it.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        dilations: Sequence[int],
        depths: Sequence[int],
        nested_channels: Sequence[int],
        backend: str = "auto",
    ):
        super().__init__()
        widths = [*channels, channels[-1]]
        self.stem = ConvNormAct(in_channels, channels[0], backend)
        self.nested = nn.ModuleList(
            NestedU(width, inner, depth, backend) if depth else nn.Identity()
            for width, inner, depth in zip(channels, nested_channels, depths, strict=True)
        )
        self.stages = nn.ModuleList(
            DualBranchDown(narrow, wide, dilation, backend)
            for (narrow, wide), dilation in zip(itertools.pairwise(widths), dilations, strict=True)
        )
        self.size_multiple = 2 ** max(len(channels), *(scale + depth for scale, depth in enumerate(depths)))

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features [(B, C_i, H/2^i, W/2^i)] and the deepest one (B, C_last, H/2^n, W/2^n)."""
        features, deepest = [], self.stem(image)
        for nested, stage in zip(self.nested, self.stages, strict=True):
            features.append(nested(deepest))
            deepest = stage(features[-1])
        return features, deepest
