"""Layer norm of each scale of packed tokens by itself, and of all scales together, in one read."""

from .operator import cross_layer_norm, packed_layer_norm

__all__ = ["cross_layer_norm", "packed_layer_norm"]
