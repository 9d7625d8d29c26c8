"""A linear map for each scale of packed tokens, all scales and heads in one launch."""

from .operator import packed_linear

__all__ = ["packed_linear"]
