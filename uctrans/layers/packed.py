"""Layers over packed tokens: the channels of all scales side by side in one (B, N, sum C) tensor."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import check_backend, packed_layer_norm, packed_linear, packed_mlp, resolve_backend
from .plain import is_plain, is_plain_linear

LAYER_NORM_EPS = 1e-6


class PackedLayerNorm(nn.Module):
    """Layer norm of every token, separately over the channels of each scale: (B, N, sum C) -> (B, N, sum C)."""

    def __init__(self, channels: Sequence[int], backend: str = "auto"):
        super().__init__()
        self.channels = list(channels)
        self.weight = nn.Parameter(torch.ones(sum(channels)))
        self.bias = nn.Parameter(torch.zeros(sum(channels)))
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise every token scale by scale."""
        return packed_layer_norm(
            tokens, self.channels, self.weight, self.bias, eps=LAYER_NORM_EPS, backend=self.backend
        )


class PackedLinear(nn.ModuleList):
    """A linear map for each scale, block-diagonal over the packed axis: (B, N, sum C) -> (B, N, sum C)."""

    def __init__(self, channels: Sequence[int], backend: str = "auto"):
        super().__init__(nn.Linear(width, width, bias=False) for width in channels)
        self.channels = list(channels)
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the linear map of each scale to its own channels."""
        if all(is_plain_linear(linear, has_bias=False) for linear in self):
            return packed_linear(tokens, [linear.weight for linear in self], backend=self.backend)
        return call_by_scale(self, tokens, self.channels)


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
    """An :class:`Mlp` for each scale, plus a residual: two (B, N, sum C) -> (B, N, sum C)."""

    def __init__(self, channels: Sequence[int], ratio: int, dropout: float, backend: str = "auto"):
        super().__init__(Mlp(width, ratio, dropout) for width in channels)
        self.channels = list(channels)
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """Apply the MLP of each scale to its own channels and add ``residual``."""
        if resolve_backend(self.backend, tokens.device) == "triton" and self._can_be_packed():
            return self._mix_packed(tokens, residual)
        # One scale after the other: packing the hidden layers would copy ``ratio`` times the size of the tokens.
        return residual + call_by_scale(self, tokens, self.channels)

    def _can_be_packed(self) -> bool:
        """Return whether all MLPs are as they were made, and drop with the same probability."""
        drops = []
        for mlp in self:
            if not is_plain(mlp, Mlp):
                return False
            dropout = mlp.dropout
            are_linear = is_plain_linear(mlp.expand, has_bias=True) and is_plain_linear(mlp.contract, has_bias=True)
            if not are_linear or not is_plain(dropout, nn.Dropout):
                return False
            drops.append((dropout.training, dropout.p))
        return drops.count(drops[0]) == len(drops)

    def _mix_packed(self, tokens: Tensor, residual: Tensor) -> Tensor:
        expand = [mlp.expand.weight for mlp in self], [mlp.expand.bias for mlp in self]
        contract = [mlp.contract.weight for mlp in self], [mlp.contract.bias for mlp in self]
        dropout = self[0].dropout
        if dropout.training and dropout.p > 0:
            hidden = packed_linear(tokens, *expand, backend=self.backend)
            return residual + dropout(packed_linear(dropout(F.gelu(hidden)), *contract, backend=self.backend))
        return packed_mlp(tokens, residual, *expand, *contract, backend=self.backend)


def call_by_scale(modules: Iterable[nn.Module], tokens: Tensor, channels: Sequence[int]) -> Tensor:
    """Call the module of each scale with its channels: (B, N, sum C) -> (B, N, sum C)."""
    scales = zip(modules, tokens.split(channels, dim=-1), strict=True)
    return torch.cat([module(scale) for module, scale in scales], dim=-1)


def linear_weights(*lead_and_channels: int) -> nn.Parameter:
    """Return (..., C, C) for ``(..., C)``, each matrix drawn like the weight of ``nn.Linear(C, C)``."""
    *lead, channels = lead_and_channels
    bound = 1 / math.sqrt(channels)
    return nn.Parameter(torch.empty(*lead, channels, channels).uniform_(-bound, bound))
