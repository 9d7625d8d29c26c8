"""Shared parts of the operators' tests: awkward shapes, inputs, and error budgets.

An implementation may be at most twice as far from the float64 oracle as the paper's steps are in the same dtype.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

BUDGET = 2.0
# The reference may hit the oracle by luck; this many units in the last place of the norm are never counted as an error.
FREE_ULPS = {torch.float64: 8.0, torch.float32: 8.0, torch.float16: 0.25, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one channel attention problem."""

    batch: int
    heads: int
    tokens: int
    segments: tuple[int, ...]
    key_channels: int


ATTENTION_SHAPES = (
    AttentionShape(2, 4, 16, (8, 16, 32, 64), 120),
    AttentionShape(8, 2, 1, (3,), 3),  # a single token; several samples, so that luck averages out
    AttentionShape(2, 2, 49, (5, 7), 12),  # odd everything
    AttentionShape(1, 3, 225, (17, 33, 65), 115),  # a 240-pixel image
    AttentionShape(3, 2, 7, (1, 130), 131),  # a scale of one channel beside one over 128
    AttentionShape(1, 2, 300, (12, 20), 24),  # more tokens than channels, keys of another width
    AttentionShape(0, 2, 9, (4, 8), 12),  # an empty batch
)


def attention_inputs(shape: AttentionShape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of ``shape``: standard normal, requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    lead = (shape.batch, shape.heads, shape.tokens)
    widths = (sum(shape.segments), shape.key_channels, shape.key_channels)
    return tuple(
        torch.randn(*lead, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for width in widths
    )


def outputs_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Return ``function(*inputs)``, and the gradient of its inner product with ``weight`` by each input."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, weight.to(output.dtype))]


def assert_within_budget(actual: Sequence[Tensor], baseline: Sequence[Tensor], oracle: Sequence[Tensor]) -> None:
    """Check that each of ``actual`` is at most ``BUDGET`` times as far from the float64 ``oracle`` as ``baseline``.

    Distance is the Frobenius norm of the difference. ``FREE_ULPS`` of the oracle's norm are free, few in half
    precision, where one rounding of the result is an error that both share.
    """
    for place, spent in enumerate(budget_spent(actual, baseline, oracle)):
        assert spent <= 1, f"result {place}: {spent:.2f} times the error it may have"


def budget_spent(actual: Sequence[Tensor], baseline: Sequence[Tensor], oracle: Sequence[Tensor]) -> list[float]:
    """Return each tensor's error over the error it may have; see :func:`assert_within_budget`."""
    shares = []
    for place, (result, own, exact) in enumerate(zip(actual, baseline, oracle, strict=True)):
        assert result.shape == exact.shape, f"result {place}: {tuple(result.shape)} instead of {tuple(exact.shape)}"
        error = torch.linalg.vector_norm(result.double() - exact).item()
        own_error = torch.linalg.vector_norm(own.double() - exact).item()
        free = FREE_ULPS[own.dtype] * torch.finfo(own.dtype).eps * torch.linalg.vector_norm(exact).item()
        allowed = BUDGET * own_error + free
        if error == 0:
            shares.append(0.0)
        else:
            shares.append(error / allowed if allowed > 0 and math.isfinite(error) else math.inf)
    return shares


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill fresh memory with NaN (the largest integer), so that reading what was not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills
