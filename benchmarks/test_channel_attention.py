"""The channel-attention operator alone, forward, backward and both, against everything plain PyTorch offers.

    python -m pytest benchmarks -m gpu --benchmark-only --minutes 8 --record benchmarks/results/NAME.jsonl

On a GPU every candidate is captured into CUDA graphs (:mod:`benchmarks.timing`); a test times one candidate and the
operator in turns. Without one, a small problem runs through the same code on the CPU. Each test stands in the record as
soon as it ends. Targets are recorded as met or missed; a miss does not fail the run.
"""

import itertools

import pytest
import torch

from . import selection, timing
from .candidates import CANDIDATES, OPERATOR, Problem, calls
from .race import CLOCK, measure, target_notes
from .roofline import attention_work

CPU_PROBLEMS = [
    Problem(64, 2, torch.float32, dropout_p, segments=(8, 16, 32, 64), device="cpu") for dropout_p in (0.0, 0.1)
]

# The most important first: a short session measures these.
CLAIMED = [Problem(224, batch, torch.bfloat16) for batch in (32, 4)]
DROPPING = [Problem(224, batch, torch.bfloat16, 0.1) for batch in (32, 4)]
FURTHER = [
    *(Problem(224, 1, torch.bfloat16), Problem(224, 32, torch.float32), Problem(224, 4, torch.float32)),
    *(Problem(pixels, 4, torch.bfloat16) for pixels in (512, 384, 1024)),
]
ALL = [
    Problem(pixels, batch, dtype, dropout_p)
    for dtype, pixels, dropout_p, batch in itertools.product(
        (torch.bfloat16, torch.float32), (224, 384, 512, 1024), (0.0, 0.1), (4, 32, 1)
    )
]
GPU_PROBLEMS = list(dict.fromkeys([*CLAIMED, *DROPPING, *FURTHER, *ALL]))

PLACES = 10  # in the order of tests, for each problem: its races, its memory, and what else stands before the next

# Times as fast as the candidate, at 224 pixels in bfloat16; for the operator itself, the fraction of the roofline.
TARGETS = {
    ("forward", 32, "reference compiled"): 2.5,
    ("forward", 32, "sdpa"): 1.3,
    ("forward", 32, OPERATOR): 0.55,
    ("forward", 4, "reference compiled"): 1.5,
    ("forward", 4, OPERATOR): 0.33,
    ("backward", 32, "reference compiled"): 1.2,
    ("backward", 32, OPERATOR): 0.35,
}
MEMORY_TARGET = 0.25  # of the peak of the paper's steps


def problems() -> list:
    """Those of the CPU, and those of a GPU in the order of their importance."""
    on_gpu = [
        pytest.param(problem, marks=[pytest.mark.gpu, pytest.mark.priority(PLACES * place)], id=str(problem))
        for place, problem in enumerate(GPU_PROBLEMS)
    ]
    return [*(pytest.param(problem, id=f"cpu-{problem}") for problem in CPU_PROBLEMS), *on_gpu]


def target(passes: str, problem: Problem, candidate: str) -> float | None:
    """What the project sets out to reach, or ``None``."""
    if (problem.pixels, problem.dtype) != (224, torch.bfloat16):
        return None
    return TARGETS.get((passes, problem.batch, candidate))


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("passes", timing.PASSES)
@pytest.mark.parametrize("problem", problems())
def test_channel_attention(request, benchmark, record, problem, passes, candidate):
    benchmark.group = passes
    work = attention_work(passes, *problem.sizes)
    cold = calls(problem, timing.calls_a_sample(work.bytes, problem.device))
    entrant = selection.fastest(candidate, problem, passes, cold)
    # The operator races against itself too: the spread of those pairs is the noise of all others.
    operator = selection.operator_or_reason(problem, passes, cold)
    aim = target(passes, problem, candidate)
    measure(benchmark, record, request.node.name, problem, passes, candidate, entrant, operator, work, aim)


@pytest.mark.gpu
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(problem, id=str(problem), marks=pytest.mark.priority(PLACES * GPU_PROBLEMS.index(problem) + 1))
        for problem in (CLAIMED[0], DROPPING[0], Problem(1024, 4, torch.bfloat16))
    ],
)
def test_peak_memory(request, benchmark, record, problem, candidate):
    benchmark.group = "peak memory"
    (call,) = calls(problem, 1)
    function, variant = selection.any_right(candidate, problem, call)
    peak = benchmark.pedantic(timing.peak_bytes, args=(function, call), rounds=1)
    notes = problem.as_json() | {"candidate": candidate, "variant": variant, "peak_bytes": peak}
    if candidate == OPERATOR:
        published, _ = selection.any_right("reference", problem, call)
        reference_peak = timing.peak_bytes(published, call)
        fraction = peak / reference_peak
        notes |= {"reference_peak_bytes": reference_peak, "fraction_of_reference": fraction}
        notes |= target_notes(MEMORY_TARGET, fraction, at_most=True)
    benchmark.extra_info |= notes
    record.measured_test(request.node.name, "peak memory", notes, [])
