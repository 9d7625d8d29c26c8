"""The table of channel attention's tiles: what it chooses fits every GPU, and the operator sends it nothing else."""

import itertools

import pytest
import torch

from uctrans.kernels.channel_attention import operator

pytest.importorskip("triton")

from uctrans.kernels.channel_attention import triton_blocks
from uctrans.kernels.channel_attention.triton_blocks import Problem
from uctrans.kernels.launch import SHARED_MEMORY, SHARED_MEMORY_OF_HIP, Architecture

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARCHITECTURES = [Architecture("cuda", capability, memory) for capability, memory in SHARED_MEMORY.items()]
ARCHITECTURES.append(Architecture("hip", 0, SHARED_MEMORY_OF_HIP))
HELD = {"forward_blocks": 1, "query_gradient_blocks": 2, "key_value_gradient_blocks": 2}  # tensors of own channels


def longest(table, dtype, is_aligned):
    """The most tokens that the operator sends to the kernel of ``table``."""
    tensor = torch.empty(2, 4, 8, 960 + (not is_aligned), dtype=dtype, device="meta")
    return operator.longest_fused_forward(tensor, tensor, tensor) if HELD[table] == 1 else operator.LONGEST_FUSED


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda found: f"{found.family}{found.capability}")
@pytest.mark.parametrize("table", HELD)
def test_every_choice_fits_the_shared_memory(table, architecture, monkeypatch):
    monkeypatch.setattr(triton_blocks, "current_architecture", lambda: architecture)
    for dtype, is_aligned, heads in itertools.product(DTYPES, (True, False), (4, 128)):
        for tokens in range(1, longest(table, dtype, is_aligned) + 1):
            problem = Problem(heads, tokens, 960, dtype, is_aligned)
            blocks = getattr(triton_blocks, table)(problem)
            needed = triton_blocks.shared_memory_of(blocks, problem, HELD[table])
            assert needed <= architecture.shared_memory, (problem, blocks)
            assert min(blocks.own, blocks.step) >= 16


def test_what_fits_nowhere_is_refused(monkeypatch):
    monkeypatch.setattr(triton_blocks, "current_architecture", lambda: Architecture("cuda", 90, 16 << 10))
    with pytest.raises(ValueError, match="no tiles of Problem"):
        triton_blocks.forward_blocks(Problem(4, 640, 960, torch.bfloat16, is_aligned=True))


def test_longest_forward_depends_on_the_strides_of_every_operand():
    plain = torch.empty(1, 2, 3, 48, dtype=torch.float16, device="meta")
    apart = torch.empty(1, 2, 3, 45, dtype=torch.float16, device="meta")[..., :40]
    shifted = torch.empty(289, dtype=torch.float16, device="meta")[1:].view(1, 2, 3, 48)  # the launcher copies it
    for place in range(3):
        for operand, expected in ((apart, operator.LONGEST_FUSED), (shifted, operator.LONGEST_FUSED_FORWARD)):
            operands = [plain, plain, plain]
            operands[place] = operand
            assert operator.longest_fused_forward(*operands) == expected
