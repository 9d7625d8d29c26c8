"""The skip path in plain PyTorch at its fastest, on any device and in any dtype.

Means are taken before upsampling (``gap(e + up(r)) = gap(e) + gap(r)``, ``gap(up(d)) = gap(d)``), tokens are added by
broadcasting, and both halves are written where they belong in the result. Forward so makes one map of full size beside
its result, where the paper's steps make five; on a CPU, fresh memory is what large maps cost most.
"""

from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import must_use_pytorch_operations
from ..formats import statistics_dtype


def skip_gate(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    decoder_feature: Tensor | None,
    weight_skip: Tensor,
    bias_skip: Tensor,
    weight_decoder: Tensor | None,
    bias_decoder: Tensor | None,
    concatenate: bool = True,
) -> Tensor:
    """(B, C, H, W), (B, C, H/p, W/p) or None, (B, D, H/q, W/q) or None -> (B, C + D, H, W) or (B, C, H, W)."""
    map_skip = partial(F.linear, weight=weight_skip, bias=bias_skip)
    map_decoder = partial(F.linear, weight=weight_decoder, bias=bias_decoder)
    return gate_by_maps(encoder_feature, tokens, decoder_feature, map_skip, map_decoder, concatenate)


def gate_by_maps(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    decoder_feature: Tensor | None,
    map_skip: Callable[[Tensor], Tensor],
    map_decoder: Callable[[Tensor], Tensor] | None,
    concatenate: bool,
) -> Tensor:
    """Compute :func:`skip_gate` with any maps, (B, C) -> (B, C) and (B, D) -> (B, C), in place of the linear ones."""
    if must_use_pytorch_operations():
        pool, activate, gate_and_concatenate = _global_mean, _activated_skip, _gate_and_concatenate
    else:
        pool, activate, gate_and_concatenate = _GlobalMean.apply, _ActivatedSkip.apply, _GateAndConcatenate.apply

    pooled_skip = pool(encoder_feature)
    if tokens is not None:
        pooled_skip = pooled_skip + pool(tokens)
    logits = map_skip(pooled_skip.to(encoder_feature.dtype))
    if decoder_feature is not None:
        logits = logits + map_decoder(pool(decoder_feature).to(decoder_feature.dtype))
    gate = torch.sigmoid(0.5 * logits)[:, :, None, None]
    return gate_and_concatenate(activate(encoder_feature, tokens), decoder_feature if concatenate else None, gate)


def _global_mean(feature: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C)."""
    return feature.mean(dim=(2, 3), dtype=statistics_dtype(feature))


class _GlobalMean(torch.autograd.Function):
    """:func:`_global_mean` with an expanded gradient, where that of ``mean`` is a map of full size."""

    @staticmethod
    def forward(ctx, feature: Tensor) -> Tensor:
        ctx.size, ctx.dtype = feature.shape, feature.dtype
        if feature.device.type == "cpu" and feature.dtype == torch.float32 and _is_channels_last(feature):
            feature = F.avg_pool2d(feature, (1, feature.shape[3]))  # twice as fast, and little is left
        return _global_mean(feature)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = (gradient / (ctx.size[2] * ctx.size[3])).to(ctx.dtype)
        return gradient[:, :, None, None].expand(ctx.size)


def _activated_skip(encoder_feature: Tensor, tokens: Tensor | None) -> Tensor:
    """``relu(e + up(r))``; as the gate is positive it may come before it: ``relu(s x) = s relu(x)``."""
    if tokens is None:
        return F.relu(encoder_feature)
    return F.relu(encoder_feature + F.interpolate(tokens, size=encoder_feature.shape[2:], mode="nearest"))


class _ActivatedSkip(torch.autograd.Function):
    """:func:`_activated_skip` without the upsampled tokens; its gradients can be differentiated again."""

    @staticmethod
    def forward(ctx, encoder_feature: Tensor, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            skip = encoder_feature.relu()
        else:
            coarse = _repeat_columns(tokens, encoder_feature.shape[3])
            skip = (_patches(encoder_feature, coarse) + _pixels(coarse)).reshape(encoder_feature.shape).relu_()
        ctx.save_for_backward(skip)
        ctx.token_grid = None if tokens is None else tokens.shape[2:]
        return skip

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        (skip,) = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, skip, 0)
        return gradient, None if ctx.token_grid is None else _sum_patches(gradient, ctx.token_grid)


def _gate_and_concatenate(skip: Tensor, decoder_feature: Tensor | None, gate: Tensor) -> Tensor:
    """``[s relu(x), up(d)]`` of ``relu(x)`` and a gate ``s`` of (B, C, 1, 1)."""
    gated = skip * gate
    if decoder_feature is None:
        return gated
    return torch.cat([gated, F.interpolate(decoder_feature, size=skip.shape[2:], mode="nearest")], dim=1)


class _GateAndConcatenate(torch.autograd.Function):
    """:func:`_gate_and_concatenate` with fewer maps; its gradients can be differentiated again."""

    @staticmethod
    def forward(ctx, skip: Tensor, decoder_feature: Tensor | None, gate: Tensor) -> Tensor:
        batch, channels, *size = skip.shape
        operands = [tensor for tensor in (skip, decoder_feature, gate) if tensor is not None]
        output = torch.empty(
            (batch, channels + (0 if decoder_feature is None else decoder_feature.shape[1]), *size),
            dtype=reduce(torch.promote_types, (tensor.dtype for tensor in operands)),
            device=skip.device,
            memory_format=torch.channels_last if _is_channels_last(skip) else torch.contiguous_format,
        )
        torch.mul(skip, gate, out=output[:, :channels])
        if decoder_feature is not None:
            coarse = _repeat_columns(decoder_feature, size[1])
            _patches(output[:, channels:], coarse).copy_(_pixels(coarse))
        ctx.save_for_backward(skip, gate)
        ctx.decoder_grid = None if decoder_feature is None else decoder_feature.shape[2:]
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        skip, gate = ctx.saved_tensors
        channels = skip.shape[1]
        d_gated = gradient[:, :channels]
        d_decoder = None if ctx.decoder_grid is None else _sum_patches(gradient[:, channels:], ctx.decoder_grid)
        return d_gated * gate, d_decoder, _sum(d_gated * skip)


def _patches(feature: Tensor, coarse: Tensor) -> Tensor:
    """(B, C, h p, w q) -> (B, C, h, p, w, q), a view."""
    batch, channels, height, width = feature.shape
    rows, columns = coarse.shape[2:]
    return feature.view(batch, channels, rows, height // rows, columns, width // columns)


def _pixels(coarse: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, h, 1, w, 1), which broadcasts against :func:`_patches`."""
    return coarse[:, :, :, None, :, None]


def _repeat_columns(coarse: Tensor, width: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h, width), unless channels-last: loops over the columns of a patch would be too short."""
    if _is_channels_last(coarse):
        return coarse
    return coarse.repeat_interleave(width // coarse.shape[3], dim=3)


def _sum_patches(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h p, w q) -> (B, C, h, w), by what is fastest for the layout."""
    height, width = feature.shape[2] // size[0], feature.shape[3] // size[1]
    if height == width == 1:
        return feature
    if _is_channels_last(feature):
        return F.avg_pool2d(feature, (height, width), divisor_override=1)
    if height * width <= 4 and feature.dtype == statistics_dtype(feature):
        return torch.ops.aten.upsample_nearest2d_backward(feature, feature.shape[2:], (*feature.shape[:2], *size))
    rows = feature.unflatten(2, (size[0], height)).sum(dim=3, dtype=statistics_dtype(feature))
    return sum(rows[..., column::width] for column in range(width))


def _sum(feature: Tensor) -> Tensor:
    return feature.sum(dim=(2, 3), keepdim=True, dtype=statistics_dtype(feature))


def _is_channels_last(feature: Tensor) -> bool:
    return feature.shape[1] > 1 and feature.stride(1) == 1
