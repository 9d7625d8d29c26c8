"""One channel attention block, projections included: composed against the published sequence of operations."""

import pytest

from .workloads import MODES, assert_same_function, attention_block, attention_tokens, call, on_backends


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("pixels", "batch", "rounds"), [(224, 4, 15), (512, 1, 15), (1024, 1, 9)])
def test_attention_block(benchmark, race, pixels, batch, rounds, mode):
    benchmark.group = f"attention block, {mode}"
    inputs = attention_tokens(pixels, batch)
    composed, reference = on_backends(attention_block(), "composed", "reference")
    assert_same_function([composed, reference], inputs)
    race(call(composed, inputs, mode), call(reference, inputs, mode), rounds, pixels=pixels, batch=batch, mode=mode)
