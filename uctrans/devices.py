"""Devices, as training, inference and studies name them (auto, cpu, cuda, cuda:1 or mps), and their memory."""

import contextlib
import errno
from collections.abc import Iterator

import torch

from .system import first_line

OUT_OF_MEMORY = "out of memory: "
# Parts of the messages of PyTorch's allocators and libraries, some of which raise a plain RuntimeError.
SIGNS_OF_SHORT_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "alloc_failed")


def find_device(name: str, default_index: int | None = None) -> torch.device:
    """Return the device called ``name``; auto is CUDA where there is a GPU, otherwise the CPU.

    Args:
        name: auto, cpu, cuda, cuda:1 or mps.
        default_index: Index of the GPU where the name has none; by default PyTorch's current GPU is meant.

    Raises:
        ValueError: The name is unknown, or there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is not a device; give auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and device.index is None and default_index is not None:
        device = torch.device("cuda", default_index)
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        fewer_processes = ", or start no more processes than GPUs" if default_index else ""
        raise ValueError(f"device: {device} is not there; give auto or cpu{fewer_processes}")
    return device


def is_short_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS_OF_SHORT_MEMORY)


@contextlib.contextmanager
def explaining_short_memory(remedy: str) -> Iterator[None]:
    """Turn an error of this block that says that memory ran out into one that says what to do.

    Of blocks inside each other the innermost explains the error.

    Raises:
        torch.OutOfMemoryError: memory ran out, on any device; the message has the remedy and the reason.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_short_of_memory(error) or str(error).startswith(OUT_OF_MEMORY):
            raise
        raise torch.OutOfMemoryError(f"{OUT_OF_MEMORY}{remedy} ({first_line(error)})") from error
