"""Channel attention in evaluation as exported programs hold it: all heads at once, one scale after the other.

`composed` packs the scales and takes the heads in turn, so that a map stays in the cache. ONNX Runtime runs products
and passes over a map on all threads, but packs and splits on one, so here every scale has its own products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def project_then_attend(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_value_weight: Tensor, eps: float
) -> Tensor:
    """Return :func:`.composed.project_then_attend` without dropout."""
    key, value = (_project(context, weight) for weight in (_scaled(key_value_weight[0]), key_value_weight[1]))
    scales = tokens.split([weight.shape[-1] for weight in query_weights], dim=-1)
    mixed = []
    for scale, weight in zip(scales, query_weights, strict=True):
        attention = _attention(_project(scale, weight).transpose(2, 3), key, eps)
        mixed.append((value @ attention.transpose(2, 3)).mean(dim=1))
    return torch.cat(mixed, dim=-1)


def correlate_then_attend(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_value_weight: Tensor, eps: float
) -> Tensor:
    """Return :func:`.composed.correlate_then_attend` without dropout."""
    key, value = _scaled(key_value_weight[0]).transpose(1, 2), key_value_weight[1]
    correlation = (tokens.transpose(1, 2) @ context).unsqueeze(1)  # [B, 1, sum C, S]
    blocks = correlation.split([weight.shape[-1] for weight in query_weights], dim=2)
    mixing = []
    for block, weight in zip(blocks, query_weights, strict=True):
        mixing.append((_attention(weight @ block, key, eps) @ value).mean(dim=1))
    return context @ torch.cat(mixing, dim=1).transpose(1, 2)


def _scaled(key_weight: Tensor) -> Tensor:
    return key_weight / key_weight.shape[-1] ** 0.5  # of weights, which a runtime does once


def _project(tokens: Tensor, weight: Tensor) -> Tensor:
    """Project for all heads by one product: (B, N, C), (H, O, C) -> (B, H, N, O)."""
    return F.linear(tokens, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2]).transpose(1, 2)


def _attention(query: Tensor, key: Tensor, eps: float) -> Tensor:
    """Return softmax(instance norm(query @ key)) of one scale: (B, H, C, K), (B, H, K, S) -> (B, H, C, S).

    Keys whose mean is taken away give scores whose rows have the mean 0, which the softmax does not see, and no pass
    over the scores is needed to centre them. The variance of the map is that of these scores and of the means of rows.
    """
    mean = key.mean(dim=-1, keepdim=True)
    scores = query @ (key - mean)
    variance = (scores * scores).mean(dim=(2, 3), keepdim=True)  # square() would become the slower Pow
    variance = variance + (query @ mean).var(dim=2, keepdim=True, correction=0)
    return (scores * (variance + eps).rsqrt()).softmax(dim=-1)
