"""Launchers of batch norm and ReLU on Triton: two passes over the map forward, two over map and gradient backward.

Forward takes the statistics, then writes the output. Backward sums what passes the ReLU, then writes the gradient. It
computes again from the map which pixels pass, so that forward keeps the map alone. With the max-pool, the kernel that
writes the output also writes the pooled map, and both passes of backward read its gradient. No result depends on the
order of programs.
"""

import torch
import triton
from torch import Tensor

from ..formats import empty_map
from . import triton_channels, triton_layout, triton_maps, triton_windows
from .triton_channels import Running
from .triton_layout import count_parts, cut_evenly, cut_into_parts, maps_of, programs_of, windows_of
from .triton_maps import Norm
from .triton_windows import Size

# Programs that sum hold, in half precision, 16 bytes of a tile a thread, the longest load; programs that write a map
# have two such loads a thread.
SUM_WARPS = 8
NUM_WARPS = 4

# A program of the channels has a few of them, a 64-byte line of every part, and waits for memory at each step.
CHANNEL_BLOCK = 16
MOST_PARTS_AT_ONCE = 256
CHANNEL_WARPS = 8


def statistics(
    feature: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the batch (C,), and update the running statistics in place."""
    channels = feature.shape[1]
    mean, variance = (torch.empty(channels, dtype=torch.float32, device=feature.device) for _ in range(2))
    updated = [tensor for tensor in (running_mean, running_var, num_batches_tracked) if tensor is not None]
    torch.autograd.graph.increment_version(updated)
    if feature.numel() == 0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return mean.zero_(), variance.fill_(1)
    (values,), layout = maps_of(feature)
    cut, tiles = cut_into_parts(layout)
    parts = torch.empty(count_parts(cut), 3, channels, dtype=torch.float32, device=feature.device)
    triton_maps.statistics_kernel[programs_of(cut, tiles)](
        feature=values, parts_ptr=parts, cut=cut, TILES=tiles, STEPS=triton_layout.STEPS, num_warps=SUM_WARPS
    )
    running = None
    if running_mean is not None:
        running = Running(running_mean.contiguous(), running_var.contiguous(), momentum, copies)
    triton_channels.combine_statistics_kernel[(triton.cdiv(channels, CHANNEL_BLOCK),)](
        parts_ptr=parts,
        mean_ptr=mean,
        variance_ptr=variance,
        conv_bias_ptr=None if conv_bias is None else conv_bias.contiguous(),
        running=running,
        num_batches_tracked_ptr=num_batches_tracked,
        cut=cut,
        parts=len(parts),
        channels=channels,
        BLOCK_PARTS=_parts_at_once(parts),
        BLOCK_C=CHANNEL_BLOCK,
        num_warps=CHANNEL_WARPS,
    )
    if running is not None and not (running_mean.is_contiguous() and running_var.is_contiguous()):
        running_mean.copy_(running.mean_ptr), running_var.copy_(running.variance_ptr)
    return mean, variance


def forward(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    conv_bias: Tensor | None,
    eps: float,
    is_of_batch: bool,
) -> Tensor:
    """Normalise the map by the given statistics, and apply the ReLU.

    Statistics of the batch are those of the map as it is; others are those of the map with ``conv_bias``.
    """
    output = empty_map(feature, *feature.shape[1:], feature.dtype)
    if feature.numel() == 0:
        return output
    (values, written), layout = maps_of(feature, output)
    cut, tiles = cut_evenly(layout)
    triton_maps.normalise_kernel[programs_of(cut, tiles)](
        feature=values,
        output=written,
        norm=_norm(weight, bias, mean, variance, conv_bias, eps, is_of_batch),
        cut=cut,
        TILES=tiles,
        num_warps=NUM_WARPS,
    )
    return output


def forward_and_pool(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    conv_bias: Tensor | None,
    eps: float,
    is_of_batch: bool,
) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`forward`, and the maximum of each window."""
    _, channels, height, width = feature.shape
    output = empty_map(feature, channels, height, width, feature.dtype)
    pooled = empty_map(feature, channels, height // 2, width // 2, feature.dtype)
    if feature.numel() == 0:
        return output, pooled
    (values, written, written_pooled), layout = maps_of(feature, output, pooled)
    cut, tiles = cut_evenly(windows_of(feature, layout))
    triton_windows.normalise_and_pool_kernel[programs_of(cut, tiles)](
        feature=values,
        output=written,
        pooled=written_pooled,
        norm=_norm(weight, bias, mean, variance, conv_bias, eps, is_of_batch),
        cut=cut,
        size=Size(height, width),
        TILES=tiles,
        num_warps=NUM_WARPS,
    )
    return output, pooled


def backward(
    gradient: Tensor,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    conv_bias: Tensor | None,
    eps: float,
    is_of_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by the feature (B, C, H, W), weight, bias and conv_bias (C,)."""
    d_feature = empty_map(feature, *feature.shape[1:], feature.dtype)
    if feature.numel() == 0:
        return d_feature, torch.zeros_like(weight), torch.zeros_like(bias), feature.new_zeros(feature.shape[1])
    (values, written, upstream), layout = maps_of(feature, d_feature, gradient)
    norm = _norm(weight, bias, mean, variance, conv_bias, eps, is_of_batch)
    cut, tiles = cut_into_parts(layout)
    parts = torch.empty(count_parts(cut), 2, layout.channels, dtype=torch.float32, device=feature.device)
    triton_maps.gradient_sums_kernel[programs_of(cut, tiles)](
        gradient=upstream,
        feature=values,
        norm=norm,
        parts_ptr=parts,
        cut=cut,
        TILES=tiles,
        STEPS=triton_layout.STEPS,
        num_warps=SUM_WARPS,
    )
    sums, *d_channels = _add_gradient_sums(parts, norm, feature.dtype, is_of_batch)
    cut, tiles = cut_evenly(layout)
    triton_maps.gradient_kernel[programs_of(cut, tiles)](
        gradient=upstream,
        feature=values,
        d_feature=written,
        norm=norm,
        sums_ptr=sums if is_of_batch else None,
        inverse_count=feature.shape[1] / feature.numel(),
        cut=cut,
        TILES=tiles,
        num_warps=NUM_WARPS,
    )
    return d_feature, *d_channels


def backward_of_pool(
    gradient: Tensor | None,
    d_pooled: Tensor,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    conv_bias: Tensor | None,
    eps: float,
    is_of_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`backward`, from those by the pooled map and, where there is one, by the map."""
    d_feature = empty_map(feature, *feature.shape[1:], feature.dtype)
    if feature.numel() == 0:
        return d_feature, torch.zeros_like(weight), torch.zeros_like(bias), feature.new_zeros(feature.shape[1])
    if gradient is None:
        gradient = feature.new_zeros(()).expand(feature.shape)  # one element, read again and again
    (values, written, upstream, upstream_pooled), layout = maps_of(feature, d_feature, gradient, d_pooled)
    layout = windows_of(feature, layout)
    norm, size = _norm(weight, bias, mean, variance, conv_bias, eps, is_of_batch), Size(*feature.shape[2:])
    cut, tiles = cut_into_parts(layout)
    parts = torch.empty(count_parts(cut), 2, layout.channels, dtype=torch.float32, device=feature.device)
    triton_windows.window_gradient_sums_kernel[programs_of(cut, tiles)](
        gradient=upstream,
        d_pooled=upstream_pooled,
        feature=values,
        norm=norm,
        parts_ptr=parts,
        cut=cut,
        size=size,
        TILES=tiles,
        num_warps=NUM_WARPS,
    )
    sums, *d_channels = _add_gradient_sums(parts, norm, feature.dtype, is_of_batch)
    cut, tiles = cut_evenly(layout)
    triton_windows.window_gradient_kernel[programs_of(cut, tiles)](
        gradient=upstream,
        d_pooled=upstream_pooled,
        feature=values,
        d_feature=written,
        norm=norm,
        sums_ptr=sums if is_of_batch else None,
        inverse_count=feature.shape[1] / feature.numel(),
        cut=cut,
        size=size,
        TILES=tiles,
        num_warps=NUM_WARPS,
    )
    return d_feature, *d_channels


def _add_gradient_sums(parts: Tensor, norm: Norm, dtype: torch.dtype, is_of_batch: bool) -> tuple[Tensor, ...]:
    """Return the sums of all parts (2, C), and the gradients by weight, bias and conv_bias (C,) that follow from them.

    ``dtype`` is that of conv_bias.
    """
    count, _, channels = parts.shape
    sums = torch.empty(2, channels, dtype=torch.float32, device=parts.device)
    d_weight, d_bias = torch.empty_like(norm.weight_ptr), torch.empty_like(norm.bias_ptr)
    d_conv_bias = torch.empty(channels, dtype=dtype, device=parts.device)
    triton_channels.add_gradient_sums_kernel[(triton.cdiv(channels, CHANNEL_BLOCK),)](
        parts_ptr=parts,
        weight_ptr=norm.weight_ptr,
        variance_ptr=norm.variance_ptr,
        sums_ptr=sums,
        d_weight_ptr=d_weight,
        d_bias_ptr=d_bias,
        d_conv_bias_ptr=d_conv_bias,
        eps=norm.eps,
        parts=count,
        channels=channels,
        IS_OF_BATCH=is_of_batch,
        BLOCK_PARTS=_parts_at_once(parts),
        BLOCK_C=CHANNEL_BLOCK,
        num_warps=CHANNEL_WARPS,
    )
    return sums, d_weight, d_bias, d_conv_bias


def _norm(
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    conv_bias: Tensor | None,
    eps: float,
    is_of_batch: bool,
) -> Norm:
    shift = None if is_of_batch or conv_bias is None else conv_bias.contiguous()
    return Norm(weight.contiguous(), bias.contiguous(), mean.contiguous(), variance.contiguous(), shift, eps)


def _parts_at_once(parts: Tensor) -> int:
    return min(triton.next_power_of_2(len(parts)), MOST_PARTS_AT_ONCE)
