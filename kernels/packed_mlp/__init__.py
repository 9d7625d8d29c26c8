"""The MLPs of all scales with their residual: two products, in whose epilogues GELU and the sum are."""

from .operator import packed_mlp

__all__ = ["packed_mlp"]
