"""The sums of a segmentation loss, one PyTorch operation a step: the specification, oracle and baseline.

Source: the loss of the authors' implementation of UCTransNet, written in logits so that it is finite for any of them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import statistics_dtype


def segmentation_sums(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, H, W), (B, H, W) -> sums (4 or 3, B, K), counts (3, B, K); see the public function."""
    logits = logits.to(statistics_dtype(logits))
    classes = logits.shape[1]
    if classes == 1:
        target = masks.unsqueeze(1).to(logits.dtype)
        probability = torch.sigmoid(logits)
        # -log sigmoid(z) = softplus(-z) and -log(1 - sigmoid(z)) = softplus(z), for any z.
        cross_entropies = [target * F.softplus(-logits), (1 - target) * F.softplus(logits)]
        predicted, actual = logits > 0, masks.unsqueeze(1) > 0
    else:
        labels = torch.arange(classes, device=masks.device).view(1, -1, 1, 1)
        actual = masks.unsqueeze(1) == labels
        target = actual.to(logits.dtype)
        log_probability = torch.log_softmax(logits, dim=1)
        probability = log_probability.exp()
        cross_entropies = [-(target * log_probability)]
        predicted = logits.argmax(1, keepdim=True) == labels
    area = _over_pixels(probability.square()) + _over_pixels(target.square())
    sums = [_over_pixels(probability * target), area, *map(_over_pixels, cross_entropies)]
    counts = [_over_pixels(pixels, torch.float32) for pixels in (predicted & actual, predicted, actual)]
    return torch.stack(sums), torch.stack(counts)


def _over_pixels(pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return pixels.flatten(2).sum(2, dtype=dtype)
