"""Batch norm and ReLU, alone and with a max-pool: public functions, checks, choice of the form, and registration.

``uctrans::batch_norm_relu`` normalises by the statistics of the batch. It returns them beside the output, and beside
the running statistics after the batch: it writes none of its inputs. ``uctrans::batch_norm_relu_apply`` normalises by
statistics that it is given. The operators with ``_pool`` in their name return the pooled map after the output.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..backend import choose_form
from ..checks import check_dtypes_and_devices, check_numbers_type
from ..formats import empty_map, statistics_dtype
from ..registration import register_gradient, register_operator
from . import composed, reference

EPS = 1e-5
MOMENTUM = 0.1
MOST_PIXELS = 2**31 - 2**16  # of all images: kernels count them in 32 bits


def batch_norm_relu(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = MOMENTUM,
    eps: float = EPS,
    backend: str = "auto",
) -> Tensor:
    """Compute ``relu(batch_norm(feature))``, which follows a convolution, in as few passes over the map as possible.

    A training step of the Triton operator moves the bytes of the map 8 times, PyTorch's separate calls 13 times;
    without training 2 and 4 times. The output is not kept for backward. Not measured yet: no GPU has run the kernels.

    Args:
        feature: (B, C, H, W), contiguous or channels-last, of any size.
        weight: (C,).
        bias: (C,).
        running_mean: (C,), updated in place in training; ``None`` for both if there are none.
        running_var: (C,), the unbiased variance.
        training: normalise by the statistics of the batch, and update the running ones; else by the running ones.
        momentum: share of the batch in the updated running statistics. ``nn.BatchNorm2d(momentum=None)``, a cumulative
            average, needs the share of this batch: ``1 / num_batches_tracked``.
        eps: added to the variance, above 0 in training.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16,
            computes in float32 and has no second derivative; ``auto`` leaves float64 to ``composed``.

    Returns:
        (B, C, H, W) in the feature's dtype and memory format, under autocast too, as ``nn.BatchNorm2d`` returns it.

    Raises:
        ValueError: shapes, devices or numbers do not fit; one value a channel in training; no running statistics
            otherwise.
        TypeError: dtypes do not fit: parameters and running statistics share one, float32 or the feature's.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.
    """
    arguments = (feature, weight, bias, running_mean, running_var, training, momentum, eps)
    _check(*arguments)
    form = choose_form(backend, feature, "batch_norm_relu", fits=_fits_kernels(feature))
    if form != "triton":
        return (reference if form == "reference" else composed).batch_norm_relu(*arguments)
    if not training:
        return torch.ops.uctrans.batch_norm_relu_apply(feature, weight, bias, running_mean, running_var, eps)
    output, _mean, _variance, updated = torch.ops.uctrans.batch_norm_relu(*arguments[:5], momentum, eps)
    _update(running_mean, running_var, updated)
    return output


def batch_norm_relu_pool(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = MOMENTUM,
    eps: float = EPS,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute ``map = relu(batch_norm(feature))`` and ``max_pool2d(map, 2)``: an encoder's stage keeps both.

    The pooled map adds 0.75 times the bytes of the map to a training step of :func:`batch_norm_relu`, and PyTorch's
    pooling 7.5 times. The operator keeps no indices: it finds the winner of each window again from ``feature``, among
    values rounded to the map's dtype. Not measured yet: no GPU has run the kernels.

    Windows are 2x2 pixels, 2 apart; an odd last row or column is in none. The first of equal pixels wins, row after
    row, and of NaN the last, as in ``nn.MaxPool2d``.

    Args:
        feature: (B, C, H, W), contiguous or channels-last, of at least one channel and 2x2 pixels.
        weight: (C,).
        bias: (C,).
        running_mean: (C,) or ``None``; see :func:`batch_norm_relu`.
        running_var: (C,) or ``None``; see :func:`batch_norm_relu`.
        training: normalise by the statistics of the batch, and update the running ones; else by the running ones.
        momentum: share of the batch in the updated running statistics.
        eps: added to the variance, above 0 in training.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``.

    Returns:
        (B, C, H, W) and (B, C, H // 2, W // 2), in the feature's dtype and memory format. Either may be left unused.

    Raises:
        RuntimeError: the map has no window of 2x2 pixels, or no channels, as ``nn.MaxPool2d`` raises.
        ValueError: see :func:`batch_norm_relu`.
        TypeError: see :func:`batch_norm_relu`.
        NotImplementedError: see :func:`batch_norm_relu`.
    """
    arguments = (feature, weight, bias, running_mean, running_var, training, momentum, eps)
    _check(*arguments)
    if min(feature.shape[1:]) < 1 or min(feature.shape[2:]) < 2:
        raise RuntimeError(
            f"the pooled map would be empty, got a feature of {tuple(feature.shape)}: give at least one channel and "
            f"2x2 pixels, or take batch_norm_relu"
        )
    form = choose_form(backend, feature, "batch_norm_relu_pool", fits=_fits_kernels(feature))
    if form != "triton":
        return (reference if form == "reference" else composed).batch_norm_relu_pool(*arguments)
    if not training:
        return torch.ops.uctrans.batch_norm_relu_pool_apply(feature, weight, bias, running_mean, running_var, eps)
    found = torch.ops.uctrans.batch_norm_relu_pool(*arguments[:5], momentum, eps)
    output, pooled, _mean, _variance, updated = found
    _update(running_mean, running_var, updated)
    return output, pooled


def _fits_kernels(feature: Tensor) -> bool:
    return feature.shape[0] * feature.shape[2] * feature.shape[3] <= MOST_PIXELS


def _update(running_mean: Tensor | None, running_var: Tensor | None, updated: Tensor) -> None:
    if running_mean is not None:
        torch._foreach_copy_([running_mean, running_var], updated.unbind())


def _check(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var belong together: give both or neither")
    channels = {"weight": weight, "bias": bias}
    if running_mean is not None:
        channels |= {"running_mean": running_mean, "running_var": running_var}
    elif not training:
        raise ValueError("without training there must be running_mean and running_var; got None")
    _check_dtypes_and_devices(feature, channels)
    check_numbers_type(momentum=momentum, eps=eps)
    if feature.ndim != 4:
        raise ValueError(f"feature must be (B, C, H, W); got {tuple(feature.shape)}")
    for name, tensor in channels.items():
        if tuple(tensor.shape) != (feature.shape[1],):
            raise ValueError(f"{name} must be ({feature.shape[1]},); got {tuple(tensor.shape)}")
    if not 0 <= eps < math.inf or (training and eps == 0):
        raise ValueError(f"eps must be finite and {'above' if training else 'at least'} 0; got {eps}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1]; got {momentum}")
    if training and feature.shape[0] * feature.shape[2] * feature.shape[3] == 1:
        raise ValueError(
            f"expected more than 1 value per channel when training, got a feature of {tuple(feature.shape)}: "
            f"give a larger batch or map, or normalise by running statistics (training=False)"
        )


def _check_dtypes_and_devices(feature: Tensor, channels: dict[str, Tensor]) -> None:
    check_dtypes_and_devices(feature=feature)
    check_dtypes_and_devices(**channels)
    dtypes = {tensor.dtype for tensor in channels.values()}
    if len(dtypes) > 1 or not dtypes <= {feature.dtype, statistics_dtype(feature)}:
        given = ", ".join(f"{name} {tensor.dtype}" for name, tensor in channels.items())
        raise TypeError(
            f"parameters and running statistics must share one dtype, float32 or the feature's; got feature "
            f"{feature.dtype}, {given}: convert them with .to(dtype)"
        )
    devices = {name: tensor.device for name, tensor in ({"feature": feature} | channels).items()}
    if len(set(devices.values())) > 1:
        given = ", ".join(f"{name} {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device; got {given}")


_OF_BATCH = (
    "(Tensor feature, Tensor weight, Tensor bias, Tensor? running_mean, Tensor? running_var, float momentum, float eps)"
)
_OF_GIVEN = "(Tensor feature, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps)"
_SAVED = "Tensor feature, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps, bool is_of_batch"


@register_operator(
    "batch_norm_relu",
    f"{_OF_BATCH} -> (Tensor output, Tensor mean, Tensor variance, Tensor updated)",
    launcher=f"{__package__}.triton:forward",
)
def _fake_forward(
    feature: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    mean, variance = (feature.new_empty(feature.shape[1], dtype=torch.float32) for _ in range(2))
    updated = feature.new_empty(0) if running_mean is None else running_mean.new_empty(2, feature.shape[1])
    return _empty_like(feature), mean, variance, updated


@register_operator(
    "batch_norm_relu_pool",
    f"{_OF_BATCH} -> (Tensor output, Tensor pooled, Tensor mean, Tensor variance, Tensor updated)",
    launcher=f"{__package__}.triton:forward_and_pool",
)
def _fake_forward_and_pool(feature: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    output, *statistics = _fake_forward(feature, *arguments)
    return output, _empty_pooled(feature), *statistics


@register_operator("batch_norm_relu_apply", f"{_OF_GIVEN} -> Tensor", launcher=f"{__package__}.triton:apply")
def _fake_apply(feature: Tensor, *_: Any) -> Tensor:
    return _empty_like(feature)


@register_operator(
    "batch_norm_relu_pool_apply",
    f"{_OF_GIVEN} -> (Tensor output, Tensor pooled)",
    launcher=f"{__package__}.triton:apply_and_pool",
)
def _fake_apply_and_pool(feature: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(feature), _empty_pooled(feature)


@register_operator(
    "batch_norm_relu_backward",
    f"(Tensor gradient, {_SAVED}) -> (Tensor d_feature, Tensor d_weight, Tensor d_bias)",
    launcher=f"{__package__}.triton:backward",
    backward_of="batch_norm_relu",
)
def _fake_backward(gradient: Tensor, feature: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _empty_like(feature), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@register_operator(
    "batch_norm_relu_pool_backward",
    f"(Tensor? gradient, Tensor d_pooled, {_SAVED}) -> (Tensor d_feature, Tensor d_weight, Tensor d_bias)",
    launcher=f"{__package__}.triton:backward_of_pool",
    backward_of="batch_norm_relu_pool",
)
def _fake_backward_of_pool(gradient: Tensor | None, d_pooled: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _fake_backward(d_pooled, *arguments)


def _empty_like(feature: Tensor) -> Tensor:
    return empty_map(feature, *feature.shape[1:], feature.dtype)


def _empty_pooled(feature: Tensor) -> Tensor:
    return empty_map(feature, feature.shape[1], feature.shape[2] // 2, feature.shape[3] // 2, feature.dtype)


def _save_of_batch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    feature, weight, bias, *_, ctx.eps = inputs
    *_, mean, variance, updated = output
    ctx.save_for_backward(feature, weight, bias, mean, variance)
    ctx.is_of_batch, ctx.settings = True, (None,) * len(inputs[3:])
    ctx.mark_non_differentiable(mean, variance, updated)
    ctx.set_materialize_grads(False)


def _save_of_given(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.is_of_batch, ctx.settings = False, (None,) * len(inputs[3:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None, *ctx.settings
    found = torch.ops.uctrans.batch_norm_relu_backward(gradient, *ctx.saved_tensors, ctx.eps, ctx.is_of_batch)
    return *found, *ctx.settings


def _gradients_of_pool(
    ctx: Any, gradient: Tensor | None, d_pooled: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if d_pooled is None:
        return _gradients(ctx, gradient)
    found = torch.ops.uctrans.batch_norm_relu_pool_backward(
        gradient, d_pooled, *ctx.saved_tensors, ctx.eps, ctx.is_of_batch
    )
    return *found, *ctx.settings


register_gradient("batch_norm_relu", _save_of_batch, _gradients)
register_gradient("batch_norm_relu_apply", _save_of_given, _gradients)
register_gradient("batch_norm_relu_pool", _save_of_batch, _gradients_of_pool)
register_gradient("batch_norm_relu_pool_apply", _save_of_given, _gradients_of_pool)
