"""Layers over packed tokens: the channels of all scales side by side in one (B, N, sum C) tensor."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6


class PackedLayerNorm(nn.Module):
    """Layer norm of each scale's channels by themselves: (B, N, sum C) -> (B, N, sum C)."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.channels = list(channels)
        self.weight = nn.Parameter(torch.ones(sum(channels)))
        self.bias = nn.Parameter(torch.zeros(sum(channels)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise every token, scale by scale."""
        scales = zip(
            tokens.split(self.channels, dim=-1),
            self.weight.split(self.channels),
            self.bias.split(self.channels),
            strict=True,
        )
        return torch.cat(
            [F.layer_norm(scale, scale.shape[-1:], weight, bias, LAYER_NORM_EPS) for scale, weight, bias in scales],
            dim=-1,
        )


class PackedLinear(nn.ModuleList):
    """A linear map for each scale, block-diagonal over the packed axis: (B, N, sum C) -> (B, N, sum C)."""

    def __init__(self, channels: Sequence[int]):
        super().__init__(nn.Linear(width, width, bias=False) for width in channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply each scale's map to its own channels."""
        return _map_scales(self, tokens, [linear.in_features for linear in self])


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
    """An :class:`Mlp` for each scale: (B, N, sum C) -> (B, N, sum C)."""

    def __init__(self, channels: Sequence[int], ratio: int, dropout: float):
        super().__init__(Mlp(width, ratio, dropout) for width in channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply each scale's MLP to its own channels."""
        return _map_scales(self, tokens, [mlp.expand.in_features for mlp in self])


def linear_weights(*lead_and_channels: int) -> nn.Parameter:
    """(..., C, C) for ``(..., C)``, each matrix drawn like the weight of ``nn.Linear(C, C)``."""
    *lead, channels = lead_and_channels
    bound = 1 / math.sqrt(channels)
    return nn.Parameter(torch.empty(*lead, channels, channels).uniform_(-bound, bound))


def _map_scales(modules: Sequence[Callable[[Tensor], Tensor]], tokens: Tensor, channels: list[int]) -> Tensor:
    scales = tokens.split(channels, dim=-1)
    return torch.cat([module(scale) for module, scale in zip(modules, scales, strict=True)], dim=-1)
