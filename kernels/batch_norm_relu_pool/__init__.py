"""What follows the last convolution of an encoder's stage: batch norm and ReLU, and the map pooled for the next one."""

from .operator import batch_norm_relu_pool

__all__ = ["batch_norm_relu_pool"]
