"""Convolution blocks shared by every network."""

import itertools

from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    """3x3 convolution, batch norm, ReLU: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.add_module("conv", nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1))
        self.add_module("norm", nn.BatchNorm2d(out_channels))
        self.add_module("act", nn.ReLU(inplace=True))


class DoubleConv(nn.Sequential):
    """Two :class:`ConvNormAct` in a row: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(ConvNormAct(in_channels, out_channels), ConvNormAct(out_channels, out_channels))


class DownStage(nn.Module):
    """Halve the resolution, then convolve twice: (B, in, H, W) -> (B, out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.convs = DoubleConv(in_channels, out_channels)

    def forward(self, feature: Tensor) -> Tensor:
        """Pool and convolve."""
        return self.convs(self.pool(feature))


class Encoder(nn.Module):
    """The contracting path: one feature a scale, finest first, and the deepest feature below them.

    Args:
        in_channels: channels of the image.
        channels: width of each scale; scale ``i`` has ``1/2^i`` of the image's resolution. The deepest feature keeps
            the width of the last scale.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...]):
        super().__init__()
        self.stem = ConvNormAct(in_channels, channels[0])
        widths = [*channels, channels[-1]]
        self.stages = nn.ModuleList(DownStage(narrow, wide) for narrow, wide in itertools.pairwise(widths))

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, in_channels, H, W) -> ([(B, C_i, H/2^i, W/2^i)], (B, C_last, H/2^n, W/2^n))."""
        features = [self.stem(image)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[:-1], features[-1]
