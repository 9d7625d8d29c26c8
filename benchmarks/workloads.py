"""What is timed of modules: identical ones on two backends, and a call in inference or training, or for a sampler."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from uctrans.kernels import resolve_backend
from uctrans.layers import ChannelAttention, set_backend

from . import gate, timing
from .candidates import Problem, compiled
from .selection import Entrant
from .timing import Call, as_tuple

CHANNELS = (64, 128, 256, 512)
NUM_HEADS = 4
PATCH = 16
MODES = ("inference", "training")


def attention_block() -> ChannelAttention:
    """The published attention block, projections included."""
    torch.manual_seed(0)
    return ChannelAttention(CHANNELS, NUM_HEADS, dropout=0.1, backend="composed")


def attention_tokens(pixels: int, batch: int) -> list[Tensor]:
    """Normalised tokens and context of a square image: two (B, N, 960)."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, (pixels // PATCH) ** 2, sum(CHANNELS))
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def block_entrant(problem: Problem, backend: str, passes: str, count: int, compile_it: bool = False) -> Entrant:
    """The attention block of ``problem`` on ``backend``, ready to be timed: its results have been checked.

    Weights and inputs are the same for all backends. Without dropout, the output and the gradients of the first and the
    last image are compared with the published sequence in float64; with it, only that they are finite.
    """
    torch.manual_seed(0)
    published = ChannelAttention(problem.segments, problem.heads, dropout=problem.dropout_p, backend="reference")
    published.to(problem.device, problem.dtype).train()

    def calls(module: nn.Module) -> list[Call]:
        return block_calls(problem, count, tuple(module.parameters()))

    check = gate.assert_exact if problem.dropout_p == 0 else None
    return module_entrant(problem, published, backend, passes, calls, check, compile_it)


def module_entrant(
    problem: Any,
    published: nn.Module,
    backend: str,
    passes: str,
    calls: Callable[[nn.Module], list[Call]],
    check: Callable[..., float] | None,
    compile_it: bool = False,
) -> Entrant:
    """``published`` on ``backend``, ready to be timed: its results are finite, and ``check`` found them exact.

    ``calls`` makes the calls for the module that runs; leaves that are no arguments are its weights. ``check`` takes
    what :func:`benchmarks.gate.assert_exact` does, and returns the relative error.
    """
    (module,) = on_backends(published, backend)
    function = compiled(module, problem.device) if compile_it else module
    prepared = calls(module)
    sample = timing.sampler(function, passes, prepared)
    sample()
    outputs, arguments = len(as_tuple(prepared[0].output_gradient)), len(prepared[0].arguments)
    without_weights = {"forward": outputs, "backward": arguments, "both": outputs + arguments}[passes]
    results = sample.results[:without_weights]
    for result in results:
        assert result.isfinite().all(), f"{passes} has results that are not finite"
    notes = {"variant": resolve_backend(backend, torch.device(problem.device)) + (" compiled" if compile_it else "")}
    if check is not None:
        exact = copy.deepcopy(published).double()
        notes["relative_error"] = check(problem, passes, prepared[0], results, exact)
    return Entrant(function, prepared, sample, notes)


def block_calls(problem: Problem, count: int, weights: tuple[Tensor, ...]) -> list[Call]:
    """So many calls of the attention block, each with tokens, context and output gradient of its own."""
    generator = torch.Generator(problem.device).manual_seed(1)
    shape = (problem.batch, problem.tokens, sum(problem.segments))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=problem.device, dtype=problem.dtype)

    arguments = [tuple(normal().requires_grad_() for _ in range(2)) for _ in range(count)]
    return [Call(pair, (*pair, *weights), normal()) for pair in arguments]


def on_backends(module: nn.Module, *backends: str) -> list[nn.Module]:
    """A copy of ``module`` for each backend, with the same weights."""
    return [set_backend(copy.deepcopy(module), backend) for backend in backends]


def assert_same_function(modules: list[nn.Module], inputs: list[Tensor]) -> None:
    """Fail unless the modules agree in evaluation: a race between different functions would mean nothing."""
    with torch.inference_mode():
        outputs = [module.eval()(*inputs) for module in modules]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-4)


def call(module: nn.Module, inputs: list[Tensor], mode: str) -> Callable[[], None]:
    """One forward pass in inference mode, or one forward and backward pass in training mode."""
    if mode == "inference":
        module.eval()

        def run() -> None:
            with torch.inference_mode():
                module(*inputs)
    else:
        module.train()
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]

        def run() -> None:
            module.zero_grad(set_to_none=True)
            module(*leaves).square().mean().backward()

    return run
