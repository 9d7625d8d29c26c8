"""Convolution blocks shared by every network."""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import batch_norm_relu, batch_norm_relu_pool, check_backend, resolve_backend
from .checkpointing import Stage
from .plain import is_plain, is_plain_batch_norm

Maps = TypeVar("Maps", Tensor, tuple[Tensor, Tensor])


class FoldedNorm(nn.Identity):
    """Takes the place of a batch norm that is folded into the convolution before it."""


class ConvNormAct(Stage, nn.Sequential):
    """3x3 convolution, batch norm, ReLU: (B, in, H, W) -> (B, out, H, W).

    On Triton, batch norm and ReLU are one operator if both are as they were made, and so are convolution and ReLU where
    the batch norm is folded into the convolution. Any other ``norm`` or ``act``, such as ``nn.SyncBatchNorm``, runs as
    a module; so do modules with hooks or parametrisations, and added modules.

    Args:
        in_channels: width of the feature.
        out_channels: width of the result.
        backend: see :func:`uctrans.kernels.resolve_backend`; here ``composed`` and ``reference`` are the same.
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
        """Convolve, normalise and rectify."""
        if self._ends_with_relu_on_triton(feature):
            if is_plain_batch_norm(self.norm):
                return convolve_and_normalise(batch_norm_relu, self.conv, self.norm, feature, self.backend)
            if is_plain(self.norm, FoldedNorm) and cudnn_rectifies(self.conv, feature):
                return convolve_and_rectify(self.conv, feature)
        return super().forward(feature)

    def _ends_with_relu_on_triton(self, feature: Tensor) -> bool:
        is_on_triton = resolve_backend(self.backend, feature.device) == "triton"
        return is_on_triton and len(self) == 3 and is_plain(self.act, nn.ReLU)


class ConvNormActPool(ConvNormAct):
    """:class:`ConvNormAct` followed by 2x2 max pooling: (B, in, H, W) -> (B, out, H, W), (B, out, H // 2, W // 2).

    Both maps are returned: the first for the skip, the second for the stage below. On Triton, batch norm, ReLU and
    pooling are one operator. The weights have the names of :class:`ConvNormAct`.
    """

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve, normalise, rectify and pool."""
        if self._ends_with_relu_on_triton(feature) and is_plain_batch_norm(self.norm):
            return convolve_and_normalise(batch_norm_relu_pool, self.conv, self.norm, feature, self.backend)
        feature = super().forward(feature)
        return feature, F.max_pool2d(feature, 2)


def cudnn_rectifies(conv: nn.Module, feature: Tensor) -> bool:
    """Return whether :func:`convolve_and_rectify` takes a convolution and its input."""
    return (
        feature.is_cuda
        and torch.version.hip is None
        and torch.backends.cudnn.enabled
        and torch.backends.cudnn.is_available()
        and feature.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()  # it has no gradient
        and not torch.compiler.is_compiling()  # the compiler fuses them itself
        and is_plain(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def convolve_and_rectify(conv: nn.Conv2d, feature: Tensor) -> Tensor:
    """Return ``relu(conv(feature))`` by one call of cuDNN: (B, in, H, W) -> (B, out, H', W')."""
    device, dtype = feature.device.type, feature.dtype
    if torch.is_autocast_enabled(device):  # autocast does not know this function
        dtype = torch.get_autocast_dtype(device)
    operands = (None if tensor is None else tensor.to(dtype) for tensor in (feature, conv.weight, conv.bias))
    return torch.cudnn_convolution_relu(*operands, conv.stride, conv.padding, conv.dilation, conv.groups)


def convolve_and_normalise(
    operator: Callable[..., Maps],
    conv: nn.Module,
    norm: nn.BatchNorm2d,
    feature: Tensor,
    backend: str,
    **options: Any,
) -> Maps:
    """Call ``operator`` on the convolved feature, with the parameters and buffers of ``norm``.

    A bias costs a convolution one pass over its output and another over the gradient, and batch norm takes away what it
    adds. The operator accounts for it on one number a channel.
    """
    conv_bias = None
    if is_plain(conv, nn.Conv2d) and conv.bias is not None:
        feature = conv._conv_forward(feature, conv.weight, None)
        conv_bias = conv.bias.to(feature.dtype)  # as autocast casts it
    else:
        feature = conv(feature)
    return operator(
        feature,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        conv_bias=conv_bias,
        num_batches_tracked=norm.num_batches_tracked,
        backend=backend,
        **options,
    )


class DoubleConv(nn.Sequential):
    """Two :class:`ConvNormAct` in a row: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, backend: str = "auto", *, dilation: int = 1):
        super().__init__(
            ConvNormAct(in_channels, out_channels, backend, dilation=dilation),
            ConvNormAct(out_channels, out_channels, backend, dilation=dilation),
        )


class DoubleConvPool(nn.Sequential):
    """:class:`DoubleConv` with 2x2 max pooling: (B, in, H, W) -> (B, out, H, W), (B, out, H // 2, W // 2)."""

    def __init__(self, in_channels: int, out_channels: int, backend: str = "auto"):
        super().__init__(
            ConvNormAct(in_channels, out_channels, backend),
            ConvNormActPool(out_channels, out_channels, backend),
        )


class DownStage(Stage):
    """A stage of the encoder: convolve twice and pool, (B, in, H, W) -> (B, out, H, W), (B, out, H // 2, W // 2)."""

    def __init__(self, in_channels: int, out_channels: int, backend: str = "auto"):
        super().__init__()
        self.convs = DoubleConvPool(in_channels, out_channels, backend)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map of this stage, and the pooled one for the stage below."""
        return self.convs(pooled)


class DeepestStage(Stage):
    """The last stage of the encoder: convolve twice, (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, backend: str = "auto"):
        super().__init__()
        self.convs = DoubleConv(in_channels, out_channels, backend)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the map of this stage."""
        return self.convs(pooled)


class Encoder(nn.Module):
    """The contracting path: one feature a scale, finest first, and the deepest feature below them.

    Args:
        in_channels: channels of the image.
        channels: width of each scale; scale ``i`` has ``1/2^i`` of the image's resolution. The deepest feature keeps
            the width of the last scale.
        backend: see :func:`uctrans.kernels.resolve_backend`.

    Attributes:
        size_multiple: height and width of the image must be multiples of it.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], backend: str = "auto"):
        super().__init__()
        self.stem = ConvNormActPool(in_channels, channels[0], backend)
        self.stages = nn.ModuleList(DownStage(narrow, wide, backend) for narrow, wide in itertools.pairwise(channels))
        self.stages.append(DeepestStage(channels[-1], channels[-1], backend))
        self.size_multiple = 2 ** len(channels)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features [(B, C_i, H/2^i, W/2^i)] and the deepest one (B, C_last, H/2^n, W/2^n)."""
        feature, pooled = self.stem(image)
        features = [feature]
        *stages, deepest = self.stages
        for stage in stages:
            feature, pooled = stage(pooled)
            features.append(feature)
        return features, deepest(pooled)
