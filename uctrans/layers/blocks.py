"""Convolution blocks shared by every network."""

import itertools

from torch import Tensor, nn

from ..kernels import batch_norm_relu, check_backend, resolve_backend


class ConvNormAct(nn.Sequential):
    """3x3 convolution, batch norm, ReLU: (B, in, H, W) -> (B, out, H, W).

    On Triton, batch norm and ReLU are one operator. It takes the place of ``nn.BatchNorm2d`` with its default settings;
    what else ``norm`` may have been replaced by, as by ``nn.SyncBatchNorm``, runs as it is, before ``act``.

    Args:
        in_channels: width of the feature.
        out_channels: width of the result.
        backend: see :func:`uctrans.kernels.resolve_backend`; ``composed`` and ``reference`` are the same here.
        dilation: distance between the taps of the convolution, in pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, backend: str = "auto", *, dilation: int = 1):
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=dilation, dilation=dilation)
        self.add_module("conv", conv)
        self.add_module("norm", nn.BatchNorm2d(out_channels))
        self.add_module("act", nn.ReLU(inplace=True))
        self.backend = check_backend(backend)

    def forward(self, feature: Tensor) -> Tensor:
        """Convolve, normalise, and leave what is positive."""
        feature = self.conv(feature)
        if resolve_backend(self.backend, feature.device) == "triton" and _is_plain(self.norm):
            return _norm_relu(self.norm, feature, self.backend)
        return self.act(self.norm(feature))


def _is_plain(norm: nn.Module) -> bool:
    """Whether the operator computes what ``norm`` does; a cumulative average reads its count of batches on the host."""
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None


def _norm_relu(norm: nn.BatchNorm2d, feature: Tensor, backend: str) -> Tensor:
    """``relu(norm(feature))``, with the running statistics updated as ``norm`` does."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return batch_norm_relu(
        feature,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        backend=backend,
    )


class DoubleConv(nn.Sequential):
    """Two :class:`ConvNormAct` in a row: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, backend: str = "auto", *, dilation: int = 1):
        super().__init__(
            ConvNormAct(in_channels, out_channels, backend, dilation=dilation),
            ConvNormAct(out_channels, out_channels, backend, dilation=dilation),
        )


class DownStage(nn.Module):
    """Halve the resolution, then convolve twice: (B, in, H, W) -> (B, out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int, backend: str = "auto"):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.convs = DoubleConv(in_channels, out_channels, backend)

    def forward(self, feature: Tensor) -> Tensor:
        """Pool and convolve."""
        return self.convs(self.pool(feature))


class Encoder(nn.Module):
    """The contracting path: one feature a scale, finest first, and the deepest feature below them.

    Args:
        in_channels: channels of the image.
        channels: width of each scale; scale ``i`` has ``1/2^i`` of the image's resolution. The deepest feature keeps
            the width of the last scale.
        backend: of the blocks; see :func:`uctrans.kernels.resolve_backend`.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], backend: str = "auto"):
        super().__init__()
        self.stem = ConvNormAct(in_channels, channels[0], backend)
        widths = [*channels, channels[-1]]
        self.stages = nn.ModuleList(DownStage(narrow, wide, backend) for narrow, wide in itertools.pairwise(widths))

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, in_channels, H, W) -> ([(B, C_i, H/2^i, W/2^i)], (B, C_last, H/2^n, W/2^n))."""
        features = [self.stem(image)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[:-1], features[-1]
