"""Ideal work by hand and by PyTorch's counter, and the time that ceilings allow for it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import Ceilings, Work, attention_work, block_work, known_ceilings
from uctrans.kernels import channel_attention
from uctrans.layers import ChannelAttention

CHANNELS = (64, 128, 256, 512)
IMAGE_AT_224 = (1, 4, 196, CHANNELS, 960, torch.bfloat16)


def counted_flop(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def test_work_of_one_image_at_224_pixels_by_hand():
    product = 2 * 960 * 960 * 196 * 4
    packed = 4 * 196 * 960
    assert attention_work("forward", *IMAGE_AT_224) == Work(2 * product, (3 * packed + 196 * 960) * 2)
    assert attention_work("backward", *IMAGE_AT_224) == Work(5 * product, (6 * packed + 196 * 960) * 2)
    both = attention_work("both", *IMAGE_AT_224)
    assert both == Work(7 * product, (9 * packed + 2 * 196 * 960) * 2)
    assert 4 * attention_work("forward", *IMAGE_AT_224).flop == pytest.approx(11.6e9, rel=0.01)


def test_counter_sees_the_same_products_in_the_paper_s_steps():
    query, key, value = (torch.empty(2, 4, 49, 960, device="meta", requires_grad=True) for _ in range(3))
    sizes = (2, 4, 49, CHANNELS, 960, torch.float32)

    def forward():
        return channel_attention(query, key, value, CHANNELS, backend="reference")

    forward_flop = counted_flop(forward)
    assert forward_flop == attention_work("forward", *sizes).flop
    training_flop = counted_flop(lambda: forward().sum().backward())
    # Stored maps save the paper's steps one of five: the scores are not computed again.
    assert training_flop - forward_flop == attention_work("backward", *sizes).flop * 4 / 5


@pytest.mark.parametrize("tokens", [196, 589, 4096])
def test_block_work_is_that_of_the_cheaper_order(tokens):
    inputs = [torch.empty(2, tokens, 960, device="meta") for _ in range(2)]
    flop = {
        backend: counted_flop(ChannelAttention(CHANNELS, 4, dropout=0.0, backend=backend).to("meta"), *inputs)
        for backend in ("reference", "composed")
    }
    sizes = (2, 4, tokens, CHANNELS, 960, torch.bfloat16)
    assert block_work("inference", *sizes).flop == pytest.approx(min(flop.values()))
    assert block_work("training", *sizes).flop == 3 * block_work("inference", *sizes).flop


def test_unknown_passes_are_refused():
    with pytest.raises(ValueError, match="sideways"):
        attention_work("sideways", *IMAGE_AT_224)
    with pytest.raises(ValueError, match="sideways"):
        block_work("sideways", *IMAGE_AT_224)


def test_roofline_is_the_longer_of_computing_and_moving():
    ceilings = Ceilings({torch.bfloat16: 100.0}, bandwidth=10.0, source="by hand")
    assert ceilings.seconds(Work(flop=1000.0, bytes=50.0), torch.bfloat16) == 10.0
    assert ceilings.bound(Work(flop=1000.0, bytes=50.0), torch.bfloat16) == "compute"
    assert ceilings.seconds(Work(flop=1000.0, bytes=500.0), torch.bfloat16) == 50.0
    assert ceilings.bound(Work(flop=1000.0, bytes=500.0), torch.bfloat16) == "memory"


def test_h200_needs_117_microseconds_for_32_images():
    h200 = known_ceilings("NVIDIA H200")
    work = attention_work("forward", 32, *IMAGE_AT_224[1:])
    assert h200.seconds(work, torch.bfloat16) == pytest.approx(117e-6, rel=0.01)
    assert h200.bound(work, torch.bfloat16) == "compute"
    assert known_ceilings("a GPU nobody measured") is None
