"""Weights in the dtype that autocast would cast them to: kept so for inference, cast in one go for training.

Autocast casts each weight by itself in every call, and its gradient back: two launches a weight and step, of a few
microseconds each, whatever its size. UCTransNet has 152 such weights.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.func import functional_call

from uctrans.layers import ChannelAttention, ChannelGate

CAST_BY_AUTOCAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, ChannelAttention)


def modules_cast_by_autocast(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules all of whose weights autocast casts, with their names.

    Norms and position embeddings, which autocast leaves in float32, are not among them, and neither are the gates,
    whose operator chooses its dtypes itself.
    """
    in_gates = {part for gate in model.modules() if isinstance(gate, ChannelGate) for part in gate.modules()}
    for name, module in model.named_modules():
        if isinstance(module, CAST_BY_AUTOCAST) and module not in in_gates:
            yield name, module


def keep_weights_cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the weights of convolutions, linear maps and attention, in place; return ``model``.

    Under autocast to ``dtype`` the network computes the very same numbers from half the bytes, without a cast of every
    weight a call: at the published width these read 262 MB and write 131 MB. The model is for inference under autocast
    then: a training would round its steps away.
    """
    for _, module in modules_cast_by_autocast(model):
        module.to(dtype)
    return model


def casting_together(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    """``model`` as it is called in a training under autocast to ``dtype``, with all weights cast at once.

    The numbers are those of autocast, and so are the gradients, in float32 where the parameters are: only the launches
    are fewer. A weight that several operations take gets the sum of its gradients in ``dtype``, where autocast would
    add them in float32. All gradients in ``dtype`` are kept until the last one is there, at the end of backward. What
    activation checkpointing computes again casts its weights by itself.
    """
    cast_by_autocast = {
        f"{prefix}.{name}"
        for prefix, module in modules_cast_by_autocast(model)
        for name, _ in module.named_parameters()
    }
    # A parameter that several modules share comes once here, and ``functional_call`` gives its copy to all of them.
    weights = {name: parameter for name, parameter in model.named_parameters() if name in cast_by_autocast}

    def forward(images: Tensor) -> Any:
        cast = _CastTogether.apply(dtype, *weights.values())
        return functional_call(model, dict(zip(weights, cast, strict=True)), (images,))

    return forward


class _CastTogether(torch.autograd.Function):
    """Copies of weights in another dtype, all by one operator; and their gradients back, likewise."""

    @staticmethod
    def forward(ctx: FunctionCtx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        return _cast(weights, [dtype] * len(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [number for number, gradient in enumerate(gradients) if gradient is not None]
        cast = _cast([gradients[number] for number in there], [ctx.dtypes[number] for number in there])
        of_weight = dict(zip(there, cast, strict=True))
        return None, *(of_weight.get(number) for number in range(len(gradients)))


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
