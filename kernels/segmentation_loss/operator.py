"""Segmentation losses and their parts: public functions, checks, choice of the form, registration."""

from typing import Any

import torch
from torch import Tensor

from ..backend import choose_form
from ..checks import check_dtypes_and_devices, check_numbers_type, check_sizes, is_whole_number
from ..formats import empty_map, statistics_dtype
from ..registration import register_gradient, register_operator
from . import composed, reference
from .reference import BINARY_SUMS, CLASS_SUMS, COUNTS

MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MOST_CLASSES = 64  # so that a tile still holds several pixels
MOST_PIXELS = 2**30  # of an image; they are counted in 32 bits
NO_IMAGE = 1e-12  # divides the loss of images without a labelled pixel, which is 0


def segmentation_loss(
    logits: Tensor,
    masks: Tensor,
    *,
    ignore_index: int | None = None,
    totals: Tensor | None = None,
    dice_weight: float = 0.5,
    cross_entropy_weight: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """Compute the loss of the published protocol, ``dice_weight * Dice + cross_entropy_weight * cross entropy``.

    :func:`segmentation_scores` has the formulas, and returns the Dice scores too, from the same read of the maps.

    Args:
        logits: (B, K, H, W), of any strides; see :func:`segmentation_sums`.
        masks: (B, H, W), bool or integers: {0, 1} for one class, else labels 0 to K - 1.
        ignore_index: pixels with this number in ``masks`` have no loss and no gradient, whatever their logits are. The
            loss of masks that hold nothing else is 0.
        totals: float32 (3,), what the loss is averaged over; by default :func:`segmentation_totals` of ``masks``.
        dice_weight: weight of the Dice loss.
        cross_entropy_weight: weight of the cross entropy.
        backend: see :func:`segmentation_sums`.

    Returns:
        A scalar, float32 (float64 for float64 logits), also under autocast.

    Raises:
        ValueError: shapes, devices or ``backend`` do not fit, images have no pixels, or masks of this dtype cannot
            hold ``ignore_index``.
        TypeError: the logits are not floating point, the masks are, ``ignore_index`` is not a whole number, or a weight
            is not a number.
        NotImplementedError: see :func:`segmentation_sums`.
    """
    _check_maps(logits, masks)
    _check_ignored("ignore_index", ignore_index, masks)
    sums, counts = segmentation_sums(logits, masks, ignore_label=ignore_index, backend=backend)
    if totals is None and ignore_index is not None:
        totals = segmentation_totals(masks, ignore_label=ignore_index)
    weights = {"dice_weight": dice_weight, "cross_entropy_weight": cross_entropy_weight}
    pixels = masks.shape[1] * masks.shape[2]
    loss, _dice = segmentation_scores(sums, counts, pixels, totals=totals, **weights, backend=backend)
    return loss


def segmentation_totals(masks: Tensor, *, ignore_label: int | None = None) -> Tensor:
    """Count the images, non-zero pixels and zero pixels of ``masks`` (B, H, W): float32 (3,), on their device.

    Pixels of ``ignore_label`` do not count, nor do images of nothing else. Images are at least a tiny number, so that
    the loss of a batch without any is 0. The mean of the losses of several processes is that of the whole batch if each
    averages over the mean of their totals.

    Raises:
        ValueError: ``masks`` are not (B, H, W), or cannot hold ``ignore_label``.
        TypeError: ``masks`` are not bool or integers, or ``ignore_label`` is not a whole number.
    """
    _check_masks_dtype(masks)
    if masks.ndim != 3:
        raise ValueError(f"masks must be (B, H, W); got {tuple(masks.shape)}")
    _check_ignored("ignore_label", ignore_label, masks)
    if ignore_label is None:
        positives = (masks > 0).sum(dtype=torch.float32)
        return torch.stack([torch.full_like(positives, len(masks)), positives, masks.numel() - positives])
    is_labelled = masks != ignore_label
    positives = (is_labelled & (masks != 0)).sum(dtype=torch.float32)
    images = is_labelled.flatten(1).any(1).sum(dtype=torch.float32).clamp(min=NO_IMAGE)
    return torch.stack([images, positives, is_labelled.sum(dtype=torch.float32) - positives])


def segmentation_sums(
    logits: Tensor, masks: Tensor, *, ignore_label: int | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sum over the pixels of each image, in one read, the terms that losses and Dice scores are made of.

    Args:
        logits: (B, K, H, W), of any strides. One class means a sigmoid, ``p = sigmoid(z)``, more mean a softmax.
        masks: (B, H, W), bool or integers: for one class ``t`` of {0, 1}, else labels 0 to K - 1, and ``t`` is 1 in
            the label's class. One class takes other numbers as ``t``; with several, other numbers have no class.
        ignore_label: pixels with this number in ``masks`` add nothing to sums and counts, and their gradient is 0,
            whatever their logits are.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16 and up
            to 64 classes, computes in float32 and has no second derivative; ``auto`` leaves the rest to ``composed``.

    Returns:
        The sums of each class of each image, float32 (float64 for float64 logits), differentiable by the logits: (4,
        B, 1) of ``p t``, ``p^2 + t^2``, ``t softplus(-z)`` and ``(1 - t) softplus(z)`` for one class, (3, B, K) of ``p
        t``, ``p^2 + t^2`` and ``-t log p`` for several. And counts of pixels (3, B, K), float32: both predicted and
        actual, predicted (``z > 0``, or the largest logit, the first of equals), actual (``t > 0``).

    Raises:
        ValueError: shapes, devices or ``backend`` do not fit, or masks of this dtype cannot hold ``ignore_label``.
        TypeError: the logits are not floating point, or the masks are, or ``ignore_label`` is not a whole number.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.
    """
    _check_maps(logits, masks)
    _check_ignored("ignore_label", ignore_label, masks)
    limit = _limit_beyond(logits)
    form = choose_form(backend, logits, "segmentation_sums", fits=limit is None)
    if backend == "triton" and limit is not None:
        raise NotImplementedError(f"the Triton operator of segmentation_sums {limit}; use backend='composed'")
    if form == "triton":
        return torch.ops.uctrans.segmentation_sums(logits, masks, ignore_label)
    return (reference if form == "reference" else composed).segmentation_sums(logits, masks, ignore_label)


def segmentation_scores(
    sums: Tensor,
    counts: Tensor,
    pixels: int,
    *,
    totals: Tensor | None = None,
    dice_weight: float = 0.5,
    cross_entropy_weight: float = 0.5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the loss of the published protocol and the Dice scores from what :func:`segmentation_sums` returned.

    Args:
        sums: (4, B, 1) or (3, B, K).
        counts: (3, B, K).
        pixels: pixels of an image, at least 1.
        totals: float32 (3,), images, positive and negative pixels that the loss is averaged over; by default those of
            the counts, all ``pixels`` of each image. For sums that ignore a label, give :func:`segmentation_totals`.
        dice_weight: weight of the Dice loss.
        cross_entropy_weight: weight of the cross entropy.
        backend: see :func:`segmentation_sums`; ``composed`` and ``reference`` are the same here.

    Returns:
        The loss, a scalar, differentiable by the sums; and the Dice score of each image, float32 (B,), for several
        classes the mean over those that are not the first. A class that neither mask nor prediction holds scores 1.

        One class: ``dice_weight`` times the mean over images of ``1 - (2 sum pt/4 + 1e-5) / (sum (p^2 + t^2)/4 +
        1e-5)``, plus ``cross_entropy_weight`` times half the mean of ``-log p`` over positive pixels and half that of
        ``-log(1 - p)`` over negative pixels. Several: the same Dice loss as mean over the classes too, and the mean of
        ``-log p(label)`` over positive and negative pixels together.

    Raises:
        ValueError: shapes, devices or ``backend`` do not fit, or ``pixels`` is below 1.
        TypeError: tensors are not floating point, ``pixels`` is not a whole number, or a weight is not a number.
        NotImplementedError: see :func:`segmentation_sums`.
    """
    check_sizes(pixels=pixels)
    _check_sums(sums, counts, totals, dice_weight, cross_entropy_weight)
    arguments = (sums, counts, totals, pixels, dice_weight, cross_entropy_weight)
    if choose_form(backend, sums, "segmentation_scores") == "triton":
        loss, dice, _slopes = torch.ops.uctrans.segmentation_scores(*arguments)
        return loss, dice
    return reference.segmentation_scores(*arguments)


def _check_maps(logits: Tensor, masks: Tensor) -> None:
    check_dtypes_and_devices(logits=logits)
    _check_masks_dtype(masks)
    if logits.ndim != 4 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, classes, H, W), with at least one class; got {tuple(logits.shape)}")
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(masks.shape) != expected:
        raise ValueError(f"masks must be {expected} for logits {tuple(logits.shape)}, not {tuple(masks.shape)}")
    if masks.device != logits.device:
        raise ValueError(f"all tensors must be on one device; got logits {logits.device}, masks {masks.device}")


def _check_masks_dtype(masks: Tensor) -> None:
    if not isinstance(masks, Tensor) or masks.dtype not in MASK_DTYPES:
        given = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks must be a tensor of bool or integers; got {given}: convert it with .to(torch.uint8)")


def _check_ignored(name: str, label: int | None, masks: Tensor) -> None:
    if label is None:
        return
    if not is_whole_number(label):
        raise TypeError(f"{name} must be a whole number or None; got {type(label).__name__}")
    range_ = None if masks.dtype == torch.bool else torch.iinfo(masks.dtype)
    if range_ is None or not range_.min <= label <= range_.max:
        raise ValueError(f"{name}: masks of {masks.dtype} cannot hold {label}; convert them or leave it out")


def _check_sums(
    sums: Tensor, counts: Tensor, totals: Tensor | None, dice_weight: float, cross_entropy_weight: float
) -> None:
    given = {"sums": sums, "counts": counts} | ({} if totals is None else {"totals": totals})
    for name, tensor in given.items():
        check_dtypes_and_devices(**{name: tensor})  # one by one: only the sums may be float64
        if tensor.device != sums.device:
            raise ValueError(f"all tensors must be on one device; got sums {sums.device}, {name} {tensor.device}")
    check_numbers_type(dice_weight=dice_weight, cross_entropy_weight=cross_entropy_weight)
    rows = BINARY_SUMS if sums.ndim == 3 and sums.shape[2] == 1 else CLASS_SUMS
    if sums.ndim != 3 or sums.shape[0] != rows or sums.shape[2] == 0:
        raise ValueError(f"sums must be ({BINARY_SUMS}, B, 1) or ({CLASS_SUMS}, B, K); got {tuple(sums.shape)}")
    if tuple(counts.shape) != (COUNTS, *sums.shape[1:]):
        raise ValueError(f"counts must be {(COUNTS, *sums.shape[1:])}; got {tuple(counts.shape)}")
    if totals is not None and tuple(totals.shape) != (3,):
        raise ValueError(f"totals must be (3,), images, positives and negatives; got {tuple(totals.shape)}")


def _limit_beyond(logits: Tensor) -> str | None:
    """Return the limit of the kernels that ``logits`` is beyond, in words, or ``None``."""
    if logits.shape[1] > MOST_CLASSES:
        return f"takes up to {MOST_CLASSES} classes, not {logits.shape[1]}"
    if logits.shape[2] * logits.shape[3] > MOST_PIXELS:
        return f"takes images of up to {MOST_PIXELS} pixels, not {logits.shape[2]} x {logits.shape[3]}"
    return None


@register_operator(
    "segmentation_sums",
    "(Tensor logits, Tensor masks, int? ignore_label=None) -> (Tensor sums, Tensor counts)",
    launcher=f"{__package__}.triton:forward",
)
def _fake_sums(logits: Tensor, masks: Tensor, ignore_label: int | None = None) -> tuple[Tensor, Tensor]:
    batch, classes = logits.shape[:2]
    rows = BINARY_SUMS if classes == 1 else CLASS_SUMS
    sums = logits.new_empty(rows, batch, classes, dtype=statistics_dtype(logits))
    return sums, logits.new_empty(COUNTS, batch, classes, dtype=torch.float32)


@register_operator(
    "segmentation_sums_backward",
    "(Tensor gradient, Tensor logits, Tensor masks, int? ignore_label=None) -> Tensor",
    launcher=f"{__package__}.triton:backward",
    backward_of="segmentation_sums",
)
def _fake_sums_backward(gradient: Tensor, logits: Tensor, masks: Tensor, ignore_label: int | None = None) -> Tensor:
    return empty_map(logits, *logits.shape[1:], logits.dtype)


@register_operator(
    "segmentation_scores",
    "(Tensor sums, Tensor counts, Tensor? totals, SymInt pixels, float dice_weight, float cross_entropy_weight) -> "
    "(Tensor loss, Tensor dice, Tensor slopes)",
    launcher=f"{__package__}.triton_scores:segmentation_scores",
)
def _fake_scores(sums: Tensor, counts: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return sums.new_empty(()), counts.new_empty(counts.shape[1]), sums.new_empty(sums.shape)


# It takes the sums, too, so that a gradient of it by them is asked for, and refused.
@register_operator(
    "segmentation_scores_backward",
    "(Tensor gradient, Tensor slopes, Tensor sums) -> Tensor",
    launcher=f"{__package__}.triton_scores:backward",
    backward_of="segmentation_scores",
)
def _fake_scores_backward(gradient: Tensor, slopes: Tensor, sums: Tensor) -> Tensor:
    return slopes.new_empty(slopes.shape)


def _save_sums(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    *maps, ctx.ignore_label = inputs
    ctx.save_for_backward(*maps)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _sums_gradient(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    if gradient is None:
        return None, None, None
    backward = torch.ops.uctrans.segmentation_sums_backward
    return backward(gradient, *ctx.saved_tensors, ctx.ignore_label), None, None


def _save_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dice, slopes = output
    ctx.save_for_backward(slopes, inputs[0])
    ctx.mark_non_differentiable(dice, slopes)
    ctx.set_materialize_grads(False)


def _scores_gradient(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    others = (None,) * 5
    if gradient is None:
        return None, *others
    return torch.ops.uctrans.segmentation_scores_backward(gradient, *ctx.saved_tensors), *others


register_gradient("segmentation_sums", _save_sums, _sums_gradient)
register_gradient("segmentation_scores", _save_scores, _scores_gradient)
