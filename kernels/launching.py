"""What launchers of Triton kernels share: the GPU they launch for, and how a width is cut into tiles."""

from typing import NamedTuple

import torch
import triton

from .backend import is_interpreting

SMALLEST_TILE = 16  # the least that a matrix instruction takes along any axis


class Architecture(NamedTuple):
    """The GPU that kernels are compiled for."""

    family: str  # "cuda", "hip", or "interpreter"
    capability: int  # 80, 90, 100, ... for CUDA, else 0
    shared_memory: int  # bytes that one block may use


# CUDA programming guide, table of compute capabilities; AMD CDNA3 has 64 KiB of LDS.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SHARED_MEMORY_OF_HIP = 64 << 10


def current_architecture() -> Architecture:
    """The architecture of the active Triton driver; the interpreter counts as one of its own."""
    if is_interpreting():
        return Architecture("interpreter", 0, SHARED_MEMORY[90])
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return Architecture(target.backend, 0, SHARED_MEMORY_OF_HIP)
    known = max(capability for capability in SHARED_MEMORY if capability <= target.arch)
    return Architecture("cuda", target.arch, SHARED_MEMORY[known])


def product_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a float32 product in a kernel: tf32 only where torch's own products may use it."""
    return "tf32" if dtype == torch.float32 and _torch_may_use_tf32() else "ieee"


def _torch_may_use_tf32() -> bool:
    # ``allow_tf32`` raises once a precision was set through ``fp32_precision``. That one reads right however it was
    # set, also for all of torch at once, but came with torch 2.9.
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"
