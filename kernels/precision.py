"""The dtypes that means and variances are taken in, and that results have under autocast."""

import torch
from torch import Tensor


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for half-precision tensors, otherwise the tensor's own."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def output_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's where it is on and ``tensor`` is not float64, which autocast leaves alone; else the tensor's own."""
    device_type = tensor.device.type
    is_cast = is_autocast_on(device_type) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if is_cast else tensor.dtype


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for this kind of device."""
    # Of "meta" one may not ask. torch.amp.is_autocast_available knows, and PyTorch 2.11 cannot compile a call of it.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
