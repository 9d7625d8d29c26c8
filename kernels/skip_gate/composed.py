"""The skip path in plain PyTorch at its fastest, on any device and in any dtype.

Means are taken before upsampling (``gap(e + up(r)) = gap(e) + gap(r)``, ``gap(up(d)) = gap(d)``), tokens are added by
broadcasting, and both halves are written where they belong in the result. Forward so makes one map of full size beside
its result, where the paper's steps make five; on a CPU, fresh memory is what large maps cost most.
"""

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from ..precision import statistics_dtype


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
    # A compiler fuses plain steps, and takes none that write into a part of a tensor.
    is_compiling = torch.compiler.is_compiling()
    pool = _global_mean if is_compiling else _GlobalMean.apply
    gate_and_concatenate = _gate_and_concatenate if is_compiling else _GateAndConcatenate.apply

    pooled_skip = pool(encoder_feature)
    if tokens is not None:
        pooled_skip = pooled_skip + pool(tokens)
    logits = F.linear(pooled_skip.to(encoder_feature.dtype), weight_skip, bias_skip)
    if decoder_feature is not None:
        logits = logits + F.linear(pool(decoder_feature).to(decoder_feature.dtype), weight_decoder, bias_decoder)
    gate = torch.sigmoid(0.5 * logits)[:, :, None, None]
    return gate_and_concatenate(encoder_feature, tokens, decoder_feature if concatenate else None, gate)


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


def _gate_and_concatenate(
    encoder_feature: Tensor, tokens: Tensor | None, decoder_feature: Tensor | None, gate: Tensor
) -> Tensor:
    """``[relu(s (e + up(r))), up(d)]`` for a gate ``s`` of (B, C, 1, 1)."""
    size = encoder_feature.shape[2:]
    skip = encoder_feature if tokens is None else encoder_feature + F.interpolate(tokens, size=size, mode="nearest")
    gated = F.relu(skip * gate)
    if decoder_feature is None:
        return gated
    return torch.cat([gated, F.interpolate(decoder_feature, size=size, mode="nearest")], dim=1)


class _GateAndConcatenate(torch.autograd.Function):
    """:func:`_gate_and_concatenate` with fewer maps; its gradients can be differentiated again."""

    @staticmethod
    def forward(
        ctx, encoder_feature: Tensor, tokens: Tensor | None, decoder_feature: Tensor | None, gate: Tensor
    ) -> Tensor:
        maps = [feature for feature in (encoder_feature, tokens, decoder_feature) if feature is not None]
        batch, channels, *size = encoder_feature.shape
        output = torch.empty(
            (batch, channels + (0 if decoder_feature is None else decoder_feature.shape[1]), *size),
            dtype=reduce(torch.promote_types, (feature.dtype for feature in maps)),
            device=encoder_feature.device,
            memory_format=torch.channels_last if _is_channels_last(encoder_feature) else torch.contiguous_format,
        )
        if tokens is None:
            skip = encoder_feature.relu()
        else:
            coarse = _repeat_columns(tokens, size[1])
            skip = (_patches(encoder_feature, coarse) + _pixels(coarse)).reshape(encoder_feature.shape).relu_()
        torch.mul(skip, gate, out=output[:, :channels])  # relu(s x) = s relu(x): s is positive
        if decoder_feature is not None:
            coarse = _repeat_columns(decoder_feature, size[1])
            _patches(output[:, channels:], coarse).copy_(_pixels(coarse))
        ctx.save_for_backward(encoder_feature, tokens, gate, output)
        ctx.decoder_size = None if decoder_feature is None else decoder_feature.shape[2:]
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        encoder_feature, tokens, gate, output = ctx.saved_tensors
        channels = encoder_feature.shape[1]
        tokens_gradient = decoder_gradient = None
        if ctx.decoder_size is not None:
            decoder_gradient = _sum_patches(gradient[:, channels:], ctx.decoder_size)
        unclipped = torch.ops.aten.threshold_backward(gradient[:, :channels], output[:, :channels], 0)
        gate_gradient = _sum(unclipped * encoder_feature)
        if tokens is not None:
            patch_sums = _sum_patches(unclipped, tokens.shape[2:])
            gate_gradient = gate_gradient + _sum(patch_sums * tokens)
            tokens_gradient = patch_sums * gate
        # In place where nobody differentiates again: one map of full size less.
        encoder_gradient = unclipped * gate if torch.is_grad_enabled() else unclipped.mul_(gate)
        return encoder_gradient, tokens_gradient, decoder_gradient, gate_gradient


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
    rows = feature.unflatten(2, (size[0], height)).sum(dim=3, dtype=statistics_dtype(feature))
    return sum(rows[..., column::width] for column in range(width))


def _sum(feature: Tensor) -> Tensor:
    return feature.sum(dim=(2, 3), keepdim=True, dtype=statistics_dtype(feature))


def _is_channels_last(feature: Tensor) -> bool:
    return feature.shape[1] > 1 and feature.stride(1) == 1
