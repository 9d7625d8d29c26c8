"""Blocks of the dual-branch network: regular and dilated convolutions side by side, and a small U inside a level."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import ConvNormAct, DoubleConv, DownStage
from .checks import check_counts


class DilatedConvNormAct(ConvNormAct):
    """3x3 convolution whose taps are ``dilation`` pixels apart, batch norm, ReLU: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int, backend: str = "auto"):
        check_counts(in_channels=in_channels, out_channels=out_channels, dilation=dilation)
        super().__init__(in_channels, out_channels, backend, dilation=dilation)


class DualBranchDown(nn.Module):
    """Halve the resolution, then convolve twice without and twice with dilation: (B, in, H, W) -> (B, out, H/2, W/2).

    Both branches read the pooled map, and each gives half of the channels.

    Args:
        in_channels: width of the feature.
        out_channels: width of the result, an even number.
        dilation: of the dilated branch.
        backend: of the blocks; see :func:`uctrans.kernels.resolve_backend`.
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
        """Pool, then concatenate both branches, the regular one first."""
        pooled = self.pool(feature)
        return torch.cat([self.regular(pooled), self.dilated(pooled)], dim=1)


class U2DownBlock(DownStage):
    """Convolve twice, then halve the resolution: (B, in, H, W) -> (B, out, H, W) and (B, out, H/2, W/2).

    The map before pooling is what the way up takes; the pooled one goes on down.
    """


class U2UpBlock(nn.Module):
    """Double the resolution by a transposed convolution, concatenate, convolve twice.

    (B, skip_channels, H, W) and (B, in_channels, H/2, W/2) -> (B, out_channels, H, W)
    """

    def __init__(self, skip_channels: int, in_channels: int, out_channels: int, backend: str = "auto"):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, skip_channels, kernel_size=2, stride=2)
        self.convs = DoubleConv(2 * skip_channels, out_channels, backend)

    def forward(self, skip: Tensor, feature: Tensor) -> Tensor:
        """``skip`` is what :class:`U2DownBlock` kept before it pooled."""
        return self.convs(torch.cat([skip, self.upsample(feature)], dim=1))


class NestedU(nn.Module):
    """A small U inside a level of a network, and a residual around it: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: width of the feature.
        inner_channels: width of every map inside the U.
        depth: how many times the U halves the map; height and width must be multiples of ``2**depth``.
        backend: of the blocks; see :func:`uctrans.kernels.resolve_backend`.

    Source: U^2-Net (Qin et al., Pattern Recognition 2020), residual U-block.
    """

    def __init__(self, channels: int, inner_channels: int, depth: int, backend: str = "auto"):
        super().__init__()
        check_counts(channels=channels, inner_channels=inner_channels, depth=depth)
        outer = [channels] + [inner_channels] * (depth - 1)
        self.down = nn.ModuleList(U2DownBlock(width, inner_channels, backend) for width in outer)
        self.up = nn.ModuleList(U2UpBlock(inner_channels, inner_channels, width, backend) for width in outer)

    def forward(self, feature: Tensor) -> Tensor:
        """Down, up again, and added to what came in.

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
    """The contracting path: dual-branch down-sampling between levels, a nested U inside each level.

    Args:
        in_channels: channels of the image.
        channels: width of each scale, finest first; scale ``i`` has ``1/2^i`` of the image's resolution. The deepest
            feature keeps the width of the last scale.
        dilations: of the dilated branch of each down-sampling, finest first.
        depths: of the nested U of each scale; 0 for none.
        nested_channels: width inside the nested U of each scale.
        backend: of the blocks; see :func:`uctrans.kernels.resolve_backend`.
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

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, in_channels, H, W) -> ([(B, C_i, H/2^i, W/2^i)], (B, C_last, H/2^n, W/2^n))."""
        features, deepest = [], self.stem(image)
        for nested, stage in zip(self.nested, self.stages, strict=True):
            features.append(nested(deepest))
            deepest = stage(features[-1])
        return features, deepest
