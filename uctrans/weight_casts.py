"""Weights in the dtype that autocast would cast them to: kept that way for inference, cast in one go for training.

Autocast casts each weight by itself in every call, and its gradient back. That is two launches a weight and step, of a
few microseconds each whatever its size; UCTransNet has 152 such weights.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.func import functional_call

from .layers import ChannelAttention, ChannelGate
from .layers.plain import is_plain

CAST_BY_AUTOCAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, ChannelAttention)


def weights_cast_by_autocast(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights that autocast casts, with their names.

    Autocast leaves norms and position embeddings in float32. The gates are left out, too: their operator chooses its
    own dtypes. So are subclasses, and modules with hooks or parametrisations, which may compute with a weight first.
    """
    in_gates = {part for gate in model.modules() if isinstance(gate, ChannelGate) for part in gate.modules()}
    queries = {module.query for module in model.modules() if is_plain(module, ChannelAttention)}
    for name, module in model.named_modules():
        is_cast = module in queries or any(is_plain(module, kind) for kind in CAST_BY_AUTOCAST)
        if is_cast and module not in in_gates:
            yield from module.named_parameters(name, recurse=False)


def keep_weights_cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the weights of convolutions, linear maps and attention in place, and return ``model``.

    Under autocast to ``dtype`` the network then computes the same bits from half the bytes, without casting every
    weight in every call: at the published width these casts read 262 MB and write 131 MB. Use such a model for
    inference only; the steps of a training would be rounded away.
    """
    for _, weight in weights_cast_by_autocast(model):
        weight.data = weight.data.to(dtype)
    return model


def casting_together(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    """Return a function that calls ``model`` with all weights cast at once, for training under autocast to ``dtype``.

    Outputs and gradients are those of autocast, with fewer launches; gradients are float32 where parameters are. A
    weight that several operators use gets the sum of its gradients in ``dtype``, where autocast adds them in float32.
    All gradients in ``dtype`` are kept until the last one is computed, at the end of the backward pass. Stages that
    activation checkpointing computes again cast their weights one by one.
    """
    cast_by_autocast = {name for name, _ in weights_cast_by_autocast(model)}
    # A parameter that several modules share is named once; ``functional_call`` gives its copy to all of them.
    weights = {name: parameter for name, parameter in model.named_parameters() if name in cast_by_autocast}

    def forward(images: Tensor) -> Any:
        cast = _CastTogether.apply(dtype, *weights.values())
        return functional_call(model, dict(zip(weights, cast, strict=True)), (images,))

    return forward


class _CastTogether(torch.autograd.Function):
    """Cast weights to another dtype by one operator, and their gradients back likewise."""

    @staticmethod
    def forward(ctx: FunctionCtx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        return _cast(weights, [dtype] * len(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [number for number, gradient in enumerate(gradients) if gradient is not None]
        cast = _cast([gradients[number] for number in present], [ctx.dtypes[number] for number in present])
        by_weight = dict(zip(present, cast, strict=True))
        return None, *(by_weight.get(number) for number in range(len(gradients)))


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
