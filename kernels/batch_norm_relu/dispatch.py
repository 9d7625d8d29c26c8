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
from ..precision import statistics_dtype
from ..registration import define_gradient, define_operator, refuse_double_backward
from ..skip_gate.layout import empty_map
from . import explicit

MOST_PIXELS = 2**31 - 2**16  # of all images: kernels count them in 32 bits


def _implementation(feature: Tensor) -> ModuleType:
    has_place = feature.is_cuda or is_interpreting()
    pixels = feature.shape[0] * feature.shape[2] * feature.shape[3]
    if not has_place or feature.dtype == torch.float64 or pixels > MOST_PIXELS:
        return explicit
    from . import triton  # not at the top: it needs the package triton

    return triton


def _forward(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _implementation(feature).forward(feature, *arguments)


def _fake_forward(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, exact = feature.shape[1], statistics_dtype(feature)
    mean, variance = (feature.new_empty(channels, dtype=exact) for _ in range(2))
    running = feature.new_empty(0) if running_mean is None else running_mean.new_empty(2, channels)
    return _empty_like(feature), mean, variance, running


def _apply(feature: Tensor, *arguments: Any) -> Tensor:
    return _implementation(feature).apply(feature, *arguments)


def _fake_apply(feature: Tensor, *arguments: Any) -> Tensor:
    return _empty_like(feature)


def _backward(gradient: Tensor, feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(feature).backward(gradient, feature, *arguments)


def _fake_backward(
    gradient: Tensor, feature: Tensor, weight: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(feature), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _empty_like(feature: Tensor) -> Tensor:
    return empty_map(feature, *feature.shape[1:], feature.dtype)


define_operator(
    "batch_norm_relu",
    "(Tensor feature, Tensor weight, Tensor bias, Tensor? running_mean, Tensor? running_var, float momentum, "
    "float eps) -> (Tensor output, Tensor mean, Tensor variance, Tensor running)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _forward),
    fake=_fake_forward,
)
define_operator(
    "batch_norm_relu_apply",
    "(Tensor feature, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps) -> Tensor",
    implementations=dict.fromkeys(("CPU", "CUDA"), _apply),
    fake=_fake_apply,
)
define_operator(
    "batch_norm_relu_backward",
    "(Tensor gradient, Tensor feature, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps, "
    "bool is_of_batch) -> (Tensor d_feature, Tensor d_weight, Tensor d_bias)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _backward),
    fake=_fake_backward,
)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    feature, weight, bias, _, _, _, ctx.eps = inputs
    _, mean, variance, running = output
    ctx.save_for_backward(feature, weight, bias, mean, variance)
    ctx.mark_non_differentiable(mean, variance, running)
    ctx.set_materialize_grads(False)


def _forward_gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    others = (None,) * 4  # running statistics, momentum, eps
    if gradient is None:
        return (None,) * 3 + others
    return *torch.ops.uctrans.batch_norm_relu_backward(gradient, *ctx.saved_tensors, ctx.eps, True), *others


def _save_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _apply_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    others = (None,) * 3  # mean, variance, eps
    return *torch.ops.uctrans.batch_norm_relu_backward(gradient, *ctx.saved_tensors, ctx.eps, False), *others


define_gradient("batch_norm_relu", _save_forward, _forward_gradients)
define_gradient("batch_norm_relu_apply", _save_apply, _apply_gradients)
refuse_double_backward("batch_norm_relu_backward", "batch_norm_relu")
