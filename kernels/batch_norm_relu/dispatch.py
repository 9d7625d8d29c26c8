"""Batch norm and ReLU as operators of torch: which code runs on which device, shapes without data, and gradients.

``uctrans::batch_norm_relu`` normalises by the statistics of the batch, which it returns beside the output, and beside
what the running statistics become: it writes none of its inputs. ``uctrans::batch_norm_relu_apply`` normalises by
statistics that it is given.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backend import is_interpreting
from ..formats import empty_map, statistics_dtype
from ..registration import define_gradient, define_operator, refuse_double_backward
from . import explicit

MOST_PIXELS = 2**31 - 2**16  # of all images: kernels count them in 32 bits

FORWARD_ARGUMENTS = (
    "(Tensor feature, Tensor weight, Tensor bias, Tensor? running_mean, Tensor? running_var, float momentum, float eps)"
)
APPLY_ARGUMENTS = "(Tensor feature, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps)"
# After the gradients by feature, weight and bias.
NO_FORWARD_GRADIENTS = (None,) * 4  # running statistics, momentum, eps
NO_APPLY_GRADIENTS = (None,) * 3  # mean, variance, eps


def runs_kernels(feature: Tensor) -> bool:
    """Whether kernels take ``feature``; else the explicit form does."""
    has_place = feature.is_cuda or is_interpreting()
    pixels = feature.shape[0] * feature.shape[2] * feature.shape[3]
    return has_place and feature.dtype != torch.float64 and pixels <= MOST_PIXELS


def _implementation(feature: Tensor) -> ModuleType:
    if not runs_kernels(feature):
        return explicit
    from . import triton  # not at the top: it needs the package triton

    return triton


def _forward(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _implementation(feature).forward(feature, *arguments)


def fake_forward(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``uctrans::batch_norm_relu`` returns, without data."""
    channels, exact = feature.shape[1], statistics_dtype(feature)
    mean, variance = (feature.new_empty(channels, dtype=exact) for _ in range(2))
    running = feature.new_empty(0) if running_mean is None else running_mean.new_empty(2, channels)
    return _empty_like(feature), mean, variance, running


def _apply(feature: Tensor, *arguments: Any) -> Tensor:
    return _implementation(feature).apply(feature, *arguments)


def fake_apply(feature: Tensor, *arguments: Any) -> Tensor:
    """What ``uctrans::batch_norm_relu_apply`` returns, without data."""
    return _empty_like(feature)


def _backward(gradient: Tensor, feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(feature).backward(gradient, feature, *arguments)


def fake_backward(
    gradient: Tensor, feature: Tensor, weight: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``uctrans::batch_norm_relu_backward`` returns, without data."""
    return _empty_like(feature), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _empty_like(feature: Tensor) -> Tensor:
    return empty_map(feature, *feature.shape[1:], feature.dtype)


define_operator(
    "batch_norm_relu",
    FORWARD_ARGUMENTS + " -> (Tensor output, Tensor mean, Tensor variance, Tensor running)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _forward),
    fake=fake_forward,
)
define_operator(
    "batch_norm_relu_apply",
    APPLY_ARGUMENTS + " -> Tensor",
    implementations=dict.fromkeys(("CPU", "CUDA"), _apply),
    fake=fake_apply,
)
define_operator(
    "batch_norm_relu_backward",
    "(Tensor gradient, Tensor feature, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps, "
    "bool is_of_batch) -> (Tensor d_feature, Tensor d_weight, Tensor d_bias)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _backward),
    fake=fake_backward,
)


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the gradients of ``uctrans::batch_norm_relu`` need."""
    feature, weight, bias, _, _, _, ctx.eps = inputs
    _, mean, variance, running = output
    ctx.save_for_backward(feature, weight, bias, mean, variance)
    ctx.mark_non_differentiable(mean, variance, running)
    ctx.set_materialize_grads(False)


def forward_gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Of what ``uctrans::batch_norm_relu`` takes, from the gradient of its output."""
    if gradient is None:
        return (None,) * 3 + NO_FORWARD_GRADIENTS
    found = torch.ops.uctrans.batch_norm_relu_backward(gradient, *ctx.saved_tensors, ctx.eps, True)
    return *found, *NO_FORWARD_GRADIENTS


def save_apply(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the gradients of ``uctrans::batch_norm_relu_apply`` need."""
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def apply_gradients(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of what ``uctrans::batch_norm_relu_apply`` takes, from the gradient of its output."""
    if gradient is None:
        return (None,) * 3 + NO_APPLY_GRADIENTS
    found = torch.ops.uctrans.batch_norm_relu_backward(gradient, *ctx.saved_tensors, ctx.eps, False)
    return *found, *NO_APPLY_GRADIENTS


define_gradient("batch_norm_relu", save_forward, forward_gradients)
define_gradient("batch_norm_relu_apply", save_apply, apply_gradients)
refuse_double_backward("batch_norm_relu_backward", "batch_norm_relu")
