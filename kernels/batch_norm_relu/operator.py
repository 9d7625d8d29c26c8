"""The public function of batch norm and ReLU: what it takes, what it refuses, and which implementation runs."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_dtypes_and_devices, check_numbers_type
from ..formats import statistics_dtype
from . import composed, dispatch, reference  # noqa: F401 (dispatch registers the operators)

EPS = 1e-5
MOMENTUM = 0.1


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
    """``relu(batch_norm(feature))``: what follows a convolution, in as few passes over the map as there can be.

    With ``E`` the bytes of the map, a training step moves of PyTorch's separate calls, an in-place ReLU, 13 E: forward
    5 (statistics; batch norm reads, writes; ReLU reads, writes), backward 8 (ReLU reads gradient and output, writes;
    batch norm reads gradient and map twice, writes). Of the Triton operator 8 E: forward 3 (statistics; read, write),
    backward 5 (gradient and map twice, write), as the ReLU's mask is computed again from the map. Without training, 4 E
    and 2 E. The output is not kept for backward. Not measured yet: no GPU has run the kernels.

    Args:
        feature: (B, C, H, W), contiguous or channels-last, of any size.
        weight: (C,).
        bias: (C,).
        running_mean: (C,), updated in place in training; ``None`` together with ``running_var``: there are none.
        running_var: (C,), the unbiased variance.
        training: normalise by the statistics of the batch, and update the running ones; else by the running ones.
        momentum: share of the batch in the updated running statistics. ``nn.BatchNorm2d(momentum=None)``, a cumulative
            average, needs the share of this batch: ``1 / num_batches_tracked``.
        eps: added to the variance, above 0 in training.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16,
            computes in float32 and has no second derivative; ``auto`` leaves float64 to ``composed``.

    Returns:
        (B, C, H, W) in the feature's dtype and memory format, under autocast too, as of ``nn.BatchNorm2d``.

    Raises:
        ValueError: shapes, devices or numbers do not fit; one value a channel in training; no running statistics
            otherwise.
        TypeError: dtypes do not fit: parameters and running statistics share one, float32 or the feature's.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.
    """
    arguments = (feature, weight, bias, running_mean, running_var, training, momentum, eps)
    check_arguments(*arguments)
    chosen = resolve(backend, feature)
    if chosen != "triton":
        return (reference if chosen == "reference" else composed).batch_norm_relu(*arguments)
    operators = torch.ops.uctrans
    (output,) = run(operators.batch_norm_relu, operators.batch_norm_relu_apply, *arguments)
    return output


def run(
    of_batch: Callable[..., tuple[Tensor, ...]],
    of_given: Callable[..., Tensor | tuple[Tensor, ...]],
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Sequence[Tensor]:
    """The maps that an operator returns: in training ``of_batch``, after which running statistics are updated.

    ``of_batch`` returns mean, variance and the running statistics as they become after its maps; ``of_given``
    normalises by the running statistics.
    """
    if not training:
        maps = of_given(feature, weight, bias, running_mean, running_var, eps)
        return (maps,) if isinstance(maps, Tensor) else maps
    found = of_batch(feature, weight, bias, running_mean, running_var, momentum, eps)
    *maps, _mean, _variance, running = found
    if running_mean is not None:
        torch._foreach_copy_([running_mean, running_var], running.unbind())
    return maps


def resolve(backend: str, feature: Tensor) -> str:
    """``triton``, ``composed`` or ``reference``; ``auto`` leaves float64 to ``composed``."""
    chosen = resolve_backend(backend, feature.device)
    if chosen == "triton" and feature.dtype == torch.float64:
        if backend == "triton":
            raise NotImplementedError("the Triton batch norm computes in float32; use backend='composed'")
        return "composed"
    return chosen


def check_arguments(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    """Raise what :func:`batch_norm_relu` raises."""
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
