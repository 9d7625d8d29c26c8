"""The tensors that the forward operator of channel attention saves for its backward."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Saved(NamedTuple):
    """Tensors that backward reads beside the inputs; statistics are float32.

    The N + 1 tokens of the keys are N centred ones, and their mean times sqrt(N); see triton_statistics.py.
    """

    head_outputs: Tensor  # (B, H, N, sum C), inputs' dtype: the outputs before their mean over heads
    temperatures: Tensor  # (B, H, sum C): factor of a row of raw scores before its softmax
    log_sums: Tensor  # (B, H, sum C): log2 of the sum of exponentials of a row
    query_token_means: Tensor  # (B, H, sum C): mean of a channel over the tokens
    key_token_means: Tensor  # (B, H, S)
    # (B, H, N + 1, N + 1), inputs' dtype, float32 for float16: covariance over channels of pairs of tokens of the keys
    key_gram: Tensor
    key_means: Tensor  # (B, H, N + 1): mean over the channels of a token of the keys
    row_keys: Tensor  # (2, B, H, sum C) int32, keys of the dropout mask; (0,) without dropout

    @classmethod
    def empty(cls, query: Tensor, key: Tensor, dropout_p: float) -> Self:
        """Return tensors without data for query (B, H, N, sum C) and key (B, H, N, S)."""
        batch, heads, tokens, channels = query.shape

        def statistics(width: int) -> Tensor:
            return query.new_empty(batch, heads, width, dtype=torch.float32)

        # Entries of a Gram matrix may leave the range of float16.
        gram_dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
        return cls(
            head_outputs=query.new_empty(batch, heads, tokens, channels),
            temperatures=statistics(channels),
            log_sums=statistics(channels),
            query_token_means=statistics(channels),
            key_token_means=statistics(key.shape[-1]),
            key_gram=query.new_empty(batch, heads, tokens + 1, tokens + 1, dtype=gram_dtype),
            key_means=statistics(tokens + 1),
            row_keys=query.new_empty((2, batch, heads, channels) if dropout_p > 0 else 0, dtype=torch.int32),
        )


def key_and_value(key_value: Tensor) -> tuple[Tensor, Tensor]:
    """Return views (B, H, N, S) of key and value of a packed (B, N, 2, H, S)."""
    key, value = key_value.transpose(1, 3).unbind(2)
    return key, value


def empty_heads_inside(tensor: Tensor) -> Tensor:
    """Return a tensor without data like (B, H, N, C), laid out as the projections write it: (B, N, H, C)."""
    batch, heads, tokens, channels = tensor.shape
    return tensor.new_empty(batch, tokens, heads, channels).transpose(1, 2)
