"""The whole UCTransNet: composed against the published sequence of operations."""

import pytest
import torch

import uctrans

from .workloads import MODES, assert_same_function, call, on_backends


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("base_channels", "pixels", "batch", "rounds", "at_least"),
    [(16, 224, 4, 15, 1.0), (64, 224, 1, 15, 1.0), (64, 224, 4, 7, 1.0), (64, 1024, 1, 3, 1.3)],
)
def test_network(benchmark, race, base_channels, pixels, batch, rounds, at_least, mode):
    benchmark.group = f"network, {mode}"
    torch.manual_seed(0)
    model = uctrans.UCTransNet(base_channels=base_channels).to(memory_format=torch.channels_last)
    inputs = [torch.rand(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))]
    composed, reference = on_backends(model, "composed", "reference")
    assert_same_function([composed, reference], inputs)
    sizes = {"base_channels": base_channels, "pixels": pixels, "batch": batch, "mode": mode}
    race(call(composed, inputs, mode), call(reference, inputs, mode), rounds, at_least, **sizes)
