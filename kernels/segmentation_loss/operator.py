"""The public functions of segmentation losses: what they take, what they refuse, and which implementation runs."""

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_dtypes_and_devices, check_numbers_type
from . import composed, dispatch, reference, scores  # noqa: F401 (dispatch registers the operators)
from .explicit import BINARY_SUMS, CLASS_SUMS, COUNTS

MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MOST_CLASSES = 64  # of a tile that still holds several pixels
MOST_PIXELS = 2**30  # of an image; they are counted in 32 bits


def segmentation_sums(logits: Tensor, masks: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Sum over the pixels of each image, in one read, what losses and Dice scores are made of.

    Args:
        logits: (B, K, H, W), of any strides. One class means a sigmoid, ``p = sigmoid(z)``, more mean a softmax.
        masks: (B, H, W), bool or integers: for one class ``t`` of {0, 1}, else labels 0 to K - 1, and ``t`` is 1 in
            the label's class. Of other values, one class takes the number as ``t``; what is no label has no class.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16 and up
            to 64 classes, computes in float32 and has no second derivative; ``auto`` leaves the rest to ``composed``.

    Returns:
        The sums of each class of each image, float32 (float64 for float64 logits), differentiable by the logits: (4,
        B, 1) of ``p t``, ``p^2 + t^2``, ``t softplus(-z)`` and ``(1 - t) softplus(z)`` for one class, (3, B, K) of ``p
        t``, ``p^2 + t^2`` and ``-t log p`` for several. And counts of pixels (3, B, K), float32: both predicted and
        actual, predicted (``z > 0``, or the largest logit, the first of equals), actual (``t > 0``).

    Raises:
        ValueError: shapes, devices or ``backend`` do not fit.
        TypeError: the logits are not floating point, or the masks are.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.
    """
    _check_maps(logits, masks)
    chosen = _resolve(backend, logits, _obstacle_to_sums(logits), "segmentation_sums")
    if chosen == "triton":
        return torch.ops.uctrans.segmentation_sums(logits, masks)
    return (reference if chosen == "reference" else composed).segmentation_sums(logits, masks)


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
    """Make the loss of the published protocol and the Dice scores of what :func:`segmentation_sums` returned.

    Args:
        sums: (4, B, 1) or (3, B, K).
        counts: (3, B, K).
        pixels: of an image.
        totals: float32 (3,), images, positive and negative pixels that the loss is averaged over; those of the counts
            when not given.
        dice_weight: weight of the Dice loss.
        cross_entropy_weight: weight of the cross entropy.
        backend: see :func:`segmentation_sums`; ``composed`` and ``reference`` are the same here.

    Returns:
        The loss, a scalar, differentiable by the sums; and the Dice score of each image, float32 (B,), for several
        classes the mean over those that are not the first. A class that neither mask nor prediction holds scores 1.

        One class: ``dice_weight`` times the mean over images of ``1 - (2 sum pt/4 + 1e-5) / (sum (p^2 + t^2)/4 +
        1e-5)``, plus ``cross_entropy_weight`` times half the mean of ``-log p`` over positive pixels and half that of
        ``-log(1 - p)`` over negative pixels. Several: the same Dice loss as mean over the classes too, and the mean of
        ``-log p(label)`` over pixels.

    Raises:
        ValueError: shapes, devices or ``backend`` do not fit.
        TypeError: tensors are not floating point, or a weight is no number.
        NotImplementedError: see :func:`segmentation_sums`.
    """
    _check_sums(sums, counts, totals, dice_weight, cross_entropy_weight)
    obstacle = "computes in float32" if sums.dtype == torch.float64 else None
    arguments = (sums, counts, totals, pixels, dice_weight, cross_entropy_weight)
    if _resolve(backend, sums, obstacle, "segmentation_scores") == "triton":
        loss, dice, _slopes = torch.ops.uctrans.segmentation_scores(*arguments)
        return loss, dice
    return scores.segmentation_scores(*arguments)


def _check_maps(logits: Tensor, masks: Tensor) -> None:
    check_dtypes_and_devices(logits=logits)
    if not isinstance(masks, Tensor) or masks.dtype not in MASK_DTYPES:
        given = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks must be a tensor of bool or integers; got {given}: convert it with .to(torch.uint8)")
    if logits.ndim != 4 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, classes, H, W), with at least one class; got {tuple(logits.shape)}")
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(masks.shape) != expected:
        raise ValueError(f"masks must be {expected} for logits {tuple(logits.shape)}, not {tuple(masks.shape)}")
    if masks.device != logits.device:
        raise ValueError(f"all tensors must be on one device; got logits {logits.device}, masks {masks.device}")


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


def _resolve(backend: str, tensor: Tensor, obstacle: str | None, name: str) -> str:
    """The backend that runs; an obstacle is why the kernels cannot take ``tensor``, or ``None`` where they can."""
    chosen = resolve_backend(backend, tensor.device)
    if chosen != "triton" or obstacle is None:
        return chosen
    if backend == "triton":
        raise NotImplementedError(f"the Triton operator of {name} {obstacle}; use backend='composed'")
    return "composed"


def _obstacle_to_sums(logits: Tensor) -> str | None:
    if logits.dtype == torch.float64:
        return "computes in float32"
    if logits.shape[1] > MOST_CLASSES:
        return f"takes up to {MOST_CLASSES} classes, not {logits.shape[1]}"
    if logits.shape[2] * logits.shape[3] > MOST_PIXELS:
        return f"takes images of up to {MOST_PIXELS} pixels, not {logits.shape[2]} x {logits.shape[3]}"
    return None
