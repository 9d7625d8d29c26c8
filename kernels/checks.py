"""Checks of what the public functions are given."""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REMEDY = "convert them with .to(dtype), or run under torch.autocast"


def check_dtypes_and_devices(**tensors: Tensor) -> None:
    """Raise unless all are tensors on one device, of one of :data:`DTYPES` (under autocast: of any but float64).

    Autocast leaves float64 as it is, so that there, too, all of them or none may be float64.

    Raises:
        TypeError: no tensor, a dtype that is not in :data:`DTYPES`, or mixed dtypes.
        ValueError: mixed devices.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be floating point, of 16, 32 or 64 bits; got {tensor.dtype}")
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"all tensors must be on one device; got {_listed(devices)}")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) == 1:
        return
    if not _is_autocast_on(next(iter(devices.values())).type):
        raise TypeError(f"all tensors must share one dtype; got {_listed(dtypes)}: {REMEDY}")
    if torch.float64 in dtypes.values():
        raise TypeError(f"autocast leaves float64 as it is, so all tensors or none must be; got {_listed(dtypes)}")


def _is_autocast_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _listed(named: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())
