"""What is compared around the decoder's convolutions computes the same, gradients too; and its work by hand."""

import pytest
import torch

from benchmarks.decoder_blocks import (
    BLOCKS,
    CONVOLUTIONS,
    EMBEDDINGS,
    HEADS,
    BlockProblem,
    block,
    block_call,
    convolution_call,
    convolution_work,
    epilogue_work,
    product_call,
    product_work,
)
from benchmarks.roofline import Work, copy_bandwidth
from benchmarks.timing import run_pass

SMALL = BlockProblem(16, 2, torch.float64, 1, channels=(3, 4), outputs=(5, 6), device="cpu")


@pytest.mark.parametrize("candidate", list(CONVOLUTIONS)[1:])
def test_convolutions_over_an_upsampled_half_are_one_function(candidate):
    baseline = next(iter(CONVOLUTIONS))
    expected = run_pass(CONVOLUTIONS[baseline], "both", convolution_call(SMALL, baseline))
    actual = run_pass(CONVOLUTIONS[candidate], "both", convolution_call(SMALL, candidate))
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[-1], expected[-1])  # by the weight
    if len(actual) == len(expected):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("candidates", "candidate", "sizes"), [(EMBEDDINGS, "gathered", (4, 5)), (HEADS, "product", (1, 3))]
)
def test_products_are_the_convolution_that_they_stand_for(candidates, candidate, sizes):
    expected = run_pass(candidates["convolution"], "both", product_call(SMALL, *sizes))
    actual = run_pass(candidates[candidate], "both", product_call(SMALL, *sizes))
    assert len(expected) == 4  # the output, and gradients by map, weight and bias
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("with_pool", [False, True])
@pytest.mark.parametrize("candidate", [name for name in BLOCKS if "compiled" not in name])
def test_blocks_run_with_a_gradient_for_each_output(candidate, with_pool):
    function, weights = block(SMALL, candidate, with_pool)
    call = block_call(SMALL, candidate, with_pool, weights)
    results = run_pass(function, "both", call)
    outputs = 2 if with_pool and candidate != "convolution" else 1
    assert len(results) == outputs + 1 + len(weights)
    assert len(weights) == {"epilogue": 2, "convolution": 2, "block": 4}[candidate]
    assert results[outputs].abs().sum() > 0


def test_work_by_hand():
    pixels = 2 * 8 * 8
    assert convolution_work(SMALL, "forward") == Work(2 * pixels * 9 * 8 * 6, pixels * (8 + 6) * 8)
    assert product_work(SMALL, 4, 5, "both") == Work(3 * 2 * pixels * 4 * 5, 3 * (pixels * 4 + 8 * 5) * 8)
    assert epilogue_work(SMALL, True, "forward") == Work(0.0, pixels * 4 * (3 + 1 / 4) * 8)
    assert epilogue_work(SMALL, False, "both") == Work(0.0, pixels * 4 * 8 * 8)


def test_a_copy_has_a_bandwidth():
    assert 1e7 < copy_bandwidth(1e6, "cpu") < 1e13
