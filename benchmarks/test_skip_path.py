"""The skip path: the gate at each scale and at all four, and the whole of it, token map to concatenated map.

    python -m pytest benchmarks/test_skip_path.py -m gpu --benchmark-only --minutes 8 --record NAME.jsonl

On a CPU, composed against the paper's steps, which it must not be slower than. On a GPU, the operator, composed, and
the paper's steps as they are and compiled, in CUDA graphs as in :mod:`benchmarks.test_channel_attention`; targets are
recorded as met or missed.
"""

import pytest
import torch

from . import timing
from .race import CLOCK, measure
from .skip_path import (
    ALL_SCALES,
    GPU_PROBLEMS,
    SKIP_CANDIDATES,
    SkipProblem,
    operator_or_reason,
    skip_calls,
    skip_entrant,
    skip_path,
    target,
)
from .workloads import on_backends

CPU_PROBLEM = {"channels": (4, 8, 16, 32), "device": "cpu"}
CPU_PROBLEMS = [
    SkipProblem(32, 2, torch.float32, (0, 3), **CPU_PROBLEM),
    SkipProblem(32, 2, torch.float32, (1,), with_reconstruction=True, **CPU_PROBLEM),
]
LARGE_WORK = 1e8  # bytes; on a processor some tenths of a second, and fewer rounds
PLACES, FIRST_PLACE = 10, 5  # beside the places of the attention operator, which come first


def problems(with_reconstruction: bool) -> list:
    """Those of the CPU, and those of a GPU in the order of their importance."""
    params = [pytest.param(problem, id=f"cpu-{problem}") for problem in CPU_PROBLEMS]
    for place, problem in enumerate(GPU_PROBLEMS):
        marks = [pytest.mark.gpu, pytest.mark.priority(PLACES * place + FIRST_PLACE)]
        params.append(pytest.param(problem, marks=marks, id=str(problem)))
    return [param for param in params if param.values[0].with_reconstruction == with_reconstruction]


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", SKIP_CANDIDATES)
@pytest.mark.parametrize("passes", timing.PASSES)
@pytest.mark.parametrize("problem", problems(with_reconstruction=False))
def test_skip_gate(request, benchmark, record, problem, passes, candidate):
    benchmark.group = f"skip gate, {passes}"
    race_in_graphs(request, benchmark, record, problem, passes, candidate)


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", SKIP_CANDIDATES)
@pytest.mark.parametrize("passes", timing.PASSES)
@pytest.mark.parametrize("problem", problems(with_reconstruction=True))
def test_whole_skip_path(request, benchmark, record, problem, passes, candidate):
    benchmark.group = f"whole skip path, {passes}"
    race_in_graphs(request, benchmark, record, problem, passes, candidate)


def race_in_graphs(request, benchmark, record, problem, passes, candidate):
    """The candidate and the operator in turns, both found exact before; what comes of it goes into the record."""
    work = problem.work(passes)
    count = timing.calls_a_sample(work.bytes, problem.device)
    torch._dynamo.reset()
    entrant = skip_entrant(problem, candidate, passes, count)
    operator = operator_or_reason(problem, passes, count)
    aim = target(problem, candidate)
    measure(benchmark, record, request.node.name, problem, passes, candidate, entrant, operator, work, aim)


@pytest.mark.parametrize("passes", ["forward", "both"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize(("pixels", "batch"), [(224, 1), (224, 4), (512, 1)])
@pytest.mark.parametrize("scale", ALL_SCALES, ids=lambda scale: f"scale_{scale + 1}")
def test_skip_gate_on_a_processor(benchmark, race, scale, pixels, batch, channels_last, passes):
    problem = SkipProblem(pixels, batch, torch.float32, (scale,), channels_last, device="cpu")
    benchmark.group = f"skip gate, {problem.place}, {problem.layout}, {passes}"
    published = skip_path(problem)
    composed, reference = on_backends(published, "composed", "reference")
    (call,) = skip_calls(problem, 1)
    for ours, theirs in zip(
        timing.run_pass(composed, passes, call), timing.run_pass(reference, passes, call), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    notes = {"pixels": pixels, "batch": batch, "passes": passes, "scale": scale, "layout": problem.layout}
    race(
        lambda: timing.run_pass(composed, passes, call),
        lambda: timing.run_pass(reference, passes, call),
        rounds=7 if problem.work(passes).bytes > LARGE_WORK else 41,
        at_least=1.0,
        **notes,
    )
