"""The dtypes and the memory layout that results have, the same on every device and for tensors without data."""

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes that one thread reads at once


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of means and variances: float32 for half precision, otherwise the tensor's own."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def output_dtype(tensor: Tensor) -> torch.dtype:
    """Return autocast's dtype where autocast is on and ``tensor`` is not float64, otherwise the tensor's own."""
    device_type = tensor.device.type
    is_cast = is_autocast_on(device_type) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if is_cast else tensor.dtype


def is_autocast_on(device_type: str) -> bool:
    """Return whether autocast is on for this kind of device."""
    # torch raises for "meta". torch.amp.is_autocast_available would tell, but PyTorch 2.11 cannot compile a call of it.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def memory_format_of(feature: Tensor) -> torch.memory_format:
    """Return channels-last where the channels of a pixel are adjacent, also in a slice; otherwise contiguous."""
    is_channels_last = feature.stride(1) == 1 and feature.stride(3) > 1
    return torch.channels_last if is_channels_last else torch.contiguous_format


def empty_map(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return a map without data for the images of ``like``, in its memory format and on its device."""
    return torch.empty(
        like.shape[0],
        channels,
        height,
        width,
        dtype=dtype,
        device=like.device,
        memory_format=memory_format_of(like),
    )


def has_aligned_rows(*tensors: Tensor) -> bool:
    """Return whether the last axis of all ``tensors`` is contiguous and each of its rows starts on 16 bytes."""
    return all(
        tensor.stride(-1) == 1
        and all(
            distance * tensor.itemsize % ALIGNMENT == 0 for distance in (*tensor.stride()[:-1], tensor.storage_offset())
        )
        for tensor in tensors
    )


def key_and_value(key_value: Tensor) -> tuple[Tensor, Tensor]:
    """Return views (B, H, N, S) of key and value of a packed (B, N, 2, H, S)."""
    key, value = key_value.transpose(1, 3).unbind(2)
    return key, value


def empty_heads_inside(tensor: Tensor) -> Tensor:
    """Return a tensor without data like (B, H, N, C), laid out as the projections write it: (B, N, H, C)."""
    batch, heads, tokens, channels = tensor.shape
    return tensor.new_empty(batch, tokens, heads, channels).transpose(1, 2)
