"""What the tests of the operators share: devices and dtypes, drawn arguments, and comparison with float64."""

from collections.abc import Callable

import pytest
import torch

from uctrans.kernels.testing import assert_within_budget, outputs_and_gradients

try:
    import hypothesis
    from hypothesis import strategies
except ImportError:
    hypothesis = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Products of bfloat16 are wrong in Triton's interpreter.
TRITON_DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def drawn(examples: int, arguments: Callable[..., dict]) -> Callable:
    """Run a test on so many examples; ``arguments`` takes hypothesis's ``strategies`` and returns one a parameter."""

    def decorate(test: Callable) -> Callable:
        if hypothesis is None:  # as on some machines with a GPU
            return pytest.mark.skip(reason="hypothesis is not installed: pip install hypothesis")(test)
        settings = hypothesis.settings(max_examples=examples, deadline=None)
        return settings(hypothesis.given(**arguments(strategies))(test))

    return decorate


def random_like(tensor, seed=7):
    """Return standard normal numbers in float64 that are those of ``tensor``'s dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(DEVICE, tensor.dtype).double()


def results(function, inputs):
    """Return the output of a function of tensors, and the gradients for a fixed random gradient of the output."""
    inputs = [tensor.detach() for tensor in inputs]
    return outputs_and_gradients(function, inputs, random_like(function(*inputs)))


def assert_as_exact_as(oracle, function, inputs, gradient=None):
    """Compare output and every gradient with ``oracle`` in float64, within the budget of ``oracle`` in their dtype."""
    inputs = [tensor.detach() for tensor in inputs]
    exact = [tensor.double() for tensor in inputs]
    if gradient is None:
        gradient = random_like(oracle(*exact).to(inputs[0].dtype))
    assert_within_budget(
        outputs_and_gradients(function, inputs, gradient),
        outputs_and_gradients(oracle, inputs, gradient),
        outputs_and_gradients(oracle, exact, gradient),
    )
