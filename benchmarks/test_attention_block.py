"""One channel attention block, projections included: composed against the published sequence of operations."""

import pytest

from .workloads import MODES, assert_same_function, attention_block, attention_tokens, call, on_backends


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("pixels", "batch", "rounds", "at_least"), [(224, 4, 15, 1.0), (512, 1, 15, 1.65), (1024, 1, 9, 4.0)]
)
def test_attention_block(benchmark, race, pixels, batch, rounds, at_least, mode):
    benchmark.group = f"attention block, {mode}"
    inputs = attention_tokens(pixels, batch)
    composed, reference = on_backends(attention_block(), "composed", "reference")
    assert_same_function([composed, reference], inputs)
    sizes = {"pixels": pixels, "batch": batch, "mode": mode}
    race(call(composed, inputs, mode), call(reference, inputs, mode), rounds, at_least, **sizes)
