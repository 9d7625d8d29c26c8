"""The public function of batch norm, ReLU and max-pool: what it takes and refuses, and which implementation runs."""

import torch
from torch import Tensor

from ..batch_norm_relu.operator import EPS, MOMENTUM, check_arguments, resolve, run
from . import composed, dispatch, reference  # noqa: F401 (dispatch registers the operators)


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
    """``map = relu(batch_norm(feature))``, and ``max_pool2d(map, 2)``: a stage's output, kept and handed down.

    With ``E`` the bytes of the map, the pooled one adds 0.75 E to the 8 E that
    :func:`~uctrans.kernels.batch_norm_relu` moves in a training step: it is written (E/4), and its gradient read twice.
    In half precision PyTorch's pooling adds 7.5 E: it reads the map, writes the pooled one and int64 indices (2.25);
    backward reads these and the gradient and writes one of the map's size (2.25), which is added to the map's other
    gradient (3). The operator keeps no indices: it finds the winner of each window again from ``feature``, among
    values rounded to the map's dtype, as those that are pooled are. Not measured yet: no GPU has run the kernels.

    Windows are 2x2 pixels, 2 apart; an odd last row or column is in none. The first of equal pixels wins, row after
    row; of those that are no number the last one, as in ``nn.MaxPool2d``.

    Args:
        feature: (B, C, H, W), contiguous or channels-last, of at least one channel and 2x2 pixels.
        weight: (C,).
        bias: (C,).
        running_mean: (C,) or ``None``; see :func:`~uctrans.kernels.batch_norm_relu`, also for all that follows.
        running_var: (C,) or ``None``.
        training: normalise by the statistics of the batch, and update the running ones; else by the running ones.
        momentum: share of the batch in the updated running statistics.
        eps: added to the variance, above 0 in training.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``.

    Returns:
        (B, C, H, W) and (B, C, H // 2, W // 2), in the feature's dtype and memory format. Either may be left unused.

    Raises:
        RuntimeError: the map has no window of 2x2 pixels, or no channels, as ``nn.MaxPool2d`` raises.
        ValueError, TypeError, NotImplementedError: as :func:`~uctrans.kernels.batch_norm_relu`.
    """
    arguments = (feature, weight, bias, running_mean, running_var, training, momentum, eps)
    check_arguments(*arguments)
    if min(feature.shape[1:]) < 1 or min(feature.shape[2:]) < 2:
        raise RuntimeError(
            f"the pooled map would be empty, got a feature of {tuple(feature.shape)}: give at least one channel and "
            f"2x2 pixels, or take batch_norm_relu"
        )
    chosen = resolve(backend, feature)
    if chosen != "triton":
        return (reference if chosen == "reference" else composed).batch_norm_relu_pool(*arguments)
    operators = torch.ops.uctrans
    output, pooled = run(operators.batch_norm_relu_pool, operators.batch_norm_relu_pool_apply, *arguments)
    return output, pooled
