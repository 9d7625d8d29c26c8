"""The last step of a deterministic sum over programs: each wrote its part, and the parts are added in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ELEMENTS = 1024  # eight float32 a thread: two 16-byte loads
NUM_WARPS = 4
LARGEST_BLOCK_PARTS = 32  # leaves tiles 32 columns wide, a full 128-byte line of each part


@triton.jit
def _add_parts(parts_ptr, sums_ptr, count, width, BLOCK_PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
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


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """(parts, width) in float32, contiguous -> (width,) in ``dtype``, the same to the last bit in every run."""
    count, width = parts.shape
    sums = torch.empty(width, dtype=dtype, device=parts.device)
    block_parts = min(triton.next_power_of_2(count), LARGEST_BLOCK_PARTS)
    block_width = BLOCK_ELEMENTS // block_parts
    with torch.cuda.device_of(parts):
        _add_parts[(triton.cdiv(width, block_width),)](
            parts, sums, count, width, block_parts, block_width, num_warps=NUM_WARPS
        )
    return sums
