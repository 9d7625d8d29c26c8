"""What the benchmarks time: the same function on both sides."""

import pytest
import torch

from benchmarks.workloads import assert_same_function, attention_block, attention_tokens, call, on_backends


def test_sides_share_weights_and_not_storage():
    block = attention_block()
    composed, reference = on_backends(block, "composed", "reference")
    assert (composed.backend, reference.backend) == ("composed", "reference")
    for ours, theirs in zip(composed.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


def test_different_functions_do_not_race():
    block, inputs = attention_block(), attention_tokens(pixels=32, batch=1)
    composed, reference = on_backends(block, "composed", "reference")
    assert_same_function([composed, reference], inputs)
    with torch.no_grad():
        reference.key_value[1, 0, 0] += 1.0
    with pytest.raises(AssertionError):
        assert_same_function([composed, reference], inputs)


def test_training_call_fills_gradients_and_inference_does_not():
    (block,) = on_backends(attention_block(), "composed")
    inputs = attention_tokens(pixels=32, batch=1)
    call(block, inputs, "inference")()
    assert block.key_value.grad is None
    call(block, inputs, "training")()
    assert block.key_value.grad.abs().sum() > 0
