"""Kernels with faults that the compile checks must find, and one without; the script prints the findings as JSON."""

import dataclasses
import json
import sys

import torch
import triton
import triton.language as tl

from uctrans.kernels.compilation import TARGETS, compiling_for


@triton.jit
def _product_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    width,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        left = tl.load(left_ptr + offs_m[:, None] * width + start + offs_k[None, :])  # [BLOCK_M, BLOCK_K]
        right = tl.load(right_ptr + (start + offs_k[:, None]) * stride + offs_n[None, :])  # [BLOCK_K, BLOCK_N]
        total += tl.dot(left, right, input_precision="ieee")
    tl.store(out_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], total)


@triton.jit
def _chained_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    width,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Use one product in another, as attention does: Triton deals all warps out along the rows."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    left = tl.load(left_ptr + offs_m[:, None] * width + offs_k[None, :])  # [BLOCK_M, BLOCK_K]
    right = tl.load(right_ptr + offs_k[:, None] * stride + offs_n[None, :])  # [BLOCK_K, BLOCK_N]
    scores = tl.dot(left, right)  # [BLOCK_M, BLOCK_N]
    total = tl.dot(scores.to(left.dtype), tl.trans(right))  # [BLOCK_M, BLOCK_K]
    tl.store(out_ptr + offs_m[:, None] * BLOCK_K + offs_k[None, :], total)


SOUND = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
FAULTS = {
    "sound": {},
    "spilling": {"BLOCK_M": 256, "BLOCK_N": 256, "num_stages": 2},
    "off the matrix units": {"BLOCK_M": 16, "BLOCK_N": 16},
    "greedy": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 8},
}


def main() -> None:
    """Compile for the target that the argument names, such as ``sm_90``."""
    before = triton.runtime.jit.JITFunction.run
    matrix = torch.empty(512, 512, dtype=torch.bfloat16, device="meta")
    out = torch.empty(512, 512, device="meta")
    found = {}

    def launch(fault, kernel=_product_kernel, grid=(1,), left=matrix, width=512, stride=512, **changes):
        with compiling_for(*TARGETS[sys.argv[1]]) as compiled:
            kernel[grid](left, matrix, out, width, stride, **SOUND | changes)
        (binary,) = compiled
        found[fault] = dataclasses.asdict(binary) | {"problems": binary.problems()}

    for fault, changes in FAULTS.items():
        launch(fault, **changes)
    launch("wide grid", grid=lambda arguments: (1, 1024 * arguments["BLOCK_M"]))
    launch("sound and chained", _chained_kernel)
    launch("half idle", _chained_kernel, num_warps=8)
    launch("unaligned", left=matrix.flatten()[1:], width=500, stride=1)
    try:
        launch("no power of two", BLOCK_M=48)
    except RuntimeError as error:
        assert str(error).startswith("_product_kernel does not compile")
    assert "no power of two" not in found
    assert triton.runtime.jit.JITFunction.run is before
    print(json.dumps(found))


if __name__ == "__main__":
    main()
