"""Activation checkpointing: compute the maps of a stage again in the backward pass instead of keeping them.

A CUDA graph that is being recorded cannot rewind its random generator, so nothing that draws random numbers is computed
twice. The stages of encoder and decoder are checkpointed, and the transformer layers, each if it has no dropout or
other random activation when checkpointing is switched on.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from ..layers import ChannelAttention, TransformerLayer

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def set_checkpointing(model: nn.Module, on: bool = True) -> nn.Module:
    """Switch activation checkpointing of a model on or off.

    With checkpointing, each stage keeps only its inputs for the backward pass and computes the rest again there.
    Results, gradients, running statistics and the names of the weights stay the same. Passes without gradients are not
    affected.

    Args:
        model: one of the models of :func:`uctrans.list_models`. With checkpointing, ``torch.compile`` rejects it.
        on: whether to checkpoint.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: ``model`` has no encoder and decoder.
    """
    for stage in _stages(model):
        stage.__dict__.pop("forward", None)
        if on and not any(map(_is_random, stage.modules())):
            stage.forward = types.MethodType(_forward, stage)  # copies of the model bind it to their own stage
    return model


def _forward(stage: nn.Module, *inputs: torch.Tensor) -> Any:
    plain = type(stage).forward
    if not torch.is_grad_enabled():
        return plain(stage, *inputs)
    contexts = (contextlib.nullcontext(), _throwaway_statistics(stage))
    return checkpoint(plain, stage, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts)


@contextlib.contextmanager
def _throwaway_statistics(stage: nn.Module) -> Iterator[None]:
    """Give norms copies of their running statistics, because the forward pass has counted this batch."""
    norms = [module for module in stage.modules() if isinstance(module, _NormBase) and module.training]
    kept = [{name: getattr(norm, name) for name in STATISTICS} for norm in norms]
    for norm, statistics in zip(norms, kept, strict=True):
        for name, value in statistics.items():
            setattr(norm, name, None if value is None else value.clone())
    try:
        yield
    finally:
        for norm, statistics in zip(norms, kept, strict=True):
            for name, value in statistics.items():
                setattr(norm, name, value)


def _stages(model: nn.Module) -> list[nn.Module]:
    encoder, decoder = getattr(model, "encoder", None), getattr(model, "decoder", None)
    if encoder is None or decoder is None:
        raise ValueError(f"{type(model).__name__} has no encoder and decoder: give a model of uctrans.list_models()")
    stages = [encoder.stem, *encoder.stages, *getattr(encoder, "nested", ()), *decoder]
    return stages + [module for module in model.modules() if isinstance(module, TransformerLayer)]


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, ChannelAttention):
        return module.map_dropout > 0
    return isinstance(module, nn.RReLU) or (isinstance(module, _DropoutNd) and module.p > 0)
