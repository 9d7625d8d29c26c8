"""What follows a convolution: batch norm and ReLU in as few passes over the map as there can be."""

from .operator import batch_norm_relu

__all__ = ["batch_norm_relu"]
