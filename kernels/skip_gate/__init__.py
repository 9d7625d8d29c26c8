"""The skip path: token upsampling, residual, channel gate and concatenation."""

from .operator import skip_gate

__all__ = ["skip_gate"]
