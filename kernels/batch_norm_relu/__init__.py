"""Batch norm and ReLU, which follow a convolution, alone and with the max-pool of the map they return."""

from .operator import batch_norm_relu, batch_norm_relu_pool

__all__ = ["batch_norm_relu", "batch_norm_relu_pool"]
