"""The packed MLP: public function, checks, choice of the form, and registration."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import choose_form
from ..checks import check_dtypes_and_devices, check_tensor_lists
from ..packed_linear.operator import layer_gradients
from ..registration import cast_under_autocast, register_gradient, register_operator
from . import reference

RESIDUAL = 1  # its place among the arguments
HALF_PRECISION = (torch.float16, torch.bfloat16)


def packed_mlp(
    tokens: Tensor,
    residual: Tensor,
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    contract_weights: Sequence[Tensor],
    contract_biases: Sequence[Tensor],
    *,
    backend: str = "auto",
) -> Tensor:
    """Mix each scale's channels by its own MLP, with a residual: residual + contract(GELU(expand(tokens))).

    Args:
        tokens: (B, N, sum C), the scales packed side by side; any strides.
        residual: (B, N, sum C), in the dtype of the tokens or, beside half precision, in float32.
        expand_weights: one (R, C) a scale as in ``torch.nn.Linear``; R is the width of the scale's hidden layer.
        expand_biases: one (R,) a scale.
        contract_weights: one (C, R) a scale.
        contract_biases: one (C,) a scale.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16, sums
            in float32 and has no second derivative; ``auto`` leaves float64 to ``composed``. The composed form is the
            reference: PyTorch has no faster one.

    Returns:
        (B, N, sum C) in the residual's dtype. Under autocast all but the residual is cast, and a residual of autocast's
        dtype gives a result of it.

    Raises:
        ValueError: shapes, devices or ``backend`` do not fit.
        TypeError: other dtypes are mixed (outside autocast) or not floating point; an argument is not a list.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.

    Source: the MLPs of UCTransNet (AAAI 2022), section CCT, over packed scales.
    """
    lists = {
        "expand_weights": expand_weights,
        "expand_biases": expand_biases,
        "contract_weights": contract_weights,
        "contract_biases": contract_biases,
    }
    check_tensor_lists(**lists)
    lists = {name: list(tensors) for name, tensors in lists.items()}
    _check(tokens, residual, lists)
    if choose_form(backend, tokens, "packed_mlp") != "triton":
        return reference.packed_mlp(tokens, residual, *lists.values())
    tensors = itertools.chain([tokens, residual], *lists.values())
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return torch.ops.uctrans.packed_mlp(tokens, residual, *lists.values(), needs_gradient)[0]


def _check(tokens: Tensor, residual: Tensor, lists: dict[str, list[Tensor]]) -> None:
    expand_weights = lists["expand_weights"]
    if not expand_weights:
        raise ValueError("expand_weights must hold one weight a scale; got none")
    for name, tensors in lists.items():
        if len(tensors) != len(expand_weights):
            raise ValueError(
                f"{name} must hold one tensor a scale; got {len(tensors)} for {len(expand_weights)} expand_weights"
            )
    named = {f"{name}[{scale}]": tensor for name, tensors in lists.items() for scale, tensor in enumerate(tensors)}
    check_dtypes_and_devices(tokens=tokens, **named)
    if not isinstance(residual, Tensor) or residual.dtype != torch.float32 or tokens.dtype not in HALF_PRECISION:
        check_dtypes_and_devices(tokens=tokens, residual=residual)
    elif residual.device != tokens.device:
        raise ValueError(f"all tensors must be on one device; got tokens {tokens.device}, residual {residual.device}")
    for scale, weight in enumerate(expand_weights):
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(f"expand_weights[{scale}] must be (R, C), not empty; got {tuple(weight.shape)}")
        hidden_width, width = weight.shape
        wanted = {"expand_biases": (hidden_width,), "contract_weights": (width, hidden_width)}
        for name, shape in (wanted | {"contract_biases": (width,)}).items():
            if lists[name][scale].shape != shape:
                raise ValueError(
                    f"{name}[{scale}] must be {shape} beside expand_weights[{scale}] of {tuple(weight.shape)}; "
                    f"got {tuple(lists[name][scale].shape)}"
                )
    packed = sum(weight.shape[1] for weight in expand_weights)
    for name, tensor in {"tokens": tokens, "residual": residual}.items():
        if tensor.ndim != 3 or tensor.shape[-1] != packed or tensor.shape != tokens.shape:
            raise ValueError(
                f"{name} must be (B, N, {packed}), as the weights' last axes add up, like the other; "
                f"got {tuple(tensor.shape)}"
            )


@register_operator(
    "packed_mlp",
    "(Tensor tokens, Tensor residual, Tensor[] expand_weights, Tensor[] expand_biases, Tensor[] contract_weights, "
    "Tensor[] contract_biases, bool keeps_hidden) -> (Tensor output, Tensor hidden, Tensor activation)",
    launcher=f"{__package__}.triton:forward",
)
def _fake_forward(
    tokens: Tensor, residual: Tensor, expand_weights: list[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, keeps_hidden = arguments
    activation = tokens.new_empty(*tokens.shape[:2], sum(weight.shape[0] for weight in expand_weights))
    hidden = torch.empty_like(activation) if keeps_hidden else tokens.new_empty(0)
    return residual.new_empty(tokens.shape), hidden, activation


@register_operator(
    "packed_mlp_hidden_gradient",
    "(Tensor gradient, Tensor[] contract_weights, Tensor hidden) -> Tensor",
    launcher=f"{__package__}.triton:hidden_gradient",
    backward_of="packed_mlp",
)
def _fake_hidden_gradient(gradient: Tensor, contract_weights: list[Tensor], hidden: Tensor) -> Tensor:
    return torch.empty_like(hidden)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, _, expand_weights, _, contract_weights, _, _ = inputs
    _, hidden, activation = output
    ctx.mark_non_differentiable(hidden, activation)
    ctx.set_materialize_grads(False)  # zeros as large as both hidden layers
    ctx.save_for_backward(tokens, hidden, activation, *expand_weights, *contract_weights)


def _backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Any, ...]:
    tokens, hidden, activation, *weights = ctx.saved_tensors
    scales = len(weights) // 2
    expand_weights, contract_weights = weights[:scales], weights[scales:]
    nothing = [None] * scales
    if gradient is None:
        return None, None, nothing, nothing, nothing, nothing, None
    needs_tokens, needs_residual, *needs_layers, _ = ctx.needs_input_grad
    needs_expand_weights, needs_expand_biases, needs_weights, needs_biases = map(any, needs_layers)
    d_residual = gradient if needs_residual else None
    gradient = gradient.to(tokens.dtype)
    d_contract = layer_gradients(gradient, activation, contract_weights, needs_weights, needs_biases)
    if not (needs_tokens or needs_expand_weights or needs_expand_biases):
        return None, d_residual, nothing, nothing, *d_contract, None
    d_hidden = torch.ops.uctrans.packed_mlp_hidden_gradient(gradient, contract_weights, hidden)
    d_expand = layer_gradients(d_hidden, tokens, expand_weights, needs_expand_weights, needs_expand_biases)
    d_tokens = torch.ops.uctrans.packed_linear_token_gradient(d_hidden, expand_weights) if needs_tokens else None
    return d_tokens, d_residual, *d_expand, *d_contract, None


register_gradient("packed_mlp", _save_for_backward, _backward)
cast_under_autocast("packed_mlp", left_alone=[RESIDUAL])
