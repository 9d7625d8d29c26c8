"""Launchers of batch norm, ReLU and max-pool on Triton: as many passes over maps as without the pool.

Statistics are those of ``batch_norm_relu``. What writes the output writes the pooled map with it, and both passes of
backward read the pooled map's gradient beside the map's. Nothing depends on the order of programs.
"""

from typing import Any

import torch
from torch import Tensor

from ..batch_norm_relu.triton import add_gradient_sums, contiguous, inverse_count, statistics
from ..batch_norm_relu.triton_layout import Layout, count_parts, cut_evenly, cut_into_parts, maps_of, programs_of
from ..formats import empty_map
from . import triton_windows
from .triton_windows import Size

# Elements of a tile of windows, of which each pixel is a tile of the map: in half precision a thread has four or, with
# gradients, nine of the longest loads under way, 16 bytes each.
TILE = 1024
NUM_WARPS = 4


def forward(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output and its windows' maxima, mean and variance of the batch (C,), running statistics after it (2, C)."""
    mean, variance, running = statistics(feature, running_mean, running_var, momentum)
    return *apply(feature, weight, bias, mean, variance, eps), mean, variance, running


def apply(
    feature: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The map normalised by the given statistics, then the ReLU; and the maximum of each of its windows."""
    _, channels, height, width = feature.shape
    output = empty_map(feature, channels, height, width, feature.dtype)
    pooled = empty_map(feature, channels, height // 2, width // 2, feature.dtype)
    if feature.numel() == 0:
        return output, pooled
    maps, layout = maps_of(feature, output, pooled)
    layout = _windows_of(feature, layout)
    cut, tiles = cut_evenly(layout)
    with torch.cuda.device_of(feature):
        triton_windows.normalise_and_pool_kernel[programs_of(cut, layout, tiles)](
            *maps,
            *_channels(weight, bias, mean, variance),
            eps,
            cut,
            Size(height, width),
            layout.unit,
            **_blocks(tiles),
            num_warps=NUM_WARPS,
        )
    return output, pooled


def backward(
    gradient: Tensor | None,
    d_pooled: Tensor,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    is_of_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the feature (B, C, H, W), weight and bias (C,), of both results; of the map's there may be none."""
    d_feature = empty_map(feature, *feature.shape[1:], feature.dtype)
    if feature.numel() == 0:
        return d_feature, torch.zeros_like(weight), torch.zeros_like(bias)
    if gradient is None:
        gradient = feature.new_zeros(()).expand(feature.shape)  # one element, read again and again
    (values, written, *upstream), layout = maps_of(feature, d_feature, gradient, d_pooled)
    layout = _windows_of(feature, layout)
    channels = _channels(weight, bias, mean, variance)
    size = Size(*feature.shape[2:])
    cut, tiles = cut_into_parts(layout)
    parts = torch.empty(count_parts(cut), 2, layout.channels, device=feature.device)
    with torch.cuda.device_of(feature):
        triton_windows.window_gradient_sums_kernel[programs_of(cut, layout, tiles)](
            *upstream, values, *channels, parts, eps, cut, size, layout.unit, **_blocks(tiles), num_warps=NUM_WARPS
        )
        sums, d_weight, d_bias = add_gradient_sums(parts, weight, bias, channels[3], eps)
        cut, tiles = cut_evenly(layout)
        triton_windows.window_gradient_kernel[programs_of(cut, layout, tiles)](
            *upstream,
            values,
            *channels,
            sums if is_of_batch else None,
            written,
            inverse_count(feature),
            eps,
            cut,
            size,
            layout.unit,
            **_blocks(tiles),
            num_warps=NUM_WARPS,
        )
    return d_feature, d_weight, d_bias


def _windows_of(feature: Tensor, layout: Layout) -> Layout:
    """``layout`` as kernels see it that walk along the windows of each image."""
    batch, _, height, width = feature.shape
    windows = ((height + 1) // 2) * ((width + 1) // 2)
    return layout._replace(images=batch, pixels=windows, tile=TILE)


def _channels(*tensors: Tensor) -> list[Tensor]:
    return [contiguous(tensor) for tensor in tensors]


def _blocks(tiles: dict[str, int]) -> dict[str, Any]:
    return {"BLOCK_WINDOWS": tiles["BLOCK_PIXELS"], "BLOCK_C": tiles["BLOCK_C"]}
