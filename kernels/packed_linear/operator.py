"""The block-diagonal linear map: public function, checks, choice of the form, and registration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import choose_form
from ..checks import check_dtypes_and_devices, check_tensor_lists
from ..registration import cast_under_autocast, register_gradient, register_operator
from . import composed, reference


def packed_linear(
    tokens: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None, *, backend: str = "auto"
) -> Tensor:
    """Map each scale's channels by its own weight: a linear map that is block-diagonal over the packed channels.

    With a head axis every head maps the same tokens. The result is then (B, N, H, sum O), so that
    ``packed_linear(...).transpose(1, 2)`` is the query of :func:`uctrans.kernels.channel_attention`, without a copy.

    Args:
        tokens: (B, N, sum I), the scales packed side by side; any strides.
        weights: one (O, I) a scale as in ``torch.nn.Linear``, or one (H, O, I).
        biases: one (O,) a scale, or (H, O) with heads; ``None`` leaves them out.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16, sums
            in float32 and has no second derivative; ``auto`` leaves float64 to ``composed``.

    Returns:
        (B, N, sum O) or (B, N, H, sum O) in the inputs' dtype (under autocast: in autocast's).

    Raises:
        ValueError: shapes, devices or ``backend`` do not fit.
        TypeError: dtypes are mixed (outside autocast) or not floating point; ``weights`` or ``biases`` is not a list.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.

    Source: the query, output and MLP projections of UCTransNet (AAAI 2022), section CCT, over packed scales.
    """
    check_tensor_lists(weights=weights, biases=() if biases is None else biases)
    weights, biases = list(weights), list(() if biases is None else biases)
    _check(tokens, weights, biases)
    form = choose_form(backend, tokens, "packed_linear")
    if form == "triton":
        return torch.ops.uctrans.packed_linear(tokens, weights, biases)
    return (reference if form == "reference" else composed).packed_linear(tokens, weights, biases)


def _check(tokens: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    if not weights:
        raise ValueError("weights must hold one weight a scale; got none")
    if biases and len(biases) != len(weights):
        raise ValueError(f"biases must be one a scale; got {len(biases)} for {len(weights)} weights")
    named = {f"weights[{scale}]": weight for scale, weight in enumerate(weights)}
    named |= {f"biases[{scale}]": bias for scale, bias in enumerate(biases)}
    check_dtypes_and_devices(tokens=tokens, **named)
    lead = tuple(weights[0].shape[:-2])
    for scale, weight in enumerate(weights):
        if weight.ndim not in (2, 3) or tuple(weight.shape[:-2]) != lead or 0 in weight.shape:
            raise ValueError(
                f"weights must all be (O, I), or all (H, O, I) with one H, and not empty; "
                f"got {', '.join(str(tuple(weight.shape)) for weight in weights)}"
            )
        if biases and biases[scale].shape != weight.shape[:-1]:
            raise ValueError(
                f"biases[{scale}] must be {tuple(weight.shape[:-1])}, its weight without the last axis; "
                f"got {tuple(biases[scale].shape)}"
            )
    in_width = sum(weight.shape[-1] for weight in weights)
    if tokens.ndim != 3 or tokens.shape[-1] != in_width:
        raise ValueError(
            f"tokens must be (B, N, {in_width}), as the weights' last axes add up; got {tuple(tokens.shape)}"
        )


@register_operator(
    "packed_linear",
    "(Tensor tokens, Tensor[] weights, Tensor[] biases) -> Tensor",
    launcher=f"{__package__}.triton:packed_linear",
)
def _fake_output(tokens: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    out_width = sum(weight.shape[-2] for weight in weights)
    return tokens.new_empty(*tokens.shape[:2], *weights[0].shape[:-2], out_width)


@register_operator(
    "packed_linear_token_gradient",
    "(Tensor gradient, Tensor[] weights) -> Tensor",
    launcher=f"{__package__}.triton:token_gradient",
    backward_of="packed_linear",
)
def _fake_token_gradient(gradient: Tensor, weights: list[Tensor]) -> Tensor:
    return gradient.new_empty(*gradient.shape[:2], sum(weight.shape[-1] for weight in weights))


@register_operator(
    "packed_linear_weight_gradient",
    "(Tensor gradient, Tensor tokens, int[] in_widths, int[] out_widths, bool has_biases) -> Tensor",
    launcher=f"{__package__}.triton:weight_gradient",
    backward_of="packed_linear",
)
def _fake_weight_gradient(
    gradient: Tensor, tokens: Tensor, in_widths: list[int], out_widths: list[int], has_biases: bool
) -> Tensor:
    heads = gradient.shape[2] if gradient.ndim == 4 else 1
    total = heads * sum(out * width for out, width in zip(out_widths, in_widths, strict=True))
    return tokens.new_empty(total + (heads * sum(out_widths) if has_biases else 0))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weights, biases = inputs
    ctx.save_for_backward(tokens, *weights)
    ctx.has_biases = bool(biases)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    tokens, *weights = ctx.saved_tensors
    needs_tokens, needs_weights, needs_biases = ctx.needs_input_grad
    d_tokens = torch.ops.uctrans.packed_linear_token_gradient(gradient, weights) if needs_tokens else None
    d_weights, d_biases = layer_gradients(gradient, tokens, weights, any(needs_weights), any(needs_biases))
    return d_tokens, d_weights, d_biases if ctx.has_biases else []


def layer_gradients(
    gradient: Tensor, tokens: Tensor, weights: list[Tensor], needs_weights: bool, needs_biases: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return the gradients of all weights and of all biases of a block-diagonal map, or ``None`` for each."""
    nothing = [None] * len(weights)
    if not needs_weights and not needs_biases:
        return nothing, nothing
    in_widths, out_widths = ([weight.shape[axis] for weight in weights] for axis in (-1, -2))
    flat = torch.ops.uctrans.packed_linear_weight_gradient(gradient, tokens, in_widths, out_widths, needs_biases)
    shapes = [weight.shape for weight in weights]
    if needs_biases:
        shapes += [shape[:-1] for shape in shapes]
    pieces = flat.split([shape.numel() for shape in shapes])
    gradients = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return gradients[: len(weights)], gradients[len(weights) :] or nothing


register_gradient("packed_linear", _save_for_backward, _backward)
cast_under_autocast("packed_linear")
