"""The packed layer norms as operators: registration, gradients, validation and the public functions."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backend import is_interpreting, resolve_backend
from ..checks import check_dtypes_and_devices, check_numbers_type, check_segments_type
from ..precision import output_dtype
from ..registration import NAMESPACE, define_gradient, define_operator, refuse_double_backward
from . import composed, reference

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
    """Layer norm of each scale's channels by themselves.

    Args:
        tokens: (B, N, sum C), the scales packed side by side.
        segments: width of each scale along the packed axis; they add up to ``tokens.shape[-1]``.
        weight: (sum C,).
        bias: (sum C,).
        eps: added to the variance, above 0.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16,
            computes in float32 and has no second derivative; ``auto`` leaves float64 to ``composed``.

    Returns:
        (B, N, sum C) in the inputs' dtype. Under autocast in autocast's, computed from the inputs as they are;
        ``reference`` leaves that cast to whoever reads the result, as the published sequence does.

    Raises:
        ValueError: shapes, devices, segments, ``eps`` or ``backend`` do not fit.
        TypeError: dtypes are mixed (outside autocast) or not floating point; ``segments`` are no ints, or ``eps`` no
            number.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.

    Source: UCTransNet (AAAI 2022), section CCT.
    """
    _check(tokens, segments, eps, weight=weight, bias=bias)
    chosen, dtype = _resolve(backend, tokens), output_dtype(tokens)
    if chosen == "triton":
        return torch.ops.uctrans.packed_layer_norm(tokens, segments, weight, bias, eps, dtype)
    if chosen == "reference":
        return reference.packed_layer_norm(tokens, segments, weight, bias, eps)
    return composed.packed_layer_norm(tokens, segments, weight, bias, eps).to(dtype)


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
    """:func:`packed_layer_norm`, and the layer norm of all scales together; the tokens are read once for both.

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
    chosen, dtype = _resolve(backend, tokens), output_dtype(tokens)
    if chosen == "triton":
        return torch.ops.uctrans.cross_layer_norm(tokens, segments, *channels.values(), eps, dtype)
    if chosen == "reference":
        return reference.cross_layer_norm(tokens, segments, *channels.values(), eps)
    query_tokens, context = composed.cross_layer_norm(tokens, segments, *channels.values(), eps)
    return query_tokens.to(dtype), context.to(dtype)


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


def _resolve(backend: str, tokens: Tensor) -> str:
    chosen = resolve_backend(backend, tokens.device)
    if chosen == "triton" and tokens.dtype == torch.float64:
        if backend == "triton":
            raise NotImplementedError("the Triton layer norms compute in float32; use backend='composed'")
        return "composed"
    return chosen


def _kernels() -> ModuleType:
    from . import triton  # not at the top: it needs the package triton

    return triton


def _composed_packed_layer_norm(
    tokens: Tensor, segments: list[int], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return composed.packed_layer_norm(*_promoted(tokens, segments, weight, bias), eps).to(dtype)


def _composed_cross_layer_norm(
    tokens: Tensor,
    segments: list[int],
    weight: Tensor,
    bias: Tensor,
    context_weight: Tensor,
    context_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    operands = _promoted(tokens, segments, weight, bias, context_weight, context_bias)
    output, context = composed.cross_layer_norm(*operands, eps)
    return output.to(dtype), context.to(dtype)


def _promoted(tokens: Tensor, segments: list[int], *channels: Tensor) -> tuple[Any, ...]:
    """Operands in one dtype; they come in two under autocast."""
    dtype = torch.promote_types(tokens.dtype, channels[0].dtype)
    return tokens.to(dtype), segments, *(vector.to(dtype) for vector in channels)


def _define(name: str, schema: str, without_kernels: Callable[..., Any], fake: Callable[..., Any]) -> None:
    def on_cpu(*arguments: Any) -> Any:
        return (getattr(_kernels(), name) if is_interpreting() else without_kernels)(*arguments)

    def on_gpu(*arguments: Any) -> Any:
        return getattr(_kernels(), name)(*arguments)

    define_operator(name, schema, implementations={"CPU": on_cpu, "CUDA": on_gpu}, fake=fake)


def _fake_packed(
    tokens: Tensor, segments: list[int], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return tokens.new_empty(tokens.shape, dtype=dtype)


def _fake_cross(
    tokens: Tensor,
    segments: list[int],
    weight: Tensor,
    bias: Tensor,
    context_weight: Tensor,
    context_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape, dtype=dtype), tokens.new_empty(tokens.shape, dtype=dtype)


def _fake_packed_backward(
    gradient: Tensor, tokens: Tensor, segments: list[int], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), weight.new_empty(2, tokens.shape[-1])


def _fake_cross_backward(
    gradient: Tensor,
    context_gradient: Tensor,
    tokens: Tensor,
    segments: list[int],
    weight: Tensor,
    context_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), weight.new_empty(4, tokens.shape[-1])


_define(
    "packed_layer_norm",
    "(Tensor tokens, int[] segments, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor",
    _composed_packed_layer_norm,
    _fake_packed,
)
_define(
    "cross_layer_norm",
    "(Tensor tokens, int[] segments, Tensor weight, Tensor bias, Tensor context_weight, Tensor context_bias, "
    "float eps, ScalarType dtype) -> (Tensor, Tensor)",
    _composed_cross_layer_norm,
    _fake_cross,
)
_define(
    "packed_layer_norm_backward",
    "(Tensor gradient, Tensor tokens, int[] segments, Tensor weight, float eps) -> (Tensor, Tensor)",
    composed.packed_layer_norm_backward,
    _fake_packed_backward,
)
_define(
    "cross_layer_norm_backward",
    "(Tensor gradient, Tensor context_gradient, Tensor tokens, int[] segments, Tensor weight, Tensor context_weight, "
    "float eps) -> (Tensor, Tensor)",
    composed.cross_layer_norm_backward,
    _fake_cross_backward,
)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, ctx.segments, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(tokens, weight)


def _packed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tokens, weight = ctx.saved_tensors
    backward = getattr(torch.ops, NAMESPACE).packed_layer_norm_backward
    d_tokens, d_channels = backward(gradient, tokens, ctx.segments, weight, ctx.eps)
    return d_tokens, None, *d_channels.unbind(), None, None


def _save_cross(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, ctx.segments, weight, _, context_weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(tokens, weight, context_weight)


def _cross_backward(ctx: Any, gradient: Tensor, context_gradient: Tensor) -> tuple[Tensor | None, ...]:
    tokens, weight, context_weight = ctx.saved_tensors
    backward = getattr(torch.ops, NAMESPACE).cross_layer_norm_backward
    d_tokens, d_channels = backward(gradient, context_gradient, tokens, ctx.segments, weight, context_weight, ctx.eps)
    return d_tokens, None, *d_channels.unbind(), None, None


define_gradient("packed_layer_norm", _save_packed, _packed_backward)
define_gradient("cross_layer_norm", _save_cross, _cross_backward)
refuse_double_backward("packed_layer_norm_backward", "packed_layer_norm")
refuse_double_backward("cross_layer_norm_backward", "cross_layer_norm")
