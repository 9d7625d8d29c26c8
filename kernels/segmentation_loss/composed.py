"""The sums in plain PyTorch at their fastest, on any device and in any dtype.

On a CPU they are taken image by image, with a gradient written out, so that maps stay in the processor's cache: that
takes a third of the reference's time. Elsewhere the reference's steps are the fewest, and so they are for small images,
whose time is that of the calls. Comparisons write floats, which takes a fraction of the time of booleans and their
sums.
"""

import torch
from torch import Tensor

from ..backend import must_use_pytorch_operations
from ..formats import empty_map, statistics_dtype
from . import reference
from .reference import BINARY_SUMS, CLASS_SUMS, COUNTS

# Logits of an image from which one image after the other is faster, as measured with 1 to 8 images of 16 to 224 pixels
# a side. For several classes the reference compares whole numbers and searches the largest, so that fewer will do.
FEWEST_LOGITS, FEWEST_LOGITS_OF_CLASSES = 2**15, 2**12


def segmentation_sums(logits: Tensor, masks: Tensor, ignore_label: int | None = None) -> tuple[Tensor, Tensor]:
    """(B, K, H, W), (B, H, W) -> sums (4 or 3, B, K), counts (3, B, K); see the public function."""
    if logits.device.type != "cpu" or must_use_pytorch_operations():
        return reference.segmentation_sums(logits, masks, ignore_label)
    fewest = FEWEST_LOGITS if logits.shape[1] == 1 else FEWEST_LOGITS_OF_CLASSES
    by_image = logits.shape[1:].numel() >= fewest
    return (sums_by_image if by_image else reference.segmentation_sums)(logits, masks, ignore_label)


def sums_by_image(logits: Tensor, masks: Tensor, ignore_label: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute :func:`segmentation_sums` one image after the other."""
    return _ImageByImage.apply(logits, masks, ignore_label)


class _ImageByImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, masks: Tensor, ignore_label: int | None) -> tuple[Tensor, Tensor]:
        batch, classes = logits.shape[:2]
        sums_of, rows = (_binary_sums, BINARY_SUMS) if classes == 1 else (_class_sums, CLASS_SUMS)
        exact = statistics_dtype(logits)
        both = logits.new_zeros(batch, rows + COUNTS, classes, dtype=exact)
        for image in range(batch):
            values, mask, _ = _scored_pixels(logits[image].to(exact), masks[image], ignore_label)
            both[image] = torch.stack(sums_of(values, mask))
        sums, counts = both.transpose(0, 1).split([rows, COUNTS])
        counts = counts.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        ctx.save_for_backward(logits, masks)
        ctx.ignore_label = ignore_label
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return sums.contiguous(), counts

    @staticmethod
    def backward(ctx, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if gradient is None:
            return None, None, None
        logits, masks = ctx.saved_tensors
        is_differentiated = torch.is_grad_enabled()
        if is_differentiated or _is_batch(gradient):
            # The plain steps can be differentiated again, and write nothing in place, which would not hold a batch.
            with torch.enable_grad():
                sums, _counts = reference.segmentation_sums(logits, masks, ctx.ignore_label)
            return *torch.autograd.grad(sums, logits, gradient, create_graph=is_differentiated), None, None
        gradient_of = _binary_gradient if logits.shape[1] == 1 else _class_gradient
        exact = statistics_dtype(logits)
        d_logits = empty_map(logits, *logits.shape[1:], logits.dtype)
        for image in range(len(logits)):
            values, mask, scored = _scored_pixels(logits[image].to(exact), masks[image], ctx.ignore_label)
            d_values = gradient_of(gradient[:, image], values, mask)
            if scored is None:
                d_logits[image] = d_values.view(logits.shape[1:])
            else:
                d_logits[image] = d_values.new_zeros(logits.shape[1:]).masked_scatter_(scored, d_values)
        return d_logits, None, None


def _is_batch(gradient: Tensor) -> bool:
    """Return whether ``torch.func.vmap`` or ``torch.autograd.grad(is_grads_batched=True)`` gave this gradient."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


def _scored_pixels(logits: Tensor, mask: Tensor, ignore_label: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(K, H, W), (H, W) -> the pixels to sum, (K, pixels) and (pixels,), and where they are: None is everywhere."""
    if ignore_label is None:
        return logits.flatten(1).contiguous(), mask.flatten(), None
    scored = mask != ignore_label
    return logits[:, scored].contiguous(), mask[scored], scored


def _binary_sums(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """(1, pixels), (pixels,) -> each of the sums and counts: (1,)."""
    target = mask.to(logits.dtype)[None]
    probability = torch.sigmoid(logits)
    # softplus(z) = max(z, 0) + tail and softplus(-z) = max(-z, 0) + tail
    tail = logits.abs().neg_().exp_().log1p_()
    positive = logits.neg().clamp_(min=0).add_(tail).mul_(target).sum(1)
    negative = tail.add_(logits.clamp(min=0)).mul_(1 - target).sum(1)
    area = _dot(probability, probability) + _dot(target, target)
    overlap = probability.mul_(target).sum(1)
    predicted = torch.gt(logits, 0, out=tail)
    actual = torch.gt(target, 0, out=target)
    areas = [predicted.sum(1), actual.sum(1)]
    return [overlap, area, positive, negative, predicted.mul_(actual).sum(1), *areas]


def _binary_gradient(gradient: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """(4, 1), (1, pixels), (pixels,) -> (1, pixels)."""
    overlap, area, positive, negative = gradient.unsqueeze(-1)
    target = mask.to(logits.dtype)[None]
    probability = torch.sigmoid(logits)
    # p (1 - p) (overlap t + 2 area p) - positive t (1 - p) + negative (1 - t) p
    d_logits = (probability * (2 * area)).add_(target * overlap).mul_(probability).sub_(target * positive)
    d_logits.mul_(torch.sigmoid(-logits))
    return d_logits.add_(probability.mul_(negative).mul_(1 - target))


def _class_sums(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """(K, pixels), (pixels,) -> each of the sums and counts: (K,)."""
    target = _one_hot(mask, logits)
    log_probability = torch.log_softmax(logits, dim=0)
    cross_entropy = -(target * log_probability).sum(1)
    probability = log_probability.exp_()
    actual = target.sum(1)
    area = _dot(probability, probability) + actual
    overlap = probability.mul_(target).sum(1)
    predicted = _one_hot(logits.max(dim=0).indices, logits)  # ten times as fast as argmax
    return [overlap, area, cross_entropy, _dot(predicted, target), predicted.sum(1), actual]


def _class_gradient(gradient: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """(3, K), (K, pixels), (pixels,) -> (K, pixels)."""
    overlap, area, cross_entropy = gradient.unsqueeze(-1)
    target = _one_hot(mask, logits)
    probability = torch.softmax(logits, dim=0)
    # First by the logarithms of the probabilities, then through the softmax.
    d_logits = (probability * (2 * area)).add_(target * overlap).mul_(probability).sub_(target.mul_(cross_entropy))
    return d_logits.sub_(probability.mul_(d_logits.sum(0)))


def _one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """(pixels,) -> (K, pixels) in the dtype of ``logits``."""
    classes = torch.arange(len(logits), dtype=logits.dtype, device=logits.device)[:, None]
    return torch.eq(labels.to(logits.dtype), classes, out=torch.empty_like(logits))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(1)
