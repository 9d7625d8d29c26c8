"""Activation checkpointing: compute the maps of a stage again in the backward pass instead of keeping them."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from .attention import ChannelAttention

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Stage(nn.Module):
    """A part of a network that :func:`set_checkpointing` can compute again."""


def set_checkpointing(model: nn.Module, on: bool = True) -> nn.Module:
    """Switch activation checkpointing of a model on or off.

    With checkpointing, each stage keeps only its inputs for the backward pass and computes the rest again there, with
    the same random numbers. Stages are the layers of a :class:`ChannelTransformer`, and convolution blocks, encoder and
    decoder stages of this package. Results, gradients, running statistics and the names of the weights stay the same.
    Passes without gradients are not affected.

    While a CUDA graph is recorded, whose random generator cannot be rewound, stages with dropout or other random
    activations keep their maps.

    Args:
        model: a model of :func:`uctrans.list_models`, or a network that holds layers of :mod:`uctrans.layers`. With
            checkpointing, ``torch.compile`` rejects it.
        on: whether to checkpoint.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: ``model`` has no stage.
    """
    stages = list(_stages(model))
    if not stages:
        raise ValueError(
            f"{type(model).__name__} has no stage to checkpoint: give a model that holds layers of uctrans.layers"
        )
    for stage in stages:
        stage.__dict__.pop("forward", None)
        if on:
            stage.forward = types.MethodType(_forward, stage)  # copies of the model bind it to their own stage
    return model


def _stages(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost stages of a network."""
    if isinstance(module, Stage):
        yield module
        return
    for child in module.children():
        yield from _stages(child)


def _forward(stage: nn.Module, *inputs: Any, **options: Any) -> Any:
    plain = type(stage).forward
    is_recorded = is_recording()
    if not torch.is_grad_enabled() or (is_recorded and any(map(_is_random, stage.modules()))):
        return plain(stage, *inputs, **options)
    contexts = (contextlib.nullcontext(), _throwaway_statistics(stage))
    return checkpoint(
        plain,
        stage,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=not is_recorded,
        context_fn=lambda: contexts,
        **options,
    )


def is_recording() -> bool:
    """Return whether a CUDA graph is being recorded."""
    return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


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


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, ChannelAttention):
        return module.map_dropout > 0
    return isinstance(module, nn.RReLU) or (isinstance(module, _DropoutNd) and module.p > 0)
