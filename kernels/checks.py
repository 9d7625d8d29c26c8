"""Checks of what the public functions are given."""

import torch
from torch import Tensor


def check_dtypes_and_devices(**tensors: Tensor) -> None:
    """Raise unless all tensors are floating point, on one device, and of one dtype (under autocast: of any dtypes).

    Raises:
        TypeError: an integer tensor, or mixed dtypes.
        ValueError: mixed devices.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"all tensors must be on one device; got {_listed(devices)}")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1 and not _is_autocast_on(next(iter(devices.values())).type):
        raise TypeError(f"all tensors must share one dtype; got {_listed(dtypes)}")


def _is_autocast_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _listed(named: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())
