"""The sums and what is made of them as operators of torch: what runs where, shapes without data, and gradients."""

from typing import Any

import torch
from torch import Tensor

from ..backend import is_interpreting
from ..formats import empty_map, statistics_dtype
from ..registration import define_gradient, define_operator, refuse_double_backward
from . import explicit, scores
from .explicit import BINARY_SUMS, CLASS_SUMS, COUNTS


def _runs_kernels(tensor: Tensor) -> bool:
    return (tensor.is_cuda or is_interpreting()) and tensor.dtype != torch.float64


def _sums(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if not _runs_kernels(logits):
        return explicit.forward(logits, masks)
    from . import triton  # not at the top: it needs the package triton

    return triton.forward(logits, masks)


def _sums_backward(gradient: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
    if not _runs_kernels(logits):
        return explicit.backward(gradient, logits, masks)
    from . import triton

    return triton.backward(gradient, logits, masks)


def _scores(sums: Tensor, counts: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not _runs_kernels(sums):
        loss, dice = scores.segmentation_scores(sums, counts, *arguments)
        return loss, dice, scores.slopes(sums, counts, *arguments)
    from . import triton_scores

    return triton_scores.segmentation_scores(sums, counts, *arguments)


def _fake_sums(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    batch, classes = logits.shape[:2]
    rows = BINARY_SUMS if classes == 1 else CLASS_SUMS
    sums = logits.new_empty(rows, batch, classes, dtype=statistics_dtype(logits))
    return sums, logits.new_empty(COUNTS, batch, classes, dtype=torch.float32)


def _fake_sums_backward(gradient: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
    return empty_map(logits, *logits.shape[1:], logits.dtype)


def _fake_scores(sums: Tensor, counts: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return sums.new_empty(()), counts.new_empty(counts.shape[1]), sums.new_empty(sums.shape)


def _scores_backward(gradient: Tensor, slopes: Tensor, sums: Tensor) -> Tensor:
    """Takes the sums too, so that whoever asks for a gradient of this one by them is refused."""
    return gradient * slopes


def _fake_scores_backward(gradient: Tensor, slopes: Tensor, sums: Tensor) -> Tensor:
    return slopes.new_empty(slopes.shape)


define_operator(
    "segmentation_sums",
    "(Tensor logits, Tensor masks) -> (Tensor sums, Tensor counts)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _sums),
    fake=_fake_sums,
)
define_operator(
    "segmentation_sums_backward",
    "(Tensor gradient, Tensor logits, Tensor masks) -> Tensor",
    implementations=dict.fromkeys(("CPU", "CUDA"), _sums_backward),
    fake=_fake_sums_backward,
)
define_operator(
    "segmentation_scores",
    "(Tensor sums, Tensor counts, Tensor? totals, SymInt pixels, float dice_weight, float cross_entropy_weight) -> "
    "(Tensor loss, Tensor dice, Tensor slopes)",
    implementations=dict.fromkeys(("CPU", "CUDA"), _scores),
    fake=_fake_scores,
)
define_operator(
    "segmentation_scores_backward",
    "(Tensor gradient, Tensor slopes, Tensor sums) -> Tensor",
    implementations=dict.fromkeys(("CPU", "CUDA"), _scores_backward),
    fake=_fake_scores_backward,
)


def _setup_sums(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _sums_gradient(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    if gradient is None:
        return None, None
    return torch.ops.uctrans.segmentation_sums_backward(gradient, *ctx.saved_tensors), None


def _setup_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dice, slopes = output
    ctx.save_for_backward(slopes, inputs[0])
    ctx.mark_non_differentiable(dice, slopes)
    ctx.set_materialize_grads(False)


def _scores_gradient(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    settings = (None,) * 5
    if gradient is None:
        return None, *settings
    return torch.ops.uctrans.segmentation_scores_backward(gradient, *ctx.saved_tensors), *settings


define_gradient("segmentation_sums", _setup_sums, _sums_gradient)
define_gradient("segmentation_scores", _setup_scores, _scores_gradient)
refuse_double_backward("segmentation_sums_backward", "segmentation_sums")
refuse_double_backward("segmentation_scores_backward", "segmentation_scores")
