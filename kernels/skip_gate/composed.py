"""The skip path in plain PyTorch at its fastest, on any device and in any dtype.

Means are taken before upsampling (``gap(e + up(r)) = gap(e) + gap(r)``, ``gap(up(d)) = gap(d)``), tokens are added by
broadcasting, and both halves are written where they belong in the result: forward makes no other map of full size. On
a CPU, where fresh memory is what large maps cost most, that alone halves the time.
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
    pooled_skip = _pool(encoder_feature)
    if tokens is not None:
        pooled_skip = pooled_skip + _pool(tokens)
    gate = F.linear(pooled_skip.to(encoder_feature.dtype), weight_skip, bias_skip)
    if decoder_feature is not None:
        gate = gate + F.linear(_pool(decoder_feature).to(decoder_feature.dtype), weight_decoder, bias_decoder)
    gate = torch.sigmoid(0.5 * gate)[:, :, None, None]
    if not concatenate:
        decoder_feature = None
    if torch.compiler.is_compiling():  # compilers fuse plain steps, and take no in-place ones
        return _plain(encoder_feature, tokens, decoder_feature, gate)
    return _GateAndConcatenate.apply(encoder_feature, tokens, decoder_feature, gate)


def _plain(encoder_feature: Tensor, tokens: Tensor | None, decoder_feature: Tensor | None, gate: Tensor) -> Tensor:
    """What :class:`_GateAndConcatenate` computes, a step at a time."""
    size = encoder_feature.shape[2:]
    skip = encoder_feature if tokens is None else encoder_feature + F.interpolate(tokens, size=size, mode="nearest")
    gated = F.relu(skip * gate)
    if decoder_feature is None:
        return gated
    return torch.cat([gated, F.interpolate(decoder_feature, size=size, mode="nearest")], dim=1)


class _GateAndConcatenate(torch.autograd.Function):
    """``[relu(s (e + up(r))), up(d)]`` for a gate ``s`` of (B, C, 1, 1); its gradients can be differentiated again."""

    @staticmethod
    def forward(encoder_feature: Tensor, tokens: Tensor | None, decoder_feature: Tensor | None, gate: Tensor) -> Tensor:
        maps = [feature for feature in (encoder_feature, tokens, decoder_feature) if feature is not None]
        batch, channels, *size = encoder_feature.shape
        output = torch.empty(
            (batch, channels + (0 if decoder_feature is None else decoder_feature.shape[1]), *size),
            dtype=reduce(torch.promote_types, (feature.dtype for feature in maps)),
            device=encoder_feature.device,
            memory_format=torch.channels_last if _is_channels_last(encoder_feature) else torch.contiguous_format,
        )
        gated = output[:, :channels]
        if tokens is None:
            torch.mul(encoder_feature, gate, out=gated)
        else:
            # Added before the gate: s e + s up(r) may round to the other side of the ReLU.
            rows = tokens.shape[2]
            upsampled = _repeat_columns(tokens, size[1])[:, :, :, None]
            torch.add(_rows(encoder_feature, rows), upsampled, out=_rows(gated, rows))
            gated.mul_(gate)
        gated.relu_()
        if decoder_feature is not None:
            upsampled = _repeat_columns(decoder_feature, size[1])
            _rows(output[:, channels:], decoder_feature.shape[2]).copy_(upsampled[:, :, :, None])
        return output

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        encoder_feature, tokens, decoder_feature, gate = inputs
        ctx.save_for_backward(encoder_feature, tokens, gate, output)
        ctx.decoder_size = None if decoder_feature is None else decoder_feature.shape[2:]

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


def _pool(feature: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C). Not ``mean``: its gradient is a map of full size, that of a sum an expanded one."""
    return _sum(feature).flatten(1) / (feature.shape[2] * feature.shape[3])


def _sum(feature: Tensor) -> Tensor:
    return feature.sum(dim=(2, 3), keepdim=True, dtype=statistics_dtype(feature))


def _rows(feature: Tensor, rows: int) -> Tensor:
    """(B, C, rows p, W) -> (B, C, rows, p, W), a view."""
    return feature.unflatten(2, (rows, feature.shape[2] // rows))


def _repeat_columns(feature: Tensor, width: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h, width), by what is fastest for the layout."""
    if feature.shape[3] == width:
        return feature
    if _is_channels_last(feature):
        return F.interpolate(feature, size=(feature.shape[2], width), mode="nearest")
    return feature.repeat_interleave(width // feature.shape[3], dim=3)


def _sum_patches(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h p, w q) -> (B, C, h, w), by what is fastest for the layout."""
    if feature.shape[2:] == size:
        return feature
    height, width = feature.shape[2] // size[0], feature.shape[3] // size[1]
    if _is_channels_last(feature):
        return F.avg_pool2d(feature, (height, width), divisor_override=1)
    rows = _rows(feature, size[0]).sum(dim=3, dtype=statistics_dtype(feature))
    return sum(rows[..., column::width] for column in range(width))


def _is_channels_last(feature: Tensor) -> bool:
    return feature.shape[1] > 1 and feature.stride(1) == 1
