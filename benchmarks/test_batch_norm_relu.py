"""Batch norm and ReLU at the levels of the network, pooled and not: the operator, PyTorch's calls, and these compiled.

    python -m pytest benchmarks/test_batch_norm_relu.py -m gpu --benchmark-only --minutes 8 --record NAME.jsonl

On a GPU, in CUDA graphs as in :mod:`benchmarks.test_channel_attention`; targets are recorded as met or missed. On a
CPU a small map, which shows that the benchmark runs.
"""

import pytest
import torch

from . import timing
from .norm_relu import GPU_PROBLEMS, NORM_CANDIDATES, NormProblem, norm_entrant, operator_or_reason, target
from .race import CLOCK, measure

CPU_PROBLEMS = [
    NormProblem(32, 2, torch.float32, 1, channels=(4, 8), device="cpu", pools=pools) for pools in (False, True)
]
PLACES, FIRST_PLACE = 10, 7  # beside the places of the attention operator and the skip path, which come first


def problems() -> list:
    """Those of the CPU, and those of a GPU in the order of their importance."""
    params = [pytest.param(problem, id=f"cpu-{problem}") for problem in CPU_PROBLEMS]
    for place, problem in enumerate(GPU_PROBLEMS):
        marks = [pytest.mark.gpu, pytest.mark.priority(PLACES * place + FIRST_PLACE)]
        params.append(pytest.param(problem, marks=marks, id=str(problem)))
    return params


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", NORM_CANDIDATES)
@pytest.mark.parametrize("passes", timing.PASSES)
@pytest.mark.parametrize("problem", problems())
def test_batch_norm_relu(request, benchmark, record, problem, passes, candidate):
    benchmark.group = f"batch norm, ReLU and pool, {passes}" if problem.pools else f"batch norm and ReLU, {passes}"
    work = problem.work(passes)
    count = timing.calls_a_sample(work.bytes, problem.device)
    torch._dynamo.reset()
    entrant = norm_entrant(problem, candidate, passes, count)
    operator = operator_or_reason(problem, passes, count)
    aim = target(problem, candidate)
    measure(benchmark, record, request.node.name, problem, passes, candidate, entrant, operator, work, aim)
