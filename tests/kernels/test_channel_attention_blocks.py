"""The table of channel attention's tiles: what it chooses fits every GPU."""

import pytest
import torch

pytest.importorskip("triton")

from uctrans.kernels.channel_attention import triton
from uctrans.kernels.launch import SHARED_MEMORY, SHARED_MEMORY_OF_HIP, Architecture

ARCHITECTURES = [Architecture("cuda", capability, memory) for capability, memory in SHARED_MEMORY.items()]
ARCHITECTURES.append(Architecture("hip", 0, SHARED_MEMORY_OF_HIP))


def empty_query(batch=1, tokens=196, channels=960, dtype=torch.bfloat16):
    return torch.empty(batch, 4, tokens, channels, dtype=dtype, device="meta")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda found: f"{found.family}{found.capability}")
def test_every_choice_fits_the_shared_memory(architecture, monkeypatch):
    monkeypatch.setattr(triton, "current_architecture", lambda: architecture)
    for tokens in range(1, triton.LONGEST_FUSED + 1):
        for batch in (1, 32):
            query = empty_query(batch, tokens)
            blocks = triton.fused_blocks(query, query, query)
            assert triton.shared_memory_of(blocks, query) <= architecture.shared_memory, (query.shape, blocks)
            assert blocks.query_channels == 16 * blocks.num_warps  # warps share no rows of a product


def test_maps_take_what_the_tiles_do_not_hold(monkeypatch):
    monkeypatch.setattr(triton, "current_architecture", lambda: Architecture("cuda", 90, SHARED_MEMORY[90]))
    fits = empty_query()
    assert triton.fused_blocks(fits, fits, fits) is not None
    unaligned = empty_query(channels=961)[..., 1:]
    for query in (empty_query(tokens=257), empty_query(dtype=torch.float32), unaligned):
        assert triton.fused_blocks(query, fits, fits) is None
    assert triton.fused_blocks(fits, unaligned, fits) is None
    monkeypatch.setattr(triton, "current_architecture", lambda: Architecture("cuda", 90, 16 << 10))
    assert triton.fused_blocks(fits, fits, fits) is None
