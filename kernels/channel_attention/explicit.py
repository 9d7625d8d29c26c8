"""The operator's forward and backward written out in PyTorch, with a map of one head in memory.

It runs where the fused kernels do not: on a CPU, and for so many tokens that a map is small beside the products that
make it. docs/design.md has the derivation.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout import keep_mask, keep_scale, row_keys
from ..formats import statistics_dtype

ONLY_FOR_KERNELS = ("head_outputs", "query_token_means", "key_token_means", "key_gram", "key_means")


class Saved(NamedTuple):
    """What forward leaves for backward, beside its inputs; statistics are float32 (float64 for float64 inputs).

    The N + 1 tokens of the keys are N that are centred, and their mean times sqrt(N); see triton_statistics.py.

    The backward of this file makes do with the temperatures, the logarithms and the keys; the others are (0,) where
    the kernels will not run backward.
    """

    head_outputs: Tensor  # (B, H, N, sum C), inputs' dtype: the outputs before their mean over heads
    temperatures: Tensor  # (B, H, sum C): what a row of raw scores is multiplied by before its softmax
    log_sums: Tensor  # (B, H, sum C): log2 of the sum of exponentials of a row
    query_token_means: Tensor  # (B, H, sum C): mean of a channel over the tokens
    key_token_means: Tensor  # (B, H, S)
    key_gram: Tensor  # (B, H, N + 1, N + 1), gram_dtype: covariance over the channels of pairs of tokens of the keys
    key_means: Tensor  # (B, H, N + 1): mean over the channels of a token of the keys
    row_keys: Tensor  # (2, B, H, sum C) int32, keys of the dropout mask; (0,) without dropout

    def without_what_kernels_read(self) -> "Saved":
        """What the backward of this file reads."""
        return self._replace(**{name: self.temperatures.new_empty(0) for name in ONLY_FOR_KERNELS})


def gram_dtype(dtype: torch.dtype) -> torch.dtype:
    """What Gram matrices are kept in: float32 for float16, whose range their entries may leave, else ``dtype``."""
    return torch.float32 if dtype == torch.float16 else dtype


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> tuple[Tensor, Saved]:
    """(B, H, N, sum C), (B, H, N, S), (B, H, N, S) -> (B, N, sum C) and what :func:`backward` needs."""
    batch, heads, tokens, channels = query.shape
    key_channels = key.shape[-1]
    keys = row_keys(seed, batch * heads * channels).view(2, batch, heads, channels) if dropout_p > 0 else None
    temperatures, log_sums = [], []
    mixed = query.new_zeros(batch, tokens, channels, dtype=statistics_dtype(query))
    for head in range(heads):
        scores = (query[:, head].transpose(1, 2) @ key[:, head]).to(statistics_dtype(query))  # [B, sum C, S]
        temperature = _temperatures(scores, segments, eps)
        logits = scores * temperature.unsqueeze(-1)
        attention = logits.softmax(dim=-1)
        if keys is not None:
            attention = attention * keep_mask(keys[:, :, head], key_channels, dropout_p) * keep_scale(dropout_p)
        mixed += value[:, head] @ attention.to(value.dtype).transpose(1, 2)
        temperatures.append(temperature)
        log_sums.append(torch.logsumexp(logits, dim=-1) / math.log(2))
    saved = Saved(
        **{name: mixed.new_empty(0) for name in ONLY_FOR_KERNELS},
        temperatures=torch.stack(temperatures, dim=1),
        log_sums=torch.stack(log_sums, dim=1),
        row_keys=query.new_empty(0, dtype=torch.int32) if keys is None else keys,
    )
    return (mixed / heads).to(query.dtype), saved


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Saved, segments: Sequence[int], dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of (B, N, sum C) -> gradients of query, key and value.

    Instance norm takes out of the softmax's gradient ``dZ`` its mean, which is zero already, and its part along ``Z``,
    which is a multiple of ``X - mean X``.
    """
    heads, key_channels = query.shape[1], key.shape[-1]
    exact = statistics_dtype(query)
    head_gradients = []
    for head in range(heads):
        head_query, head_key, head_value = query[:, head], key[:, head], value[:, head]
        temperature = saved.temperatures[:, head].unsqueeze(-1)  # [B, sum C, 1]
        head_gradient = gradient.transpose(1, 2) / heads  # [B, sum C, N]
        scores = (head_query.transpose(1, 2) @ head_key).to(exact)
        softmax = torch.exp2(scores * temperature / math.log(2) - saved.log_sums[:, head].unsqueeze(-1))
        softmax_gradient = (head_gradient @ head_value).to(exact)
        attention = softmax
        if dropout_p > 0:
            kept = keep_mask(saved.row_keys[:, :, head], key_channels, dropout_p).to(exact) * keep_scale(dropout_p)
            attention, softmax_gradient = softmax * kept, softmax_gradient * kept
        value_gradient = head_gradient.transpose(1, 2) @ attention.to(value.dtype)
        delta = (softmax * softmax_gradient).sum(dim=-1, keepdim=True)
        logit_gradient = softmax * (softmax_gradient - delta)  # [B, sum C, S]
        slope, mean_score = (
            segment_means(rows, segments).unsqueeze(-1)
            for rows in ((logit_gradient * scores).sum(dim=-1), scores.mean(dim=-1))
        )
        weight = temperature.pow(3) * slope / key_channels
        score_gradient = temperature * logit_gradient - weight * (scores - mean_score)
        score_gradient = score_gradient.to(query.dtype)
        query_gradient = head_key @ score_gradient.transpose(1, 2)
        key_gradient = head_query @ score_gradient
        head_gradients.append((query_gradient, key_gradient, value_gradient))
    return tuple(torch.stack(by_head, dim=1) for by_head in zip(*head_gradients, strict=True))


def segment_means(rows: Tensor, segments: Sequence[int]) -> Tensor:
    """Every row's value replaced by the mean over its segment: (B, sum C) -> (B, sum C)."""
    return torch.cat([block.mean(dim=1, keepdim=True).expand_as(block) for block in rows.split(segments, dim=1)], dim=1)


def _temperatures(scores: Tensor, segments: Sequence[int], eps: float) -> Tensor:
    """1 / (sqrt(S) sigma) of each row's map: (B, sum C, S) -> (B, sum C)."""
    key_channels = scores.shape[-1]
    centred = scores - segment_means(scores.mean(dim=-1), segments).unsqueeze(-1)
    variance = segment_means(centred.square().mean(dim=-1), segments)
    return (variance + eps * key_channels).rsqrt()
