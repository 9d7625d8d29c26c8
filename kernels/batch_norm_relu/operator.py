"""Batch norm and ReLU, alone and with a max-pool: public functions, checks, choice of the form, and registration.

``uctrans::batch_norm_statistics`` returns the statistics of the batch and updates the running ones in place.
``uctrans::batch_norm_relu`` normalises by statistics that it is given, those of the batch or the running ones, and
``uctrans::batch_norm_relu_pool`` also returns the pooled map.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import choose_form
from ..checks import check_dtypes_and_devices, check_numbers_type, check_sizes
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
    conv_bias: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    copies: int = 1,
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
        conv_bias: (C,) in the feature's dtype, added to each pixel first: the bias of a convolution that was called
            without it. In training it only shifts the running mean, and its gradient is zero.
        num_batches_tracked: () of whole numbers, counted up by 1 in training.
        copies: number of pixels that each pixel stands for, where a nearest-neighbour upsampling follows. The unbiased
            running variance counts them all.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16,
            computes in float32 and has no second derivative; ``auto`` leaves float64 to ``composed``.

    Returns:
        (B, C, H, W) in the feature's dtype and memory format, under autocast too, as ``nn.BatchNorm2d`` returns it.

    Raises:
        ValueError: shapes, devices or numbers do not fit; one value a channel in training; no running statistics
            otherwise.
        TypeError: dtypes do not fit: parameters and running statistics share one, float32 or the feature's, and
            ``conv_bias`` has the feature's.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.
    """
    running = (running_mean, running_var, num_batches_tracked)
    norm = _Norm(weight, bias, *running, training, momentum, eps, conv_bias, copies)
    _check(feature, norm)
    return _compute("batch_norm_relu", feature, norm, backend)


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
    conv_bias: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
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
        conv_bias: (C,) or ``None``; see :func:`batch_norm_relu`.
        num_batches_tracked: () or ``None``; see :func:`batch_norm_relu`.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``.

    Returns:
        (B, C, H, W) and (B, C, H // 2, W // 2), in the feature's dtype and memory format. Either may be left unused.

    Raises:
        RuntimeError: the map has no window of 2x2 pixels, or no channels, as ``nn.MaxPool2d`` raises.
        ValueError: see :func:`batch_norm_relu`.
        TypeError: see :func:`batch_norm_relu`.
        NotImplementedError: see :func:`batch_norm_relu`.
    """
    norm = _Norm(weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, conv_bias)
    _check(feature, norm)
    if min(feature.shape[1:]) < 1 or min(feature.shape[2:]) < 2:
        raise RuntimeError(
            f"the pooled map would be empty, got a feature of {tuple(feature.shape)}: give at least one channel and "
            f"2x2 pixels, or take batch_norm_relu"
        )
    return _compute("batch_norm_relu_pool", feature, norm, backend)


class _Norm(NamedTuple):
    """The arguments of the public functions beside the feature and the backend."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    momentum: float
    eps: float
    conv_bias: Tensor | None
    copies: int = 1


def _compute(name: str, feature: Tensor, norm: _Norm, backend: str) -> Any:
    form = choose_form(backend, feature, name, fits=_fits_kernels(feature))
    weight, bias, mean, variance, count, training, momentum, eps, conv_bias, copies = norm
    if form != "triton":
        if training and count is not None:
            count.add_(1)
        if conv_bias is not None:
            feature = feature + conv_bias[:, None, None]
        if copies > 1:
            feature = feature.repeat_interleave(copies, dim=3)
        function = getattr(reference if form == "reference" else composed, name)
        found = function(feature, weight, bias, mean, variance, training, momentum, eps)
        return found if copies == 1 else found[..., ::copies]
    if training:
        constants = (tensor if tensor is None else tensor.detach() for tensor in (feature, conv_bias))
        mean, variance = torch.ops.uctrans.batch_norm_statistics(*constants, mean, variance, count, momentum, copies)
    return getattr(torch.ops.uctrans, name)(feature, weight, bias, mean, variance, conv_bias, eps, training)


def _fits_kernels(feature: Tensor) -> bool:
    return feature.shape[0] * feature.shape[2] * feature.shape[3] <= MOST_PIXELS


def _check(feature: Tensor, norm: _Norm) -> None:
    running = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    given = {name: tensor for name, tensor in running.items() if tensor is not None}
    if len(given) == 1:
        raise ValueError("running_mean and running_var belong together: give both or neither")
    if not norm.training and not given:
        raise ValueError("without training there must be running_mean and running_var; got None")
    channels = {"weight": norm.weight, "bias": norm.bias} | given
    _check_dtypes_and_devices(feature, channels)
    check_numbers_type(momentum=norm.momentum, eps=norm.eps)
    if feature.ndim != 4:
        raise ValueError(f"feature must be (B, C, H, W); got {tuple(feature.shape)}")
    if norm.conv_bias is not None:
        check_dtypes_and_devices(feature=feature, conv_bias=norm.conv_bias)
        channels["conv_bias"] = norm.conv_bias
    for name, tensor in channels.items():
        if tuple(tensor.shape) != (feature.shape[1],):
            raise ValueError(f"{name} must be ({feature.shape[1]},); got {tuple(tensor.shape)}")
    count = norm.num_batches_tracked
    if count is not None and (count.shape or count.is_floating_point() or count.device != feature.device):
        raise ValueError(
            f"num_batches_tracked must be () of whole numbers on {feature.device}; got {tuple(count.shape)} of "
            f"{count.dtype} on {count.device}"
        )
    check_sizes(copies=norm.copies)
    if not 0 <= norm.eps < math.inf or (norm.training and norm.eps == 0):
        raise ValueError(f"eps must be finite and {'above' if norm.training else 'at least'} 0; got {norm.eps}")
    if not 0 <= norm.momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1]; got {norm.momentum}")
    if norm.training and feature.shape[0] * feature.shape[2] * feature.shape[3] * norm.copies == 1:
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


_NORM = (
    "Tensor feature, Tensor weight, Tensor bias, Tensor mean, Tensor variance, Tensor? conv_bias, float eps, "
    "bool is_of_batch"
)


@register_operator(
    "batch_norm_statistics",
    "(Tensor feature, Tensor? conv_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float momentum, int copies) -> (Tensor mean, Tensor variance)",
    launcher=f"{__package__}.triton:statistics",
)
def _fake_statistics(feature: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    mean, variance = (feature.new_empty(feature.shape[1], dtype=torch.float32) for _ in range(2))
    return mean, variance


@register_operator("batch_norm_relu", f"({_NORM}) -> Tensor", launcher=f"{__package__}.triton:forward")
def _fake_forward(feature: Tensor, *_: Any) -> Tensor:
    return empty_map(feature, *feature.shape[1:], feature.dtype)


@register_operator(
    "batch_norm_relu_pool",
    f"({_NORM}) -> (Tensor output, Tensor pooled)",
    launcher=f"{__package__}.triton:forward_and_pool",
)
def _fake_forward_and_pool(feature: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    _, channels, height, width = feature.shape
    return _fake_forward(feature), empty_map(feature, channels, height // 2, width // 2, feature.dtype)


_GRADIENTS = "(Tensor d_feature, Tensor d_weight, Tensor d_bias, Tensor d_conv_bias)"


@register_operator(
    "batch_norm_relu_backward",
    f"(Tensor gradient, {_NORM}) -> {_GRADIENTS}",
    launcher=f"{__package__}.triton:backward",
    backward_of="batch_norm_relu",
)
def _fake_backward(gradient: Tensor, feature: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
    d_conv_bias = feature.new_empty(feature.shape[1])
    return _fake_forward(feature), weight.new_empty(weight.shape), bias.new_empty(bias.shape), d_conv_bias


@register_operator(
    "batch_norm_relu_pool_backward",
    f"(Tensor? gradient, Tensor d_pooled, {_NORM}) -> {_GRADIENTS}",
    launcher=f"{__package__}.triton:backward_of_pool",
    backward_of="batch_norm_relu_pool",
)
def _fake_backward_of_pool(gradient: Tensor | None, d_pooled: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _fake_backward(d_pooled, *arguments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.is_of_batch = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor | None, d_pooled: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if gradient is None and d_pooled is None:
        return (None,) * len(ctx.needs_input_grad)
    *norm, conv_bias = ctx.saved_tensors
    norm += [conv_bias, ctx.eps, ctx.is_of_batch]
    if d_pooled is None:
        found = torch.ops.uctrans.batch_norm_relu_backward(gradient, *norm)
    else:
        found = torch.ops.uctrans.batch_norm_relu_pool_backward(gradient, d_pooled, *norm)
    d_feature, d_weight, d_bias, d_conv_bias = found
    return d_feature, d_weight, d_bias, None, None, None if conv_bias is None else d_conv_bias, None, None


for _name in ("batch_norm_relu", "batch_norm_relu_pool"):
    register_gradient(_name, _save, _gradients)
