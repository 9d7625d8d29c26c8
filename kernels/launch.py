"""Shared parts of Triton launchers: the GPU they launch for, the precision of products, and the final sum."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import is_interpreting

SMALLEST_TILE = 16  # the least that a matrix instruction takes along any axis

# CUDA programming guide, table of compute capabilities; AMD CDNA3 has 64 KiB of LDS.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SHARED_MEMORY_OF_HIP = 64 << 10

BLOCK_ELEMENTS = 1024  # eight float32 a thread: two 16-byte loads
NUM_WARPS = 4
LARGEST_BLOCK_PARTS = 32  # leaves tiles 32 columns wide, a full 128-byte line of each part


class Architecture(NamedTuple):
    """The GPU that kernels are compiled for."""

    family: str  # "cuda", "hip", or "interpreter"
    capability: int  # 80, 90, 100, ... for CUDA, else 0
    shared_memory: int  # bytes that one block may use


def current_architecture() -> Architecture:
    """Return the architecture of the active Triton driver; the interpreter counts as one of its own."""
    if is_interpreting():
        return Architecture("interpreter", 0, SHARED_MEMORY[90])
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return Architecture(target.backend, 0, SHARED_MEMORY_OF_HIP)
    known = max(capability for capability in SHARED_MEMORY if capability <= target.arch)
    return Architecture("cuda", target.arch, SHARED_MEMORY[known])


def product_precision(dtype: torch.dtype) -> str:
    """Return ``input_precision`` for products of ``dtype``: tf32 only where torch's own products may use it."""
    return "tf32" if dtype == torch.float32 and _torch_may_use_tf32() else "ieee"


def _torch_may_use_tf32() -> bool:
    # Reading ``allow_tf32`` raises once a precision was set through ``fp32_precision``, which came with torch 2.9 and
    # reads right however the precision was set.
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the partial sums that programs wrote, in a fixed order: the same bits in every run.

    Args:
        parts: (parts, width) in float32, contiguous.
        dtype: dtype of the result.

    Returns:
        (width,).
    """
    count, width = parts.shape
    sums = torch.empty(width, dtype=dtype, device=parts.device)
    block_parts = min(triton.next_power_of_2(count), LARGEST_BLOCK_PARTS)
    block_width = BLOCK_ELEMENTS // block_parts
    add_parts_kernel[(triton.cdiv(width, block_width),)](
        parts, sums, count, width, BLOCK_PARTS=block_parts, BLOCK_WIDTH=block_width, num_warps=NUM_WARPS
    )
    return sums


@triton.jit
def add_parts_kernel(parts_ptr, sums_ptr, count, width, BLOCK_PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Write the sums of the columns of (count, width) parts."""
    offs_width = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    offs_part = tl.arange(0, BLOCK_PARTS)
    mask_width = offs_width < width
    parts_ptrs = parts_ptr + offs_part.to(tl.int64)[:, None] * width + offs_width[None, :]
    sums = tl.zeros([BLOCK_PARTS, BLOCK_WIDTH], tl.float32)  # [BLOCK_PARTS, BLOCK_WIDTH]
    for first in range(0, count, BLOCK_PARTS):
        mask = (first + offs_part < count)[:, None] & mask_width[None, :]
        sums += tl.load(parts_ptrs, mask=mask, other=0.0)
        parts_ptrs += BLOCK_PARTS * width
    total = tl.sum(sums, axis=0)  # [BLOCK_WIDTH]
    tl.store(sums_ptr + offs_width, total.to(sums_ptr.dtype.element_ty), mask=mask_width)
