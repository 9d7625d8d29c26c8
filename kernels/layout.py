"""How maps lie in memory: what the output and the gradients look like, the same on every device and without data."""

import torch
from torch import Tensor


def memory_format_of(feature: Tensor) -> torch.memory_format:
    """Channels-last where the channels of a pixel lie next to each other, also in a slice; else contiguous."""
    is_channels_last = feature.stride(1) == 1 and feature.stride(3) > 1
    return torch.channels_last if is_channels_last else torch.contiguous_format


def empty_map(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """A map without data for the images of ``like``, in its memory format and on its device."""
    return torch.empty(
        like.shape[0],
        channels,
        height,
        width,
        dtype=dtype,
        device=like.device,
        memory_format=memory_format_of(like),
    )
