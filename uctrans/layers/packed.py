"""Layers over packed tokens: the channels of all scales side by side in one (B, N, sum C) tensor."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import check_backend, packed_layer_norm, packed_linear, packed_mlp, resolve_backend

LAYER_NORM_EPS = 1e-6
NAMES = ("weight", "bias")  # of a linear map's parameters


class PackedLayerNorm(nn.Module):
    """Layer norm of each scale's channels by themselves: (B, N, sum C) -> (B, N, sum C)."""

    def __init__(self, channels: Sequence[int], backend: str = "auto"):
        super().__init__()
        self.channels = list(channels)
        self.weight = nn.Parameter(torch.ones(sum(channels)))
        self.bias = nn.Parameter(torch.zeros(sum(channels)))
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise every token, scale by scale."""
        return packed_layer_norm(
            tokens, self.channels, self.weight, self.bias, eps=LAYER_NORM_EPS, backend=self.backend
        )


class PackedLinear(nn.ModuleList):
    """A linear map for each scale, block-diagonal over the packed axis: (B, N, sum C) -> (B, N, sum C)."""

    def __init__(self, channels: Sequence[int], backend: str = "auto"):
        super().__init__(nn.Linear(width, width, bias=False) for width in channels)
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply each scale's map to its own channels."""
        return packed_linear(tokens, [linear.weight for linear in self], backend=self.backend)


class Mlp(nn.Module):
    """Linear, GELU, dropout, linear, dropout: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, ratio: int, dropout: float):
        super().__init__()
        self.expand = nn.Linear(channels, channels * ratio)
        self.contract = nn.Linear(channels * ratio, channels)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix the channels of every token."""
        return self.dropout(self.contract(self.dropout(F.gelu(self.expand(tokens)))))


class PackedMlp(nn.ModuleList):
    """An :class:`Mlp` for each scale, with a residual: two (B, N, sum C) -> (B, N, sum C)."""

    def __init__(self, channels: Sequence[int], ratio: int, dropout: float, backend: str = "auto"):
        super().__init__(Mlp(width, ratio, dropout) for width in channels)
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """Apply each scale's MLP to its own channels, and add the residual."""
        if resolve_backend(self.backend, tokens.device) == "triton":
            return self._mix_packed(tokens, residual)
        # Scale by scale: a packed hidden layer would be a concatenation here, of ``ratio`` times the tokens' size.
        scales = tokens.split([mlp.expand.in_features for mlp in self], dim=-1)
        return residual + torch.cat([mlp(scale) for mlp, scale in zip(self, scales, strict=True)], dim=-1)

    def _mix_packed(self, tokens: Tensor, residual: Tensor) -> Tensor:
        expand, contract = ([getattr(mlp, name) for mlp in self] for name in ("expand", "contract"))
        dropout = self[0].dropout  # all scales drop with one probability
        if dropout.training and dropout.p > 0:
            hidden = self._map_packed(tokens, expand)
            return residual + dropout(self._map_packed(dropout(F.gelu(hidden)), contract))
        layers = [[getattr(linear, name) for linear in linears] for linears in (expand, contract) for name in NAMES]
        return packed_mlp(tokens, residual, *layers, backend=self.backend)

    def _map_packed(self, tokens: Tensor, linears: list[nn.Linear]) -> Tensor:
        weights, biases = ([getattr(linear, name) for linear in linears] for name in NAMES)
        return packed_linear(tokens, weights, biases, backend=self.backend)


def linear_weights(*lead_and_channels: int) -> nn.Parameter:
    """(..., C, C) for ``(..., C)``, each matrix drawn like the weight of ``nn.Linear(C, C)``."""
    *lead, channels = lead_and_channels
    bound = 1 / math.sqrt(channels)
    return nn.Parameter(torch.empty(*lead, channels, channels).uniform_(-bound, bound))
