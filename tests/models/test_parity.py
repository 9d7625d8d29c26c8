"""Numbers taken from the authors' network: outputs, maps, gradients, statistics and losses.

``parity/uctransnet_base8_img64.npz`` was computed with the published implementation in float32 (its configuration is in
the .json beside it). The published network ends in a sigmoid; ours gives logits.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import uctrans

STORED = Path(__file__).parent / "parity" / "uctransnet_base8_img64.npz"
BACKENDS = ("reference", "composed")
NUM_STEPS = 5


@pytest.fixture(scope="module")
def stored():
    if not STORED.exists():
        pytest.skip(f"{STORED.name}, 8.6 MB, is in the repository and not in the source distribution")
    with np.load(STORED) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def section(stored, prefix):
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}


def published_model(stored, backend, dtype=torch.float32):
    model = uctrans.load_upstream(section(stored, "state.")).to(dtype)
    return uctrans.set_backend(model, backend)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "map_dropout"):
            module.map_dropout = 0.0
    return model.train()


def loss_of(model, stored):
    dtype = model.head.weight.dtype
    probability = model(stored["image"].to(dtype)).sigmoid()
    return F.binary_cross_entropy(probability.clamp(1e-7, 1 - 1e-7), stored["target"].to(dtype)), probability


def adam_losses(model, stored):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(NUM_STEPS):
        loss, _ = loss_of(model, stored)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def gradients_under_published_names(model):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = gradients[name]
    published = uctrans.to_upstream(model)
    return {name: value for name, value in published.items() if "running_" not in name and "num_batches" not in name}


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_output_and_attention_maps(stored, backend):
    model = published_model(stored, backend)
    with torch.no_grad():
        logits, maps = model.forward_with_attention(stored["image"])
        assert torch.equal(logits, model(stored["image"]))
    torch.testing.assert_close(logits.sigmoid(), stored["eval_output"], rtol=0, atol=1e-5)
    assert len(maps) == 4
    for layer, layer_maps in enumerate(maps):
        assert len(layer_maps) == 4
        for scale, attention in enumerate(layer_maps):
            expected = stored[f"attention.layer{layer}.scale{scale + 1}"]
            torch.testing.assert_close(attention, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_output_gradients_and_running_statistics(stored, backend):
    model = without_dropout(published_model(stored, backend))
    loss, probability = loss_of(model, stored)
    loss.backward()
    torch.testing.assert_close(probability, stored["train_output"], rtol=0, atol=1e-5)
    state = uctrans.to_upstream(model)
    for name, expected in section(stored, "buffer_after_step1.").items():
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-5, msg=name)

    gradients = gradients_under_published_names(model)
    expected_gradients = section(stored, "grad.")
    assert gradients.keys() == expected_gradients.keys()
    compared = 0
    for name, expected in expected_gradients.items():
        if expected.norm() > 1e-6:
            assert (gradients[name] - expected).norm() <= 1e-4 * expected.norm(), name
            compared += 1
    assert compared > 150


@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_losses(stored, backend):
    """Five Adam steps against the stored losses, on two threads as they were computed.

    Adam divides by the root of squared gradients, and many gradients here are below its eps: rounding noise steers
    those weights, and the stored float32 losses of the last two steps are themselves 5e-4 from what float64 gives. All
    five agree to 1e-4 where the processor rounds as the stored run's did. On another one the first three still do, and
    the error budget decides on the others: at most twice as far from float64 as the published float32 run is.
    """
    published = stored["adam_losses"].numpy()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        losses = adam_losses(without_dropout(published_model(stored, backend)), stored)
    finally:
        torch.set_num_threads(threads)
    difference = np.abs(losses - published)
    assert difference[:3].max() < 1e-4
    if difference.max() >= 1e-4:
        exact = adam_losses(without_dropout(published_model(stored, backend, torch.float64)), stored)
        assert np.abs(losses - exact).max() < 2 * np.abs(published - exact).max()


def test_backends_take_the_same_adam_steps_in_float64(stored):
    reference, composed = (
        adam_losses(without_dropout(published_model(stored, backend, torch.float64)), stored) for backend in BACKENDS
    )
    assert np.abs(reference - composed).max() < 1e-7


def test_full_size_counts():
    """Parameters and operations that the documentation of UCTransNet states."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = uctrans.UCTransNet(backend="reference").eval()
        image = torch.empty(1, 3, 224, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == 66_430_657
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() == pytest.approx(77.2e9, rel=1e-3)
