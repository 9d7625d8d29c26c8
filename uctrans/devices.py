"""Device names, as training, inference and studies take them: auto, cpu, cuda, cuda:1 or mps."""

import torch


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
