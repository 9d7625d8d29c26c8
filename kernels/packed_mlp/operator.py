"""The packed MLP as an operator: registration, gradients, validation and the public function."""

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backend import is_interpreting, resolve_backend
from ..checks import check_dtypes_and_devices, check_tensor_lists
from ..registration import NAMESPACE, cast_under_autocast, define_gradient, define_operator, refuse_double_backward
from . import explicit, reference

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
        TypeError: dtypes are mixed otherwise (outside autocast) or not floating point; an argument is no list.
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
    chosen = resolve_backend(backend, tokens.device)
    if chosen == "triton" and tokens.dtype == torch.float64:
        if backend == "triton":
            raise NotImplementedError("the Triton operator packed_mlp sums in float32; use backend='composed'")
        chosen = "composed"
    if chosen != "triton":
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


def _kernels() -> ModuleType:
    from . import triton  # not at the top: it needs the package triton

    return triton


def _define(operator_name: str, schema: str, function_name: str, fake: Callable[..., Any]) -> None:
    def on_cpu(*arguments: Any) -> Any:
        return getattr(_kernels() if is_interpreting() else explicit, function_name)(*arguments)

    def on_gpu(*arguments: Any) -> Any:
        return getattr(_kernels(), function_name)(*arguments)

    define_operator(operator_name, schema, implementations={"CPU": on_cpu, "CUDA": on_gpu}, fake=fake)


def _fake_forward(
    tokens: Tensor,
    residual: Tensor,
    expand_weights: list[Tensor],
    expand_biases: list[Tensor],
    contract_weights: list[Tensor],
    contract_biases: list[Tensor],
    keeps_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_width = sum(weight.shape[0] for weight in expand_weights)
    activation = tokens.new_empty(*tokens.shape[:2], hidden_width)
    hidden = torch.empty_like(activation) if keeps_hidden else tokens.new_empty(0)
    return residual.new_empty(tokens.shape), hidden, activation


def _fake_hidden_gradient(gradient: Tensor, contract_weights: list[Tensor], hidden: Tensor) -> Tensor:
    return torch.empty_like(hidden)


_define(
    "packed_mlp",
    "(Tensor tokens, Tensor residual, Tensor[] expand_weights, Tensor[] expand_biases, Tensor[] contract_weights, "
    "Tensor[] contract_biases, bool keeps_hidden) -> (Tensor, Tensor, Tensor)",
    "forward",
    _fake_forward,
)
_define(
    "packed_mlp_hidden_gradient",
    "(Tensor gradient, Tensor[] contract_weights, Tensor hidden) -> Tensor",
    "hidden_gradient",
    _fake_hidden_gradient,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, _, expand_weights, _, contract_weights, _, _ = inputs
    _, hidden, activation = output
    ctx.mark_non_differentiable(hidden, activation)
    ctx.save_for_backward(tokens, hidden, activation, *expand_weights, *contract_weights)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    tokens, hidden, activation, *weights = ctx.saved_tensors
    scales = len(weights) // 2
    expand_weights, contract_weights = weights[:scales], weights[scales:]
    needs = ctx.needs_input_grad
    d_residual = gradient if needs[RESIDUAL] else None
    gradient = gradient.to(tokens.dtype)
    d_contract = _layer_gradients(gradient, activation, contract_weights, any(needs[4]), any(needs[5]))
    if not (needs[0] or any(needs[2]) or any(needs[3])):
        unused = [None] * scales
        return None, d_residual, unused, unused, *d_contract, None
    operators = getattr(torch.ops, NAMESPACE)
    d_hidden = operators.packed_mlp_hidden_gradient(gradient, contract_weights, hidden)
    d_expand = _layer_gradients(d_hidden, tokens, expand_weights, any(needs[2]), any(needs[3]))
    d_tokens = operators.packed_linear_token_gradient(d_hidden, expand_weights) if needs[0] else None
    return d_tokens, d_residual, *d_expand, *d_contract, None


def _layer_gradients(
    gradient: Tensor, inputs: Tensor, weights: list[Tensor], needs_weights: bool, needs_biases: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of one layer's weights and biases."""
    if not needs_weights and not needs_biases:
        return [None] * len(weights), [None] * len(weights)
    shapes = [weight.shape for weight in weights]
    flat = getattr(torch.ops, NAMESPACE).packed_linear_weight_gradient(
        gradient, inputs, [shape[1] for shape in shapes], [shape[0] for shape in shapes], True
    )
    sizes = [shape.numel() for shape in shapes] + [shape[0] for shape in shapes]
    pieces = flat.split(sizes)
    d_weights = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=False)]
    return d_weights, list(pieces[len(weights) :])


define_gradient("packed_mlp", _save_for_backward, _backward)
refuse_double_backward("packed_mlp_hidden_gradient", "packed_mlp")
cast_under_autocast("packed_mlp", left_alone=[RESIDUAL])
