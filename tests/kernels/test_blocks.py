"""The table of channel attention's tiles: what it chooses fits every GPU, and dispatch sends it nothing else."""

import itertools

import pytest
import torch

from uctrans.kernels import channel_attention
from uctrans.kernels.channel_attention import dispatch
from uctrans.kernels.testing import AttentionShape, attention_inputs, outputs_and_gradients

pytest.importorskip("triton")

from uctrans.kernels.channel_attention import triton_blocks
from uctrans.kernels.channel_attention.triton_blocks import Problem
from uctrans.kernels.launch import SHARED_MEMORY, SHARED_MEMORY_OF_HIP, Architecture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARCHITECTURES = [Architecture("cuda", capability, memory) for capability, memory in SHARED_MEMORY.items()]
ARCHITECTURES.append(Architecture("hip", 0, SHARED_MEMORY_OF_HIP))
HELD = {"forward_blocks": 1, "query_gradient_blocks": 2, "key_value_gradient_blocks": 2}  # tensors of own channels


def longest(table, dtype, is_aligned):
    """The most tokens that dispatch sends to the kernel of ``table``."""
    tensor = torch.empty(2, 4, 8, 960 + (not is_aligned), dtype=dtype, device="meta")
    return dispatch.longest_fused_forward(tensor, tensor, tensor) if HELD[table] == 1 else dispatch.LONGEST_FUSED


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


@pytest.mark.parametrize(
    ("change", "is_aligned"),
    [
        (lambda base: base[:-8].view(1, 2, 3, 48), True),
        (lambda base: base[8:].view(1, 2, 3, 48), True),
        (lambda base: base[1:-7].view(1, 2, 3, 48), False),  # starts one entry into its memory
        (lambda base: base[:-8].view(1, 2, 3, 48)[..., :40], True),  # rows 48 apart
        (lambda base: base[:-8].view(1, 2, 3, 48)[..., :47], True),  # an odd width, and rows 48 apart
        (lambda base: base[:-26].view(1, 2, 3, 45)[..., :40], False),  # rows 45 apart
        (lambda base: base[:-8].view(1, 2, 48, 3).transpose(2, 3), False),  # channels 3 apart
        (lambda base: base[:48].expand(1, 2, 3, 48), True),  # one row for all
    ],
)
def test_alignment_is_that_of_rows_in_memory(change, is_aligned):
    tensor = change(torch.empty(296, dtype=torch.float16, device="meta"))
    plain = torch.empty(1, 2, 3, 48, dtype=torch.float16, device="meta")
    assert dispatch.has_aligned_rows(plain, tensor) is is_aligned
    limit = dispatch.LONGEST_FUSED_FORWARD if is_aligned else dispatch.LONGEST_FUSED
    for place in range(3):
        operands = [plain, plain, plain]
        operands[place] = tensor
        assert dispatch.longest_fused_forward(*operands) == limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_aligned", [True, False])
def test_what_kernels_take_backward_they_take_forward(dtype, is_aligned, monkeypatch):
    monkeypatch.setattr(dispatch, "is_interpreting", lambda: True)
    for tokens in (1, dispatch.LONGEST_FUSED, dispatch.LONGEST_FUSED + 1, dispatch.LONGEST_FUSED_FORWARD + 1):
        query = torch.empty(2, 4, tokens, 960 + (not is_aligned), dtype=dtype, device="meta")
        assert dispatch.is_fused_backward(query) == (tokens <= dispatch.LONGEST_FUSED)
        goes_further = is_aligned and dtype != torch.float32
        most = dispatch.LONGEST_FUSED_FORWARD if goes_further else dispatch.LONGEST_FUSED
        assert dispatch.is_fused_forward(query, query, query) == (tokens <= most)


def test_launcher_and_dispatch_agree_on_alignment():
    from uctrans.kernels.channel_attention.triton import _problem

    memory = torch.empty(1 + 2 * 4 * 300 * 960, dtype=torch.bfloat16, device="meta")
    aligned, shifted = memory[:-1].view(2, 4, 300, 960), memory[1:].view(2, 4, 300, 960)
    for operands in itertools.product((aligned, shifted), repeat=3):
        assert _problem(*operands).is_aligned == (dispatch.longest_fused_forward(*operands) >= 300)


@pytest.mark.parametrize("most", [3, 4])
def test_both_sides_of_the_most_heads_agree(most, monkeypatch):
    from uctrans.kernels.channel_attention import triton

    launched = []
    forward, backward = triton.forward, triton.backward
    monkeypatch.setattr(triton, "forward", lambda *arguments: launched.append("forward") or forward(*arguments))
    monkeypatch.setattr(triton, "backward", lambda *arguments: launched.append("backward") or backward(*arguments))
    monkeypatch.setattr(dispatch, "MOST_HEADS", most)
    segments = (4, 8)
    inputs = [
        tensor.detach().to(DEVICE) for tensor in attention_inputs(AttentionShape(2, 2, 9, segments, 12), torch.float32)
    ]
    weight = torch.arange(9 * 12.0, device=DEVICE).view(9, 12).remainder(5).expand(2, 9, 12) - 2
    settings = {"dropout_p": 0.2, "seed": 20}
    results, expected = (
        outputs_and_gradients(
            lambda *operands, backend=backend: channel_attention(*operands, segments, backend=backend, **settings),
            operands,
            weight,
        )
        for backend, operands in (("triton", inputs), ("reference", [tensor.double() for tensor in inputs]))
    )
    assert launched == (["forward", "backward"] if most == 4 else [])
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)
