"""Launchers of batch norm and ReLU on Triton: two passes over the map forward, two over map and gradient backward.

Forward takes the statistics, then writes the output. Backward sums what passes the ReLU, then writes the gradient;
which pixels pass is computed again from the map, so that of forward only the map itself is kept. Nothing depends on the
order of programs.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..formats import empty_map
from . import triton_channels, triton_layout, triton_maps
from .triton_layout import count_parts, cut_evenly, cut_into_parts, maps_of, programs_of

# Programs that sum hold, in half precision, 16 bytes of a tile a thread, the longest load; programs that write a map
# have two such loads a thread.
SUM_WARPS = 8
NUM_WARPS = 4

# A program of the channels has a few of them, a 64-byte line of every part, and waits for memory at each step.
CHANNEL_BLOCK = 16
MOST_PARTS_AT_ONCE = 256
CHANNEL_WARPS = 8


def forward(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, mean and biased variance of the batch (C,), and the running statistics after it (2, C)."""
    mean, variance, running = statistics(feature, running_mean, running_var, momentum)
    return apply(feature, weight, bias, mean, variance, eps), mean, variance, running


def statistics(
    feature: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of the batch (C,), and the running statistics after it (2, C)."""
    channels = feature.shape[1]
    mean, variance = (torch.empty(channels, device=feature.device) for _ in range(2))
    has_running = running_mean is not None
    running = feature.new_empty((2, channels) if has_running else 0, dtype=running_mean.dtype if has_running else None)
    if feature.numel() == 0:
        mean.zero_(), variance.fill_(1)
        if has_running:
            running[0].copy_(running_mean), running[1].copy_(running_var)
        return mean, variance, running
    (values,), layout = maps_of(feature)
    cut, tiles = cut_into_parts(layout)
    parts = torch.empty(count_parts(cut), 3, channels, device=feature.device)
    with torch.cuda.device_of(feature):
        triton_maps.statistics_kernel[programs_of(cut, layout, tiles)](
            values, parts, cut, layout.unit, **tiles, STEPS=triton_layout.STEPS, num_warps=SUM_WARPS
        )
        triton_channels.combine_statistics_kernel[(triton.cdiv(channels, CHANNEL_BLOCK),)](
            parts,
            contiguous(running_mean),
            contiguous(running_var),
            mean,
            variance,
            running if has_running else None,
            momentum,
            cut,
            parts.shape[0],
            layout.unit,
            **_channel_tiles(parts),
            num_warps=CHANNEL_WARPS,
        )
    return mean, variance, running


def apply(feature: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """The map normalised by the given statistics, then the ReLU."""
    output = empty_map(feature, *feature.shape[1:], feature.dtype)
    if feature.numel() == 0:
        return output
    (values, written), layout = maps_of(feature, output)
    cut, tiles = cut_evenly(layout)
    channels = [contiguous(tensor) for tensor in (weight, bias, mean, variance)]
    with torch.cuda.device_of(feature):
        triton_maps.normalise_kernel[programs_of(cut, layout, tiles)](
            values, *channels, written, eps, cut, layout.unit, **tiles, num_warps=NUM_WARPS
        )
    return output


def backward(
    gradient: Tensor,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    is_of_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the feature (B, C, H, W), weight and bias (C,)."""
    d_feature = empty_map(feature, *feature.shape[1:], feature.dtype)
    if feature.numel() == 0:
        return d_feature, torch.zeros_like(weight), torch.zeros_like(bias)
    (values, written, upstream), layout = maps_of(feature, d_feature, gradient)
    channels = [contiguous(tensor) for tensor in (weight, bias, mean, variance)]
    cut, tiles = cut_into_parts(layout)
    parts = torch.empty(count_parts(cut), 2, layout.channels, device=feature.device)
    with torch.cuda.device_of(feature):
        triton_maps.gradient_sums_kernel[programs_of(cut, layout, tiles)](
            upstream,
            values,
            *channels,
            parts,
            eps,
            cut,
            layout.unit,
            **tiles,
            STEPS=triton_layout.STEPS,
            num_warps=SUM_WARPS,
        )
        sums, d_weight, d_bias = add_gradient_sums(parts, weight, bias, channels[3], eps)
        cut, tiles = cut_evenly(layout)
        triton_maps.gradient_kernel[programs_of(cut, layout, tiles)](
            upstream,
            values,
            *channels,
            sums if is_of_batch else None,
            written,
            inverse_count(feature),
            eps,
            cut,
            layout.unit,
            **tiles,
            num_warps=NUM_WARPS,
        )
    return d_feature, d_weight, d_bias


def add_gradient_sums(
    parts: Tensor, weight: Tensor, bias: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of all parts (2, C), and the gradients by weight and bias (C,) that they are."""
    count, _, channels = parts.shape
    sums = torch.empty(2, channels, device=parts.device)
    d_weight, d_bias = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (weight, bias)
    )
    triton_channels.add_gradient_sums_kernel[(triton.cdiv(channels, CHANNEL_BLOCK),)](
        parts,
        variance,
        sums,
        d_weight,
        d_bias,
        eps,
        channels,
        count,
        **_channel_tiles(parts),
        num_warps=CHANNEL_WARPS,
    )
    return sums, d_weight, d_bias


def inverse_count(feature: Tensor) -> float:
    """One over the number of values a channel."""
    return feature.shape[1] / feature.numel()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Numbers of the channels as kernels read them."""
    return None if tensor is None else tensor.contiguous()


def _channel_tiles(parts: Tensor) -> dict[str, Any]:
    return {"BLOCK_PARTS": min(triton.next_power_of_2(parts.shape[0]), MOST_PARTS_AT_ONCE), "BLOCK_C": CHANNEL_BLOCK}
