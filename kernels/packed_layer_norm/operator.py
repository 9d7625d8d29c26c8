"""The packed layer norms: public functions, checks, choice of the form, and registration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import choose_form
from ..checks import check_dtypes_and_devices, check_numbers_type, check_segments_type
from ..formats import output_dtype
from ..registration import register_gradient, register_operator
from . import reference

EPS = 1e-6  # of the authors' implementation


def packed_layer_norm(
    tokens: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = EPS,
    backend: str = "auto",
) -> Tensor:
    """Normalise the channels of each scale by themselves.

    Args:
        tokens: (B, N, sum C), the scales packed side by side.
        segments: width of each scale along the packed axis; they add up to ``tokens.shape[-1]``.
        weight: (sum C,).
        bias: (sum C,).
        eps: added to the variance, above 0.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16,
            computes in float32 and has no second derivative; ``auto`` leaves float64 to ``composed``, which is
            ``reference`` with another dtype under autocast: torch's own layer norm is PyTorch's fastest form.

    Returns:
        (B, N, sum C) in the inputs' dtype. Under autocast in autocast's, computed from the inputs as they are;
        ``reference`` leaves that cast to the operation that reads the result, as the published sequence does.

    Raises:
        ValueError: shapes, devices, segments, ``eps`` or ``backend`` do not fit.
        TypeError: dtypes are mixed (outside autocast) or not floating point; ``segments`` are not ints, or ``eps`` is
            not a number.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.

    Source: UCTransNet (AAAI 2022), section CCT.
    """
    _check(tokens, segments, eps, weight=weight, bias=bias)
    form, dtype = choose_form(backend, tokens, "packed_layer_norm"), output_dtype(tokens)
    if form == "triton":
        return torch.ops.uctrans.packed_layer_norm(tokens, segments, weight, bias, eps, dtype)
    output = reference.packed_layer_norm(tokens, segments, weight, bias, eps)
    return output.to(dtype) if form == "composed" else output


def cross_layer_norm(
    tokens: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    context_weight: Tensor,
    context_bias: Tensor,
    *,
    eps: float = EPS,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise each scale by itself and all scales together; the tokens are read once for both.

    Args:
        tokens: (B, N, sum C), the scales packed side by side.
        segments: see :func:`packed_layer_norm`.
        weight: (sum C,), of the scales' norms.
        bias: (sum C,), of the scales' norms.
        context_weight: (sum C,), of the norm of all scales together.
        context_bias: (sum C,), of the norm of all scales together.
        eps: added to every variance.
        backend: see :func:`packed_layer_norm`.

    Returns:
        The tokens that queries come from, and the context that keys and values come from: (B, N, sum C) each, in the
        dtype of :func:`packed_layer_norm`.

    Raises:
        ValueError: see :func:`packed_layer_norm`.
        TypeError: see :func:`packed_layer_norm`.
        NotImplementedError: see :func:`packed_layer_norm`.
    """
    channels = {"weight": weight, "bias": bias, "context_weight": context_weight, "context_bias": context_bias}
    _check(tokens, segments, eps, **channels)
    form, dtype = choose_form(backend, tokens, "cross_layer_norm"), output_dtype(tokens)
    if form == "triton":
        return torch.ops.uctrans.cross_layer_norm(tokens, segments, *channels.values(), eps, dtype)
    query_tokens, context = reference.cross_layer_norm(tokens, segments, *channels.values(), eps)
    return (query_tokens.to(dtype), context.to(dtype)) if form == "composed" else (query_tokens, context)


def _check(tokens: Tensor, segments: Sequence[int], eps: float, **channels: Tensor) -> None:
    check_dtypes_and_devices(tokens=tokens, **channels)
    check_segments_type(segments)
    check_numbers_type(eps=eps)
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, N, sum C); got {tuple(tokens.shape)}")
    if not segments or any(width < 1 for width in segments):
        raise ValueError(f"segments must be one positive width a scale; got {list(segments)}")
    if sum(segments) != tokens.shape[-1]:
        raise ValueError(
            f"segments {list(segments)} add up to {sum(segments)}; tokens have {tokens.shape[-1]} channels"
        )
    if not eps > 0:
        raise ValueError(f"eps must be above 0; got {eps}")
    for name, vector in channels.items():
        if tuple(vector.shape) != (tokens.shape[-1],):
            raise ValueError(f"{name} must be ({tokens.shape[-1]},); got {tuple(vector.shape)}")


@register_operator(
    "packed_layer_norm",
    "(Tensor tokens, int[] segments, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor",
    launcher=f"{__package__}.triton:packed_layer_norm",
)
def _fake_packed(tokens: Tensor, *arguments: Any) -> Tensor:
    return tokens.new_empty(tokens.shape, dtype=arguments[-1])


@register_operator(
    "cross_layer_norm",
    "(Tensor tokens, int[] segments, Tensor weight, Tensor bias, Tensor context_weight, Tensor context_bias, "
    "float eps, ScalarType dtype) -> (Tensor, Tensor)",
    launcher=f"{__package__}.triton:cross_layer_norm",
)
def _fake_cross(tokens: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake_packed(tokens, *arguments), _fake_packed(tokens, *arguments)


@register_operator(
    "packed_layer_norm_backward",
    "(Tensor gradient, Tensor tokens, int[] segments, Tensor weight, float eps) -> (Tensor, Tensor)",
    launcher=f"{__package__}.triton:packed_layer_norm_backward",
    backward_of="packed_layer_norm",
)
def _fake_packed_backward(
    gradient: Tensor, tokens: Tensor, segments: list[int], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), weight.new_empty(2, tokens.shape[-1])


@register_operator(
    "cross_layer_norm_backward",
    "(Tensor gradient, Tensor context_gradient, Tensor tokens, int[] segments, Tensor weight, Tensor context_weight, "
    "float eps) -> (Tensor, Tensor)",
    launcher=f"{__package__}.triton:cross_layer_norm_backward",
    backward_of="cross_layer_norm",
)
def _fake_cross_backward(
    gradient: Tensor, context_gradient: Tensor, tokens: Tensor, segments: list[int], weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), weight.new_empty(4, tokens.shape[-1])


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, ctx.segments, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(tokens, weight)


def _packed_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tokens, weight = ctx.saved_tensors
    d_tokens, d_channels = torch.ops.uctrans.packed_layer_norm_backward(gradient, tokens, ctx.segments, weight, ctx.eps)
    return d_tokens, None, *d_channels.unbind(), None, None


def _save_cross(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, ctx.segments, weight, _, context_weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(tokens, weight, context_weight)
    ctx.set_materialize_grads(False)


def _cross_gradients(ctx: Any, gradient: Tensor | None, context_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    tokens, weight, context_weight = ctx.saved_tensors
    d_tokens, d_channels = None, [None] * 4
    if gradient is not None and context_gradient is not None:
        d_tokens, d_channels = torch.ops.uctrans.cross_layer_norm_backward(
            gradient, context_gradient, tokens, ctx.segments, weight, context_weight, ctx.eps
        )
    elif gradient is not None:
        d_tokens, d_channels[:2] = torch.ops.uctrans.packed_layer_norm_backward(
            gradient, tokens, ctx.segments, weight, ctx.eps
        )
    elif context_gradient is not None:  # one scale as wide as all
        d_tokens, d_channels[2:] = torch.ops.uctrans.packed_layer_norm_backward(
            context_gradient, tokens, [sum(ctx.segments)], context_weight, ctx.eps
        )
    return d_tokens, None, *d_channels, None, None


register_gradient("packed_layer_norm", _save_packed, _packed_gradients)
register_gradient("cross_layer_norm", _save_cross, _cross_gradients)
