"""What is timed must compute the right thing: results against the paper's steps in float64, before any clock runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .candidates import Problem, on_backend
from .timing import Call, as_tuple, run_pass

# ‖result - exact‖ / ‖exact‖. The paper's own steps reach 4e-7, 1e-3 and 9e-3 at 224 pixels.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# With dropout, the mean of so many draws: its distance from the exact result is known within so much.
DRAWS = 16
NOISE_TOLERANCE = 0.2


def assert_exact(
    problem: Problem,
    passes: str,
    call: Call,
    results: Sequence[Tensor],
    published: Callable[..., Tensor] | None = None,
    tolerances: dict[torch.dtype, float] = TOLERANCES,
    images: Sequence[int] | None = None,
) -> float:
    """Fail unless ``results`` of ``call`` without dropout are within tolerance; return the largest relative error.

    ``results`` are the outputs, the gradients by the arguments, or both, as ``passes`` says (``forward``, ``backward``,
    ``both``). The first and the last image are compared, unless ``images`` names others: samples do not depend on each
    other. ``published`` is what runs in float64; by default, the paper's steps of channel attention.
    """
    images = sorted({0, problem.batch - 1}) if images is None else list(images)
    exact = _exact(published or on_backend("reference", problem), call, images, with_gradients=passes != "forward")
    outputs = len(as_tuple(call.output_gradient))
    expected = {"forward": exact[:outputs], "backward": exact[outputs:], "both": exact}[passes]
    errors = [relative_error(result[images], wanted) for result, wanted in zip(results, expected, strict=True)]
    tolerance = tolerances[problem.dtype]
    # Written so that a NaN fails.
    assert all(error <= tolerance for error in errors), f"relative errors {errors} of {passes}, allowed {tolerance}"
    return max(errors)


def assert_drops(problem: Problem, function: Callable[..., Tensor], passes: str, call: Call) -> None:
    """Fail unless ``function`` drops entries at the problem's rate and keeps their expectation.

    Value channels are independent standard normals, so an output with dropout is off by sqrt(p / (1 - p)) of its norm,
    and the mean of n outputs by a factor sqrt(n) less; without dropout, or with one mask for all draws, it is not.
    Gradients are recorded while it runs, or not, as ``passes`` asks.
    """
    images = sorted({0, problem.batch - 1})
    exact = _exact(on_backend("reference", replace(problem, dropout_p=0.0)), call, images, with_gradients=False)[0]
    with torch.set_grad_enabled(passes != "forward"):
        total = sum(function(*call.arguments).detach()[images].double() for _ in range(DRAWS))
    error = relative_error(total / DRAWS, exact)
    expected = math.sqrt(problem.dropout_p / (1 - problem.dropout_p) / DRAWS)
    assert abs(error / expected - 1) <= NOISE_TOLERANCE, f"mean of {DRAWS} draws is off by {error}, not {expected}"


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of ``exact``."""
    return (torch.linalg.vector_norm(result.double() - exact) / torch.linalg.vector_norm(exact)).item()


def _exact(published: Callable[..., Tensor], call: Call, images: list[int], with_gradients: bool) -> tuple[Tensor, ...]:
    arguments = tuple(tensor.detach()[images].double().requires_grad_() for tensor in call.arguments)
    gradients = tuple(gradient[images].double() for gradient in as_tuple(call.output_gradient))
    oracle = Call(arguments, arguments, gradients)
    return run_pass(published, "both" if with_gradients else "forward", oracle)
