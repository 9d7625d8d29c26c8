"""The skip path: the gate at each scale and at all four, and the whole of it, token map to concatenated map.

    python -m pytest benchmarks/test_skip_path.py -m gpu --benchmark-only --minutes 8 --record NAME.jsonl

On a CPU, composed against the paper's steps, which it must not be slower than. On a GPU, the operator, composed, and
the paper's steps as they are and compiled, in CUDA graphs as in :mod:`benchmarks.test_channel_attention`; targets are
recorded as met or missed.
"""

import itertools

import pytest
import torch

from . import timing
from .candidates import OPERATOR
from .race import CLOCK, measure
from .skip_path import SKIP_CANDIDATES, SkipProblem, skip_calls, skip_entrant, skip_path
from .workloads import CHANNELS, on_backends

ALL_SCALES = tuple(range(len(CHANNELS)))
SCALES = (*((scale,) for scale in ALL_SCALES), ALL_SCALES)
HALF = torch.bfloat16

# The most important first: a short session measures these. The gate, then the whole path.
CLAIMED = [
    SkipProblem(224, 32, HALF, (0,)),
    SkipProblem(224, 32, HALF, ALL_SCALES),
    SkipProblem(224, 32, HALF, ALL_SCALES, with_reconstruction=True),
]
FURTHER = [
    SkipProblem(224, 4, HALF, ALL_SCALES),
    SkipProblem(512, 4, HALF, ALL_SCALES),
    *(SkipProblem(224, 32, HALF, (scale,)) for scale in ALL_SCALES),
    SkipProblem(224, 32, HALF, ALL_SCALES, channels_last=False),
    SkipProblem(224, 4, HALF, ALL_SCALES, with_reconstruction=True),
    SkipProblem(224, 32, HALF, (0,), with_reconstruction=True),
]
ALL = [
    SkipProblem(pixels, batch, dtype, scales, channels_last)
    for dtype, channels_last, pixels, batch, scales in itertools.product(
        (HALF, torch.float32), (True, False), (224, 512), (32, 4, 1), reversed(SCALES)
    )
]
ALL_WHOLE = [
    SkipProblem(pixels, batch, dtype, ALL_SCALES, channels_last, with_reconstruction=True)
    for dtype, channels_last, (pixels, batch) in itertools.product(
        (HALF, torch.float32), (True, False), ((224, 32), (224, 4), (224, 1), (512, 4))
    )
]
GPU_PROBLEMS = list(dict.fromkeys([*CLAIMED, *FURTHER, *ALL, *ALL_WHOLE]))
CPU_PROBLEM = {"channels": (4, 8, 16, 32), "device": "cpu"}
CPU_PROBLEMS = [
    SkipProblem(32, 2, torch.float32, (0, 3), **CPU_PROBLEM),
    SkipProblem(32, 2, torch.float32, (1,), with_reconstruction=True, **CPU_PROBLEM),
]
LARGE_WORK = 1e8  # bytes; on a processor some tenths of a second, and fewer rounds
PLACES, FIRST_PLACE = 10, 5  # beside the places of the attention operator, which come first

# Of 32 images at 224 pixels in bfloat16, channels-last. Of the operator, the share of the copy bandwidth at the first
# scale and at all; of the others, how many times as fast as they are the operator is.
BANDWIDTH_TARGETS = {(0,): 0.75, ALL_SCALES: 0.60}
GATE_TARGETS = {"reference": 3.0, "reference compiled": 1.3}
WHOLE_PATH_TARGETS = {"reference compiled": 3.0}


def target(problem: SkipProblem, candidate: str) -> float | None:
    """What the project sets out to reach, forward and backward, or ``None``."""
    claimed = (problem.pixels, problem.batch, problem.dtype, problem.channels_last) == (224, 32, HALF, True)
    if not claimed or problem.scales not in BANDWIDTH_TARGETS:
        return None
    if problem.with_reconstruction:
        return WHOLE_PATH_TARGETS.get(candidate) if problem.scales == ALL_SCALES else None
    if candidate == OPERATOR:
        return BANDWIDTH_TARGETS[problem.scales]
    return GATE_TARGETS.get(candidate)


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
    operator = skip_entrant(problem, OPERATOR, passes, count)
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
