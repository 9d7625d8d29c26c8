"""Checks of the arguments of public functions."""

import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .formats import is_autocast_on

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REMEDY = "convert them with .to(dtype), or run under torch.autocast"


def check_dtypes_and_devices(**tensors: Tensor) -> None:
    """Raise unless all are tensors on one device and of one of :data:`DTYPES` (under autocast: of any but float64).

    Autocast leaves float64 as it is, so that there, too, all of them or none may be float64.

    Raises:
        TypeError: an argument is not a tensor, its dtype is not in :data:`DTYPES`, or dtypes are mixed.
        ValueError: devices are mixed.
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
    if not is_autocast_on(next(iter(devices.values())).type):
        raise TypeError(f"all tensors must share one dtype; got {_listed(dtypes)}: {REMEDY}")
    if torch.float64 in dtypes.values():
        raise TypeError(f"autocast leaves float64 as it is, so all tensors or none must be; got {_listed(dtypes)}")


def check_tensor_lists(**lists: Iterable[Tensor]) -> None:
    """Raise ``TypeError`` unless each can hold one tensor a scale; a tensor itself would be split into its rows."""
    for name, tensors in lists.items():
        if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
            given = "a tensor" if isinstance(tensors, Tensor) else type(tensors).__name__
            raise TypeError(f"{name} must be a list of tensors, one a scale; got {given}")


def check_segments_type(segments: Sequence[int]) -> None:
    """Raise ``TypeError`` unless ``segments`` is a sequence of ints."""
    if not isinstance(segments, Sequence) or not all(map(is_whole_number, segments)):
        raise TypeError(f"segments must be a sequence of ints, one width a scale; got {segments!r}")


def check_sizes(**values: int) -> None:
    """Raise unless all are whole numbers of at least 1.

    Raises:
        TypeError: a value is not a whole number.
        ValueError: a value is below 1.
    """
    for name, value in values.items():
        if not is_whole_number(value):
            raise TypeError(f"{name} must be a whole number; got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def check_numbers_type(**values: float) -> None:
    """Raise ``TypeError`` unless all are plain numbers."""
    for name, value in values.items():
        if not isinstance(value, numbers.Real | torch.SymFloat) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def is_whole_number(value: object) -> bool:
    """Return whether ``value`` is an integer of Python, NumPy or a compiler; booleans are not."""
    return isinstance(value, numbers.Integral | torch.SymInt) and not isinstance(value, bool)


def is_open(size: int | torch.SymInt) -> bool:
    """Return whether a program is being exported that is to run for several values of ``size``.

    A comparison would become its condition. ``torch.compile`` compiles again where one no longer holds; an exported
    program cannot, and fails.
    """
    return torch.compiler.is_exporting() and isinstance(size, torch.SymInt)


def _listed(named: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())
