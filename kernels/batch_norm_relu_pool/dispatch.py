"""Batch norm, ReLU and max-pool as operators of torch: which code runs where, shapes without data, and gradients.

``uctrans::batch_norm_relu_pool`` and ``uctrans::batch_norm_relu_pool_apply`` are those without ``_pool`` with the
pooled map beside the output. Their backward takes a gradient of each; without one of the pooled map it is that of
``uctrans::batch_norm_relu``.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..batch_norm_relu import dispatch
from ..formats import empty_map
from ..registration import define_gradient, define_operator, refuse_double_backward
from . import explicit


def _implementation(feature: Tensor) -> ModuleType:
    if not dispatch.runs_kernels(feature):
        return explicit
    from . import triton  # not at the top: it needs the package triton

    return triton


def _forward(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _implementation(feature).forward(feature, *arguments)


def _fake_forward(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    output, *statistics = dispatch.fake_forward(feature, *arguments)
    return output, _empty_pooled(feature), *statistics


def _apply(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _implementation(feature).apply(feature, *arguments)


def _fake_apply(feature: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return dispatch.fake_apply(feature, *arguments), _empty_pooled(feature)


def _backward(
    gradient: Tensor | None, d_pooled: Tensor, feature: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(feature).backward(gradient, d_pooled, feature, *arguments)


def _fake_backward(
    gradient: Tensor | None, d_pooled: Tensor, feature: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.fake_backward(d_pooled, feature, *arguments)


def _empty_pooled(feature: Tensor) -> Tensor:
    return empty_map(feature, feature.shape[1], feature.shape[2] // 2, feature.shape[3] // 2, feature.dtype)


define_operator(
    "batch_norm_relu_pool",
    dispatch.FORWARD_ARGUMENTS + " -> (Tensor output, Tensor pooled, Tensor mean, Tensor variance, Tensor running)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _forward),
    fake=_fake_forward,
)
define_operator(
    "batch_norm_relu_pool_apply",
    dispatch.APPLY_ARGUMENTS + " -> (Tensor output, Tensor pooled)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _apply),
    fake=_fake_apply,
)
define_operator(
    "batch_norm_relu_pool_backward",
    "(Tensor? gradient, Tensor d_pooled, Tensor feature, Tensor weight, Tensor bias, Tensor mean, Tensor variance, "
    "float eps, bool is_of_batch) -> (Tensor d_feature, Tensor d_weight, Tensor d_bias)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _backward),
    fake=_fake_backward,
)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result, _pooled, *statistics = output
    dispatch.save_forward(ctx, inputs, (result, *statistics))


def _forward_gradients(
    ctx: Any, gradient: Tensor | None, d_pooled: Tensor | None, *others: None
) -> tuple[Tensor | None, ...]:
    if d_pooled is None:
        return dispatch.forward_gradients(ctx, gradient, *others)
    found = torch.ops.uctrans.batch_norm_relu_pool_backward(gradient, d_pooled, *ctx.saved_tensors, ctx.eps, True)
    return *found, *dispatch.NO_FORWARD_GRADIENTS


def _save_apply(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dispatch.save_apply(ctx, inputs, output)
    ctx.set_materialize_grads(False)


def _apply_gradients(ctx: Any, gradient: Tensor | None, d_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_pooled is None:
        return dispatch.apply_gradients(ctx, gradient)
    found = torch.ops.uctrans.batch_norm_relu_pool_backward(gradient, d_pooled, *ctx.saved_tensors, ctx.eps, False)
    return *found, *dispatch.NO_APPLY_GRADIENTS


define_gradient("batch_norm_relu_pool", _save_forward, _forward_gradients)
define_gradient("batch_norm_relu_pool_apply", _save_apply, _apply_gradients)
refuse_double_backward("batch_norm_relu_pool_backward", "batch_norm_relu_pool")
