"""The operator in PyTorch, with the gradients written out: for a CPU, where no kernels run."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packed_linear.composed import packed_linear, token_gradient


def forward(
    tokens: Tensor,
    residual: Tensor,
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    contract_weights: Sequence[Tensor],
    contract_biases: Sequence[Tensor],
    keeps_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, sum C); hidden layer before GELU, empty (0,) unless it is kept, and behind it (B, N, sum R C)."""
    hidden = packed_linear(tokens, expand_weights, expand_biases)
    activation = F.gelu(hidden)
    output = residual + packed_linear(activation, contract_weights, contract_biases)
    return output, hidden if keeps_hidden else hidden.new_empty(0), activation


def hidden_gradient(gradient: Tensor, contract_weights: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """The gradient by the hidden layer before GELU: (B, N, sum C) -> (B, N, sum R C)."""
    return token_gradient(gradient, contract_weights) * gelu_slope(hidden)


def gelu_slope(hidden: Tensor) -> Tensor:
    """The derivative of x Phi(x): Phi(x) + x phi(x), of the standard normal distribution."""
    return torch.special.ndtr(hidden) + hidden * torch.exp(-hidden.square() / 2) / math.sqrt(2 * math.pi)
