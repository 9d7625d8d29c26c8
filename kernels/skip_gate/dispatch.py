"""The skip path as an operator of torch: which code runs on which device, shapes without data, and gradients.

``uctrans::skip_gate`` returns beside the output what its gradient needs. Maps come as autocast leaves them: kernels
read any dtype, and the output's is an argument, so that nothing is cast in memory.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backend import is_interpreting
from ..formats import empty_map, statistics_dtype
from ..registration import define_gradient, define_operator, refuse_double_backward
from . import explicit

MOST_IMAGES = 65535  # of a batch: the grid's limit


def _implementation(encoder_feature: Tensor) -> ModuleType:
    has_place = encoder_feature.is_cuda or is_interpreting()
    if not has_place or encoder_feature.dtype == torch.float64 or encoder_feature.shape[0] > MOST_IMAGES:
        return explicit
    from . import triton  # not at the top: it needs the package triton

    return triton


def _without_autocast(encoder_feature: Tensor) -> torch.autocast:
    """The operator chooses its dtypes itself; autocast would round the products of its PyTorch form."""
    return torch.autocast(encoder_feature.device.type, enabled=False)


def _forward(encoder_feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with _without_autocast(encoder_feature):
        return _implementation(encoder_feature).forward(encoder_feature, *arguments)


def _fake_forward(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    decoder_feature: Tensor | None,
    weight_skip: Tensor,
    bias_skip: Tensor,
    weight_decoder: Tensor | None,
    bias_decoder: Tensor | None,
    concatenate: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = encoder_feature.shape
    columns = channels if decoder_feature is None else channels + decoder_feature.shape[1]
    output = empty_map(encoder_feature, columns if concatenate else channels, height, width, dtype)
    exact = statistics_dtype(encoder_feature)
    gate, pooled = (encoder_feature.new_empty(batch, size, dtype=exact) for size in (channels, columns))
    return output, gate, pooled


def _backward(
    gradient: Tensor,
    encoder_feature: Tensor,
    tokens: Tensor | None,
    weight_skip: Tensor,
    weight_decoder: Tensor | None,
    gate: Tensor,
    pooled: Tensor,
    decoder_grid: list[int],
) -> tuple[Tensor, ...]:
    saved = (encoder_feature, tokens, weight_skip, weight_decoder, gate, pooled)
    gradients = _empty_gradients(*saved, decoder_grid)
    is_there = [True, tokens is not None, bool(decoder_grid), True, True, bool(decoder_grid), bool(decoder_grid)]
    written = [tensor if there else None for tensor, there in zip(gradients, is_there, strict=True)]
    with _without_autocast(encoder_feature):
        _implementation(encoder_feature).backward(gradient, *saved, *written)
    return gradients


def _fake_backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(*arguments)


def _empty_gradients(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    weight_skip: Tensor,
    weight_decoder: Tensor | None,
    gate: Tensor,
    pooled: Tensor,
    decoder_grid: list[int],
) -> tuple[Tensor, ...]:
    """One tensor an input, in their order; without elements where there is no input."""
    channels = gate.shape[1]

    def like(feature: Tensor, channels: int, height: int, width: int) -> Tensor:
        return empty_map(feature, channels, height, width, feature.dtype)

    nothing = (encoder_feature.new_empty(0) for _ in range(4))
    return (
        like(encoder_feature, *encoder_feature.shape[1:]),
        next(nothing) if tokens is None else like(tokens, *tokens.shape[1:]),
        like(encoder_feature, pooled.shape[1] - channels, *decoder_grid) if decoder_grid else next(nothing),
        weight_skip.new_empty(weight_skip.shape),
        weight_skip.new_empty(channels),
        next(nothing) if weight_decoder is None else weight_decoder.new_empty(weight_decoder.shape),
        next(nothing) if weight_decoder is None else weight_decoder.new_empty(channels),
    )


define_operator(
    "skip_gate",
    "(Tensor encoder_feature, Tensor? tokens, Tensor? decoder_feature, Tensor weight_skip, Tensor bias_skip, "
    "Tensor? weight_decoder, Tensor? bias_decoder, bool concatenate, ScalarType dtype) -> "
    "(Tensor output, Tensor gate, Tensor pooled)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _forward),
    fake=_fake_forward,
)
define_operator(
    "skip_gate_backward",
    "(Tensor gradient, Tensor encoder_feature, Tensor? tokens, Tensor weight_skip, Tensor? weight_decoder, "
    "Tensor gate, Tensor pooled, SymInt[] decoder_grid) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _backward),
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    encoder_feature, tokens, decoder_feature, weight_skip, _, weight_decoder, *_ = inputs
    _, gate, pooled = output
    ctx.save_for_backward(encoder_feature, tokens, weight_skip, weight_decoder, gate, pooled)
    ctx.decoder_grid = [] if decoder_feature is None else list(decoder_feature.shape[2:])
    ctx.is_there = [tensor is not None for tensor in inputs[:7]]
    ctx.mark_non_differentiable(gate, pooled)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    settings = (None, None)  # concatenate, dtype
    if gradient is None:
        return (None,) * len(ctx.is_there) + settings
    gradients = torch.ops.uctrans.skip_gate_backward(gradient, *ctx.saved_tensors, ctx.decoder_grid)
    kept = (tensor if there else None for tensor, there in zip(gradients, ctx.is_there, strict=True))
    return *kept, *settings


define_gradient("skip_gate", _setup_context, _gradients)
refuse_double_backward("skip_gate_backward", "skip_gate")
